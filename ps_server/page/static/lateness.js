// How late workers come to the barrier.

import { axisFor, columnsOf, HEIGHT, MOST_ROWS, secondsTick, stepsOf, upwards } from "./axes.js";
import { band, bandSwatch, frame } from "./chart.js";
import { Curves, SERIES } from "./curves.js";
import { clock, count, plural, seconds, shortened, shown } from "./format.js";
import { extent, secondTicks } from "./scale.js";

const RECENT = 50;
// Points of a line: more could not be told apart from those of the other workers.
const POINTS = 50;

export class Lateness extends Curves {
  constructor() {
    super("Lateness at the barrier", []);
  }

  _kept(rounds) {
    return rounds.filter((round) => round.workers?.length > 1).slice(-1000);
  }

  /** How many rounds a point of a line stands for. */
  get _each() {
    return Math.ceil(this._rounds.length / POINTS);
  }

  _summary() {
    if (!this._rounds.length) return "No round of more than one worker has been committed since this server began.";
    const [[name, mean]] = this._means();
    const rounds = plural(Math.min(RECENT, this._rounds.length), "round");
    const last = `${shortened(shown(name), 32)} comes last: on average ${seconds(mean)} after the first, over ${rounds}.`;
    return this._each > 1 ? `${last} A point is the mean of ${this._each} rounds.` : last;
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
    const points = meansOf(this._rounds.map(latenesses), this._rounds, axis.places, this._each);
    const high = extent([0, ...points.flatMap(({ late }) => [...late.values()])])[1];
    const at = frame(
      width,
      HEIGHT,
      axis,
      upwards(0, high, secondsTick, (high) => secondTicks(0, high, 5)),
    );
    const picked = new Set(this._picked);
    const others = points.map(({ place, late }) => {
      const values = [...late].filter(([name]) => !picked.has(name)).map(([, late_s]) => late_s);
      return [place, Math.min(...values), Math.max(...values)];
    });
    const places = points.map(({ place }) => place);
    const lines = this._lines(places, at, (index, name) => points[index].late.get(name) ?? null);
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

/**
 * Neighbouring rounds as one point, with the mean lateness of each worker. Which rounds belong together depends on their
 * steps alone, so that a picture does not change where nothing new has come.
 */
export function meansOf(latenesses, rounds, places, each) {
  const groups = new Map();
  rounds.forEach((round, index) => {
    const key = Math.floor(round.step / each);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(index);
  });
  return [...groups.values()].map((indexes) => {
    const sums = new Map();
    for (const index of indexes) {
      for (const [name, late_s] of latenesses[index]) {
        const [sum, number] = sums.get(name) ?? [0, 0];
        sums.set(name, [sum + late_s, number + 1]);
      }
    }
    const place = indexes.reduce((sum, index) => sum + places[index], 0) / indexes.length;
    return { place, late: new Map([...sums].map(([name, [sum, number]]) => [name, sum / number])) };
  });
}

/** By worker, the seconds from a round's first whole push to its own; only of workers that the round counted. */
function latenesses(round) {
  const first_s = Math.min(...round.workers.map((worker) => worker.whole_s));
  return new Map(round.workers.map((worker) => [worker.worker_id, worker.whole_s - first_s]));
}
