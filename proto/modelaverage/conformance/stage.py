"""Where a case is played: everything that a case starts ends with it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

from modelaverage.conformance.peer import Peer
from modelaverage.conformance.proxy import Proxy
from modelaverage.conformance.scripted import ScriptedServer
from modelaverage.conformance.server import Server
from modelaverage.conformance.worker import Worker
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Stage"]

_WAIT_S = 20.0
_LOOK_INTERVAL_S = 0.005


class Stage:
    """Servers, workers and the proxies between them, for one case.

    Args:
        command: the words of the client program's COMMAND.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._workers: list[Worker] = []
        self._ends = ExitStack()

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ends:
            if error is None:
                for worker in self._workers:
                    worker.end()

    def server(self, num_workers: int = 1, *flags: str, shared_memory: bool = False) -> Server:
        """A real server."""
        if not shared_memory:
            flags = "--no-shared-memory", *flags
        server = Server("--num-workers", str(num_workers), *flags)
        self._ends.callback(server.kill)
        return server

    def scripted(self) -> ScriptedServer:
        """A server that sends what the case's scripts say."""
        server = ScriptedServer()
        self._ends.callback(server.end)
        return server

    def worker(self, address: str, worker_id: str = "a") -> Worker:
        """A client program. At the end of the case it has to exit with 0, unless `kill` has killed it."""
        worker = Worker(self._command, address, worker_id)
        self._ends.callback(worker.kill)
        self._workers.append(worker)
        return worker

    def kill(self, worker: Worker) -> None:
        """SIGKILL for a client program."""
        self._workers.remove(worker)
        worker.kill()

    def last_words(self) -> str:
        """What the client programs have printed last; see `Program.last_words`."""
        return "".join(worker.last_words() for worker in self._workers)

    def peer(self, address: str, worker_id: str = "peer") -> Peer:
        """A worker of the kit's own."""
        peer = Peer(address, worker_id)
        self._ends.callback(peer.end)
        return peer

    def proxy(self, address: str) -> Proxy:
        """A proxy to ``address``, for a client to connect to."""
        proxy = Proxy(address)
        self._ends.callback(proxy.end)
        return proxy

    def directory(self) -> str:
        """An empty one."""
        return self._ends.enter_context(tempfile.TemporaryDirectory())

    @staticmethod
    def until(peer: Peer, condition: Callable[[pb.GetStatusResponse], bool], what: str) -> None:
        """Waits, for a bounded time, until the server's status meets the condition. Raises TimeoutError."""
        deadline_s = time.monotonic() + _WAIT_S
        while not condition(peer.status()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{what}: not within {_WAIT_S:g} s")
            time.sleep(_LOOK_INTERVAL_S)

    @classmethod
    def until_whole(cls, peer: Peer, worker_id: str) -> None:
        """Waits until the push of a worker is whole."""
        cls.until(
            peer,
            lambda status: any(worker.worker_id == worker_id and worker.waiting for worker in status.workers),
            f"the push of {worker_id!r} is whole",
        )
