// Each worker's lane: when it trained, pushed and waited. Pure: times in Unix seconds, no pictures.

const MOST_CHECKPOINTS = 40;

/**
 * The lanes of rounds that follow one another.
 *
 * @param rounds known one by one, ascending.
 * @param marks of /api/rounds.
 * @param news the document of /api/status; its round in progress ends the lanes. null: none.
 * @returns `from_at`, `to_at`, `borders` (a round each: step, from_at, to_at; step null: in progress) and `workers`, a
 *   Map from names to `{ spans: [{ state, from_at, to_at, step }], marks: [{ at, kind, step }] }`. States: training,
 *   pushing, waiting, without (the round gave the worker up), late (the round in progress has long waited for it).
 */
export function lanesOf(rounds, marks, news) {
  const borders = rounds.map((round, at) => ({
    step: round.step,
    from_at: at ? rounds[at - 1].committed_at : round.began_at,
    to_at: round.committed_at,
  }));
  const workers = new Map();
  const laneOf = (name) => {
    if (!workers.has(name)) workers.set(name, { spans: [], marks: [] });
    return workers.get(name);
  };
  rounds.forEach((round, at) => {
    const { from_at, to_at } = borders[at];
    for (const worker of round.workers) {
      const pushed_at = Math.min(Math.max(round.began_at + worker.pushed_s, from_at), to_at);
      const whole_at = Math.min(Math.max(round.began_at + worker.whole_s, pushed_at), to_at);
      const spans = laneOf(worker.worker_id).spans;
      spans.push({ state: "training", from_at, to_at: pushed_at, step: round.step });
      spans.push({ state: "pushing", from_at: pushed_at, to_at: whole_at, step: round.step });
      spans.push({ state: "waiting", from_at: whole_at, to_at, step: round.step });
    }
    for (const name of round.without) {
      const lane = laneOf(name);
      lane.spans.push({ state: "without", from_at, to_at, step: round.step });
      lane.marks.push({ at: to_at, kind: "without", step: round.step });
    }
  });
  if (news) addOpenRound(news, rounds.at(-1), borders, laneOf);
  const from_at = borders.length ? borders[0].from_at : null;
  const to_at = borders.length ? borders.at(-1).to_at : null;
  const shared = [];
  for (const mark of marks) {
    // What happened between rounds belongs to the nearest one.
    if (from_at === null || (mark.at < from_at && mark.step < borders[0].step)) continue;
    const placed = { ...mark, at: Math.min(to_at, Math.max(from_at, mark.at)) };
    if (mark.worker_id === null) shared.push(placed);
    else if (workers.has(mark.worker_id)) workers.get(mark.worker_id).marks.push(placed);
  }
  return { from_at, to_at, borders, workers, marks: withoutMany(shared) };
}

/** A server may write a checkpoint after every round; then a mark says nothing, and hides the others. */
function withoutMany(marks) {
  const isCheckpoint = (mark) => mark.kind === "checkpoint";
  return marks.filter(isCheckpoint).length > MOST_CHECKPOINTS ? marks.filter((mark) => !isCheckpoint(mark)) : marks;
}

/** The stretch from the last commit until now; the server does not tell since when a worker has been at the barrier. */
function addOpenRound(news, last, borders, laneOf) {
  const { status, now_at, waiting } = news;
  if (status.job_over || status.phase === "PHASE_UNINITIALIZED") return;
  const began_at = now_at - status.round_age_s;
  const from_at = last ? last.committed_at : began_at;
  if (now_at <= from_at) return;
  borders.push({ step: null, from_at, to_at: now_at });
  const awaited = new Map(waiting.map((worker) => [worker.worker_id, worker]));
  const counted = new Set(last?.workers.map((worker) => worker.worker_id));
  for (const worker of status.workers) {
    const name = worker.worker_id;
    const takesPart = counted.has(name) || worker.waiting || worker.fragments_given || awaited.has(name);
    if (worker.has_finished || !takesPart) continue;
    const spans = laneOf(name).spans;
    const border_at = Math.max(from_at, began_at);
    if (last?.without?.includes(name) && awaited.has(name)) {
      // It has not come back: red once the round has waited long.
      spans.push({ state: awaited.get(name).is_late ? "late" : "without", from_at, to_at: now_at, step: null });
    } else if (worker.waiting) {
      spans.push({ state: "training", from_at, to_at: border_at, step: null });
      spans.push({ state: "waiting", from_at: border_at, to_at: now_at, step: null });
    } else if (awaited.get(name)?.is_late) {
      spans.push({ state: "training", from_at, to_at: border_at, step: null });
      spans.push({ state: "late", from_at: border_at, to_at: now_at, step: null });
    } else if (!worker.has_left) {
      spans.push({ state: worker.fragments_given ? "pushing" : "training", from_at, to_at: now_at, step: null });
    }
  }
}

/** The round, as an index into `borders`, at a time; -1 if there are none. */
export function borderAt(borders, at) {
  const found = borders.findIndex((border) => at < border.to_at);
  return found < 0 ? borders.length - 1 : found;
}

/**
 * Where times lie in a picture, from 0 to 1: as they passed, or with the same width for each round.
 *
 * @returns `at(time)` and `time(place)`.
 */
export function axisOf(borders, by) {
  if (!borders.length) return { at: () => 0, time: () => 0 };
  const first = borders[0].from_at;
  const span = borders.at(-1).to_at - first || 1;
  if (by === "time") return { at: (time) => (time - first) / span, time: (place) => first + place * span };
  const number = borders.length;
  return {
    at(time) {
      const index = borderAt(borders, time);
      const { from_at, to_at } = borders[index];
      return (index + Math.min(1, Math.max(0, (time - from_at) / (to_at - from_at || 1)))) / number;
    },
    time(place) {
      const index = Math.min(number - 1, Math.max(0, Math.floor(place * number)));
      const { from_at, to_at } = borders[index];
      return from_at + (place * number - index) * (to_at - from_at);
    },
  };
}

/** At most `most` of the workers, in the order of `names`: those that the round waits for first, then marked ones. */
export function chosen(names, lanes, awaited, most) {
  if (names.length <= most) return names;
  const rank = (name) => (awaited.has(name) ? 0 : lanes.get(name).marks.length ? 1 : 2);
  const kept = new Set(
    names
      .map((name, at) => [rank(name), at, name])
      .sort((a, b) => a[0] - b[0] || a[1] - b[1])
      .slice(0, most)
      .map(([, , name]) => name),
  );
  return names.filter((name) => kept.has(name));
}
