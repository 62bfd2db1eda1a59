// A worker: the calls in their order, and what it has to remember between them (docs/protocol.md, section 2).

import {
  credentials,
  loadPackageDefinition,
  type ClientDuplexStream,
  type ClientReadableStream,
  type requestCallback,
} from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import type { Writable } from 'node:stream';
import { fileURLToPath } from 'node:url';

import { persist, Refusal } from './failures.js';
import { type Assembly, Layout } from './layout.js';
import type { ProtoGrpcType } from '../generated/parameter_server.js';
import type { Fragment } from '../generated/modelaverage/v1/Fragment.js';
import type { GetStatusResponse__Output } from '../generated/modelaverage/v1/GetStatusResponse.js';
import type { InitializeResponse__Output } from '../generated/modelaverage/v1/InitializeResponse.js';
import type { Manifest__Output } from '../generated/modelaverage/v1/Manifest.js';
import { Outcome } from '../generated/modelaverage/v1/Outcome.js';
import type { PullResponse__Output } from '../generated/modelaverage/v1/PullResponse.js';
import type { PushAndAverageResponse__Output } from '../generated/modelaverage/v1/PushAndAverageResponse.js';
import type { PushHeader } from '../generated/modelaverage/v1/PushHeader.js';
import type { PushOutcome__Output } from '../generated/modelaverage/v1/PushOutcome.js';
import type { Variable__Output } from '../generated/modelaverage/v1/Variable.js';

const PROTO_FOLDER = fileURLToPath(new URL('../../../../../proto', import.meta.url));
// The options of the types that ./build generates. 64-bit numbers as strings, for a number of JavaScript has 53 bits.
const definition = loadSync('modelaverage/v1/parameter_server.proto', {
  includeDirs: [PROTO_FOLDER], longs: String, enums: String, defaults: true, oneofs: true,
});
const { ParameterServer } = (loadPackageDefinition(definition) as unknown as ProtoGrpcType).modelaverage.v1;

const CHANNEL_OPTIONS = {
  'grpc.enable_retries': 0, // a retry of gRPC's own would keep copies of what was sent
  'grpc.initial_reconnect_backoff_ms': 100,
  'grpc.max_reconnect_backoff_ms': 1_000,
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': 10_000,
};

/** The center variables as a server gave them. */
export interface Center {
  readonly variables: Variable__Output[];
  readonly globalStep: bigint;
  /** The bytes of each variable, little-endian and row-major. */
  readonly values: Buffer[];
}

/** How a push ended, and the center that came with it. */
export interface Pushed {
  readonly outcome: 'committed' | 'stale' | 'already_counted';
  readonly contributors: string[];
  readonly center: Center;
}

const OUTCOMES: Partial<Record<string, Pushed['outcome']>> = {
  [Outcome.OUTCOME_COMMITTED]: 'committed',
  [Outcome.OUTCOME_STALE]: 'stale',
  [Outcome.OUTCOME_ALREADY_COUNTED]: 'already_counted',
};

/** What a push starts from. */
interface Base {
  readonly manifest: Manifest__Output;
  readonly layout: Layout;
  readonly manifestId: string;
  readonly globalStep: bigint;
}

/** One process of one worker. Every method throws Failure; what is worth trying again has been tried by then. */
export class Worker {
  private readonly stub;
  private readonly incarnation = randomBytes(16);
  private pushId = 0n;
  private base?: Base;

  constructor(address: string, readonly workerId: string, readonly isChief = false) {
    this.stub = new ParameterServer(address, credentials.createInsecure(), CHANNEL_OPTIONS);
  }

  /** Sets the center variables, if they are not set. The manifest is the server's to check. */
  async initialize(manifest: Manifest__Output, values: Buffer[], globalStep = 0n): Promise<InitializeResponse__Output> {
    const layout = new Layout(values.map((value) => value.length), manifest.fragmentSizeBytes);
    const flat = layout.pack(values);
    const header = { workerId: this.workerId, manifest, globalStep: String(globalStep) };
    const response = await persist(() =>
      answerOf<InitializeResponse__Output>((callback) => {
        void writeAll(this.stub.initialize(callback), { header }, layout.fragments(flat));
      }),
    );
    if (response.initialized) {
      this.base = { manifest, layout, manifestId: response.manifestId, globalStep: BigInt(response.globalStep) };
    }
    return response;
  }

  /** The center, to train from it; with `wait`, waits until the chief has set it. */
  async pull(wait: boolean): Promise<Center> {
    return persist(async () => {
      const call = this.stub.pull({ workerId: this.workerId, waitInitialized: wait, willTrain: true });
      let base: Base | undefined;
      let assembly: Assembly | undefined;
      for await (const { header, fragment } of messagesOf<PullResponse__Output>(call)) {
        if (header?.manifest && !base) {
          const { manifest, manifestId, globalStep } = header;
          base = { manifest, layout: Layout.of(manifest), manifestId, globalStep: BigInt(globalStep) };
          assembly = base.layout.assemble();
        } else if (fragment && assembly) {
          assembly.add(fragment.index, fragment.data);
        } else if (header || fragment) {
          throw new Refusal(`a ${header ? 'second header' : 'fragment before the header'} came`);
        }
      }
      if (!base || !assembly) throw new Refusal('the stream ended without a header');
      const center = centerOf(base, assembly.finish());
      this.base = base;
      return center;
    });
  }

  /** One round: gives these values to the average, waits for the others, and gets the new center. */
  async push(values: Buffer[], localStep = 0n): Promise<Pushed> {
    const base = this.base;
    if (!base) throw new Refusal('pull before the first push');
    const local = base.layout.pack(values);
    const header = {
      workerId: this.workerId,
      incarnation: this.incarnation,
      pushId: String(++this.pushId),
      isChief: this.isChief,
      baseStep: String(base.globalStep),
      localStep: String(localStep),
      manifestId: base.manifestId,
      halfDuplex: true,
    };
    // However often it takes: the same header and the same bytes, so the server counts them once.
    const { outcome, flat } = await persist(() => this.pushOnce(header, base.layout, local));
    this.base = { ...base, globalStep: BigInt(outcome.globalStep) };
    const contributors = outcome.contributors;
    return { outcome: OUTCOMES[outcome.outcome]!, contributors, center: centerOf(this.base, flat) };
  }

  /** Half-duplex: writes all, half-closes, and reads all. A refusal may end it before. */
  private async pushOnce(header: PushHeader, layout: Layout, local: Buffer) {
    const call = this.stub.pushAndAverage();
    const assembly = layout.assemble();
    let outcome: PushOutcome__Output | null = null;
    void writeAll(call, { header }, layout.fragments(local)); // nothing comes before it has half-closed
    for await (const message of messagesOf<PushAndAverageResponse__Output>(call)) {
      if (outcome) throw new Refusal('a message came after the outcome');
      if (message.fragment) assembly.add(message.fragment.index, message.fragment.data);
      outcome = message.outcome;
    }
    if (!outcome) throw new Refusal('the stream ended without an outcome');
    if (!OUTCOMES[outcome.outcome]) throw new Refusal(`the outcome ${outcome.outcome} is unknown`);
    return { outcome, flat: assembly.finish() };
  }

  /** Says that this process goes. */
  async leave(): Promise<void> {
    await this.sayGoodbye(false);
  }

  /** Says that this worker has finished its training: no round waits for it any longer. */
  async finish(): Promise<void> {
    await this.sayGoodbye(true);
  }

  private async sayGoodbye(finished: boolean): Promise<void> {
    const request = { workerId: this.workerId, incarnation: this.incarnation, finished };
    await persist(() => answerOf((callback) => this.stub.leave(request, callback)));
  }

  /** What the server does and for whom it waits. */
  async status(): Promise<GetStatusResponse__Output> {
    return persist(() => answerOf<GetStatusResponse__Output>((callback) => this.stub.getStatus({}, callback)));
  }

  /** Lets go of the connection, so that the process can end. */
  close(): void {
    this.stub.close();
  }
}

function ignore(): void {}

function centerOf({ manifest, layout, globalStep }: Base, flat: Buffer): Center {
  return { variables: manifest.variables, globalStep, values: layout.unpack(flat) };
}

/** Writes the opening and then fragments, no faster than the other side takes them, then half-closes. It stops when the
 *  call ends: the code that reads the answer learns why. */
async function writeAll(call: Writable, opening: object, fragments: Iterable<Fragment>): Promise<void> {
  let isOver = false;
  const over = once(call, 'status').catch(ignore).then(() => (isOver = true));
  call.write(opening);
  for (const fragment of fragments) {
    if (isOver) return;
    if (!call.write({ fragment })) await Promise.race([once(call, 'drain').catch(ignore), over]);
  }
  call.end();
}

/** The messages of a stream until it ends; throws its ServiceError. A loop that is left early cancels the call. */
async function* messagesOf<T>(call: ClientReadableStream<T> | ClientDuplexStream<unknown, T>): AsyncGenerator<T> {
  call.on('error', ignore); // the loop throws it
  try {
    yield* call as AsyncIterable<T>;
  } finally {
    call.cancel();
  }
}

/** A call with one answer, as a promise. */
function answerOf<T>(start: (callback: requestCallback<T>) => unknown): Promise<T> {
  return new Promise((resolve, reject) => {
    start((error, value) => (error ? reject(error) : resolve(value!)));
  });
}
