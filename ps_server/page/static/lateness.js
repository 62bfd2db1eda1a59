// How late workers come to the barrier.

import { axisFor, columnsOf, HEIGHT, MOST_ROWS, secondsTick, stepsOf, upwards } from "./axes.js";
import { band, bandSwatch, frame } from "./chart.js";
import { Curves, SERIES } from "./curves.js";
import { clock, count, plural, seconds, shortened, shown } from "./format.js";
import { extent, secondTicks } from "./scale.js";

const RECENT = 50;

export class Lateness extends Curves {
  constructor() {
    super("Lateness at the barrier", []);
  }

  _kept(rounds) {
    return rounds.filter((round) => round.workers?.length > 1).slice(-1000);
  }

  _summary() {
    if (!this._rounds.length) return "No round of more than one worker has been committed since this server began.";
    const [[name, mean]] = this._means();
    const rounds = plural(Math.min(RECENT, this._rounds.length), "round");
    return `${shortened(shown(name), 32)} comes last: on average ${seconds(mean)} after the first, over ${rounds}.`;
  }

  /** Names with their mean lateness in the last rounds, the latest first. */
  _means() {
    const sums = new Map(this._names.map((name) => [name, [0, 0]]));
    for (const round of this._rounds.slice(-RECENT)) {
      for (const [name, late_s] of latenesses(round)) {
        const [sum, rounds] = sums.get(name);
        sums.set(name, [sum + late_s, rounds + 1]);
      }
    }
    return [...sums].map(([name, [sum, rounds]]) => [name, sum / (rounds || 1)]).sort((a, b) => b[1] - a[1]);
  }

  /** Of many workers, the latest ones. */
  _outstanding() {
    return this._means()
      .slice(0, SERIES - 1)
      .map(([name]) => name);
  }

  _legend() {
    const others = this._names.length - this._picked.length;
    return [...this._workerSwatches(), ...(others ? [[bandSwatch("series-mean"), `the other ${others} workers`]] : [])];
  }

  _plot(width) {
    const axis = axisFor(this._rounds, "step", width);
    const late = this._rounds.map((round) => latenesses(round));
    const high = extent([0, ...late.flatMap((found) => [...found.values()])])[1];
    const at = frame(
      width,
      HEIGHT,
      axis,
      upwards(0, high, secondsTick, (high) => secondTicks(0, high, 5)),
    );
    const picked = new Set(this._picked);
    const others = late.map((found, index) => {
      const values = [...found].filter(([name]) => !picked.has(name)).map(([, late_s]) => late_s);
      return [axis.places[index], Math.min(...values), Math.max(...values)];
    });
    const lines = this._lines(axis, at, (index, name) => late[index].get(name) ?? null);
    return {
      width,
      nodes: [...at.nodes, band(at, others, "series-mean"), ...lines],
      ...columnsOf(axis, at, this._rounds, (round) => this._describe(round)),
    };
  }

  _describe(round) {
    const lines = [...latenesses(round)]
      .sort((a, b) => b[1] - a[1])
      .map(([name, value]) => [shortened(shown(name), 24), seconds(value)]);
    return { title: `${stepsOf(round)}, ${clock(round.committed_at)}`, lines };
  }

  _table() {
    const rows = this._rounds
      .slice(-MOST_ROWS)
      .reverse()
      .map((round) => {
        const late = latenesses(round);
        return [count(round.step), ...this._names.map((name) => seconds(late.get(name) ?? null))];
      });
    return [["step", ...this._names.map((name) => `#${shortened(shown(name), 24)}`)], rows];
  }
}

/** By worker, the seconds from a round's first whole push to its own; only of workers that the round counted. */
function latenesses(round) {
  const first_s = Math.min(...round.workers.map((worker) => worker.whole_s));
  return new Map(round.workers.map((worker) => [worker.worker_id, worker.whole_s - first_s]));
}
