// What can go wrong, and whether to try again (docs/protocol.md, section 3).

import { status, type ServiceError } from '@grpc/grpc-js';
import { setTimeout as sleep } from 'node:timers/promises';

import { ErrorReason } from '../generated/modelaverage/v1/ErrorReason.js';

/** How long a command goes on trying after its first failure, counted while no server answers it. */
const PATIENCE_S = 25;
const MIN_PAUSE_S = 0.2;
const MAX_PAUSE_S = 1.0;

const PREFIX = 'ERROR_REASON_';

/** A command that failed. `code`: the reason, or the name of the gRPC status, or CLIENT. The message is one line. */
export class Failure extends Error {
  constructor(readonly code: string, message: string, readonly retry: 'never' | 'later' | 'at once' = 'never') {
    super(message.replace(/\s+/g, ' ').trim());
  }
}

/** What this client itself refuses. */
export class Refusal extends Failure {
  constructor(message: string) {
    super('CLIENT', message);
  }
}

/** Runs `attempt` until it succeeds or fails for good. It calls `answered` once a server has answered it. */
export async function persist<T>(attempt: (answered: () => void) => Promise<T>): Promise<T> {
  let awayS = 0;
  for (let attempts = 1; ; attempts++) {
    const startedAt = Date.now();
    let isAnswered = false;
    try {
      return await attempt(() => (isAnswered = true));
    } catch (error) {
      const failure = failureOf(error);
      if (failure.retry === 'never') throw failure;
      if (failure.retry === 'at once') continue;
      // Waiting at the barrier does not use up the patience, so a server may go away again and again in a long round.
      if (attempts > 1 && !isAnswered) awayS += (Date.now() - startedAt) / 1000;
      if (awayS >= PATIENCE_S) throw failure;
      // With some chance in it, so that workers do not come back all at once.
      const pauseS = MIN_PAUSE_S + Math.random() * (MAX_PAUSE_S - MIN_PAUSE_S);
      awayS += pauseS;
      await sleep(pauseS * 1000);
    }
  }
}

function failureOf(error: unknown): Failure {
  if (error instanceof Failure) return error;
  if (!isServiceError(error)) throw error;
  const reason = String(error.metadata.get('modelaverage-reason')[0] ?? '');
  const code = Object.hasOwn(ErrorReason, reason) ? reason.slice(PREFIX.length) : status[error.code];
  switch (code) {
    case 'ROUND_RESTARTED':
    case 'STREAM_STALLED':
      return new Failure(code, error.details, 'at once');
    case 'WORKER_ID_IN_USE':
      return new Failure(code, error.details, 'later');
  }
  if (error.code === status.UNAVAILABLE) return new Failure(code, error.details, 'later');
  if (reason === '' && isBrokenStream(error)) return new Failure('UNAVAILABLE', error.details, 'later');
  return new Failure(code, error.details);
}

/** Node.js reports a lost connection in several ways. CANCELLED comes from the other side: this one does not cancel. */
function isBrokenStream({ code, details }: ServiceError): boolean {
  if (code === status.INTERNAL) return /RST_STREAM|ECONNRESET|ETIMEDOUT|EPIPE/.test(details);
  return code === status.CANCELLED;
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'code' in error && 'details' in error && 'metadata' in error;
}
