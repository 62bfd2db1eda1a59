"""The golden messages for authors of clients: the library reads and writes the same bytes, and they have all fields."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from modelaverage import wire
from modelaverage.v1 import parameter_server_pb2 as pb

FILES = {path.stem: path for path in sorted((Path(__file__).parent / "golden/wire").glob("*.hex"))}
CARRIERS = (pb.InitializeRequest, pb.PullResponse, pb.PushAndAverageRequest, pb.PushAndAverageResponse)
MESSAGES: dict[str, Descriptor] = dict(pb.DESCRIPTOR.message_types_by_name)


def golden(name: str) -> tuple[Message, bytes]:
    """The message that a file describes, and the bytes that it has."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    (full_name, *text) = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    message_type = getattr(pb, name.partition(".")[0])
    assert full_name == message_type.DESCRIPTOR.full_name
    data = bytes.fromhex("".join(line for line in lines if not line.startswith("#")))
    return text_format.Parse("\n".join(text), message_type()), data


def test_every_message_is_written_as_its_golden_bytes_and_read_from_them() -> None:
    for name in FILES:
        message, data = golden(name)
        assert message.SerializeToString(deterministic=True).hex(" ") == data.hex(" "), name
        assert wire.parse(type(message), data) == message, name


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("Manifest")])
def test_a_manifest_is_read_and_written_as_the_golden_bytes(name: str) -> None:
    message, data = golden(name)
    assert isinstance(message, pb.Manifest)
    assert wire.manifest_to_message(wire.manifest_from_message(message)).SerializeToString() == data


def test_a_shard_is_read_and_written_as_the_golden_bytes() -> None:
    message, data = golden("Shard")
    assert isinstance(message, pb.Shard)
    written = wire.shard_to_message(wire.shard_from_message(message))
    assert written is not None
    assert written.SerializeToString() == data


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_fragment_is_read_and_written_by_hand_as_the_golden_bytes(carrier: type[Message]) -> None:
    message, data = golden(f"{carrier.DESCRIPTOR.name}.fragment")
    assert isinstance(message, CARRIERS)
    fragment = message.fragment
    assert wire.encode_fragment(fragment.index, [fragment.data]) == data
    read = wire.read_fragment(type(message), data)
    assert isinstance(read, tuple)
    assert (read[0], bytes(read[1])) == (fragment.index, fragment.data)


def test_every_field_is_in_a_golden_message() -> None:
    for name, descriptor in MESSAGES.items():
        files = [file for file in FILES if file.partition(".")[0] == name]
        assert files, f"tests/golden/wire has no {name}"
        fields = {field.name for file in files for field, _ in golden(file)[0].ListFields()}
        assert {field.name for field in descriptor.fields} == fields, name
