"""One service on its own loop, with views of its external and internal state."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import grpc

from fuzz.context import ClientCall, Failure, Method
from fuzz.corpus import CENTER_ID, Model, initialize_messages
from fuzz.loop import EndlessError, VirtualLoop
from fuzz.sockets import Listener
from modelaverage import wire
from ps_server.flow.job import Job
from ps_server.flow.service import ParameterServerService, ServicePolicy
from ps_server.rules.policy import RoundPolicy

__all__ = ["Center", "LONG_ENOUGH_S", "MAX_STEPS", "STALL_TIMEOUT_S", "World", "open_files", "resident_bytes", "tables"]

STALL_TIMEOUT_S = 10.0
LONG_ENOUGH_S = STALL_TIMEOUT_S + 0.1
# Ten times what the longest input needs.
MAX_STEPS = 5000
# A larger model would cost time and find nothing that a small one does not.
_MAX_MODEL_BYTES = 32 << 10
# Tables that may have grown when all calls have ended: those of the known workers, and of what is left of their pushes.
_MAY_GROW = frozenset(
    {
        "_joining._indexes._holders",
        "_joining._indexes._in_use",
        "_joining._indexes._processes",
        "_transports[1]._lent",
        "data_port._connections",
        "data_port._offered",
        "data_port._offers",
        "_initialization._around.history._arrivals",
        "_initialization._around.history._past._newest",
        "_initialization._around.observations._committed_at_s",
        "_initialization._around.observations._lateness_s",
        "_initialization._around.roster._nonfinite",
        "_initialization._around.roster.records",
        "_initialization.job._remarks._intervals",
        "_initialization.job.average._messages",
        "_initialization.job.center._sums._deferred",
        "_initialization.job.round._entries",
        "_initialization.job.round._fragments._restoring",
        "_initialization.job.round._quorum._barred",
        "_initialization.job.round._quorum._expected",
        "_initialization.job.round._quorum._lateness._recent_s",
        "_initialization.job.round._quorum.finished",
        "_initialization.job.round.counted",
    }
)
_RPCS = ("Initialize", "Pull", "PushAndAverage", "Leave", "GetStatus", "Join")


@dataclass(frozen=True)
class Center:
    """The center at one point in time."""

    step: int
    flat: bytes


@dataclass(frozen=True)
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: tuple[()] = ()


class World:
    """A service, and a clock that the fuzzer moves.

    Args:
        policy: whom its rounds wait for.
        shared: whether its center is in shared memory.
        connections: whether workers may open data connections; `listener` is where.
    """

    def __init__(self, policy: RoundPolicy, shared: bool, connections: bool = False) -> None:
        self.loop = VirtualLoop.create()
        self.listener = Listener()
        self._max_workers = policy.max_workers
        self._services: list[ParameterServerService] = []
        limits = ServicePolicy(policy, _MAX_MODEL_BYTES, STALL_TIMEOUT_S, 0 if shared else math.inf)
        self.loop.call_soon(self._start, limits, connections)
        self.settle()
        self._methods = {rpc: _method(self.service, rpc) for rpc in _RPCS}
        self.count_from_here()

    def _start(self, limits: ServicePolicy, connections: bool) -> None:
        service = ParameterServerService(limits, self.loop.time)
        if connections:
            listener: Any = self.listener  # what `DataPort.listen` does, except for the sockets
            service.data_port._listeners.append(listener)
            service.data_port._begin(service.data_port._accept(listener))
        self._services.append(service)

    @property
    def service(self) -> ParameterServerService:
        """The service itself."""
        return self._services[0]

    @property
    def job(self) -> Job | None:
        """What exists once the center is initialized."""
        return self.service.job

    def open(self, rpc: str, request: bytes | None = None) -> ClientCall:
        """Begins a call."""
        return ClientCall(self.loop, rpc, self._methods[rpc], request)

    def settle(self) -> None:
        """Lets the service do all that it can do now."""
        self.loop.settle(MAX_STEPS)
        self._check_problems()

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.loop.advance(seconds, MAX_STEPS)
        self._check_problems()

    def vanish(self, call: ClientCall, first_an_end: bool) -> None:
        """Removes the client of a call, and checks that the call ends."""
        call.vanish(MAX_STEPS, first_an_end)
        self.settle()
        if not call.done:
            raise Failure(f"{call.rpc} does not end when its client is gone")

    def abandon(self) -> None:
        """Ends whatever still runs, without a check."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        with contextlib.suppress(EndlessError):
            self.loop.settle(MAX_STEPS)

    def initialize(self, model: Model, step: int, compression: str = "") -> Center:
        """Sets the center as a correct chief does. With a codec, its id is CENTER_ID."""
        call = self.open("Initialize")
        for message in initialize_messages(model, "chief", step, compression=compression):
            call.send(message)
        call.half_close()
        self.settle()
        if not call.done or call.verdict() != "(ok)":
            raise Failure("a good chief is refused")
        if compression:
            assert self.job is not None
            self.job.center.current.center_id = CENTER_ID  # else random, and no input would be the same again
        self.count_from_here()
        center = self.center()
        assert center is not None
        return center

    def center(self) -> Center | None:
        """The center as it is."""
        if self.job is None:
            return None
        return Center(self.job.round.global_step, self.job.center.current.flat.tobytes())

    def check_calls(self, open_calls: int) -> None:
        """Raises Failure if the service's list of calls differs from the open calls."""
        if len(self.service._serving.calls) != open_calls:
            raise Failure(f"{open_calls} calls are open, and the service has {len(self.service._serving.calls)}")
        self._check_offers()
        if open_calls == 0:
            self._check_empty()
            self._check_connections()

    def _check_empty(self) -> None:
        left = dict[str, Any](_pulls_waiting=self.service._waiting.calls)
        if self.job is not None:
            round_ = self.job.round
            left.update(_pushes=self.job._pushes, _streams=round_._streams, _held=round_._held)
            for worker_id, entry in round_._entries.items():
                if entry.stream is not None or entry.attached is not None:
                    raise Failure(f"no call is open, but the round sees one of {worker_id!r}")
            if self.job.center._sums._deferred and not round_._entries:
                raise Failure("nobody is in the round, but there are contributions to its sum")
            if self.job.center.current.in_use or self.job.center.next.in_use:
                raise Failure("no call is open, but a buffer is in use")
        for name, table in left.items():
            if table:
                raise Failure(f"no call is open, but {name} has {len(table)} entries")

    def _check_offers(self) -> None:
        port = self.service.data_port
        if not set(port._offers) <= set(port._offered.values()):
            raise Failure("there are offers of data connections that are not the last one of any worker")
        if max(len(port._offered), len(port._connections)) > self._max_workers:
            raise Failure(f"{len(port._offered)} offers and {len(port._connections)} data connections are too many")

    def _check_connections(self) -> None:
        port = self.service.data_port
        known: set[Any] = {*port._arriving, *(connection._socket for _, connection in port._connections.values())}
        left = [each for each in self.listener.accepted if not each.is_closed and each not in known]
        if left:
            raise Failure(f"no call is open, but {len(left)} data connections are that nobody can use")

    def end_data_port(self) -> None:
        """Closes all data connections, as when the server ends."""
        self.loop.call_soon(self.service.data_port.close)
        self.settle()
        if self.loop.watched or [each for each in self.listener.accepted if not each.is_closed]:
            raise Failure("data connections outlive the server")

    def count_from_here(self) -> None:
        """Takes the present size of the tables as the normal one, which `grown` compares with."""
        self._baseline = tables(self.service)

    def grown(self) -> dict[str, int]:
        """By how many entries the tables have grown. Raises Failure if one has grown that must not."""
        gained = {name: size - self._baseline.get(name, 0) for name, size in tables(self.service).items()}
        grown = {name: entries for name, entries in gained.items() if entries > 0}
        for name, entries in grown.items():
            if name not in _MAY_GROW:
                raise Failure(f"{name} has {entries} entries more than at first, and no call is open")
        return grown

    def _check_problems(self) -> None:
        if self.loop.problems:
            problem = self.loop.problems[0]
            raise Failure(f"asyncio would log: {problem.get('message')}: {problem.get('exception')!r}")


def _method(service: ParameterServerService, rpc: str) -> Method:
    found: Any = service.handler().service(_Details(f"/{wire.SERVICE}/{rpc}"))
    methods: list[Method | None] = [found.unary_unary, found.unary_stream, found.stream_unary, found.stream_stream]
    return next(method for method in methods if method is not None)


def tables(root: object) -> dict[str, int]:
    """How many entries every container has that can be reached from an object through the server's own objects."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [("", root)]
    while waiting:
        path, each = waiting.pop()
        if isinstance(each, (dict, set, frozenset, list, deque)):
            found[path] = len(each)
        elif type(each).__module__.startswith("ps_server.") and id(each) not in seen and hasattr(each, "__dict__"):
            seen.add(id(each))
            waiting += [(f"{path}.{name}".lstrip("."), value) for name, value in vars(each).items()]
    return found


def resident_bytes() -> int:
    """Physical memory of this process, after a garbage collection."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """The open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
