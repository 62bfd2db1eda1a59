// What pictures of workers' values over rounds have in common: each worker has a line with its own colour and dashes.

import { line, swatch } from "./chart.js";
import { inOrder, shortened, shown } from "./format.js";
import { workersOf } from "./history.js";
import { Picture } from "./picture.js";

/** How many workers have lines that can be told apart; of more, some are picked. */
export const SERIES = 6;

/** The values of workers over rounds; what they are, a subclass knows. */
export class Curves {
  constructor(title, controls) {
    this._picture = new Picture(title, (width) => this._plot(width), { controls });
    this.element = this._picture.element;
    this._rounds = [];
    this._names = [];
    this._picked = [];
    this._by = "step";
  }

  update(known) {
    this._rounds = this._kept(known.rounds);
    this._names = inOrder(workersOf(this._rounds.slice(-1000)));
    this._picked = this._names.length <= SERIES ? this._names : this._outstanding();
    this._refresh();
  }

  _refresh() {
    this._picture.say(this._summary());
    this._picture.explain(this._legend());
    this._picture.redraw();
    this._picture.table.update(() => this._table());
  }

  /** @param places where the values lie; `valueOf(index, name)`: null if there is none. */
  _lines(places, at, valueOf) {
    return this._picked.map((name, series) =>
      line(
        at,
        places.map((place, index) => [place, valueOf(index, name)]),
        `series-${series}`,
      ),
    );
  }

  _workerSwatches() {
    return this._picked.map((name, index) => [swatch(`series-${index}`), shortened(shown(name), 28)]);
  }
}
