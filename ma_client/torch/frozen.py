"""Parameters that are not trained: no center has them, so every worker has to load the same ones. The chief tells
digests of its own, and a worker that has others warns.

A digest covers up to 1,024 values that are spread over the parameter, rounded to bfloat16: it takes little time, and a
worker may keep the same weights in another precision.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import torch

from ma_client.session import ParameterServerSession
from modelaverage.logs import event
from modelaverage.manifest import MAX_FROZEN_BYTES

__all__ = ["differing", "digests_of", "warn_if_others"]

_log = logging.getLogger("ma_client")
_VALUES = 1024
_HASH_BYTES = 4
_NAMED = 3


def digests_of(parameters: Mapping[str, torch.Tensor]) -> bytes:
    """8 bytes for each parameter: 4 of a hash of its name, 4 of a hash of some of its values. Left out are parameters
    whose values are not floating point numbers, or not all here; beyond 65,536 parameters, the rest."""
    found = b"".join(
        _hash(name.encode()) + _hash(_sample(tensor)) for name, tensor in parameters.items() if _is_plain(tensor)
    )
    return found[:MAX_FROZEN_BYTES]


def differing(parameters: Mapping[str, torch.Tensor], told: bytes) -> list[str]:
    """Names of the parameters whose digests are told and are not these."""
    theirs, ours = _by_name_hash(told), _by_name_hash(digests_of(parameters))
    by_hash = {_hash(name.encode()): name for name in parameters}
    return [by_hash[key] for key, digest in ours.items() if theirs.get(key, digest) != digest]


def warn_if_others(session: ParameterServerSession, parameters: Mapping[str, torch.Tensor]) -> None:
    """Logs a warning if the chief has said that its frozen parameters are others than these."""
    names = differing(parameters, session.frozen_digests) if session.frozen_digests else []
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        _log.warning(
            "%s has other frozen parameters than the chief: %s%s; they are in no center, so load the same in every "
            "worker, or the average is of models that do not fit together",
            session.worker_id,
            ", ".join(names[:_NAMED]),
            more,
            extra=event(
                "frozen_differ",
                worker=session.worker_id,
                variables=names[:_NAMED],
                variables_omitted=max(0, len(names) - _NAMED),
            ),
        )


def _is_plain(tensor: torch.Tensor) -> bool:
    # Subclasses, such as DTensor, may have a part of the values, or other numbers in their place.
    is_here = type(tensor.data) is torch.Tensor and not tensor.is_meta and tensor.layout == torch.strided
    return is_here and tensor.is_floating_point() and tensor.numel() > 0


def _sample(tensor: torch.Tensor) -> bytes:
    tensor, count = tensor.detach(), tensor.numel()
    places = torch.linspace(0, count - 1, min(count, _VALUES), dtype=torch.float64).long()
    # By index in every dimension, since flattening would copy a tensor that is not contiguous.
    indices = list[torch.Tensor]()
    for size in reversed(tensor.shape):
        indices.insert(0, (places % size).to(tensor.device))
        places = places // size
    values = tensor[tuple(indices)] if indices else tensor.reshape(1)
    return values.to("cpu", torch.float32).bfloat16().view(torch.int16).numpy().tobytes()


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_HASH_BYTES).digest()


def _by_name_hash(digests: bytes) -> dict[bytes, bytes]:
    """Raises nothing: bytes that another client wrote in another form match no name."""
    size = 2 * _HASH_BYTES
    pairs = (digests[at : at + size] for at in range(0, len(digests) - size + 1, size))
    return {pair[:_HASH_BYTES]: pair[_HASH_BYTES:] for pair in pairs}
