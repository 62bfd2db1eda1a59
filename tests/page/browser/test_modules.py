"""The page's pure modules, which the browser imports and calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.page.browser.chromium import Chromium, Tab
from tests.page.browser.fake_server import fake_page
from tests.page.browser.scenes import HOSTILE_NAMES, scene

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def opened(browser: Chromium) -> Iterator[Tab]:
    with fake_page(scene("chief")) as page:
        tab = browser.tab()
        tab.open(page.url)
        yield tab
        tab.close()


def _call(tab: Tab, module: str, script: str) -> Any:
    """What a script gives, in which `m` is the module."""
    return tab.value(f"import('/static/{module}.js').then((m) => {{ {script} }})")


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("m.seconds(0.31)", "310 ms"),
        ("m.seconds(0.9999)", "1.0 s"),
        ("m.seconds(6.24)", "6.2 s"),
        ("m.seconds(9.99)", "10 s"),
        ("m.seconds(59.7)", "1 min 0 s"),
        ("m.seconds(192)", "3 min 12 s"),
        ("m.seconds(7500)", "2 h 5 min"),
        ("m.seconds(180000)", "2 d 2 h"),
        ("m.seconds(null)", "\u2013"),
        ("m.bytes(1023)", "1,023 bytes"),
        ("m.bytes(1.5 * 2 ** 20)", "1.5 MiB"),
        ("m.count(1234567)", "1,234,567"),
        ("m.significant(2.30259)", "2.303"),
        ("m.significant(0.00001)", "1.00e-5"),
        ("m.significant(m.numberOf('NaN'))", "NaN"),
        ("m.significant(m.numberOf('-Infinity'))", "\u2212∞"),
        ("m.shown('worker-1')", "worker-1"),
        ("m.shown('two words')", "'two words'"),
        ('m.shown("it\'s")', "'it\\'s'"),
        ("m.shown('a\\u202eb')", "'a\\u202eb'"),
        ("m.shown('')", "''"),
        ("m.shortened('worker-123456789', 9)", "work…6789"),
        ("m.listed(['a', 'b'], 0)", "a and b"),
        ("m.listed(['a', 'b', 'c', 'd', 'e'], 2)", "a, b, c, d and 3 more"),
        ("m.listed([], 3)", "3 workers"),
        ("m.inOrder(['w-10', 'w-2']).join()", "w-2,w-10"),
    ],
)
def test_values_are_written_for_people(opened: Tab, script: str, text: str) -> None:
    assert _call(opened, "format", f"return {script}").replace("\xa0", " ") == text


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_shown_name_has_nothing_that_is_not_printable(opened: Tab, name: str) -> None:
    assert _call(opened, "format", f"return m.shown({json.dumps(name)})").isprintable()


_ROUND = """
const round = (step) => ({ step, count: 1, began_at: step, committed_at: step + 0.9, took_s: 0.5, waiting_s: 0.2,
  receiving_s: 0.2, averaging_s: 0.1, received_bytes: 10, received_raw_bytes: 40, sent_bytes: 10, sent_raw_bytes: 40,
  loss: step, loss_min: step - 1, loss_max: step + 1, nonfinite_values: 1, workers: [{ worker_id: "a" }],
  without: [] });
const news = (first, last) => ({ whole: false, marks: [], next_step: last, rounds:
  Array.from({ length: last - first }, (_, at) => round(first + at)) });
"""


def test_what_a_page_keeps_of_100_000_rounds_is_bounded_and_adds_up(opened: Tab) -> None:
    script = """
    let known = m.NOTHING, most = 0;
    for (let step = 0; step < 100000; step += 500) {
      known = m.withNews(known, news(step, step + 500));
      most = Math.max(most, known.rounds.length);
    }
    const sum = (name) => known.rounds.reduce((total, round) => total + round[name], 0);
    let isWithoutGaps = true;
    known.rounds.forEach((round, at) => {
      if (at && known.rounds[at - 1].step + known.rounds[at - 1].count !== round.step) isWithoutGaps = false;
    });
    const mean = known.rounds.reduce((total, round) => total + round.loss * round.count, 0) / sum("count");
    return { most, rounds: sum("count"), bytes: sum("sent_bytes"), nonfinite: sum("nonfinite_values"), isWithoutGaps,
      mean, least: known.rounds[0].loss_min, first: known.rounds[0].step, detailed: m.lastRounds(known, 200).length };
    """
    found = _call(opened, "history", _ROUND + script)
    assert found.pop("most") <= 4500
    assert found.pop("mean") == pytest.approx(99999 / 2)
    assert found == {
        "rounds": 100_000,
        "bytes": 1_000_000,
        "nonfinite": 100_000,
        "isWithoutGaps": True,
        "least": -1,
        "first": 0,
        "detailed": 200,
    }


def test_a_whole_document_replaces_the_same_steps_and_a_new_run_replaces_all(opened: Tab) -> None:
    script = """
    const steps = (known) => [known.rounds[0]?.step, known.rounds.at(-1)?.step, known.rounds.length];
    const known = m.withNews(m.NOTHING, news(0, 20));
    const restarted = m.withNews(known, { ...news(15, 30), whole: true });
    const begunAgain = m.withNews(restarted, { ...news(0, 2), whole: true });
    return [steps(known), steps(restarted), steps(begunAgain)];
    """
    assert _call(opened, "history", _ROUND + script) == [[0, 19, 20], [0, 29, 30], [0, 1, 2]]


def test_marks_are_known_once(opened: Tab) -> None:
    script = """
    const marked = () => ({ ...news(0, 5), marks: [{ at: 3, step: 3, kind: "stale", worker_id: "a" }] });
    return m.withNews(m.withNews(m.NOTHING, marked()), marked()).marks.length;
    """
    assert _call(opened, "history", _ROUND + script) == 1


_LANES = """
const rounds = [0, 1].map((step) => ({ step, began_at: 10 * step + 5, committed_at: 10 * step + 10, without: [],
  workers: [{ worker_id: "a", pushed_s: 0, whole_s: 1 }, { worker_id: "b", pushed_s: 2, whole_s: 4 }] }));
rounds[1].workers.pop();
rounds[1].without = ["b"];
const status = { job_over: false, phase: "PHASE_AVERAGING", round_age_s: 6, workers: [
  { worker_id: "a", waiting: true }, { worker_id: "b", waiting: false }] };
const news = { now_at: 30, status, waiting: [{ worker_id: "b", is_late: true }] };
const { borders, workers, marks } = m.lanesOf(rounds, [{ at: 12, step: 1, kind: "checkpoint", worker_id: null }], news);
const spans = (name) => workers.get(name).spans.map(({ state, from_at, to_at }) => [state, from_at, to_at]);
"""


def test_a_lane_shows_when_a_worker_trained_pushed_and_waited(opened: Tab) -> None:
    a, b = _call(opened, "lanes", _LANES + "return [spans('a'), spans('b')]")
    assert a[3:] == [
        ["training", 10, 15],
        ["pushing", 15, 16],
        ["waiting", 16, 20],
        ["training", 20, 24],
        ["waiting", 24, 30],
    ]
    assert b == [["training", 5, 7], ["pushing", 7, 9], ["waiting", 9, 10], ["without", 10, 20], ["late", 20, 30]]


def test_a_worker_that_the_last_round_gave_up_is_red_only_after_five_seconds(opened: Tab) -> None:
    script = _LANES.replace("is_late: true", "is_late: false") + "return spans('b').at(-1)"
    assert _call(opened, "lanes", script) == ["without", 20, 30]


def test_rounds_become_points_by_their_steps_so_that_old_points_stay(opened: Tab) -> None:
    script = """
    const found = (from, to) => {
      const steps = Array.from({ length: to - from }, (_, at) => from + at);
      const late = steps.map((step) => new Map(step === 11 ? [["a", 5]] : [["a", step], ["b", 0]]));
      return m.meansOf(late, steps.map((step) => ({ step })), steps, 4).map(({ place, late }) => [place, ...late]);
    };
    return [found(8, 13), found(9, 20)[1]];
    """
    few, same = _call(opened, "lateness", script)
    assert few == [[9.5, ["a", 8], ["b", 0]], [12, ["a", 12], ["b", 0]]]
    assert same == [13.5, ["a", 13.5], ["b", 0]]


@pytest.mark.parametrize("by", ["time", "round"])
def test_a_place_on_the_axis_leads_back_to_its_time(opened: Tab, by: str) -> None:
    script = f"""
    const axis = m.axisOf(borders, '{by}');
    return [5, 7, 10, 14, 20, 29].map((time) => [time, axis.time(axis.at(time)), axis.at(time)]);
    """
    found = _call(opened, "lanes", _LANES + script)
    for time, back, _ in found:
        assert back == pytest.approx(time)
    places = [place for _, _, place in found]
    assert places == sorted(places)
    if by == "round":
        assert places[2] == pytest.approx(1 / 3)  # the second of three begins


def test_of_many_workers_those_that_the_round_waits_for_are_chosen(opened: Tab) -> None:
    script = """
    const names = Array.from({ length: 40 }, (_, at) => `w-${at}`);
    const lanes = new Map(names.map((name) => [name, { marks: name === "w-30" ? [{}] : [] }]));
    return m.chosen(names, lanes, new Set(["w-39"]), 4);
    """
    assert _call(opened, "lanes", script) == ["w-0", "w-1", "w-30", "w-39"]


def test_a_thinned_line_keeps_its_spikes(opened: Tab) -> None:
    script = """
    const points = Array.from({ length: 10000 }, (_, at) => [at, at === 5003 ? 99 : at === 7001 ? -99 : 0]);
    const found = m.thinned(points, (x) => Math.floor(x / 100));
    return [found.length, Math.max(...found.map(([, y]) => y)), Math.min(...found.map(([, y]) => y))];
    """
    length, high, low = _call(opened, "scale", script)
    assert length <= 400
    assert (high, low) == (99, -99)


@pytest.mark.parametrize(
    ("script", "ticks"),
    [
        ("m.ticks(0, 1, 5)", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("m.ticks(0, 3, 10, true)", [0, 1, 2, 3]),
        ("m.ticks(7, 7, 5)", [7]),
        ("m.byteTicks(3 * 2 ** 20, 3)", [0, 1048576, 2097152, 3145728]),
        ("m.secondTicks(0, 100, 4)", [0, 30, 60, 90]),
        ("m.extent([NaN, 3, Infinity])", [1.5, 4.5]),
    ],
)
def test_ticks_are_round_numbers(opened: Tab, script: str, ticks: list[float]) -> None:
    assert _call(opened, "scale", f"return {script}") == pytest.approx(ticks)
