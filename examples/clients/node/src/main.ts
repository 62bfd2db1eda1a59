// The command line.

import { parseArgs } from 'node:util';

import { conform } from './conform.js';
import { Failure } from './failures.js';
import { train } from './train.js';

const USAGE = `usage: client conform ADDRESS WORKER_ID
       client train --server ADDRESS --worker-id ID --data CSV --part I/N --rounds R [--chief]

conform lets the conformance kit play this client; train is a worker of a job.
`;

class UsageError extends Error {}

function main(): Promise<void> {
  const [command, ...rest] = process.argv.slice(2);
  if (command === 'conform') {
    if (rest.length !== 2) throw new UsageError('conform takes ADDRESS and WORKER_ID');
    return conform(rest[0], rest[1]);
  }
  if (command === 'train') return train(trainArguments(rest));
  throw new UsageError(command === undefined ? 'conform or train is missing' : `the command ${command} is unknown`);
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
  const { server, 'worker-id': workerId, data, part = '', rounds = '', chief } = values;
  if (!server || !workerId || !data) throw new UsageError('--server, --worker-id and --data are needed');
  const [, index, count] = /^(\d+)\/(\d+)$/.exec(part)?.map(Number) ?? [];
  if (!(index < count)) throw new UsageError(`--part is I/N with I from 0 to N - 1, not "${part}"`);
  if (!/^[1-9]\d*$/.test(rounds)) throw new UsageError(`--rounds is a whole number from 1 on, not "${rounds}"`);
  return { server, workerId, data, index, count, rounds: BigInt(rounds), isChief: chief };
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

if (process.argv[2] === '--help' || process.argv[2] === '-h') {
  process.stdout.write(USAGE);
} else {
  try {
    await main();
  } catch (error) {
    const [message, exitCode] = explain(error) ?? [];
    if (message === undefined) throw error;
    process.stderr.write(`client: ${message}`);
    process.exit(exitCode);
  }
}
