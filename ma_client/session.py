"""A worker's conversation with the parameter servers, for people without torch: numpy in, numpy out."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from numpy.typing import NDArray

from ma_client.cluster.spec import ClusterSpec
from ma_client.files.initial_values import read_initial_values
from ma_client.job.all_servers import AllServers
from ma_client.job.assembly import Assembly
from ma_client.job.farewell import wait_until_all_have_finished
from ma_client.job.initialization import Proposal, initialize
from ma_client.job.one_server import LocalPart, WorkerIdentity
from ma_client.process.one_thread import OneThread, by_one_thread
from ma_client.transports.absence import connect
from ma_client.transports.data_settings import DATA_SETTINGS, DataSettings
from ma_client.transports.registry import TransportSettings
from ma_client.transports.timing import TIMING
from ma_client.values.raw import bytes_of, same_bytes
from ma_client.values.trees import Paths, as_arrays, nest, paths_of
from modelaverage import wire
from modelaverage.access.channels import Access
from modelaverage.access.security import Security
from modelaverage.addresses import check_all
from modelaverage.checks import check_global_step, check_weight, check_worker_id
from modelaverage.errors import ConflictError, InvalidRequestError, NotInitializedError, Reason
from modelaverage.logs import event
from modelaverage.manifest import MAX_SHARDS, Manifest, Variable, dtype_name, first_difference
from modelaverage.outcome import Outcome
from modelaverage.placement import PLACEMENTS
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["InitializeResult", "ParameterServerSession", "PushResult"]

_Array = NDArray[Any]
_log = logging.getLogger("ma_client")
_END_S = 5.0  # how long a call that is to end may take for that
_LARGEST_INTERVAL = 2**32 - 1  # of the header


@dataclass(frozen=True)
class InitializeResult:
    """Whose values the center holds.

    Args:
        initialized: True if this call set the center, False if it was set before and nothing was changed.
        global_step: rounds completed.
    """

    initialized: bool
    global_step: int


@dataclass(frozen=True)
class PushResult:
    """How a push ended. Whatever the outcome, the worker goes on from ``center``.

    Args:
        center: the center variables by name, nested as those that were pushed.
        global_step: rounds completed; the base step of what is trained from this center.
        outcome: COMMITTED, STALE (this push was not used) or ALREADY_COUNTED (an earlier one was). Of several servers:
            STALE if any did without it.
        contributors: ids of the workers in this center's average, on all servers, sorted.
        waited_s: seconds from this push being complete to the round's commit, on the last server.
        untouched: variables that no contributor had changed; the center's values were kept.
    """

    center: Mapping[str, Any]
    global_step: int
    outcome: Outcome
    contributors: tuple[str, ...]
    waited_s: float
    untouched: frozenset[str]


class ParameterServerSession:
    """One worker's session with the parameter servers of a job, for one thread at a time.

    A call from a second thread while one is under way is refused with SessionInUseError. Only `close` may come from any
    thread, and from a signal handler.

    Args:
        ps_hosts: addresses of the parameter servers, HOST:PORT; the same ones in the same order for all workers.
        worker_id: this worker's name in the job, 1 to 128 bytes, the same after a restart.
        is_chief: whether this worker may initialize the center.
        connect_timeout_s: how long to wait for the servers to be there.
        fragment_size_bytes: unit of transfer and averaging, if this session initializes the center: a multiple of 8
            up to 2 MiB; None: chosen by the size of the model and the number of servers.
        shared_memory: hand bytes over in shared memory if a server is on this host and offers it.
        reconnect_timeout_s: how long to try again when a server is away, restarting or not reachable; 0: not at all.
            A push that is made again sends only what the server lacks, and is never counted twice.
        init_from: a safetensors file (`ps-server export` writes such), or with torch what `torch.save` wrote, with the
            values that `initialize` sets the center to instead of those that it is given. It may be a whole state dict:
            what is not in the center is logged, and not used. None: the values that it is given.
        must_be_new: this session's first `initialize` is refused if there is a center already; not more than once,
            because the second time there is its own.
        round_timeout_s: how long a push waits for the other workers unless it says otherwise, those of the optimizer
            included; None: as long as it takes.
        placement: what goes to which of several servers, if this session initializes the center: "balanced", even
            shares, or "round_robin", whole variables in turn, as TensorFlow 1.15 places them.
        security: TLS with the servers, and the token that they want; None: what MA_TLS_CA, MA_TLS_CERT, MA_TLS_KEY,
            MA_TLS_SERVER_NAME and MA_TOKEN_FILE say (`Security.from_env`).
        data_connections: from which size on a model's bytes go beside the calls, and how long that may be silent.

    Raises:
        InvalidRequestError: WORKER_ID_INVALID, no address, one twice, or no such placement.
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
        _check_ps_hosts(ps_hosts)
        check_worker_id(worker_id)
        if placement not in PLACEMENTS:
            raise InvalidRequestError(f"there is no placement {placement!r}; choose one of {', '.join(PLACEMENTS)}")
        self.worker_id = worker_id
        self.is_chief = is_chief
        self.base_step: int | None = None
        """The `global_step` of the center that this worker has; None before the first pull or push."""
        self.num_workers: int | None = None
        """How many workers a round of the servers waits for; None before the first initialize or pull."""
        self.ps_hosts = tuple(ps_hosts)
        """Addresses of the parameter servers."""
        self._fragment_size_bytes = fragment_size_bytes
        self._placement = placement
        self._round_timeout_s = round_timeout_s
        self._init_from = init_from
        self._must_be_new = must_be_new
        self._has_initialized = False
        self._assembly: Assembly | None = None
        self._has_finished = self._was_nonfinite = False
        self._paths: Paths = {}
        self._one_thread = OneThread(worker_id)
        worker = WorkerIdentity(worker_id, uuid.uuid4().bytes, is_chief)
        access = Access(Security.from_env() if security is None else security)
        settings = TransportSettings(shared_memory, data_connections, self._timing)
        self._servers = AllServers(self.ps_hosts, worker, reconnect_timeout_s, access, settings)
        try:
            self._servers.each(lambda _, server: connect(server.connection, connect_timeout_s))
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

        From any thread, and from a signal handler: a call that is under way ends with an error.
        """
        self._servers.stop()
        with self._one_thread.ending(_END_S):
            self._servers.close()

    @by_one_thread
    def finish(self, timeout_s: float | None = 60.0) -> int:
        """Says that this worker has finished its training: rounds go on without it, where they need all workers, too.

        From then on `pull` only looks. `resume_training`, or a push, makes the worker count again. Does nothing the
        second time.

        Args:
            timeout_s: how long to try; None: for the session's ``reconnect_timeout_s``.

        Returns:
            How many workers have not finished; 0: the job is over.

        Raises:
            DeadlineExceededError, ServerUnavailableError: a server could not be told; it goes on waiting.
        """
        deadline = Deadline(timeout_s)
        responses = self._servers.each(lambda _, server: server.finish(deadline))
        self._has_finished = True
        return max(response.workers_training for response in responses)

    def wait_for_others(self, timeout_s: float) -> bool:
        """After `finish`: waits until all workers have finished; the center is then the last one of the job.

        Args:
            timeout_s: how long, at most.

        Returns:
            Whether all have. False: the time is over, or a server does not answer; the log says which.
        """
        return wait_until_all_have_finished(self.statuses, self.worker_id, timeout_s)

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
    ) -> InitializeResult:
        """Sets the center variables if they are not set yet. For the chief, who also decides what goes to which server.

        If an earlier attempt reached only some of several servers, this one completes it.

        Args:
            variables: initial values by name: float32, float64, float16 or bfloat16 arrays of any shape, or whatever
                numpy can read as such. Dictionaries may be nested; a variable's name is then its keys joined by "/".
                Their order is the order of the manifest.
            global_step: where to start counting rounds.
            timeout_s: how long it may take; None: as long as it takes.
            must_be_new: refuse to go on from a center that is there already; None: as the session was told.
            other_names: further names, by variable, under which the file of ``init_from`` may have it (tied weights).

        Raises:
            InvalidRequestError: MANIFEST_INVALID, GLOBAL_STEP_INVALID; this session is not the chief's; the file of
                ``init_from`` cannot be read, lacks one of these variables, or has it with another shape.
            ConflictError: MANIFEST_MISMATCH, naming the first variable that differs from the servers', or the server
                that does not belong to the others; or ``must_be_new``, and there is a center. Nothing was changed.
            NotInitializedError: a server has lost its part of a center that has been averaged already.
        """
        if not self.is_chief:
            raise InvalidRequestError(f"{self.worker_id!r} is not the chief: only the chief initializes the center")
        check_global_step(global_step)
        arrays = self._flat(variables)
        if self._init_from is not None:
            arrays = read_initial_values(arrays, self._init_from, other_names)
        first = not self._has_initialized
        if must_be_new is None:
            must_be_new = self._must_be_new and first
        deadline = Deadline(timeout_s)
        whole = _variables_of(arrays)
        values = [bytes_of(array) for array in arrays.values()]
        proposal = Proposal(
            self.worker_id, whole, values, global_step, self._placement, self._fragment_size_bytes, must_be_new
        )
        done = initialize(self._servers, self.ps_hosts, proposal, deadline)
        self._has_initialized = True
        self.num_workers = done.num_workers
        if done.assembly is not None:
            self._assembly = done.assembly
            self.base_step = done.global_step
        elif not done.by_this_call and first:
            whose = "its own initial values are" if self._init_from is None else f"the values of {self._init_from} are"
            _log.warning(
                "%s goes on from global_step %d of the center that is there; %s not used (--fresh refuses instead)",
                self.worker_id,
                done.global_step,
                whose,
                extra=event("center_goes_on", worker=self.worker_id, round=done.global_step),
            )
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
    ) -> tuple[Mapping[str, Any], int]:
        """Reads the center variables; what is trained from them has their `global_step` as its base step.

        Args:
            wait_initialized: wait for the chief; otherwise an uninitialized center is an error.
            timeout_s: how long to wait altogether; None: as long as it takes.
            expected: arrays whose names, dtypes and shapes the center has to have.
            copy: False: the arrays are read-only and valid until the session's next call.
            catch_up: if one of several servers is behind the others, because something died in the middle of a round,
                and waits for this worker: push the center there as it is, which counts at the barrier and hardly in the
                average. False, for who only watches: wait until others bring it up.

        Returns:
            The center variables by name, and `global_step`. They are nested as what this session was given last.

        Raises:
            NotInitializedError: there is no center, and ``wait_initialized`` is False.
            DeadlineExceededError: there was none within ``timeout_s``.
            ConflictError: MANIFEST_MISMATCH, naming the first variable in which ``expected`` differs, or the server
                that does not belong to the others.
        """
        deadline = Deadline(timeout_s)
        shape = None if expected is None else self._flat(expected)
        will_train = catch_up and not self._has_finished
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
        return self._center(copy), self._common_step()

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

        ``variables`` is only read. If this raises, the push may be made again.

        Args:
            variables: local variables with the center's names, dtypes and shapes, in any order; nested if you like.
            weight: share in the average, from 1e-9 to 1e9.
            local_step: this worker's count of optimizer steps; shown in the server's status.
            loss: the loss that this worker has reached; shown in the server's status. None: it is not shown.
            interval_steps: how many local steps this worker makes between two rounds; shown in the server's log and
                status. 0: it is not said.
            untouched: names of variables that are unchanged since the last center because they had no gradient
                (`unchanged` tells). What all workers left untouched keeps the center's bytes.
            timeout_s: how long to wait for the other workers; None: the session's ``round_timeout_s``.
            copy: False: the result's arrays are read-only and valid until the session's next call; with a quorum,
                `check_intact` says afterwards whether they were all the time.

        Raises:
            InvalidRequestError: WEIGHT_INVALID, or ``untouched`` has a name that the center has not.
            NotInitializedError: this session has not initialized or pulled the center yet.
            ConflictError: the variables do not fit the center (naming the first that differs), or one of
                WORKER_ID_IN_USE, ROUND_FULL, BASE_STEP_AHEAD, MANIFEST_UNKNOWN.
            DeadlineExceededError: the round did not commit within ``timeout_s``, or within the server's limit
                (ROUND_TIMED_OUT, naming the missing).
            ServerUnavailableError: the server stayed away for ``reconnect_timeout_s``.
        """
        check_weight(weight)
        deadline = Deadline(self._round_timeout_s if timeout_s is None else timeout_s)
        assembly = self._assembly
        if self.base_step is None or assembly is None:
            raise NotInitializedError("pull the center (or initialize it) before the push", Reason.NOT_INITIALIZED)
        manifest = assembly.manifest
        arrays = _in_order(self._flat(variables), manifest)
        # An array from a result that was not copied lies where the average is about to arrive.
        values = [bytes_of(array.copy() if assembly.overlaps(array) else array) for array in arrays.values()]
        numbers = {variable.name: number for number, variable in enumerate(manifest.variables)}
        unknown = set(untouched) - numbers.keys()
        if unknown:
            raise InvalidRequestError(f"untouched names {min(unknown)!r}, which is no center variable")
        untouched_numbers = assembly.cut_numbers({numbers[name] for name in untouched})
        parts = [
            LocalPart(part, numbers_there, weight, local_step, loss, min(interval_steps, _LARGEST_INTERVAL))
            for part, numbers_there in zip(assembly.cut(values), untouched_numbers, strict=True)
        ]
        self._has_finished = False
        outcomes = self._servers.push(self.base_step, parts, copy, deadline)
        self._note_nonfinite(sum(outcome.nonfinite_values for outcome in outcomes))
        everywhere = frozenset.intersection(*(frozenset(outcome.contributors) for outcome in outcomes))
        kept = assembly.join_numbers([outcome.untouched_variables for outcome in outcomes])
        return PushResult(
            self._center(copy),
            self._common_step(),
            _outcome_of(outcomes),
            tuple(sorted(everywhere)),
            max(outcome.waited_s for outcome in outcomes),
            frozenset(manifest.variables[number].name for number in kept),
        )

    @by_one_thread
    def check_intact(self) -> None:
        """To be called when the arrays of a push with ``copy=False`` have been read.

        Raises:
            RetryPushError: rounds that went on without this worker have written over them meanwhile; pull the center.
        """
        for server in self._servers:
            server.check_intact()

    @by_one_thread
    def unchanged(self, variables: Mapping[str, Any]) -> frozenset[str]:
        """Which variables hold exactly the bytes of the center that this worker trains from (`base_step`).

        Args:
            variables: local variables, all of the center's or some; nested if you like.

        Returns:
            Their names. None of them if the center that came last is no longer here to compare with: after a push that
            failed on its way back, or when rounds with a quorum went on without this worker.
        """
        assembly = self._assembly
        if not variables or assembly is None or any(step != self.base_step for step in self._servers.steps):
            return frozenset()
        if not all(server.holds_center for server in self._servers):
            return frozenset()
        arrays = as_arrays(variables, paths_of(variables))
        center = assembly.join([server.lent_center for server in self._servers])
        same = frozenset(name for name, array in arrays.items() if name in center and same_bytes(array, center[name]))
        return same if all(server.holds_center for server in self._servers) else frozenset()

    def status(self, timeout_s: float = 5.0) -> pb.GetStatusResponse:
        """What the first server is doing; the protocol's own message."""
        return self.statuses(timeout_s)[0]

    @by_one_thread
    def statuses(self, timeout_s: float = 5.0) -> list[pb.GetStatusResponse]:
        """What each server is doing."""
        return self._servers.each(lambda _, server: server.connection.status(Deadline(timeout_s)))

    # How it is done.

    def _note_nonfinite(self, values: int) -> None:
        """This many values of the last push were not finite: said once, until they are finite again."""
        if values and not self._was_nonfinite:
            _log.warning(
                "%d values of the last push are not finite (NaN, infinite); the average is not either",
                values,
                extra=event("values_not_finite", worker=self.worker_id, round=self.base_step, values=values),
            )
        self._was_nonfinite = values > 0

    def _adopt(self, headers: Sequence[pb.CenterHeader], expected: Mapping[str, _Array] | None) -> None:
        """These are the centers of the servers, from now on. Raises ConflictError unless they belong together."""
        manifests = [wire.manifest_from_message(header.manifest) for header in headers]
        assembly = self._assembly
        if assembly is None or list(assembly.shards) != manifests:
            assembly = Assembly(manifests, self.ps_hosts)
        if expected is not None:
            _in_order(expected, assembly.manifest)
        for header, address in zip(headers, self.ps_hosts, strict=True):
            if header.num_workers != headers[0].num_workers:
                raise ConflictError(
                    f"the parameter server at {address} was started with --num-workers {header.num_workers}, that at "
                    f"{self.ps_hosts[0]} with {headers[0].num_workers}"
                )
        for server, staging, header in zip(self._servers, assembly.stagings, headers, strict=True):
            server.adopt(staging, header.manifest_id)
        self._assembly, self.num_workers = assembly, headers[0].num_workers

    def _flat(self, tree: Mapping[str, Any]) -> dict[str, _Array]:
        """The arrays by the center's names; what comes back will be nested as they are."""
        self._paths = paths_of(tree)
        return as_arrays(tree, self._paths)

    def _center(self, copy: bool) -> Mapping[str, Any]:
        """The center that has come, by name."""
        assembly = self._assembly
        assert assembly is not None
        arrays = assembly.join([server.elsewhere for server in self._servers])
        if copy:
            arrays = {name: array.copy() if assembly.overlaps(array) else array for name, array in arrays.items()}
        return nest(arrays, self._paths) if self._paths.keys() == arrays.keys() else arrays

    def _common_step(self) -> int:
        """The step of the center that has come; the base step from now on."""
        (step,) = set(self._servers.steps)
        assert step is not None
        self.base_step = step
        return step


def _check_ps_hosts(ps_hosts: Sequence[str]) -> None:
    if isinstance(ps_hosts, str) or not ps_hosts:
        raise InvalidRequestError(f"ps_hosts is {ps_hosts!r}; give a list of the parameter servers' addresses")
    if len(ps_hosts) > MAX_SHARDS:
        raise InvalidRequestError(f"ps_hosts has {len(ps_hosts)} addresses; at most {MAX_SHARDS} are possible")
    try:
        check_all(ps_hosts)
    except ValueError as error:
        raise InvalidRequestError(f"ps_hosts: {error}") from None
    twice = [host for position, host in enumerate(ps_hosts) if host in ps_hosts[:position]]
    if twice:
        raise InvalidRequestError(f"ps_hosts has {twice[0]!r} twice; give every parameter server once")


def _outcome_of(outcomes: Sequence[pb.PushOutcome]) -> Outcome:
    """How a push to several servers ended: as it did on that where it ended worst."""
    ended = {Outcome(outcome.outcome) for outcome in outcomes}
    return next(outcome for outcome in (Outcome.STALE, Outcome.ALREADY_COUNTED, Outcome.COMMITTED) if outcome in ended)


def _variables_of(arrays: Mapping[str, _Array]) -> tuple[Variable, ...]:
    return tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items())


def _in_order(arrays: Mapping[str, _Array], manifest: Manifest) -> dict[str, _Array]:
    """The arrays in manifest order. Raises ConflictError, naming the first variable that does not fit."""
    known = {variable.name: variable for variable in manifest.variables}
    ordered = {name: arrays[name] for name in known if name in arrays}
    ordered.update(arrays)
    difference = first_difference(_variables_of(ordered), manifest.variables, "here", "in the center")
    if difference is not None:
        raise ConflictError(f"{difference}; give all workers the same model", Reason.MANIFEST_MISMATCH)
    return ordered
