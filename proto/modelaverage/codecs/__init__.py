"""Codecs by name. A codec is an encoding of a fragment's elements on the wire.

To add one, write it in its own file (see `base.Codec`; for one that rounds, `changes.Changes`) and add a line to
`CODECS`.
"""

from __future__ import annotations

from modelaverage.codecs.base import Codec
from modelaverage.codecs.bfloat16 import BFLOAT16
from modelaverage.codecs.int4 import INT4
from modelaverage.codecs.int8 import INT8
from modelaverage.codecs.raw import RAW
from modelaverage.errors import Reason, refusal
from modelaverage.names import listed

__all__ = ["CODECS", "Codec", "RAW", "codec_named"]

CODECS: dict[str, Codec] = {
    RAW.name: RAW,
    BFLOAT16.name: BFLOAT16,
    INT8.name: INT8,
    INT4.name: INT4,
}
"""Every codec of this version."""


def codec_named(name: str) -> Codec:
    """The codec that a push header names; the empty name is `raw`. Raises InvalidRequestError (CODEC_UNKNOWN)."""
    codec = CODECS.get(name or RAW.name)
    if codec is None:
        raise refusal(
            Reason.CODEC_UNKNOWN, f"codec {name[:40]!r} is not known here, only {listed(list(CODECS))}; push raw"
        )
    return codec
