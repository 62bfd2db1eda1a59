// Axes of charts whose points are rounds.

import { bytes, clock, count, seconds } from "./format.js";
import { bytesOf } from "./history.js";
import { byteTicks, extent, nearest, secondTicks, ticks } from "./scale.js";

/** Of a chart, in pixels. */
export const HEIGHT = 240;
/** Rows of a table. */
export const MOST_ROWS = 200;

/** The horizontal axis of rounds: where each lies, ticks, and how a place is written. */
export function axisFor(rounds, by, width) {
  let moved = 0;
  const places = rounds.map((round) => {
    moved += bytesOf(round).coded * round.count;
    return by === "bytes" ? moved : by === "time" ? round.committed_at : round.step + round.count;
  });
  const [low, high] = places.length === 1 && by === "step" ? [places[0] - 1, places[0] + 1] : extent(places);
  const most = Math.max(2, (width - 80) / 90);
  if (by === "bytes") return { places, low: 0, high, ticks: byteTicks(high, most), format: bytesTick, title: "moved" };
  if (by === "time") return { places, low, high, ticks: secondTicks(low, high, most), format: clock, title: "time" };
  return { places, low, high, ticks: ticks(low, high, most, true), format: count, title: "step" };
}

/** A vertical axis of round numbers that begins at `low` or below. */
export function upwards(low, high, format, made = (high) => ticks(low, high, 5)) {
  const found = made(high);
  const step = found.length > 1 ? found[1] - found[0] : 0;
  return {
    low: low === 0 ? 0 : Math.min(low, found[0]),
    high: Math.max(high, step ? Math.min(found.at(-1) + step, high * 1.08) : high),
    ticks: found,
    format,
  };
}

/** The columns of a plot whose points are rounds. */
export function columnsOf(axis, at, rounds, describe) {
  return {
    height: HEIGHT,
    columns: rounds.length,
    rows: 1,
    placeOf: (column) => ({ x: at.x(axis.places[column]), y: HEIGHT / 3 }),
    pointAt: (left) => ({ column: nearest(axis.places, at.back(left), (place) => place), row: 0 }),
    describe: (column) => describe(rounds[column], column),
  };
}

/** "step 612", or "steps 100 to 109". */
export function stepsOf(round) {
  return round.count === 1
    ? `step ${count(round.step)}`
    : `steps ${count(round.step)} to ${count(round.step + round.count - 1)}`;
}

/** Ticks are round numbers: "16 MiB", "0". */
export function bytesTick(value) {
  return value ? bytes(value).replace(".0\u00a0", "\u00a0") : "0";
}

/** "20 s", "5 min". */
export function secondsTick(value) {
  return value ? seconds(value).replace(/\.0(?=\u00a0)|\u00a00\u00a0(s|min)$/, "") : "0";
}
