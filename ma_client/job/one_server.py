"""This worker as one shard sees it: its pulls and pushes there, tried again as long as that may help."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ma_client.job.patience import Patience
from ma_client.transports.connection import Answer, Shard
from ma_client.transports.lent_memory import Loan
from ma_client.transports.staging import Staging
from ma_client.values.raw import bytes_of
from modelaverage.checks import MIN_WEIGHT
from modelaverage.errors import (
    ConflictError,
    DeadlineExceededError,
    ModelAverageError,
    NotInitializedError,
    Reason,
    RetryPushError,
    ServerUnavailableError,
)
from modelaverage.logs import event
from modelaverage.missing import Missing
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Contribution", "Member", "Worker"]

_log = logging.getLogger("ma_client")
# Each restart of a round has a cause of its own, a worker that died; so many in a row are another kind of trouble.
_MAX_ROUND_RESTARTS = 100
_LEAVE_TIMEOUT_S = 1.0
_LOOK_TIMEOUT_S = 2.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5
_FIRST_NOTICE_S = 5.0
# A shard may think of somebody who only reads as the worker that it waits for. A push too many does no harm.
_LONG_S = 5.0
# A center that is given back already contains what others push again. As a power of two it does not even round float32.
_HELD_CENTER_WEIGHT = 2.0**29


@dataclass(frozen=True)
class Worker:
    """Who pushes.

    Args:
        worker_id: its name in the job.
        incarnation: 16 random bytes of this process.
        is_chief: for the servers' status.
        accepts_shared_memory: whether servers on this host may offer some.
    """

    worker_id: str
    incarnation: bytes
    is_chief: bool
    accepts_shared_memory: bool


@dataclass(frozen=True)
class Contribution:
    """What a worker gives to the average of one shard.

    Args:
        values: the bytes of the shard's variables, in manifest order.
        untouched: indexes of those that are as they came from the center, ascending.
        weight: share in the average.
        local_step: for the server's status.
        loss: for the server's status; None: it is not said.
        interval_steps: local steps between two rounds, for the server's log and status; 0: it is not said.
    """

    values: Sequence[memoryview]
    untouched: Sequence[int]
    weight: float
    local_step: int = 0
    loss: float | None = None
    interval_steps: int = 0


class Member:
    """One worker's place at one shard. For one thread at a time.

    Args:
        shard: the connection.
        worker: who takes the place.
        reconnect_timeout_s: how long to try again when the server is away.

    Attributes:
        step: the `global_step` of the shard's center that this worker has; None before the first.
        elsewhere: that center's variables by name, if it did not arrive in ``staging``.
    """

    def __init__(self, shard: Shard, worker: Worker, reconnect_timeout_s: float) -> None:
        self.shard = shard
        self.step: int | None = None
        self.elsewhere: Mapping[str, NDArray[Any]] | None = None
        self._worker = worker
        self._patience = Patience(
            reconnect_timeout_s,
            lambda: shard.answered_at_s,
            shard.stopped,
            shard.address,
            lambda: shard.progressed_at_s,
        )
        self._push_id = 0
        self._loan: Loan | None = None  # the shared memory that the center came in, if it did
        self._is_copied = True  # whether that no longer matters to whoever was given the center
        self._staging: Staging | None = None
        self._manifest_id = ""

    def adopt(self, staging: Staging, manifest_id: str) -> None:
        """From now on the center has this manifest, and arrives there."""
        self._staging, self._manifest_id = staging, manifest_id

    def initialize(
        self, header: pb.InitializeHeader, values: Sequence[memoryview], staging: Staging, deadline: Deadline
    ) -> pb.InitializeResponse:
        """Offers the center that the shard shall have; ``staging`` has its manifest."""
        manifest = staging.manifest
        response = self._patience.call(
            lambda: self.shard.initialize(
                header, lambda index: manifest.fragment_parts(index, values), manifest.fragment_count, deadline
            ),
            deadline,
        )
        if response.initialized:
            self.adopt(staging, response.manifest_id)
            self.step = response.global_step
        return response

    def center_header(self, wait_initialized: bool, deadline: Deadline) -> pb.CenterHeader:
        """What the center is, without its values."""
        request = self._pull_request(wait_initialized)
        request.header_only = True
        return self._patience.call(lambda: self.shard.center_header(request, deadline), deadline)

    def pull(
        self,
        wait_initialized: bool,
        deadline: Deadline,
        heard: Callable[[pb.CenterHeader], None] | None = None,
        will_train: bool = False,
    ) -> None:
        """Reads the center into the staging buffer. ``heard`` may adopt another one when it hears the header.
        ``will_train``: rounds wait for this worker, even if it had finished.

        Raises:
            ConflictError: MANIFEST_MISMATCH: nobody adopted the center that came.
        """
        step, began_at_s = 0, time.monotonic()
        arriving: Staging | None = None  # what this pull has begun to fill
        request = self._pull_request(wait_initialized)
        request.will_train = will_train

        def staging_for(header: pb.CenterHeader) -> Staging:
            nonlocal step, arriving
            goes_on = request.first_fragment > 0 and request.continued_step == header.global_step
            step, before, arriving = header.global_step, arriving, None
            if heard is not None and not goes_on:
                heard(header)
            staging = self._staging
            if staging is None or header.manifest_id != self._manifest_id or (goes_on and staging is not before):
                raise ConflictError(
                    f"the center at {self.shard.address} was initialized anew; pull again", Reason.MANIFEST_MISMATCH
                )
            if goes_on:
                staging.go_on(request.first_fragment)
            else:
                staging.begin()
            arriving = staging
            return staging

        def attempt() -> None:
            nonlocal began_at_s
            request.first_fragment = 0 if arriving is None else self._first_to_pull(arriving, began_at_s, deadline)
            request.continued_step = step if request.first_fragment else 0
            if not request.first_fragment:
                began_at_s = time.monotonic()
            self.shard.pull(request, staging_for, deadline)

        self._patience.call(attempt, deadline)
        self.step, self.elsewhere, self._loan = step, None, None

    def _first_to_pull(self, arriving: Staging, began_at_s: float, deadline: Deadline) -> int:
        """Which fragment a pull that began at ``began_at_s`` and broke goes on with; 0: it starts over."""
        if arriving.received == 0 or arriving.is_complete:
            return 0
        # Only at the same process: another one may have made another center of the same step.
        uptime_s = self.shard.status(deadline).uptime_s
        return arriving.received if uptime_s >= time.monotonic() - began_at_s else 0

    def check_intact(self) -> None:
        """Raises RetryPushError if a later round has written over the center that was not copied."""
        if self._loan is not None and not self._is_copied:
            self._loan.check_intact()

    def push(self, base_step: int, contribution: Contribution, copy: bool, deadline: Deadline) -> pb.PushOutcome:
        """One round of this shard; afterwards `step` and the center are the new ones.

        Args:
            base_step: what the contribution started from.
            contribution: what to give.
            copy: whether a center in shared memory is copied at once.
            deadline: for all of it.
        """
        staging = self._staging
        assert staging is not None
        self._push_id += 1
        header = pb.PushHeader(
            worker_id=self._worker.worker_id,
            incarnation=self._worker.incarnation,
            push_id=self._push_id,
            is_chief=self._worker.is_chief,
            base_step=base_step,
            local_step=contribution.local_step,
            weight=contribution.weight,
            manifest_id=self._manifest_id,
            untouched_variables=contribution.untouched,
            accepts_shared_memory=self._worker.accepts_shared_memory,
            accepts_runs=True,
            loss=contribution.loss,
            interval_steps=contribution.interval_steps,
        )

        def attempt() -> tuple[Answer, Mapping[str, NDArray[Any]] | None]:
            answer = self.shard.push_and_average(
                header, lambda index: staging.manifest.fragment_parts(index, contribution.values), staging, deadline
            )
            return answer, answer.elsewhere(copy)

        restarts = 0
        while True:
            try:
                answer, self.elsewhere = self._patience.call(attempt, deadline)
            except RetryPushError:
                # The round was started over for another worker's sake; the same push is as good as before.
                restarts += 1
                if restarts > _MAX_ROUND_RESTARTS:
                    raise
            except NotInitializedError as error:
                raise self._lost(error) from None
            else:
                self.step = answer.outcome.global_step
                self._loan, self._is_copied = answer.loan, copy
                return answer.outcome

    def nothing_new(self) -> Contribution:
        """The center as this worker has it: counted at the barrier, and hardly in the average."""
        values = self._center_bytes()
        return Contribution(values, range(len(values)), MIN_WEIGHT)

    def center_again(self) -> Contribution | None:
        """The center as it came from the shard, which has lost it; None if it was written over meanwhile."""
        if self._loan is None:
            values = self._center_bytes() if self.holds_center else None
        else:
            # Not `elsewhere`: whoever was given copies may have changed them.
            values = self._loan.intact_bytes()
        return None if values is None else Contribution(values, (), _HELD_CENTER_WEIGHT)

    @property
    def holds_center(self) -> bool:
        """Whether the center of `step` is still where it came. Shared memory may be written over at any time: ask again
        when it has been read."""
        if self._loan is not None:
            return self._loan.is_intact
        return self._staging is not None and self._staging.is_whole

    @property
    def lent_center(self) -> Mapping[str, NDArray[Any]] | None:
        """The center of `step` by name, in shared memory; None if it came in the staging buffer."""
        return None if self._loan is None else self._loan.arrays

    def bring_back(self, copy: bool, deadline: Deadline) -> None:
        """The shard has fallen back behind the center that this worker has from it, and gets that again."""
        assert self.step is not None
        self.bring_up(self.step, Contribution(self._center_bytes(), (), _HELD_CENTER_WEIGHT), copy, deadline)

    def bring_up(self, step: int, contribution: Contribution, copy: bool, deadline: Deadline) -> None:
        """The shard has lost what this worker has from it, and comes to ``step`` again with this contribution."""
        self.step = None
        self.bring_to(step, lambda: contribution, copy, deadline)

    def bring_to(
        self, step: int, contribution: Callable[[], Contribution], copy: bool, deadline: Deadline, may_push: bool = True
    ) -> None:
        """Returns with a center of ``step`` or later, when the shard has one.

        A shard falls behind the others when it, or a worker, dies in the middle of a round. What it lacks are pushes:
        this worker's are made again, with ``contribution``, whenever the shard seems to wait for it.

        Args:
            step: where the shard has to come to.
            contribution: what to give; called before the first of these pushes.
            copy: as for `push`.
            deadline: for all of it.
            may_push: False: only wait, for others to bring it there.
        """
        pause_s, notice_s, since_s, ahead = _FIRST_PAUSE_S, _FIRST_NOTICE_S, time.monotonic(), False
        give: Contribution | None = None
        while self.step is None or self.step < step:
            status = self._patience.call(lambda: self.shard.status(deadline), deadline)
            if status.phase == pb.PHASE_UNINITIALIZED:
                raise self._lost("it has none")
            if status.global_step >= step:
                self.pull(False, deadline)
                continue
            waited_s = time.monotonic() - since_s
            if may_push and (waited_s > _LONG_S or self._waits_for_this_worker(status)):
                give = give or contribution()
                # All at once if nobody is in between; else step by step with the others.
                base_step = status.global_step if ahead else max(step - 1, status.global_step)
                try:
                    self.push(base_step, give, copy, deadline)
                    ahead = False
                    continue
                except ConflictError as error:
                    ahead = error.reason is Reason.BASE_STEP_AHEAD
                    if ahead:
                        continue
                    if error.reason is not Reason.ROUND_FULL:  # then it waits for others
                        raise
            if waited_s >= notice_s:
                missing = Missing.told(status)
                _log.warning(
                    "the parameter server at %s is at step %d, another at %d; it has waited %.0f s for %s",
                    self.shard.address,
                    status.global_step,
                    step,
                    status.round_age_s,
                    missing.text() if missing else "nobody yet",
                    extra=event(
                        "server_behind",
                        peer=self.shard.address,
                        round=status.global_step,
                        other_round=step,
                        waited_s=status.round_age_s,
                        waiting_for=missing.names,
                    ),
                )
                notice_s *= 2
            if deadline.is_over:
                raise DeadlineExceededError(
                    f"the parameter server at {self.shard.address} is at step {status.global_step}, another at {step}: "
                    f"waited {deadline.timeout_s:g} s"
                )
            if self.shard.stopped.wait(pause_s):
                raise ModelAverageError(f"the wait for {self.shard.address} was ended here")
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def has_fallen_back(self) -> bool:
        """Whether the shard is at an earlier step than the center that this worker has from it."""
        try:
            status = self.shard.status(Deadline(_LOOK_TIMEOUT_S))
        except (ServerUnavailableError, DeadlineExceededError):
            return False  # nobody knows; there will be another look
        return self.step is not None and status.global_step < self.step

    def finish(self, deadline: Deadline) -> pb.LeaveResponse:
        """Says that this worker has finished its training: no round waits for it any longer."""
        request = pb.LeaveRequest(worker_id=self._worker.worker_id, incarnation=self._worker.incarnation, finished=True)
        return self._patience.call(lambda: self.shard.leave(request, deadline), deadline)

    def leave(self) -> None:
        """Says that this process goes, if it ever pushed."""
        if self._push_id:
            request = pb.LeaveRequest(worker_id=self._worker.worker_id, incarnation=self._worker.incarnation)
            self.shard.leave(request, Deadline(_LEAVE_TIMEOUT_S))

    def _center_bytes(self) -> list[memoryview]:
        assert self._staging is not None
        arrays = self._staging.arrays if self.elsewhere is None else self.elsewhere
        return [bytes_of(array.copy()) for array in arrays.values()]

    def _pull_request(self, wait_initialized: bool) -> pb.PullRequest:
        return pb.PullRequest(
            worker_id=self._worker.worker_id, wait_initialized=wait_initialized, accepts_notices=wait_initialized
        )

    def _waits_for_this_worker(self, status: pb.GetStatusResponse) -> bool:
        at_rest = status.phase == pb.PHASE_IDLE
        perhaps = status.waiting_for_unknown > 0 or status.waiting_for_omitted > 0
        return at_rest or perhaps or self._worker.worker_id in status.waiting_for

    def _lost(self, why: object) -> NotInitializedError:
        return NotInitializedError(
            f"the parameter server at {self.shard.address} has lost the center variables ({why}); was it started again "
            "without its --checkpoint-dir? Local variables are untouched",
            Reason.NOT_INITIALIZED,
        )
