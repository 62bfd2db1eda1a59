// The parts of the page that are words and numbers: facts, the workers, the log's last events.

import { html, setText } from "./dom.js";
import {
  bytes,
  clock,
  count,
  inOrder,
  numberOf,
  plural,
  printable,
  seconds,
  shortened,
  shown,
  significant,
} from "./format.js";
import { LATE_FROM_S, phaseOf, stateOf } from "./phase.js";
import { Table } from "./tables.js";

const WORKER_HEADS = [
  "worker",
  "doing",
  "#local step",
  "#loss",
  "#late",
  "#last seen",
  "#rounds",
  "#not finite",
  "transport",
];

const SHARD_HEADS = [
  "shard",
  "server",
  "doing",
  "#step",
  "#rounds a minute",
  "#size",
  "#received",
  "#sent",
  "#checkpoint",
];

/** Fills a definition list, in place. */
export function fillFacts(list, facts) {
  while (list.children.length > facts.length) list.lastElementChild.remove();
  facts.forEach(({ title, value, detail = "", tone = "" }, at) => {
    const group =
      list.children[at] ??
      list.appendChild(html("div", {}, html("dt"), html("dd", { class: "value" }), html("dd", { class: "detail" })));
    setText(group.children[0], title);
    setText(group.children[1], value);
    setText(group.children[2], detail);
    const className = [tone, value.length > 22 ? "long" : ""].join(" ").trim();
    if (group.className !== className) group.className = className;
  });
}

/** A sentence and a table. */
class Panel {
  constructor(place, summary, caption) {
    this._summary = summary;
    this._table = new Table(caption);
    place.append(this._table.element);
  }

  _fill(summary, heads, rows) {
    setText(this._summary, summary);
    this._table.element.hidden = !rows.length;
    this._table.fill(heads, rows);
  }
}

/** The workers; those that the round has waited for too long come first. */
export class Workers extends Panel {
  update({ status, waiting }) {
    const missing = new Set(waiting.map((worker) => worker.worker_id));
    const late = new Set(waiting.filter((worker) => worker.is_late).map((worker) => worker.worker_id));
    const order = new Map(inOrder(status.workers.map((worker) => worker.worker_id)).map((name, at) => [name, at]));
    const sorted = [...status.workers].sort(
      (a, b) => late.has(b.worker_id) - late.has(a.worker_id) || order.get(a.worker_id) - order.get(b.worker_id),
    );
    const known = status.workers.length + status.workers_omitted;
    const omitted = status.workers_omitted ? `, of which ${count(status.workers_omitted)} are left out` : "";
    this._fill(
      known ? `${plural(known, "worker")} known to the server${omitted}.` : "No worker has called yet.",
      WORKER_HEADS,
      sorted.map((worker) => rowOf(worker, missing, late.has(worker.worker_id))),
    );
  }
}

function rowOf(worker, missing, isLate) {
  const name = shown(worker.worker_id);
  const transport = worker.transport.replace("TRANSPORT_", "").toLowerCase().replaceAll("_", " ");
  return {
    cells: [
      shortened(name, 36) + (worker.is_chief ? " (chief)" : ""),
      (isLate ? "⚠ " : "") + stateOf(worker, missing),
      count(worker.local_step),
      significant(numberOf(worker.loss)),
      seconds(worker.lateness_s),
      seconds(worker.last_seen_age_s),
      count(worker.pushes_counted),
      worker.nonfinite_values ? count(worker.nonfinite_values) : "–",
      transport === "unspecified" ? "–" : transport,
    ],
    titles: [name],
    tone: isLate ? "bad" : "",
  };
}

/** This server and the job's others, side by side. */
export class Shards extends Panel {
  update({ shards }) {
    const sorted = [...shards].sort((a, b) => (a.status?.shard?.index ?? 0) - (b.status?.shard?.index ?? 0));
    this._fill(summaryOf(shards), SHARD_HEADS, sorted.map(shardRow));
  }
}

/** Steps are compared only where all are known: what was last heard of a server that is away may be old. */
function summaryOf(shards) {
  const away = shards.filter(({ problem }) => problem);
  if (away.length) {
    const whose = `${plural(away.length, "server")} of ${count(shards.length)} ${away.length === 1 ? "does" : "do"}`;
    return `${whose} not answer: ${shortened(printable(away[0].problem), 200)}`;
  }
  const begun = shards.filter(({ status }) => status !== null && status.phase !== "PHASE_UNINITIALIZED");
  if (new Set(begun.map(({ status, address }) => status.shard?.job_id ?? address)).size > 1)
    return "⚠ They do not belong to one job.";
  if (!begun.length) return "None is known to have a center yet.";
  if (begun.length < shards.length) return "Not all are known to have a center yet.";
  return new Set(begun.map(({ status }) => status.global_step)).size > 1
    ? "Their steps differ: a round commits on one server after the other."
    : "All are at the same step. Workers wait for the slowest.";
}

function shardRow({ address, problem, away_s, status }) {
  const waiting = (status?.waiting_for ?? []).map((worker_id) => ({
    worker_id,
    for_s: status.round_age_s,
    is_late: status.round_age_s > LATE_FROM_S,
  }));
  const phase = status === null ? null : phaseOf({ status: { ...status, workers: [] }, waiting }, null);
  const begun = status !== null && status.phase !== "PHASE_UNINITIALIZED";
  const doing = problem ? `⚠ no answer for ${seconds(away_s)}` : (phase?.text ?? "not asked yet");
  const checkpoint = printable(status?.checkpoint_problem ?? "");
  return {
    cells: [
      begun && status.shard ? String(status.shard.index) : "–",
      printable(address),
      doing,
      begun ? count(status.global_step) : "–",
      status?.rounds_per_minute ? status.rounds_per_minute.toFixed(1) : "–",
      begun ? bytes(status.model_size_bytes) : "–",
      begun ? bytes(status.received_bytes) : "–",
      begun ? bytes(status.sent_bytes) : "–",
      checkpoint ? "⚠ failed" : count(status?.checkpoint_step ?? null),
    ],
    titles: ["", "", printable(problem), "", "", "", "", "", checkpoint],
    tone: problem || checkpoint || phase?.kind === "late" ? "bad" : "",
  };
}

/** The last events of the server's log. */
export class Events extends Panel {
  update({ events }) {
    this._fill(
      events.length ? "From the server's log, newest first." : "Nothing has been logged yet.",
      ["at", "level", "event", "text"],
      [...events].reverse().map((event) => ({
        cells: [clock(event.at), printable(event.level), printable(event.name), printable(event.text)],
        tone: /error|critical/i.test(event.level) ? "bad" : /warn/i.test(event.level) ? "warned" : "",
      })),
    );
  }
}
