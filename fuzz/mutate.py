"""Mutations of a message between a correct client and a fuzzed server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

__all__ = ["mutated"]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


_LENGTHS = tuple(
    _varint(value) for value in (0, 127, 2**21, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
) + (b"\x80" * 4 + b"\x00", b"\x80" * 9 + b"\x01", b"\xff" * 10, b"\xff" * 11)
# Tags of the fields of this protocol, in all wire types, and of fields that it does not have.
_TAGS = tuple(_varint(field << 3 | kind) for field in (1, 2, 3, 7, 9, 11, 100, 2**29 - 1) for kind in range(8))


def _flip(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _bit in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _truncate(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _cut(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 2, 4, 8, 64))]


def _insert(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))


def _duplicate(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    start, at = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    data[at:at] = data[start : start + rng.choice((1, 4, 16, 256))] * rng.choice((1, 1, 2, 20))


def _splice(rng: Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]


def _merge(rng: Random, data: bytearray, others: Sequence[bytes]) -> None:
    """Appends a message: protobuf reads two messages in a row as one."""
    data += rng.choice(others)


def _blow_up(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    """Writes a large number where a length, an index or a value may be."""
    start = rng.randrange(len(data) + 1)
    data[start : start + rng.choice((0, 1, 1, 1, 2))] = rng.choice(_LENGTHS)


def _add_field(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    data[at:at] = rng.choice(_TAGS) + rng.choice((rng.choice(_LENGTHS), rng.randbytes(4), b""))


def _nest(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    """Nests groups in groups, which has crashed recursive parsers."""
    at = rng.choice((0, len(data)))
    data[at:at] = rng.choice((b"\x0b", b"\x0b\x0c", b"\x7b")) * rng.choice((50, 101, 3000))


def _replace(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[:] = rng.randbytes(rng.choice((0, 1, 2, 8, 100, 1000)))


_CHANGES: tuple[Callable[[Random, bytearray, Sequence[bytes]], None], ...] = (
    *(_flip, _flip, _flip, _overwrite, _overwrite, _truncate, _cut, _insert, _duplicate),
    *(_splice, _splice, _merge, _blow_up, _blow_up, _blow_up, _add_field, _nest, _replace),
)
# Messages do not grow without bound; gRPC would refuse them, too.
_MAX_BYTES = 1 << 16


def mutated(rng: Random, message: bytes, others: Sequence[bytes]) -> bytes:
    """The message after a few changes; it may be mixed with ``others``."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_CHANGES)(rng, data, others)
    return bytes(data[:_MAX_BYTES])
