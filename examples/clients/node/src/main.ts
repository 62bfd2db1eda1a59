// The command line.

import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { conform } from './conform.js';
import { Failure } from './failures.js';
import { train } from './train.js';
import { Worker } from './worker.js';

const USAGE = `usage: client conform ADDRESS WORKER_ID
       client train --server ADDRESS --worker-id ID --data CSV --part I/N --rounds R [--chief]

conform lets the conformance kit play this client; train is a worker of a job.
`;
const GOODBYE_TIMEOUT_MS = 2_000;

class UsageError extends Error {}

async function main([command, ...args]: string[]): Promise<void> {
  switch (command) {
    case '--help':
    case '-h':
      process.stdout.write(USAGE);
      return;
    case 'conform': {
      if (args.length !== 2) throw new UsageError('conform takes ADDRESS and WORKER_ID');
      const worker = new Worker(addressOf(args[0]), args[1]);
      return work(worker, conform(worker));
    }
    case 'train': {
      const { server, workerId, isChief, ...options } = trainArguments(args);
      const worker = new Worker(addressOf(server), workerId, isChief);
      return work(worker, train(worker, options));
    }
    default:
      throw new UsageError(command === undefined ? 'conform or train is missing' : `the command ${command} is unknown`);
  }
}

function addressOf(word: string): string {
  if (!/^(unix:.+|\S+:\d+)$/.test(word)) throw new UsageError(`an address is HOST:PORT or unix:PATH, not "${word}"`);
  return word;
}

function trainArguments(args: string[]) {
  const { values } = parseArgs({
    args,
    options: {
      server: { type: 'string' },
      'worker-id': { type: 'string' },
      data: { type: 'string' },
      part: { type: 'string' },
      rounds: { type: 'string' },
      chief: { type: 'boolean', default: false },
    },
  });
  const { server, 'worker-id': workerId, data, part = '', rounds = '', chief: isChief } = values;
  if (!server || !workerId || !data) throw new UsageError('--server, --worker-id and --data are needed');
  const [, index, count] = /^(\d+)\/(\d+)$/.exec(part)?.map(Number) ?? [];
  if (!(index < count)) throw new UsageError(`--part is I/N with I from 0 to N - 1, not "${part}"`);
  if (!/^[1-9]\d*$/.test(rounds)) throw new UsageError(`--rounds is a whole number from 1 on, not "${rounds}"`);
  return { server, workerId, isChief, data, index, count, rounds: BigInt(rounds) };
}

/** Lets the work go on to its end; Ctrl-C or SIGTERM ends it before, with a goodbye to the server. */
async function work(worker: Worker, work: Promise<void>): Promise<void> {
  const goodbye = async (exitCode: number) => {
    await Promise.race([worker.leave().catch(() => {}), sleep(GOODBYE_TIMEOUT_MS)]);
    process.exit(exitCode);
  };
  process.once('SIGINT', () => void goodbye(130));
  process.once('SIGTERM', () => void goodbye(143));
  try {
    await work;
  } finally {
    worker.close();
  }
}

/** What went wrong, for people, and the exit status; undefined: a defect of this program. */
function explain(error: unknown): [string, number] | undefined {
  if (!(error instanceof Error)) return undefined;
  const code = 'code' in error ? String(error.code) : '';
  if (error instanceof UsageError || code.startsWith('ERR_PARSE_ARGS')) return [`${error.message}\n\n${USAGE}`, 2];
  if (error instanceof Failure) return [`${error.code}: ${error.message}\n`, 1];
  if ('syscall' in error) return [`${error.message}\n`, 1]; // a file that cannot be read
  return undefined;
}

try {
  await main(process.argv.slice(2));
} catch (error) {
  const [message, exitCode] = explain(error) ?? [];
  if (message === undefined) throw error;
  process.stderr.write(`client: ${message}`);
  process.exitCode = exitCode;
}
