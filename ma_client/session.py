"""A worker's session with the parameter servers, without torch: numpy in, numpy out."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from numpy.typing import NDArray

from ma_client.cluster.spec import ClusterSpec
from ma_client.files.initial_values import read_initial_values
from ma_client.files.round_log import RoundLog
from ma_client.job.all_servers import AllServers
from ma_client.job.center_arrays import CenterArrays, variables_of
from ma_client.job.farewell import wait_until_all_have_finished
from ma_client.job.initialization import Proposal, initialize
from ma_client.job.naming import named
from ma_client.job.one_server import LocalPart, WorkerIdentity
from ma_client.job.remarks import NonfiniteRemark, say_center_goes_on
from ma_client.job.results import InitializeResult, PushResult, push_result
from ma_client.job.session_settings import SessionSettings
from ma_client.job.ticket import PushTicket
from ma_client.process.one_thread import OneThread, by_one_thread
from ma_client.transports.absence import connect
from ma_client.transports.data_settings import DATA_SETTINGS, DataSettings
from ma_client.transports.registry import TransportSettings
from ma_client.transports.timing import TIMING, Timing
from ma_client.values.raw import bytes_of
from ma_client.values.same import plain
from modelaverage.access.channels import Access
from modelaverage.access.security import Security
from modelaverage.checks import check_global_step, check_timeout, check_weight
from modelaverage.chosen import Chosen
from modelaverage.errors import InvalidRequestError, NotInitializedError, Reason
from modelaverage.outer import OuterOptimizer
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["ParameterServerSession"]

_END_S = 5.0  # how long `close` waits for a call of another thread to end
_LARGEST_INTERVAL = 2**32 - 1  # what the header's field holds


class ParameterServerSession:
    """One worker's session with the parameter servers of a job, for one thread at a time.

    A call from a second thread while one is under way is refused with SessionInUseError. Only `close` may come from any
    thread, and from a signal handler.

    Args:
        ps_hosts: addresses of the parameter servers, HOST:PORT; the same ones in the same order for all workers.
        worker_id: this worker's name in the job, 1 to 128 bytes, the same after a restart.
        is_chief: whether this worker may initialize the center.
        connect_timeout_s: how long to wait until all servers answer; above 0, as all times here unless they say more.
        fragment_size_bytes: unit of transfer and averaging, if this session initializes the center: a multiple of 8, at
            most 2 MiB. None: chosen from the size of the model and the number of servers.
        shared_memory: exchange bytes in shared memory with a server that is on this host and offers it.
        reconnect_timeout_s: how long to try again while a server is restarting or cannot be reached; 0: not at all. A
            push that is made again sends only what the server lacks, and is never counted twice.
        init_from: a file with initial values, which `initialize` uses instead of its argument: a safetensors file
            (`ps-server export` writes one), or, with torch installed, what `torch.save` wrote. It may be a whole state
            dict: what is not in the center is logged and not used. None: `initialize` uses its argument.
        must_be_new: this session's first `initialize` is refused if there is a center already. Later ones are not: the
            center is then this session's own.
        round_timeout_s: how long a push, also one of the optimizer, waits for the other workers unless the push says
            otherwise; None: as long as it takes.
        placement: how the variables are spread over several servers, if this session initializes the center:
            "balanced" (even shares) or "round_robin" (whole variables in turn, as TensorFlow 1.15 places them).
        security: TLS with the servers, and the token that they require; None: as MA_TLS_CA, MA_TLS_CERT, MA_TLS_KEY,
            MA_TLS_SERVER_NAME and MA_TOKEN_FILE say (`Security.from_env`).
        data_connections: from which model size on bytes go over connections beside the calls, and how long such a
            connection may be silent.

    Raises:
        InvalidRequestError: WORKER_ID_INVALID, no address, one twice, no such placement, or a time out of range.
        SecurityError: a certificate, key or token is missing or unusable, or a server and this client do not trust each
            other.
        ServerUnavailableError: a server did not answer in time.

    Example:
        >>> with ParameterServerSession(["127.0.0.1:2222"], worker_id="worker-0", is_chief=True) as session:
        ...     session.initialize({"w": w})
        ...     center, step = session.pull()
        ...     result = session.push_and_average({"w": w})
    """

    _timing = TIMING  # tests have sessions with shorter times

    def __init__(
        self,
        ps_hosts: Sequence[str],
        *,
        worker_id: str,
        is_chief: bool = False,
        connect_timeout_s: float = 30.0,
        fragment_size_bytes: int | None = None,
        shared_memory: bool = True,
        reconnect_timeout_s: float = 60.0,
        init_from: str | Path | None = None,
        must_be_new: bool = False,
        round_timeout_s: float | None = None,
        placement: str = "balanced",
        security: Security | None = None,
        data_connections: DataSettings = DATA_SETTINGS,
    ) -> None:
        settings = SessionSettings(
            ps_hosts=ps_hosts,
            worker_id=worker_id,
            is_chief=is_chief,
            connect_timeout_s=connect_timeout_s,
            fragment_size_bytes=fragment_size_bytes,
            shared_memory=shared_memory,
            reconnect_timeout_s=reconnect_timeout_s,
            init_from=init_from,
            must_be_new=must_be_new,
            round_timeout_s=round_timeout_s,
            placement=placement,
            security=security,
            data_connections=data_connections,
        )
        self.worker_id = worker_id
        self.is_chief = is_chief
        self.base_step: int | None = None
        """The `global_step` of the center that this worker has; None before the first pull or push."""
        self.num_workers: int | None = None
        """How many workers a round of the servers waits for; None before the first initialize or pull."""
        self.ps_hosts = tuple(settings.ps_hosts)
        """Addresses of the parameter servers."""
        self.outer_optimizer: str | None = None
        """The outer optimizer of the servers, as text; None before the first initialize or pull."""
        self.compression: str | None = None
        """The codec of the job, such as ``int8``; ``raw``: no compression; None before the first initialize or pull."""
        self._settings = settings
        self._has_initialized = self._has_finished = False
        self._one_thread = OneThread(worker_id)
        self._nonfinite = NonfiniteRemark(worker_id)
        self._round_log = RoundLog.from_env(worker_id)
        self._servers = _servers_of(settings, self._timing)
        self._center = CenterArrays(self._servers, self.ps_hosts)
        try:
            self._servers.each(lambda _, server: connect(server.connection, settings.connect_timeout_s))
        except BaseException:
            self._servers.close()
            raise

    @classmethod
    def from_env(cls, **options: Any) -> ParameterServerSession:
        """The session of this process in the cluster that the environment describes (`ClusterSpec.from_env`).

        Args:
            options: keyword arguments of the constructor, to override or add.

        Raises:
            ClusterError: a variable is missing, unusable, or contradicts another.
        """
        cluster = ClusterSpec.from_env()
        settings: dict[str, Any] = {
            "worker_id": cluster.worker_id,
            "is_chief": cluster.is_chief,
            "init_from": cluster.init_from,
            "must_be_new": cluster.must_be_new,
            **options,
        }
        return cls(cluster.ps_hosts, **settings)

    def __enter__(self) -> ParameterServerSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session; the center stays where it is. Rounds with a quorum no longer wait for this worker.

        May be called from any thread and from a signal handler: a call that is under way ends with the error that later
        calls get at once.
        """
        self._one_thread.close()
        self._servers.stop()
        with self._one_thread.ending(_END_S):
            self._servers.close()
            self._round_log.close()

    @by_one_thread
    def finish(self, timeout_s: float | None = 60.0) -> int:
        """Tells the servers that this worker has finished its training: no round waits for it, not even a strict one.

        Afterwards `pull` only reads. `resume_training`, or a push, makes the worker count again. A second call does
        nothing.

        Args:
            timeout_s: how long to try; None: for the session's ``reconnect_timeout_s``.

        Returns:
            How many workers are still training; 0: the job is over.

        Raises:
            InvalidRequestError: ``timeout_s`` is not above 0.
            DeadlineExceededError, ServerUnavailableError: a server could not be told; it still waits for this worker.
        """
        deadline = _deadline(timeout_s, none="reconnect_timeout_s is the limit")
        responses = self._servers.each(lambda _, server: server.finish(deadline))
        self._has_finished = True
        return max(response.workers_training for response in responses)

    def wait_for_others(self, timeout_s: float) -> bool:
        """After `finish`: waits until all workers have finished; the center is then the last one of the job.

        Args:
            timeout_s: how long to wait at most; 0: ask once.

        Returns:
            Whether all have finished. False: the time is up, or a server does not answer; the log says which.

        Raises:
            InvalidRequestError: ``timeout_s`` is negative or not a number.
        """
        check_timeout("timeout_s", timeout_s, zero="ask once", may_be_infinite=True)
        return wait_until_all_have_finished(self.statuses, self.worker_id, timeout_s)

    @property
    def frozen_digests(self) -> bytes:
        """What the chief has said of parameters that are in no center because they are not trained; empty: nothing, or
        this session has seen no center. For workers to compare with their own (`ma_client.torch.frozen`)."""
        return self._center.frozen_digests

    def resume_training(self) -> None:
        """Undoes `finish` with the next `pull`: rounds wait for this worker again."""
        self._has_finished = False

    @by_one_thread
    def initialize(
        self,
        variables: Mapping[str, Any],
        global_step: int = 0,
        timeout_s: float | None = None,
        *,
        must_be_new: bool | None = None,
        other_names: Mapping[str, Sequence[str]] = MappingProxyType({}),
        outer_optimizer: OuterOptimizer | str | None = None,
        compression: str | None = None,
        frozen_digests: bytes = b"",
    ) -> InitializeResult:
        """Sets the center variables if they are not set yet. Only the chief may call it.

        If an earlier attempt reached only some of several servers, this one completes it.

        Args:
            variables: initial values by name: float32, float64, float16 or bfloat16 arrays of any shape, or what numpy
                can read as such. Dictionaries may be nested; a variable's name is then its keys joined by "/". Their
                order is the order of the manifest.
            global_step: where to start counting rounds.
            timeout_s: how long it may take; None: as long as it takes.
            must_be_new: refuse to go on from a center that exists already; None: as the session's ``must_be_new`` says.
            other_names: by variable, other names under which the file ``init_from`` may have it (tied weights).
            outer_optimizer: turns the center and the average of every round into the next center: `OuterSGD`,
                `OuterAdam`, `OuterAverage`, or one of them as text, such as ``"sgd:lr=0.7,momentum=0.9,nesterov"``.
                None: that of a center that is there, or the plain average for a new one.
            compression: how fragments are encoded, both ways: ``"int8"``, ``"int4"``, ``"bfloat16"`` or ``"none"``.
                None: that of a center that is there, or none for a new one.
            frozen_digests: told to all workers with the center, unless there is one already; see `frozen_digests`.

        Raises:
            InvalidRequestError: MANIFEST_INVALID, GLOBAL_STEP_INVALID, OUTER_OPTIMIZER_INVALID, CODEC_UNKNOWN; this
                session is not the chief's; the file ``init_from`` cannot be read, lacks one of these variables, or has
                it with another shape.
            ConflictError: MANIFEST_MISMATCH, naming the first variable that differs from the servers', or the server
                that does not belong to the others; OUTER_OPTIMIZER_MISMATCH, COMPRESSION_MISMATCH, naming both; or
                there is a center, and it must be new. Nothing was changed.
            NotInitializedError: a server has lost its part of a center that has been averaged already.
        """
        if not self.is_chief:
            raise InvalidRequestError(f"{self.worker_id!r} is not the chief: only the chief initializes the center")
        check_global_step(global_step)
        check_timeout("timeout_s", timeout_s, none="no limit")
        chosen = named(outer_optimizer, compression)
        arrays = self._center.flat(variables)
        settings = self._settings
        if settings.init_from is not None:
            arrays = read_initial_values(arrays, settings.init_from, other_names)
        first = not self._has_initialized
        if must_be_new is None:
            must_be_new = settings.must_be_new and first
        deadline = Deadline(timeout_s)
        proposal = Proposal(
            self.worker_id,
            variables_of(arrays),
            [bytes_of(array) for array in arrays.values()],
            global_step,
            settings.placement,
            settings.fragment_size_bytes,
            must_be_new,
            chosen,
            frozen_digests,
        )
        done = initialize(self._servers, self.ps_hosts, proposal, deadline)
        self._has_initialized = True
        self.num_workers = done.num_workers
        self._note(done.chosen)
        if done.assembly is not None:
            self._center.take(done.assembly)
            self.base_step = done.global_step
        elif not done.by_this_call and first:
            say_center_goes_on(self.worker_id, done.global_step, settings.init_from)
        return InitializeResult(done.by_this_call, done.global_step)

    @by_one_thread
    def pull(
        self,
        wait_initialized: bool = True,
        timeout_s: float | None = None,
        *,
        expected: Mapping[str, Any] | None = None,
        copy: bool = True,
        catch_up: bool = True,
        outer_optimizer: OuterOptimizer | str | None = None,
        compression: str | None = None,
    ) -> tuple[Mapping[str, Any], int]:
        """Reads the center variables. Their `global_step` is the base step of what is trained from them.

        Args:
            wait_initialized: wait for the chief; otherwise an uninitialized center is an error.
            timeout_s: how long to wait altogether; None: as long as it takes.
            expected: arrays whose names, dtypes and shapes the center has to have.
            copy: False: the arrays are read-only and valid until the session's next call.
            catch_up: whether to help if one of several servers is behind the others, because something died in the
                middle of a round, and waits for this worker: the session then pushes there, to abstain or to give back
                the center that the server has lost. False, for a process that only watches: wait until others helped.
            outer_optimizer: the one that the center must have; as `initialize` takes it. None: any.
            compression: the one that the job must have; as `initialize` takes it. None: any.

        Returns:
            The center variables by name, and `global_step`. The variables are nested as those that this session was
                given last.

        Raises:
            NotInitializedError: there is no center, and ``wait_initialized`` is False.
            DeadlineExceededError: there was none within ``timeout_s``.
            ConflictError: MANIFEST_MISMATCH, naming the first variable in which ``expected`` differs, or the server
                that does not belong to the others; OUTER_OPTIMIZER_MISMATCH, COMPRESSION_MISMATCH, naming both.
        """
        deadline = _deadline(timeout_s)
        shape = None if expected is None else self._center.flat(expected)
        will_train = catch_up and not self._has_finished
        wanted = named(outer_optimizer, compression)
        for server in self._servers:
            server.named = wanted
        if len(self._servers) == 1:
            self._servers.each(
                lambda _, server: server.pull(
                    wait_initialized, deadline, lambda header: self._adopt([header], shape), will_train
                )
            )
        else:
            headers = self._servers.each(lambda _, server: server.center_header(wait_initialized, deadline))
            self._adopt(headers, shape)
            self._servers.pull(wait_initialized, will_train, deadline)
        return plain(self._center.read(copy)), self._common_step()

    @by_one_thread
    def push_and_average(
        self,
        variables: Mapping[str, Any],
        weight: float = 1.0,
        *,
        local_step: int = 0,
        loss: float | None = None,
        interval_steps: int = 0,
        untouched: Collection[str] = (),
        timeout_s: float | None = None,
        copy: bool = True,
    ) -> PushResult:
        """One round: gives the local variables to the average, waits at the barrier, returns the new center.

        ``variables`` is only read. If this raises, the push may be made again. The earlier push may still be in the
        round, after a wait that was given up: then its values count, not the new ones, and the outcome says so.

        Args:
            variables: local variables with the center's names, dtypes and shapes, in any order; nested if you like.
            weight: share in the average, from 1e-9 to 1e9. 0: this push abstains; it counts at the barrier, but not in
                the average, and sends no values.
            local_step: this worker's count of optimizer steps, for the server's status.
            loss: the loss that this worker has reached, for the server's status; None: none is shown.
            interval_steps: local steps of this worker between two rounds, for the server's log and status; 0: none is
                shown.
            untouched: names of variables that are as they came from the center, because they saw no gradient
                (`unchanged` finds them). A variable that no worker has touched keeps the center's bytes.
            timeout_s: how long to wait for the other workers; None: the session's ``round_timeout_s``.
            copy: False: the result's arrays are read-only and valid until the session's next call; with a quorum,
                call `check_intact` once they have been read.

        Raises:
            InvalidRequestError: WEIGHT_INVALID, or ``untouched`` has a name that the center has not.
            NotInitializedError: this session has not initialized or pulled the center yet.
            ConflictError: the variables do not fit the center (naming the first that differs), or one of
                WORKER_ID_IN_USE, ROUND_FULL, BASE_STEP_AHEAD, MANIFEST_UNKNOWN.
            DeadlineExceededError: the round did not commit within ``timeout_s``, or within the server's limit
                (ROUND_TIMED_OUT). It names the missing workers; to learn them may take 1 s longer.
            ServerUnavailableError: the server stayed away for ``reconnect_timeout_s``.
        """
        push = self._prepared(variables, weight, local_step, loss, interval_steps, untouched, timeout_s, copy)
        return push()

    def begin_push(
        self,
        variables: Mapping[str, Any],
        weight: float = 1.0,
        *,
        local_step: int = 0,
        loss: float | None = None,
        interval_steps: int = 0,
        untouched: Collection[str] = (),
        timeout_s: float | None = None,
        copy: bool = True,
        snapshot: bool = True,
    ) -> PushTicket:
        """Begins a round like `push_and_average`, and returns at once. Until the ticket is done, the session makes no
        other call but `close`.

        Args:
            variables: as in `push_and_average`.
            weight: as in `push_and_average`; so are the others that are not named here.
            timeout_s: counts from now.
            snapshot: copy the variables first, so that they may change at once. False: they may change when the ticket
                is done.

        Raises:
            InvalidRequestError, NotInitializedError, ConflictError: as `push_and_average`. What happens later is raised
                by the ticket's `result`.
            ServerUnavailableError: no threads are left.
        """
        with self._one_thread.doing("begin_push"):
            push = self._prepared(
                variables, weight, local_step, loss, interval_steps, untouched, timeout_s, copy, snapshot
            )
        is_begun = threading.Event()

        def in_background() -> PushResult:
            try:
                with self._one_thread.doing("begin_push", "a push is under way; wait for its ticket's result() first"):
                    is_begun.set()
                    return push()
            finally:
                is_begun.set()

        ticket = PushTicket(in_background, self.worker_id)
        is_begun.wait()  # from here on, other calls are refused
        return ticket

    def _prepared(
        self,
        variables: Mapping[str, Any],
        weight: float,
        local_step: int,
        loss: float | None,
        interval_steps: int,
        untouched: Collection[str],
        timeout_s: float | None,
        copy: bool,
        snapshot: bool = False,
    ) -> Callable[[], PushResult]:
        """Checks the arguments of a push; returns what makes it. ``snapshot``: of copies of the variables."""
        if weight != 0:
            check_weight(weight)
        deadline = _deadline(self._settings.round_timeout_s if timeout_s is None else timeout_s)
        base_step = self.base_step
        if base_step is None:
            raise NotInitializedError("pull the center (or initialize it) before the push", Reason.NOT_INITIALIZED)
        parts = [
            LocalPart(values, untouched_here, weight, local_step, loss, min(interval_steps, _LARGEST_INTERVAL))
            for values, untouched_here in self._center.cut(variables, untouched, snapshot)
        ]
        self._has_finished = False

        def push() -> PushResult:
            outcomes = self._servers.push(base_step, parts, copy, deadline)
            self._nonfinite.note(sum(outcome.nonfinite_values for outcome in outcomes), base_step)
            kept = self._center.untouched_by_all(outcomes)
            result = push_result(outcomes, self._center.read(copy), self._common_step(), kept)
            moved = self._servers.moved
            self._round_log.note(loss, local_step, result.global_step, result.waited_s, moved.sent, moved.received)
            return result

        return push

    @by_one_thread
    def check_intact(self) -> None:
        """Call it when you have read the arrays of a push with ``copy=False``.

        Raises:
            RetryPushError: rounds went on without this worker and wrote over the arrays while they were read; pull the
                center.
        """
        for server in self._servers:
            server.check_intact()

    @by_one_thread
    def unchanged(self, variables: Mapping[str, Any]) -> frozenset[str]:
        """Which variables hold exactly the bytes of the center that this worker trains from (`base_step`).

        Args:
            variables: local variables, all of the center's or some; nested if you like.

        Returns:
            Their names. Empty if there is no longer a copy of that center to compare with: after a push whose answer
            did not arrive whole, or when rounds with a quorum went on without this worker.
        """
        return self._center.unchanged(variables, self.base_step)

    @property
    def sent_bytes(self) -> int:
        """Bytes of fragments that this session has sent to its servers: initial values and pushes, as they were coded,
        without the headers of messages. Bytes in shared memory count, too, as in the servers' status."""
        return self._servers.moved.sent

    @property
    def received_bytes(self) -> int:
        """Bytes of fragments that this session has received from its servers: pulls and averages."""
        return self._servers.moved.received

    def status(self, timeout_s: float = 5.0) -> pb.GetStatusResponse:
        """What the first server is doing; the protocol's own message."""
        return self.statuses(timeout_s)[0]

    @by_one_thread
    def statuses(self, timeout_s: float = 5.0) -> list[pb.GetStatusResponse]:
        """What each server is doing. ``timeout_s`` is the time for each."""
        check_timeout("timeout_s", timeout_s, none="no limit")
        return self._servers.each(lambda _, server: server.connection.status(Deadline(timeout_s)))

    def _common_step(self) -> int:
        """The step of the center that has come; the base step from now on."""
        (step,) = set(self._servers.steps)
        assert step is not None
        self.base_step = step
        return step

    def _note(self, told: Chosen) -> None:
        """The servers have these choices."""
        self.outer_optimizer, self.compression = told.in_force.outer_optimizer, told.in_force.compression

    def _adopt(self, headers: Sequence[pb.CenterHeader], expected: Mapping[str, NDArray[Any]] | None) -> None:
        """These are the centers of the servers, from now on. Raises ConflictError unless they belong together."""
        self.num_workers = self._center.adopt(headers, expected)
        self._note(Chosen.of(headers[0]))


def _deadline(timeout_s: float | None, none: str = "no limit") -> Deadline:
    """Raises InvalidRequestError unless the time is above 0, or None."""
    check_timeout("timeout_s", timeout_s, none=none)
    return Deadline(timeout_s)


def _servers_of(settings: SessionSettings, timing: Timing) -> AllServers:
    """The servers; nothing is sent yet."""
    worker = WorkerIdentity(settings.worker_id, uuid.uuid4().bytes, settings.is_chief)
    access = Access(Security.from_env() if settings.security is None else settings.security)
    transports = TransportSettings(settings.shared_memory, settings.data_connections, timing)
    return AllServers(settings.ps_hosts, worker, settings.reconnect_timeout_s, access, transports)
