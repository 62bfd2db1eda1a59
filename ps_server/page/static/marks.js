// The marks of pictures and their swatches: each has a shape of its own, so that no meaning is carried by colour alone.

import { svg } from "./dom.js";

/** By kind: `path` within -5 to 5, and what it means. */
export const MARKS = {
  restarted: { path: "M0-5 5 4-5 4z", text: "a new process of the worker" },
  stale: { path: "M0-5 5 0 0 5-5 0z", text: "stale push: came too late" },
  left: { path: "M-4-4 4 4M4-4-4 4", text: "the worker has left" },
  without: { path: "M4 0A4 4 0 1 1-4 0 4 4 0 1 1 4 0z", text: "given up by the round" },
  finished: { path: "M-4-4H4V4H-4z", text: "the worker has finished" },
  started_over: { path: "M-5-4H5L0 5z", text: "the round started over" },
  restored: { path: "M-4-5 5 0-4 5z", text: "the server began from what was kept" },
  nonfinite: { path: "M-4-4 4 4M4-4-4 4", text: "values not finite" },
  checkpoint: { path: "M0-4V4", text: "checkpoint" },
};

/** A mark at a place; `height` is for marks of the whole server, which get a line down the picture. */
export function markAt(kind, x, y, height = null) {
  const shape = MARKS[kind] ?? MARKS.stale;
  const mark = svg("path", { d: shape.path, class: `mark mark-${kind}`, transform: `translate(${x.toFixed(1)} ${y})` });
  if (height === null || kind === "checkpoint") return mark;
  return svg("g", {}, svg("line", { class: `mark-line mark-${kind}`, x1: x, x2: x, y1: y, y2: height }), mark);
}

/** For a legend: a state of lanes.js, a phase of a round, or a kind of mark. */
export function swatchOf(what) {
  const shape =
    MARKS[what] && what !== "without"
      ? [svg("path", { d: MARKS[what].path, class: `mark mark-${what}`, transform: "translate(9 7)" })]
      : what === "without"
        ? [
            svg("path", { d: "M0 6h18v2H0z", fill: "url(#fill-without)" }),
            svg("path", { d: MARKS.without.path, class: "mark mark-without", transform: "translate(9 7)" }),
          ]
        : [svg("rect", { x: 0.5, y: 1.5, width: 17, height: 11, class: `state-${what}`, fill: `url(#fill-${what})` })];
  return svg("svg", { width: 18, height: 14, "aria-hidden": "true" }, ...shape);
}
