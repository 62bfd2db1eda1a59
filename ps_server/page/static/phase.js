// What the server and each worker are doing, in words. Pure: takes the document of /api/status, gives text.

import { count, listed, plural, seconds } from "./format.js";

/** A round that is older is late; as in documents.py. */
export const LATE_FROM_S = 5;

/**
 * The phase in words: `kind` (chief, training, waiting, late, over, stopping), `text`, `detail`, and `said`, which does
 * not change from second to second and is what a screen reader hears.
 */
export function phaseOf(news, last) {
  const { status, waiting } = news;
  const names = waiting.map((worker) => worker.worker_id);
  const more = status.waiting_for_omitted + status.waiting_for_unknown;
  if (status.phase === "PHASE_STOPPING")
    return same("stopping", "The server is stopping", "It was told to stop; workers will look for it again.");
  if (status.phase === "PHASE_UNINITIALIZED") {
    return same(
      "chief",
      "Waiting for the chief",
      "The chief, worker 0, sends the first model. It has not come yet; " +
        `the server has been up for ${seconds(status.uptime_s)}.`,
    );
  }
  if (status.job_over)
    return same(
      "over",
      "Job over",
      `All ${plural(status.num_workers, "worker")} have finished at step ${count(status.global_step)}. ` +
        "The averaged model stays here; a new run may begin with it.",
    );
  if (status.phase !== "PHASE_AVERAGING" || !(names.length + more)) {
    return same(
      "training",
      "Training",
      status.phase === "PHASE_AVERAGING" ? "The round is averaging: all pushes are here." : "All workers compute.",
    );
  }
  const whom = listed(names, more, 3);
  const gone = last?.without?.length ? ` The last one went on without ${listed(last.without, 0, 3)}.` : "";
  const since = waiting.length ? Math.max(...waiting.map((worker) => worker.for_s)) : status.round_age_s;
  const isLate = waiting.length ? waiting.some((worker) => worker.is_late) : status.round_age_s > LATE_FROM_S;
  if (!isLate)
    return {
      kind: "waiting",
      text: "Training",
      detail: `The round waits for ${whom} for ${seconds(since)}.${gone}`,
      said: "Training",
    };
  const arrived = atBarrier(status);
  let quorum = " The round goes on when all have pushed.";
  if (status.min_workers < status.num_workers) {
    quorum =
      arrived < status.min_workers
        ? ` The round needs at least ${status.min_workers}.`
        : " The round goes on without the others when its grace period is over.";
  }
  return {
    kind: "late",
    text: `Round waits for ${whom} for ${seconds(since)}`,
    detail: `${plural(arrived, "worker")} of ${status.num_workers} at the barrier.${quorum}`,
    said: `Round waits for ${whom}`,
  };
}

function same(kind, text, detail) {
  return { kind, text, detail, said: text };
}

function atBarrier(status) {
  return status.workers.filter((worker) => worker.waiting).length;
}

/** What a worker does, as far as the server can tell. */
export function stateOf(worker, missing) {
  if (worker.has_finished) return "finished";
  if (worker.waiting) return "at the barrier";
  if (worker.has_left) return "has left";
  if (worker.fragments_given) return `has sent ${plural(worker.fragments_given, "fragment")}`;
  return missing.has(worker.worker_id) ? `last heard from ${seconds(worker.last_seen_age_s)} ago` : "computes";
}
