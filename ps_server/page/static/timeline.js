// The timeline: a lane for each worker, over the last rounds.

import { choice, html, setText } from "./dom.js";
import { clock, count, inOrder, plural, seconds, shortened, shown, significant, numberOf } from "./format.js";
import { lastRounds } from "./history.js";
import { axisOf, borderAt, chosen, lanesOf } from "./lanes.js";
import { laneAt, marksAbove, RULER, rulerAt } from "./lane_picture.js";
import { MARKS, swatchOf } from "./marks.js";
import { Picture } from "./picture.js";

const LAST = 200;
const MOST_LANES = 16;
const ROUND_WIDTH = 5;
const STATES = {
  training: "trains",
  pushing: "pushes",
  waiting: "waits for the others",
  without: "the round went on without it",
  late: "the round waits for it",
};

/** What a span says; a round in progress has not gone on without anybody yet. */
function textOf({ state, step }) {
  return STATES[step === null && state === "without" ? "late" : state];
}

export class Timeline {
  constructor() {
    this._by = "time";
    this._isLong = false;
    this._rounds = [];
    this._shown = [];
    this._late = this._awaited = new Set();
    this._lanes = lanesOf([], [], null);
    this._names = html("ol", { class: "names", "aria-hidden": "true" });
    this._more = html("button", { type: "button", hidden: "" });
    this._more.addEventListener("click", () => {
      this._isLong = !this._isLong;
      this._refresh();
    });
    const by = choice("timeline-by", "Width of a round", { time: "by time", round: "by round" }, (value) => {
      this._by = value;
      this._refresh();
    });
    this._picture = new Picture(`Last ${LAST} rounds`, (width) => this._plot(width), {
      controls: [by, this._more],
      names: this._names,
      spread: () => (this._lanes?.borders.length ?? 0) * ROUND_WIDTH,
    });
    this.element = this._picture.element;
  }

  /** @param known of history.js; `news` the status, null before the first. */
  update(known, news) {
    this._rounds = lastRounds(known, LAST);
    this._news = news;
    this._lanes = lanesOf(this._rounds, known.marks, news);
    const waiting = news ? news.waiting : [];
    this._awaited = new Set(waiting.map((worker) => worker.worker_id));
    this._late = new Set(waiting.filter((worker) => worker.is_late).map((worker) => worker.worker_id));
    this._refresh();
  }

  _refresh() {
    const all = inOrder(this._lanes.workers.keys());
    this._shown = chosen(all, this._lanes.workers, this._awaited, this._isLong ? Infinity : MOST_LANES);
    this._more.hidden = all.length <= MOST_LANES;
    setText(this._more, this._isLong ? `only ${MOST_LANES} workers` : `all ${all.length} workers`);
    this._pitch = this._shown.length <= 8 ? 28 : 20;
    this._names.replaceChildren(
      ...this._shown.map((name) => {
        const late = this._late.has(name) ? "late" : null;
        return html("li", { title: shown(name), class: late }, html("bdi", {}, shortened(shown(name), 22)));
      }),
    );
    this._names.className = `names pitch-${this._pitch}`;
    this._picture.say(this._summary(all.length));
    this._picture.redraw();
    this._picture.table.update(() => this._table());
  }

  _summary(workers) {
    if (!this._rounds.length)
      return (
        "No round has been committed since this server began. " +
        "The first one appears here when all workers have pushed."
      );
    const took = this._rounds.map((round) => round.took_s).sort((a, b) => a - b);
    const without = this._rounds.filter((round) => round.without.length).length;
    const gone = without ? `; ${plural(without, "round")} gave up waiting for a worker` : "";
    const took_s = this._lanes.to_at - this._lanes.from_at;
    return (
      `${plural(this._rounds.length, "round")} of ${plural(workers, "worker")} in ${seconds(took_s)}; ` +
      `half of them took at most ${seconds(took[took.length >> 1])}${gone}.`
    );
  }

  _plot(width) {
    const { borders, workers, marks } = this._lanes;
    const axis = axisOf(borders, this._by);
    const x = (at) => axis.at(at) * width;
    const height = RULER + Math.max(1, this._shown.length) * this._pitch;
    const nodes = [rulerAt(borders, this._by, x, width)];
    this._shown.forEach((name, row) => {
      const top = RULER + row * this._pitch;
      nodes.push(...laneAt(workers.get(name), top, this._pitch, x, width));
    });
    nodes.push(...marksAbove(marks, x, width, height));
    const kinds = new Set(
      [...marks, ...this._shown.flatMap((name) => workers.get(name).marks)].map((mark) => mark.kind),
    );
    const states = new Set(this._shown.flatMap((name) => workers.get(name).spans.map((span) => span.state)));
    this._picture?.explain([
      ...Object.keys(STATES)
        .filter((state) => states.has(state))
        .map((state) => [swatchOf(state), STATES[state]]),
      ...Object.keys(MARKS)
        .filter((kind) => kinds.has(kind) && kind !== "without")
        .map((kind) => [swatchOf(kind), MARKS[kind].text]),
    ]);
    return {
      width,
      height,
      nodes,
      columns: borders.length && this._shown.length ? borders.length : 0,
      rows: this._shown.length,
      placeOf: (column, row) => ({
        x: x((borders[column].from_at + borders[column].to_at) / 2),
        y: RULER + (row + 0.5) * this._pitch,
      }),
      pointAt: (left, top) => ({
        column: borderAt(borders, axis.time(left / width)),
        row: Math.floor((top - RULER) / this._pitch),
      }),
      describe: (column, row) => this._describe(borders[column], this._shown[row]),
    };
  }

  _describe(border, name) {
    const lane = this._lanes.workers.get(name);
    const lines = [["worker", shortened(shown(name), 40)]];
    for (const span of lane.spans.filter((span) => span.step === border.step))
      lines.push([textOf(span), seconds(span.to_at - span.from_at)]);
    const round = this._rounds.find((one) => one.step === border.step);
    const worker = round?.workers.find((one) => one.worker_id === name);
    if (worker) lines.push(["loss", significant(numberOf(worker.loss))], ["local step", count(worker.local_step)]);
    // That the round went on without it, its span says.
    const marks = lane.marks.filter(({ at, kind }) => kind !== "without" && at > border.from_at && at <= border.to_at);
    if (worker?.nonfinite_values) lines.push(["values not finite", count(worker.nonfinite_values)]);
    for (const mark of marks) lines.push(["mark", MARKS[mark.kind]?.text ?? mark.kind]);
    return {
      title: border.step === null ? "round in progress" : `step ${count(border.step)}, ${clock(border.to_at)}`,
      lines,
    };
  }

  _table() {
    const heads = ["step", "committed at", "worker", "#trained", "#pushed", "#waited", "#loss", "#local step", "marks"];
    const rows = [];
    for (const border of [...this._lanes.borders].reverse().slice(0, 60)) {
      for (const name of this._shown) {
        const { lines } = this._describe(border, name);
        const of = (label) => lines.find(([one]) => one === label)?.[1] ?? "–";
        const marks = lines.filter(([label]) => label === "mark").map(([, text]) => text);
        for (const state of ["without", "late"]) if (of(STATES[state]) !== "–") marks.push(STATES[state]);
        if (lines.length === 1) continue;
        rows.push({
          cells: [
            border.step === null ? "in progress" : count(border.step),
            clock(border.to_at),
            of("worker"),
            of(STATES.training),
            of(STATES.pushing),
            of(STATES.waiting),
            of("loss"),
            of("local step"),
            [...new Set(marks)].join(", "),
          ],
          titles: ["", "", shown(name)],
        });
      }
    }
    return [heads, rows];
  }
}
