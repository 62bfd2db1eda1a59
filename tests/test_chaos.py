"""The room `chaos`: its faults are repeatable, its check finds every error that it is for, and a short run passes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chaos.__main__ import main
from chaos.coding import Coding
from chaos.faults import SQUEEZES, Fault, Kind, sequence
from chaos.limits import DescriptorLimit, Limit, ThreadLimit, limit_with_spare
from chaos.log import Push, Received, Values, WorkerLog, newest_checkpoint, read
from chaos.replay import replay
from chaos.seats import Seat
from modelaverage.codecs import CODECS
from modelaverage.manifest import Manifest, Variable
from modelaverage.outer import AVERAGE, OuterSGD

ROOT = Path(__file__).parents[1]
ROUNDS = 3
WORKERS = ["worker-0", "worker-1", "worker-2", "worker-3"]


# Faults.


def first_faults(seed: int, every_s: float = 1.0) -> list[Fault]:
    return list(itertools.islice(sequence(seed, ["server", *WORKERS], every_s), 200))


def test_the_same_seed_makes_the_same_faults_and_another_one_others() -> None:
    assert first_faults(7) == first_faults(7)
    assert first_faults(7) != first_faults(8)


def test_faults_come_at_the_given_interval() -> None:
    assert [fault.at_s for fault in first_faults(0, every_s=0.5)] == [0.5 * number for number in range(1, 201)]


def test_every_process_is_killed_and_stopped_and_a_stop_lasts_half_a_second_to_three() -> None:
    faults = first_faults(0)
    for process in ("server", *WORKERS):
        assert {fault.kind for fault in faults if fault.process == process} == {"kill", "stop"}
    assert all(0.5 <= fault.lasts_s <= 3.0 for fault in faults if fault.kind == "stop")
    assert all(fault.lasts_s == 0 for fault in faults if fault.kind == "kill")


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, "worker-0 kill, worker-0 kill, worker-0 kill, server kill, server kill, worker-1 kill"),
        (1, "server kill, server stop 1.74, worker-0 stop 1.45, server stop 0.57, worker-0 stop 2.41, server kill"),
        (2, "server stop 1.4, server kill, worker-0 stop 1.03, server kill, worker-0 kill, worker-1 kill"),
    ],
)
def test_without_squeezes_a_seed_makes_the_faults_that_it_always_made(seed: int, expected: str) -> None:
    faults = itertools.islice(sequence(seed, ["server", "worker-0", "worker-1"], 1.0), 6)
    said = (f"{fault.process} {fault.kind}" + (f" {fault.lasts_s}" if fault.lasts_s else "") for fault in faults)
    assert ", ".join(said) == expected


def test_squeezes_strike_their_process_and_leave_all_other_faults_as_they_are() -> None:
    faults = list(itertools.islice(sequence(3, ["server", *WORKERS], 1.0, squeezed="server"), 400))
    assert faults == list(itertools.islice(sequence(3, ["server", *WORKERS], 1.0, squeezed="server"), 400))
    squeezes = [fault for fault in faults if fault.kind in SQUEEZES]
    assert {fault.process for fault in squeezes} == {"server"}
    assert {(fault.kind, fault.spare, fault.at_start) for fault in squeezes} == set(
        itertools.product(SQUEEZES, range(4), (False, True))
    )
    assert all(0.5 <= fault.lasts_s <= 2.0 for fault in squeezes)
    others = {(fault.process, fault.kind) for fault in faults if fault.kind not in SQUEEZES}
    assert others == set(itertools.product(("server", *WORKERS), ("kill", "stop")))


# Limits.


@pytest.mark.parametrize(
    ("numbers", "spare", "limit"),
    [((0, 1, 2), 0, 3), ((0, 1, 2), 2, 5), ((0, 2, 5), 0, 1), ((0, 2, 5), 1, 3), ((0, 2, 5), 3, 6), ((), 0, 0)],
)
def test_a_limit_leaves_as_many_free_numbers_as_it_should(numbers: tuple[int, ...], spare: int, limit: int) -> None:
    assert limit_with_spare(numbers, spare) == limit
    assert limit - sum(number < limit for number in numbers) == spare


class Hungry:
    """A process that, when asked, takes as many descriptors or threads as it gets, at most ten, and returns them."""

    _CODE = """
import sys, threading
over = threading.Event()
def opened(): return open("/dev/null")
def started():
    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()
    return thread
for line in sys.stdin:
    got = []
    try:
        while len(got) < 10:
            got.append(opened() if line == "descriptors\\n" else started())
    except (OSError, RuntimeError):
        pass
    over.set()
    for each in got:
        each.close() if line == "descriptors\\n" else each.join()
    over.clear()
    print(len(got), flush=True)
"""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Hungry:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def gets(self, what: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        got = int(self.process.stdout.readline())
        deadline_s = time.monotonic() + 20
        while len(os.listdir(f"/proc/{self.process.pid}/task")) > 1:  # a thread that was joined ends a moment later
            assert time.monotonic() < deadline_s
        return got


def limit_on(kind: Kind) -> Limit:
    if kind == "descriptors":
        return DescriptorLimit()
    try:
        return ThreadLimit("test")
    except OSError as error:
        pytest.skip(f"no limit on threads here: {error}")


@pytest.mark.parametrize("kind", SQUEEZES)
def test_a_process_gets_no_more_than_it_has_and_is_spared_and_later_all_it_wants(kind: Kind) -> None:
    limit = limit_on(kind)
    with Hungry() as hungry:
        assert hungry.gets(kind) == 10
        for spare in (3, 0, 1):
            limit.tighten(hungry.process.pid, spare)
            assert hungry.gets(kind) == spare
        limit.loosen(hungry.process.pid)
        assert hungry.gets(kind) == 10
    limit.close()


# Seats.


class FakeProcess:
    """The part of a process that a seat needs."""

    pid = 1

    def __init__(self) -> None:
        self.exitcode: int | None = None


class FakeLimit:
    """A limit that records its calls in a list."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def tighten(self, _pid: int, spare: int) -> None:
        self.done.append(f"tightened to {spare}")

    def loosen(self, _pid: int) -> None:
        self.done.append("loosened")

    def close(self) -> None:
        self.done.append("closed")


class Seated:
    """A seat with processes that a test ends."""

    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.limit = FakeLimit()
        self.seat = Seat("server", self._start, finishes=False, limits={"threads": self.limit})

    def _start(self, _: int) -> Any:
        self.processes.append(FakeProcess())
        return self.processes[-1]

    def ends(self, code: int, now_s: float) -> None:
        self.processes[-1].exitcode = code
        self.seat.tend(now_s)


def test_a_squeeze_lasts_as_long_as_it_should() -> None:
    seated = Seated()
    squeeze = Fault(10.0, "server", "threads", 2.0, spare=1)
    seated.seat.strike(squeeze, 10.0)
    assert seated.seat.news() == [squeeze]
    seated.seat.tend(11.9)
    assert (seated.limit.done, seated.seat.is_squeezed(11.9)) == (["tightened to 1"], True)
    seated.seat.tend(12.0)
    assert (seated.limit.done, seated.seat.is_squeezed(12.1)) == (["tightened to 1", "loosened"], True)
    assert not seated.seat.is_squeezed(14.0)


def test_a_squeeze_at_the_start_strikes_the_next_process() -> None:
    seated = Seated()
    seated.seat.strike(Fault(10.0, "server", "threads", 2.0, spare=0, at_start=True), 10.0)
    seated.seat.tend(11.0)
    assert (seated.seat.news(), seated.limit.done) == ([], [])
    seated.ends(1, 12.0)
    seated.seat.tend(12.1)
    assert seated.limit.done == []
    seated.seat.tend(12.5)
    assert seated.limit.done == ["tightened to 0"]
    assert [fault.at_start for fault in seated.seat.news()] == [True]


def test_a_squeeze_without_its_limit_does_not_happen() -> None:
    seated = Seated()
    seated.seat.strike(Fault(10.0, "server", "descriptors", 2.0), 10.0)
    assert (seated.seat.news(), seated.limit.done) == ([], [])


def test_a_process_may_end_on_its_own_only_while_it_lacks_something() -> None:
    seated = Seated()
    seated.ends(1, 1.0)
    assert (len(seated.seat.deaths), len(seated.seat.squeezed_deaths)) == (1, 0)
    seated.seat.strike(Fault(2.0, "server", "threads", 1.0), 2.0)
    seated.ends(1, 2.5)
    assert (len(seated.seat.deaths), len(seated.seat.squeezed_deaths)) == (1, 1)
    seated.ends(1, 10.0)
    assert (len(seated.seat.deaths), len(seated.seat.squeezed_deaths)) == (2, 1)


# The check: a log of a strict server's workers, in which a test changes something.


def values(*key: int) -> Values:
    return np.random.default_rng(key).standard_normal(50).astype(np.float32)


def average(summands: list[Values]) -> Values:
    total: Values = np.sum(summands, axis=0, dtype=np.float32)
    total /= np.float32(len(summands))
    return total


class Story:
    """The log of a run, by default a correct one."""

    def __init__(self, workers: list[str]) -> None:
        self.workers = workers
        self.pushes = [
            Push(worker, 1, step + 1, step, values(number, step), "COMMITTED")
            for step in range(ROUNDS)
            for number, worker in enumerate(workers)
        ]
        self.received = [Received(worker, 1, 0.0, 0, values(99), None) for worker in workers]
        for step in range(ROUNDS):
            center = average([push.values for push in self.pushes_of(step)])
            self.received += [Received(w, 1, float(step + 1), step + 1, center, tuple(workers)) for w in workers]

    def pushes_of(self, step: int) -> list[Push]:
        return [push for push in self.pushes if push.base_step == step]

    def set_center(self, step: int, center: Values) -> None:
        self.received = [replace(r, values=center) if r.global_step == step else r for r in self.received]

    def add_second_push(self, step: int) -> Push:
        """The first worker was killed in the round of this base step, came back and pushed again."""
        first = self.pushes_of(step)[0]
        self.pushes[self.pushes.index(first)] = replace(first, told=None)
        second = Push(first.worker, 2, 1, step, values(1000, step), "ALREADY_COUNTED")
        self.pushes.append(second)
        return second

    def problems(self) -> list[str]:
        return replay(self.pushes, self.received, self.workers, ROUNDS).problems


def test_an_outer_optimizer_is_replayed_and_a_state_that_was_lost_is_found() -> None:
    outer, story = OuterSGD(0.7, 0.9, nesterov=True), Story(WORKERS[:2])
    center = values(99)
    state = outer.init(center)
    for step in range(ROUNDS):
        center, state = outer.update(center, average([push.values for push in story.pushes_of(step)]), state, step)
        story.set_center(step + 1, center)
    arguments = story.pushes, story.received, story.workers, ROUNDS
    found = replay(*arguments, outer)
    assert (found.problems, found.rounds_explained) == ([], ROUNDS)
    assert len(replay(*arguments).problems) == ROUNDS
    before = next(each.values for each in story.received if each.global_step == ROUNDS - 1)
    last = average([push.values for push in story.pushes_of(ROUNDS - 1)])
    story.set_center(ROUNDS, outer.update(before, last, outer.init(before), ROUNDS - 1)[0])
    (problem,) = replay(story.pushes, story.received, story.workers, ROUNDS, outer).problems
    assert f"round {ROUNDS}: none of 1 choices" in problem


def test_coded_pushes_are_replayed_and_one_wrong_bit_is_found() -> None:
    """Each worker's fragments come coded or raw, as a transport or a lost base makes them."""
    manifest = Manifest((Variable("a", "float32", (1100,)), Variable("z", "float32", (1500,))), 1024)
    coding, story = Coding(CODECS["int8"], manifest), Story(WORKERS[:3])
    chance = np.random.default_rng(0)
    story.received = [
        replace(each, values=chance.standard_normal(2600).astype(np.float32)) if each.global_step == 0 else each
        for each in story.received[:1]
    ]
    center = story.received[0].values
    for step in range(ROUNDS):
        given = list[Values]()
        for number, push in enumerate(story.pushes_of(step)):
            pushed = replace(push, values=center + np.float32(0.1) * chance.standard_normal(2600).astype(np.float32))
            story.pushes[story.pushes.index(push)] = pushed
            decoded = coding.through(pushed.values, center)
            assert 0 < np.abs(decoded - pushed.values).max() < 0.01
            raw_from = (0, 1100 + 436, 2600)[(number + step) % 3]  # where a fragment begins
            given.append(np.concatenate([decoded[:raw_from], pushed.values[raw_from:]]))
        center = coding.through(average(given), center)
        story.received += [Received(w, 1, step + 1.0, step + 1, center, tuple(story.workers)) for w in story.workers]
    arguments = story.workers, ROUNDS, AVERAGE, coding
    found = replay(story.pushes, story.received, *arguments)
    assert (found.problems, found.rounds_explained) == ([], ROUNDS)
    assert len(replay(story.pushes, story.received, *arguments[:2]).problems) == ROUNDS
    wrong = center.copy()
    wrong[2000:2001].view(np.uint32)[...] ^= 1
    story.set_center(ROUNDS, wrong)
    (problem,) = replay(story.pushes, story.received, *arguments).problems
    assert f"round {ROUNDS}: none of 1 choices" in problem


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--workers", "2", "--outer", "sgd:lr=0.5", "--compression", "int8"], "give --outer or --compression"),
        (["--compression", "zip"], "invalid choice: 'zip'"),
        (["--outer", "sgd:lr=0.5"], "give --workers 2"),
        (["--outer", "yogi"], "outer optimizer 'yogi' is not known here"),
    ],
)
def test_what_cannot_be_replayed_is_refused(flags: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert why in capsys.readouterr().err


@pytest.fixture(params=[2, 4])
def story(request: pytest.FixtureRequest) -> Story:
    return Story(WORKERS[: request.param])


def test_a_right_log_is_explained(story: Story) -> None:
    found = replay(story.pushes, story.received, story.workers, ROUNDS)
    assert found.problems == []
    assert (found.rounds_explained, found.rounds_with_a_choice, found.pushes_not_counted) == (ROUNDS, 0, 0)


def test_a_server_may_sum_in_any_order(story: Story) -> None:
    for order in itertools.permutations(story.pushes_of(1)):
        story.set_center(2, average([push.values for push in order]))
        assert story.problems() == []


def test_one_wrong_bit_is_found(story: Story) -> None:
    center = average([push.values for push in story.pushes_of(1)])
    center[17] = np.nextafter(center[17], np.float32(9), dtype=np.float32)
    center[18] = np.nextafter(center[18], np.float32(9), dtype=np.float32) * 2
    story.set_center(2, center)
    (problem,) = story.problems()
    assert problem.startswith("round 2: none of 1 choices of one push of each worker explains the center")


def test_a_push_that_counts_twice_is_found(story: Story) -> None:
    pushed = [push.values for push in story.pushes_of(1)]
    story.set_center(2, (np.sum(pushed, axis=0) + pushed[0]) / np.float32(len(pushed)))
    assert "none of 1 choices" in story.problems()[0]


def test_a_push_that_counts_in_the_next_round_again_is_found(story: Story) -> None:
    story.set_center(3, average([story.pushes_of(1)[0].values, *(push.values for push in story.pushes_of(2)[1:])]))
    assert "round 3: none of 1 choices" in story.problems()[0]


@pytest.mark.parametrize("counted", [0, 1])
def test_of_two_pushes_of_a_worker_either_may_count(story: Story, counted: int) -> None:
    two = story.pushes_of(1)[0], story.add_second_push(1)
    story.set_center(2, average([two[counted].values, *(push.values for push in story.pushes_of(1)[1:-1])]))
    found = replay(story.pushes, story.received, story.workers, ROUNDS)
    assert found.problems == []
    assert (found.rounds_explained, found.rounds_with_a_choice, found.pushes_not_counted) == (ROUNDS, 1, 1)


def test_a_mix_of_two_pushes_of_a_worker_is_found(story: Story) -> None:
    first, second = story.pushes_of(1)[0].values, story.add_second_push(1).values
    mixed = np.concatenate([first[:25], second[25:]])
    story.set_center(2, average([mixed, *(push.values for push in story.pushes_of(1)[1:-1])]))
    assert "none of 2 choices" in story.problems()[0]


def test_two_pushes_of_a_worker_that_both_count_are_found(story: Story) -> None:
    story.add_second_push(1)
    story.set_center(2, average([push.values for push in story.pushes_of(1)]))
    assert "none of 2 choices" in story.problems()[0]


def test_a_push_that_was_told_to_be_committed_has_to_be_the_one_that_counts(story: Story) -> None:
    second = story.add_second_push(1)
    story.pushes[-1] = replace(second, told="COMMITTED")
    assert story.problems() == ["round 2: worker-0 was told that a push was committed, but another one counted"]


def test_a_push_that_was_told_to_be_stale_must_not_count(story: Story) -> None:
    first = story.pushes_of(1)[0]
    story.pushes[story.pushes.index(first)] = replace(first, told="STALE")
    assert story.problems() == ["round 2: worker-0 was told that a push was stale, but it counted"]


@pytest.mark.parametrize("missing", range(1, ROUNDS + 1))
def test_a_missing_round_is_found(story: Story, missing: int) -> None:
    story.received = [received for received in story.received if received.global_step != missing]
    assert f"round {missing}: nobody received its center" in story.problems()


def test_a_missing_push_is_found(story: Story) -> None:
    story.pushes.remove(story.pushes_of(0)[1])
    assert story.problems() == ["round 1: it has a center, but no push of worker-1 was logged"]


def test_two_centers_of_one_round_are_found(story: Story) -> None:
    story.received[-1] = replace(story.received[-1], values=values(5))
    assert story.problems() == [f"round {ROUNDS}: workers received 2 different centers"]


def test_workers_that_begin_with_different_centers_are_found(story: Story) -> None:
    story.received[0] = replace(story.received[0], values=values(5))
    assert story.problems() == ["not every worker began with the same center"]


@pytest.mark.parametrize("contributors", [("worker-0",), ("worker-0", "worker-0", "worker-1", "worker-2"), ()])
def test_a_round_without_all_workers_is_found(story: Story, contributors: tuple[str, ...]) -> None:
    story.received[-1] = replace(story.received[-1], contributors=contributors)
    assert story.problems() == [f"round {ROUNDS}: its contributors are {', '.join(contributors)}"]


def test_a_round_too_many_is_found(story: Story) -> None:
    story.received.append(Received("worker-0", 1, 9.0, ROUNDS + 1, values(5), tuple(story.workers)))
    assert story.problems() == [f"round {ROUNDS + 1}: only {ROUNDS} were planned"]


# The log.


def test_the_log_gives_back_what_was_written_but_for_a_line_that_is_not_whole(tmp_path: Path) -> None:
    log = WorkerLog(tmp_path, "worker-0", 3)
    log.pulled(0, values(0))
    log.pushing(1, 0, values(1))
    log.answered(1, "COMMITTED", 1, ("worker-0", "worker-1"), values(2))
    log.pushing(2, 1, values(3))
    with (tmp_path / "events" / "worker-0.3.jsonl").open("a") as events:
        events.write('{"worker": "worker-0", "kind": "to')
    found = read(tmp_path)
    assert [(p.worker, p.process, p.number, p.base_step, p.told) for p in found.pushes] == [
        ("worker-0", 3, 1, 0, "COMMITTED"),
        ("worker-0", 3, 2, 1, None),
    ]
    assert [(r.global_step, r.contributors) for r in found.received] == [(0, None), (1, ("worker-0", "worker-1"))]
    arrays = [*(p.values for p in found.pushes), *(r.values for r in found.received)]
    assert [a.tobytes() for a in arrays] == [values(key).tobytes() for key in (1, 3, 0, 2)]


def test_the_newest_checkpoint_is_the_one_of_the_largest_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == -1
    for name in (f"center-{7:020d}.5f3a9c1b.safetensors", f"center-{12:020d}.fresh.safetensors", "center-99.tmp"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path) == 12


# A run.


@pytest.mark.long
@pytest.mark.parametrize(
    ("rounds", "faults_every_s", "flags"), [(10, 3.0, []), (30, 0.6, []), (30, 0.6, ["--compression", "int4"])]
)
def test_a_short_run_loses_nothing(rounds: int, faults_every_s: float, flags: list[str], tmp_path: Path) -> None:
    """The accuracy is not checked: in such a short run it means nothing."""
    report = tmp_path / "chaos.json"
    command = ["-m", "chaos", "--workers", "2", "--rounds", str(rounds), "--seed", "90"]
    command += ["--faults-every-s", str(faults_every_s)]
    command += ["--accuracy-points", "100", "--json", str(report), *flags]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "nothing was lost, nothing counted twice" in done.stdout
    found = json.loads(report.read_text())
    assert (found["global_step"], found["rounds_explained"], found["problems"]) == (rounds, rounds, [])
    assert found["faults"] or rounds < 30, "a few rounds may be over before the first fault"
    assert report.with_suffix(".png").stat().st_size > 10_000
