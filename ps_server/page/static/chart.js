// Axes, lines, bands and stacked areas of a chart, as SVG. Takes values, knows nothing of rounds.

import { svg } from "./dom.js";
import { thinned } from "./scale.js";

const MARGIN = { left: 62, right: 14, top: 10, bottom: 26 };

/**
 * The frame of a chart.
 *
 * @param x, y `{ low, high, ticks, format }`; `x.title` says what x is.
 * @returns `x(value)` and `y(value)` in pixels, `back(pixels)` from a place to a value of x, and `nodes` to begin with.
 */
export function frame(width, height, x, y) {
  const { left, right, top, bottom } = MARGIN;
  const wide = Math.max(1, width - left - right);
  const high = height - top - bottom;
  const atX = (value) => left + ((value - x.low) / (x.high - x.low || 1)) * wide;
  const atY = (value) => top + high - ((value - y.low) / (y.high - y.low || 1)) * high;
  const grid = y.ticks.flatMap((value) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: atY(value), y2: atY(value) }),
    svg("text", { x: left - 8, y: atY(value) + 4, "text-anchor": "end" }, y.format(value)),
  ]);
  const below = x.ticks.map((value) =>
    svg(
      "text",
      {
        x: atX(value),
        y: height - 8,
        "text-anchor": atX(value) > width - 50 ? "end" : atX(value) < left + 20 ? "start" : "middle",
      },
      x.format(value),
    ),
  );
  const title = svg("text", { x: 0, y: height - 8 }, x.title);
  const axis = svg("line", { class: "axis", x1: left, x2: width - right, y1: top + high, y2: top + high });
  return {
    x: atX,
    y: atY,
    base: top + high,
    top,
    back: (pixels) => x.low + ((pixels - left) / wide) * (x.high - x.low),
    nodes: [svg("g", { class: "axes" }, ...grid, ...below, title, axis)],
  };
}

/** A line through `[x, y]`; where y is null or not finite, it is broken. */
export function line(at, points, className) {
  let d = "";
  let isBroken = true;
  for (const [x, y] of thinned(
    points.map(([x, y]) => [x, Number.isFinite(y) ? y : null]),
    (x) => Math.round(at.x(x)),
  )) {
    if (y === null) isBroken = true;
    else {
      d += `${isBroken ? "M" : "L"}${at.x(x).toFixed(1)} ${at.y(y).toFixed(1)}`;
      isBroken = false;
    }
  }
  // A point alone is a dot.
  return svg("path", { d: d.includes("L") || !d ? d : `${d}h0.1`, class: `line ${className}` });
}

/** The area between a low and a high line, `[x, low, high]`. */
export function band(at, points, className) {
  const known = points.filter(([, low, high]) => Number.isFinite(low) && Number.isFinite(high));
  const edge = (index) =>
    thinned(
      known.map((point) => [point[0], point[index]]),
      (x) => Math.round(at.x(x)),
    ).map(([x, y]) => `${at.x(x).toFixed(1)} ${at.y(y).toFixed(1)}`);
  const d = known.length ? `M${edge(2).join("L")}L${edge(1).reverse().join("L")}z` : "";
  return svg("path", { d, class: `band ${className}` });
}

/**
 * Bars, one on the other.
 *
 * @param bars `{ from, to, parts }`, ascending; `parts` are heights by name.
 * @param names from the bottom up.
 */
export function stacked(at, bars, names) {
  const paths = new Map(names.map((name) => [name, ""]));
  for (const { from, to, parts } of bars) {
    let below = 0;
    const left = at.x(from);
    const wide = Math.max(0.5, at.x(to) - left - (at.x(to) - left > 7 ? 1 : 0));
    const across = wide.toFixed(1);
    for (const name of names) {
      const high = at.y(below) - at.y(below + parts[name]);
      if (high > 0.05)
        paths.set(
          name,
          `${paths.get(name)}M${left.toFixed(1)} ${at.y(below).toFixed(1)}h${across}v-${high.toFixed(1)}h-${across}z`,
        );
      below += parts[name];
    }
  }
  return names.map((name) => svg("path", { d: paths.get(name), class: `state-${name}`, fill: `url(#fill-${name})` }));
}

/** A line's swatch for the legend. */
export function swatch(className) {
  return svg(
    "svg",
    { width: 26, height: 14, "aria-hidden": "true" },
    svg("path", { d: "M1 7H25", class: `line ${className}` }),
  );
}

/** A band's swatch for the legend. */
export function bandSwatch(className) {
  return svg(
    "svg",
    { width: 26, height: 14, "aria-hidden": "true" },
    svg("rect", { x: 1, y: 2, width: 24, height: 10, class: `band ${className}` }),
  );
}
