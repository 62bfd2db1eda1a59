"""The RPCs of the service: how each call is served, and how the service stops."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc.aio

from modelaverage import wire
from modelaverage.checks import check_incarnation, check_worker_id
from modelaverage.errors import Reason, refusal
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from ps_server.checkpoints.reading import Checkpoint
from ps_server.flow.call import Call, Context
from ps_server.flow.caller import caller_role
from ps_server.flow.initialization import Initialization
from ps_server.flow.job import Job, Surroundings
from ps_server.flow.joining import Joining
from ps_server.flow.naming import check_named, named
from ps_server.flow.pulls import WaitForChief, send_pulled
from ps_server.flow.push import serve_push
from ps_server.flow.serving import GOING_DOWN, Serving
from ps_server.machine.helper_thread import HelperThread
from ps_server.machine.reserve import Reserve
from ps_server.machine.trouble import end_process
from ps_server.rules.authorization import Role
from ps_server.rules.policy import RoundPolicy
from ps_server.rules.task_indexes import DEFAULT_REJOIN_TIMEOUT_S, TaskIndexes
from ps_server.seen.history import History
from ps_server.seen.observations import Observations
from ps_server.seen.roster import Roster
from ps_server.seen.sample import MetricsSample, PageSample
from ps_server.seen.snapshot import ServerSeen, status_of
from ps_server.seen.traffic import Traffic
from ps_server.transports.data_port import DataPort
from ps_server.transports.registry import Needs, opened

__all__ = ["DEFAULT_SHARED_MEMORY_FROM_BYTES", "ParameterServerService", "ServicePolicy"]

DEFAULT_SHARED_MEMORY_FROM_BYTES = 256 << 10
# The minimum time for the last checkpoint; a large one gets more, at this rate.
_LEAST_LAST_WRITE_S, _LEAST_FLUSH_S = 0.5, 0.1
_DISK_BYTES_PER_S = 200e6


@dataclass(frozen=True)
class ServicePolicy:
    """Settings of the service.

    Args:
        round: which workers a round waits for.
        max_model_bytes: a center that needs more than twice as much memory is refused.
        stall_timeout_s: a client that stalls a stream for longer loses it.
        shared_memory_from_bytes: models of at least this size use shared memory with workers on this host; for a
            smaller one, which takes one or a few messages, shared memory costs more than it saves. Infinite: none.
        checkpoints: where to keep the center; None: no checkpoints.
        rejoin_timeout_s: how long a task index stays reserved for a process whose connection broke.
        first_notice_s: when a wait for workers or for the chief is first logged; then after twice as long, and so on.
            Also the interval of notices to a pull that waits for the chief.
    """

    round: RoundPolicy
    max_model_bytes: int
    stall_timeout_s: float
    shared_memory_from_bytes: float = DEFAULT_SHARED_MEMORY_FROM_BYTES
    checkpoints: CheckpointPolicy | None = None
    rejoin_timeout_s: float = DEFAULT_REJOIN_TIMEOUT_S
    first_notice_s: float = 5.0


class ParameterServerService:
    """The RPCs of `modelaverage.v1.ParameterServer`. Created and used on one running event loop.

    Args:
        policy: its settings.
        clock: seconds, monotonic.
        restored: the checkpoint to continue from; None: the chief initializes the center.
        reserve: descriptors for the server's own needs.
        die: ends the process after logging a line with the cause.
        home: where to write the checkpoints that the policy asks for; None: nowhere.

    Raises:
        OSError, RuntimeError: the checkpoint writer cannot be started.
    """

    def __init__(
        self,
        policy: ServicePolicy,
        clock: Callable[[], float] = time.monotonic,
        restored: Checkpoint | None = None,
        reserve: Reserve | None = None,
        die: Callable[[str], None] = end_process,
        home: CheckpointHome | None = None,
    ) -> None:
        self._policy = policy
        self._reserve = Reserve(0) if reserve is None else reserve
        self._clock = clock
        self._started_at_s = clock()
        self._roster, self._observations, self._traffic = Roster(), Observations(), Traffic()
        self._history = History(self._traffic)
        self._serving = Serving(self._traffic, self._observations, policy.stall_timeout_s)
        self._waiting = WaitForChief(clock, policy.first_notice_s)
        # After a restore, workers of the job already have indexes.
        closed_until_s = -math.inf if restored is None else self._started_at_s + policy.rejoin_timeout_s
        indexes = TaskIndexes(policy.round.num_workers, policy.rejoin_timeout_s, closed_until_s)
        self._joining = Joining(policy.round.num_workers, indexes, clock)
        self._keeper: Keeper | None = None
        if policy.checkpoints is not None and home is not None:
            self._keeper = Keeper(policy.checkpoints, home, self._observations, clock)
        transports = opened(Needs(policy.round.max_workers, self._reserve))
        self._transports = tuple(transports.values())
        (self.data_port,) = (transport for transport in self._transports if isinstance(transport, DataPort))
        """The port for data connections, once it listens."""
        self.helper = HelperThread()
        """A helper thread for large models, once it is started."""
        around = Surroundings(
            self._roster,
            self._observations,
            self._history,
            self._transports,
            self._keeper,
            clock,
            policy.first_notice_s,
            die,
        )
        self._initialization = Initialization(
            policy.round,
            policy.max_model_bytes,
            policy.shared_memory_from_bytes,
            around,
            self._waiting,
            self._reserve,
            self.helper,
        )
        if restored is not None:
            self._initialization.restore(restored)

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """The handler to register with a gRPC server. Messages stay bytes: wire.py reads and writes them."""
        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {
                "Initialize": grpc.stream_unary_rpc_method_handler(self._initialize),
                "Pull": grpc.unary_stream_rpc_method_handler(self._pull),
                "PushAndAverage": grpc.stream_stream_rpc_method_handler(self._push_and_average),
                "Leave": grpc.unary_unary_rpc_method_handler(self._leave),
                "GetStatus": grpc.unary_unary_rpc_method_handler(self._get_status),
                "Join": grpc.unary_stream_rpc_method_handler(self._join),
            },
        )

    @property
    def job(self) -> Job | None:
        """The job; None until there is a center."""
        return self._initialization.job

    async def wait_initialized(self) -> None:
        """Returns once there is a center; until then, logs at growing intervals that there is none."""
        await self._waiting.say_so(lambda: sorted({call.worker_id for call in self._initialization.chiefs}))

    async def stop(self, timeout_s: float) -> None:
        """Refuses waiting calls, lets active calls finish for up to ``timeout_s``, then ends the rest."""
        self._serving.is_stopping = True
        error = refusal(Reason.SERVER_STOPPING, GOING_DOWN)
        for call in list(self._waiting.calls):
            call.fail(error)
        self._joining.fail(error)
        job, calls = self.job, self._serving.calls
        if job is not None and not job.round.full:
            job.fail_pushes(error)
        deadline_s = self._clock() + timeout_s
        while calls and (left_s := deadline_s - self._clock()) > 0:
            await asyncio.wait([call.ended for call in calls], timeout=left_s)
        for call in list(calls):
            call.fail(error)
        if self.job is not None and self._keeper is not None:
            await self._keep_last(self.job, self._keeper, deadline_s)

    async def _keep_last(self, job: Job, keeper: Keeper, deadline_s: float) -> None:
        deadline_s = max(deadline_s, self._clock() + _LEAST_LAST_WRITE_S)
        deadline_s += job.manifest.size_bytes / _DISK_BYTES_PER_S
        keeping = asyncio.ensure_future(job.keep())
        await asyncio.wait((keeping,), timeout=deadline_s - self._clock())
        await keeper.finish(max(deadline_s - self._clock(), _LEAST_FLUSH_S))
        keeper.close()  # if the disk hangs, waits for it end here
        await asyncio.wait((keeping,), timeout=_LEAST_LAST_WRITE_S)

    def close(self) -> None:
        """Ends the threads and processes of the service. Must be called in every case."""
        for transport in self._transports:
            transport.close()
        self.helper.stop()
        self._reserve.close()
        if self._keeper is not None:
            self._keeper.close()

    # The RPCs.

    async def _initialize(self, _: object, context: Context) -> bytes:
        async def body(call: Call) -> bytes:
            return (await self._initialization.receive(call, self._joining.heard)).SerializeToString()

        return await self._serving.serve("Initialize", context, body)

    async def _pull(self, request: bytes, context: Context) -> None:
        async def body(call: Call) -> None:
            message = wire.parse(pb.PullRequest, request)
            call.worker_id = message.worker_id
            check_worker_id(message.worker_id)
            wanted = named(message)
            will_train = message.will_train and caller_role.get() is not Role.READER
            if will_train:
                self._joining.heard(message.worker_id)
            if message.wait_initialized:
                self._heard_pull_of(message.worker_id)
                await self._waiting.wait(call, message.accepts_notices)
            job = self._require_job()
            check_named(wanted, job.chosen)
            self._heard_pull_of(message.worker_id)
            if will_train:
                job.come_back(message.worker_id)
            if self._reserve.is_short and not message.header_only:
                raise refusal(
                    Reason.SERVER_OVERLOADED,
                    "the server has no descriptors left to keep a center for a reader (`ulimit -n`); try again later",
                )
            await send_pulled(job, call, message)

        await self._serving.serve("Pull", context, body)

    async def _push_and_average(self, _: object, context: Context) -> None:
        async def body(call: Call) -> None:
            header = await call.read_header(pb.PushAndAverageRequest)
            call.worker_id = header.worker_id
            self._joining.heard(header.worker_id)
            await serve_push(self._require_job(), call, header, self._transports, self._reserve)

        await self._serving.serve("PushAndAverage", context, body)

    async def _leave(self, request: bytes, context: Context) -> bytes:
        async def body(call: Call) -> bytes:
            message = wire.parse(pb.LeaveRequest, request)
            call.worker_id = message.worker_id
            check_worker_id(message.worker_id)
            check_incarnation(message.incarnation)
            self._joining.leave(message.worker_id, message.incarnation)
            job = self.job
            if job is None:
                return pb.LeaveResponse(workers_training=self._policy.round.num_workers).SerializeToString()
            if message.finished:
                await job.finish(message.worker_id, message.incarnation)
            else:
                job.leave(message.worker_id, message.incarnation)
            response = pb.LeaveResponse(workers_training=job.round.training, global_step=job.round.global_step)
            return response.SerializeToString()

        return await self._serving.serve("Leave", context, body)

    async def _get_status(self, request: bytes, context: Context) -> bytes:
        async def body(_: Call) -> bytes:
            wire.parse(pb.GetStatusRequest, request)
            return self.status().SerializeToString()

        return await self._serving.serve("GetStatus", context, body)

    async def _join(self, request: bytes, context: Context) -> None:
        async def body(call: Call) -> None:
            message = wire.parse(pb.JoinRequest, request)
            check_incarnation(message.incarnation)
            await self._joining.serve(call, message)

        await self._serving.serve("Join", context, body)

    # Status and metrics.

    def status(self) -> pb.GetStatusResponse:
        """The current status of the server."""
        policy, keeper = self._policy.round, self._keeper
        server = ServerSeen(policy.num_workers, policy.min_workers, self._started_at_s, self._serving.is_stopping)
        checkpoint = None if keeper is None else keeper.seen()
        job = None if self.job is None else self.job.seen()
        return status_of(server, job, checkpoint, self._roster, self._observations, self._traffic, self._clock())

    def metrics_sample(self) -> MetricsSample:
        """The current values of the metrics. Must be called on the event loop."""
        lateness_sum_s = {
            w: record.lateness_sum_s for w, record in self._roster.records.items() if record.pushes_counted
        }
        return MetricsSample(self.status(), self._observations, self._traffic, lateness_sum_s)

    def page_sample(self) -> PageSample:
        """What the page shows. Must be called on the event loop."""
        return PageSample(
            self.status(), self._history.seen(), replace(self._traffic), self._clock(), self._started_at_s
        )

    def _heard_pull_of(self, worker_id: str) -> None:
        record = self._roster.heard_of(worker_id, self._clock())
        record.may_push = record.may_push or caller_role.get() is not Role.READER

    def _require_job(self) -> Job:
        job = self.job
        if job is None:
            raise refusal(
                Reason.NOT_INITIALIZED,
                "there is no center yet: the chief has to initialize it, or pull and wait for it",
            )
        return job
