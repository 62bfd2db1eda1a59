// The rounds that the page knows, in bounded memory. Pure: takes the documents of /api/rounds, gives new values.

/** Beyond this many rounds, older ones lose their workers; beyond MOST entries, they are put together in pairs. */
export const DETAILED = 1000;
export const MOST = 4000;
const MOST_MARKS = 2000;

export const NOTHING = Object.freeze({ rounds: [], marks: [] });

/**
 * What is known after a document. After a connection the document has everything that the server knows; what the page
 * saw before that, such as rounds before a restart of the server, stays.
 *
 * @param known what was known before.
 * @param news a document of /api/rounds; `whole`: it has everything that the server knows.
 */
export function withNews(known, news) {
  const first = news.rounds.length ? news.rounds[0].step : news.next_step;
  const before = known.rounds.filter((round) => round.step + round.count <= first);
  const rounds = bounded([...before, ...news.rounds]);
  const marks = new Map();
  for (const mark of [...known.marks.filter((mark) => !news.whole || mark.step < first), ...news.marks]) {
    marks.set(`${mark.at} ${mark.kind} ${mark.worker_id}`, mark);
  }
  return { rounds, marks: [...marks.values()].slice(-MOST_MARKS) };
}

/** At most MOST entries, the last DETAILED as they are. */
export function bounded(rounds) {
  if (rounds.length <= DETAILED) return rounds;
  const border = rounds.length - DETAILED;
  let older = rounds.slice(0, border).map((round) => (round.workers ? { ...round, workers: undefined } : round));
  if (rounds.length > MOST) {
    const pairs = [];
    for (let at = 0; at < older.length; at += 2) {
      pairs.push(at + 1 < older.length ? together(older[at], older[at + 1]) : older[at]);
    }
    older = pairs;
  }
  return [...older, ...rounds.slice(border)];
}

/** Two neighbouring entries as one: means are weighted by rounds, bytes added. */
export function together(a, b) {
  const count = a.count + b.count;
  const mean = (name) => weighted(a[name], a.count, b[name], b.count);
  const sum = (name) => a[name] + b[name];
  return {
    step: a.step,
    count,
    began_at: a.began_at,
    committed_at: b.committed_at,
    took_s: mean("took_s"),
    waiting_s: mean("waiting_s"),
    receiving_s: mean("receiving_s"),
    averaging_s: mean("averaging_s"),
    received_bytes: sum("received_bytes"),
    received_raw_bytes: sum("received_raw_bytes"),
    sent_bytes: sum("sent_bytes"),
    sent_raw_bytes: sum("sent_raw_bytes"),
    loss: mean("loss"),
    loss_min: extreme(Math.min, a.loss_min, b.loss_min),
    loss_max: extreme(Math.max, a.loss_max, b.loss_max),
    nonfinite_values: sum("nonfinite_values"),
  };
}

function weighted(a, aCount, b, bCount) {
  if (a === null) return b;
  return b === null ? a : (Number(a) * aCount + Number(b) * bCount) / (aCount + bCount);
}

function extreme(pick, a, b) {
  if (a === null) return b;
  return b === null ? a : pick(Number(a), Number(b));
}

/** The last rounds, at most `most`, that are known with their workers, ascending. */
export function lastRounds(known, most) {
  const last = known.rounds.slice(-most);
  return last.slice(last.findLastIndex((round) => !round.workers) + 1);
}

/** The names of all workers in these rounds. */
export function workersOf(rounds) {
  const names = new Set();
  for (const round of rounds) {
    for (const worker of round.workers ?? []) names.add(worker.worker_id);
    for (const name of round.without ?? []) names.add(name);
  }
  return names;
}

/** Bytes received and sent in a round, or the mean of several: coded, and what they would have been. */
export function bytesOf(round) {
  return {
    coded: (round.received_bytes + round.sent_bytes) / round.count,
    raw: (round.received_raw_bytes + round.sent_raw_bytes) / round.count,
  };
}

/** Where a round's time went, in seconds; `computing` is from the commit before to the first push. */
export function phasesOf(round, before) {
  const cycle = before ? (round.committed_at - before.committed_at) / round.count : round.took_s;
  return {
    computing: Math.max(0, cycle - round.took_s),
    waiting: round.waiting_s,
    receiving: round.receiving_s,
    averaging: round.averaging_s,
  };
}
