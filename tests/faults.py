"""A job of workers whose center can be computed beforehand, and a server that is killed under them and restarted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ma_client import DataSettings, Outcome, ParameterServerSession, PushResult
from ma_client.transports.data_settings import DATA_SETTINGS
from modelaverage.outer import AVERAGE, OuterOptimizer
from tests.ports import lasting_port
from tests.prepared import Prepared

__all__ = ["HANG_S", "Model", "RestartedServer", "RestartedWorker", "Training", "trained", "undisturbed"]

Model = Mapping[str, NDArray[np.float32]]
# A job that hangs for longer than this after a kill has failed.
HANG_S = 30.0


def trained(center: Model, worker: int, step: int) -> Model:
    """The variables that a worker trains from the center in one interval; different for every worker and step."""
    return {
        name: value * np.float32(0.75) + np.random.default_rng((worker, step)).random(value.shape, np.float32)
        for name, value in center.items()
    }


def undisturbed(center: Model, workers: int, rounds: int, since: int = 0, outer: OuterOptimizer = AVERAGE) -> Model:
    """The center after this many rounds, starting from the center of step ``since``."""
    states = {name: outer.init(value.reshape(-1)) for name, value in center.items()}
    for step in range(since, rounds):
        pushed = [trained(center, worker, step) for worker in range(workers)]
        following = dict[str, NDArray[np.float32]]()
        for name, value in center.items():
            average = np.sum([local[name] for local in pushed], axis=0, dtype=np.float32) / np.float32(workers)
            made, states[name] = outer.update(value.reshape(-1), average.reshape(-1), states[name], step)
            following[name] = made.reshape(value.shape)
        center = following
    return center


class RestartedServer:
    """`ps-server serve` on one port and one checkpoint directory, started again when it ends without being told to.

    Args:
        directory: for its checkpoints.
        arguments: further arguments of the command.
        deaths: the moments at which it, and then each successor, kills itself.
        stop: the moment at which it, but no successor, stops.
        returns: successors start only once this is set; None: at once.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        deaths: tuple[tuple[str, int], ...] = (),
        stop: tuple[str, int] | None = None,
        returns: threading.Event | None = None,
    ) -> None:
        self._returns = returns
        self.address = f"127.0.0.1:{lasting_port()}"
        self._arguments = ["serve", "--bind", self.address, "--checkpoint-dir", str(directory), *arguments]
        self._signals = [("SIGKILL", *death) for death in deaths] if stop is None else [("SIGSTOP", *stop)]
        self._stopping = False
        self.ends: list[int] = []  # how the servers before this one ended
        self._listening = threading.Event()
        self._start()
        self._supervisor = threading.Thread(target=self._supervise)
        self._supervisor.start()

    def __enter__(self) -> RestartedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """SIGKILL, for good."""
        self._stopping = True
        if self._returns is not None:
            self._returns.set()
        self._process.kill()
        self._supervisor.join()

    def listens(self) -> None:
        """Waits until it listens."""
        assert self._listening.wait(HANG_S), "the server did not start again"

    def kill(self) -> None:
        """SIGKILL, once it listens."""
        self.listens()
        self._listening.clear()
        self._process.kill()

    @property
    def stands_still(self) -> bool:
        """Whether it has reached the moment at which it stops."""
        state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    def go_on(self) -> None:
        """Continues the stopped server; a signal that came before its stop would be lost."""
        assert self.stands_still
        os.kill(self._process.pid, signal.SIGCONT)

    def _start(self) -> None:
        command = ["ps_server"]
        if self._signals:
            command = ["tests.killed_server", *map(str, self._signals.pop(0))]
        self._process = Prepared(*command, *self._arguments)
        self._process.stdout.readline()
        self._listening.set()

    def _supervise(self) -> None:
        while True:
            self._process.communicate()
            if self._stopping:
                return
            self.ends.append(self._process.wait())
            if self._returns is not None:
                self._returns.wait()
                if self._stopping:
                    return
            self._start()


class RestartedWorker:
    """A worker's process, started again whenever it is killed. It prints the `global_step` after every round.

    Args:
        module: the process.
        lives: its arguments at first, and then at each restart; the last ones stay.

    Attributes:
        ends: how its processes have ended.
        step: the latest that it has printed.
    """

    def __init__(self, module: str, *lives: Sequence[str]) -> None:
        self.ends: list[int] = []
        self.step = 0
        self._module, self._lives = module, list(lives)
        self._news = threading.Condition()
        self._start()
        self._supervisor = threading.Thread(target=self._supervise)
        self._supervisor.start()

    def made(self, step: int) -> bool:
        """Waits until it has made the round of this ``global_step``; False: nothing came for long."""
        with self._news:
            while self.step < step:
                if not self._news.wait(2 * HANG_S):
                    return False
        return True

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def join(self) -> None:
        """Waits for its end; it may have been killed after its last round."""
        self._supervisor.join(4 * HANG_S)
        assert not self._supervisor.is_alive()

    def _start(self) -> None:
        arguments = self._lives.pop(0) if len(self._lives) > 1 else self._lives[0]
        self._process = Prepared(self._module, *arguments)

    def _supervise(self) -> None:
        while True:
            with self._process.stdout as lines:
                for line in lines:
                    with self._news:
                        self.step = max(self.step, int(line)) if line.endswith("\n") else self.step
                        self._news.notify_all()
            self.ends.append(self._process.wait())
            if self.ends[-1] != -signal.SIGKILL:
                return
            self._start()


@dataclass
class Training:
    """Workers, as threads with a session each, that make rounds until `global_step` is ``rounds``.

    Args:
        address: of the server, or of the first shard.
        start: the center of step 0.
        workers: how many.
        rounds: how many.
        shared_memory: whether they accept some.
        fragment_size_bytes: of the manifest.
        more_shards: the other servers' addresses.
        data_connections: when they use some.
        outer: the outer optimizer that the chief names.
        results: by worker, how its pushes ended.
    """

    address: str
    start: Model
    workers: int
    rounds: int
    shared_memory: bool = True
    fragment_size_bytes: int = 1 << 20
    more_shards: Sequence[str] = ()
    data_connections: DataSettings = DATA_SETTINGS
    outer: OuterOptimizer = AVERAGE
    results: list[list[PushResult]] = field(default_factory=list)

    def run(self) -> list[Model]:
        """Every worker's last center. ``results`` has the outcomes of all of the worker's pushes."""
        self.results = [[] for _ in range(self.workers)]
        with ThreadPoolExecutor(self.workers) as pool:
            futures: list[Future[Model]] = [pool.submit(self._work, worker) for worker in range(self.workers)]
            return [future.result() for future in futures]

    @property
    def rounds_made(self) -> int:
        """The number of rounds that some worker has heard of."""
        return max(map(len, self.results), default=0)

    def goes_on(self, done: threading.Event) -> bool:
        """Waits for another round; returns whether one was made before the job was done or hung."""
        made, deadline_s = self.rounds_made, time.monotonic() + HANG_S
        while self.rounds_made == made and time.monotonic() < deadline_s:
            if done.wait(0.002):
                return False
        return self.rounds_made > made

    def session(self, worker: int) -> ParameterServerSession:
        """A worker's session."""
        return ParameterServerSession(
            [self.address, *self.more_shards],
            worker_id=f"worker-{worker}",
            is_chief=worker == 0,
            shared_memory=self.shared_memory,
            fragment_size_bytes=self.fragment_size_bytes,
            reconnect_timeout_s=HANG_S,
            round_timeout_s=2 * HANG_S,
            data_connections=self.data_connections,
        )

    def expected(self) -> Model:
        """The last center of an undisturbed run."""
        return undisturbed(self.start, self.workers, self.rounds, outer=self.outer)

    def _work(self, worker: int) -> Model:
        with self.session(worker) as session:
            if worker == 0:
                session.initialize(self.start, outer_optimizer=self.outer)
            center, step = session.pull()
            while step < self.rounds:
                result = session.push_and_average(trained(center, worker, step))
                self.results[worker].append(result)
                center, step = result.center, result.global_step
            return center

    def check(self, centers: list[Model]) -> None:
        """Checks that no round was lost or counted twice: every center is that of an undisturbed run, to the bit."""
        expected = self.expected()
        for center in centers:
            for name, value in expected.items():
                assert np.array_equal(center[name], value), f"{name} differs"
        for results in self.results:
            assert [result.global_step for result in results] == list(range(1, self.rounds + 1))
            for result in results:
                # STALE: the round committed with this push, but the answer was lost with the server.
                assert result.outcome in (Outcome.COMMITTED, Outcome.ALREADY_COUNTED)
