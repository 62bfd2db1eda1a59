// Scales of charts. Pure.

/** Round numbers between two values, about `most` of them: steps of 1, 2 or 5 times a power of ten. */
export function ticks(low, high, most, whole = false) {
  const span = high - low;
  if (!(span > 0) || !Number.isFinite(span)) return [low];
  const rough = span / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) {
    found.push(Number((at * step).toPrecision(12)));
  }
  return found;
}

/** Round sizes in bytes, about `most` of them: steps of 1, 2, 4 ... 512 times a power of 1024. */
export function byteTicks(high, most) {
  if (!(high > 0)) return [0];
  const step = 2 ** Math.ceil(Math.log2(high / Math.max(1, most)));
  return Array.from({ length: Math.floor(high / step) + 1 }, (_, at) => at * step);
}

/** Durations, about `most` of them, in steps that clocks have. */
export function secondTicks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  if (rough < 1) return ticks(low, high, most);
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];
  const step = steps.find((one) => one >= rough) ?? Math.ceil(rough / 86400) * 86400;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) found.push(at);
  return found;
}

/** The smallest and largest finite value; [0, 1] without any. Equal ends are moved apart. */
export function extent(values) {
  let low = Infinity,
    high = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) return [0, 1];
  return low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : [low, high];
}

/** Points of a line, at most four for each pixel column (first, lowest, highest, last), so that no spike is lost. */
export function thinned(points, columnOf) {
  if (points.length <= 400) return points;
  const found = [];
  let column = null,
    kept = [];
  const flush = () => {
    const heights = kept.map(([, y]) => y);
    const ends = new Set([
      0,
      kept.length - 1,
      heights.indexOf(Math.min(...heights)),
      heights.indexOf(Math.max(...heights)),
    ]);
    for (const at of [...ends].filter((at) => at >= 0).sort((a, b) => a - b)) found.push(kept[at]);
    kept = [];
  };
  for (const point of points) {
    const here = columnOf(point[0]);
    if (here !== column && kept.length) flush();
    column = here;
    if (point[1] === null) {
      if (kept.length) flush();
      found.push(point);
    } else kept.push(point);
  }
  if (kept.length) flush();
  return found;
}

/** The index of the entry whose `value` is nearest; entries ascend. -1 if there are none. */
export function nearest(entries, value, of) {
  let low = 0,
    high = entries.length - 1;
  if (high < 0) return -1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (of(entries[middle]) < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - of(entries[low - 1]) < of(entries[low]) - value ? low - 1 : low;
}
