"""The gRPC shell: the RPCs, their errors, and the end of the service."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from modelaverage import wire
from modelaverage.checks import check_global_step, check_incarnation, check_worker_id
from modelaverage.errors import FAULTS, ModelAverageError, Reason, refusal, refusal_metadata
from modelaverage.manifest import MAX_VARIABLES, Manifest, first_difference
from modelaverage.names import MAX_NAMES, listed
from modelaverage.runtime.logs import event
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Center, check_fragment_size
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from ps_server.checkpoints.reading import Checkpoint
from ps_server.edge.gatekeeper import caller_role
from ps_server.edge.metrics import MetricsSample
from ps_server.flow.call import Call, Context, Traffic
from ps_server.flow.job import Job
from ps_server.flow.joining import Joining
from ps_server.machine.connections import cut, taking
from ps_server.machine.helper_thread import HelperThread, no_collections
from ps_server.machine.reserve import Reserve
from ps_server.machine.trouble import describe, end_process, is_expected
from ps_server.rules.authorization import Role
from ps_server.rules.policy import RoundPolicy
from ps_server.rules.round import Round, check_fragment_order
from ps_server.rules.task_indexes import DEFAULT_REJOIN_GRACE_S, TaskIndexes
from ps_server.seen.observations import Observations
from ps_server.seen.roster import Roster
from ps_server.transports.data_port import DataPort

__all__ = ["DEFAULT_SHARED_MEMORY_FROM_BYTES", "ParameterServerService", "ServicePolicy"]

_log = logging.getLogger("ps_server")
# A status message travels in HTTP/2 headers, whose size is limited; there, a byte that is not ASCII takes three.
_MAX_MESSAGE_BYTES = 2000
DEFAULT_SHARED_MEMORY_FROM_BYTES = 256 << 10
# A client that does not take for so long what was sent before its call was refused loses its connection, unless bytes
# are on their way to it: then the link is slow.
_LAST_WORD_TIMEOUT_S = 2.0
# How long the last checkpoint may take at least; a large one gets more, at this rate.
_LEAST_LAST_WRITE_S, _LEAST_FLUSH_S = 0.5, 0.1
_DISK_BYTES_PER_S = 200e6
# A model with more variables, fragments or bytes is handled beside the event loop: on it, every other call would wait.
_MANY_VARIABLES = 1000
_MANY_FRAGMENTS = 8192
_MANY_BYTES = 64 << 20
# The most workers in a status; with the longest names they take a fifth of a message.
_MAX_WORKERS_SHOWN = 2000
# Proxies end calls on which nothing is sent for a minute or less.
_CHIEF_NOTICE_S = 5.0
_FIRST_CHIEF_WARNING_S = 5.0
_GOING_DOWN = "the parameter server is going down; try again when it is back"
_T = TypeVar("_T")


@dataclass(frozen=True)
class ServicePolicy:
    """What the service is told by whoever starts it.

    Args:
        round: for whom a round waits.
        max_model_bytes: a center that needs more than twice as much memory is refused.
        stall_timeout_s: a client that keeps a stream waiting for longer loses it.
        shared_memory_from_bytes: models of this size on use shared memory with workers on this host; a smaller one fits
            one or a few messages, to which shared memory would only add. Infinite: none.
        checkpoints: where to keep the center; None: nowhere.
        rejoin_grace_s: how long a task index is kept for a process whose connection broke.
    """

    round: RoundPolicy
    max_model_bytes: int
    stall_timeout_s: float
    shared_memory_from_bytes: float = DEFAULT_SHARED_MEMORY_FROM_BYTES
    checkpoints: CheckpointPolicy | None = None
    rejoin_grace_s: float = DEFAULT_REJOIN_GRACE_S


class ParameterServerService:
    """The RPCs of `modelaverage.v1.ParameterServer`. Made and used on one running event loop.

    Args:
        policy: what it is told.
        clock: seconds, monotonic.
        restored: the checkpoint to go on from; None: the chief initializes the center.
        reserve: descriptors for the server's own needs.
        die: ends the process, with a line that says why.
        home: where to keep the center, as the policy says; None: nowhere.

    Raises:
        OSError, RuntimeError: what writes checkpoints cannot be started.
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
        self._die = die
        self._clock = clock
        self._started_at_s = clock()
        self._job: Job | None = None
        self._initialized = asyncio.Event()
        self._stopping = False
        self._calls: set[Call] = set()
        self._pulls_waiting: set[Call] = set()
        self._sending_center: set[Call] = set()
        self._roster = Roster()
        self._traffic = Traffic()
        # Workers of a server that goes on from a checkpoint have indexes already.
        closed_until_s = -math.inf if restored is None else self._started_at_s + policy.rejoin_grace_s
        indexes = TaskIndexes(policy.round.num_workers, policy.rejoin_grace_s, closed_until_s)
        self._joining = Joining(policy.round.num_workers, indexes, clock)
        self._observations = Observations()
        self._keeper: Keeper | None = None
        if policy.checkpoints is not None and home is not None:
            self._keeper = Keeper(policy.checkpoints, home, self._observations, clock)
        self.data_port = DataPort(policy.round.max_workers)
        """Where workers may open data connections, once it listens."""
        self.helper = HelperThread()
        """For large models, once it is started."""
        if restored is not None:
            self._job = self._restored(restored)

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """What to register with a gRPC server. Messages stay bytes: wire.py reads and writes them."""
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

    async def wait_initialized(self) -> None:
        """Returns once there is a center; until then the log says at growing gaps that there is none."""
        gap_s = _FIRST_CHIEF_WARNING_S
        while not self._initialized.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._initialized.wait(), gap_s)
                return
            gap_s = 2 * gap_s
            waited_s = self._clock() - self._started_at_s
            names = sorted({call.worker_id for call in self._pulls_waiting})
            waiting = f"; waiting with it: {listed(names)}" if names else ""
            if self._sending_center:
                chief = f"{listed(sorted({call.worker_id for call in self._sending_center}))} is sending it"
            else:
                chief = f"no chief (worker 0) has come to initialize it for {waited_s:.0f} s"
            _log.warning(
                "there is no center yet: %s%s",
                chief,
                waiting,
                extra=event("center_awaited", waited_s=waited_s, workers=names[:MAX_NAMES]),
            )

    async def stop(self, grace_s: float) -> None:
        """Refuses what waits for others, lets what is under way finish for up to ``grace_s``, then ends the rest."""
        self._stopping = True
        error = refusal(Reason.SERVER_STOPPING, _GOING_DOWN)
        for call in list(self._pulls_waiting):
            call.fail(error)
        self._joining.fail(error)
        if self._job is not None and not self._job.round.full:
            self._job.fail_pushes(error)
        deadline_s = self._clock() + grace_s
        while self._calls and (left_s := deadline_s - self._clock()) > 0:
            await asyncio.wait([call.ended for call in self._calls], timeout=left_s)
        for call in list(self._calls):
            call.fail(error)
        if self._job is not None and self._keeper is not None:
            deadline_s = max(deadline_s, self._clock() + _LEAST_LAST_WRITE_S)
            deadline_s += self._job.manifest.size_bytes / _DISK_BYTES_PER_S
            keeping = asyncio.ensure_future(self._job.keep())
            await asyncio.wait((keeping,), timeout=deadline_s - self._clock())
            await self._keeper.finish(max(deadline_s - self._clock(), _LEAST_FLUSH_S))
            self._keeper.close()  # if the disk hangs, who waits for it stops waiting
            await asyncio.wait((keeping,), timeout=_LEAST_LAST_WRITE_S)

    def close(self) -> None:
        """Ends what runs beside the event loop; to be called at the end, however it comes."""
        self.data_port.close()
        self.helper.stop()
        self._reserve.close()
        if self._keeper is not None:
            self._keeper.close()

    # Initialize

    async def _initialize(self, _: object, context: Context) -> bytes:
        async def body(call: Call) -> bytes:
            return (await self._receive_center(call)).SerializeToString()

        return await self._serve("Initialize", context, body)

    async def _receive_center(self, call: Call) -> pb.InitializeResponse:
        header = await call.read_header(pb.InitializeRequest)
        call.worker_id = header.worker_id
        check_worker_id(header.worker_id)
        check_global_step(header.global_step)
        many = _MANY_VARIABLES < len(header.manifest.variables) <= MAX_VARIABLES
        manifest, pull_header = await self._beside_the_loop(call, many, lambda: _read_manifest(header.manifest))
        initialized = False
        if self._job is None:
            self._sending_center.add(call)
            try:
                values = await self._receive_values(call, manifest)
            finally:
                self._sending_center.discard(call)
            center = await self._beside_the_loop(call, _is_large(manifest), lambda: self._new_center(manifest, values))
            del values
            if self._job is None and center is not None:  # another chief may have been faster
                round_ = Round(self._policy.round, manifest.fragment_count, header.global_step)
                self._job = self._new_job(center, pull_header, round_)
                initialized = True
                _log.debug(
                    "center initialized by %r: %s%d variables, %d bytes, global_step %d",
                    header.worker_id,
                    "" if manifest.shard is None else f"{manifest.shard}, ",
                    len(manifest.variables),
                    manifest.size_bytes,
                    header.global_step,
                    extra=event(
                        "center_initialized",
                        worker=header.worker_id,
                        peer=call.peer,
                        round=header.global_step,
                        variables=len(manifest.variables),
                        size_bytes=manifest.size_bytes,
                    ),
                )
        job = self._job
        assert job is not None
        difference = None
        if not initialized:
            compare = partial(
                first_difference, manifest.variables, job.manifest.variables, "in the call", "on the server"
            )
            difference = await self._beside_the_loop(call, many, compare)
        if difference is not None:
            raise refusal(
                Reason.MANIFEST_MISMATCH,
                f"the center was initialized with another manifest: {difference}; give all workers the same model",
            )
        record = self._roster.heard_of(header.worker_id, self._clock())
        record.is_chief = record.may_push = True
        if initialized:
            await job.keep()
        return pb.InitializeResponse(
            initialized=initialized,
            global_step=job.round.global_step,
            manifest_id=job.manifest.id,
            num_workers=self._policy.round.num_workers,
            shard=wire.shard_to_message(job.manifest.shard),
        )

    async def _beside_the_loop(self, call: Call, is_long: bool, work: Callable[[], _T]) -> _T:
        """What ``work`` returns. If it takes long, all else goes on meanwhile, and the client is not to blame."""
        if not is_long:
            return work()
        call.expecting = False
        result = await self.helper.run(work)
        call.expecting = True
        return result

    def _new_job(self, center: Center, pull_header: wire.PullHeader, round_: Round) -> Job:
        self._initialized.set()
        return Job(
            center,
            pull_header,
            round_,
            self._roster,
            self._clock,
            self._keeper,
            self._observations,
            self.data_port,
            self._reserve,
            self._die,
        )

    def _restored(self, checkpoint: Checkpoint) -> Job:
        manifest = checkpoint.manifest
        center = self._empty_center(manifest)
        for name, array in center.current.arrays.items():
            array[...] = checkpoint.arrays[name]
        round_ = Round(
            self._policy.round,
            manifest.fragment_count,
            checkpoint.global_step,
            checkpoint.contributors,
            dict(checkpoint.counted or {}),
            frozenset(checkpoint.finished),
        )
        return self._new_job(center, wire.PullHeader(manifest), round_)

    async def _receive_values(self, call: Call, manifest: Manifest) -> NDArray[np.uint8]:
        """The flat buffer that the chief sends. A header alone costs nothing: memory is used as bytes come."""
        memory_bytes = Center.memory_bytes(manifest)
        if memory_bytes > 2 * self._policy.max_model_bytes:
            raise refusal(
                Reason.MANIFEST_INVALID,
                f"a model of {manifest.size_bytes} bytes needs {memory_bytes} bytes of memory, over twice the server's "
                f"--max-model-bytes {self._policy.max_model_bytes}",
            )
        values = np.zeros(manifest.buffer_size_bytes, np.uint8)
        for expected in range(manifest.fragment_count):
            fragment = await call.read_fragment(pb.InitializeRequest)
            if not isinstance(fragment, tuple):
                raise refusal(
                    Reason.FRAGMENT_MISSING,
                    f"the stream ended after {expected} of {manifest.fragment_count} fragments; initialize again",
                )
            index, data = fragment
            check_fragment_order(index, expected, manifest.fragment_count)
            check_fragment_size(manifest, index, data)
            start, end = manifest.fragment_bounds(index)
            values[start:end] = np.frombuffer(data, np.uint8)
        if await call.read() is not None:
            raise refusal(
                Reason.FRAGMENT_EXTRA, f"a message came after the last of {manifest.fragment_count} fragments"
            )
        return values

    def _new_center(self, manifest: Manifest, values: NDArray[np.uint8]) -> Center | None:
        """A center with these values, a flat buffer; None if there is a job already."""
        if self._job is not None:
            return None
        with no_collections() if _is_large(manifest) else nullcontext():
            center = self._empty_center(manifest)
            for index in range(manifest.fragment_count):
                start, end = manifest.fragment_bounds(index)
                center.load(index, values[start:end].data)
        return center

    def _empty_center(self, manifest: Manifest) -> Center:
        if manifest.buffer_size_bytes >= self._policy.shared_memory_from_bytes:
            try:
                return Center(manifest, True, self._reserve)
            except OSError as error:
                _log.warning(
                    "no shared memory for the center: %s; all bytes go inline",
                    error,
                    extra=event("no_shared_memory", worker=None),
                )
        return Center(manifest)

    # Pull

    async def _pull(self, request: bytes, context: Context) -> None:
        async def body(call: Call) -> None:
            message = wire.parse(pb.PullRequest, request)
            call.worker_id = message.worker_id
            check_worker_id(message.worker_id)
            if message.wait_initialized:
                self._heard_pull_of(message.worker_id)
                self._pulls_waiting.add(call)
                try:
                    await self._wait_for_chief(call, message.accepts_notices)
                finally:
                    self._pulls_waiting.discard(call)
            job = self._require_job()
            self._heard_pull_of(message.worker_id)
            if message.will_train and caller_role.get() is not Role.READER:
                job.come_back(message.worker_id)
            if self._reserve.is_short and not message.header_only:
                raise refusal(
                    Reason.SERVER_OVERLOADED,
                    "the server has no descriptors left to keep a center for a reader (`ulimit -n`); try again later",
                )
            await job.send_pulled(call, message)

        await self._serve("Pull", context, body)

    async def _wait_for_chief(self, call: Call, accepts_notices: bool) -> None:
        """Returns once there is a center. A client that accepts notices is sent some, and so is all that stands
        between, which may end a call on which nothing is sent."""
        since_s = self._clock()
        while accepts_notices and not self._initialized.is_set():
            notice = pb.ChiefNotice(waited_s=self._clock() - since_s)
            await call.write(pb.PullResponse(waiting=notice).SerializeToString())
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._initialized.wait(), _CHIEF_NOTICE_S)
        await self._initialized.wait()

    def _heard_pull_of(self, worker_id: str) -> None:
        record = self._roster.heard_of(worker_id, self._clock())
        record.may_push = record.may_push or caller_role.get() is not Role.READER

    # PushAndAverage

    async def _push_and_average(self, _: object, context: Context) -> None:
        async def body(call: Call) -> None:
            header = await call.read_header(pb.PushAndAverageRequest)
            call.worker_id = header.worker_id
            await self._require_job().take_part(call, header)

        await self._serve("PushAndAverage", context, body)

    # Leave

    async def _leave(self, request: bytes, context: Context) -> bytes:
        async def body(call: Call) -> bytes:
            message = wire.parse(pb.LeaveRequest, request)
            call.worker_id = message.worker_id
            check_worker_id(message.worker_id)
            check_incarnation(message.incarnation)
            self._joining.leave(message.incarnation)
            job = self._job
            if job is None:
                return pb.LeaveResponse(workers_training=self._policy.round.num_workers).SerializeToString()
            if message.finished:
                await job.finish(message.worker_id, message.incarnation)
            else:
                job.leave(message.worker_id, message.incarnation)
            response = pb.LeaveResponse(workers_training=job.round.training, global_step=job.round.global_step)
            return response.SerializeToString()

        return await self._serve("Leave", context, body)

    # GetStatus and the metrics

    def metrics_sample(self) -> MetricsSample:
        """What the metrics show at this moment. To be called on the event loop."""
        lateness_sum_s = {
            w: record.lateness_sum_s for w, record in self._roster.records.items() if record.pushes_counted
        }
        return MetricsSample(self._status(), self._observations, self._traffic, lateness_sum_s)

    async def _get_status(self, request: bytes, context: Context) -> bytes:
        async def body(_: Call) -> bytes:
            wire.parse(pb.GetStatusRequest, request)
            return self._status().SerializeToString()

        return await self._serve("GetStatus", context, body)

    def _status(self) -> pb.GetStatusResponse:
        now_s = self._clock()
        status = pb.GetStatusResponse(
            phase=pb.PHASE_UNINITIALIZED,
            num_workers=self._policy.round.num_workers,
            min_workers=self._policy.round.min_workers,
            received_bytes=self._traffic.received_bytes,
            sent_bytes=self._traffic.sent_bytes,
            shared_bytes=self._traffic.shared_bytes,
            uptime_s=now_s - self._started_at_s,
            rounds_committed=self._observations.rounds_committed,
            rounds_per_minute=self._observations.rounds_per_minute(now_s),
            pushes_retried=self._observations.pushes_retried,
        )
        complete: frozenset[str] = frozenset()
        job = self._job
        if job is not None:
            complete = job.round.complete
            status.global_step = job.round.global_step
            status.model_size_bytes = job.manifest.size_bytes
            status.manifest_id = job.manifest.id
            shard = wire.shard_to_message(job.manifest.shard)
            if shard is not None:
                status.shard.CopyFrom(shard)
            status.last_round_s = job.last_round_s
            status.rounds_restarted = job.rounds_restarted
            status.rounds_without_all = job.rounds_without_all
            status.stale_pushes = job.stale_pushes
            status.workers_finished = len(job.round.finished)
            status.job_over = job.round.job_is_over
            status.connected_workers = job.connected_workers
            status.round_age_s = job.round.age_s(now_s)
            status.phase = pb.PHASE_AVERAGING if job.round.under_way else pb.PHASE_IDLE
            if job.round.under_way:
                missing = job.missing()
                status.waiting_for.extend(missing.names)
                status.waiting_for_omitted = missing.omitted
                status.waiting_for_unknown = missing.unknown
        if self._keeper is not None:
            status.checkpoint_problem = self._keeper.problem
            if self._keeper.step is not None:
                status.checkpoint_step = self._keeper.step
            if self._keeper.written_at_s is not None:
                status.checkpoint_age_s = now_s - self._keeper.written_at_s
            if self._keeper.writing_since_s is not None:
                status.checkpoint_writing_s = now_s - self._keeper.writing_since_s
        if self._stopping:
            status.phase = pb.PHASE_STOPPING
        foremost = self._roster.foremost(_MAX_WORKERS_SHOWN)
        status.workers_omitted = len(self._roster.records) - len(foremost)
        for worker_id, record in foremost:
            status.workers.add(
                worker_id=worker_id,
                is_chief=record.is_chief,
                local_step=record.local_step,
                fragments_given=0 if job is None else job.round.given(worker_id),
                waiting=worker_id in complete,
                last_seen_age_s=now_s - record.last_seen_at_s,
                nonfinite_values=record.nonfinite_values,
                pushes_counted=record.pushes_counted,
                lateness_s=record.lateness_s,
                loss=record.loss,
                transport=record.transport,
                peer=record.peer,
                has_finished=record.has_finished,
                has_left=record.has_left,
                interval_steps=record.interval_steps,
            )
        return status

    # Join

    async def _join(self, request: bytes, context: Context) -> None:
        async def body(call: Call) -> None:
            message = wire.parse(pb.JoinRequest, request)
            check_incarnation(message.incarnation)
            await self._joining.serve(call, message)

        await self._serve("Join", context, body)

    # Common to all calls

    async def _serve(self, name: str, context: Context, body: Callable[[Call], Awaitable[_T]]) -> _T:
        """Runs one call. A fault from the table becomes its gRPC status, with the reason's name for programs."""
        call: Call | None = None
        try:
            call = Call(context, self._traffic, self._policy.stall_timeout_s)
            return await self._run(name, call, body)
        except (ModelAverageError, asyncio.CancelledError) as raised:
            # Without a failure it was gRPC that cancelled: the client is gone.
            failure = raised if call is None or call.failure is None else call.failure
        except grpc.aio.BaseError:
            raise  # gRPC's own way to end a call
        except Exception as unexpected:
            failure = unexpected
        worker_id = "" if call is None else call.worker_id
        reason, message = self._refusal(name, worker_id, str(context.peer()), failure)
        del failure  # its traceback holds this frame and what the call was sending
        self._observations.refused[reason.name] += 1
        _log.debug(
            "%s refused: %s: %s",
            name,
            reason.name,
            message,
            extra=event("call_refused", rpc=name, reason=reason.name, worker=worker_id, peer=str(context.peer())),
        )
        with suppress(asyncio.CancelledError):  # `fail` may have been called by this very task
            await asyncio.sleep(0)
        code = grpc.StatusCode[FAULTS[reason].status]
        last_word = asyncio.ensure_future(context.abort(code, _short(message), refusal_metadata(reason)))
        try:
            await _while_taken(last_word, str(context.peer()))
        except asyncio.TimeoutError:
            if cut(str(context.peer())):
                what = event("connection_cut", peer=str(context.peer()), reason=reason.name)
                _log.warning(
                    "%s takes nothing, not even %s: its connection is cut", context.peer(), reason.name, extra=what
                )
        raise asyncio.CancelledError  # after a last word that went out never reached: abort raises

    async def _run(self, name: str, call: Call, body: Callable[[Call], Awaitable[_T]]) -> _T:
        self._calls.add(call)
        try:
            if self._stopping and name != "GetStatus":
                raise refusal(Reason.SERVER_STOPPING, _GOING_DOWN)
            return await body(call)
        finally:
            self._calls.discard(call)
            call.end()

    def _refusal(self, name: str, worker_id: str, peer: str, failure: BaseException) -> tuple[Reason, str]:
        """What the client is told. Raises the failure itself if it is of no use to a client."""
        if isinstance(failure, ModelAverageError) and failure.reason is not None:
            return failure.reason, str(failure)
        if not isinstance(failure, Exception):
            raise failure from None
        what = event("call_failed", rpc=name, worker=worker_id, peer=peer, cause=describe(failure))
        trace = None if is_expected(failure) else failure
        _log.error("%s failed: %s", name, describe(failure), extra=what, exc_info=trace)
        return Reason.SERVER_OVERLOADED, f"the server failed ({describe(failure)}); call again after a pause"

    def _require_job(self) -> Job:
        if self._job is None:
            raise refusal(
                Reason.NOT_INITIALIZED,
                "there is no center yet: the chief has to initialize it, or pull and wait for it",
            )
        return self._job


def _read_manifest(message: pb.Manifest) -> tuple[Manifest, wire.PullHeader]:
    """Raises InvalidRequestError (MANIFEST_INVALID), also if no pull could be answered with it."""
    manifest = wire.manifest_from_message(message)
    return manifest, wire.PullHeader(manifest)


async def _while_taken(last_word: asyncio.Future[NoReturn], peer: str) -> None:
    """Waits for the last word on a call as long as what was sent before it moves.

    Raises:
        asyncio.TimeoutError: the client takes nothing.
    """
    before, still_s = None, 0.0
    try:
        while not (await asyncio.wait((last_word,), timeout=_LAST_WORD_TIMEOUT_S))[0]:
            now = taking(peer)
            still_s = 0.0 if now is not None and now.goes_on_since(before) else still_s + _LAST_WORD_TIMEOUT_S
            if now is None or now.waiting_bytes == 0 or still_s >= SILENCE_TIMEOUT_S:
                raise asyncio.TimeoutError
            before = now
        await last_word
    finally:
        last_word.cancel()


def _is_large(manifest: Manifest) -> bool:
    return (
        len(manifest.variables) > _MANY_VARIABLES
        or manifest.fragment_count > _MANY_FRAGMENTS
        or manifest.buffer_size_bytes > _MANY_BYTES
    )


def _short(message: str) -> str:
    return message.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
