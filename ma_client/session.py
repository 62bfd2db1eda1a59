"""A worker's conversation with the parameter server, for people without torch: numpy in, numpy out."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ma_client.cluster import ClusterSpec
from ma_client.patience import Patience
from ma_client.shard import Answer, Deadline, Shard
from ma_client.staging import Staging
from modelaverage import wire
from modelaverage.checks import check_global_step, check_weight, check_worker_id
from modelaverage.errors import (
    ConflictError,
    InvalidRequestError,
    ModelAverageError,
    NotInitializedError,
    Reason,
    RetryPushError,
)
from modelaverage.manifest import DEFAULT_FRAGMENT_SIZE_BYTES, DTYPES, Manifest, Variable, dtype_name, first_difference
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["InitializeResult", "ParameterServerSession", "PushResult"]

_Array = NDArray[Any]
# Each restart of a round has a cause of its own, a worker that died; so many in a row are another kind of trouble.
_MAX_ROUND_RESTARTS = 100
_LEAVE_TIMEOUT_S = 1.0


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
        center: the center variables by name.
        global_step: rounds completed; the base step of what is trained from this center.
        outcome: COMMITTED, STALE (this push was not used) or ALREADY_COUNTED (an earlier one was).
        contributors: ids of the workers in this center's average, sorted.
        waited_s: seconds from this push being complete to the round's commit.
        untouched: variables that no contributor had changed; the center's values were kept.
    """

    center: Mapping[str, _Array]
    global_step: int
    outcome: Outcome
    contributors: tuple[str, ...]
    waited_s: float
    untouched: frozenset[str]


class ParameterServerSession:
    """One worker's session with the parameter server. Not for use by several threads at once.

    Args:
        ps_hosts: addresses of the parameter servers, HOST:PORT; one, for the time being.
        worker_id: this worker's name in the job, 1 to 128 bytes, the same after a restart.
        is_chief: whether this worker may initialize the center.
        connect_timeout_s: how long to wait for the server to be there.
        fragment_size_bytes: unit of transfer and averaging, if this session initializes the center: a multiple of 8
            up to 2 MiB.
        shared_memory: hand bytes over in shared memory if the server is on this host and offers it.
        reconnect_timeout_s: how long to try again when the server is away, restarting or not reachable; 0: not at all.
            A push that is made again sends only what the server lacks, and is never counted twice.
        init_from: a safetensors file (`ps-server export` writes such) with the values that `initialize` sets the center
            to, instead of those that it is given; None: those that it is given.
        round_timeout_s: how long a push waits for the other workers unless it says otherwise, those of the optimizer
            included; None: as long as it takes.

    Raises:
        InvalidRequestError: WORKER_ID_INVALID, or not exactly one address.
        ServerUnavailableError: nobody answered in time.

    Example:
        >>> with ParameterServerSession(["127.0.0.1:2222"], worker_id="worker-0", is_chief=True) as session:
        ...     session.initialize({"w": w})
        ...     center, step = session.pull()
        ...     result = session.push_and_average({"w": w})
    """

    def __init__(
        self,
        ps_hosts: Sequence[str],
        *,
        worker_id: str,
        is_chief: bool = False,
        connect_timeout_s: float = 30.0,
        fragment_size_bytes: int = DEFAULT_FRAGMENT_SIZE_BYTES,
        shared_memory: bool = True,
        reconnect_timeout_s: float = 60.0,
        init_from: str | Path | None = None,
        round_timeout_s: float | None = None,
    ) -> None:
        if isinstance(ps_hosts, str) or len(ps_hosts) != 1:
            raise InvalidRequestError(f"ps_hosts is {ps_hosts!r}; give a list with the address of one parameter server")
        check_worker_id(worker_id)
        self.worker_id = worker_id
        self.is_chief = is_chief
        self.base_step: int | None = None
        """The `global_step` of the center that this worker has; None before the first pull or push."""
        self.num_workers: int | None = None
        """How many workers a round of the server waits for; None before the first initialize or pull."""
        self._fragment_size_bytes = fragment_size_bytes
        self._shared_memory = shared_memory
        self._round_timeout_s = round_timeout_s
        self._init_from = init_from
        self._incarnation = uuid.uuid4().bytes
        self._push_id = 0
        self._manifest_id = ""
        self._staging: Staging | None = None
        self._shard = Shard(ps_hosts[0], connect_timeout_s)
        self._patience = Patience(reconnect_timeout_s, lambda: self._shard.answered_at_s)

    @classmethod
    def from_env(cls, **options: Any) -> ParameterServerSession:
        """The session of this process in the cluster that `ma-launch` or `ps-worker run` described in the environment.

        Args:
            options: keyword arguments of the constructor, to override or add.

        Raises:
            ClusterError: a variable is missing or unusable.
        """
        cluster = ClusterSpec.from_env()
        settings: dict[str, Any] = {
            "worker_id": cluster.worker_id,
            "is_chief": cluster.is_chief,
            "init_from": cluster.init_from,
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
        """Ends the session; the center stays where it is. Rounds with a quorum no longer wait for this worker."""
        if self._push_id:
            with contextlib.suppress(ModelAverageError):  # nobody has to hear it
                self._shard.leave(self.worker_id, self._incarnation, Deadline(_LEAVE_TIMEOUT_S))
        self._shard.close()

    def initialize(
        self, variables: Mapping[str, ArrayLike], global_step: int = 0, timeout_s: float | None = None
    ) -> InitializeResult:
        """Sets the center variables if they are not set yet. For the chief.

        Args:
            variables: initial values by name: float32, float64, float16 or bfloat16 arrays of any shape. Their order
                is the order of the manifest.
            global_step: where to start counting rounds.
            timeout_s: how long it may take; None: as long as it takes.

        Raises:
            InvalidRequestError: MANIFEST_INVALID, GLOBAL_STEP_INVALID; this session is not the chief's; the file of
                ``init_from`` cannot be read, or its variables are others than these.
            ConflictError: MANIFEST_MISMATCH, naming the first variable that differs from the server's.
        """
        if not self.is_chief:
            raise InvalidRequestError(f"{self.worker_id!r} is not the chief: only the chief initializes the center")
        check_global_step(global_step)
        arrays = _as_arrays(variables)
        if self._init_from is not None:
            arrays = _read_like(arrays, self._init_from)
        manifest = Manifest(_variables_of(arrays), self._fragment_size_bytes)
        values = [_bytes_of(array) for array in arrays.values()]
        header = pb.InitializeHeader(
            worker_id=self.worker_id, manifest=wire.manifest_to_message(manifest), global_step=global_step
        )
        deadline = Deadline(timeout_s)
        response = self._patience.call(
            lambda: self._shard.initialize(
                header, lambda index: manifest.fragment_parts(index, values), manifest.fragment_count, deadline
            ),
            deadline,
        )
        if response.initialized:
            self._adopt(manifest, response.manifest_id)
            self.base_step = response.global_step
        self.num_workers = response.num_workers
        return InitializeResult(response.initialized, response.global_step)

    def pull(
        self,
        wait_initialized: bool = True,
        timeout_s: float | None = None,
        *,
        expected: Mapping[str, ArrayLike] | None = None,
        copy: bool = True,
    ) -> tuple[Mapping[str, _Array], int]:
        """Reads the center variables; what is trained from them has their `global_step` as its base step.

        Args:
            wait_initialized: wait for the chief; otherwise an uninitialized center is an error.
            timeout_s: how long to wait altogether; None: as long as it takes.
            expected: arrays whose names, dtypes and shapes the center has to have.
            copy: False: the arrays are read-only and valid until the session's next call.

        Returns:
            The center variables by name, and `global_step`.

        Raises:
            NotInitializedError: there is no center, and ``wait_initialized`` is False.
            DeadlineExceededError: there was none within ``timeout_s``.
            ConflictError: MANIFEST_MISMATCH, naming the first variable in which ``expected`` differs.
        """
        request = pb.PullRequest(worker_id=self.worker_id, wait_initialized=wait_initialized)
        step = 0

        def staging_for(header: pb.CenterHeader) -> Staging:
            nonlocal step
            step = header.global_step
            self.num_workers = header.num_workers
            manifest = wire.manifest_from_message(header.manifest)
            if expected is not None:
                _in_order(_as_arrays(expected), manifest)
            return self._adopt(manifest, header.manifest_id)

        deadline = Deadline(timeout_s)
        self._patience.call(lambda: self._shard.pull(request, staging_for, deadline), deadline)
        self.base_step = step
        arrays = self._require_staging().arrays
        return ({name: array.copy() for name, array in arrays.items()} if copy else arrays), step

    def push_and_average(
        self,
        variables: Mapping[str, ArrayLike],
        weight: float = 1.0,
        *,
        local_step: int = 0,
        untouched: Collection[str] = (),
        timeout_s: float | None = None,
        copy: bool = True,
    ) -> PushResult:
        """One round: gives the local variables to the average, waits at the barrier, returns the new center.

        ``variables`` is only read. If this raises, the push may be made again.

        Args:
            variables: local variables with the center's names, dtypes and shapes, in any order.
            weight: share in the average, from 1e-9 to 1e9.
            local_step: this worker's count of optimizer steps; shown in the server's status.
            untouched: names of variables that are as they came from the center, for want of a gradient. What all
                workers left untouched keeps the center's bytes.
            timeout_s: how long to wait for the other workers; None: the session's ``round_timeout_s``.
            copy: False: the result's arrays are read-only and valid until the session's next call.

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
        if self.base_step is None:
            raise NotInitializedError("pull the center (or initialize it) before the push", Reason.NOT_INITIALIZED)
        staging = self._require_staging()
        manifest = staging.manifest
        arrays = _in_order(_as_arrays(variables), manifest)
        # An array from a result that was not copied lies where the average is about to arrive.
        values = [_bytes_of(array.copy() if staging.overlaps(array) else array) for array in arrays.values()]
        numbers = {variable.name: number for number, variable in enumerate(manifest.variables)}
        unknown = set(untouched) - numbers.keys()
        if unknown:
            raise InvalidRequestError(f"untouched names {min(unknown)!r}, which is no center variable")
        self._push_id += 1
        header = pb.PushHeader(
            worker_id=self.worker_id,
            incarnation=self._incarnation,
            push_id=self._push_id,
            is_chief=self.is_chief,
            base_step=self.base_step,
            local_step=local_step,
            weight=weight,
            manifest_id=self._manifest_id,
            untouched_variables=sorted(numbers[name] for name in untouched),
            accepts_shared_memory=self._shared_memory,
        )
        answer, center = self._push(header, staging, values, deadline, copy)
        outcome = answer.outcome
        self.base_step = outcome.global_step
        return PushResult(
            center,
            outcome.global_step,
            Outcome(outcome.outcome),
            tuple(outcome.contributors),
            outcome.waited_s,
            frozenset(manifest.variables[number].name for number in outcome.untouched_variables),
        )

    def status(self, timeout_s: float = 5.0) -> pb.GetStatusResponse:
        """What the server is doing; the protocol's own message."""
        return self._shard.status(Deadline(timeout_s))

    def _push(
        self, header: pb.PushHeader, staging: Staging, values: list[memoryview], deadline: Deadline, copy: bool
    ) -> tuple[Answer, Mapping[str, _Array]]:
        def attempt() -> tuple[Answer, Mapping[str, _Array]]:
            answer = self._shard.push_and_average(
                header, lambda index: staging.manifest.fragment_parts(index, values), staging, deadline
            )
            return answer, answer.center(copy)

        restarts = 0
        while True:
            try:
                return self._patience.call(attempt, deadline)
            except RetryPushError:
                # The round was started over for another worker's sake; the same push is as good as before.
                restarts += 1
                if restarts > _MAX_ROUND_RESTARTS:
                    raise
            except NotInitializedError as error:
                raise NotInitializedError(
                    f"the parameter server has lost the center variables ({error}); was it started again without its "
                    "--checkpoint-dir? Local variables are untouched",
                    error.reason,
                ) from None

    def _require_staging(self) -> Staging:
        if self._staging is None:
            raise NotInitializedError("pull the center (or initialize it) before the push", Reason.NOT_INITIALIZED)
        return self._staging

    def _adopt(self, manifest: Manifest, manifest_id: str) -> Staging:
        if self._staging is None or self._staging.manifest != manifest:
            self._staging = Staging(manifest)
        self._staging.begin()
        self._manifest_id = manifest_id
        return self._staging


def _as_arrays(variables: Mapping[str, ArrayLike]) -> dict[str, _Array]:
    return {name: np.asarray(value) for name, value in variables.items()}


def _variables_of(arrays: Mapping[str, _Array]) -> tuple[Variable, ...]:
    return tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items())


def _read_like(arrays: Mapping[str, _Array], path: str | Path) -> dict[str, _Array]:
    """The same variables with the values of a file. Raises InvalidRequestError."""
    try:
        read = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidRequestError(f"cannot initialize from {path}: {error}") from None
    ordered = {name: read[name] for name in arrays if name in read} | read
    difference = first_difference(_variables_of(ordered), _variables_of(arrays), f"in {path}", "in this model")
    if difference is not None:
        raise InvalidRequestError(f"cannot initialize from a file of another model: {difference}")
    return ordered


def _in_order(arrays: Mapping[str, _Array], manifest: Manifest) -> dict[str, _Array]:
    """The arrays in manifest order. Raises ConflictError, naming the first variable that does not fit."""
    known = {variable.name: variable for variable in manifest.variables}
    ordered = {name: arrays[name] for name in known if name in arrays}
    ordered.update(arrays)
    difference = first_difference(_variables_of(ordered), manifest.variables, "here", "in the center")
    if difference is not None:
        raise ConflictError(f"{difference}; give all workers the same model", Reason.MANIFEST_MISMATCH)
    return ordered


def _bytes_of(array: _Array) -> memoryview:
    """The raw little-endian bytes of an array; a view wherever its memory allows."""
    little = DTYPES[dtype_name(array.dtype)]
    return np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data
