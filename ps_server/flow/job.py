"""One job: a round and its center, and how pushing and pulling calls use them.

Everything runs on one event loop, so nothing else runs between two awaits: no locks. The round decides, the center
stores and averages values, and this module carries out the decisions.

Events of the round are atomic. A commit allocates all that it needs before anything changes. An event that fails
halfway starts the round over; if that fails too, the process ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from modelaverage import wire
from modelaverage.codecs import RAW, Codec
from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.logs import event
from modelaverage.manifest import Manifest
from modelaverage.missing import Missing
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Buffer, Reader
from ps_server.center.center import Center, Finish
from ps_server.center.sums import Contribution
from ps_server.checkpoints.keeper import Keeper
from ps_server.flow.average import Average
from ps_server.flow.naming import chosen_of
from ps_server.flow.open_push import OpenPush
from ps_server.flow.outcomes import log_commit, outcomes_of, tell
from ps_server.flow.timers import RoundTimers, log_wait
from ps_server.flow.witness import Witness
from ps_server.flow.writes import Writes
from ps_server.machine.trouble import describe, end_process, is_expected
from ps_server.rules.decisions import (
    Accumulate,
    Addition,
    Admit,
    CenterFollows,
    Decision,
    Dismiss,
    FinishFragment,
    Hold,
    KeepFirst,
    Prepare,
    Push,
    Restart,
    TimeOut,
)
from ps_server.rules.round import Round
from ps_server.seen.history import History
from ps_server.seen.marks import MarkKind
from ps_server.seen.missing import missing_of
from ps_server.seen.observations import Observations, Sending
from ps_server.seen.remarks import Remarks
from ps_server.seen.roster import Roster
from ps_server.seen.snapshot import JobSeen
from ps_server.transports.base import Run, Transport

__all__ = ["Job", "Surroundings"]

_log = logging.getLogger("ps_server")


@dataclass(frozen=True)
class Surroundings:
    """The services of the server that a job uses.

    Args:
        roster: records what workers do.
        observations: records how long rounds take.
        history: records each round.
        transports: are told which workers have left and which were in a round.
        keeper: keeps the center on disk; None: no checkpoints.
        clock: seconds, monotonic.
        first_notice_s: a waiting round logs a notice after this time, then after twice as long, and so on.
        die: ends the process after logging a line with the cause; for a state that cannot be repaired.
    """

    roster: Roster
    observations: Observations
    history: History
    transports: Sequence[Transport] = ()
    keeper: Keeper | None = None
    clock: Callable[[], float] = time.monotonic
    first_notice_s: float = 5.0
    die: Callable[[str], None] = end_process


class Job:
    """The state that exists once the chief has initialized the center.

    Args:
        center: the center variables.
        pull_header: the header of the answer to a pull.
        round_: the ledger, without pushes.
        around: the services of the server.
    """

    def __init__(self, center: Center, pull_header: wire.PullHeader, round_: Round, around: Surroundings) -> None:
        self.center = center
        self.chosen = chosen_of(center.outer, center.codec)
        self.pull_header = pull_header
        self._witness = Witness(round_, around.roster, around.observations, around.history, around.clock)
        self.round = round_
        self.average = Average(center.next)
        self.observations = around.observations
        self.clock = around.clock
        self._pushes: dict[int, OpenPush] = {}  # by call number, which names the stream in the round
        self._roster = around.roster
        self._transports = around.transports
        self._die = around.die
        self._remarks = Remarks(around.roster)
        self._writes: Writes | None = None
        if around.keeper is not None:
            self._writes = Writes(around.keeper, center, round_, around.clock, self._kept)
        self._timers = RoundTimers(self.clock, self._expire, self._say_who_is_missing, around.first_notice_s)

    @property
    def manifest(self) -> Manifest:
        """The current manifest."""
        return self.center.manifest

    def fail_pushes(self, error: ModelAverageError) -> None:
        """Ends the pushes of the round in progress."""
        for stream, push in list(self._pushes.items()):
            if self.round.holds(stream):
                push.call.fail(error)

    async def keep(self) -> None:
        """Writes a checkpoint of the current center and the finished workers, unless one exists.

        Returns when the checkpoint outlives the process or cannot be written."""
        if self._writes is not None:
            await self._writes.keep()

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """A worker's process leaves."""
        self._leave_transports(worker_id, incarnation)
        with self._as_a_whole():
            self._apply(self.round.leave(worker_id, incarnation, self.clock()))
            self._witness.may_be_gone(worker_id)
            if self._remarks.left(worker_id, self.round.policy.is_strict):
                self._witness.mark(MarkKind.LEFT, worker_id)

    async def finish(self, worker_id: str, incarnation: bytes) -> None:
        """A worker has finished and its process ends. With checkpoints, returns when one records this, or after the
        checkpoint timeout."""
        self._leave_transports(worker_id, incarnation)
        with self._as_a_whole():
            self._apply(self.round.finish(worker_id, incarnation, self.clock()))
            self._witness.may_be_gone(worker_id)
            if worker_id in self.round.finished:
                record = self._roster.heard_of(worker_id, self.clock())
                if not record.has_finished:
                    self._witness.mark(MarkKind.FINISHED, worker_id)
                self._remarks.finished(worker_id, record, self.round.global_step, self.round.training)
        if self._writes is not None:
            keeping = asyncio.ensure_future(self._writes.keep())
            await asyncio.wait((keeping,), timeout=self._writes.timeout_s)

    def come_back(self, worker_id: str) -> None:
        """A worker is about to push."""
        had_finished, is_new_run = worker_id in self.round.finished, self.round.job_is_over
        self.round.come_back(worker_id)
        self._note_return(worker_id, had_finished, is_new_run)

    def _note_return(self, worker_id: str, had_finished: bool, is_new_run: bool) -> None:
        if is_new_run:
            self._remarks.new_run()
        if had_finished:
            self._remarks.came_back(worker_id, self.round.training)

    def missing(self) -> Missing:
        """The workers that the round waits for."""
        named, unnamed = self.round.waits_for
        others = self.round.complete | self.round.finished
        return missing_of(named, unnamed, others, self.round.contributors, self._roster, self.clock())

    def seen(self) -> JobSeen:
        """The job's part of the status."""
        round_ = self.round
        return JobSeen(
            manifest=self.manifest,
            global_step=round_.global_step,
            workers_finished=len(round_.finished),
            is_over=round_.job_is_over,
            connected_workers=len({push.worker_id for push in self._pushes.values()}),
            round_age_s=round_.age_s(self.clock()),
            missing=self.missing() if round_.under_way else None,
            complete=round_.complete,
            given=round_.given,
            chosen=self.chosen.told,
        )

    # Readers.

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[tuple[Buffer, int]]:
        """The current center and its step. The buffer does not change inside the context."""
        buffer = self.center.current
        with self.center.reading(buffer, reader):
            yield buffer, self.round.global_step

    @contextmanager
    def reading_center(self, push: OpenPush, outcome: Outcome) -> Iterator[tuple[Buffer, int, tuple[str, ...]]]:
        """The current center, its step and contributors, for a push that is not in the round."""
        if outcome is Outcome.STALE:
            self._witness.was_stale(push)
        contributors = self.round.contributors
        with self.reading(push.reader) as (buffer, step):
            yield buffer, step, contributors

    # Pushes.

    @contextmanager
    def attending(self, push: OpenPush) -> Iterator[None]:
        """Keeps the push registered inside the context."""
        number = push.call.number
        self._pushes[number] = push
        try:
            yield
        finally:
            # Before anything that may fail: from here on this push is not answered.
            del self._pushes[number]
            with self._as_a_whole():
                self._apply(self.round.close(number, self.clock()))
                self._witness.ended(push)

    def open(self, push: OpenPush, wanted: Push, header: pb.PushHeader) -> Decision | None:
        """Passes the header of a push to the round, and returns the round's answer."""
        with self._as_a_whole():
            had_finished, is_new_run = push.worker_id in self.round.finished, self.round.job_is_over
            decisions = self.round.open(push.call.number, wanted, self.clock())
            record = self._roster.heard_push_of(push.worker_id, self.clock())
            record.note_push(header, push.call.peer)
            if record.is_another_process(wanted.incarnation):
                self._witness.mark(MarkKind.RESTARTED, push.worker_id)
            self._note_return(push.worker_id, had_finished, is_new_run)
            self._remarks.interval(push.worker_id, header.interval_steps)
            self.observations.pushes_retried += record.is_retry(wanted.key)
            return self._apply(decisions, push)

    async def released(self, push: OpenPush) -> None:
        """Returns when the round that holds the push has committed."""
        while push.is_held:
            push.progress.clear()
            await push.progress.wait()

    def take(self, push: OpenPush, run: Run, unneeded: int) -> None:
        """Fragments of a push arrived: all of them are added, or none. Those below ``unneeded`` are ignored.

        Raises:
            ModelAverageError: the fragments are refused.
        """
        with self._as_a_whole():
            codec = RAW if run.stays else push.codec
            coded = _split(self.manifest, codec, run)
            raw_bytes = RAW.run_size_bytes(self.manifest, run.first, run.first + len(coded))
            push.call.count_received(len(run.data), raw_bytes, run.stays, push.is_aside)
            first, end = max(run.first, unneeded), run.first + max(1, len(coded))
            if first >= end:
                return
            now_s = self.clock()
            decisions = self.round.take_fragments(push.call.number, first, end, now_s)
            is_whole = end == self.manifest.fragment_count
            push.call.expecting = push.manner.is_half_duplex or not is_whole
            record = self._roster.heard_push_of(push.worker_id, now_s)
            self.observations.fragments_received += end - first
            if is_whole:
                record.transport = push.lane.kind
                self._witness.whole(push)

            def add(decision: Accumulate) -> None:
                given = Contribution(push.worker_id, decision.weight, coded[decision.index], codec)
                to_sum = self.center.defer if run.stays else self.center.accumulate
                from_s = self.clock()
                try:
                    found = to_sum(decision.index, given, decision.how is Addition.START)
                except ModelAverageError as error:  # too late to refuse: the ledger counts the fragment
                    raise RuntimeError(f"fragment {decision.index} could not be added: {error}") from error
                self._witness.averaged(from_s, found)

            self._apply(decisions, push, add)

    # Atomic events.

    @contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """Makes an event of the round atomic: a refusal has changed nothing, and any other failure starts the round
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
        """An unexpected error interrupted an event of the round, so its effects are unknown: starts the round over."""
        cause, step = describe(error), self.round.global_step
        try:
            if self._writes is None:
                self.round.abandon()
            else:
                self.round.abandon(self._writes.last_token, self._writes.under_way)
            self.center.restart()
            self._roster.take_nonfinite()
            self.average = Average(self.center.next)
            self._round_is_over()
            told = refusal(Reason.SERVER_OVERLOADED, f"round {step} starts over, because the server failed: {cause}")
            for push in list(self._pushes.values()):
                if push.outcome is None:
                    push.call.fail(told)
                else:  # its outcome is known, but its task may not have been woken
                    push.progress.set()
            self._set_timers()
        except BaseException as second:
            self._die(f"round {step} failed ({cause}), and could not be started over ({describe(second)})")
            raise
        self._witness.started_over()
        why = event("round_restarted", round=step, cause=cause)
        trace = None if is_expected(error) else error
        _log.error("round %d starts over, because the server failed: %s", step, cause, extra=why, exc_info=trace)

    def _apply(
        self,
        decisions: Sequence[Decision],
        push: OpenPush | None = None,
        add: Callable[[Accumulate], None] | None = None,
    ) -> Decision | None:
        """Carries out the decisions of the round.

        Args:
            decisions: in order.
            push: the push whose event caused them, if any.
            add: adds a fragment that has arrived to its sum.

        Returns:
            The answer to the header of the push, if the decisions contain one.

        Raises:
            ConflictError: BASE_UNKNOWN: all decisions were carried out, and the push has to come again raw.
        """
        answer: Decision | None = None
        finished: list[Finish] = []
        for decision in decisions:
            match decision:
                case FinishFragment(index, total_weight, untouched, steps):
                    finished.append(Finish(index, total_weight, untouched, steps))
                case Accumulate():
                    assert add is not None
                    if decision.how is not Addition.IGNORE:
                        add(decision)
                case Admit():
                    assert push is not None
                    answer, push.average, push.is_admitted = decision, self.average, True
                    self._witness.admitted(push, decision.first_needed < self.manifest.fragment_count)
                case CenterFollows():
                    answer = decision
                case Hold():
                    assert push is not None
                    answer, push.is_held = decision, True
                case Dismiss(stream, error):
                    self._pushes[stream].call.fail(error)
                case Restart(cause):
                    self.center.restart()
                    self._roster.take_nonfinite()
                    self.average = Average(self.center.next)
                    self._witness.started_over()
                    step = self.round.global_step
                    why = event("round_restarted", round=step, cause=cause)
                    _log.warning("round %d starts over: %s", step, cause, extra=why)
                case TimeOut(streams, waited_s):
                    self._time_out(streams, waited_s)
                case KeepFirst(token):
                    self._finish(finished, push)
                    finished = []
                    assert self._writes is not None
                    self._writes.begin(token, self.center.next, self.round.as_committed)
                case Prepare():
                    self._finish(finished, push)
                    finished = []
                    self._commit()
        self._finish(finished, push)
        self._set_timers()
        if push is not None and push.lacks_changes:
            # Its task runs this. Cancelled, the task would lose the error in its next write.
            raise _base_unknown(push.worker_id, push.codec)
        return answer

    def _finish(self, finishes: list[Finish], push: OpenPush | None) -> None:
        if finishes:
            from_s = self.clock()
            self._witness.averaged(from_s, self.center.finish(finishes, self.round.global_step))
            if not all(finish.steps for finish in finishes):
                self._end_coded_pushes(push)
            self.average.finished = finishes[-1].index + 1
            self._wake(self.average)

    def check_base(self, header: pb.PushHeader, codec: Codec) -> None:
        """Checks that the server has the center that the fragments of a push are relative to. A stale push gets another
        center anyway.

        Raises:
            ConflictError: BASE_UNKNOWN.
        """
        if codec is RAW or header.base_step < self.round.global_step:
            return
        known, named = self.center.current.center_id, header.base_center_id
        if not self.average.is_coded or not named or named != known:
            raise _base_unknown(header.worker_id, codec)

    def _end_coded_pushes(self, but: OpenPush | None) -> None:
        """The round makes no step, so its center is no change of the current one: pushes in a codec must be raw.
        ``but`` is the push whose event this is."""
        self.average.is_coded = False
        for push in self._pushes.values():
            if push is not but and push.average is self.average and push.needs_changes:
                push.call.fail(_base_unknown(push.worker_id, push.codec))

    def _kept(self, token: int, is_written: bool) -> None:
        """A write has ended."""
        try:
            with self._as_a_whole():
                self._apply(self.round.kept(token, is_written, self.clock()))
                assert self._writes is not None
                self._witness.checkpointed(self._writes.newest_step)
        except ModelAverageError:  # the log says so
            pass
        except Exception as error:  # nobody else would tell the round
            self._start_over(error)

    def _commit(self) -> None:
        """Commits the prepared round."""
        now_s, given_up = self.clock(), self.round.given_up
        room = self.center.room(now_s)
        commit = self.center.commit(room, lambda: self.round.commit(now_s))
        nonfinite = self._roster.take_nonfinite()
        self.average = Average(self.center.next)
        outcomes = outcomes_of(commit, self._pushes, nonfinite, self.center.current.center_id)
        held = [self._pushes[stream] for stream in commit.held]
        for transport in self._transports:
            transport.keep_only(commit.present)
        self._witness.committed(commit, given_up, nonfinite, now_s)
        self._remarks.nonfinite(nonfinite, commit.contributors, commit.global_step)
        log_commit(commit)
        tell(outcomes, held, Sending(set(commit.verdicts), now_s))
        self._round_is_over()

    # Time.

    def _set_timers(self) -> None:
        self._timers.set(self.round.due_at_s, self.round.has_complete)

    def _expire(self) -> None:
        try:
            with suppress(ModelAverageError), self._as_a_whole():  # the failure has been logged
                self._apply(self.round.expire(self.clock()))
        finally:
            self._set_timers()

    def _time_out(self, streams: tuple[int, ...], waited_s: float) -> None:
        whom = "its checkpoint" if self.round.prepared else self.missing().text()
        error = refusal(
            Reason.ROUND_TIMED_OUT,
            f"round {self.round.global_step} waited {waited_s:g} s (--round-timeout-s) for {whom}; "
            "the push stays in the round: push again to go on waiting",
        )
        for stream in streams:
            self._pushes[stream].call.fail(error)

    def _say_who_is_missing(self) -> None:
        missing, age_s = self.missing(), self.round.age_s(self.clock())
        log_wait(self.round.global_step, age_s, missing, self.round.prepared)
        notice = missing.notice(age_s, sorted(self.round.finished), self.round.training)
        for push in self._pushes.values():
            if push.average is self.average:
                push.notice = notice
                push.progress.set()

    def _wake(self, average: Average) -> None:
        for push in self._pushes.values():
            if push.average is average:
                push.progress.set()

    def _round_is_over(self) -> None:
        if self._writes is not None:
            self._writes.round_is_over()

    def _leave_transports(self, worker_id: str, incarnation: bytes) -> None:
        for transport in self._transports:
            transport.leave(worker_id, incarnation)


def _base_unknown(worker_id: str, codec: Codec) -> ModelAverageError:
    return refusal(
        Reason.BASE_UNKNOWN,
        f"{worker_id!r} pushes in codec {codec.name}, relative to a center that is not the one that this round starts "
        "from; push again raw",
    )


def _split(manifest: Manifest, codec: Codec, run: Run) -> Mapping[int, memoryview]:
    """The bytes of every fragment of a run, by index; empty if the first does not exist.

    Raises:
        ProtocolError: FRAGMENT_SIZE_WRONG.
    """
    if run.first >= manifest.fragment_count:
        return {}
    split = codec.split_range if run.stays else codec.split_run  # a range of shared memory may be longer than a message
    return dict(split(manifest, run.first, run.data))
