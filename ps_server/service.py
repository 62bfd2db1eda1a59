"""The gRPC shell around round and center: turns messages into events, and decisions into bytes and messages.

Everything runs on one event loop, so between two awaits nothing else happens: no locks. What to do is decided in
round.py; how values are stored and averaged is center.py's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc.aio

from modelaverage import wire
from modelaverage.checks import check_global_step, check_worker_id
from modelaverage.errors import FAULTS, REASON_METADATA_KEY, REASON_PREFIX, ModelAverageError, Reason, refusal
from modelaverage.manifest import Manifest, first_difference
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.call import Call
from ps_server.center import Buffer, Center
from ps_server.roster import Roster
from ps_server.round import (
    Admit,
    CenterFollows,
    Commit,
    Decision,
    Dismiss,
    FinishFragment,
    Push,
    Restart,
    Round,
)

__all__ = ["ParameterServerService", "ServicePolicy"]

_log = logging.getLogger("ps_server")
_Context = grpc.aio.ServicerContext[bytes, bytes]
# A status message travels in HTTP/2 headers, whose size is limited.
_MAX_MESSAGE_CHARS = 1000
_GOING_DOWN = "the parameter server is going down; try again when it is back"
_T = TypeVar("_T")
_Opening = TypeVar("_Opening", bound=pb.InitializeRequest | pb.PushAndAverageRequest)


@dataclass(frozen=True)
class ServicePolicy:
    """What the service is told by whoever starts it.

    Args:
        num_workers: how many distinct workers a round waits for.
        max_model_bytes: the largest center that is accepted; the server holds about twice as much.
        stall_timeout_s: a client that keeps a stream waiting for longer loses it.
    """

    num_workers: int
    max_model_bytes: int
    stall_timeout_s: float


@dataclass
class _Average:
    """The average in the making, or just made: fragments below ``finished`` of ``buffer`` may be sent."""

    buffer: Buffer
    finished: int = 0


@dataclass
class _Part:
    """One push that is being answered."""

    call: Call
    worker_id: str
    average: _Average
    outcome: pb.PushOutcome | None = None  # set when its round has committed
    progress: asyncio.Event = field(default_factory=asyncio.Event)


class _Job:
    """What there is once the chief has initialized the center."""

    def __init__(self, center: Center, round_: Round) -> None:
        self.center = center
        self.round = round_
        self.average = _Average(center.next)
        self.parts: dict[int, _Part] = {}  # by the number of the call, as `round` names its streams

    @property
    def manifest(self) -> Manifest:
        return self.center.manifest


@dataclass
class _Totals:
    """Sums since the server started, for the status."""

    received_bytes: int = 0
    sent_bytes: int = 0
    rounds_restarted: int = 0
    stale_pushes: int = 0
    last_round_s: float = 0.0


class ParameterServerService:
    """The four RPCs of `modelaverage.v1.ParameterServer`. Made and used on one running event loop."""

    def __init__(self, policy: ServicePolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._started_at_s = clock()
        self._job: _Job | None = None
        self._initialized = asyncio.Event()
        self._stopping = False
        self._calls: set[Call] = set()
        self._pulls_waiting: set[Call] = set()
        self._roster = Roster()
        self._totals = _Totals()

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """What to register with a gRPC server. Messages stay bytes: wire.py reads and writes them."""
        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {
                "Initialize": grpc.stream_unary_rpc_method_handler(self._initialize),
                "Pull": grpc.unary_stream_rpc_method_handler(self._pull),
                "PushAndAverage": grpc.stream_stream_rpc_method_handler(self._push_and_average),
                "GetStatus": grpc.unary_unary_rpc_method_handler(self._get_status),
            },
        )

    async def stop(self, grace_s: float) -> None:
        """Refuses what waits for others, lets what is under way finish for up to ``grace_s``, then ends the rest."""
        self._stopping = True
        error = refusal(Reason.SERVER_STOPPING, _GOING_DOWN)
        for call in self._pulls_waiting:
            call.fail(error)
        if self._job is not None and not self._job.round.full:
            for part in self._job.parts.values():
                part.call.fail(error)
        deadline_s = self._clock() + grace_s
        while self._calls and (left_s := deadline_s - self._clock()) > 0:
            await asyncio.wait([call.ended for call in self._calls], timeout=left_s)
        for call in self._calls:
            call.fail(error)

    # Initialize

    async def _initialize(self, _: object, context: _Context) -> bytes:
        async def body(call: Call) -> bytes:
            return (await call.run(self._receive_center(call))).SerializeToString()

        return await self._serve("Initialize", context, body)

    async def _receive_center(self, call: Call) -> pb.InitializeResponse:
        header = await self._read_header(call, pb.InitializeRequest)
        check_worker_id(header.worker_id)
        check_global_step(header.global_step)
        manifest = wire.manifest_from_message(header.manifest)
        self._roster.heard_of(header.worker_id, self._clock()).is_chief = True
        initialized = False
        if self._job is None:
            center = await self._receive_values(call, manifest)
            if self._job is None:  # another chief may have been faster
                self._job = _Job(center, Round(self._policy.num_workers, manifest.fragment_count, header.global_step))
                self._initialized.set()
                initialized = True
                _log.info(
                    "center initialized by %r: %d variables, %d bytes, global_step %d",
                    header.worker_id,
                    len(manifest.variables),
                    manifest.size_bytes,
                    header.global_step,
                )
        job = self._job
        difference = first_difference(manifest.variables, job.manifest.variables, "in the call", "on the server")
        if difference is not None:
            raise refusal(
                Reason.MANIFEST_MISMATCH,
                f"the center was initialized with another manifest: {difference}; give all workers the same model",
            )
        return pb.InitializeResponse(
            initialized=initialized,
            global_step=job.round.global_step,
            manifest_id=job.manifest.id,
            num_workers=self._policy.num_workers,
        )

    async def _receive_values(self, call: Call, manifest: Manifest) -> Center:
        if manifest.buffer_size_bytes > self._policy.max_model_bytes:
            raise refusal(
                Reason.MANIFEST_INVALID,
                f"a model of {manifest.size_bytes} bytes is over the server's --max-model-bytes "
                f"{self._policy.max_model_bytes}",
            )
        center = Center(manifest)
        for expected in range(manifest.fragment_count):
            fragment = await self._read_fragment(call, pb.InitializeRequest)
            if fragment is None:
                raise refusal(
                    Reason.FRAGMENT_MISSING,
                    f"the stream ended after {expected} of {manifest.fragment_count} fragments; initialize again",
                )
            index, data = fragment
            if index >= manifest.fragment_count:
                raise refusal(
                    Reason.FRAGMENT_EXTRA, f"fragment {index} does not exist; the model has {manifest.fragment_count}"
                )
            if index != expected:
                reason = Reason.FRAGMENT_REPEATED if index < expected else Reason.FRAGMENT_MISPLACED
                raise refusal(reason, f"fragment {index} came where {expected} belongs")
            center.load(index, data)
        if await call.read() is not None:
            raise refusal(
                Reason.FRAGMENT_EXTRA, f"a message came after the last of {manifest.fragment_count} fragments"
            )
        return center

    # Pull

    async def _pull(self, request: bytes, context: _Context) -> None:
        async def body(call: Call) -> None:
            message = wire.parse(pb.PullRequest, request)
            check_worker_id(message.worker_id)
            self._roster.heard_of(message.worker_id, self._clock())
            if message.wait_initialized:
                self._pulls_waiting.add(call)
                try:
                    await call.run(self._initialized.wait())
                finally:
                    self._pulls_waiting.discard(call)
            await call.run(self._send_pulled(call, self._require_job()))

        await self._serve("Pull", context, body)

    async def _send_pulled(self, call: Call, job: _Job) -> None:
        header = pb.CenterHeader(
            manifest=wire.manifest_to_message(job.manifest),
            manifest_id=job.manifest.id,
            global_step=job.round.global_step,
            num_workers=self._policy.num_workers,
        )
        with job.center.current.reading() as buffer:
            await call.write(pb.PullResponse(header=header).SerializeToString())
            for index in range(job.manifest.fragment_count):
                await self._send_fragment(call, buffer, index)

    # PushAndAverage

    async def _push_and_average(self, _: object, context: _Context) -> None:
        await self._serve("PushAndAverage", context, self._take_part)

    async def _take_part(self, call: Call) -> None:
        header = await call.run(self._read_header(call, pb.PushAndAverageRequest))
        job = self._require_job()
        push = _push_of(header, job.manifest)
        record = self._roster.heard_of(push.worker_id, self._clock())
        record.is_chief, record.local_step = header.is_chief, header.local_step
        part = job.parts[call.number] = _Part(call, push.worker_id, job.average)
        try:
            answer = self._apply(job, part, job.round.open(call.number, push, self._clock()))
            if isinstance(answer, CenterFollows):
                await call.run(self._send_center(job, call, answer.outcome))
            elif isinstance(answer, Admit):
                with part.average.buffer.reading():
                    sending = self._send_average(job, part, answer.first_needed)
                    await call.run(sending, beside=self._receive_push(job, part))
        finally:
            job.round.close(call.number)
            del job.parts[call.number]

    async def _receive_push(self, job: _Job, part: _Part) -> None:
        """Adds fragments to the average until the client half-closes."""
        while (fragment := await self._read_fragment(part.call, pb.PushAndAverageRequest)) is not None:
            index, data = fragment
            weight, first = job.round.check_fragment(part.call.number, index)
            job.center.check_size(index, data)
            now_s = self._clock()
            record = self._roster.heard_of(part.worker_id, now_s)
            record.nonfinite_values += job.center.accumulate(index, data, weight, first)
            self._apply(job, part, job.round.record_fragment(part.call.number, now_s))
            part.call.expecting = index + 1 < job.manifest.fragment_count
        job.round.check_complete(part.call.number)

    async def _send_average(self, job: _Job, part: _Part, first_needed: int) -> None:
        """Sends each fragment of the average once it is finished, then the outcome."""
        part.call.expecting = first_needed < job.manifest.fragment_count
        admission = pb.PushAdmission(first_needed_fragment=first_needed)
        await part.call.write(pb.PushAndAverageResponse(admission=admission).SerializeToString())
        sent = 0
        while True:
            part.progress.clear()
            while sent < part.average.finished:
                await self._send_fragment(part.call, part.average.buffer, sent)
                sent += 1
            if part.outcome is not None:
                await part.call.write(pb.PushAndAverageResponse(outcome=part.outcome).SerializeToString())
                return
            await part.progress.wait()

    async def _send_center(self, job: _Job, call: Call, outcome: Outcome) -> None:
        """Answers a push that is not in the round: the present center, whole, and why."""
        count = job.manifest.fragment_count
        admission = pb.PushAdmission(first_needed_fragment=count)
        last_word = pb.PushOutcome(
            outcome=pb.Outcome.Name(outcome.value),
            global_step=job.round.global_step,
            contributors=job.round.contributors,
        )
        call.expecting = False
        if outcome is Outcome.STALE:
            self._totals.stale_pushes += 1
        with job.center.current.reading() as buffer:
            await call.write(pb.PushAndAverageResponse(admission=admission).SerializeToString())
            for index in range(count):
                await self._send_fragment(call, buffer, index)
            await call.write(pb.PushAndAverageResponse(outcome=last_word).SerializeToString())

    def _apply(self, job: _Job, part: _Part, decisions: list[Decision]) -> Admit | CenterFollows | None:
        """Carries out what the round decided on an event of ``part``; the answer to its header, if there is one."""
        answer: Admit | CenterFollows | None = None
        for decision in decisions:
            match decision:
                case Admit():
                    answer, part.average = decision, job.average
                case CenterFollows():
                    answer = decision
                case Dismiss(stream, error):
                    job.parts[stream].call.fail(error)
                case Restart(cause):
                    job.average = _Average(job.center.next)
                    self._totals.rounds_restarted += 1
                    _log.warning("round %d starts over: %s", job.round.global_step, cause)
                case FinishFragment(index, total_weight, untouched):
                    job.center.finish(index, total_weight, untouched)
                    job.average.finished = index + 1
                    self._wake(job, job.average)
                case Commit():
                    self._commit(job, decision)
        return answer

    def _commit(self, job: _Job, commit: Commit) -> None:
        job.center.commit()
        for stream, verdict in commit.verdicts.items():
            job.parts[stream].outcome = pb.PushOutcome(
                outcome=pb.Outcome.Name(verdict.outcome.value),
                global_step=commit.global_step,
                contributors=commit.contributors,
                waited_s=verdict.waited_s,
                untouched_variables=sorted(commit.untouched) if verdict.outcome is Outcome.COMMITTED else (),
            )
        self._wake(job, job.average)
        job.average = _Average(job.center.next)
        self._roster.count(commit.contributors)
        self._totals.last_round_s = commit.round_s
        _log.debug("global_step %d: averaged %s", commit.global_step, ", ".join(commit.contributors))

    @staticmethod
    def _wake(job: _Job, average: _Average) -> None:
        for part in job.parts.values():
            if part.average is average:
                part.progress.set()

    # GetStatus

    async def _get_status(self, request: bytes, context: _Context) -> bytes:
        async def body(_: Call) -> bytes:
            wire.parse(pb.GetStatusRequest, request)
            return self._status().SerializeToString()

        return await self._serve("GetStatus", context, body)

    def _status(self) -> pb.GetStatusResponse:
        now_s = self._clock()
        status = pb.GetStatusResponse(
            phase=pb.PHASE_UNINITIALIZED,
            num_workers=self._policy.num_workers,
            received_bytes=self._totals.received_bytes,
            sent_bytes=self._totals.sent_bytes,
            uptime_s=now_s - self._started_at_s,
            last_round_s=self._totals.last_round_s,
            rounds_restarted=self._totals.rounds_restarted,
            stale_pushes=self._totals.stale_pushes,
        )
        complete: frozenset[str] = frozenset()
        job = self._job
        if job is not None:
            complete = job.round.complete
            status.global_step = job.round.global_step
            status.model_size_bytes = job.manifest.size_bytes
            status.manifest_id = job.manifest.id
            status.round_age_s = job.round.age_s(now_s)
            status.phase = pb.PHASE_AVERAGING if job.round.under_way else pb.PHASE_IDLE
            if job.round.under_way:
                names, unknown = self._roster.waiting_for(complete, self._policy.num_workers)
                status.waiting_for.extend(names)
                status.waiting_for_unknown = unknown
        if self._stopping:
            status.phase = pb.PHASE_STOPPING
        for worker_id, record in sorted(self._roster.records.items()):
            status.workers.add(
                worker_id=worker_id,
                is_chief=record.is_chief,
                local_step=record.local_step,
                fragments_given=0 if job is None else job.round.given(worker_id),
                waiting=worker_id in complete,
                last_seen_age_s=now_s - record.last_seen_at_s,
                nonfinite_values=record.nonfinite_values,
                pushes_counted=record.pushes_counted,
            )
        return status

    # Common to all calls

    async def _serve(self, name: str, context: _Context, body: Callable[[Call], Awaitable[_T]]) -> _T:
        """Runs one call. A fault from the table becomes its gRPC status, with the reason's name for programs."""
        call = Call(context, self._policy.stall_timeout_s)
        self._calls.add(call)
        try:
            if self._stopping:
                raise refusal(Reason.SERVER_STOPPING, _GOING_DOWN)
            return await body(call)
        except ModelAverageError as error:
            if error.reason is None:
                raise
            _log.info("%s refused: %s: %s", name, error.reason.name, error)
            await context.abort(
                grpc.StatusCode[FAULTS[error.reason].status],
                str(error)[:_MAX_MESSAGE_CHARS],
                ((REASON_METADATA_KEY, REASON_PREFIX + error.reason.name),),
            )
            raise  # never reached: abort raises
        finally:
            self._calls.discard(call)
            call.ended.set_result(None)

    def _require_job(self) -> _Job:
        if self._job is None:
            raise refusal(
                Reason.NOT_INITIALIZED,
                "there is no center yet: the chief has to initialize it, or pull and wait for it",
            )
        return self._job

    async def _read_header(self, call: Call, message_type: type[_Opening]) -> Any:
        call.expecting = True
        data = await call.read()
        message = message_type() if data is None else wire.parse(message_type, data)
        if message.WhichOneof("message") != "header":
            came = "the stream ended" if data is None else "another message came"
            raise refusal(Reason.MESSAGE_OUT_OF_ORDER, f"{came} where the header belongs; send the header first")
        return message.header

    async def _read_fragment(self, call: Call, message_type: type[_Opening]) -> tuple[int, memoryview] | None:
        data = await call.read()
        if data is None:
            return None
        fragment = wire.read_fragment(message_type, data)
        if not isinstance(fragment, tuple):
            raise refusal(Reason.MESSAGE_OUT_OF_ORDER, "another message came where a fragment belongs")
        self._totals.received_bytes += len(fragment[1])
        return fragment

    async def _send_fragment(self, call: Call, buffer: Buffer, index: int) -> None:
        data = buffer.fragment(index)
        await call.write(wire.encode_fragment(index, (data,)))
        self._totals.sent_bytes += len(data)


def _push_of(header: pb.PushHeader, manifest: Manifest) -> Push:
    """What a header says, checked against the manifest in force."""
    untouched = tuple(header.untouched_variables)
    push = Push(
        header.worker_id,
        header.incarnation,
        header.push_id,
        header.base_step,
        header.weight if header.HasField("weight") else 1.0,
        frozenset(untouched),
    )
    if header.manifest_id != manifest.id:
        raise refusal(
            Reason.MANIFEST_UNKNOWN,
            f"{push.worker_id!r} pushes manifest {header.manifest_id[:40]!r}, but {manifest.id!r} is in force; "
            "pull, and compare the variables",
        )
    if list(untouched) != sorted(push.untouched) or any(number >= len(manifest.variables) for number in untouched):
        raise refusal(
            Reason.UNTOUCHED_INVALID,
            f"untouched variables are not ascending indexes below {len(manifest.variables)}: {untouched[:10]}",
        )
    return push
