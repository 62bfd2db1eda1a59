// The losses that workers report, and their mean, over steps, time or bytes.

import { axisFor, columnsOf, HEIGHT, MOST_ROWS, stepsOf, upwards } from "./axes.js";
import { band, bandSwatch, frame, line, swatch } from "./chart.js";
import { Curves } from "./curves.js";
import { choice } from "./dom.js";
import { clock, count, numberOf, shortened, shown, significant } from "./format.js";
import { markAt, swatchOf } from "./marks.js";
import { extent } from "./scale.js";

export class LossCurves extends Curves {
  constructor() {
    const by = choice("loss-by", "Loss over", { step: "steps", time: "time", bytes: "bytes" }, (value) => {
      this._by = value;
      this._refresh();
    });
    super("Loss", [by]);
  }

  _kept(rounds) {
    return rounds.filter((round) => round.loss !== null);
  }

  _summary() {
    const last = this._rounds.at(-1);
    if (!last) return "No worker has reported a loss.";
    const first = this._rounds[0];
    const of = (round) => significant(numberOf(round.loss));
    return `${of(last)} on average in ${stepsOf(last)}, ${of(first)} in ${stepsOf(first)}.`;
  }

  _legend() {
    if (!this._rounds.length) return [];
    const broken = this._broken().length ? [[swatchOf("nonfinite"), "values not finite"]] : [];
    return [
      [swatch("series-mean"), "mean of the workers"],
      [bandSwatch("series-mean"), "lowest to highest"],
      ...this._workerSwatches(),
      ...broken,
    ];
  }

  /** Of many workers, mean and band say enough. */
  _outstanding() {
    return [];
  }

  _broken() {
    return this._rounds.flatMap((round, at) =>
      round.nonfinite_values || !Number.isFinite(numberOf(round.loss)) ? [at] : [],
    );
  }

  _plot(width) {
    const axis = axisFor(this._rounds, this._by, width);
    const [low, high] = extent(this._rounds.flatMap((round) => [numberOf(round.loss_min), numberOf(round.loss_max)]));
    const at = frame(width, HEIGHT, axis, upwards(low >= 0 && low < high / 3 ? 0 : low, high, significantTick));
    const places = (of) => this._rounds.map((round, index) => [axis.places[index], ...of(round)]);
    const nodes = [
      ...at.nodes,
      band(
        at,
        places((round) => [numberOf(round.loss_min), numberOf(round.loss_max)]),
        "series-mean",
      ),
      ...this._lines(axis.places, at, (index, name) => lossOf(this._rounds[index], name)),
      line(
        at,
        places((round) => [numberOf(round.loss)]),
        "series-mean",
      ),
      ...this._broken().map((index) => markAt("nonfinite", at.x(axis.places[index]), at.top + 4)),
    ];
    return { width, nodes, ...columnsOf(axis, at, this._rounds, (round) => this._describe(round)) };
  }

  _describe(round) {
    const lines = [["mean", significant(numberOf(round.loss))]];
    for (const name of this._names)
      if (lossOf(round, name) !== null) lines.push([shortened(shown(name), 24), significant(lossOf(round, name))]);
    if (lines.length === 1)
      lines.push(["lowest", significant(numberOf(round.loss_min))], ["highest", significant(numberOf(round.loss_max))]);
    if (round.nonfinite_values) lines.push(["values not finite", count(round.nonfinite_values)]);
    return { title: `${stepsOf(round)}, ${clock(round.committed_at)}`, lines };
  }

  _table() {
    const rows = this._rounds
      .slice(-MOST_ROWS)
      .reverse()
      .map((round) => [
        stepsOf(round).replace(/^steps? /, ""),
        clock(round.committed_at),
        ...[round.loss, round.loss_min, round.loss_max].map((loss) => significant(numberOf(loss))),
        round.nonfinite_values ? count(round.nonfinite_values) : "–",
        ...this._names.map((name) => significant(lossOf(round, name))),
      ]);
    return [
      [
        "step",
        "committed at",
        "#mean",
        "#lowest",
        "#highest",
        "#not finite",
        ...this._names.map((name) => `#${shortened(shown(name), 24)}`),
      ],
      rows,
    ];
  }
}

function lossOf(round, name) {
  return numberOf(round.workers?.find((worker) => worker.worker_id === name)?.loss);
}

function significantTick(value) {
  return Number(value.toPrecision(6)).toString();
}
