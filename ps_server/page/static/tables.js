// Tables: everything that a picture shows is also one. Rows are changed in place.

import { html, setText } from "./dom.js";

/** A table in a box of its own that scrolls sideways: `fill(heads, rows)`; the first cell of a row is its head. */
export class Table {
  constructor(caption) {
    this._head = html("tr");
    this._body = html("tbody");
    const table = html(
      "table",
      {},
      html("caption", { class: "unseen" }, caption),
      html("thead", {}, this._head),
      this._body,
    );
    this.element = html("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, table);
  }

  /**
   * @param heads texts; one that begins with "#" is of a column of numbers.
   * @param rows lists of texts, or `{ cells, tone, titles }`, where a title is the full text of a shortened cell.
   */
  fill(heads, rows) {
    if (this._heads !== heads.join("\n")) {
      this._heads = heads.join("\n");
      this._head.replaceChildren(
        ...heads.map((head) => html("th", { scope: "col", class: numeric(head) }, head.replace("#", ""))),
      );
      this._body.replaceChildren();
    }
    while (this._body.rows.length > rows.length) this._body.lastElementChild.remove();
    rows.forEach((row, at) => {
      const { cells, tone = "", titles = [] } = Array.isArray(row) ? { cells: row } : row;
      const line =
        this._body.rows[at] ??
        this._body.appendChild(
          html(
            "tr",
            {},
            ...cells.map((_, column) =>
              html(column ? "td" : "th", { scope: column ? null : "row", class: numeric(heads[column]) }),
            ),
          ),
        );
      if (line.className !== tone) line.className = tone;
      cells.forEach((text, column) => {
        const cell = line.cells[column];
        setText(cell, text);
        if ((titles[column] ?? "") !== cell.title) cell.title = titles[column] ?? "";
      });
    });
  }
}

function numeric(head) {
  return head.startsWith("#") ? "number" : null;
}

/** A table that is filled only while it is open. */
export class FoldedTable {
  constructor(caption) {
    this._table = new Table(caption);
    this.element = html("details", {}, html("summary", {}, "as a table"), this._table.element);
    this.element.addEventListener("toggle", () => this._fill());
  }

  /** @param made gives `[heads, rows]`. */
  update(made) {
    this._made = made;
    this._fill();
  }

  _fill() {
    if (this.element.open && this._made) this._table.fill(...this._made());
  }
}
