"""One job: the round and the center that belong together, and what a pushing or pulling call does with them.

Everything runs on one event loop, so between two awaits nothing else happens: no locks. What to do is decided in
round.py; how values are stored and averaged is center.py's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from modelaverage import wire
from modelaverage.data_connection import NUMBER
from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.logs import event
from modelaverage.manifest import Manifest
from modelaverage.outcome import Outcome
from modelaverage.shared_memory import Segment
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.call import Call
from ps_server.center import Center, Contribution, split_run
from ps_server.checkpoint import Checkpoint
from ps_server.data_port import DataConnection, DataPort
from ps_server.decisions import (
    Admit,
    CenterFollows,
    Commit,
    Decision,
    Dismiss,
    FinishFragment,
    Hold,
    Push,
    Restart,
    TimeOut,
)
from ps_server.keeper import Keeper
from ps_server.observations import Observations, Sending
from ps_server.part import Average, Part, push_of, shared_memory_message
from ps_server.roster import Roster
from ps_server.round import Round, check_fragment_order

__all__ = ["Job"]

_log = logging.getLogger("ps_server")
# A round that waits says so after this time, then after twice as long, and so on.
_FIRST_NOTICE_S = 5.0


class Job:
    """What there is once the chief has initialized the center.

    Args:
        center: the center variables.
        round_: the ledger; nobody has pushed yet.
        roster: where to note what workers do.
        clock: seconds, monotonic.
        keeper: what keeps the center on disk; None: nothing.
        observations: where to note what rounds take.
        data_port: where workers may open data connections.
    """

    def __init__(
        self,
        center: Center,
        round_: Round,
        roster: Roster,
        clock: Callable[[], float],
        keeper: Keeper | None,
        observations: Observations,
        data_port: DataPort,
    ) -> None:
        self.center = center
        self.round = round_
        self.rounds_restarted = self.rounds_without_all = 0
        self.stale_pushes = 0
        self.last_round_s = 0.0
        self._average = Average(center.next)
        self._parts: dict[int, Part] = {}  # by the number of the call, as the round names its streams
        self._lent: dict[str, tuple[bytes, Segment]] = {}  # by worker: its incarnation, its contribution memory
        self._roster = roster
        self._clock = clock
        self._keeper = keeper
        self._observations = observations
        self._data_port = data_port
        self._kept = asyncio.Event()  # unset while a commit waits for its checkpoint: nobody hears of it before
        self._kept.set()
        self._keeping: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._notice_timer: asyncio.TimerHandle | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest in force."""
        return self.center.manifest

    def fail_unless_full(self, error: ModelAverageError) -> None:
        """Ends the pushes of the round in progress, unless all workers are there and it can finish."""
        if not self.round.full:
            for stream, part in self._parts.items():
                if self.round.holds(stream):
                    part.call.fail(error)

    async def keep(self) -> None:
        """Writes a checkpoint of the center as it is, unless there is one."""
        await self._until_kept()
        if self._keeper is not None and self._keeper.step != self.round.global_step:
            await self._write_checkpoint(self._keeper)

    async def _until_kept(self) -> None:
        while not self._kept.is_set():  # another commit may follow before this task comes to run
            await self._kept.wait()

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """A worker's process goes."""
        self._data_port.leave(worker_id, incarnation)
        self._apply(self.round.leave(worker_id, incarnation, self._clock()))

    @property
    def connected_workers(self) -> int:
        """How many workers have a push open."""
        return len({part.worker_id for part in self._parts.values()})

    def missing(self) -> tuple[list[str], int]:
        """Whom the round waits for: names of workers, sorted, and how many more."""
        names, unknown = self.round.waits_for
        if unknown == 0:
            return sorted(names), 0
        return self._roster.waiting_for(self.round.complete, len(self.round.complete) + len(names) + unknown)

    async def send_pulled(self, call: Call, header_only: bool) -> None:
        """Answers a pull: header, then every fragment if they are wanted, all of one step."""
        await self._until_kept()
        header = pb.CenterHeader(
            manifest=wire.manifest_to_message(self.manifest),
            manifest_id=self.manifest.id,
            global_step=self.round.global_step,
            num_workers=self.round.policy.num_workers,
        )
        with self.center.current.reading() as buffer:
            await call.write(pb.PullResponse(header=header).SerializeToString())
            for index in range(0 if header_only else self.manifest.fragment_count):
                await call.write_fragment(index, buffer.fragment(index))

    async def take_part(self, call: Call, header: pb.PushHeader) -> None:
        """Answers a push, from its header to its outcome."""
        push = push_of(header, self.manifest)
        part = self._parts[call.number] = Part(
            call,
            push.worker_id,
            push.incarnation,
            self._average,
            header.fragments_follow or header.uses_data_connection,
            header.accepts_runs,
        )
        try:
            if header.uses_data_connection:
                part.connection = self._data_port.take(push.worker_id, push.incarnation)
            decisions = self.round.open(call.number, push, self._clock())
            record = self._roster.heard_of(push.worker_id, self._clock())
            record.note_push(header, call.peer)
            self._observations.pushes_retried += record.is_retry(push.key)
            answer = self._apply(decisions, part)
            match answer:
                case CenterFollows(outcome):
                    await self._send_center(call, outcome)
                case Hold():
                    part.held, call.expecting = True, False
                    while part.held:
                        part.progress.clear()
                        await part.progress.wait()
                    await self._send_center(call, Outcome.STALE)
                case Admit(first_needed):
                    part.contribution = self._lend(push) if header.accepts_shared_memory else None
                    if header.accepts_data_connection and not call.peer.startswith("unix"):
                        part.offer = self._data_port.offer(push.worker_id, push.incarnation)
                    unneeded = first_needed if part.follows else 0
                    if part.connection is None:
                        receiving = self._receive_push(part, unneeded)
                    else:
                        receiving = self._receive_bytes(part, part.connection, push.push_id, unneeded)
                    with part.average.buffer.reading():
                        await call.run(self._send_average(part, first_needed), beside=receiving)
        finally:
            if part.connection is not None:  # nobody knows what is still in it
                part.connection.close()
            del self._parts[call.number]
            self._apply(self.round.close(call.number, self._clock()))
            self._observations.ended(call.number, self.round.under_way, self._clock())
            if part.sending is not None:
                self._observations.answered(part.sending, call.number, self._clock())

    async def _receive_push(self, part: Part, unneeded: int) -> None:
        """Adds fragments to the average until the client half-closes; ignores those below ``unneeded``."""
        while (fragment := await part.call.read_fragment(pb.PushAndAverageRequest)) is not None:
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
        room = memoryview(bytearray(self.manifest.fragment_size_bytes))
        for index in range(self.manifest.fragment_count):
            begin, stop = self.manifest.fragment_bounds(index)
            data = room[: stop - begin]
            await part.call.read_bytes(connection, data)
            part.call.count(received_bytes=len(data))
            if index >= unneeded:
                self._apply(self._add(part, index, data))
        part.is_drained = True
        self.round.check_complete(part.call.number)

    def _take_inline(self, part: Part, first: int, data: memoryview, unneeded: int) -> list[Decision]:
        # All or nothing: what is recorded has consequences.
        if first >= unneeded:
            self.round.check_fragment(part.call.number, first)
        decisions = list[Decision]()
        for index, values in split_run(self.manifest, first, data):
            if index < unneeded:
                continue
            decisions += self._add(part, index, values)
        return decisions

    def _add(self, part: Part, index: int, values: memoryview) -> list[Decision]:
        """Adds one fragment, whose size is right, to the average."""
        weight, is_first = self.round.check_fragment(part.call.number, index)
        contribution = Contribution(part.worker_id, weight, values)
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
        record = self._roster.heard_of(part.worker_id, now_s)
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

    async def _send_average(self, part: Part, first_needed: int) -> None:
        """Sends each fragment of the average once it is finished, then the outcome."""
        part.call.expecting = first_needed < self.manifest.fragment_count
        admission = pb.PushAdmission(first_needed_fragment=first_needed)
        if part.contribution is not None and part.average.buffer.segment is not None:
            admission.contribution.CopyFrom(shared_memory_message(part.contribution))
            admission.average.CopyFrom(shared_memory_message(part.average.buffer.segment))
        if part.offer is not None:
            admission.data_connection.CopyFrom(part.offer)
        message = pb.PushAndAverageResponse(admission=admission).SerializeToString()
        if not part.follows:
            await part.call.write(message)
            message = b""
        sent = 0
        while True:
            part.progress.clear()
            while sent < part.average.finished:
                first, sent = sent, self._end_of_run(part, sent)
                if part.connection is not None:
                    await part.call.write_bytes(part.connection, part.average.buffer.fragments(first, sent))
                    continue
                message += self._naming(first, sent) if part.shared else part.average.message(first, sent)
                if sent < self.manifest.fragment_count:
                    await part.call.write(message)
                    message = b""
            if part.notice is not None:
                message += pb.PushAndAverageResponse(waiting=part.notice).SerializeToString()
                part.notice = None
                await part.call.write(message)
                message = b""
                continue
            if part.outcome is not None:
                # Now, for as soon as the client has the outcome it may push again.
                if part.is_drained and part.outcome.outcome == pb.OUTCOME_COMMITTED:
                    self._give_back(part)
                # Messages that stand one after the other are read as one.
                await part.call.write(message + pb.PushAndAverageResponse(outcome=part.outcome).SerializeToString())
                return
            await part.progress.wait()

    def _give_back(self, part: Part) -> None:
        """The data connection of this push is ready for the next."""
        assert part.connection is not None
        self._data_port.give_back(part.worker_id, part.incarnation, part.connection)
        part.connection = None

    def _end_of_run(self, part: Part, first: int) -> int:
        """The fragment after those that go at once of what is finished from ``first`` on: in shared memory all of it,
        else a run, or one fragment."""
        if part.shared:
            end = part.average.finished
        elif part.runs:
            # Runs end at multiples of the longest one, so that workers that keep pace are sent the same ones.
            longest = self.manifest.longest_run
            end = min(part.average.finished, (first // longest + 1) * longest)
        else:
            end = first + 1
        begin, stop = self.manifest.fragment_bounds(first)[0], self.manifest.fragment_bounds(end - 1)[1]
        part.call.count(sent_bytes=stop - begin, shared=part.shared)
        self._observations.fragments_sent += end - first
        return end

    @staticmethod
    def _naming(first: int, end: int) -> bytes:
        shared = pb.SharedFragments(first=first, count=end - first)
        return pb.PushAndAverageResponse(shared=shared).SerializeToString()

    def _lend(self, push: Push) -> Segment | None:
        """Memory for this worker's contribution: a process keeps what it got; a later one gets its own."""
        if self.center.current.segment is None:
            return None
        incarnation, segment = self._lent.get(push.worker_id, (b"", None))
        if segment is None or incarnation != push.incarnation:
            try:
                segment = Segment.create(self.manifest.buffer_size_bytes, for_clients_to_write=True)
            except OSError as error:
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

    async def _send_center(self, call: Call, outcome: Outcome) -> None:
        """Answers a push that is not in the round: the present center, whole, and why."""
        await self._until_kept()
        count = self.manifest.fragment_count
        admission = pb.PushAdmission(first_needed_fragment=count)
        last_word = pb.PushOutcome(
            outcome=pb.Outcome.Name(outcome.value),
            global_step=self.round.global_step,
            contributors=self.round.contributors,
        )
        call.expecting = False
        if outcome is Outcome.STALE:
            self.stale_pushes += 1
        with self.center.current.reading() as buffer:
            await call.write(pb.PushAndAverageResponse(admission=admission).SerializeToString())
            for index in range(count):
                await call.write_fragment(index, buffer.fragment(index))
            await call.write(pb.PushAndAverageResponse(outcome=last_word).SerializeToString())

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
                    self._average = Average(self.center.next)
                    self.rounds_restarted += 1
                    self._observations.started_over()
                    step = self.round.global_step
                    why = event("round_restarted", round=step, cause=cause)
                    _log.warning("round %d starts over: %s", step, cause, extra=why)
                case TimeOut(streams, waited_s):
                    self._time_out(streams, waited_s)
                case Commit():
                    self._finish(finished)
                    finished = []
                    self._commit(decision)
        self._finish(finished)
        self._set_timers()
        return answer

    def _finish(self, fragments: list[FinishFragment]) -> None:
        if fragments:
            with self._averaging():
                self._roster.note_nonfinite(self.center.finish(fragments))
            self._average.finished = fragments[-1].index + 1
            self._wake(self._average)

    def _commit(self, commit: Commit) -> None:
        self.center.commit()
        common = pb.PushOutcome(
            global_step=commit.global_step,
            contributors=commit.contributors,
            untouched_variables=sorted(commit.untouched),
        )
        outcomes = dict[Part, pb.PushOutcome]()
        sending = Sending(set(commit.verdicts))
        for stream, verdict in commit.verdicts.items():
            outcome = pb.PushOutcome(outcome=pb.Outcome.Name(verdict.outcome.value), waited_s=verdict.waited_s)
            outcome.MergeFrom(common)
            part = self._parts[stream]
            outcomes[part], part.sending = outcome, sending
        held = [self._parts[stream] for stream in commit.held]
        self._average = Average(self.center.next)
        self._lent = {worker_id: self._lent[worker_id] for worker_id in commit.contributors if worker_id in self._lent}
        self._roster.count(self._observations.committed(commit.contributors, self._clock()))
        self.last_round_s = commit.round_s
        self.rounds_without_all += len(commit.contributors) < self.round.policy.num_workers
        _log.debug(
            "global_step %d: averaged %s",
            commit.global_step,
            ", ".join(w if w.isprintable() else repr(w) for w in commit.contributors),
            extra=event(
                "round_committed", round=commit.global_step - 1, workers=commit.contributors, round_s=commit.round_s
            ),
        )
        if self._keeper is None or not self._keeper.is_due(commit.global_step):
            sending.since_s = self._clock()
            _answer(outcomes, held)
        else:
            self._kept.clear()
            self._keeping = asyncio.ensure_future(self._keep_then_answer(self._keeper, outcomes, held, sending))

    async def _keep_then_answer(
        self, keeper: Keeper, outcomes: dict[Part, pb.PushOutcome], held: list[Part], sending: Sending
    ) -> None:
        try:
            await self._write_checkpoint(keeper)
        finally:
            self._kept.set()
            sending.since_s = self._clock()
            _answer(outcomes, held)

    async def _write_checkpoint(self, keeper: Keeper) -> None:
        with self.center.current.reading() as buffer:
            await keeper.write(
                Checkpoint(
                    self.manifest,
                    buffer.arrays,
                    self.round.global_step,
                    self.round.contributors,
                    dict(self.round.counted),
                    buffer.segment,
                )
            )

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
        self._apply(self.round.expire(self._clock()))

    def _time_out(self, streams: tuple[int, ...], waited_s: float) -> None:
        error = refusal(
            Reason.ROUND_TIMED_OUT,
            f"round {self.round.global_step} waited {waited_s:g} s (--round-timeout-s) for {self._missing_text()}; "
            "the push stays in the round: push again to wait on",
        )
        for stream in streams:
            self._parts[stream].call.fail(error)

    def _plan_notice(self, gap_s: float) -> None:
        self._notice_timer = asyncio.get_running_loop().call_later(gap_s, self._give_notice, gap_s)

    def _give_notice(self, gap_s: float) -> None:
        names, unknown = self.missing()
        age_s = self.round.age_s(self._clock())
        _log.warning(
            "round %d has waited %.0f s for %s",
            self.round.global_step,
            age_s,
            self._missing_text(),
            extra=event(
                "round_waits",
                round=self.round.global_step,
                waited_s=age_s,
                waiting_for=names,
                waiting_for_unknown=unknown,
            ),
        )
        for part in self._parts.values():
            if part.average is self._average:
                part.notice = pb.WaitingNotice(waiting_for=names, waiting_for_unknown=unknown, round_age_s=age_s)
                part.progress.set()
        self._plan_notice(2 * gap_s)

    def _missing_text(self) -> str:
        names, unknown = self.missing()
        return ", ".join([*map(repr, names), *([f"{unknown} not heard of yet"] if unknown else [])]) or "nobody"

    def _wake(self, average: Average) -> None:
        for part in self._parts.values():
            if part.average is average:
                part.progress.set()


def _answer(outcomes: dict[Part, pb.PushOutcome], held: list[Part]) -> None:
    """The commit may be known."""
    for part, outcome in outcomes.items():
        part.outcome = outcome
        part.progress.set()
    for part in held:
        part.held = False
        part.progress.set()
