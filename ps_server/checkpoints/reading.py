"""Reading the center from disk: safetensors files that outlive the server. keeper.py decides when to write them,
writer.py writes them, files.py names them.

A checkpoint is first *fresh*: complete, but perhaps only in the kernel's memory. That survives a kill of the server and
needs no wait for the disk. After a reboot, fresh files are not trusted. It is then made *durable*: flushed to the disk
and renamed to a name with a checksum of its bytes.

A reader trusts nothing in a file and skips a file with any defect.
"""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import Codec
from modelaverage.logs import event
from modelaverage.manifest import DTYPES, Manifest
from modelaverage.outer import OuterOptimizer
from ps_server.center.center import Center
from ps_server.checkpoints import files
from ps_server.checkpoints.fields import Checkpoint, CheckpointError, content_of
from ps_server.checkpoints.safetensors_file import MAX_HEAD_BYTES, Head, read_head

__all__ = ["Checkpoint", "CheckpointError", "find_latest", "load_latest", "read", "reason_of"]

_log = logging.getLogger("ps_server")
_BLOCK_BYTES = 1 << 20
# A server may rename a file between the listing and the read. It does so only a few times.
_MAX_LOOKS = 100
_LONGEST_REASON = 300


def load_latest(directory: Path, max_model_bytes: int | None = None) -> Checkpoint | None:
    """The newest usable checkpoint; None if the directory has none. Logs which files it skipped, and why.

    Raises:
        CheckpointError: the directory has checkpoints, but none is usable. A server must not start without them.
        OSError: the directory cannot be read.
    """
    found, passed_over = find_latest(directory, max_model_bytes=max_model_bytes)
    for path, error in passed_over:
        why = event("checkpoint_passed_over", path=str(path), cause=reason_of(error))
        _log.warning("checkpoint %s is skipped: %s", path, reason_of(error), extra=why)
    if found is None:
        if passed_over:
            raise CheckpointError(
                f"none of its {len(passed_over)} checkpoints can be used; move them away to start without them"
            )
        return None
    path, checkpoint = found
    step = checkpoint.global_step
    what = event("checkpoint_restored", path=str(path), round=step)
    _log.warning("continuing from checkpoint %s, global_step %d", path, step, extra=what)
    return checkpoint


def find_latest(
    directory: Path, at_most: int | None = None, max_model_bytes: int | None = None
) -> tuple[tuple[Path, Checkpoint] | None, list[tuple[Path, Exception]]]:
    """The newest usable checkpoint, and the newer unusable ones with the reason. Changes nothing, because a server may
    be using the directory.

    Args:
        directory: the directory of the checkpoints.
        at_most: consider only this `global_step` and earlier ones.
        max_model_bytes: a server's `--max-model-bytes`; a larger model is not usable.

    Raises:
        OSError: the directory cannot be read.
    """
    descriptor = files.open_directory(directory)
    try:
        for looks in range(_MAX_LOOKS):
            passed_over = list[tuple[Path, Exception]]()
            for name in files.newest_first(descriptor):
                if at_most is not None and _step_of(name) > at_most:
                    continue
                try:
                    return (directory / name, read(descriptor, name, max_model_bytes)), passed_over
                except FileNotFoundError as error:  # it was renamed or replaced meanwhile
                    if looks + 1 < _MAX_LOOKS:
                        break
                    passed_over.append((directory / name, error))
                except (CheckpointError, OSError) as error:
                    passed_over.append((directory / name, error))
            else:
                break
        return None, passed_over
    finally:
        os.close(descriptor)


def read(directory: int, name: str, max_model_bytes: int | None = None) -> Checkpoint:
    """Reads one checkpoint into memory, so that the checked and the returned bytes are the same.

    Args:
        directory: a descriptor of the directory.
        name: the name of the file.
        max_model_bytes: see `find_latest`.

    Raises:
        CheckpointError: the file is not usable, for whatever reason.
        OSError: the file cannot be read.
    """
    parsed = files.parse_name(name)
    if parsed is None:
        raise CheckpointError("its name is not that of a checkpoint")
    descriptor = files.open_regular(directory, name)
    try:
        return _read(descriptor, *parsed, max_model_bytes)
    except (CheckpointError, OSError):
        raise
    except MemoryError:
        raise CheckpointError("there is not enough memory to read it") from None
    except Exception as error:  # for any defect: an older one may be usable
        raise CheckpointError(f"it is damaged ({_in_a_line(error)})") from None
    finally:
        os.close(descriptor)


def reason_of(error: Exception) -> str:
    """Why a checkpoint is skipped, in one line."""
    return (isinstance(error, OSError) and error.strerror) or _in_a_line(error)


def _read(descriptor: int, step: int, kind: str, max_model_bytes: int | None) -> Checkpoint:
    size_bytes = os.fstat(descriptor).st_size
    if max_model_bytes is not None and size_bytes > max_model_bytes + MAX_HEAD_BYTES:
        raise CheckpointError(f"its {size_bytes} bytes are more than --max-model-bytes {max_model_bytes} allows")
    head = read_head(descriptor, size_bytes)
    content = content_of(head, step, kind == files.FRESH)
    _check_memory(content.manifest, content.outer, content.codec, max_model_bytes)
    body = np.empty(head.body_size_bytes, np.uint8)
    checksum = zlib.crc32(head.content)
    with body.data as view:
        at = 0
        while at < len(view):
            count = os.readv(descriptor, [view[at : at + _BLOCK_BYTES]])
            if count == 0:
                raise CheckpointError("it became shorter while it was read")
            checksum = zlib.crc32(view[at : at + count], checksum)
            at += count
    if kind not in (files.FRESH, f"{checksum:08x}"):
        raise CheckpointError("its bytes are not those that were written")
    arrays = {name: _array(body, head, name) for name in (variable.name for variable in content.manifest.variables)}
    state = {
        slot: {name: _array(body, head, tensor) for name, tensor in by_variable.items()}
        for slot, by_variable in content.state.items()
    }
    return Checkpoint(
        content.manifest,
        arrays,
        step,
        content.contributors,
        content.counted,
        content.finished,
        outer=content.outer,
        codec=content.codec,
        center_id=content.center_id,
        state=state,
    )


def _array(body: NDArray[np.uint8], head: Head, name: str) -> NDArray[Any]:
    tensor = head.tensors[name]
    return body[tensor.begin : tensor.end].view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def _check_memory(manifest: Manifest, outer: OuterOptimizer, codec: Codec, max_model_bytes: int | None) -> None:
    """Raises CheckpointError or ModelAverageError unless Initialize would take it."""
    needs_bytes = Center.memory_bytes(manifest, outer, codec)
    if max_model_bytes is not None and needs_bytes > 2 * max_model_bytes:
        raise CheckpointError(
            f"a model of {manifest.size_bytes} bytes with {outer.name} and {codec.name} needs {needs_bytes} bytes of "
            f"memory, over twice --max-model-bytes {max_model_bytes}"
        )


def _step_of(name: str) -> int:
    parsed = files.parse_name(name)
    assert parsed is not None
    return parsed[0]


def _in_a_line(error: Exception) -> str:
    shown = "".join(each if each.isprintable() else " " for each in str(error)) or type(error).__name__
    return shown if len(shown) <= _LONGEST_REASON else f"{shown[:_LONGEST_REASON]}..."
