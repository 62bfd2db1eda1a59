"""A job on several parameter servers in this process; servers and workers end, forget and come back.

A worker pushes the center plus one number for all elements, which identifies worker and base step; every server has one
variable. So a torn variable shows as one whose elements differ, and a center shows whose pushes are in it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ma_client import Outcome, ParameterServerSession
from ma_client.transports.timing import Timing
from modelaverage.errors import ModelAverageError
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.flow import outcomes
from ps_server.flow.service import ServicePolicy
from ps_server.rules.policy import RoundPolicy
from ps_server.server import ServerConfig, serve
from tests.ports import lasting_port
from tests.raw_client import RawClient

__all__ = ["FIRST_STEP", "HANG_S", "FaultyJob", "FaultyShard", "Round", "Seat", "answer_but_the_silent", "soon"]

_T = TypeVar("_T")
# Anything that takes longer hangs.
HANG_S = 30.0
FIRST_STEP = 10
_ELEMENTS, _FRAGMENT_SIZE_BYTES = 40, 64  # 5 fragments a variable
# A push with the least weight moves an average by a billionth of what the others give.
_ROUNDING = 1e-3


def soon(condition: Callable[[], bool], timeout_s: float = HANG_S) -> bool:
    """Whether the condition holds within this time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(0.002)
    return True


class _Loop:
    """One event loop on a thread for all servers: gRPC loses events when one of several loops is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(HANG_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG_S)
        self._loop.close()


class FaultyShard:
    """A parameter server on one port, whose checkpoints may be lost.

    Args:
        loop: the loop that it runs on.
        directory: for its checkpoints; all of them are kept.
        policy: whom its rounds wait for.
        every_rounds: how often it writes one.
        shared: whether it offers shared memory.

    Attributes:
        silent: ids of workers that it does not tell about its commits, until it ends.
    """

    def __init__(self, loop: _Loop, directory: Path, policy: RoundPolicy, every_rounds: int, shared: bool) -> None:
        self.silent = set[str]()
        self.address = f"127.0.0.1:{lasting_port()}"
        self._loop, self._directory = loop, directory
        checkpoints = CheckpointPolicy(directory, every_rounds, keep=1_000_000)
        self._policy = ServicePolicy(policy, 1 << 30, 30.0, 0 if shared else math.inf, checkpoints)
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self.start()

    @property
    def status(self) -> pb.GetStatusResponse:
        """The server's status."""
        with RawClient(self.address) as client:
            return client.status()

    @property
    def whole(self) -> set[str]:
        """The workers whose push in the current round is whole."""
        return {worker.worker_id for worker in self.status.workers if worker.waiting}

    @property
    def kept(self) -> list[int]:
        """The steps of its checkpoints, ascending."""
        return sorted({_step_of(path) for path in self._files()})

    def start(self, at_most: int | None = None) -> None:
        """Starts from its newest checkpoint, or from the newest up to ``at_most``; later ones are lost."""
        for path in self._files():
            if at_most is not None and _step_of(path) > at_most:
                path.unlink()
        self._loop.run(self._begin())

    def stop(self) -> None:
        """Ends at once: waiting calls fail, and new ones find no server."""
        self._loop.run(self._end())
        self.silent.clear()

    def _files(self) -> Sequence[Path]:
        return list(self._directory.glob("center-*.safetensors"))

    async def _begin(self) -> None:
        listening = asyncio.get_running_loop().create_future()
        self._stop.clear()
        _this_shard.set(self)
        config = ServerConfig((self.address,), self._policy, stop_timeout_s=0.0)
        self._serving = asyncio.ensure_future(serve(config, self._stop, listening.set_result))
        await asyncio.wait((self._serving, listening), return_when=asyncio.FIRST_COMPLETED)
        if self._serving.done():
            self._serving.result()
        self.address = listening.result()[0]

    async def _end(self) -> None:
        self._stop.set()
        if self._serving is not None:
            await self._serving


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split(".")[0].removeprefix("center-"))


# The server that this task belongs to.
_this_shard: ContextVar[FaultyShard] = ContextVar("_this_shard")
_tell = outcomes.tell


def answer_but_the_silent(outcomes: Mapping[Any, pb.PushOutcome], held: list[Any], sending: Any) -> None:
    """Replaces the server's function that answers the workers whose round has committed."""
    silent = _this_shard.get().silent
    _tell({part: outcome for part, outcome in outcomes.items() if part.worker_id not in silent}, held, sending)


@dataclass(frozen=True)
class Round:
    """What a worker heard of a round.

    Args:
        life: how often the worker had been abandoned before.
        base_step: the step that it pushed from.
        global_step: the step that it reached.
        before: by shard, the center that it trained from.
        after: by shard, the center that it got.
        outcome: how its push ended.
        contributors: whose pushes are in the average on all shards.
    """

    life: int
    base_step: int
    global_step: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    outcome: Outcome
    contributors: tuple[str, ...]


class Seat:
    """One worker of a job: a thread with a session, which is replaced after it was abandoned.

    Attributes:
        at: the step of the center that it has.
        center: by shard, that center.
        goes_to: the step from which on it holds back its pushes.
        rounds: all rounds that it has heard of.
        left_at: steps at which it was abandoned.
    """

    def __init__(self, job: FaultyJob, number: int) -> None:
        self.job, self.number = job, number
        self.worker_id = f"worker-{number}"
        self.at, self.goes_to = FIRST_STEP, math.inf
        self.center: tuple[float, ...] = ()
        self.rounds = list[Round]()
        self.left_at = set[int]()
        self.lives = list[_Life]()

    @property
    def steps(self) -> list[int | None]:
        """By shard, the step of the center that its session has from there."""
        session = self.lives[-1].session
        return [] if session is None else session._servers.steps

    def begin(self) -> None:
        """Starts the thread, which stands for a process."""
        self.lives.append(_Life(self))
        self.lives[-1].thread.start()

    def abandon(self) -> None:
        """Ends the worker silently, like a killed process, whatever it was doing."""
        self.left_at.add(self.at)
        self.lives[-1].end()


class _Life:
    """What a worker does until it is abandoned."""

    def __init__(self, seat: Seat) -> None:
        self.session: ParameterServerSession | None = None
        self.failure: BaseException | None = None
        self._seat, self._number = seat, len(seat.lives)
        self._over = threading.Event()
        self.thread = threading.Thread(target=self._live, name=f"{seat.worker_id}, {self._number}", daemon=True)

    def end(self) -> None:
        """Cuts its connections."""
        self._over.set()
        if self.session is not None:
            for member in self.session._servers:
                member.connection.close()

    def _live(self) -> None:
        try:
            self._work()
        except ModelAverageError as error:
            self.failure = None if self._over.is_set() else error
        except BaseException as error:
            self.failure = error

    def _work(self) -> None:
        seat, job = self._seat, self._seat.job
        self.session = session = job.session(seat.worker_id)
        if self._over.is_set():  # it could not be ended before
            self.end()
        if seat.number == 0:
            session.initialize(job.start_values(), global_step=FIRST_STEP)
        center, step = session.pull(timeout_s=2 * HANG_S)
        while job.may_push(step) and not self._over.is_set():
            seat.at, before = step, _values_of(center)
            soon(lambda: seat.at < seat.goes_to or self._over.is_set())
            given = {name: value + job.given(seat.number, seat.at) for name, value in center.items()}
            result = session.push_and_average(given, copy=job.copy)
            center, step = result.center, result.global_step
            after = _values_of(center)
            seat.rounds.append(Round(self._number, seat.at, step, before, after, result.outcome, result.contributors))
        seat.at, seat.center = step, _values_of(center)
        session.close()


def _values_of(center: Mapping[str, NDArray[Any]]) -> tuple[float, ...]:
    """By shard, what the elements of its variable are."""
    for name, value in center.items():
        assert np.ptp(value) < _ROUNDING, f"{name} is torn: {value}"
    return tuple(float(center[f"v{index}"][0]) for index in range(len(center)))


class Watchful(ParameterServerSession):
    """Checks more often whether a server has fallen back."""

    _timing = Timing(fall_back_interval_s=0.1)


class FaultyJob:
    """Shards and seats, and the state that they have to reach.

    Args:
        directory: for the checkpoints.
        num_shards: how many servers.
        policy: whom rounds wait for; there are as many seats as it has workers.
        every_rounds: by shard, how often it writes a checkpoint; 1 by default.
        shared: whether all bytes go through shared memory.
        copy: whether workers copy the centers that they get. With a quorum they have to: rounds do not wait for them.
        session_class: of the workers.
    """

    def __init__(
        self,
        directory: Path,
        num_shards: int,
        policy: RoundPolicy,
        every_rounds: Sequence[int] = (),
        shared: bool = False,
        copy: bool = True,
        session_class: type[ParameterServerSession] = Watchful,
    ) -> None:
        self.shared, self.copy = shared, copy
        self.session_class = session_class
        self._lock = threading.Lock()
        self._pushed_from, self._until = FIRST_STEP, math.inf
        self._loop = _Loop()
        self.shards = list[FaultyShard]()
        for index, every in zip(range(num_shards), itertools.chain(every_rounds, itertools.repeat(1)), strict=False):
            folder = directory / str(index)
            folder.mkdir()
            self.shards.append(FaultyShard(self._loop, folder, policy, every, shared))
        self.seats = [Seat(self, number) for number in range(policy.num_workers)]
        self._sessions = list[ParameterServerSession]()

    def __enter__(self) -> FaultyJob:
        return self

    def __exit__(self, *_: object) -> None:
        lives = [life for seat in self.seats for life in seat.lives]
        for life in lives:
            life.end()
        for session in self._sessions:
            session.close()
        for shard in self.shards:
            shard.stop()
        for life in lives:
            life.thread.join(HANG_S)
        self._loop.close()

    def session(self, worker_id: str) -> ParameterServerSession:
        """A session with all servers; one without a seat is closed at the end."""
        session = self.session_class(
            [shard.address for shard in self.shards],
            worker_id=worker_id,
            is_chief=worker_id == "worker-0",
            shared_memory=self.shared,
            fragment_size_bytes=_FRAGMENT_SIZE_BYTES,
            connect_timeout_s=HANG_S,
            reconnect_timeout_s=HANG_S,
            round_timeout_s=2 * HANG_S,  # so that a failing test ends, too
            placement="round_robin",
        )
        self._sessions.append(session)
        return session

    def start_values(self) -> dict[str, NDArray[Any]]:
        """A variable for every server."""
        return {f"v{index}": np.zeros(_ELEMENTS) for index in range(len(self.shards))}

    def given(self, worker: int, step: int) -> float:
        """What a worker adds to the center of this step. A mean of such numbers identifies the workers and the
        step; the mean of all workers is exact."""
        return float(len(self.seats) * (4**worker + 100 * step))

    def may_push(self, step: int) -> bool:
        """Whether there is another round after this step."""
        with self._lock:
            self._pushed_from = max(self._pushed_from, step)
            return step < self._until

    @property
    def pushed_from(self) -> int:
        """The latest step that a worker has pushed, or will have pushed, from."""
        return self._pushed_from

    def begin(self) -> None:
        """Starts all workers."""
        for seat in self.seats:
            seat.begin()

    def end(self, rounds: int) -> int:
        """The step, a few rounds later, at which all workers must be done."""
        with self._lock:
            self._until = until = self._pushed_from + 1 + rounds
        lives = [seat.lives[-1] for seat in self.seats]
        done = soon(lambda: not any(life.thread.is_alive() for life in lives))
        for life in lives:
            if life.failure is not None:
                raise life.failure
        assert done, self.picture()
        self._check_rest(until)
        return until

    def _check_rest(self, until: int) -> None:
        """All shards and all workers have the same center."""
        assert [shard.status.global_step for shard in self.shards] == [until] * len(self.shards)
        assert [shard.status.phase for shard in self.shards] == [pb.PHASE_IDLE] * len(self.shards)
        assert [seat.at for seat in self.seats] == [until] * len(self.seats)
        assert len({seat.center for seat in self.seats}) == 1, [seat.center for seat in self.seats]
        for seat in self.seats:
            for one, following in itertools.pairwise(seat.rounds):
                assert one.global_step > one.base_step
                assert following.base_step == one.global_step or following.life > one.life, f"{one}, {following}"

    def check_means(self, since: int) -> None:
        """Checks that from this step on every round was the mean of one push of each worker."""
        for one in self._rounds():
            if one.base_step >= since:
                mean = self._mean(range(len(self.seats)), one.base_step)
                assert one.global_step == one.base_step + 1, one
                assert one.outcome in (Outcome.COMMITTED, Outcome.ALREADY_COUNTED), one
                assert all(
                    abs(after - before - mean) < _ROUNDING for before, after in zip(one.before, one.after, strict=True)
                ), one

    def check_explained(self) -> None:
        """Checks that on every shard, every round was the mean of one push of each worker that was not abandoned in it,
        and that all workers heard of the same centers."""
        centers = dict[int, tuple[float, ...]]()
        for one in self._rounds():
            assert one.global_step == one.base_step + 1, one
            assert centers.setdefault(one.base_step, one.before) == one.before, one
            assert centers.setdefault(one.global_step, one.after) == one.after, one
            sure = {s.number for s in self.seats if not s.left_at & {one.base_step, one.base_step - 1}}
            possible = [
                0.0 if not together else self._mean(together, one.base_step)
                for together in _subsets(range(len(self.seats)))
                if sure <= set(together)
            ]
            for before, after in zip(one.before, one.after, strict=True):
                assert min(abs(after - before - mean) for mean in possible) < _ROUNDING, (one, possible)

    def _rounds(self) -> Iterator[Round]:
        return itertools.chain.from_iterable(seat.rounds for seat in self.seats)

    def _mean(self, workers: Sequence[int], step: int) -> float:
        return sum(self.given(worker, step) for worker in workers) / len(workers)

    def picture(self) -> str:
        """Which shard waits for which workers, and where each worker is."""
        lines = ["the job hangs:"]
        for index, shard in enumerate(self.shards):
            status = shard.status
            waits_for = [*status.waiting_for, *["somebody"] * status.waiting_for_unknown]
            lines.append(f"shard {index}: step {status.global_step}, has {shard.whole}, waits for {waits_for}")
        lines += [f"{seat.worker_id}: pushes from {seat.at}, has {seat.steps}" for seat in self.seats]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for thread, frame in sys._current_frames().items():
            calls = [call for call in traceback.extract_stack(frame) if "/ma_client/" in call.filename]
            if calls:
                lines.append(f"{names.get(thread)}: {' > '.join(f'{call.name}:{call.lineno}' for call in calls)}")
        return "\n".join(lines)


def _subsets(numbers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(numbers, size) for size in range(len(numbers) + 1))
