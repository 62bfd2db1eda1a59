// What can go wrong, and whether to try again (docs/protocol.md, section 3).

import { status, type ServiceError } from '@grpc/grpc-js';
import { setTimeout as sleep } from 'node:timers/promises';

import { ErrorReason } from '../generated/modelaverage/v1/ErrorReason.js';

/** How long a command goes on trying after its first failure. */
const PATIENCE_MS = 25_000;
const MIN_PAUSE_MS = 200;
const MAX_PAUSE_MS = 1_000;

const PREFIX = 'ERROR_REASON_';

/**
 * A command that failed. `code`: the reason, or the name of the gRPC status, or CLIENT. The message is one line.
 * `action`: what to do, `again`, `later` or `pull`; any other word means stop.
 */
export class Failure extends Error {
  constructor(readonly code: string, message: string, readonly action = 'stop') {
    super(message.replace(/\s+/g, ' ').trim());
  }
}

/** What this client itself refuses. */
export class Refusal extends Failure {
  constructor(message: string) {
    super('CLIENT', message);
  }
}

/** Runs `attempt` until it succeeds or fails for good. */
export async function persist<T>(attempt: () => Promise<T>): Promise<T> {
  let giveUpAt = 0;
  for (;;) {
    const startedAt = Date.now();
    try {
      return await attempt();
    } catch (error) {
      const failure = failureOf(error);
      if (failure.action === 'again') continue;
      if (failure.action !== 'later') throw failure;
      const now = Date.now();
      // An attempt that lasted, at the barrier for instance, had found the server: its end is a new failure.
      if (giveUpAt === 0 || now - startedAt > PATIENCE_MS) giveUpAt = now + PATIENCE_MS;
      if (now >= giveUpAt) throw failure;
      // With some chance in it, so that workers do not come back all at once.
      await sleep(MIN_PAUSE_MS + Math.random() * (MAX_PAUSE_MS - MIN_PAUSE_MS));
    }
  }
}

function failureOf(error: unknown): Failure {
  if (error instanceof Failure) return error;
  if (!isServiceError(error)) throw error;
  const [reason, action] = ['reason', 'action'].map((key) => error.metadata.get(`modelaverage-${key}`)[0]?.toString());
  if (!action && isBrokenStream(error)) return new Failure('UNAVAILABLE', error.details, 'later');
  const code = reason && Object.hasOwn(ErrorReason, reason) ? reason.slice(PREFIX.length) : status[error.code];
  return new Failure(code, error.details, action);
}

/** Node.js reports a lost connection in several ways. CANCELLED comes from the other side: this one does not cancel. */
function isBrokenStream({ code, details }: ServiceError): boolean {
  if (code === status.INTERNAL) return /RST_STREAM|ECONNRESET|ETIMEDOUT|EPIPE/.test(details);
  return code === status.CANCELLED || code === status.UNAVAILABLE;
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'code' in error && 'details' in error && 'metadata' in error;
}
