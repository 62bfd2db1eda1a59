"""Hand-made fragment messages against the protobuf library: what is written, and everything that can be read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from modelaverage import wire
from modelaverage.checks import MAX_WORKER_ID_BYTES
from modelaverage.chosen import Chosen
from modelaverage.codecs import CODECS
from modelaverage.errors import InvalidRequestError, ProtocolError, Reason
from modelaverage.manifest import (
    MAX_FRAGMENT_SIZE_BYTES,
    MAX_VARIABLES,
    Manifest,
    Part,
    Shard,
    Variable,
)
from modelaverage.missing import Missing
from modelaverage.names import MAX_NAMES
from modelaverage.outer.text import MAX_TEXT_BYTES
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import MAX_WORKERS
from tests.strategies import fast, manifests, thorough

Carrier: TypeAlias = pb.InitializeRequest | pb.PullResponse | pb.PushAndAverageRequest | pb.PushAndAverageResponse
CARRIERS: list[type[Carrier]] = [
    pb.InitializeRequest,
    pb.PullResponse,
    pb.PushAndAverageRequest,
    pb.PushAndAverageResponse,
]
GRPC_LIMIT_BYTES = 4 << 20
INDEXES = [0, 1, 127, 128, 2**14 - 1, 2**14, 2**31, 2**32 - 1]
# The length of the fragment or of its data changes its number of bytes near each of these.
BOUNDARIES = [2**7, 2**14, 2**21]
SIZES = [1, *(boundary + step for boundary in BOUNDARIES for step in (-11, -8, -5, -3, -1, 0, 1))]
BYTES = random.Random(0).randbytes(max(SIZES))

carriers = st.sampled_from(CARRIERS)
fragment_indexes = st.one_of(st.sampled_from(INDEXES), st.integers(0, 2**32 - 1))


def meaning(carrier: type[Carrier], data: bytes) -> object:
    """The bytes as the library reads them."""
    try:
        message = carrier.FromString(data)
    except DecodeError:
        return Reason.MESSAGE_MALFORMED
    if [field.name for field, _ in message.ListFields()] == ["fragment"]:
        return message.fragment.index, message.fragment.data
    return message


def what_is_read(carrier: type[Carrier], data: bytes) -> object:
    try:
        read = wire.read_fragment(carrier, data)
    except ProtocolError as error:
        return error.reason
    return (read[0], bytes(read[1])) if isinstance(read, tuple) else read


def written_by_the_library(carrier: type[Carrier], index: int, data: bytes) -> bytes:
    return carrier(fragment=pb.Fragment(index=index, data=data)).SerializeToString()


# Writing.


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("index", INDEXES)
def test_a_written_fragment_is_byte_for_byte_what_the_library_writes(carrier: type[Carrier], index: int) -> None:
    for size in SIZES:
        data = BYTES[:size]
        encoded = wire.encode_fragment(index, (data,))
        assert encoded == written_by_the_library(carrier, index, data)
        assert what_is_read(carrier, encoded) == (index, data)


@fast
@given(fragment_indexes, st.lists(st.binary(max_size=200), max_size=5).filter(any))
def test_the_parts_of_a_fragment_are_joined(index: int, parts: list[bytes]) -> None:
    views = [memoryview(part) for part in parts]
    assert wire.encode_fragment(index, iter(views)) == written_by_the_library(pb.PullResponse, index, b"".join(parts))


def test_a_fragment_without_bytes_means_to_the_library_what_it_means_here() -> None:
    # No model has such a fragment, but what is written has to be legal.
    assert meaning(pb.PullResponse, wire.encode_fragment(7, ())) == (7, b"")


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_read_fragment_is_a_view_of_the_message(carrier: type[Carrier]) -> None:
    encoded = written_by_the_library(carrier, 3, bytes(1000))
    read = wire.read_fragment(carrier, encoded)
    assert isinstance(read, tuple)
    assert read[1].obj is encoded


# Reading. A separate encoder makes every encoding that the format allows.


@st.composite
def varints(draw: st.DrawFn, value: int) -> bytes:
    """A varint, with up to nine superfluous bytes, ten bytes in all at most."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(min(draw(st.sampled_from([0, 0, 0, 1, 4, 9])), 10 - len(out))):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


@st.composite
def fields(draw: st.DrawFn, number: int, wire_type: int, content: bytes) -> bytes:
    head = draw(varints(number << 3 | wire_type))
    return head + (draw(varints(len(content))) if wire_type == 2 else b"") + content


@st.composite
def unknown_fields(draw: st.DrawFn) -> bytes:
    number = draw(st.sampled_from([4, 15, 16, 1000, 2**29 - 1]))
    wire_type = draw(st.sampled_from([0, 1, 2, 3, 5]))
    if wire_type == 3:
        return draw(fields(number, 3, draw(unknown_fields()))) + draw(fields(number, 4, b""))
    content = {
        0: varints(draw(st.integers(0, 2**64 - 1))),
        1: st.binary(min_size=8, max_size=8),
        2: st.binary(max_size=10),
        5: st.binary(min_size=4, max_size=4),
    }
    return draw(fields(number, wire_type, draw(content[wire_type])))


@st.composite
def fragments(draw: st.DrawFn) -> bytes:
    """The bytes of a Fragment: its fields in any order, any number of times, among unknown ones."""
    one = st.one_of(
        st.integers(0, 2**32 - 1).flatmap(varints).flatmap(lambda value: fields(1, 0, value)),
        st.binary(max_size=140).flatmap(lambda value: fields(2, 2, value)),
        unknown_fields(),
    )
    return b"".join(draw(st.lists(one, max_size=4)))


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """The bytes of a carrier: a fragment in one or several pieces, perhaps with another message of the oneof before
    or after it, and unknown fields."""
    one = st.one_of(
        fragments().flatmap(lambda value: fields(2, 2, value)),
        fragments().flatmap(lambda value: fields(2, 2, value)),
        st.just(b"").flatmap(lambda value: fields(1, 2, value)),
        unknown_fields(),
    )
    return b"".join(draw(st.lists(one, min_size=1, max_size=3)))


@thorough
@given(carriers, messages())
def test_any_legal_encoding_is_read_as_the_library_reads_it(carrier: type[Carrier], data: bytes) -> None:
    assert what_is_read(carrier, data) == meaning(carrier, data)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A fragment as it is written here, or in any legal way, with some bytes changed, added or lost."""
    whole = st.builds(
        lambda index, data: wire.encode_fragment(index, (data,)), fragment_indexes, st.binary(max_size=140)
    )
    data = bytearray(draw(st.one_of(whole, messages())))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        lost = draw(st.integers(0, 2))
        data[at : at + lost] = draw(st.binary(max_size=2))
    return bytes(data)


@thorough
@given(carriers, st.one_of(st.binary(max_size=40), damaged(), damaged()))
@example(pb.PullResponse, b"\x12\x07\x08\xff\xff\xff\xff\x1f\x12\x00")  # an index of more than 32 bits
@example(pb.PullResponse, b"\x12\x02\x08")
@example(pb.PullResponse, b"\x12\x80\x80\x80\x80\x10")
@example(pb.PullResponse, b"\x12\x82\x80\x80\x80\x10\x12\x00")  # a length of more than 32 bits
@example(pb.PullResponse, b"\x12\x82\x80\x80\x80\x00\x12\x00")
@example(pb.PullResponse, b"\x12\x06\x12\x80\x80\x80\x80\x00")
def test_arbitrary_bytes_are_read_as_the_library_reads_them_or_refused_with_it(
    carrier: type[Carrier], data: bytes
) -> None:
    assert what_is_read(carrier, data) == meaning(carrier, data)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("data", [b"\xff", b"\x12\x05\x08", b"no protobuf at all", b"\x0a\x02\x08"])
def test_bytes_that_are_no_message_are_refused_with_their_number_and_its_name(
    carrier: type[Carrier], data: bytes
) -> None:
    with pytest.raises(ProtocolError, match=f"^{len(data)} bytes are not a {carrier.DESCRIPTOR.name}: ") as error:
        wire.parse(carrier, data)
    assert error.value.reason is Reason.MESSAGE_MALFORMED
    assert "\n" not in str(error.value)


def test_a_message_that_carries_something_else_is_handed_on() -> None:
    message = pb.PushAndAverageResponse(admission=pb.PushAdmission(first_needed_fragment=5))
    assert wire.read_fragment(pb.PushAndAverageResponse, message.SerializeToString()) == message
    assert wire.read_fragment(pb.PushAndAverageResponse, b"") == pb.PushAndAverageResponse()


# Manifests.


@fast
@given(manifests())
def test_a_manifest_comes_back_as_it_went(manifest: Manifest) -> None:
    data = wire.manifest_to_message(manifest).SerializeToString()
    assert wire.manifest_from_message(wire.parse(pb.Manifest, data)) == manifest


@fast
@given(
    manifests(),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.sampled_from(["", "average", "sgd:lr=0.7"]),
    st.sampled_from(["", "raw", "int8"]),
)
def test_what_is_made_once_for_all_pulls_is_what_the_library_writes(
    manifest: Manifest, global_step: int, num_workers: int, center_id: int, outer: str, compression: str
) -> None:
    message = wire.manifest_to_message(manifest)
    assert wire.encode_manifest(manifest) == message.SerializeToString()
    header = pb.CenterHeader(
        manifest=message,
        manifest_id=manifest.id,
        global_step=global_step,
        num_workers=num_workers,
        outer_optimizer="" if outer == "average" else outer,  # what older servers have is not told
        compression="" if compression == "raw" else compression,
        center_id=center_id,
    )
    expected = pb.PullResponse(header=header).SerializeToString()
    written = wire.PullHeader(manifest, Chosen(outer, compression).told.texts)
    assert written.encode(global_step, num_workers, center_id) == expected


def test_the_header_of_a_center_without_choices_is_what_it_was_before_there_were_any() -> None:
    manifest = Manifest((Variable("w", "float32", (2,)),), 16)
    before = pb.CenterHeader(
        manifest=wire.manifest_to_message(manifest), manifest_id=manifest.id, global_step=7, num_workers=2
    )
    defaults = wire.PullHeader(manifest, Chosen("average", "raw").told.texts)
    assert defaults.encode(7, 2) == pb.PullResponse(header=before).SerializeToString()


@pytest.mark.parametrize("shard", [None, Shard(4095, 4096, b"j" * 16)])
def test_a_manifest_of_many_variables_is_encoded_as_the_library_does(shard: Shard | None) -> None:
    part = None if shard is None else (2, 3)
    manifest = Manifest(
        tuple(Variable(f"v{n}", "bfloat16", (2, 3), None if part is None else Part(n, 0, part)) for n in range(2500)),
        64,
        shard,
        b"digests",
    )
    assert wire.encode_manifest(manifest) == wire.manifest_to_message(manifest).SerializeToString()


def manifest_of_bytes(size_bytes: int) -> Manifest:
    """A manifest whose message has exactly this size; with long names, which take the least time."""
    beside = 11  # the bytes of a variable apart from its name, if that has 128 bytes or more
    names = [f"{number:04d}".ljust(1000, "n") for number in range(size_bytes // (1000 + beside) - 1)]
    left = size_bytes - 4 - len(names) * (1000 + beside)  # four bytes say the fragment size
    names += ["y" * (left // 2 - beside), "z" * (left - left // 2 - beside)]
    manifest = Manifest(tuple(Variable(name, "float32", (1,)) for name in names))
    assert wire.manifest_to_message(manifest).ByteSize() == size_bytes
    return manifest


def test_a_manifest_that_is_sendable_fits_the_largest_headers_and_one_byte_more_is_refused() -> None:
    manifest = manifest_of_bytes(wire.MAX_MANIFEST_BYTES)
    wire.check_sendable(manifest)
    initialize = pb.InitializeHeader(
        worker_id="w" * MAX_WORKER_ID_BYTES, manifest=wire.manifest_to_message(manifest), global_step=2**63 - 1
    )
    for message in (
        wire.PullHeader(manifest, Chosen("o" * MAX_TEXT_BYTES, max(CODECS, key=len)).texts).encode(
            2**63 - 1, 2**32 - 1, 2**64 - 1
        ),
        pb.InitializeRequest(header=initialize).SerializeToString(),
    ):
        assert len(message) <= GRPC_LIMIT_BYTES
    with pytest.raises(InvalidRequestError, match="names; at most 4193792 fit a message: give variables shorter") as e:
        wire.check_sendable(manifest_of_bytes(wire.MAX_MANIFEST_BYTES + 1))
    assert e.value.reason is Reason.MANIFEST_INVALID
    assert f"of {len(manifest.variables)} variables has {wire.MAX_MANIFEST_BYTES + 1} bytes, " in str(e.value)
    assert "\n" not in str(e.value)


def test_the_longest_messages_of_a_push_fit() -> None:
    shared = pb.SharedMemory(path="/proc/" + "9" * 60, nonce=bytes(16))
    everything = pb.PushAndAverageResponse(
        admission=pb.PushAdmission(
            first_needed_fragment=2**32 - 1,
            contribution=shared,
            average=shared,
            data_connection=pb.DataConnection(port=65535, key=bytes(32)),
        ),
        fragment=pb.Fragment(index=2**32 - 1, data=bytes(MAX_FRAGMENT_SIZE_BYTES)),
        waiting=Missing(("w" * MAX_WORKER_ID_BYTES,) * MAX_NAMES, 2**32 - 1, 2**32 - 1).notice(0.1),
        outcome=pb.PushOutcome(
            outcome=pb.OUTCOME_COMMITTED,
            global_step=2**63 - 1,
            contributors=["w" * MAX_WORKER_ID_BYTES] * MAX_WORKERS,
            waited_s=0.1,
            untouched_variables=range(MAX_VARIABLES),
        ),
    )
    assert everything.ByteSize() <= GRPC_LIMIT_BYTES
    request = pb.PushAndAverageRequest(
        header=pb.PushHeader(
            worker_id="w" * MAX_WORKER_ID_BYTES,
            incarnation=bytes(16),
            push_id=2**64 - 1,
            base_step=2**63 - 1,
            local_step=2**64 - 1,
            weight=0.1,
            loss=0.1,
            manifest_id="x" * 32,
            untouched_variables=range(MAX_VARIABLES),
            accepts_runs=True,
        ),
        fragment=pb.Fragment(index=2**32 - 1, data=bytes(MAX_FRAGMENT_SIZE_BYTES)),
    )
    assert request.ByteSize() <= GRPC_LIMIT_BYTES


def test_too_many_variables_are_refused_before_any_of_them_is_looked_at() -> None:
    message = pb.Manifest(fragment_size_bytes=8, variables=[pb.Variable()] * (MAX_VARIABLES + 1))
    with pytest.raises(InvalidRequestError, match=f"has {MAX_VARIABLES + 1} variables; at most {MAX_VARIABLES}") as e:
        wire.manifest_from_message(message)
    assert e.value.reason is Reason.MANIFEST_INVALID


@pytest.mark.parametrize("whole", [False, True])
def test_too_many_dimensions_are_refused_before_any_of_them_is_looked_at(whole: bool) -> None:
    class Extents(list[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("nobody has to look")

    part = SimpleNamespace(variable=0, start=0, shape=Extents([1] * 1000))
    shape = [1] if whole else Extents([1] * 1000)
    variable: Any = SimpleNamespace(name="v", data_type=1, shape=shape, part=part, HasField=lambda _: whole)
    with pytest.raises(InvalidRequestError, match="variable 'v' has 1000 dimensions; at most 32 are possible"):
        wire._variable_from_message(variable)


def test_any_name_comes_back_as_it_went() -> None:
    manifest = Manifest((Variable('"ü\n\0', "bfloat16", (2**40, 0)), Variable(" ", "float64", ())))
    assert wire.manifest_from_message(wire.manifest_to_message(manifest)) == manifest


@pytest.mark.parametrize("number", [0, 5, 1000, -1])
def test_a_data_type_that_is_unknown_is_refused_by_its_number(number: int) -> None:
    message = pb.Manifest(fragment_size_bytes=8, variables=[pb.Variable(name="v", shape=[1])])
    message.variables[0].data_type = number  # type: ignore[assignment]
    with pytest.raises(InvalidRequestError, match=f"variable 'v' has dtype number {number}") as error:
        wire.manifest_from_message(message)
    assert error.value.reason is Reason.MANIFEST_INVALID


def test_every_data_type_of_the_protocol_has_its_name() -> None:
    for name, number in pb.DataType.items():
        if number:
            variable = pb.Variable(name="v", data_type=name, shape=[1])
            manifest = wire.manifest_from_message(pb.Manifest(fragment_size_bytes=8, variables=[variable]))
            assert manifest.variables[0].dtype == name.removeprefix("DATA_TYPE_").lower()
