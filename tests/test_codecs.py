"""What holds for every codec, a toy included; `raw` is the flat buffer and copies nothing.

tests/test_codecs_changes.py has the rules of the codecs that round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ma_client import ParameterServerSession
from modelaverage import wire
from modelaverage.codecs import CODECS, RAW, Codec, codec_named
from modelaverage.errors import InvalidRequestError, ProtocolError, Reason
from modelaverage.manifest import DTYPES, MAX_FRAGMENT_SIZE_BYTES, MAX_RUN, Manifest, Variable
from modelaverage.outer.base import summed_in
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.centers import SEEDS, random_arrays
from tests.conftest import StartServer
from tests.jobs import CENTER, Job
from tests.optimizer.workers import Running
from tests.raw_client import FRAGMENT_SIZE_BYTES, RawClient, flat_bytes, push_header
from tests.strategies import fast, manifests
from tests.toy_codec import ToyCodec

TOY = ToyCodec()
codecs = pytest.mark.parametrize("codec", [*CODECS.values(), TOY], ids=lambda codec: codec.name)


def all_manifests(min_elements: int = 0) -> st.SearchStrategy[Manifest]:
    """Also some with variables that are large enough to be coded."""
    kinds = st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.sampled_from([3, 1024, 1500])), min_size=1, max_size=3
    )
    larger = st.builds(
        lambda kinds, size_bytes: Manifest(
            tuple(Variable(f"v{number}", dtype, (size,)) for number, (dtype, size) in enumerate(kinds)), size_bytes
        ),
        kinds,
        st.sampled_from([64, 264, 1000, 8192]),
    )
    return manifests(min_elements) | larger


def flat_of(manifest: Manifest, seed: int) -> NDArray[np.uint8]:
    """A flat buffer of ordinary values; its padding is zero."""
    flat = np.zeros(manifest.buffer_size_bytes, np.uint8)
    values = random_arrays(manifest, np.random.default_rng(seed))
    for name, array in manifest.arrays(flat).items():
        array[...] = values[name]
    return flat


def variables_of(manifest: Manifest, flat: NDArray[np.uint8]) -> list[memoryview]:
    """The variables as separate arrays."""
    return [memoryview(array.tobytes()) for array in manifest.arrays(flat).values()]


def coded(
    codec: Codec, manifest: Manifest, flat: NDArray[np.uint8], base: NDArray[np.uint8], first: int, end: int
) -> memoryview:
    """A run of a flat buffer, encoded."""
    parts = list[memoryview]()
    for index in range(first, end):
        parts += codec.encode(manifest, index, manifest.piece_arrays(index, flat), manifest.piece_arrays(index, base))
    return memoryview(b"".join(parts))


def a_run(manifest: Manifest, data: st.DataObject) -> tuple[int, int]:
    first = data.draw(st.integers(0, manifest.fragment_count - 1))
    return first, data.draw(st.integers(first + 1, min(first + MAX_RUN, manifest.fragment_count)))


# Every codec.


@codecs
@fast
@given(manifest=all_manifests(min_elements=1), seed=SEEDS, data=st.data())
def test_sizes_are_what_is_encoded_from_wherever_the_values_lie(
    codec: Codec, manifest: Manifest, seed: int, data: st.DataObject
) -> None:
    first, end = a_run(manifest, data)
    flat = flat_of(manifest, seed)
    base = flat_of(manifest, seed + 1)
    variables = variables_of(manifest, flat)
    run = coded(codec, manifest, flat, base, first, end)
    apart = [b"".join(codec.encode_variables(manifest, index, variables, base)) for index in range(first, end)]
    assert b"".join(apart) == run
    assert [len(each) for each in apart] == [codec.size_bytes(manifest, index) for index in range(first, end)]
    assert len(run) == codec.run_size_bytes(manifest, first, end)
    assert max(map(len, apart)) <= codec.max_size_bytes(manifest)
    assert all(1 <= len(each) <= 2 * RAW.size_bytes(manifest, first + number) for number, each in enumerate(apart))
    split = [(index, bytes(part)) for index, part in codec.split_run(manifest, first, run)]
    assert split == list(zip(range(first, end), apart, strict=True))


@codecs
@fast
@given(manifest=all_manifests(min_elements=1), seed=SEEDS, data=st.data())
def test_what_is_decoded_into_a_flat_buffer_is_what_is_decoded_piece_by_piece_and_nothing_else_is_written(
    codec: Codec, manifest: Manifest, seed: int, data: st.DataObject
) -> None:
    first, end = a_run(manifest, data)
    base = flat_of(manifest, seed + 1)
    run = coded(codec, manifest, flat_of(manifest, seed), base, first, end)
    room = flat_of(manifest, seed + 2)
    expected, in_place = room.copy(), base.copy()
    for index, part in codec.split_run(manifest, first, run):
        values = codec.decode(manifest, index, part, manifest.piece_arrays(index, base))
        for piece, bounds, array in zip(manifest.pieces[index], manifest.piece_bounds(index), values, strict=True):
            dtype = DTYPES[manifest.variables[piece.variable].dtype]
            assert array.shape == (piece.count,)
            assert array.dtype in (dtype, np.float32)
            assert not np.shares_memory(array, base)
            expected[slice(*bounds)] = array.astype(dtype).view(np.uint8)
        codec.decode_into(manifest, room, index, part, base)
        codec.decode_into(manifest, in_place, index, part, in_place)
    assert room.tobytes() == expected.tobytes()
    for index in range(first, end):
        for begin, stop in manifest.piece_bounds(index):
            assert in_place[begin:stop].tobytes() == expected[begin:stop].tobytes()


@codecs
@fast
@given(manifest=all_manifests(min_elements=1), seed=SEEDS)
def test_equal_values_are_coded_to_equal_bytes(codec: Codec, manifest: Manifest, seed: int) -> None:
    flat, base = flat_of(manifest, seed), flat_of(manifest, seed + 1)
    for index in range(min(MAX_RUN, manifest.fragment_count)):
        once = coded(codec, manifest, flat, base, index, index + 1)
        assert coded(codec, manifest, flat.copy(), base.copy(), index, index + 1) == once


@codecs
@fast
@given(manifest=all_manifests(min_elements=1), seed=SEEDS, data=st.data())
def test_values_that_equal_the_base_are_decoded_to_its_bits(
    codec: Codec, manifest: Manifest, seed: int, data: st.DataObject
) -> None:
    first, end = a_run(manifest, data)
    base = flat_of(manifest, seed)
    for number, values in enumerate(manifest.arrays(base).values()):
        values.reshape(-1)[number::3] = -0.0
    run, decoded = coded(codec, manifest, base, base, first, end), base.copy()
    for index, part in codec.split_run(manifest, first, run):
        codec.decode_into(manifest, decoded, index, part, base)
    assert decoded.tobytes() == base.tobytes()


@codecs
@fast
@given(manifest=all_manifests(min_elements=1), seed=SEEDS, data=st.data())
def test_16_bit_variables_may_be_given_as_float32(
    codec: Codec, manifest: Manifest, seed: int, data: st.DataObject
) -> None:
    first, end = a_run(manifest, data)
    flat, base = flat_of(manifest, seed), flat_of(manifest, seed + 1)
    for index in range(first, end):
        values, bases = manifest.piece_arrays(index, flat), manifest.piece_arrays(index, base)
        wide = [each.astype(np.float32) if each.dtype.itemsize == 2 else each for each in values]
        assert b"".join(codec.encode(manifest, index, wide, bases)) == coded(
            codec, manifest, flat, base, index, index + 1
        )


@codecs
@fast
@given(manifest=all_manifests(), data=st.data())
def test_only_whole_consecutive_coded_fragments_are_a_run(
    codec: Codec, manifest: Manifest, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, manifest.fragment_count))
    sizes = [codec.size_bytes(manifest, index) for index in range(first, manifest.fragment_count)]
    ends = dict(zip(itertools.accumulate(sizes[:MAX_RUN]), range(first + 1, manifest.fragment_count + 1), strict=False))
    for size_bytes in {0, 1, *ends, *(end + 1 for end in ends), *(end - 1 for end in ends)}:
        assert codec.run_end(manifest, first, size_bytes) == ends.get(size_bytes)


@codecs
def test_a_run_is_no_longer_than_a_message_may_be(codec: Codec) -> None:
    long = Manifest((Variable("v", "float32", (5 << 20,)),), 1 << 20)
    most = MAX_FRAGMENT_SIZE_BYTES // codec.size_bytes(long, 0)
    assert codec.run_end(long, 0, codec.run_size_bytes(long, 0, most)) == most
    assert codec.run_end(long, 0, codec.run_size_bytes(long, 0, most + 1)) is None
    many = Manifest((Variable("v", "float32", (MAX_RUN * 8,)),), 8)
    assert codec.run_end(many, 1, codec.run_size_bytes(many, 1, 1 + MAX_RUN)) == 1 + MAX_RUN
    assert codec.run_end(many, 1, codec.run_size_bytes(many, 1, 2 + MAX_RUN)) is None


@codecs
def test_what_lies_in_memory_is_split_however_long_it_is(codec: Codec) -> None:
    manifest = Manifest((Variable("v", "float32", (MAX_RUN * 8 + 1,)),), 8)
    data = coded(codec, manifest, flat_of(manifest, 0), flat_of(manifest, 1), 1, manifest.fragment_count)
    found = list(codec.split_range(manifest, 1, data))
    assert [index for index, _ in found] == list(range(1, manifest.fragment_count))
    assert b"".join(part for _, part in found) == data


@codecs
@pytest.mark.parametrize("change", [-1, 1])
def test_a_coded_fragment_of_the_wrong_size_is_refused_and_nothing_is_written(codec: Codec, change: int) -> None:
    manifest = Manifest((Variable("v", "float32", (20,)), Variable("w", "float16", (3,))), 40)
    flat = flat_of(manifest, 0)
    data = memoryview(bytes(coded(codec, manifest, flat, flat, 0, 1)) + b"x")[: codec.size_bytes(manifest, 0) + change]
    gives = {
        "raw": "the manifest gives it 40",
        "toy": "codec toy gives it 28",
    }.get(codec.name, f"codec {codec.name} gives it 40")
    before = flat.tobytes()
    refusals: list[Callable[[], object]] = [
        lambda: codec.check_size(manifest, 0, data),
        lambda: list(codec.split_run(manifest, 0, data)),
    ]
    if codec is RAW:
        refusals.append(lambda: RAW.decode_run(manifest, flat, 0, data))
    for refuse in refusals:
        with pytest.raises(ProtocolError, match=f"fragment 0 has {len(data)} bytes; {gives}") as error:
            refuse()
        assert error.value.reason is Reason.FRAGMENT_SIZE_WRONG
    assert flat.tobytes() == before


# Raw.


@fast
@given(manifests(min_elements=1), SEEDS, st.data())
def test_raw_bytes_are_the_flat_buffers(manifest: Manifest, seed: int, data: st.DataObject) -> None:
    first, end = a_run(manifest, data)
    flat = flat_of(manifest, seed)
    start, stop = manifest.fragment_bounds(first)[0], manifest.fragment_bounds(end - 1)[1]
    assert coded(RAW, manifest, flat, flat, first, end) == flat[start:stop].tobytes()
    assert RAW.encode_run(manifest, flat, first, end) == flat[start:stop].tobytes()
    assert RAW.run_end(manifest, first, stop - start) == Codec.run_end(RAW, manifest, first, stop - start)


@fast
@given(manifests(min_elements=1), SEEDS, st.data())
def test_a_raw_run_is_copied_to_its_place_and_nowhere_else(manifest: Manifest, seed: int, data: st.DataObject) -> None:
    first, end = a_run(manifest, data)
    flat, room = flat_of(manifest, seed), flat_of(manifest, seed + 1)
    start, stop = manifest.fragment_bounds(first)[0], manifest.fragment_bounds(end - 1)[1]
    expected = room.copy()
    expected[start:stop] = flat[start:stop]
    assert RAW.decode_run(manifest, room, first, RAW.encode_run(manifest, flat, first, end)) == end
    assert room.tobytes() == expected.tobytes()


@fast
@given(manifests(min_elements=1), SEEDS)
def test_raw_copies_nothing(manifest: Manifest, seed: int) -> None:
    flat = flat_of(manifest, seed)
    variables = [np.frombuffer(data, np.uint8) for data in variables_of(manifest, flat)]
    whole = RAW.encode_run(manifest, flat, 0, manifest.fragment_count)
    assert np.shares_memory(np.frombuffer(whole, np.uint8), flat)
    for index in range(manifest.fragment_count):
        start, stop = manifest.fragment_bounds(index)
        for values in RAW.decode(manifest, index, flat[start:stop].data):
            assert np.shares_memory(values, flat)
        parts = RAW.encode_variables(manifest, index, [variable.data for variable in variables])
        views = [part for part in parts if any(np.shares_memory(np.frombuffer(part, np.uint8), v) for v in variables)]
        assert len(views) == len(manifest.pieces[index])


# By name.


def test_a_push_that_names_no_codec_is_raw() -> None:
    assert codec_named("") is codec_named("raw") is RAW
    assert all(codec.name == name for name, codec in CODECS.items())


def test_a_codec_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(
        InvalidRequestError, match="codec 'toy' is not known here, only 'raw', 'bfloat16', 'int8', 'int4'; push raw"
    ) as error:
        codec_named("toy")
    assert error.value.reason is Reason.CODEC_UNKNOWN


# On the server.


@pytest.fixture
def job(start_server: StartServer) -> Job:
    """Two workers."""
    server = start_server(2)
    return Job(RawClient(server.address), server.address)


def test_workers_with_different_codecs_are_in_one_average_and_have_the_same_center(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "toy", TOY)
    server, chance = start_server(2), np.random.default_rng(0)
    sent = {name: np.asarray(chance.normal(size=a.shape)).astype(a.dtype) for name, a in CENTER.items()}
    pushed = {name: np.asarray(chance.normal(size=a.shape)).astype(a.dtype) for name, a in CENTER.items()}
    client = RawClient(server.address)
    with (
        ParameterServerSession(
            [server.address], worker_id="b", is_chief=True, fragment_size_bytes=FRAGMENT_SIZE_BYTES, shared_memory=False
        ) as coded_worker,
    ):
        coded_worker.initialize(CENTER, compression="toy")
        center, _ = coded_worker.pull()
        header, _ = client.pull()
        result = Running(lambda: coded_worker.push_and_average(pushed))
        stream = client.open_push()
        stream.push(push_header(header.manifest_id, "a", codec="raw"), sent)
        outcome, came = stream.answer()
        got = result.result().center
    assert outcome.outcome == pb.OUTCOME_COMMITTED
    assert came == flat_bytes(got)
    manifest = wire.manifest_from_message(header.manifest)
    base = np.frombuffer(bytearray(flat_bytes(center)), np.uint8)
    flat = np.frombuffer(bytearray(flat_bytes(pushed)), np.uint8)
    decoded, expected = base.copy(), base.copy()
    for index in range(manifest.fragment_count):
        TOY.decode_into(manifest, decoded, index, coded(TOY, manifest, flat, base, index, index + 1), base)
    means = [
        ((array.astype(wide := summed_in(array.dtype)) + sent[name].astype(wide)) / wide.type(2))
        for name, array in manifest.arrays(decoded).items()
    ]
    for index in range(manifest.fragment_count):
        exact = [
            means[piece.variable].reshape(-1)[piece.start : piece.start + piece.count]
            for piece in manifest.pieces[index]
        ]
        change = TOY.encode(manifest, index, exact, manifest.piece_arrays(index, base))
        TOY.decode_into(manifest, expected, index, memoryview(b"".join(change)), base)
    assert came == expected.tobytes()


def test_a_push_of_a_codec_that_is_not_known_is_refused_and_changes_nothing(job: Job) -> None:
    stream = job.client.open_push()
    stream.send(job.header("a", codec="toy"))
    refusal = stream.refusal()
    assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "CODEC_UNKNOWN")
    assert "codec 'toy' is not known here, only 'raw'" in refusal.message
    assert job.client.status().phase == pb.PHASE_IDLE
