// Puts the page together: news come in, views are told.

import { BytesARound, SecondsARound } from "./costs.js";
import { setText } from "./dom.js";
import { mainFacts, otherFacts } from "./facts.js";
import { clock, count, printable, seconds } from "./format.js";
import { NOTHING, withNews } from "./history.js";
import { Lateness } from "./lateness.js";
import { LossCurves } from "./loss.js";
import { Events, fillFacts, Shards, Workers } from "./panels.js";
import { phaseOf } from "./phase.js";
import { follow } from "./stream.js";
import { Timeline } from "./timeline.js";

const byId = (id) => document.getElementById(id);
// Pictures move with every round; readers who want less motion get them less often.
const PICTURES_EVERY_S = matchMedia("(prefers-reduced-motion: reduce)").matches ? 10 : 1;

const timeline = new Timeline();
const curves = [new LossCurves(), new Lateness(), new BytesARound(), new SecondsARound()];
const shards = new Shards(byId("shards-table"), byId("shards-summary"), "Shards");
const panels = [
  new Workers(byId("workers-table"), byId("workers-summary"), "Workers"),
  new Events(byId("events-table"), byId("events-summary"), "Last events"),
];
/** The last status; null before the first. */
let news = null;
let known = NOTHING;
let connection = { isLive: false, last_at: null, problem: "" };
let isPaused = false;
let drawn_at = -Infinity;
let drawnRounds = null;

byId("timeline").append(timeline.element);
byId("curves").append(...curves.map((curve) => curve.element));
for (const picture of [timeline, ...curves]) picture.update(known, null);
byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  setText(byId("pause"), isPaused ? "Go on" : "Pause");
  showConnection();
  showAll();
});
document.addEventListener("visibilitychange", showAll);
follow({
  onStatus(status) {
    news = status;
    showWords();
  },
  onRounds(rounds) {
    known = withNews(known, rounds);
    showWords();
    showPictures(rounds.whole);
  },
  onConnection(state) {
    connection = state;
    showConnection();
  },
});

function showAll() {
  showWords();
  showPictures(true);
}

function showWords() {
  if (news === null || isPaused) return;
  showPhase();
  if (document.hidden) return;
  byId("pause").hidden = false;
  showBeginning();
  fillFacts(byId("facts"), mainFacts(news, known.rounds));
  fillFacts(byId("other-facts"), otherFacts(news));
  for (const panel of panels) panel.update(news);
  byId("shards").hidden = !news.shards.length;
  if (news.shards.length) shards.update(news);
}

function showPictures(isUrgent) {
  if (news === null || isPaused || document.hidden) return;
  const now = performance.now() / 1000;
  if (!isUrgent && now - drawn_at < PICTURES_EVERY_S - 0.5) return;
  drawn_at = now;
  timeline.update(known, news);
  byId("timeline").removeAttribute("aria-busy");
  if (drawnRounds === known.rounds) return;
  drawnRounds = known.rounds;
  for (const curve of curves) curve.update(known);
}

/** Also in the title of a window that nobody looks at. */
function showPhase() {
  const { kind, text, detail, said } = phaseOf(news, known.rounds.at(-1));
  const section = byId("now");
  if (section.dataset.kind !== kind) section.dataset.kind = kind;
  setText(byId("phase"), text);
  setText(byId("phase-detail"), detail);
  if (connection.isLive) setText(byId("said"), said);
  const goesWell = kind === "training" || kind === "waiting";
  document.title = `${goesWell ? `step ${count(news.status.global_step)}` : said} · modelaverage`;
}

/** Which server this is, and from which step on it knows the run. */
function showBeginning() {
  const { address, shard, first_step, restored } = news.server;
  const which = shard.count > 1 ? `, shard ${shard.index} of ${shard.count}` : "";
  setText(byId("address"), printable(address) + which);
  const isLater = first_step > 0 && !(known.rounds[0]?.step < first_step);
  byId("history").hidden = !isLater;
  const how = restored ? ", from a checkpoint" : "";
  const text = `This server began at step ${count(first_step)}${how}; earlier rounds are not known here.`;
  if (isLater) setText(byId("history"), text);
}

function showConnection() {
  const { isLive, last_at, problem } = connection;
  const state = isPaused ? "paused" : isLive ? "live" : last_at === null ? "connecting" : "no connection";
  byId("connection").dataset.state = isPaused ? "paused" : isLive ? "live" : "lost";
  setText(byId("connection"), state);
  byId("lost").hidden = isLive || (last_at === null && !problem);
  if (isLive) {
    if (news !== null && !isPaused) showPhase();
    return;
  }
  setText(byId("said"), "No connection to the server");
  const ago_s = Math.floor(Date.now() / 1000 - last_at);
  const since = last_at === null ? "No news yet" : `No news since ${clock(last_at)} (${seconds(ago_s)} ago)`;
  const last = news?.status.job_over
    ? "The job was over; below is what was last known."
    : "Below is what was last known.";
  setText(byId("lost"), `${since}: ${printable(problem)}. ${last} The page tries again by itself.`);
}
