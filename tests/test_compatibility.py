"""Version 1 of the protocol only grows: tests/golden/protocol-v1.txt lists everything that was ever in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

from modelaverage.errors import FAULTS, Reason
from modelaverage.v1 import parameter_server_pb2 as pb

WRITTEN_DOWN = (Path(__file__).parent / "golden/protocol-v1.txt").read_text(encoding="utf-8").splitlines()

_SCALARS = {
    value.number: name.removeprefix("TYPE_").lower()
    for name, value in FieldDescriptorProto.Type.DESCRIPTOR.values_by_name.items()
}


def lines(file: FileDescriptor) -> Iterator[str]:
    """Everything that a client may rely on, one line each."""
    for message in file.message_types_by_name.values():
        for field in message.fields:
            yield f"{message.name}.{field.name} = {field.number}: {_type(field)}"
    for enum in file.enum_types_by_name.values():
        for value in enum.values:
            yield f"{enum.name}.{value.name} = {value.number}"
    for service in file.services_by_name.values():
        for method in service.methods:
            up, down = ("stream " * streams for streams in (method.client_streaming, method.server_streaming))
            name = f"/{service.full_name}/{method.name}"
            yield f"{name}: {up}{method.input_type.name} -> {down}{method.output_type.name}"
    for reason in Reason:
        yield f"reason {reason.name}: {FAULTS[reason].status}"
        yield f"action {reason.name}: {FAULTS[reason].action.value}"


def _type(field: FieldDescriptor) -> str:
    kind = field.message_type or field.enum_type
    name = kind.name if kind else _SCALARS[field.type]
    oneof = field.containing_oneof
    if oneof is not None and not oneof.name.startswith("_"):
        return f"oneof {oneof.name} {name}"
    label = "repeated " if field.is_repeated else "optional " if field.has_presence and not field.message_type else ""
    return label + name


def missing(file: FileDescriptor) -> set[str]:
    return set(WRITTEN_DOWN) - set(lines(file))


def without_a_field(file: FileDescriptorProto) -> None:
    del _message(file, "PushHeader").field[0]


def renumbered(file: FileDescriptorProto) -> None:
    _message(file, "PushHeader").field[0].number = 99


def of_another_type(file: FileDescriptorProto) -> None:
    _message(file, "PushOutcome").field[1].type = FieldDescriptorProto.TYPE_INT32


def with_another_reason(file: FileDescriptorProto) -> None:
    reasons = next(enum for enum in file.enum_type if enum.name == "ErrorReason")
    reasons.value[3].name, reasons.value[4].name = reasons.value[4].name, reasons.value[3].name


def without_a_call(file: FileDescriptorProto) -> None:
    del file.service[0].method[-1]


def _message(file: FileDescriptorProto, name: str) -> DescriptorProto:
    return next(message for message in file.message_type if message.name == name)


def test_nothing_that_was_in_version_1_is_gone_or_means_something_else() -> None:
    assert missing(pb.DESCRIPTOR) == set()


def test_what_is_new_in_version_1_is_written_down() -> None:
    assert set(lines(pb.DESCRIPTOR)) - set(WRITTEN_DOWN) == set()


@pytest.mark.parametrize("change", [without_a_field, renumbered, of_another_type, with_another_reason, without_a_call])
def test_a_change_that_breaks_clients_is_noticed(change: Callable[[FileDescriptorProto], None]) -> None:
    file = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    change(file)
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    assert missing(pool.FindFileByName(file.name))


def test_a_reason_that_comes_with_another_status_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAULTS, Reason.ROUND_FULL, FAULTS[Reason.SERVER_STOPPING])
    assert missing(pb.DESCRIPTOR) == {"reason ROUND_FULL: RESOURCE_EXHAUSTED", "action ROUND_FULL: stop"}
