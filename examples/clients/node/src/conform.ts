// Lets the conformance kit play this client: a command a line in, an answer a line out (docs/conformance.md).

import { createInterface } from 'node:readline';

import { Failure, Refusal } from './failures.js';
import type { Center, Worker } from './worker.js';
import type { Variable__Output } from '../generated/modelaverage/v1/Variable.js';

const TYPES = {
  f32: 'DATA_TYPE_FLOAT32',
  f64: 'DATA_TYPE_FLOAT64',
  f16: 'DATA_TYPE_FLOAT16',
  bf16: 'DATA_TYPE_BFLOAT16',
} as const;

/** Obeys standard input until it ends. */
export async function conform(worker: Worker): Promise<void> {
  for await (const line of createInterface({ input: process.stdin })) {
    process.stdout.write(`${await answer(worker, line)}\n`);
  }
}

async function answer(worker: Worker, line: string): Promise<string> {
  const [command, ...words] = line.split(' ');
  try {
    return ['ok', ...(await obey(worker, command, words))].join(' ');
  } catch (error) {
    const { code, message } = error instanceof Failure ? error : new Refusal(String(error)); // a malformed command
    return `error ${code} ${message}`;
  }
}

async function obey(worker: Worker, command: string, words: string[]): Promise<string[]> {
  switch (command) {
    case 'initialize': {
      const [globalStep, fragmentSizeBytes, ...given] = words;
      const step = whole(globalStep, 0n, 2n ** 64n);
      const cut = Number(whole(fragmentSizeBytes, 0n, 2n ** 32n));
      const parsed = given.map(parseVariable);
      const variables = parsed.map(({ variable }) => variable);
      const manifest = { variables, fragmentSizeBytes: cut, shard: null, frozenDigests: Buffer.alloc(0) };
      const response = await worker.initialize(manifest, parsed.map(({ value }) => value), step);
      return [response.initialized ? 'initialized' : 'already', response.globalStep];
    }
    case 'pull': {
      const center = await worker.pull(words[0] === 'wait');
      return [String(center.globalStep), ...centerWords(center)];
    }
    case 'push': {
      const { outcome, contributors, center } = await worker.push(words.map(bytesOf));
      return [outcome, String(center.globalStep), contributors.join(',') || '-', ...centerWords(center)];
    }
    case 'status': {
      const { phase, globalStep } = await worker.status();
      return [String(phase).replace('PHASE_', '').toLowerCase(), globalStep];
    }
    case 'leave':
      await worker.leave();
      return [];
    case 'finish':
      await worker.finish();
      return [];
    default:
      throw new Refusal(`the command ${command} is unknown`);
  }
}

function parseVariable(word: string): { variable: Variable__Output; value: Buffer } {
  const [name, type, shape, bytes] = word.split(':');
  if (!(type in TYPES) || bytes === undefined) throw new Refusal(`${word} is not NAME:TYPE:SHAPE:BYTES`);
  const dataType = TYPES[type as keyof typeof TYPES];
  const extents = shape === '' ? [] : shape.split(',');
  const variable = {
    name: bytesOf(name).toString(),
    dataType,
    shape: extents.map((extent) => String(whole(extent, -(2n ** 63n), 2n ** 63n))),
    part: null,
  };
  return { variable, value: bytesOf(bytes) };
}

function centerWords({ variables, values }: Center): string[] {
  return variables.map(({ name, dataType, shape }, i) => {
    const type = Object.entries(TYPES).find(([, known]) => known === dataType)![0];
    return [Buffer.from(name).toString('hex'), type, shape.join(','), values[i].toString('hex') || '-'].join(':');
  });
}

/** A number from `start` on and below `end`. Protobuf for JavaScript cuts off what does not fit into a field. */
function whole(word: string, start: bigint, end: bigint): bigint {
  const number = BigInt(word);
  if (number < start || number >= end) throw new Refusal(`${word} is not from ${start} to ${end - 1n}`);
  return number;
}

function bytesOf(word: string): Buffer {
  const bytes = Buffer.from(word === '-' ? '' : word, 'hex');
  if (word !== '-' && bytes.length * 2 !== word.length) throw new Refusal(`${word} is not in hex`);
  return bytes;
}
