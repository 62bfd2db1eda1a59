"""Converts between protobuf messages and the project's types. Every message of the protocol is built and read here.

Fragments carry almost all bytes, and protobuf would copy each byte twice when sending and once when receiving. So a
fragment message is written by hand, byte for byte as protobuf writes it. A received one is read in place if it has that
form; any other legal encoding (fields in another order, unknown fields) is left to the library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from modelaverage.errors import Reason, refusal
from modelaverage.manifest import (
    MAX_NAME_BYTES,
    Manifest,
    Part,
    Shard,
    Variable,
    check_dimensions,
    check_variable_count,
)
from modelaverage.rpcs import SERVICE
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = [
    "MAX_MANIFEST_BYTES",
    "MAX_MESSAGE_BYTES",
    "PullHeader",
    "SERVICE",
    "check_sendable",
    "encode_fragment",
    "encode_manifest",
    "manifest_from_message",
    "manifest_to_message",
    "parse",
    "read_fragment",
    "shard_from_message",
    "shard_to_message",
]

# gRPC's default limit on both sides; longer messages are refused.
MAX_MESSAGE_BYTES = 4 << 20
# Leaves room for the other fields in the headers of Initialize and Pull, and for future fields.
MAX_MANIFEST_BYTES = MAX_MESSAGE_BYTES - 512
# How many variables are serialized at once, so that other threads wait only briefly.
_VARIABLES_AT_ONCE = 1000

_M = TypeVar("_M", bound=Message)
# The messages that may carry a fragment.
_Carrier = pb.InitializeRequest | pb.PullResponse | pb.PushAndAverageRequest | pb.PushAndAverageResponse
_C = TypeVar("_C", bound=_Carrier)

# A message that carries a fragment is `fragment = 2`, itself `index = 1, data = 2`: the same in all four streams.
_FRAGMENT_TAG = b"\x12"
_INDEX_TAG = b"\x08"
_DATA_TAG = b"\x12"

_DATA_TYPES = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float64": pb.DATA_TYPE_FLOAT64,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
}
_DTYPE_NAMES = {number: name for name, number in _DATA_TYPES.items()}


def parse(message_type: type[_M], data: bytes) -> _M:
    """Reads a message. Raises ProtocolError (MESSAGE_MALFORMED) if the bytes are not a message of this type."""
    try:
        return message_type.FromString(data)
    except DecodeError as error:
        name = message_type.DESCRIPTOR.name
        raise refusal(
            Reason.MESSAGE_MALFORMED,
            f"{len(data)} bytes are not a {name}: {error}; generate the client from the .proto",
        ) from None


def manifest_to_message(manifest: Manifest) -> pb.Manifest:
    """The message for a manifest."""
    return pb.Manifest(
        variables=[_variable_to_message(variable) for variable in manifest.variables],
        fragment_size_bytes=manifest.fragment_size_bytes,
        shard=shard_to_message(manifest.shard),
        frozen_digests=manifest.frozen_digests,
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest_to_message`. Raises InvalidRequestError (MANIFEST_INVALID) if no header can carry them."""
    # Concatenated messages parse as one: repeated fields are appended, and every other field occurs once.
    parts = [
        pb.Manifest(
            variables=[_variable_to_message(v) for v in manifest.variables[start : start + _VARIABLES_AT_ONCE]]
        ).SerializeToString()
        for start in range(0, len(manifest.variables), _VARIABLES_AT_ONCE)
    ]
    rest = pb.Manifest(
        fragment_size_bytes=manifest.fragment_size_bytes,
        shard=shard_to_message(manifest.shard),
        frozen_digests=manifest.frozen_digests,
    )
    encoded = b"".join([*parts, rest.SerializeToString()])
    if len(encoded) > MAX_MANIFEST_BYTES:
        names_bytes = sum(len(variable.name.encode()) for variable in manifest.variables)
        raise refusal(
            Reason.MANIFEST_INVALID,
            f"the manifest of {len(manifest.variables)} variables has {len(encoded)} bytes, {names_bytes} of them in "
            f"names; at most {MAX_MANIFEST_BYTES} fit a message: give variables shorter names, put several parameters "
            "into one variable, or share the model among more servers",
        )
    return encoded


def check_sendable(manifest: Manifest) -> None:
    """Raises InvalidRequestError (MANIFEST_INVALID) if no header can carry the manifest, in Initialize or in Pull."""
    encode_manifest(manifest)


class PullHeader:
    """The message that opens a pulled center. Serialized once, except for its numbers: a manifest may have 4 MiB.

    Args:
        manifest: the manifest of the center.
        told: what is told of the job's choices: texts by field of `CenterHeader`.

    Raises:
        InvalidRequestError: MANIFEST_INVALID: no message can carry it.
    """

    def __init__(self, manifest: Manifest, told: Mapping[str, str] = MappingProxyType({})) -> None:
        encoded, manifest_id = encode_manifest(manifest), manifest.id.encode()
        self._fixed = b"".join(
            (b"\x0a", _varint(len(encoded)), encoded, b"\x12", _varint(len(manifest_id)), manifest_id)
        )
        self._told = pb.CenterHeader(
            outer_optimizer=told.get("outer_optimizer", ""), compression=told.get("compression", "")
        ).SerializeToString()

    def encode(self, global_step: int, num_workers: int, center_id: int = 0) -> bytes:
        """The `PullResponse` with the header of a center of this step. ``center_id`` 0: not told."""
        numbers = b"\x18" + _varint(global_step) if global_step else b""
        numbers += b"\x20" + _varint(num_workers) if num_workers else b""
        rest = numbers + self._told
        if center_id:
            rest += b"\x39" + center_id.to_bytes(8, "little")
        return b"".join((b"\x0a", _varint(len(self._fixed) + len(rest)), self._fixed, rest))


def manifest_from_message(message: pb.Manifest) -> Manifest:
    """The manifest in a message. Raises InvalidRequestError (MANIFEST_INVALID)."""
    check_variable_count(len(message.variables))  # first, because all other checks take time per variable
    return Manifest(
        tuple(_variable_from_message(variable) for variable in message.variables),
        message.fragment_size_bytes,
        shard_from_message(message.shard) if message.HasField("shard") else None,
        message.frozen_digests,
    )


def shard_to_message(shard: Shard | None) -> pb.Shard | None:
    """The message for a shard."""
    return None if shard is None else pb.Shard(index=shard.index, count=shard.count, job_id=shard.job_id)


def shard_from_message(message: pb.Shard) -> Shard:
    """The shard in a message. Raises InvalidRequestError (MANIFEST_INVALID)."""
    return Shard(message.index, message.count, message.job_id)


def _variable_to_message(variable: Variable) -> pb.Variable:
    part = variable.part
    return pb.Variable(
        name=variable.name,
        data_type=_DATA_TYPES[variable.dtype],
        shape=variable.shape,
        part=None if part is None else pb.Part(variable=part.variable, start=part.start, shape=part.shape),
    )


def _variable_from_message(message: pb.Variable) -> Variable:
    name, data_type, part = message.name, message.data_type, None
    if message.HasField("part"):
        part = Part(message.part.variable, message.part.start, _shape(name, message.part.shape))
    dtype = _DTYPE_NAMES.get(data_type) or f"number {data_type}"
    return Variable(name, dtype, _shape(name, message.shape), part)


def _shape(name: str, extents: Sequence[int]) -> tuple[int, ...]:
    check_dimensions(name[:MAX_NAME_BYTES], len(extents))  # there may be millions
    return tuple(extents)


def encode_fragment(index: int, parts: Iterable[bytes | memoryview]) -> bytes:
    """The message with fragment ``index``, for any of the four streams; its data are the joined parts."""
    parts = list(parts)
    size_bytes = sum(len(part) for part in parts)
    head = (_INDEX_TAG + _varint(index) if index else b"") + _DATA_TAG + _varint(size_bytes)
    return b"".join((_FRAGMENT_TAG, _varint(len(head) + size_bytes), head, *parts))


def read_fragment(message_type: type[_C], data: bytes) -> tuple[int, memoryview] | _C:
    """The index and bytes of the fragment in a message, or the message itself if it has other fields.

    Raises ProtocolError (MESSAGE_MALFORMED).
    """
    fragment = _read_canonical_fragment(data)
    if fragment is not None:
        return fragment
    message = parse(message_type, data)
    if [field.name for field, _ in message.ListFields()] == ["fragment"]:
        return message.fragment.index, memoryview(message.fragment.data)
    return message


def _read_canonical_fragment(data: bytes) -> tuple[int, memoryview] | None:
    # Every step matches exactly or gives up, so the library would read any accepted message the same way.
    try:
        if data[:1] != _FRAGMENT_TAG:
            return None
        size_bytes, at = _read_varint(data, 1)
        if at + size_bytes != len(data):
            return None
        index = 0
        if data[at : at + 1] == _INDEX_TAG:
            index, at = _read_varint(data, at + 1)
        if data[at : at + 1] != _DATA_TAG:
            return None
        size_bytes, at = _read_varint(data, at + 1)
    except IndexError:
        return None
    if at + size_bytes != len(data) or index >= 2**32:
        return None
    return index, memoryview(data)[at:]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    # Five bytes hold every possible length and index; a longer varint is left to the library.
    value = 0
    for place in range(5):
        byte = data[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise IndexError
