"""The command of the study: tuning, what is missing, what a cut-off study goes on with, and the page."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from study import __main__ as command
from study.arm import Absence, Arm, Variation
from study.crew import make_all, pool
from study.kept import KeptArms, Training
from study.links import LinkTimes, StepTime, link_times_path, steps_to, times_to_loss
from study.numbers import StudyNumbers
from study.page import _SHOWN, _series, write_page
from study.pictures import _look
from study.plan import EXTENDED, FULL, TIMED, PlannedArm, StudyPlan
from study.play import Measured
from study.results import CurvePoint, cheapest_within, results_of
from study.standing import StudyStanding, standing_of
from study.tasks import TASKS
from study.tuning import best_rung, rate_at, rungs_to_try
from tests.long_plays import long_except

BASE = Arm("digits", "raw", "average", 5, 0.0, 0, steps=10, num_workers=2, measure_every_steps=5)
SOURCE = "here"
SOURCES = {"digits": SOURCE}
EVERYWHERE = dict.fromkeys(TASKS, SOURCE)


def planned(name: str, arm: Arm, reference: str = "synchronous", beside: str = "") -> PlannedArm:
    return PlannedArm("A group", name, arm, 1, reference, beside)


PLAN = StudyPlan(
    (
        planned("synchronous", replace(BASE, variation=Variation(method="synchronous")), ""),
        planned("alone", replace(BASE, variation=Variation(method="alone"))),
        planned("average every 5", BASE),
        planned("average every 1", replace(BASE, interval_steps=1)),
        planned(
            "a third killed",
            replace(BASE, codec="int4", variation=Variation(absence=Absence(0.5, 1.0))),
            beside="alone",
        ),
    ),
    seeds=(0, 1, 2),
    tuning_seed=100,
)
BEST = {"synchronous": 0, "alone": 1, "average every 5": 5, "average every 1": -3, "a third killed": 2}
BYTES = {"synchronous": 1000, "alone": 0, "average every 5": 200, "average every 1": 500, "a third killed": 25}


def played(arm: Arm) -> Training:
    """A training whose loss is least at the rung of BEST."""
    index, name = next((n, p.name) for n, p in enumerate(PLAN.arms) if p.with_rate(arm.learning_rate, arm.seed) == arm)
    away = abs(math.log(arm.learning_rate / rate_at(BEST[name])))
    loss = 2.0 + 0.03 * index + 0.001 * arm.seed * index + away
    measured = (
        Measured(5, 1, 3.0, 3.0, BYTES[name] // 2, BYTES[name], 1),
        Measured(10, 2, 2.5, loss, BYTES[name], 2 * BYTES[name], 3),
    )
    return Training(arm, SOURCE, 2.0, measured)


class Inline(Executor):
    """Runs what it is given at once."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future = Future[Any]()
        future.set_result(call(*arguments, **options))
        return future


class Study:
    """Makes trainings in a directory without training, and is stopped before one of them."""

    def __init__(self, directory: Path) -> None:
        self.kept, self.made, self.stop_before = KeptArms(directory), list[Arm](), math.inf

    def standing(self) -> StudyStanding:
        return standing_of(PLAN, self.kept, SOURCES)

    def train(self, arm: Arm) -> float:
        if len(self.made) >= self.stop_before:
            raise KeyboardInterrupt
        training = played(arm)
        self.kept.keep(training)
        self.made.append(arm)
        return training.last.held_out_loss

    def run(self) -> None:
        make_all(self.standing, self.train, str, Inline(), 2, Console(quiet=True))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "runs")


# Tuning.


def tuned(loss: Callable[[int], float], first: int = 1) -> dict[int, float]:
    losses = dict[int, float]()
    while rungs := rungs_to_try(losses, first):
        losses |= {rung: loss(rung) for rung in rungs}
    return losses


@pytest.mark.parametrize("best", [1, 2, 6, -4])
def test_tuning_goes_on_until_the_best_has_a_worse_one_on_either_side(best: int) -> None:
    losses = tuned(lambda rung: (rung - best) ** 2)
    assert best_rung(losses) == best
    assert sorted(losses) == list(range(min(0, best - 1), max(2, best + 1) + 1))


def test_a_training_that_diverged_is_worse_than_all() -> None:
    losses = tuned(lambda rung: math.nan if rung > 0 else 1.0 - rung if rung > -2 else 5.0 - rung)
    assert best_rung(losses) == 0
    assert max(losses) == 2


def test_a_loss_that_falls_without_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="no learning rate is best: the loss still falls at"):
        tuned(lambda rung: -rung)


def test_learning_rates_are_a_ladder_with_round_numbers() -> None:
    assert [rate_at(rung) for rung in (-1, 0, 1, 2, 3)] == [0.00267, 0.004, 0.006, 0.009, 0.0135]


# The plan.


def test_the_full_study_fits_two_processors_in_two_hours(tmp_path: Path) -> None:
    batch_s = {"text-muon": 0.018, "mnist": 0.004}  # on each of two busy processors, measurements included
    seconds = sum(
        each.trainings_ahead * each.planned.template.batches_trained * batch_s[each.planned.template.task]
        for each in standing_of(FULL, KeptArms(tmp_path), EVERYWHERE).arms
    )
    assert 1.1 * seconds / 2 < 2 * 3600  # tuning goes on beyond three rates now and then


def test_names_of_the_plan_are_unique_and_references_come_first() -> None:
    names = [each.name for each in EXTENDED.arms]
    assert len(set(names)) == len(names)
    for index, each in enumerate(EXTENDED.arms):
        assert not each.reference or each.reference in names[:index]
        assert not each.beside or each.beside in names[:index]
    assert EXTENDED.tuning_seed not in EXTENDED.seeds


# Going on.


def test_a_study_that_was_cut_off_goes_on_where_it_was(study: Study) -> None:
    for study.stop_before in (2, 3, 11):
        with pytest.raises(KeyboardInterrupt):
            study.run()
        assert study.standing().trainings_done == len(study.made) == study.stop_before
    study.stop_before = math.inf
    study.run()
    assert len(set(study.made)) == len(study.made) == study.standing().trainings_done
    assert study.standing().trainings_ahead == 0
    rungs = {each.planned.name: each.rung for each in study.standing().arms}
    assert rungs == BEST
    before = len(study.made)
    study.run()
    assert len(study.made) == before


def test_a_training_of_other_data_is_made_again(study: Study) -> None:
    study.run()
    assert standing_of(PLAN, study.kept, {"digits": "elsewhere"}).trainings_done == 0


def test_winners_are_trained_only_at_the_tuned_rate(study: Study) -> None:
    study.run()
    for each in study.standing().arms:
        arms = [arm for arm in study.made if each.planned.with_rate(arm.learning_rate, arm.seed) == arm]
        assert [arm.seed for arm in arms if arm.seed != PLAN.tuning_seed] == [0, 1, 2]
        assert {arm.learning_rate for arm in arms if arm.seed != PLAN.tuning_seed} == {rate_at(BEST[each.planned.name])}


def test_what_a_training_raises_ends_the_study(study: Study) -> None:
    study.stop_before = 0
    with pytest.raises(KeyboardInterrupt):
        study.run()
    assert study.made == []


# The page.


def rows_of_page(page: str) -> dict[str, list[str]]:
    """The cells of the first row that begins with each name."""
    rows = dict[str, list[str]]()
    for line in page.splitlines():
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows.setdefault(name, cells)
    return rows


def test_the_numbers_of_the_page_are_those_of_the_files(study: Study, tmp_path: Path) -> None:
    study.run()
    write_page(StudyNumbers(SOURCES, results_of(study.standing())), tmp_path)
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    rows = rows_of_page(page)
    files = [json.loads(path.read_text()) for path in study.kept.directory.glob("*.json")]

    def last(name: str, seeds: tuple[int, ...] = PLAN.seeds) -> list[dict[str, Any]]:
        wanted = next(each for each in PLAN.arms if each.name == name)
        found = [
            file
            for file in files
            if file["arm"]["seed"] in seeds
            and file["arm"]["interval_steps"] == wanted.template.interval_steps
            and file["arm"]["variation"]["method"] == wanted.template.variation.method
            and file["arm"]["codec"] == wanted.template.codec
        ]
        return [file["measured"][-1] for file in sorted(found, key=lambda file: file["arm"]["seed"])]

    there = [each["held_out_loss"] for each in last("synchronous")]
    for name in ("synchronous", "average every 5", "average every 1", "a third killed"):
        loss, difference, megabytes, part, *_ = rows[name]
        held_out = [each["held_out_loss"] for each in last(name)]
        assert loss == f"{statistics.fmean(held_out):.4f} ± {statistics.stdev(held_out):.4f}"
        percent = [100 * (one - other) / other for one, other in zip(held_out, there, strict=True)]
        wanted = f"{statistics.fmean(percent):+.2f} ± {statistics.stdev(percent):.2f} %"
        assert difference == ("" if name == "synchronous" else wanted)
        up, down = (last(name)[0][way] for way in ("up_bytes", "down_bytes"))
        assert megabytes == f"{up / 1e6:.2f}, {down / 1e6:.2f}"
        assert part == f"1/{3000 / (up + down):.0f}"
        assert float(rows[name][-1]) == rate_at(BEST[name])
    tuning = page.partition("## Learning rates")[2]
    for each in last("average every 5", (PLAN.tuning_seed,)):
        assert f"{each['held_out_loss']:.4f}" in tuning
    assert f"**{min(each['held_out_loss'] for each in last('alone', (100,))):.4f}**" in tuning
    assert "- *a third killed*: 25 % of all pushes were missed\n" in page
    pairs = zip(last("a third killed"), last("alone"), strict=True)
    over = [100 * (one["held_out_loss"] / other["held_out_loss"] - 1) for one, other in pairs]
    wanted = f"{statistics.fmean(over):+.2f} ± {statistics.stdev(over):.2f} %"
    assert f"- *a third killed*: {wanted} from *alone*\n" in page


def test_the_page_says_which_arm_has_the_fewest_bytes_within_a_bound(study: Study, tmp_path: Path) -> None:
    study.run()
    write_page(StudyNumbers(SOURCES, results_of(study.standing())), tmp_path)
    rows = rows_of_page((tmp_path / "study.md").read_text(encoding="utf-8"))
    assert rows["2 %"] == ["none that was tried", "the same", "the same"]
    assert rows["3 %"] == ["none that was tried", "the same", "the same"]
    assert rows["5 %"] == [
        "1/5: average every 5, +3.1 %",
        "the same",
        "the same",
    ]  # one at +4.6 % has half of the bytes


def test_an_arm_that_no_job_can_have_is_not_among_those_with_the_fewest_bytes(study: Study) -> None:
    study.run()
    results = results_of(study.standing())
    forgetting = replace(results[2].planned.template, variation=Variation(first_moment=0.5))
    played_only = replace(results[2], planned=replace(results[2].planned, template=forgetting), bytes_part=0.001)
    everything = [*results, played_only]
    assert cheapest_within(everything, 5.0, with_more_steps=True, with_played_only=False) is results[2]
    assert cheapest_within(everything, 5.0, with_more_steps=True, with_played_only=True) is played_only


def test_an_arm_with_more_steps_is_compared_only_where_that_is_said(study: Study) -> None:
    study.run()
    results = results_of(study.standing())
    template = results[2].planned.template
    arms = {
        steps: replace(
            results[2],
            planned=replace(results[2].planned, template=replace(template, steps=steps)),
            bytes_part=0.001,
        )
        for steps in (2 * template.steps, template.steps // 2)
    }
    everything = [*results, *arms.values()]
    assert cheapest_within(everything, 5.0, with_more_steps=False, with_played_only=False) is results[2]
    longer = cheapest_within(everything, 5.0, with_more_steps=True, with_played_only=False)
    assert longer is arms[2 * template.steps]


def test_the_pictures_and_numbers_are_beside_the_page_and_the_same_again(study: Study, tmp_path: Path) -> None:
    study.run()
    written = write_page(StudyNumbers(SOURCES, results_of(study.standing())), tmp_path / "one")
    again = write_page(StudyNumbers(SOURCES, results_of(study.standing())), tmp_path / "other")
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    page = written[0].read_text(encoding="utf-8")
    linked = {tmp_path / "one" / name for name in re.findall(r"\]\(([^)]+)\)", page)}
    assert linked == set(written[1:])
    for path in written:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().get("width", "").endswith("pt")
    arms = json.loads(written[1].read_text())["arms"]
    assert [arm["planned"]["name"] for arm in arms] == [each.name for each in PLAN.arms]
    assert len(max(page.splitlines()[:30], key=len)) <= 120


def test_every_arm_of_the_pictures_is_in_the_plan() -> None:
    assert set(_SHOWN) <= {each.name for each in EXTENDED.arms}
    assert len(_SHOWN) <= 8  # as many lines as look different


def test_the_page_of_the_extended_plan_has_every_arm_and_says_what_it_is_beside(tmp_path: Path) -> None:
    kept, sent = KeptArms(tmp_path / "runs"), Measured(100, 1, 3.0, 2.5, 10, 10, 1)
    while missing := standing_of(EXTENDED, kept, EVERYWHERE).missing:
        for arm in missing:
            loss = 2.0 + abs(math.log(arm.learning_rate / rate_at(1)))
            kept.keep(Training(arm, SOURCE, 1.0, (sent, replace(sent, step=arm.steps, held_out_loss=loss))))
    results = results_of(standing_of(EXTENDED, kept, EVERYWHERE))
    names = {name: {arm.planned.template.interval_steps for arm in arms} for name, arms in _series(results)}
    assert names == {"outer step, int4": {25, 50, 55}, "average, int4": {6, 12}}
    write_page(StudyNumbers(EVERYWHERE, results), tmp_path)
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert rows_of_page(page).keys() >= {each.name for each in EXTENDED.arms}
    for each in EXTENDED.arms:
        if each.beside:
            assert f"- *{each.name}*: +0.00 ± 0.00 % from *{each.beside}*" in page


def test_the_picture_of_intervals_has_the_usual_arms(study: Study) -> None:
    study.run()
    ((name, arms),) = _series(results_of(study.standing()))
    assert (name, [arm.name for arm in arms]) == ("average", ["average every 5", "average every 1"])


def test_lines_of_a_picture_differ_without_colours() -> None:
    looks = [(str(look["linestyle"]), look["marker"]) for look in map(_look, range(8))]
    assert len({dashes for dashes, _ in looks}) == len({marker for _, marker in looks}) == 8


def test_a_page_without_the_synchronous_arm_is_refused(study: Study) -> None:
    study.stop_before = 5
    with pytest.raises(KeyboardInterrupt):
        study.run()
    with pytest.raises(ValueError, match=r"are missing, also of 'synchronous', the arm with which others are compared"):
        results_of(study.standing())


def test_an_arm_that_is_not_finished_is_not_on_the_page_but_named(study: Study, tmp_path: Path) -> None:
    study.stop_before = 15
    with pytest.raises(KeyboardInterrupt):
        study.run()
    results = results_of(study.standing())
    assert [each.name for each in results] == ["synchronous", "alone"]
    unfinished = [each.name for each in PLAN.arms[2:]]
    write_page(StudyNumbers(SOURCES, results, unfinished), tmp_path)
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert f"Not finished when this page was written: {'; '.join(unfinished)}.\n" in page
    assert rows_of_page(page).keys().isdisjoint(unfinished)
    assert json.loads((tmp_path / "study" / "study.json").read_text())["unfinished"] == unfinished


def test_numbers_are_read_as_they_were_written(study: Study, tmp_path: Path) -> None:
    study.run()
    results = results_of(study.standing())
    times = LinkTimes(0.01, (StepTime("synchronous", 20.0, 0.3, 1e6),))
    written = StudyNumbers(SOURCES, results, ["an arm"], times, times_to_loss(results, times))
    written.save(tmp_path / "study.json")
    assert StudyNumbers.load(tmp_path / "study.json") == written
    assert StudyNumbers.load(tmp_path / "nothing.json") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sources": {}, "arms": [{}], "unfinished": [], "links": null}'])
def test_numbers_of_something_else_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"study\.json has no numbers of a study"):
        StudyNumbers.load(path)


def test_an_arm_that_is_missing_keeps_its_numbers_and_is_compared_with_the_trainings_of_now(study: Study) -> None:
    study.run()
    before = results_of(study.standing())
    worse = [replace(each, held_out_losses=tuple(2 * loss for loss in each.held_out_losses)) for each in before]
    earlier = StudyNumbers(SOURCES, worse)
    for path in study.kept.directory.glob("*.json"):
        arm = json.loads(path.read_text())["arm"]
        if (arm["variation"]["method"], arm["interval_steps"]) == ("rounds", 5):
            path.unlink()
    names = [each.name for each in before]
    now = results_of(study.standing(), lambda planned: earlier.of_plan(planned, SOURCES))
    assert [each.name for each in now] == names
    stayed = now[names.index("average every 5")]
    assert stayed.held_out_losses == worse[names.index("average every 5")].held_out_losses
    pairs = zip(stayed.held_out_losses, before[0].held_out_losses, strict=True)
    assert stayed.differences_percent == pytest.approx([100 * (loss / other - 1) for loss, other in pairs])
    assert now[0] == before[0]
    assert "average every 5" not in [each.name for each in results_of(study.standing())]


def test_numbers_of_other_data_or_of_another_arm_are_not_kept(study: Study) -> None:
    study.run()
    results = results_of(study.standing())
    planned = results[1].planned
    longer = replace(planned, template=replace(planned.template, steps=2 * planned.template.steps))
    numbers = StudyNumbers(SOURCES, results)
    assert numbers.of_plan(planned, SOURCES) == results[1]
    assert numbers.of_plan(longer, SOURCES) is None
    assert numbers.of_plan(replace(planned, name="another"), SOURCES) is None
    assert numbers.of_plan(planned, dict.fromkeys(SOURCES, "other data")) is None


# Links.


def curve(*losses: float) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(10 * n, loss, n) for n, loss in enumerate(losses, start=1))


def test_a_loss_is_reached_between_two_measurements_on_a_straight_line() -> None:
    assert steps_to(1.5, curve(3.0, 2.0, 1.0)) == 25
    assert steps_to(2.0, curve(3.0, 2.0, 1.0)) == 20
    assert steps_to(3.5, curve(3.0, 2.0)) == 10
    assert steps_to(0.5, curve(3.0, 2.0, 1.0)) is None
    assert steps_to(2.5, curve(3.0, 2.0, 2.8, 1.0)) == 15  # the first time counts


def test_the_time_to_a_loss_is_steps_times_what_a_step_takes_over_the_link(study: Study, tmp_path: Path) -> None:
    study.run()
    first, alone, averages, *_ = results_of(study.standing())
    faster = replace(averages, curve=(CurvePoint(5, 3.0, 1), CurvePoint(10, 1.0, 2)))
    steps = (
        StepTime("synchronous", 20.0, 0.3, 1e6),
        StepTime(averages.name, 20.0, 0.01, 1e3),
        StepTime("alone", 20.0, 1, 1),
    )
    times = LinkTimes(0.01, (*steps, StepTime("synchronous", 1000.0, 0.02, 1e6)))
    found = times_to_loss([first, alone, faster], times)
    assert [(each.arm, each.rate_mbit) for each in found] == [
        ("synchronous", 1000.0),
        ("synchronous", 20.0),
        ("alone", 20.0),
        (averages.name, 20.0),
    ]
    fast, slow, never, ours = found
    assert [each.seconds for each in (fast, slow)] == pytest.approx([0.2, 3.0])
    assert fast.of_synchronous == slow.of_synchronous == 1
    assert (never.steps, never.seconds, never.of_synchronous) == (None, None, None)  # its last loss is 2.03
    assert ours.steps == pytest.approx(7.5)  # from 3.0 after 5 steps to 1.0 after 10; the target is 2.0
    assert ours.of_synchronous == pytest.approx(7.5 * 0.01 / 3.0)
    write_page(StudyNumbers(SOURCES, [first, alone, faster], (), times, found), tmp_path)
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    links = rows_of_page(page.partition("## Time over links")[2])
    assert links["synchronous"] == ["10", "20.0, 0 s", "300.0, 3 s"]
    assert links[averages.name] == ["8", "", "10.0, 0 s, **1/40.0**"]
    assert links["alone"] == ["not reached", "", "1000.0"]
    assert "](study/links.svg)" in page
    assert (tmp_path / "study" / "links.svg").is_file()


def test_faster_computation_shortens_what_was_slept_and_nothing_else() -> None:
    times = LinkTimes(0.02, (StepTime("synchronous", 20.0, 0.3, 1e6), StepTime("average", 20.0, 0.021, 1e3)))
    faster = times.computing_faster(10)
    assert faster.batch_s == pytest.approx(0.002)
    assert [each.step_s for each in faster.steps] == pytest.approx([0.282, 0.003])
    assert [each.link_bytes for each in faster.steps] == [1e6, 1e3]


@pytest.mark.parametrize("was_measured", [True, False])
def test_the_page_says_whether_the_time_of_a_batch_was_measured(
    was_measured: bool, study: Study, tmp_path: Path
) -> None:
    study.run()
    results = results_of(study.standing())
    times = LinkTimes(0.0193, (StepTime("synchronous", 20.0, 0.3, 1e6),), was_measured)
    numbers = StudyNumbers(SOURCES, results, (), times, times_to_loss(results, times))
    page = write_page(numbers, tmp_path)[0].read_text(encoding="utf-8")
    assert ("sleeps 19.3 ms a step**, which a batch took on one free processor." in page) == was_measured
    assert ("sleeps 19.3 ms a step**, a time that was given." in page) != was_measured


@pytest.mark.parametrize("was_measured", [True, False])
def test_times_over_links_are_read_as_they_were_written(was_measured: bool, tmp_path: Path) -> None:
    times = LinkTimes(0.01, (StepTime("synchronous", 20.0, 0.3, 1e6),), was_measured)
    times.save(link_times_path(tmp_path))
    assert LinkTimes.load(link_times_path(tmp_path)) == times
    link_times_path(tmp_path).write_text('{"batch_s": 1}')
    with pytest.raises(
        ValueError, match=r"links.json has no times of steps \('steps'\); `python -m bench.study_links`"
    ):
        LinkTimes.load(link_times_path(tmp_path))


def test_arms_that_are_timed_are_in_the_plan() -> None:
    assert set(TIMED) <= {each.name for each in FULL.arms}
    assert TIMED[0] == FULL.arms[0].name


# The command.


def test_a_study_that_is_stopped_breaks_off_its_trainings() -> None:
    pids = list[int]()

    def stopped() -> None:
        with pool(1) as executor:
            pids.append(executor.submit(os.getpid).result())
            executor.submit(time.sleep, 600.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize("in_processes", long_except([False], [False, True]))  # which import torch at a low priority
def test_the_command_trains_and_then_lists_and_writes_the_page(
    in_processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not in_processes:
        monkeypatch.setattr(command, "pool", lambda _: nullcontext(Inline()))
    plan = StudyPlan(PLAN.arms[:3], seeds=(0,), tuning_seed=100)
    monkeypatch.setattr(command, "QUICK", plan)
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["--quick", "--runs", str(tmp_path)]
    assert command.main([*arguments, "--page"]) == 1
    assert "are missing, also of 'synchronous'" in capsys.readouterr().err
    assert command.main([*arguments, "--processes", "1"]) == 0
    assert "average every 5, rate 0.006, tuning: held-out loss" in capsys.readouterr().out
    assert command.main([*arguments, "--list"]) == 0
    assert "at least 0 are missing" in capsys.readouterr().out
    assert command.main([*arguments, "--page"]) == 0
    assert (tmp_path / "quick" / "study.md").is_file()


def test_a_task_that_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def unreadable() -> Any:
        raise FileNotFoundError("no source of the standard library lies there")

    monkeypatch.setitem(TASKS, "text-muon", unreadable)
    assert command.main(["--list", "--runs", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "study: no source of the standard library lies there\n"
