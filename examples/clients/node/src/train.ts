// A worker: softmax regression on the digits, averaged after every 10 steps (examples/clients/README.md).

import { readFile } from 'node:fs/promises';

import { Failure, Refusal } from './failures.js';
import type { Center, Worker } from './worker.js';

const PIXELS = 64;
const CLASSES = 10;
const STEPS_PER_ROUND = 10;
const LEARNING_RATE = 0.5;
const FRAGMENT_SIZE_BYTES = 1024;

const MANIFEST = {
  variables: [
    { name: 'weights', dataType: 'DATA_TYPE_FLOAT64' as const, shape: [String(PIXELS), String(CLASSES)], part: null },
    { name: 'bias', dataType: 'DATA_TYPE_FLOAT64' as const, shape: [String(CLASSES)], part: null },
  ],
  fragmentSizeBytes: FRAGMENT_SIZE_BYTES,
  shard: null,
  frozenDigests: Buffer.alloc(0),
};

export interface TrainOptions {
  /** The file of digits.py. */
  readonly data: string;
  /** This worker has the rows whose number leaves the rest `index` when divided by `count`. */
  readonly index: number;
  readonly count: number;
  /** Training ends at this `global_step`. */
  readonly rounds: bigint;
}

interface Row {
  readonly label: number;
  readonly inputs: Float64Array;
}

interface Model {
  /** [PIXELS, CLASSES], row-major. */
  readonly weights: Float64Array;
  readonly bias: Float64Array;
}

/** Trains until the job is done, then says that it has finished. */
export async function train(worker: Worker, options: TrainOptions): Promise<void> {
  const rows = parseRows(options.data, await readFile(options.data, 'utf8'));
  const own = rows.filter((_, i) => i % options.count === options.index);
  if (worker.isChief) {
    await worker.initialize(MANIFEST, [Buffer.alloc(PIXELS * CLASSES * 8), Buffer.alloc(CLASSES * 8)]);
  }
  let center = await worker.pull(true);
  let model = modelOf(center);
  let rounds = 0;
  const progress = () => `global_step ${center.globalStep}, accuracy ${accuracyOf(model, rows).toFixed(4)}`;
  while (center.globalStep < options.rounds) {
    for (let step = 0; step < STEPS_PER_ROUND; step++) descend(model, own);
    center = await average(worker, model, BigInt(STEPS_PER_ROUND * ++rounds));
    model = modelOf(center);
    if (rounds % 10 === 0) console.error(`${worker.workerId}: ${progress()}`);
  }
  await worker.finish();
  console.log(`${worker.workerId} (node): ${rounds} rounds, ${progress()}`);
}

async function average(worker: Worker, model: Model, localStep: bigint): Promise<Center> {
  try {
    return (await worker.push([bytesOf(model.weights), bytesOf(model.bias)], localStep)).center;
  } catch (error) {
    // The server came back with an older center, or with a new one: go on from what it has.
    if (!(error instanceof Failure) || error.action !== 'pull') throw error;
    return worker.pull(true);
  }
}

/** One step down the gradient of the mean cross-entropy. */
function descend({ weights, bias }: Model, rows: Row[]): void {
  const weightsGradient = new Float64Array(weights.length);
  const biasGradient = new Float64Array(bias.length);
  for (const { label, inputs } of rows) {
    const errors = softmax(scoresOf({ weights, bias }, inputs));
    errors[label] -= 1;
    for (let c = 0; c < CLASSES; c++) biasGradient[c] += errors[c];
    for (let p = 0; p < PIXELS; p++) {
      if (inputs[p] === 0) continue; // half of all pixels are blank
      for (let c = 0; c < CLASSES; c++) weightsGradient[p * CLASSES + c] += inputs[p] * errors[c];
    }
  }
  const scale = LEARNING_RATE / rows.length;
  weightsGradient.forEach((gradient, i) => (weights[i] -= scale * gradient));
  biasGradient.forEach((gradient, i) => (bias[i] -= scale * gradient));
}

function softmax(scores: Float64Array): Float64Array {
  const highest = Math.max(...scores); // subtracted, so that exp cannot overflow
  const exponentials = scores.map((score) => Math.exp(score - highest));
  const sum = exponentials.reduce((a, b) => a + b);
  return exponentials.map((exponential) => exponential / sum);
}

function scoresOf({ weights, bias }: Model, inputs: Float64Array): Float64Array {
  const scores = bias.slice();
  for (let p = 0; p < PIXELS; p++) {
    if (inputs[p] === 0) continue;
    for (let c = 0; c < CLASSES; c++) scores[c] += inputs[p] * weights[p * CLASSES + c];
  }
  return scores;
}

function accuracyOf(model: Model, rows: Row[]): number {
  const isRight = ({ label, inputs }: Row) => {
    const scores = scoresOf(model, inputs);
    return scores.indexOf(Math.max(...scores)) === label;
  };
  return rows.filter(isRight).length / rows.length;
}

function parseRows(file: string, text: string): Row[] {
  return text.trimEnd().split('\n').map((line, i) => {
    const [label, ...pixels] = line.split(',').map(Number);
    if (pixels.length !== PIXELS || [label, ...pixels].some(Number.isNaN)) {
      throw new Refusal(`${file}, row ${i}: not a label and ${PIXELS} pixels`);
    }
    return { label, inputs: Float64Array.from(pixels, (pixel) => pixel / 16) };
  });
}

function modelOf({ variables, values }: Center): Model {
  const shapes = variables.map(({ name, dataType, shape }) => `${name}:${dataType}:${shape}`);
  const wanted = MANIFEST.variables.map(({ name, dataType, shape }) => `${name}:${dataType}:${shape}`);
  if (shapes.join() !== wanted.join()) throw new Refusal(`the job trains ${shapes.join()}, not ${wanted.join()}`);
  return { weights: numbersOf(values[0]), bias: numbersOf(values[1]) };
}

// One by one, because the bytes are little-endian on every machine.
function numbersOf(bytes: Buffer): Float64Array {
  return Float64Array.from({ length: bytes.length / 8 }, (_, i) => bytes.readDoubleLE(8 * i));
}

function bytesOf(numbers: Float64Array): Buffer {
  const bytes = Buffer.alloc(8 * numbers.length);
  numbers.forEach((number, i) => bytes.writeDoubleLE(number, 8 * i));
  return bytes;
}
