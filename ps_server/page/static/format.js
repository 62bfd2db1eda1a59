// Numbers, durations, sizes and names as text for people. Pure; the words are those of `ps-server status`. A number and
// its unit stay on one line: a no-break space is between them.

const DASH = "–";
const GAP = "\u00a0";
// Names need no quotes if they consist of letters and digits of any script and of the characters of hosts and paths.
const PLAIN = /^[\p{L}\p{N}_.:@/+~-]+$/u;
const NOT_PRINTABLE = /[\p{C}\p{Z}]/gu;

/** A number of the server's JSON, where "NaN" and "Infinity" are text; null if there is none. */
export function numberOf(value) {
  return value === null || value === undefined ? null : Number(value);
}

/** A whole number with its thousands separated. */
export function count(value) {
  return value === null
    ? DASH
    : Math.round(value)
        .toString()
        .replace(/\B(?=(\d{3})+$)/g, ",");
}

/** A number with four digits that matter, such as a loss. */
export function significant(value) {
  if (value === null) return DASH;
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return size >= 1000 ? count(value) : value.toPrecision(4);
}

/** Bytes, such as "1.5 MiB". */
export function bytes(value) {
  if (value === null) return DASH;
  for (const [unit, factor] of [
    ["TiB", 2 ** 40],
    ["GiB", 2 ** 30],
    ["MiB", 2 ** 20],
    ["KiB", 2 ** 10],
  ]) {
    if (value >= factor) return `${(value / factor).toFixed(1)}${GAP}${unit}`;
  }
  return `${count(value)}${GAP}bytes`;
}

/** A duration in seconds, such as "310 ms", "6.2 s" or "3 min 12 s". */
export function seconds(value) {
  if (value === null) return DASH;
  if (value < 0.9995) return `${Math.round(value * 1000)}${GAP}ms`;
  if (value < 9.95) return `${value.toFixed(1)}${GAP}s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole}${GAP}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}${GAP}min${GAP}${whole % 60}${GAP}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}${GAP}h${GAP}${Math.floor((whole % 3600) / 60)}${GAP}min`;
  return `${Math.floor(whole / 86400)}${GAP}d${GAP}${Math.floor((whole % 86400) / 3600)}${GAP}h`;
}

/** The time of day, in the reader's time zone. */
export function clock(at) {
  if (at === null) return DASH;
  const date = new Date(at * 1000);
  return [date.getHours(), date.getMinutes(), date.getSeconds()].map((n) => String(n).padStart(2, "0")).join(":");
}

/** "1 worker", "2 workers". */
export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** A client's name, which is any text: in quotes and with escapes unless it is plain. */
export function shown(name) {
  if (PLAIN.test(name)) return name;
  const escaped = name.replace(/[\\']/g, "\\$&").replace(NOT_PRINTABLE, (character) => {
    if (character === " ") return character;
    const code = character.codePointAt(0).toString(16);
    return code.length > 4 ? `\\u{${code}}` : `\\u${code.padStart(4, "0")}`;
  });
  return `'${escaped}'`;
}

/** Untrusted text on one line, with escapes for what cannot be printed. */
export function printable(text) {
  return text.replace(
    /[\p{C}\u2028\u2029]/gu,
    (character) => `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Text of at most `most` characters: … replaces the middle, since names often differ at the end. */
export function shortened(text, most) {
  const letters = [...text];
  if (letters.length <= most) return text;
  const tail = Math.floor((most - 1) / 2);
  return letters.slice(0, most - 1 - tail).join("") + "…" + letters.slice(letters.length - tail).join("");
}

/** The first names, and how many more there are: "a, b and 3 more". */
export function listed(names, omitted, most = 4) {
  const first = names.slice(0, most).map((name) => shortened(shown(name), 32));
  const more = names.length - first.length + omitted;
  if (!more) return first.length < 2 ? first.join("") : `${first.slice(0, -1).join(", ")} and ${first.at(-1)}`;
  return first.length ? `${first.join(", ")} and ${count(more)} more` : plural(more, "worker");
}

/** Names in the order of people: worker-2 before worker-10. */
export function inOrder(names) {
  return [...names].sort(new Intl.Collator("en", { numeric: true }).compare);
}
