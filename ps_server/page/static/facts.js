// Facts about the run: title, value, detail. Pure: takes the document of /api/status, gives text.

import { bytes, clock, count, numberOf, plural, printable, seconds, shortened, shown, significant } from "./format.js";

const HANGS_FROM_S = 5;
const TRANSPORTS = {
  messages: "in messages",
  data_connection: "on data connections",
  shared_memory: "in shared memory",
};

/** What stands at the top, in large: title, value, detail. */
export function mainFacts(news, rounds) {
  const { status } = news;
  const begun = status.phase !== "PHASE_UNINITIALIZED";
  const last = rounds.at(-1) ?? null;
  const recent = rounds.slice(-20);
  const total = (name) => recent.reduce((sum, round) => sum + round[name], 0);
  const many = recent.reduce((sum, round) => sum + round.count, 0);
  const coded = many ? (total("received_bytes") + total("sent_bytes")) / many : null;
  const raw = many ? (total("received_raw_bytes") + total("sent_raw_bytes")) / many : null;
  return [
    {
      title: "Global step",
      value: begun ? count(status.global_step) : "–",
      detail: `${plural(status.rounds_committed, "round")} by this server`,
    },
    {
      title: "Rounds a minute",
      value: status.rounds_per_minute && !status.job_over ? status.rounds_per_minute.toFixed(1) : "–",
      detail: status.last_round_s ? `the last took ${seconds(status.last_round_s)}` : "no round yet",
    },
    { title: "Workers", value: workersIn(status), detail: workersDetail(status) },
    { title: "Mean loss", ...lossOf(last) },
    { title: "Bytes a round", value: bytes(coded), detail: ratio(coded, raw) },
  ];
}

function workersIn(status) {
  return status.workers_finished && !status.job_over
    ? `${status.num_workers - status.workers_finished} of ${status.num_workers}`
    : String(status.num_workers);
}

function workersDetail(status) {
  if (status.job_over) return "all have finished";
  const parts = [];
  if (status.workers_finished) parts.push(`${status.workers_finished} finished`);
  parts.push(
    status.min_workers < status.num_workers ? `a round needs at least ${status.min_workers}` : "a round needs all",
  );
  return parts.join(", ");
}

function lossOf(last) {
  const loss = last ? numberOf(last.loss) : null;
  let detail = "mean of the last round";
  if (loss === null) detail = last ? "workers report none" : "no round yet";
  else if (last.loss_min !== last.loss_max)
    detail = `${significant(numberOf(last.loss_min))} to ${significant(numberOf(last.loss_max))}`;
  return {
    value: significant(loss),
    detail,
    tone: loss !== null && !Number.isFinite(loss) ? "bad" : "",
  };
}

function ratio(coded, raw) {
  if (!coded || !raw) return "received and sent";
  if (Math.abs(raw - coded) < 0.01 * coded) return "received and sent, not coded";
  return `${bytes(raw)} before coding, ${(raw / coded).toFixed(1)} to 1`;
}

/** The rest of what is known about the server: title, value, tone. */
export function otherFacts(news) {
  const { status, server, traffic } = news;
  const begun = status.phase !== "PHASE_UNINITIALIZED";
  const nonfinite = status.workers.reduce((sum, worker) => sum + worker.nonfinite_values, 0);
  const shard = status.shard
    ? `${status.shard.index} of ${status.shard.count} of job ${String(status.shard.job_id).slice(0, 8)}`
    : "the whole model";
  const facts = [
    ["Outer optimizer", begun ? printable(status.outer_optimizer || "average") : "–"],
    ["Compression", begun ? printable(status.compression || "none") : "–"],
    ["Checkpoint", ...checkpointOf(status)],
    ["Shard", begun ? shard : "–"],
    ["Model", begun ? bytes(status.model_size_bytes) : "–"],
    ["Bytes by transport", transportsOf(traffic.by_transport)],
    ["Trouble", troubleOf(status)],
    ["Values not finite", nonfinite ? count(nonfinite) : "none", nonfinite ? "bad" : ""],
    ["Server", `${server.version}, up ${seconds(status.uptime_s)}, since ${clock(server.started_at)}`],
  ];
  const intervals = intervalsOf(status);
  if (intervals) facts.splice(3, 0, ["interval_steps differ", intervals, "bad"]);
  return facts.filter(([, value]) => value !== "–").map(([title, value, tone = ""]) => ({ title, value, tone }));
}

function checkpointOf(status) {
  const trouble = printable(status.checkpoint_problem);
  if (trouble) return [`${(status.checkpoint_writing_s ?? 0) >= HANGS_FROM_S ? "HANGS" : "FAILED"}: ${trouble}`, "bad"];
  if (status.checkpoint_step === null) return ["none written"];
  return [
    `step ${count(status.checkpoint_step)}` +
      (status.checkpoint_age_s === null ? "" : `, ${seconds(status.checkpoint_age_s)} ago`),
  ];
}

function troubleOf(status) {
  const kinds = [
    [status.rounds_restarted, "rounds started over"],
    [status.rounds_without_all, "rounds without all workers"],
    [status.stale_pushes, "stale pushes"],
    [status.pushes_retried, "pushes made again"],
  ];
  return (
    kinds
      .filter(([number]) => number)
      .map(
        ([number, what]) =>
          `${count(number)} ${number === 1 ? what.replace("rounds", "round").replace("pushes", "push") : what}`,
      )
      .join(", ") || "none"
  );
}

function transportsOf(byTransport) {
  const used = Object.entries(byTransport).filter(([, size]) => size);
  return used.map(([name, size]) => `${bytes(size)} ${TRANSPORTS[name] ?? printable(name)}`).join(", ") || "none yet";
}

function intervalsOf(status) {
  const steps = status.workers
    .filter((worker) => worker.interval_steps)
    .map((worker) => [worker.worker_id, worker.interval_steps]);
  if (new Set(steps.map(([, number]) => number)).size < 2) return "";
  const parts = steps.slice(0, 4).map(([name, number]) => `${shortened(shown(name), 24)} ${number}`);
  return parts.join(", ") + (steps.length > 4 ? ` and ${steps.length - 4} more` : "");
}
