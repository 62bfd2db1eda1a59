// A picture: a heading, its main number in words, an SVG whose points can be reached with mouse, finger and keys, a
// legend, and the same as a table. A picture draws itself through a plot (see `draw`).

import { html, svg, setText } from "./dom.js";
import { FoldedTable } from "./tables.js";

const MOST_LINES = 9;
// Of .box, in pixels: room for the ring around a picture that has the focus.
const PADDING = 3;

export class Picture {
  /**
   * @param title of the picture.
   * @param draw gives for a width in pixels a plot: `width`, `height`, `nodes` (SVG), `columns` and `rows` (how many
   *   points there are to reach), `placeOf(column, row)` and `pointAt(x, y)` between points and pixels, and
   *   `describe(column, row)`: `{ title, lines: [[label, text]] }`.
   * @param controls elements for the heading's line; `names` an element left of the picture.
   * @param spread gives the least width in pixels; wider than the page, the picture scrolls in its own box.
   */
  constructor(title, draw, { controls = [], names = null, spread = () => 0 } = {}) {
    this._draw = draw;
    this._spread = spread;
    this._cursor = null;
    this._summary = html("p", { class: "summary" });
    this.svg = svg("svg", { "aria-hidden": "true" });
    this._tip = html("div", { class: "tip", hidden: "" });
    this._stage = html(
      "div",
      {
        class: "stage",
        tabindex: "0",
        role: "slider",
        "aria-label": `${title}: arrow keys show each value`,
        "aria-valuenow": "0",
        "aria-valuemin": "0",
        "aria-valuemax": "0",
        "aria-valuetext": "nothing chosen",
      },
      this.svg,
    );
    this._box = html("div", { class: "box" }, this._stage);
    this.legend = html("ul", { class: "legend" });
    this.table = new FoldedTable(title);
    this._place = html("div", { class: "place" }, ...(names ? [names] : []), this._box, this._tip);
    this.element = html(
      "section",
      { class: "card picture" },
      html("div", { class: "heading" }, html("h3", {}, title), ...controls),
      this._summary,
      this._place,
      this.legend,
      this.table.element,
    );
    this._listen();
    new ResizeObserver(() => this.redraw()).observe(this.element);
  }

  /** Draws anew, and keeps a picture that scrolls at its end unless the reader has scrolled away from there. */
  redraw() {
    const room = (this._box.clientWidth || this.element.clientWidth - 40) - 2 * PADDING;
    if (room <= 0) return;
    const atEnd = this._box.scrollLeft + this._box.clientWidth >= this._box.scrollWidth - 8;
    this._plot = this._draw(Math.max(room, this._spread()));
    const { width, height, nodes, columns } = this._plot;
    // Without data the summary says what is missing; there is nothing to see and nothing to reach.
    for (const part of [this._place, this.table.element]) part.hidden = !columns;
    this.element.classList.toggle("empty", !columns);
    if (!columns) return this._hide();
    for (const [name, value] of [
      ["width", width],
      ["height", height],
      ["viewBox", `0 0 ${width} ${height}`],
    ])
      this.svg.setAttribute(name, value);
    this._line = svg("line", { class: "cursor", y1: 0, y2: height, visibility: "hidden" });
    this.svg.replaceChildren(...nodes, this._line);
    if (atEnd) this._box.scrollLeft = this._box.scrollWidth;
    this._stage.setAttribute("aria-valuemax", columns - 1);
    if (this._cursor) this._show(this._cursor.column, this._cursor.row);
  }

  /** The main number, in words; the picture's text alternative. */
  say(text) {
    setText(this._summary, text);
  }

  /** @param entries `[SVG swatch, text]`. */
  explain(entries) {
    const key = entries.map(([, text]) => text).join("\n");
    if (this._explained === key) return;
    this._explained = key;
    this.legend.replaceChildren(...entries.map(([swatch, text]) => html("li", {}, swatch, html("span", {}, text))));
  }

  _listen() {
    const point = (event) => {
      const at = this.svg.getBoundingClientRect();
      const found = this._plot?.pointAt(event.clientX - at.left, event.clientY - at.top);
      if (found) this._show(found.column, found.row);
    };
    this._stage.addEventListener("pointermove", point);
    this._stage.addEventListener("pointerdown", point);
    this._stage.addEventListener("pointerleave", () => document.activeElement !== this._stage && this._hide());
    this._stage.addEventListener("blur", () => this._hide());
    this._stage.addEventListener("focus", () => {
      if (this._stage.matches(":focus-visible") && this._plot?.columns) this._show(this._plot.columns - 1, 0);
    });
    this._box.addEventListener("scroll", () => this._cursor && this._placeTip());
    this._stage.addEventListener("keydown", (event) => this._key(event));
  }

  _key(event) {
    if (!this._plot?.columns) return;
    const { columns, rows } = this._plot;
    const { column, row } = this._cursor ?? { column: columns - 1, row: 0 };
    const moves = {
      ArrowLeft: [column - 1, row],
      ArrowRight: [column + 1, row],
      ArrowUp: [column, row - 1],
      ArrowDown: [column, row + 1],
      PageUp: [column - 10, row],
      PageDown: [column + 10, row],
      Home: [0, row],
      End: [columns - 1, row],
    };
    if (event.key === "Escape") this._hide();
    else if (moves[event.key]) this._show(within(moves[event.key][0], columns), within(moves[event.key][1], rows));
    else return;
    event.preventDefault();
    if (this._cursor) this._scrollTo(this._plot.placeOf(this._cursor.column, this._cursor.row).x);
  }

  _show(column, row) {
    if (!this._plot.columns) return this._hide();
    this._cursor = { column: within(column, this._plot.columns), row: within(row, this._plot.rows) };
    const { title, lines } = this._plot.describe(this._cursor.column, this._cursor.row);
    const kept = lines.slice(0, MOST_LINES);
    if (lines.length > kept.length) kept.push(["", `and ${lines.length - kept.length} more in the table`]);
    this._tip.replaceChildren(
      html("strong", {}, title),
      html("dl", {}, ...kept.flatMap(([label, text]) => [html("dt", {}, label), html("dd", {}, text)])),
    );
    this._tip.hidden = false;
    this._stage.setAttribute("aria-valuenow", this._cursor.column);
    this._stage.setAttribute(
      "aria-valuetext",
      [title, ...kept.map(([label, text]) => `${label} ${text}`.trim())].join(", "),
    );
    const { x } = this._plot.placeOf(this._cursor.column, this._cursor.row);
    for (const end of ["x1", "x2"]) this._line.setAttribute(end, x);
    this._line.setAttribute("visibility", "visible");
    this._placeTip();
  }

  /** Beside the point, on the side that has room. */
  _placeTip() {
    const place = this._plot.placeOf(this._cursor.column, this._cursor.row);
    const outer = this._tip.parentElement.getBoundingClientRect();
    const inner = this.svg.getBoundingClientRect();
    const x = inner.left - outer.left + place.x;
    const wide = this._tip.offsetWidth;
    const left = x + 14 + wide <= outer.width ? x + 14 : x - 14 - wide;
    this._tip.style.left = `${Math.max(0, Math.min(left, outer.width - wide))}px`;
    this._tip.style.top = `${Math.max(0, place.y + 14)}px`;
  }

  _scrollTo(x) {
    const { scrollLeft, clientWidth } = this._box;
    if (x < scrollLeft + 20 || x > scrollLeft + clientWidth - 20) this._box.scrollLeft = x - clientWidth / 2;
  }

  _hide() {
    this._cursor = null;
    this._tip.hidden = true;
    this._line?.setAttribute("visibility", "hidden");
    this._stage.setAttribute("aria-valuetext", "nothing chosen");
  }
}

function within(index, number) {
  return Math.max(0, Math.min(number - 1, index));
}
