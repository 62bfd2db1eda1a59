"""One job: the round and the center that belong together, and what a pushing or pulling call does with them.

Everything runs on one event loop, so between two awaits nothing else happens: no locks. What to do is decided in
round.py; how values are stored and averaged is center.py's; what goes down is sender.py's.

All or nothing: whatever a commit needs is there before anything changes, and an event of the round that fails in the
middle starts the round over. If even that fails, the process ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from modelaverage import wire
from modelaverage.codecs import RAW, codec_named
from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.manifest import Manifest
from modelaverage.missing import Missing
from modelaverage.names import MAX_NAMES, listed, shown
from modelaverage.outcome import Outcome
from modelaverage.runtime.data_sockets import NUMBER
from modelaverage.runtime.logs import event
from modelaverage.runtime.shared_memory import Segment
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Buffer, Reader
from ps_server.center.center import Center, Finish
from ps_server.center.sums import Contribution
from ps_server.checkpoints.keeper import Keeper
from ps_server.checkpoints.reading import Checkpoint
from ps_server.flow.call import Call
from ps_server.flow.part import Average, Part, push_of
from ps_server.flow.sender import Sender
from ps_server.machine.reserve import Reserve
from ps_server.machine.trouble import describe, end_process, is_expected
from ps_server.rules.decisions import (
    Admit,
    CenterFollows,
    Decision,
    Dismiss,
    FinishFragment,
    Hold,
    Prepare,
    Push,
    Restart,
    TimeOut,
)
from ps_server.rules.round import Round, check_fragment_order
from ps_server.seen.missing import missing_of
from ps_server.seen.observations import Observations, Sending
from ps_server.seen.remarks import Remarks
from ps_server.seen.roster import Roster
from ps_server.transports.data_port import DataConnection, DataPort

__all__ = ["Job"]

_log = logging.getLogger("ps_server")
# A round that waits says so after this time, then after twice as long, and so on.
_FIRST_NOTICE_S = 5.0


class Job:
    """What there is once the chief has initialized the center.

    Args:
        center: the center variables.
        pull_header: what opens a pulled center.
        round_: the ledger; nobody has pushed yet.
        roster: where to note what workers do.
        clock: seconds, monotonic.
        keeper: what keeps the center on disk; None: nothing.
        observations: where to note what rounds take.
        data_port: where workers may open data connections.
        reserve: tells whether there are descriptors for workers' memory and connections.
        die: ends the process, with a line that says why; for a state that nobody can be sure of.
    """

    def __init__(
        self,
        center: Center,
        pull_header: wire.PullHeader,
        round_: Round,
        roster: Roster,
        clock: Callable[[], float],
        keeper: Keeper | None,
        observations: Observations,
        data_port: DataPort,
        reserve: Reserve,
        die: Callable[[str], None] = end_process,
    ) -> None:
        self.center = center
        self.round = round_
        self.rounds_restarted = self.rounds_without_all = 0
        self.stale_pushes = 0
        self.last_round_s = 0.0
        self._pull_header = pull_header
        self._average = Average(center.next)
        self._parts: dict[int, Part] = {}  # by the number of the call, as the round names its streams
        self._lent: dict[str, tuple[bytes, Segment]] = {}  # by worker: its incarnation, its contribution memory
        self._roster = roster
        self._clock = clock
        self._keeper = keeper
        self._observations = observations
        self._data_port = data_port
        self._reserve = reserve
        self._die = die
        self._remarks = Remarks(roster)
        self._keeping = asyncio.Lock()
        self._kept_finished: frozenset[str] | None = None  # what the newest checkpoint says
        self._sender = Sender(self.manifest, observations, data_port)
        self._writing: asyncio.Task[None] | None = None  # a checkpoint on its way to the disk
        self._committing: asyncio.Task[None] | None = None  # a prepared round that waits for it
        self._prepared = 0  # how many rounds have waited so
        self._void: asyncio.Task[None] | None = None  # writes the checkpoint of a round that was started over meanwhile
        self._timer: asyncio.TimerHandle | None = None
        self._notice_timer: asyncio.TimerHandle | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest in force."""
        return self.center.manifest

    def fail_pushes(self, error: ModelAverageError) -> None:
        """Ends the pushes of the round in progress."""
        for stream, part in list(self._parts.items()):
            if self.round.holds(stream):
                part.call.fail(error)

    async def keep(self) -> None:
        """Writes a checkpoint of the center as it is, and of who has finished, unless there is one.

        Returns when it outlives the process, or cannot be written."""
        keeper = self._keeper
        if keeper is None:
            return
        async with self._keeping:  # who waits here finds that the checkpoint before has it
            if self._committing is not None:
                await asyncio.wait((self._committing,))
            round_ = self.round
            if (keeper.step, self._kept_finished) == (round_.global_step, round_.finished):
                return
            state = round_.global_step, round_.contributors, round_.counted
            # A round that is due for a checkpoint meanwhile waits for this one first.
            writing = self._void = self._write(keeper, self.center.current, *state)
            await asyncio.wait((writing,))
            if self._void is writing:
                self._void = None

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """A worker's process goes."""
        self._data_port.leave(worker_id, incarnation)
        with self._as_a_whole():
            self._apply(self.round.leave(worker_id, incarnation, self._clock()))
            self._remarks.left(worker_id, self.round.policy.is_strict)

    async def finish(self, worker_id: str, incarnation: bytes) -> None:
        """A worker has finished, and its process goes. Returns when a checkpoint has it, if any are written, or has
        taken longer than it may."""
        self._data_port.leave(worker_id, incarnation)
        with self._as_a_whole():
            self._apply(self.round.finish(worker_id, incarnation, self._clock()))
            if worker_id in self.round.finished:
                record = self._roster.heard_of(worker_id, self._clock())
                self._remarks.finished(worker_id, record, self.round.global_step, self.round.training)
        if self._keeper is not None:
            keeping = asyncio.ensure_future(self.keep())
            await asyncio.wait((keeping,), timeout=self._keeper.timeout_s)

    def come_back(self, worker_id: str) -> None:
        """A worker is going to push."""
        had_finished, is_new_run = worker_id in self.round.finished, self.round.job_is_over
        self.round.come_back(worker_id)
        self._note_return(worker_id, had_finished, is_new_run)

    def _note_return(self, worker_id: str, had_finished: bool, is_new_run: bool) -> None:
        if is_new_run:
            self._remarks.new_run()
        if had_finished:
            self._remarks.came_back(worker_id, self.round.training)

    @property
    def connected_workers(self) -> int:
        """How many workers have a push open."""
        return len({part.worker_id for part in self._parts.values()})

    def missing(self) -> Missing:
        """Whom the round waits for."""
        named, unnamed = self.round.waits_for
        others = self.round.complete | self.round.finished
        return missing_of(named, unnamed, others, self.round.contributors, self._roster, self._clock())

    async def send_pulled(self, call: Call, request: pb.PullRequest) -> None:
        """Answers a pull: header, then every fragment that is wanted, all of one step."""
        header = self._pull_header.encode(self.round.global_step, self.round.policy.num_workers)
        count = 0 if request.header_only else self.manifest.fragment_count
        first = request.first_fragment if request.continued_step == self.round.global_step else 0
        buffer, reader = self.center.current, Reader(self._clock(), call.fail)
        with self.center.reading(buffer, reader):
            await self._sender.send_buffer(call, header, buffer, reader, range(first, count), RAW)

    async def take_part(self, call: Call, header: pb.PushHeader) -> None:
        """Answers a push, from its header to its outcome."""
        push, codec = push_of(header, self.manifest), codec_named(header.codec)
        part = self._parts[call.number] = Part(
            call,
            push.worker_id,
            push.incarnation,
            self._average,
            Reader(self._clock(), call.fail),
            header.fragments_follow or header.uses_data_connection,
            header.accepts_runs,
            codec,
        )
        try:
            if header.uses_data_connection:
                part.connection = self._data_port.take(push.worker_id, push.incarnation)
            match self._open(part, push, header):
                case CenterFollows(outcome):
                    await self._send_center(part, outcome)
                case Hold():
                    part.held, call.expecting = True, False
                    while part.held:
                        part.progress.clear()
                        await part.progress.wait()
                    await self._send_center(part, Outcome.STALE)
                case Admit(first_needed):
                    part.contribution = self._lend(push) if header.accepts_shared_memory else None
                    wanted = header.accepts_data_connection and not call.peer.startswith("unix")
                    if wanted and not self._reserve.is_short:
                        part.offer = self._data_port.offer(push.worker_id, push.incarnation)
                    unneeded = first_needed if part.follows else 0
                    if part.connection is None:
                        receiving = self._receive_push(part, unneeded)
                    else:
                        receiving = self._receive_bytes(part, part.connection, push.push_id, unneeded)
                    with self.center.reading(part.average.buffer, part.reader):
                        await call.run(self._sender.send_average(part, first_needed), beside=receiving)
        finally:
            # Before anything that may fail: from here on nobody answers this push.
            del self._parts[call.number]
            try:
                if part.connection is not None:  # nobody knows what is still in it
                    part.connection.close()
            finally:
                self._close(part)

    def _open(self, part: Part, push: Push, header: pb.PushHeader) -> Decision | None:
        """The header of a push came: what the round says to it."""
        with self._as_a_whole():
            had_finished, is_new_run = push.worker_id in self.round.finished, self.round.job_is_over
            decisions = self.round.open(part.call.number, push, self._clock())
            record = self._roster.heard_push_of(push.worker_id, self._clock())
            record.note_push(header, part.call.peer)
            self._note_return(push.worker_id, had_finished, is_new_run)
            self._remarks.interval(push.worker_id, header.interval_steps)
            self._observations.pushes_retried += record.is_retry(push.key)
            return self._apply(decisions, part)

    def _close(self, part: Part) -> None:
        """The call of a push has ended, in whatever way."""
        with self._as_a_whole():
            self._apply(self.round.close(part.call.number, self._clock()))
            self._observations.ended(part.call.number, self.round.under_way, self._clock())
            if part.sending is not None:
                self._observations.answered(part.sending, part.call.number, self._clock())

    async def _receive_push(self, part: Part, unneeded: int) -> None:
        """Adds fragments to the average until the client half-closes; ignores those below ``unneeded``."""
        while (fragment := await part.call.read_fragment(pb.PushAndAverageRequest)) is not None:
            with self._as_a_whole():
                if isinstance(fragment, tuple):
                    decisions = self._take_inline(part, *fragment, unneeded)
                else:
                    decisions = self._take_shared(part, fragment)
                self._apply(decisions)
        self.round.check_complete(part.call.number)

    async def _receive_bytes(self, part: Part, connection: DataConnection, push_id: int, unneeded: int) -> None:
        """As `_receive_push`, from a data connection."""
        connection.begin()
        number = bytearray(NUMBER.size)
        await part.call.read_bytes(connection, memoryview(number))
        if NUMBER.unpack(number) != (push_id,):
            raise refusal(Reason.DATA_CONNECTION_LOST, "the bytes on the data connection are another push's")
        room = memoryview(bytearray(part.codec.max_size_bytes(self.manifest)))
        for index in range(self.manifest.fragment_count):
            data = room[: part.codec.size_bytes(self.manifest, index)]
            await part.call.read_bytes(connection, data)
            part.call.count(received_bytes=len(data))
            if index >= unneeded:
                with self._as_a_whole():
                    self._apply(self._add(part, index, data))
        part.is_drained = True
        self.round.check_complete(part.call.number)

    def _take_inline(self, part: Part, first: int, data: memoryview, unneeded: int) -> list[Decision]:
        # All or nothing: what is recorded has consequences.
        if first >= unneeded:
            self.round.check_fragment(part.call.number, first)
        decisions = list[Decision]()
        for index, values in part.codec.split_run(self.manifest, first, data):
            if index < unneeded:
                continue
            decisions += self._add(part, index, values)
        return decisions

    def _add(self, part: Part, index: int, values: memoryview) -> list[Decision]:
        """Adds one fragment, whose size is right, to the average."""
        weight, is_first = self.round.check_fragment(part.call.number, index)
        contribution = Contribution(part.worker_id, weight, values, part.codec)
        with self._averaging():
            self._roster.note_nonfinite(self.center.accumulate(index, contribution, is_first))
        return self._record(part, index)

    def _take_shared(self, part: Part, fragments: pb.SharedFragments) -> list[Decision]:
        if part.contribution is None or fragments.count == 0:
            raise refusal(Reason.MESSAGE_OUT_OF_ORDER, "no memory was lent to this push, or no fragments are named")
        # All or nothing: what is recorded has consequences.
        end = fragments.first + fragments.count
        self.round.check_fragment(part.call.number, fragments.first)
        check_fragment_order(end - 1, min(end, self.manifest.fragment_count) - 1, self.manifest.fragment_count)
        part.shared = True
        decisions = list[Decision]()
        for index in range(fragments.first, end):
            weight, first = self.round.check_fragment(part.call.number, index)
            begin, stop = self.manifest.fragment_bounds(index)
            data = part.contribution.body[begin:stop].data
            contribution = Contribution(part.worker_id, weight, data)
            with self._averaging():
                self._roster.note_nonfinite(self.center.defer(index, contribution, first))
            decisions += self._record(part, index)
            part.call.count(received_bytes=stop - begin, shared=True)
        return decisions

    def _record(self, part: Part, index: int) -> list[Decision]:
        part.call.expecting = index + 1 < self.manifest.fragment_count
        now_s = self._clock()
        record = self._roster.heard_push_of(part.worker_id, now_s)
        self._observations.fragments_received += 1
        if not part.call.expecting:
            record.transport = part.transport
            self._observations.whole(part.call.number, part.worker_id, now_s)
        return self.round.record_fragment(part.call.number, now_s)

    def _observe_admission(self, part: Part, first_needed: int) -> None:
        stream, owes, now_s = part.call.number, first_needed < self.manifest.fragment_count, self._clock()
        self._observations.admitted(stream, owes, now_s)
        if not owes:
            self._observations.whole(stream, part.worker_id, now_s)

    @contextmanager
    def _averaging(self) -> Iterator[None]:
        from_s = self._clock()
        yield
        self._observations.averaged(from_s, self._clock())

    def _lend(self, push: Push) -> Segment | None:
        """Memory for this worker's contribution: a process keeps what it got; a later one gets its own."""
        if self.center.current.segment is None or self._reserve.is_short:
            return None
        incarnation, segment = self._lent.get(push.worker_id, (b"", None))
        if segment is None or incarnation != push.incarnation:
            size_bytes = self.manifest.buffer_size_bytes
            try:
                segment = Segment.create(size_bytes, for_clients_to_write=True)
            except (OSError, MemoryError) as error:
                _log.warning(
                    "no shared memory for %r: %s; its fragments come inline",
                    push.worker_id,
                    error,
                    extra=event("no_shared_memory", worker=push.worker_id),
                )
                return None
            self._lent.pop(push.worker_id, None)
            self._lent[push.worker_id] = push.incarnation, segment
            if len(self._lent) > self.round.policy.max_workers:  # names come from outside, memory must not
                del self._lent[next(iter(self._lent))]
        return segment

    async def _send_center(self, part: Part, outcome: Outcome) -> None:
        """Answers a push that is not in the round: the present center, whole, and why."""
        part.call.expecting = False
        self.stale_pushes += outcome is Outcome.STALE
        buffer, step, contributors = self.center.current, self.round.global_step, self.round.contributors
        with self.center.reading(buffer, part.reader):
            await self._sender.send_center(part, buffer, outcome, step, contributors)

    # All or nothing.

    @contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """An event of the round happens as a whole: a refusal has changed nothing, any other failure starts the round
        over.

        Raises:
            ModelAverageError: the refusal, or SERVER_OVERLOADED.
        """
        try:
            yield
        except ModelAverageError:
            raise
        except BaseException as error:
            self._start_over(error)
            if not isinstance(error, Exception):
                raise
            raise refusal(Reason.SERVER_OVERLOADED, f"the server failed ({describe(error)}); push again") from error

    def _start_over(self, error: BaseException) -> None:
        """Something that nobody expected broke off an event of the round: nobody knows what of it has happened."""
        cause, step = describe(error), self.round.global_step
        try:
            self.round.abandon()
            self.center.restart()
            self._roster.take_nonfinite()
            self._average = Average(self.center.next)
            self._committing = None
            if self._writing is not None and not self._writing.done():
                self._void = self._writing
            told = refusal(Reason.SERVER_OVERLOADED, f"round {step} starts over, because the server failed: {cause}")
            for part in list(self._parts.values()):
                if part.outcome is None:
                    part.call.fail(told)
                else:  # how its round ended is known, but perhaps it has not been woken up
                    part.progress.set()
            self._set_timers()
        except BaseException as second:
            self._die(f"round {step} failed ({cause}), and could not be started over ({describe(second)})")
            raise
        self.rounds_restarted += 1
        self._observations.started_over()
        why = event("round_restarted", round=step, cause=cause)
        trace = None if is_expected(error) else error
        _log.error("round %d starts over, because the server failed: %s", step, cause, extra=why, exc_info=trace)

    def _apply(self, decisions: Sequence[Decision], part: Part | None = None) -> Decision | None:
        """Carries out what the round decided; the answer to the header of ``part``, if it is one of an `open`."""
        answer: Decision | None = None
        finished = list[FinishFragment]()
        for decision in decisions:
            match decision:
                case FinishFragment():
                    finished.append(decision)
                    continue
                case Admit():
                    assert part is not None
                    answer, part.average = decision, self._average
                    self._observe_admission(part, decision.first_needed)
                case CenterFollows() | Hold():
                    answer = decision
                case Dismiss(stream, error):
                    self._parts[stream].call.fail(error)
                case Restart(cause):
                    self.center.restart()
                    self._roster.take_nonfinite()
                    self._average = Average(self.center.next)
                    self.rounds_restarted += 1
                    self._observations.started_over()
                    step = self.round.global_step
                    why = event("round_restarted", round=step, cause=cause)
                    _log.warning("round %d starts over: %s", step, cause, extra=why)
                case TimeOut(streams, waited_s):
                    self._time_out(streams, waited_s)
                case Prepare(global_step):
                    self._finish(finished)
                    finished = []
                    self._prepare(global_step)
        self._finish(finished)
        self._set_timers()
        return answer

    def _finish(self, fragments: list[FinishFragment]) -> None:
        if fragments:
            finishes = [Finish(each.index, each.total_weight, each.untouched) for each in fragments]
            with self._averaging():
                self._roster.note_nonfinite(self.center.finish(finishes, self.round.global_step))
            self._average.finished = fragments[-1].index + 1
            self._wake(self._average)

    def _prepare(self, global_step: int) -> None:
        """All pushes are whole, and so is the average: it is written down first if it is due, then committed."""
        keeper = self._keeper
        if keeper is None or not (self._void or keeper.is_due(global_step)):
            self._commit()
            return
        self._prepared += 1
        self._committing = asyncio.ensure_future(self._commit_when_kept(keeper, self._prepared))

    async def _commit_when_kept(self, keeper: Keeper, number: int) -> None:
        """Commits the round when its checkpoint is written, or has taken longer than it may."""

        def is_prepared() -> bool:  # or else it has been started over meanwhile
            return self.round.prepared and self._prepared == number

        try:
            before = self._void
            if before is not None:
                await asyncio.wait((before,), timeout=keeper.timeout_s)
                if before.done() and self._void is before:
                    self._void = None
            if is_prepared() and (before is None or before.done()):
                writing = self._write(keeper, self.center.next, *self.round.as_committed())
                await asyncio.wait((writing,), timeout=keeper.timeout_s)
            if is_prepared():
                self._committing = None
                self._commit()
                self._set_timers()
        except Exception as error:
            self._start_over(error)

    def _write(
        self,
        keeper: Keeper,
        buffer: Buffer,
        global_step: int,
        contributors: tuple[str, ...],
        counted: dict[str, tuple[bytes, int]],
    ) -> asyncio.Task[None]:
        """Begins to write a checkpoint, during which the buffer stays as it is. The task never fails."""

        async def write() -> None:
            with self.center.reading(buffer, Reader(self._clock())):
                finished = self.round.finished
                checkpoint = Checkpoint(
                    self.manifest,
                    buffer.arrays,
                    global_step,
                    contributors,
                    counted,
                    finished,
                    buffer.segment,
                    self.center.outer,
                    buffer.state.arrays,
                )
                if await keeper.write(checkpoint):
                    self._kept_finished = finished

        self._writing = asyncio.ensure_future(write())
        return self._writing

    def _commit(self) -> None:
        """A prepared round is over."""
        now_s = self._clock()
        room = self.center.room(now_s)
        commit = self.center.commit(room, lambda: self.round.commit(now_s))
        nonfinite = self._roster.take_nonfinite()
        self._average = Average(self.center.next)
        common = pb.PushOutcome(
            global_step=commit.global_step,
            contributors=commit.contributors,
            untouched_variables=sorted(commit.untouched),
        )
        outcomes = dict[Part, pb.PushOutcome]()
        sending = Sending(set(commit.verdicts), now_s)
        for stream, verdict in commit.verdicts.items():
            outcome = pb.PushOutcome(outcome=pb.Outcome.Name(verdict.outcome.value), waited_s=verdict.waited_s)
            outcome.MergeFrom(common)
            part = self._parts[stream]
            outcome.nonfinite_values = nonfinite.get(part.worker_id, 0)
            outcomes[part] = outcome
        held = [self._parts[stream] for stream in commit.held]
        self._lent = {worker_id: self._lent[worker_id] for worker_id in commit.contributors if worker_id in self._lent}
        self._roster.count(self._observations.committed(commit.contributors, now_s))
        self.last_round_s = commit.round_s
        others = len(self.round.finished.difference(commit.contributors))
        self.rounds_without_all += len(commit.contributors) + others < self.round.policy.num_workers
        self._remarks.nonfinite(nonfinite, commit.contributors, commit.global_step)
        _log.debug(
            "global_step %d: averaged %s",
            commit.global_step,
            listed(commit.contributors, show=shown),
            extra=event(
                "round_committed",
                round=commit.global_step - 1,
                workers=commit.contributors[:MAX_NAMES],
                workers_omitted=max(0, len(commit.contributors) - MAX_NAMES),
                round_s=commit.round_s,
            ),
        )
        _answer(outcomes, held, sending)

    # Time.

    def _set_timers(self) -> None:
        """Wakes up when the round has something to do of itself, and when it is time to say for whom it waits."""
        due_at_s = self.round.due_at_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if due_at_s is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due_at_s - self._clock()), self._expire)
        waiting = bool(self.round.complete)
        if waiting and self._notice_timer is None:
            self._plan_notice(_FIRST_NOTICE_S)
        elif not waiting and self._notice_timer is not None:
            self._notice_timer.cancel()
            self._notice_timer = None

    def _expire(self) -> None:
        self._timer = None
        try:
            with suppress(ModelAverageError), self._as_a_whole():  # it is said
                self._apply(self.round.expire(self._clock()))
        finally:
            if self._timer is None:
                self._set_timers()

    def _time_out(self, streams: tuple[int, ...], waited_s: float) -> None:
        whom = "its checkpoint" if self.round.prepared else self.missing().text()
        error = refusal(
            Reason.ROUND_TIMED_OUT,
            f"round {self.round.global_step} waited {waited_s:g} s (--round-timeout-s) for {whom}; "
            "the push stays in the round: push again to wait on",
        )
        for stream in streams:
            self._parts[stream].call.fail(error)

    def _plan_notice(self, gap_s: float) -> None:
        self._notice_timer = asyncio.get_running_loop().call_later(gap_s, self._give_notice, gap_s)

    def _give_notice(self, gap_s: float) -> None:
        try:
            self._say_who_is_missing()
        finally:
            self._plan_notice(2 * gap_s)

    def _say_who_is_missing(self) -> None:
        missing = self.missing()
        age_s = self.round.age_s(self._clock())
        _log.warning(
            "round %d has waited %.0f s for %s",
            self.round.global_step,
            age_s,
            "its checkpoint" if self.round.prepared else missing.text(),
            extra=event(
                "round_waits",
                round=self.round.global_step,
                waited_s=age_s,
                waiting_for=missing.names,
                waiting_for_omitted=missing.omitted,
                waiting_for_unknown=missing.unknown,
            ),
        )
        notice = missing.notice(age_s, sorted(self.round.finished), self.round.training)
        for part in self._parts.values():
            if part.average is self._average:
                part.notice = notice
                part.progress.set()

    def _wake(self, average: Average) -> None:
        for part in self._parts.values():
            if part.average is average:
                part.progress.set()


def _answer(outcomes: dict[Part, pb.PushOutcome], held: list[Part], sending: Sending) -> None:
    """The commit may be known."""
    for part, outcome in outcomes.items():
        part.outcome, part.sending, part.reader.since_s = outcome, sending, sending.since_s
        part.progress.set()
    for part in held:
        part.held = False
        part.progress.set()
