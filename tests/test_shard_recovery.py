"""Rounds over several servers; servers and workers end, forget and come back. Nothing hangs, nothing is averaged twice,
and all servers reach one step. Real servers and sessions in one process."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from ma_client import Outcome, ParameterServerSession, PushResult
from ma_client.job.all_servers import AllServers
from ma_client.job.one_server import OneServer, WorkerIdentity
from ma_client.transports.timing import Timing
from modelaverage.access.channels import Access
from modelaverage.access.security import Security
from modelaverage.errors import ConflictError, DeadlineExceededError, ModelAverageError
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.flow import job as server_job
from ps_server.rules.policy import RoundPolicy
from tests.long_plays import long_except
from tests.raw_client import RawClient, fragments_of, push_header
from tests.shard_faults import FIRST_STEP, HANG_S, FaultyJob, Seat, answer_but_the_silent, soon

STRICT = RoundPolicy.strict(2)
MakeJob = Callable[..., FaultyJob]


@pytest.fixture(autouse=True)
def servers_can_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers can be silent."""
    monkeypatch.setattr(server_job, "tell", answer_but_the_silent)


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[MakeJob]:
    with contextlib.ExitStack() as jobs:
        yield lambda *arguments, **options: jobs.enter_context(FaultyJob(tmp_path, *arguments, **options))


# Every state in which a failure can leave a round.


@dataclass(frozen=True)
class State:
    """How far a round from step 11 had come before processes ended.

    Args:
        answered: pairs of worker and shard: from this shard the worker heard of the commit, and has its center 12.
        restored: by shard, from which checkpoint it came back; None: it never ended.
        replaced: the workers whose process ended.
        num_workers: how many there are.
        shared: whether bytes went by shared memory.
    """

    answered: frozenset[tuple[int, int]]
    restored: tuple[int | None, ...]
    replaced: frozenset[int]
    num_workers: int = 2
    shared: bool = False

    @property
    def places(self) -> list[tuple[int, int]]:
        """All workers at all shards."""
        return list(itertools.product(range(self.num_workers), range(len(self.restored))))

    @property
    def is_possible(self) -> bool:
        """Whether some workers have no answer yet, and all of these will get one when they ask again."""
        return len(self.answered) < len(self.places) and all(
            place in self.answered or self.restored[place[1]] is not None or place[0] in self.replaced
            for place in self.places
        )

    def still_held(self, shard: int) -> bool:
        """Whether a living worker has the shard's center 12."""
        return any(at == shard and worker not in self.replaced for worker, at in self.answered)


def states(num_workers: int, num_shards: int, shared: bool = False) -> Iterator[State]:
    """All possible states."""
    places = list(itertools.product(range(num_workers), range(num_shards)))
    steps = (None, FIRST_STEP + 2, FIRST_STEP + 1, FIRST_STEP)
    for answered in subsets(places):
        for restored in itertools.product(steps, repeat=num_shards):
            for replaced in subsets(range(num_workers)):
                state = State(frozenset(answered), restored, frozenset(replaced), num_workers, shared)
                if state.is_possible:
                    yield state


def some_states(seed: int, count: int) -> list[State]:
    """This many random states, of jobs with two or three workers and shards."""
    chance = random.Random(seed)
    found = list[State]()
    while len(found) < count:
        num_workers, num_shards = chance.choice([(2, 2), (2, 3), (3, 2), (3, 3)])
        places = itertools.product(range(num_workers), range(num_shards))
        state = State(
            frozenset(place for place in places if chance.random() < 0.5),
            tuple(chance.choice((None, FIRST_STEP + 2, FIRST_STEP + 1, FIRST_STEP)) for _ in range(num_shards)),
            frozenset(worker for worker in range(num_workers) if chance.random() < 0.35),
            num_workers,
            chance.random() < 0.5,
        )
        found += [state] if state.is_possible else []
    return found


def subsets(of: Collection[Any]) -> Iterator[tuple[Any, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(of, size) for size in range(len(of) + 1))


def recover(job: FaultyJob, state: State) -> None:
    """Brings a job into a state, and checks that it recovers."""
    for seat in job.seats:
        seat.goes_to = FIRST_STEP + 1
    job.begin()
    assert soon(lambda: all(len(seat.rounds) == 1 for seat in job.seats)), job.picture()
    for index, shard in enumerate(job.shards):
        shard.silent |= {f"worker-{worker}" for worker, at in state.places if at == index} - {
            f"worker-{worker}" for worker, at in state.answered if at == index
        }
    for seat in job.seats:
        seat.goes_to = FIRST_STEP + 1000
    assert soon(lambda: is_reached(job, state)), job.picture()
    for worker in state.replaced:
        job.seats[worker].abandon()
    ended = [(shard, step) for shard, step in zip(job.shards, state.restored, strict=True) if step is not None]
    for shard, _ in ended:
        shard.stop()
    for shard, step in ended:
        shard.start(step)
    for shard in job.shards:
        shard.silent.clear()
    for worker in state.replaced:
        job.seats[worker].begin()
    until = job.end(rounds=3)
    job.check_means(since=until - 2)
    means = sum(job.given(w, FIRST_STEP) + job.given(w, FIRST_STEP + 1) for w in range(state.num_workers))
    for index in filter(state.still_held, range(len(job.shards))):
        after = [one.after[index] for seat in job.seats for one in seat.rounds if one.base_step == FIRST_STEP + 1]
        assert after == pytest.approx([means / state.num_workers] * len(after), abs=1e-4), (index, state)


def is_reached(job: FaultyJob, state: State) -> bool:
    """Whether the round has committed, workers that heard of it on all shards push again, and nothing else is left to
    do."""
    if [shard.status.global_step for shard in job.shards] != [FIRST_STEP + 2] * len(job.shards):
        return False
    for worker, seat in enumerate(job.seats):
        heard = [(worker, shard) in state.answered for shard in range(len(job.shards))]
        if all(heard) and not all(seat.worker_id in shard.whole for shard in job.shards):
            return False
        if any(step != FIRST_STEP + 2 for step, has_heard in zip(seat.steps, heard, strict=True) if has_heard):
            return False
    return True


STATES = some_states(seed=0, count=12)


@pytest.mark.parametrize("state", long_except(STATES[:4], STATES), ids=str)
def test_a_job_comes_out_of_whatever_state_it_was_left_in(state: State, make_job: MakeJob) -> None:
    policy = RoundPolicy.strict(state.num_workers)
    recover(make_job(len(state.restored), policy, shared=state.shared, copy=False), state)


@pytest.mark.slow
def test_a_job_of_two_comes_out_of_every_state(tmp_path: Path) -> None:
    for number, state in enumerate(states(num_workers=2, num_shards=2)):
        (tmp_path / str(number)).mkdir()
        with FaultyJob(tmp_path / str(number), 2, STRICT) as job:
            recover(job, state)


@pytest.mark.slow
def test_larger_jobs_come_out_of_hundreds_of_states(tmp_path: Path) -> None:
    for number, state in enumerate(some_states(seed=1, count=300)):
        (tmp_path / str(number)).mkdir()
        policy = RoundPolicy.strict(state.num_workers)
        with FaultyJob(tmp_path / str(number), len(state.restored), policy, shared=state.shared, copy=False) as job:
            recover(job, state)


# Plays: faults at random, of servers and workers at once, within rounds and between them.


@dataclass(frozen=True)
class Play:
    """What may happen in a play.

    Args:
        seed: of all random choices.
        forgets: servers write checkpoints after 1 to 3 rounds, and come back from one of the last four.
        quorum: rounds go on without the late.
        faults: how often something happens.
    """

    seed: int
    forgets: bool = False
    quorum: bool = False
    faults: int = 8


def perform(play: Play, directory: Path) -> None:
    chance = random.Random(play.seed)
    num_shards, num_workers = chance.choice((2, 3)), chance.choice((2, 3))
    every_rounds = [chance.choice((1, 2, 3)) if play.forgets else 1 for _ in range(num_shards)]
    policy = RoundPolicy.strict(num_workers)
    if play.quorum:
        policy = RoundPolicy(num_workers, chance.randint(1, num_workers - 1), num_workers, chance.choice((0.05, 0.3)))
    with FaultyJob(directory, num_shards, policy, every_rounds, shared=chance.random() < 0.5) as job:
        job.begin()
        assert soon(lambda: job.pushed_from > FIRST_STEP), job.picture()
        for _ in range(play.faults):
            go_on(job, chance)
            cause_faults(job, play, chance)
        until = job.end(rounds=4)
        if not play.quorum:
            job.check_means(since=until - 3)
        if not play.quorum and not play.forgets:
            job.check_explained()


def go_on(job: FaultyJob, chance: random.Random) -> None:
    """Waits for some rounds and a random moment of the next, or for a while if no round is made."""
    enough = job.pushed_from + chance.randint(0, 2)
    soon(lambda: job.pushed_from >= enough, timeout_s=0.5)
    time.sleep(chance.choice((0.0, 0.001, 0.003, 0.01, 0.03)))  # the moment of the fault


def cause_faults(job: FaultyJob, play: Play, chance: random.Random) -> None:
    """Ends some servers and workers and delays some workers; brings all back, in any order."""
    faults = list[tuple[Callable[[], None], Callable[[], None]]]()
    for shard in job.shards:
        if chance.random() < 0.5:
            back = chance.choice((1, 1, 2, 3, 4)) if play.forgets else 1
            faults.append((shard.stop, lambda shard=shard, back=back: shard.start(shard.kept[-back:][0])))  # type: ignore[misc]
    for seat in job.seats:
        fate = chance.random()
        if fate < 0.3:
            faults.append((seat.abandon, seat.begin))
        elif fate < 0.4:
            faults.append((lambda seat=seat: hold(seat, 0), lambda seat=seat: hold(seat, 1_000_000)))  # type: ignore[misc]
    chance.shuffle(faults)
    for cause, _ in faults:
        cause()
    chance.shuffle(faults)
    for _, undo in faults:
        time.sleep(chance.choice((0.0, 0.0, 0.005, 0.05, 0.2)))  # how long the server is away
        undo()


def hold(seat: Seat, step: int) -> None:
    seat.goes_to = step


@pytest.mark.parametrize("seed", long_except([0], range(2)))
def test_no_round_is_lost_and_none_is_counted_twice(seed: int, tmp_path: Path) -> None:
    perform(Play(seed, faults=6), tmp_path)


@pytest.mark.parametrize("seed", long_except([1], range(2)))
def test_servers_that_forget_rounds_come_to_one_step_with_the_others(seed: int, tmp_path: Path) -> None:
    perform(Play(seed, forgets=True, faults=6), tmp_path)


@pytest.mark.parametrize("forgets", long_except([False], [False, True]))
def test_rounds_with_a_quorum_go_on_whatever_ends(forgets: bool, tmp_path: Path) -> None:
    perform(Play(0, forgets, quorum=True, faults=6), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quorum", [False, True])
@pytest.mark.parametrize("forgets", [False, True])
def test_twenty_long_plays_end_well(forgets: bool, quorum: bool, tmp_path: Path) -> None:
    for seed in range(100, 120):
        (tmp_path / str(seed)).mkdir()
        perform(Play(seed, forgets, quorum, faults=12), tmp_path / str(seed))


# Single cases.


def joined(job: FaultyJob, count: int) -> list[ParameterServerSession]:
    """This many workers that have the center."""
    sessions = [job.session(f"worker-{number}") for number in range(count)]
    sessions[0].initialize(job.start_values(), global_step=FIRST_STEP)
    for session in sessions:
        session.pull(timeout_s=HANG_S)
    return sessions


def of(job: FaultyJob, *values: float) -> dict[str, NDArray[Any]]:
    """A model with one number for each shard."""
    return {name: array + value for (name, array), value in zip(job.start_values().items(), values, strict=True)}


def pushed(
    sessions: Sequence[ParameterServerSession], models: Sequence[Mapping[str, NDArray[Any]]], **options: Any
) -> list[PushResult]:
    """A round."""
    with ThreadPoolExecutor(len(sessions)) as threads:
        calls = [threads.submit(s.push_and_average, m, **options) for s, m in zip(sessions, models, strict=True)]
        return [call.result(HANG_S) for call in calls]


def firsts(center: Mapping[str, NDArray[Any]]) -> list[float]:
    """By shard, the first element."""
    return [float(array[0]) for array in center.values()]


def whole(job: FaultyJob, shards: Sequence[int], *workers: str) -> bool:
    """Whether these pushes become whole on these shards in time."""
    return soon(lambda: all(set(workers) <= job.shards[index].whole for index in shards))


def made_uneven(job: FaultyJob) -> None:
    """The last shard loses a round."""
    job.shards[-1].stop()
    job.shards[-1].start(job.shards[-1].kept[-2])


def test_a_center_that_came_by_catching_up_is_the_callers_own(make_job: MakeJob) -> None:
    job = make_job(2, STRICT, shared=True)
    pushed(joined(job, 2), [of(job, 2, 2), of(job, 4, 4)])
    made_uneven(job)
    again = [job.session(f"worker-{number}") for number in range(2)]
    with ThreadPoolExecutor(2) as threads:
        centers = [
            call.result(HANG_S)[0] for call in [threads.submit(session.pull, timeout_s=HANG_S) for session in again]
        ]
    assert [firsts(center) for center in centers] == [[3, 0], [3, 0]]
    for turn in range(2):
        pushed(again, [of(job, 7, turn), of(job, 8, turn)])
    assert [firsts(center) for center in centers] == [[3, 0], [3, 0]]


def test_a_reader_waits_for_workers_to_bring_a_shard_up(make_job: MakeJob) -> None:
    job = make_job(2, STRICT)
    sessions = joined(job, 2)
    pushed(sessions, [of(job, 2, 2), of(job, 4, 4)])
    made_uneven(job)
    reader = job.session("reader")
    with pytest.raises(DeadlineExceededError, match="waited"):
        reader.pull(catch_up=False, timeout_s=0.2)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(reader.pull, catch_up=False, timeout_s=HANG_S)
        results = pushed(sessions, [of(job, 6, 6), of(job, 8, 8)])
        center, step = reading.result(HANG_S)
    assert firsts(results[0].center) == [7, 7]
    assert step == results[0].global_step == FIRST_STEP + 2
    assert firsts(center) == [7, 7]
    assert all(result.contributors == ("worker-0", "worker-1") for result in results)


class Impatient(ParameterServerSession):
    """Pushes soon, whether asked or not."""

    _timing = Timing(fall_back_interval_s=0.1, long_wait_s=0.2)


def test_a_shard_that_takes_a_reader_for_the_missing_worker_is_brought_up(make_job: MakeJob) -> None:
    job = make_job(2, STRICT, session_class=Impatient)
    ahead, behind = joined(job, 2)
    pushed([ahead, behind], [of(job, 2, 2), of(job, 4, 4)])
    job.shards[1].silent.add("worker-1")
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(behind.push_and_average, of(job, 6, 6))
        ahead.push_and_average(of(job, 8, 8))
        assert soon(lambda: behind._servers.steps == [FIRST_STEP + 2, FIRST_STEP + 1])
        made_uneven(job)
        with RawClient(job.shards[1].address) as reader:
            reader.pull()  # the only name that the shard knows, apart from the waiting worker's
        assert whole(job, [1], "worker-1")
        next_round = threads.submit(ahead.push_and_average, of(job, 1, 1))
        assert late.result(HANG_S).global_step == FIRST_STEP + 2
        behind.push_and_average(of(job, 3, 3))
        assert firsts(next_round.result(HANG_S).center) == [2, 2]


def test_a_center_that_is_lost_while_a_worker_has_it_and_waits_for_another_shard_is_given_back_as_it_was(
    make_job: MakeJob,
) -> None:
    job = make_job(2, STRICT)
    one, other = joined(job, 2)
    pushed([one, other], [of(job, 2, 2), of(job, 4, 4)])
    job.shards[1].silent.add("worker-1")
    may_arrive = threading.Event()
    hold_push(other, 0, may_arrive)
    with ThreadPoolExecutor(2) as threads:
        calls = [
            threads.submit(one.push_and_average, of(job, 5, 5)),
            threads.submit(other.push_and_average, of(job, 8, 8)),
        ]
        assert soon(lambda: one._servers.steps == [FIRST_STEP + 1, FIRST_STEP + 2])
        made_uneven(job)
        assert soon(lambda: job.shards[1].status.global_step == FIRST_STEP + 2), job.picture()
        may_arrive.set()
        for call in calls:
            # Pushed again, the 8 would count twice if the center did not outweigh it.
            assert firsts(call.result(HANG_S).center) == pytest.approx([6.5, 6.5], rel=1e-7)


def test_variables_are_not_untouched_from_a_center_that_is_lost(make_job: MakeJob) -> None:
    job = make_job(2, STRICT)
    ahead, behind = joined(job, 2)
    pushed([ahead, behind], [of(job, 2, 2), of(job, 4, 4)])
    job.shards[1].silent.add("worker-1")
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(behind.push_and_average, of(job, 6, 3), untouched={"v1"})
        assert firsts(ahead.push_and_average(of(job, 8, 9)).center) == [7, 6]
        made_uneven(job)
        following = threads.submit(ahead.push_and_average, of(job, 8, 6), untouched={"v1"})
        # The first worker knows more of v1 than the shard has kept.
        assert firsts(late.result(HANG_S).center)[1] != 3
        behind.push_and_average(of(job, 6, 6))
        assert following.result(HANG_S).outcome is Outcome.COMMITTED


class Hasty(ParameterServerSession):
    """Pushes at once, whether asked or not."""

    _timing = Timing(long_wait_s=0.0)


def test_a_worker_that_finds_a_round_full_waits_for_its_end(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, push = threading.Event(), OneServer.push

    def refusable(*arguments: Any) -> pb.PushOutcome:
        try:
            return push(*arguments)
        except ConflictError:
            refused.set()
            raise

    monkeypatch.setattr(OneServer, "push", refusable)
    job = make_job(2, STRICT, session_class=Hasty)
    pushed(joined(job, 2), [of(job, 2, 2), of(job, 4, 4)])
    made_uneven(job)
    with RawClient(job.shards[1].address) as client, ThreadPoolExecutor(1) as thread:
        manifest_id = client.status().manifest_id
        streams = [client.open_push() for _ in range(2)]
        for number, stream in enumerate(streams):
            stream.send(push_header(manifest_id, f"worker-{number}", base_step=FIRST_STEP))
            stream.admission()
        pulling = thread.submit(job.session("reader").pull, timeout_s=HANG_S)
        assert refused.wait(HANG_S)
        for stream in streams:
            stream.give(fragments_of({"v1": job.start_values()["v1"]}))
            stream.half_close()
        assert pulling.result(HANG_S)[1] == FIRST_STEP + 1


def test_a_reader_gets_a_whole_center_while_rounds_go_on(make_job: MakeJob) -> None:
    job = make_job(4, STRICT, every_rounds=[1000] * 4)
    job.begin()
    reader = job.session("reader")
    for _ in range(10):
        center, _ = reader.pull(catch_up=False, timeout_s=HANG_S)
        assert len(set(firsts(center))) == 1
    job.end(rounds=1)


def test_shards_that_run_on_while_they_are_read_are_read_all_at_once() -> None:
    worker = WorkerIdentity("reader", bytes(16), is_chief=False)
    servers = AllServers(["127.0.0.1:1", "127.0.0.1:2"], worker, 0.0, Access(Security()))
    first, second = servers

    def pull_of(server: OneServer, *steps: int) -> Callable[..., None]:
        following = iter(steps)

        def pull(*_: object, will_train: bool = False) -> None:
            assert not will_train
            server.step = next(following)

        return pull

    # Whenever one of them is read alone, it has come to a later step than the other.
    first.pull = pull_of(first, 1, 3, 10)  # type: ignore[method-assign]
    second.pull = pull_of(second, 2, 10)  # type: ignore[method-assign]

    def status(_: Deadline) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(phase=pb.PHASE_IDLE, global_step=3)

    first.status = status  # type: ignore[assignment, method-assign]
    servers.pull(wait_initialized=False, may_push=False, deadline=Deadline(HANG_S))
    assert servers.steps == [10, 10]
    for one in servers:
        one.connection.close()


def test_with_a_quorum_a_worker_that_is_late_on_one_shard_is_stale_and_goes_on_with_the_others(
    make_job: MakeJob,
) -> None:
    job = make_job(2, RoundPolicy(2, 1, 2, grace_s=0.3))
    late, other = joined(job, 2)
    pushed([late, other], [of(job, 2, 2), of(job, 4, 4)])
    may_arrive = threading.Event()
    hold_push(late, 1, may_arrive)
    with ThreadPoolExecutor(1) as thread:
        pushing = thread.submit(late.push_and_average, of(job, 5, 5))
        assert whole(job, [0], "worker-0")
        alone = other.push_and_average(of(job, 7, 7))
        assert (alone.outcome, alone.contributors, firsts(alone.center)) == (Outcome.COMMITTED, ("worker-1",), [6, 7])
        may_arrive.set()
        stale = pushing.result(HANG_S)
    assert (stale.outcome, stale.global_step, firsts(stale.center)) == (Outcome.STALE, alone.global_step, [6, 7])
    for result in pushed([late, other], [of(job, 2, 2), of(job, 4, 4)]):
        assert (result.outcome, result.global_step) == (Outcome.COMMITTED, alone.global_step + 1)
        assert firsts(result.center) == [3, 3]


def test_with_a_quorum_a_worker_that_is_late_by_rounds_on_one_shard_comes_to_the_common_step(make_job: MakeJob) -> None:
    job = make_job(2, RoundPolicy(2, 1, 2, grace_s=0.1))
    late, other = joined(job, 2)
    pushed([late, other], [of(job, 2, 2), of(job, 4, 4)])
    may_arrive = threading.Event()
    hold_push(late, 1, may_arrive)
    with ThreadPoolExecutor(1) as thread:
        pushing = thread.submit(late.push_and_average, of(job, 5, 5))
        assert whole(job, [0], "worker-0")
        for value in (7, 8, 9):
            alone = other.push_and_average(of(job, value, value))
        may_arrive.set()
        stale = pushing.result(HANG_S)
    assert (stale.outcome, stale.global_step) == (Outcome.STALE, alone.global_step)
    assert firsts(stale.center) == [9, 9]


def hold_push(session: ParameterServerSession, index: int, until: threading.Event) -> None:
    """The session's next push to this shard leaves when the event is set."""
    shard = list(session._servers)[index].connection
    push = shard.push_and_average

    def late(*arguments: Any) -> Any:
        assert until.wait(HANG_S)
        return push(*arguments)

    shard.push_and_average = late  # type: ignore[assignment, method-assign]


def test_a_closed_session_may_be_closed_again_and_says_so_when_it_is_used(make_job: MakeJob) -> None:
    (session,) = joined(make_job(2, RoundPolicy.strict(1)), 1)
    session.close()
    session.close()
    with pytest.raises(ModelAverageError, match="closed"):
        session.pull()


def test_a_push_that_is_sent_away_as_it_is_admitted_hears_of_it(make_job: MakeJob) -> None:
    job = make_job(1, STRICT)
    joined(job, 2)
    with RawClient(job.shards[0].address) as ahead, RawClient(job.shards[0].address) as behind:
        manifest_id = ahead.status().manifest_id
        for push_id in range(1, 51):
            both = ahead.open_push(), behind.open_push()
            both[0].send(push_header(manifest_id, "worker-0", base_step=FIRST_STEP + 2, push_id=push_id))
            both[1].send(push_header(manifest_id, "worker-1", base_step=FIRST_STEP + 1, push_id=push_id))
            assert both[0].refusal().reason == "BASE_STEP_AHEAD"
            both[1].cancel()
            assert soon(lambda: job.shards[0].status.phase == pb.PHASE_IDLE)
