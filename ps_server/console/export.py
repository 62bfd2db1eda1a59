"""Reads the center from directories of checkpoints or from running servers, and writes it to a file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from modelaverage import wire
from modelaverage.access import proxies
from modelaverage.access.absence import no_answer
from modelaverage.access.channels import Access
from modelaverage.addresses import parse
from modelaverage.errors import ModelAverageError, told_reason
from modelaverage.manifest import Manifest
from modelaverage.outer import AVERAGE, OuterOptimizer, text_of
from modelaverage.placement import assemble, gather
from modelaverage.runtime.tuning import CHANNEL_OPTIONS
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.fields import Checkpoint
from ps_server.checkpoints.reading import find_latest, reason_of
from ps_server.checkpoints.safetensors_file import save

__all__ = ["ExportError", "export"]

_WORKER_ID = "ps-server export"  # a server requires the id of a worker that pulls
# The shards of a running job are pulled at the same time; now and then a round commits on some of them in between.
_MAX_TRIES = 20


class ExportError(Exception):
    """There is nothing to export, or the file cannot be written; one line that says why."""


@dataclass(frozen=True)
class _Center:
    """The variables of one source."""

    manifest: Manifest
    arrays: Mapping[str, NDArray[Any]]
    global_step: int
    outer: OuterOptimizer = AVERAGE
    state: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()


def export(
    sources: Sequence[str],
    out: Path,
    timeout_s: float,
    access: Access,
    tell: Callable[[str], None] = lambda _: None,
    with_outer_state: bool = False,
) -> int:
    """Writes the center variables to a safetensors file, unconverted, and their `global_step` to its metadata.

    Args:
        sources: directories of checkpoints, which servers may be using, or addresses of servers; for a job with several
            servers all of them, in order.
        out: the file, written under another name and then renamed.
        timeout_s: how long a server may take until it begins to send.
        access: opens channels to servers.
        tell: called with a line for each checkpoint that is skipped, which says why.
        with_outer_state: also write the outer optimizer's state, as tensors named as in a checkpoint (outer/SLOT/NAME),
            and its text to the metadata. Only checkpoints have it.

    Returns:
        The `global_step`.

    Raises:
        ExportError: there is no center there, or the file cannot be written.
    """
    if out.is_dir():
        raise ExportError(f"cannot write {out}: it is a directory")
    if not out.parent.is_dir():
        raise ExportError(f"cannot write {out}: there is no directory {out.parent}")
    if with_outer_state:
        for source in sources:
            if not Path(source).is_dir():
                raise ExportError(
                    f"{source} is no directory: only checkpoints have the outer optimizer's state, servers do not send "
                    "it; give the server's --checkpoint-dir, or leave out --with-outer-state"
                )
    centers = _of_one_step(sources, timeout_s, access)
    for line in dict.fromkeys(line for center in centers for line in center.passed_over):
        tell(line)
    try:
        whole = assemble([center.manifest for center in centers], sources)
    except ModelAverageError as error:
        raise ExportError(str(error)) from None
    global_step = centers[0].global_step
    arrays, about = gather(whole, [center.arrays for center in centers]), {"global_step": str(global_step)}
    if with_outer_state:
        outer = _same_outer(centers, sources)
        if not (state := _whole_state(whole, centers)):
            tell(f"the outer optimizer is {text_of(outer)}, which has no state")
        arrays = Checkpoint(whole, arrays, global_step, outer=outer, state=state).tensors
        about["outer"] = text_of(outer)
    try:
        save(out, arrays, about)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}") from None
    return global_step


def _same_outer(centers: Sequence[_Center], sources: Sequence[str]) -> OuterOptimizer:
    first = centers[0].outer
    for center, source in zip(centers, sources, strict=True):
        if center.outer != first:
            raise ExportError(
                f"the outer optimizers differ: {sources[0]} has {text_of(first)}, {source} has {text_of(center.outer)}"
            )
    return first


def _whole_state(whole: Manifest, centers: Sequence[_Center]) -> dict[str, dict[str, NDArray[Any]]]:
    """The state of the whole model, by slot and variable."""
    state = dict[str, dict[str, NDArray[Any]]]()
    for slot in dict.fromkeys(slot for center in centers for slot in center.state):
        parts = [center.state.get(slot, {}) for center in centers]
        kept = tuple(each for each in whole.variables if any(each.name in part for part in parts))
        state[slot] = gather(Manifest(kept, whole.fragment_size_bytes), parts)
    return state


def _of_one_step(sources: Sequence[str], timeout_s: float, access: Access) -> list[_Center]:
    """The variables of all sources at one `global_step`: the newest that all of them have."""
    at_most: int | None = None
    with ThreadPoolExecutor(len(sources)) as threads:
        for _ in range(_MAX_TRIES):
            read = [_reader(source, at_most, timeout_s, access) for source in sources]
            centers = [future.result() for future in [threads.submit(one) for one in read]]
            steps = [center.global_step for center in centers]
            if len(set(steps)) == 1:
                return centers
            at_most = min(steps)
    found = ", ".join(f"{source}: {step}" for source, step in zip(sources, steps, strict=True))
    raise ExportError(f"there is no global_step for which every source has a center ({found})")


def _reader(source: str, at_most: int | None, timeout_s: float, access: Access) -> Callable[[], _Center]:
    if Path(source).is_dir():
        return lambda: _read(Path(source), at_most)
    try:
        parse(source)
    except ValueError as error:
        raise ExportError(
            f"{source} is neither a directory nor a server's address (HOST:PORT or unix:PATH): {error}"
        ) from None
    return lambda: _pull(source, timeout_s, access)


def _read(directory: Path, at_most: int | None) -> _Center:
    try:
        found, passed_over = find_latest(directory, at_most)
    except OSError as error:
        raise ExportError(f"cannot read {directory}: {error.strerror or error}") from None
    if found is None:
        newest = "".join(f"; of the newest, {path.name}: {reason_of(error)}" for path, error in passed_over[:1])
        of_step = "" if at_most is None else f" of global_step {at_most} or before, as another server has"
        raise ExportError(f"there is no usable checkpoint in {directory}{of_step}{newest}")
    _, checkpoint = found
    why = tuple(f"checkpoint {path} is skipped: {reason_of(error)}" for path, error in passed_over)
    return _Center(
        checkpoint.manifest, checkpoint.arrays, checkpoint.global_step, checkpoint.outer, checkpoint.state, why
    )


def _pull(address: str, timeout_s: float, access: Access) -> _Center:
    with access.channel(address, CHANNEL_OPTIONS) as channel:
        rpc = channel.unary_stream(f"/{wire.SERVICE}/Pull", _as_is, _as_is)
        request = pb.PullRequest(worker_id=_WORKER_ID).SerializeToString()
        call = rpc(request, wait_for_ready=True, metadata=access.metadata)
        # No deadline: a large model takes long. Once a server has begun, gRPC's keepalive notices if it vanishes.
        patience = threading.Timer(timeout_s, call.cancel)
        patience.start()
        try:
            return _receive(iter(call), patience)
        except grpc.RpcError as error:
            distrust = access.problem(address) if error.code() is grpc.StatusCode.CANCELLED else None
            raise ExportError(distrust or _reason(error, address, timeout_s)) from None
        except ModelAverageError as error:
            raise ExportError(f"{address} did not answer as a parameter server: {error}") from None
        finally:
            patience.cancel()
            call.cancel()  # type: ignore[no-untyped-call]


def _receive(messages: Iterator[bytes], patience: threading.Timer) -> _Center:
    opening = next(messages, b"")
    patience.cancel()
    header = wire.parse(pb.PullResponse, opening).header
    manifest = wire.manifest_from_message(header.manifest)
    buffer = np.zeros(manifest.buffer_size_bytes, np.uint8)
    for index in range(manifest.fragment_count):
        fragment = wire.read_fragment(pb.PullResponse, next(messages, b""))
        start, end = manifest.fragment_bounds(index)
        if not isinstance(fragment, tuple) or fragment[0] != index or len(fragment[1]) != end - start:
            raise ModelAverageError(f"it did not send fragment {index} of {manifest.fragment_count} as it should")
        buffer[start:end] = np.frombuffer(fragment[1], np.uint8)
    return _Center(manifest, manifest.arrays(buffer), header.global_step)


def _reason(error: grpc.RpcError, address: str, timeout_s: float) -> str:
    if error.code() is grpc.StatusCode.CANCELLED:
        return no_answer(address, timeout_s)
    if told_reason(error.trailing_metadata()):
        return f"{address}: {error.details()}"
    return f"{address} did not answer as a parameter server: {error.details()}{proxies.in_the_way(address)}"


def _as_is(message: bytes) -> bytes:
    return message
