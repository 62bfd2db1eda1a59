// What a round costs: bytes before and after coding, and seconds by phase.

import { frame, line, stacked, swatch } from "./chart.js";
import { bytes, clock, seconds } from "./format.js";
import { bytesOf, phasesOf } from "./history.js";
import { axisFor, bytesTick, columnsOf, HEIGHT, MOST_ROWS, secondsTick, stepsOf, upwards } from "./axes.js";
import { swatchOf } from "./marks.js";
import { Picture } from "./picture.js";
import { byteTicks, extent, secondTicks } from "./scale.js";

const PHASES = {
  averaging: "averages",
  receiving: "receives",
  waiting: "waits for workers",
  computing: "all workers compute",
};
const BAR_WIDTH = 4;

class Costs {
  constructor(title) {
    this._rounds = [];
    this._picture = new Picture(title, (width) => this._plot(width));
    this.element = this._picture.element;
  }

  update(known) {
    this._rounds = known.rounds;
    this._take?.();
    this._picture.say(this._rounds.length ? this._summary() : "No round has been committed since this server began.");
    this._picture.explain(this._rounds.length ? this._legend() : []);
    this._picture.redraw();
    this._picture.table.update(() => this._table());
  }
}

export class BytesARound extends Costs {
  constructor() {
    super("Bytes a round");
  }

  _take() {
    this._isCoded = this._rounds.map(bytesOf).some(({ coded, raw }) => raw > coded * 1.01);
  }

  _summary() {
    const { coded, raw } = bytesOf(this._rounds.at(-1));
    const before = raw > coded * 1.01 ? `${bytes(raw)} before coding (${(raw / coded).toFixed(1)} to 1)` : "not coded";
    return `${bytes(coded)} received and sent in the last round, ${before}.`;
  }

  _legend() {
    const found = [[swatch("series-coded"), "received and sent"]];
    return this._isCoded ? [[swatch("series-raw"), "before coding"], ...found] : found;
  }

  _plot(width) {
    const axis = axisFor(this._rounds, "step", width);
    const high = extent([0, ...this._rounds.map((round) => Math.max(bytesOf(round).raw, bytesOf(round).coded))])[1];
    const at = frame(
      width,
      HEIGHT,
      axis,
      upwards(0, high, bytesTick, (high) => byteTicks(high, 5)),
    );
    const through = (kind) =>
      line(
        at,
        this._rounds.map((round, index) => [axis.places[index], bytesOf(round)[kind]]),
        `series-${kind}`,
      );
    return {
      width,
      nodes: [...at.nodes, ...(this._isCoded ? [through("raw")] : []), through("coded")],
      ...columnsOf(axis, at, this._rounds, describeBytes),
    };
  }

  _table() {
    const rows = this._rounds
      .slice(-MOST_ROWS)
      .reverse()
      .map((round) => [
        stepsOf(round).replace(/^steps? /, ""),
        ...[round.received_bytes, round.received_raw_bytes, round.sent_bytes, round.sent_raw_bytes].map((size) =>
          bytes(size / round.count),
        ),
      ]);
    return [["step", "#received", "#before coding", "#sent", "#before coding"], rows];
  }
}

function describeBytes(round) {
  const of = (name) => bytes(round[name] / round.count);
  return {
    title: `${stepsOf(round)}, ${clock(round.committed_at)}`,
    lines: [
      ["received", of("received_bytes")],
      ["before coding", of("received_raw_bytes")],
      ["sent", of("sent_bytes")],
      ["before coding", of("sent_raw_bytes")],
    ],
  };
}

export class SecondsARound extends Costs {
  constructor() {
    super("Seconds a round");
  }

  _take() {
    this._phases = this._rounds.map((round, at) => phasesOf(round, this._rounds[at - 1]));
  }

  _summary() {
    const recent = this._phases.slice(-50);
    const mean = (name) => recent.reduce((sum, phases) => sum + phases[name], 0) / recent.length;
    const total = Object.keys(PHASES).reduce((sum, name) => sum + mean(name), 0);
    const [waiting, receiving, averaging] = ["waiting", "receiving", "averaging"].map((name) => seconds(mean(name)));
    return (
      `${seconds(total)} from commit to commit, of which ${waiting} waiting, ${receiving} receiving ` +
      `and ${averaging} averaging (mean of the last ${recent.length}).`
    );
  }

  _legend() {
    return Object.entries(PHASES)
      .reverse()
      .map(([name, text]) => [swatchOf(name), text]);
  }

  _plot(width) {
    const axis = axisFor(this._rounds, "step", width);
    const names = Object.keys(PHASES);
    const bars = barsOf(this._rounds, this._phases, names, Math.max(1, Math.floor((width - 80) / BAR_WIDTH)));
    if (bars.length) [axis.low, axis.high] = [bars[0].from, bars.at(-1).to];
    const high = extent([0, ...bars.map(({ parts }) => names.reduce((sum, name) => sum + parts[name], 0))])[1];
    const at = frame(
      width,
      HEIGHT,
      axis,
      upwards(0, high, secondsTick, (high) => secondTicks(0, high, 5)),
    );
    return {
      width,
      nodes: [...at.nodes, ...stacked(at, bars, names)],
      ...columnsOf(axis, at, this._rounds, (round, index) => ({
        title: `${stepsOf(round)}, ${clock(round.committed_at)}`,
        lines: [...names].reverse().map((name) => [PHASES[name], seconds(this._phases[index][name])]),
      })),
    };
  }

  _table() {
    const rows = this._rounds
      .map((round, at) => [
        stepsOf(round).replace(/^steps? /, ""),
        clock(round.committed_at),
        ...["computing", "waiting", "receiving", "averaging"].map((name) => seconds(this._phases[at][name])),
        seconds(round.took_s),
      ])
      .slice(-MOST_ROWS)
      .reverse();
    return [
      ["step", "committed at", "#computing", "#waiting", "#receiving", "#averaging", "#first push to commit"],
      rows,
    ];
  }
}

/** Neighbouring rounds in at most `most` bars, whose heights are means. */
export function barsOf(rounds, phases, names, most) {
  if (!rounds.length) return [];
  const first = rounds[0].step;
  const each = Math.max(1, Math.ceil((rounds.at(-1).step + rounds.at(-1).count - first) / most));
  const bars = [];
  let index = -1;
  rounds.forEach((round, at) => {
    const here = Math.floor((round.step - first) / each);
    if (here !== index) {
      bars.push({
        from: round.step,
        to: round.step,
        weight: 0,
        parts: Object.fromEntries(names.map((name) => [name, 0])),
      });
      index = here;
    }
    const bar = bars.at(-1);
    bar.to = round.step + round.count;
    for (const name of names)
      bar.parts[name] = (bar.parts[name] * bar.weight + phases[at][name] * round.count) / (bar.weight + round.count);
    bar.weight += round.count;
  });
  return bars;
}
