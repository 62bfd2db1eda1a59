"""Changes of single fields: the message stays well formed, so it gets further into the server than malformed bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from fuzz.corpus import OUTER_TEXTS

__all__ = ["with_other_fields"]

_INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    64,
    2**18,
    2**21,
    2**28,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (31, True),
    FieldDescriptor.CPPTYPE_ENUM: (31, True),
    FieldDescriptor.CPPTYPE_INT64: (63, True),
    FieldDescriptor.CPPTYPE_UINT32: (32, False),
    FieldDescriptor.CPPTYPE_UINT64: (64, False),
}
_NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-9, 1e9, 1e-10, 1e300, 5e-324, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    "a",
    "b",
    "\x00",
    "\n",
    "'\"\\",
    "\u202e",
    "\U0001f9e0" * 32,
    "\u00fc" * 65,
    "x" * 128,
    "x" * 129,
    "y" * 2000,
    *OUTER_TEXTS,
    "sgd:",
    "sgd:lr",
    "sgd:lr=nan,momentum=-inf",
    "sgd:lr=1_0,lr=0x1p3",
    "sgd:nesterov=True",
    "adam:lr=1,betas=" + "/" * 60,
    "adam:lr=" + "9" * 5000,
    ":=,/",
)
_MAX_DEPTH = 4


def with_other_fields(rng: Random, message_type: type[Message], data: bytes) -> bytes:
    """The message with one or a few fields changed; bytes that cannot be parsed stay as they are."""
    try:
        message = message_type.FromString(data)
    except DecodeError:
        return data
    for _ in range(rng.choice((1, 1, 2, 4))):
        each = rng.choice(list(_messages(message, _MAX_DEPTH)))
        # Often a field that it has, but also one that it lacks.
        there = [field for field, _ in each.ListFields()] if rng.random() < 0.5 else []
        fields: Sequence[Any] = there or each.DESCRIPTOR.fields
        if fields:
            _change(rng, each, rng.choice(fields))
    return message.SerializeToString()


def _messages(message: Message, depth: int) -> Iterator[Message]:
    """The message and all messages inside it."""
    yield message
    for field, value in message.ListFields():
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE and depth:
            for each in value if field.is_repeated else [value]:
                yield from _messages(each, depth - 1)


def _change(rng: Random, message: Message, field: FieldDescriptor) -> None:
    if rng.random() < 0.15:
        message.ClearField(field.name)
    elif field.is_repeated:
        _change_repeated(rng, getattr(message, field.name), field)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _value(rng, field, getattr(message, field.name)))


def _change_repeated(rng: Random, values: Any, field: FieldDescriptor) -> None:
    is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
    kind = rng.randrange(4)
    if kind == 0 and values:
        del values[rng.randrange(len(values))]
    elif kind == 1 and values:
        values.append(rng.choice(values))
    elif is_message:
        values.add()
    elif kind == 2 and values:
        at = rng.randrange(len(values))
        values[at] = _value(rng, field, values[at])
    else:
        values.extend([_value(rng, field, 0)] * rng.choice((1, 1, 1, 40)))


def _value(rng: Random, field: FieldDescriptor, old: Any) -> Any:
    if field.cpp_type in _BITS:
        bits, signed = _BITS[field.cpp_type]
        value = rng.choice((*_INTEGERS, int(old) + 1, int(old) - 1, int(old) ^ 1 << rng.randrange(bits)))
        if signed and rng.random() < 0.2:
            value = -value
        return max(-(1 << bits) if signed else 0, min(value, (1 << bits) - 1))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(_TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice((b"", bytes(old)[:-1], bytes(old) + b"\x00", bytes(15), bytes(16), rng.randbytes(len(old))))
    return rng.choice((*_NUMBERS, rng.uniform(-10, 10)))
