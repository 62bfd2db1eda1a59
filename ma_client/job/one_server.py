"""One server of the job, for one worker: pulls and pushes, retried as long as that may help."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from ma_client.job.naming import with_address
from ma_client.job.patience import Patience
from ma_client.transports.connection import Connection
from ma_client.transports.lent_memory import Loan
from ma_client.transports.push import Retry, retry_after
from ma_client.transports.pushing import Answer
from ma_client.transports.staging import Staging
from ma_client.values.raw import bytes_of
from ma_client.values.reused import ReusedMemory
from modelaverage.chosen import NOTHING_CHOSEN
from modelaverage.codecs import CODECS, RAW, Codec
from modelaverage.errors import (
    ConflictError,
    DeadlineExceededError,
    ModelAverageError,
    NotInitializedError,
    Reason,
)
from modelaverage.missing import Missing
from modelaverage.purpose import Purpose
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["LocalPart", "OneServer", "WorkerIdentity", "known_codec", "others_missing"]

# A round restarts when a worker dies. This many restarts in a row have another cause, and retries do not help.
_MAX_ROUND_RESTARTS = 100
_LEAVE_TIMEOUT_S = 1.0
_MISSING_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class WorkerIdentity:
    """The identity of a worker.

    Args:
        worker_id: its name in the job.
        incarnation: 16 random bytes of this process.
        is_chief: whether it is the chief; for the servers' status.
    """

    worker_id: str
    incarnation: bytes
    is_chief: bool


@dataclass(frozen=True)
class LocalPart:
    """The local variables that a worker pushes to one server.

    Args:
        values: the bytes of the server's variables, in manifest order.
        untouched: indexes of the variables that are unchanged since the last center, ascending.
        weight: share in the average; 0: the push abstains.
        local_step: for the server's status.
        loss: for the server's status; None: not reported.
        interval_steps: local steps between two rounds, for the server's log and status; 0: not reported.
    """

    values: Sequence[memoryview]
    untouched: Sequence[int]
    weight: float
    local_step: int = 0
    loss: float | None = None
    interval_steps: int = 0

    @property
    def purpose(self) -> Purpose:
        """The purpose of a push of these variables in a round."""
        return Purpose.CONTRIBUTE if self.weight else Purpose.ABSTAIN


class OneServer:
    """One server of a job, for one worker. Used by one thread at a time.

    Args:
        connection: the connection to the server.
        worker: the identity of this worker.
        reconnect_timeout_s: how long to try again when the server is away.

    Attributes:
        step: the `global_step` of the center that this worker has from the server; None before the first.
        elsewhere: that center's variables by name, if it did not arrive in ``staging``.
        named: what pulls name of the job's choices.
    """

    def __init__(self, connection: Connection, worker: WorkerIdentity, reconnect_timeout_s: float) -> None:
        self.connection = connection
        self.step: int | None = None
        self.elsewhere: Mapping[str, NDArray[Any]] | None = None
        self.named = NOTHING_CHOSEN
        self._worker = worker
        self._patience = Patience(
            reconnect_timeout_s,
            lambda: connection.answered_at_s,
            connection.stopped,
            connection.address,
            lambda: connection.progressed_at_s,
        )
        self._push_id = 0
        self._is_expected = False
        self._loan: Loan | None = None  # shared memory that holds the center, if any
        self._copies = ReusedMemory()
        self._is_copied = True  # whether callers no longer read the center in place
        self._staging: Staging | None = None
        self._manifest_id = ""
        self._codec: Codec = RAW
        self._center_id = 0  # of the center of `step`; 0: unknown, or the codec is raw

    def adopt(self, staging: Staging, manifest_id: str, codec: Codec) -> None:
        """Sets the manifest of the center, the staging that receives it, and the codec of the job."""
        self._staging, self._manifest_id, self._codec = staging, manifest_id, codec

    def initialize(
        self, header: pb.InitializeHeader, values: Sequence[memoryview], staging: Staging, deadline: Deadline
    ) -> pb.InitializeResponse:
        """Sends an initial center to the server; ``staging`` has its manifest."""
        manifest, self._is_expected = staging.manifest, True

        def attempt() -> pb.InitializeResponse:
            def encode(index: int) -> Sequence[memoryview]:
                return RAW.encode_variables(manifest, index, values)

            return self.connection.initialize(header, encode, manifest.fragment_count, deadline)

        with with_address(self.connection.address):
            response = self._patience.call(attempt, deadline)
        if response.initialized:
            self.adopt(staging, response.manifest_id, known_codec(response.compression))
            self.step, self._center_id = response.global_step, 0
        return response

    def center_header(self, wait_initialized: bool, deadline: Deadline) -> pb.CenterHeader:
        """The header of the center, without its values."""
        request = self._pull_request(wait_initialized)
        request.header_only = True
        with with_address(self.connection.address):
            return self._patience.call(lambda: self.connection.center_header(request, deadline), deadline)

    def pull(
        self,
        wait_initialized: bool,
        deadline: Deadline,
        heard: Callable[[pb.CenterHeader], None] | None = None,
        will_train: bool = False,
    ) -> None:
        """Reads the center into the staging buffer. ``heard`` may adopt another staging when it gets the header.
        ``will_train``: rounds wait for this worker, even if it had finished.

        Raises:
            ConflictError: MANIFEST_MISMATCH: the center that arrived was not adopted.
        """
        step, center_id, began_at_s = 0, 0, time.monotonic()
        arriving: Staging | None = None  # the staging that this pull has begun to fill
        request = self._pull_request(wait_initialized)
        request.will_train = will_train
        self._is_expected = self._is_expected or will_train

        def staging_for(header: pb.CenterHeader) -> Staging:
            nonlocal step, center_id, arriving
            goes_on = request.first_fragment > 0 and request.continued_step == header.global_step
            step, center_id, before, arriving = header.global_step, header.center_id, arriving, None
            if heard is not None and not goes_on:
                heard(header)
            staging = self._staging
            if staging is None or header.manifest_id != self._manifest_id or (goes_on and staging is not before):
                raise ConflictError(
                    f"the center at {self.connection.address} was initialized again; pull it", Reason.MANIFEST_MISMATCH
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
            self.connection.pull(request, staging_for, deadline)

        with with_address(self.connection.address):
            self._patience.call(attempt, deadline)
        self.step, self._center_id, self.elsewhere, self._loan = step, center_id, None, None

    def _first_to_pull(self, arriving: Staging, began_at_s: float, deadline: Deadline) -> int:
        """The fragment at which a broken pull that began at ``began_at_s`` resumes; 0: it starts over."""
        if arriving.received == 0 or arriving.is_complete:
            return 0
        # Only from the same server process: another one may have a different center of the same step.
        uptime_s = self.connection.status(deadline).uptime_s
        return arriving.received if uptime_s >= time.monotonic() - began_at_s else 0

    def check_intact(self) -> None:
        """Raises RetryPushError if a later round has overwritten a center that was not copied."""
        if self._loan is not None and not self._is_copied:
            self._loan.check_intact()

    def status(self, deadline: Deadline) -> pb.GetStatusResponse:
        """The status of the server."""
        return self._patience.call(lambda: self.connection.status(deadline), deadline)

    def push(
        self,
        base_step: int,
        local: LocalPart | None,
        copy: bool,
        deadline: Deadline,
        purpose: Purpose = Purpose.CONTRIBUTE,
    ) -> pb.PushOutcome:
        """Makes one round on this server; afterwards `step` and the center are the new ones.

        Args:
            base_step: the step from which the local variables started.
            local: the values to push, which are not used to abstain; None: there are none, and the push abstains.
            copy: whether a center in shared memory is copied at once.
            deadline: for the whole call.
            purpose: the purpose of the push.
        """
        staging = self._staging
        assert staging is not None
        header, values = self._push_header(base_step, local, purpose), [] if local is None else local.values

        def attempt() -> tuple[Answer, Mapping[str, NDArray[Any]] | None]:
            try:
                answer = self.connection.push_and_average(header, values, staging, deadline)
            except DeadlineExceededError as error:
                if error.reason is None:  # the server was not asked; it names the missing itself
                    raise self._naming_the_missing(error, base_step) from None
                raise
            if not copy:
                self._copies.forget()
            return answer, answer.elsewhere(self._copies if copy else None)

        restarts = 0
        while True:
            try:
                answer, self.elsewhere = self._patience.call(attempt, deadline)
            except NotInitializedError as error:
                raise self.lost(error) from None
            except ModelAverageError as error:
                if error.reason is Reason.BASE_UNKNOWN and header.codec:
                    header.codec, header.base_center_id = "", 0
                    continue
                # Another worker caused the restart; the same push is still valid.
                restarts += 1
                if retry_after(error) is not Retry.AT_ONCE or restarts > _MAX_ROUND_RESTARTS:
                    raise
            else:
                self.step, self._center_id = answer.outcome.global_step, answer.outcome.center_id
                self._loan, self._is_copied = answer.loan, copy
                return answer.outcome

    def _naming_the_missing(self, error: DeadlineExceededError, base_step: int) -> DeadlineExceededError:
        """The error of a push that waited too long, with the workers that the server waits for, if it answers soon."""
        try:
            status = self.connection.status(Deadline(_MISSING_TIMEOUT_S))
        except ModelAverageError:
            return error
        return DeadlineExceededError(f"{error}{others_missing(status, self.worker_id, base_step)}", None, error.status)

    def has_center(self, is_private: bool) -> bool:
        """Whether `center_again` has the center. ``is_private``: no caller got a copy of it."""
        return self.holds_center or (is_private and self._is_copied and self.elsewhere is not None)

    def center_again(self, is_private: bool) -> LocalPart | None:
        """The center as received from the server, which has lost it; None if it was overwritten meanwhile."""
        if self._loan is None:
            values = _copied(self._staging.arrays) if self._staging is not None and self.holds_center else None
        else:
            values = self._loan.intact_bytes()
            # Callers may have changed their copies.
            if values is None and is_private and self._is_copied and self.elsewhere is not None:
                values = _copied(self.elsewhere)
        return None if values is None else LocalPart(values, (), 1.0)

    @property
    def holds_center(self) -> bool:
        """Whether the center of `step` is still unchanged in its memory. Shared memory may be overwritten at any time:
        check again after reading it."""
        if self._loan is not None:
            return self._loan.is_intact
        return self._staging is not None and self._staging.is_whole

    @property
    def worker_id(self) -> str:
        """The id of this worker."""
        return self._worker.worker_id

    @property
    def lent_center(self) -> Mapping[str, NDArray[Any]] | None:
        """The center of `step` by name, in shared memory; None if it arrived in the staging buffer."""
        return None if self._loan is None else self._loan.arrays

    def lost(self, why: object) -> NotInitializedError:
        """The exception for a server that has lost its center."""
        return NotInitializedError(
            f"the parameter server at {self.connection.address} has lost the center variables ({why}); was it started "
            "again without its --checkpoint-dir? Local variables are untouched",
            Reason.NOT_INITIALIZED,
        )

    def finish(self, deadline: Deadline) -> pb.LeaveResponse:
        """Reports that this worker has finished its training; rounds no longer wait for it."""
        request = pb.LeaveRequest(worker_id=self._worker.worker_id, incarnation=self._worker.incarnation, finished=True)
        return self._patience.call(lambda: self.connection.leave(request, deadline), deadline)

    def leave(self) -> None:
        """Says goodbye for this process, if the server expects it to push."""
        if self._push_id or self._is_expected:
            request = pb.LeaveRequest(worker_id=self._worker.worker_id, incarnation=self._worker.incarnation)
            self.connection.leave(request, Deadline(_LEAVE_TIMEOUT_S))

    def _pull_request(self, wait_initialized: bool) -> pb.PullRequest:
        return pb.PullRequest(
            worker_id=self._worker.worker_id,
            wait_initialized=wait_initialized,
            accepts_notices=wait_initialized,
            outer_optimizer=self.named.outer_optimizer,
            compression=self.named.compression,
        )

    def _push_header(self, base_step: int, local: LocalPart | None, purpose: Purpose) -> pb.PushHeader:
        """The header of a new push."""
        self._push_id += 1
        header = pb.PushHeader(
            worker_id=self._worker.worker_id,
            incarnation=self._worker.incarnation,
            push_id=self._push_id,
            is_chief=self._worker.is_chief,
            base_step=base_step,
            manifest_id=self._manifest_id,
            accepts_runs=True,
            accepts_combined=True,
            purpose=pb.Purpose.Name(purpose.value),
        )
        if local is not None and purpose is Purpose.CONTRIBUTE:
            header.weight = local.weight
            header.untouched_variables.extend(local.untouched)
        if local is not None and purpose is not Purpose.RESTORE:
            header.local_step, header.interval_steps = local.local_step, local.interval_steps
            if local.loss is not None:
                header.loss = local.loss
        # What is relative to a center is sent only from that center, bit for bit.
        has_base = self._loan is None and self._staging is not None and self._staging.is_whole
        if has_base and self._center_id and self._codec is not RAW and purpose is not Purpose.RESTORE:
            header.codec, header.base_center_id = self._codec.name, self._center_id
        return header


def others_missing(status: pb.GetStatusResponse, worker_id: str, base_step: int) -> str:
    """What to append to the error of a worker whose wait for the others is over: whom the round waits for.

    Args:
        status: of the server, after the wait.
        worker_id: this worker, which is not named.
        base_step: of its push.

    Returns:
        The text; empty if no others are missing, or the server has gone on to another round.
    """
    if status.global_step != base_step:
        return ""
    missing = Missing.told(status)
    others = [(name, seen) for name, seen in zip(missing.names, missing.last_seen, strict=True) if name != worker_id]
    missing = replace(missing, names=tuple(name for name, _ in others), last_seen=tuple(seen for _, seen in others))
    return f"; the round waits for {missing.text()}" if missing else ""


def known_codec(told: str) -> Codec:
    """The codec that a server told; `raw` for one that this version does not know: pushes may always be raw."""
    return CODECS.get(told, RAW)


def _copied(arrays: Mapping[str, NDArray[Any]]) -> list[memoryview]:
    return [bytes_of(array.copy()) for array in arrays.values()]
