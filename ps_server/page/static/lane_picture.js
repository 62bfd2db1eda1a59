// How lanes are drawn: spans, marks, and the ruler above them.

import { svg } from "./dom.js";
import { clock, count } from "./format.js";
import { markAt } from "./marks.js";
import { secondTicks, ticks } from "./scale.js";

/** The ruler's height in pixels. */
export const RULER = 24;
// Pixels that the pattern of waiting needs; a narrower span has its colour alone.
const PATTERN = 5;

/**
 * A worker's lane: one path for each state, because 200 rounds have 600 spans.
 *
 * @param lane of lanes.js. `top` and `pitch`: where it lies and how high it is, in pixels. `x`: from times to pixels.
 */
export function laneAt({ spans, marks }, top, pitch, x, width) {
  const paths = new Map();
  for (const { state, from_at, to_at } of spans) {
    const left = x(from_at);
    const wide = x(to_at) - left;
    if (wide < 0.05) continue;
    const [y, high] = state === "without" ? [top + pitch / 2 - 1, 2] : [top + 4, pitch - 8];
    const fill = state === "waiting" && wide < PATTERN ? "narrow" : state;
    const across = Math.max(0.4, wide).toFixed(1);
    paths.set(fill, `${paths.get(fill) ?? ""}M${left.toFixed(1)} ${y}h${across}v${high}h-${across}z`);
  }
  return [
    ...[...paths].map(([state, d]) => svg("path", { d, class: `state-${state}`, fill: `url(#fill-${state})` })),
    ...marks.map((mark) => markAt(mark.kind, inside(x(mark.at), width), top + pitch / 2)),
  ];
}

/** Marks of the whole server. */
export function marksAbove(marks, x, width, height) {
  return marks.map((mark) => markAt(mark.kind, inside(x(mark.at), width), RULER - 6, height));
}

/** Times of day, or steps if rounds have the same width. */
export function rulerAt(borders, by, x, width) {
  const last = borders.at(-1);
  const most = Math.max(2, width / 110);
  let places = [];
  if (by === "time" && last) {
    places = secondTicks(borders[0].from_at, last.to_at, most).map((at) => [x(at), clock(at)]);
  } else if (borders.length > 1) {
    const found = ticks(borders[0].step, last.step ?? borders.at(-2).step, most, true);
    const borderOf = new Map(borders.map((border) => [border.step, border]));
    places = found
      .filter((step) => borderOf.has(step))
      .map((step) => [x(borderOf.get(step).from_at), `step ${count(step)}`]);
  }
  const shown = places.filter(([at]) => at < width - 60);
  return svg(
    "g",
    { class: "ruler" },
    ...shown.flatMap(([at, text]) => [
      svg("line", { x1: at, x2: at, y1: RULER - 6, y2: "100%" }),
      svg("text", { x: at + 3, y: RULER - 12 }, text),
    ]),
  );
}

/** Marks are shown whole, also at the ends. */
function inside(x, width) {
  return Math.min(width - 6, Math.max(6, x));
}
