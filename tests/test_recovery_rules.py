"""The decisions by which servers that have fallen behind reach the step of the others. Servers and workers are only
numbers here: a server is a step and the name of its center, and makes a round when all have pushed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_client.job.recovery import Goal, MakePush, Move, ServerView, common_step, decide, goes_on_after, is_behind
from modelaverage.errors import Reason, refusal
from modelaverage.purpose import Purpose

LONG_S = 5.0
ASKED = {"is_asked": True}


# Single decisions.


def test_a_server_that_has_not_been_asked_is_asked_unless_its_center_is_here() -> None:
    assert decide(ServerView(held=7), Goal(7), LONG_S) is Move.DONE
    assert decide(ServerView(held=7), Goal(8), LONG_S) is Move.ASK
    assert decide(ServerView(held=7, is_lost=True), Goal(7), LONG_S) is Move.ASK


def test_a_server_that_is_there_is_read_whatever_this_worker_holds() -> None:
    for held in (None, 6, 7):
        assert decide(ServerView(held, is_lost=True, step=7), Goal(7), LONG_S) is Move.PULL


def test_a_server_without_a_center_is_lost() -> None:
    assert decide(ServerView(held=7, is_lost=True, step=0, has_center=False), Goal(7), LONG_S) is Move.LOST


@pytest.mark.parametrize(
    ("view", "goal"),
    [
        (ServerView(6, step=6), Goal(7)),
        (ServerView(6, step=6, is_asked=True), Goal(7, may_push=False)),
        (ServerView(6, step=6, waited_s=LONG_S), Goal(7)),
    ],
)
def test_a_worker_that_is_not_asked_or_only_reads_waits(view: ServerView, goal: Goal) -> None:
    assert decide(view, goal, LONG_S) is Move.WAIT


def test_a_worker_that_has_waited_for_long_pushes_unasked() -> None:
    assert decide(ServerView(6, step=6, waited_s=LONG_S + 0.1), Goal(7), LONG_S) == MakePush(Purpose.ABSTAIN, 6)


def test_a_worker_that_has_the_lost_center_gives_it_back() -> None:
    assert decide(ServerView(7, is_lost=True, step=5, is_asked=True), Goal(7), LONG_S) == MakePush(Purpose.RESTORE, 6)


def test_a_worker_whose_center_is_gone_gives_what_it_made_of_it() -> None:
    view = ServerView(7, is_intact=False, is_lost=True, step=5, is_asked=True)
    assert decide(view, Goal(7, has_local=True), LONG_S) == MakePush(Purpose.CONTRIBUTE, 6)
    assert decide(view, Goal(7), LONG_S) == MakePush(Purpose.ABSTAIN, 6)


def test_a_worker_that_others_do_not_follow_makes_one_round_at_a_time_with_them() -> None:
    view = ServerView(7, is_lost=True, step=4, is_asked=True, is_alone=True)
    assert decide(view, Goal(7), LONG_S) == MakePush(Purpose.RESTORE, 4)


@pytest.mark.parametrize("reason", Reason)
def test_only_two_refusals_end_nothing(reason: Reason) -> None:
    news = {Reason.BASE_STEP_AHEAD, Reason.ROUND_FULL}
    assert goes_on_after(refusal(reason, "")) is (reason if reason in news else None)


# Whole jobs.


@dataclass
class Server:
    """One shard.

    Attributes:
        step: rounds completed.
        center: the name of its center: the step at which it was first made.
        pushes: by worker, what it pushes and the center that it gives back, if any.
    """

    step: int
    center: str
    pushes: dict[int, tuple[MakePush, str]] = field(default_factory=dict)

    def take(self, worker: int, push: MakePush, gives: str) -> None:
        self.pushes[worker] = push, gives

    def round(self, workers: int) -> tuple[dict[int, bool], bool]:
        """Whether each worker's push was refused as ahead; and whether the round was made."""
        if len(self.pushes) < workers:
            return {}, False
        steps = {push.base_step for push, _ in self.pushes.values()}
        if len(steps) > 1:
            ahead = [worker for worker, (push, _) in self.pushes.items() if push.base_step > min(steps)]
            for worker in ahead:
                del self.pushes[worker]
            return dict.fromkeys(ahead, True), False
        given_back = [gives for _, (push, gives) in sorted(self.pushes.items()) if push.purpose is Purpose.RESTORE]
        made = [gives for _, (push, gives) in sorted(self.pushes.items()) if push.purpose is Purpose.CONTRIBUTE]
        (base_step,) = steps
        self.step = base_step + 1
        self.center = given_back[0] if given_back else f"made of {made}" if made else self.center
        done = dict.fromkeys(self.pushes, False)
        self.pushes = {}
        return done, True


@dataclass
class Worker:
    """The center that one worker has of each server, and what it knows."""

    held: list[int]
    centers: list[str]
    intact: list[bool]
    views: dict[int, ServerView] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """How a job was left.

    Args:
        held: by worker and server, how many steps behind the latest its center is; that of one it has.
        intact: by worker and server, whether it still has the bytes.
        fallen: by server, how many steps it has lost.
    """

    held: list[list[int]]
    intact: list[list[bool]]
    fallen: list[int]


@st.composite
def starts(draw: st.DrawFn) -> Start:
    workers, servers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    held = [[draw(st.integers(0, 1)) for _ in range(servers)] for _ in range(workers)]
    intact = [[draw(st.integers(0, 3)) > 0 for _ in range(servers)] for _ in range(workers)]
    return Start(held, intact, [draw(st.integers(0, 3)) for _ in range(servers)])


LATEST = 20


def settled(start: Start, order: st.DataObject) -> tuple[list[Server], list[Worker]]:
    """Lets the workers decide, in any order, until all have the centers of one step; fails if that takes too long."""
    servers = [Server(LATEST - fallen, f"center {LATEST - fallen}") for fallen in start.fallen]
    workers = [
        Worker([LATEST - behind for behind in held], [f"center {LATEST - behind}" for behind in held], list(intact))
        for held, intact in zip(start.held, start.intact, strict=True)
    ]
    target = max(max(step for worker in workers for step in worker.held), max(server.step for server in servers))
    for _ in range(400):
        waiting = [
            (number, index)
            for number, worker in enumerate(workers)
            for index, server in enumerate(servers)
            if number not in server.pushes and not is_done(worker, server, index, target)
        ]
        if not waiting:
            assert not any(server.pushes for server in servers), "somebody waits for a push that nobody makes"
            return servers, workers
        number, index = waiting[order.draw(st.integers(0, len(waiting) - 1)) if len(waiting) > 1 else 0]
        move(workers, number, servers[index], index, target)
    raise AssertionError(f"they never come to one step: {servers}, {workers}")


def is_done(worker: Worker, server: Server, index: int, target: int) -> bool:
    return worker.held[index] >= target and server.step >= target


def move(workers: list[Worker], number: int, server: Server, index: int, target: int) -> None:
    """One decision of one worker at one server, carried out."""
    worker = workers[number]
    is_lost = is_behind(worker.held[index], server.step)
    view = worker.views.get(index) or ServerView(worker.held[index], worker.intact[index], is_lost)
    decided = decide(view, Goal(target), LONG_S)
    match decided:
        case Move.ASK:
            worker.views[index] = replace(view, step=server.step, is_asked=True)
        case Move.PULL:
            take_center(worker, server, index)
        case MakePush():
            assert decided.base_step >= server.step or view.step != server.step
            if decided.base_step < server.step:  # stale: it gets the center
                take_center(worker, server, index)
                return
            server.take(number, decided, worker.centers[index])
            told, is_made = server.round(len(workers))
            for other, is_ahead in told.items():
                if is_ahead:
                    before = workers[other].views[index]
                    workers[other].views[index] = replace(before, step=None, is_alone=True)
                elif is_made:
                    after_round(workers[other], server, index)
        case _:
            raise AssertionError(f"nobody else would do it: {decided}")


def after_round(worker: Worker, server: Server, index: int) -> None:
    view = worker.views[index]
    if is_behind(view.held, server.step):
        worker.views[index] = replace(view, step=None, is_lost=True, is_alone=False)
    else:
        take_center(worker, server, index)


def take_center(worker: Worker, server: Server, index: int) -> None:
    worker.held[index], worker.centers[index], worker.intact[index] = server.step, server.center, True
    worker.views.pop(index, None)


@settings(max_examples=300, deadline=None)
@given(starts(), st.data())
def test_all_servers_and_workers_come_to_one_step_and_one_center(start: Start, order: st.DataObject) -> None:
    servers, workers = settled(start, order)
    assert len({server.step for server in servers}) == 1
    for worker in workers:
        assert common_step(worker.held) is None
        assert worker.centers == [server.center for server in servers]


@settings(max_examples=300, deadline=None)
@given(starts(), st.data())
def test_a_center_that_somebody_still_has_is_not_lost(start: Start, order: st.DataObject) -> None:
    latest = [
        max(LATEST - start.fallen[index], *(LATEST - behind for behind in intact_at(start, index)), 0)
        for index in range(len(start.fallen))
    ]
    servers, _ = settled(start, order)
    assert [server.center for server in servers] == [f"center {step}" for step in latest]


def intact_at(start: Start, index: int) -> list[int]:
    """How many steps behind the latest the centers of a server are that workers still have."""
    places = zip(start.held, start.intact, strict=True)
    return [held[index] for held, intact in places if intact[index]]
