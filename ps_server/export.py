"""Takes the center out of a directory of checkpoints or a running server, and writes it for others to read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from modelaverage import wire
from modelaverage.errors import REASON_METADATA_KEY, ModelAverageError
from modelaverage.tuning import CHANNEL_OPTIONS
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoint import find_latest, save

__all__ = ["ExportError", "export"]

_WORKER_ID = "ps-server export"  # a server wants to know who pulls
_Arrays = Mapping[str, NDArray[Any]]


class ExportError(Exception):
    """There is nothing to export, or nowhere to write it; one line that says why."""


def export(source: str, out: Path, timeout_s: float) -> int:
    """Writes the center variables as they are to a safetensors file, and their `global_step` to its metadata.

    Args:
        source: a directory of checkpoints, which a server may be using; or the address of a server.
        out: written beside and renamed.
        timeout_s: how long a server may take until it begins to send.

    Returns:
        The `global_step`.

    Raises:
        ExportError: there is no center there, or the file cannot be written.
    """
    if out.is_dir():
        raise ExportError(f"cannot write {out}: it is a directory")
    if not out.parent.is_dir():
        raise ExportError(f"cannot write {out}: there is no directory {out.parent}")
    if Path(source).is_dir():
        arrays, global_step = _read(Path(source))
    elif _is_address(source):
        arrays, global_step = _pull(source, timeout_s)
    else:
        raise ExportError(f"{source} is neither a directory nor a server's address (HOST:PORT or unix:PATH)")
    try:
        save(out, arrays, {"global_step": str(global_step)})
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}") from None
    return global_step


def _is_address(source: str) -> bool:
    host, colon, port = source.rpartition(":")
    return source.startswith("unix:") or (bool(colon and host) and port.isdecimal() and "/" not in host)


def _read(directory: Path) -> tuple[_Arrays, int]:
    try:
        found, passed_over = find_latest(directory)
    except OSError as error:
        raise ExportError(f"cannot read {directory}: {error.strerror or error}") from None
    if found is None:
        newest = "".join(f"; of the newest, {path.name}: {error}" for path, error in passed_over[:1])
        raise ExportError(f"there is no usable checkpoint in {directory}{newest}")
    _, checkpoint = found
    return checkpoint.arrays, checkpoint.global_step


def _pull(address: str, timeout_s: float) -> tuple[_Arrays, int]:
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        rpc = channel.unary_stream(f"/{wire.SERVICE}/Pull", _as_is, _as_is)
        call = rpc(pb.PullRequest(worker_id=_WORKER_ID).SerializeToString(), wait_for_ready=True)
        # No deadline: a model may take its time. Once a server has begun, keepalive tells whether it is still there.
        patience = threading.Timer(timeout_s, call.cancel)
        patience.start()
        try:
            return _receive(iter(call), patience)
        except grpc.RpcError as error:
            raise ExportError(_reason(error, address, timeout_s)) from None
        except ModelAverageError as error:
            raise ExportError(f"{address} did not answer as a parameter server: {error}") from None
        finally:
            patience.cancel()
            call.cancel()  # type: ignore[no-untyped-call]


def _receive(messages: Iterator[bytes], patience: threading.Timer) -> tuple[_Arrays, int]:
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
    return manifest.arrays(buffer), header.global_step


def _reason(error: grpc.RpcError, address: str, timeout_s: float) -> str:
    if error.code() is grpc.StatusCode.CANCELLED:
        return f"no parameter server answers at {address} (waited {timeout_s:g} s)"
    if any(entry.key == REASON_METADATA_KEY for entry in error.trailing_metadata() or ()):
        return f"{address}: {error.details()}"
    return f"{address} did not answer as a parameter server: {error.details()}"


def _as_is(message: bytes) -> bytes:
    return message
