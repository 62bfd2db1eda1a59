"""Codecs: `raw` is the flat buffer and copies nothing; a toy, whose coded sizes depend on the pieces, fits the seam."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelaverage import wire
from modelaverage.codecs import CODECS, RAW, Codec, codec_named
from modelaverage.errors import InvalidRequestError, ProtocolError, Reason
from modelaverage.manifest import DTYPES, MAX_FRAGMENT_SIZE_BYTES, MAX_RUN, Manifest, Variable
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.centers import SEEDS, random_arrays
from tests.conftest import StartServer
from tests.jobs import CENTER, STEP, Job
from tests.raw_client import RawClient, fragments_of
from tests.strategies import fast, manifests
from tests.toy_codec import ToyCodec

TOY = ToyCodec()
codecs = pytest.mark.parametrize("codec", [RAW, TOY], ids=lambda codec: codec.name)


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


def coded(codec: Codec, manifest: Manifest, flat: NDArray[np.uint8], first: int, end: int) -> memoryview:
    return memoryview(b"".join(codec.encode_run(manifest, flat, first, end)))


def a_run(manifest: Manifest, data: st.DataObject) -> tuple[int, int]:
    first = data.draw(st.integers(0, manifest.fragment_count - 1))
    return first, data.draw(st.integers(first + 1, min(first + MAX_RUN, manifest.fragment_count)))


# Every codec.


@codecs
@fast
@given(manifest=manifests(min_elements=1), seed=SEEDS, data=st.data())
def test_sizes_are_what_is_encoded_from_wherever_the_values_lie(
    codec: Codec, manifest: Manifest, seed: int, data: st.DataObject
) -> None:
    first, end = a_run(manifest, data)
    flat = flat_of(manifest, seed)
    variables = variables_of(manifest, flat)
    run = coded(codec, manifest, flat, first, end)
    apart = [b"".join(codec.encode_variables(manifest, index, variables)) for index in range(first, end)]
    assert b"".join(apart) == run
    assert [len(each) for each in apart] == [codec.size_bytes(manifest, index) for index in range(first, end)]
    assert len(run) == codec.run_size_bytes(manifest, first, end)
    assert max(map(len, apart)) <= codec.max_size_bytes(manifest)
    split = [(index, bytes(part)) for index, part in codec.split_run(manifest, first, run)]
    assert split == list(zip(range(first, end), apart, strict=True))


@codecs
@fast
@given(manifest=manifests(min_elements=1), seed=SEEDS, data=st.data())
def test_what_is_decoded_into_a_flat_buffer_is_what_is_decoded_piece_by_piece_and_nothing_else_is_written(
    codec: Codec, manifest: Manifest, seed: int, data: st.DataObject
) -> None:
    first, end = a_run(manifest, data)
    run = coded(codec, manifest, flat_of(manifest, seed), first, end)
    room = flat_of(manifest, seed + 1)
    expected = room.copy()
    for index, part in codec.split_run(manifest, first, run):
        values = codec.decode(manifest, index, part)
        for piece, bounds, array in zip(manifest.pieces[index], manifest.piece_bounds(index), values, strict=True):
            dtype = DTYPES[manifest.variables[piece.variable].dtype]
            expected[slice(*bounds)] = array.astype(dtype).view(np.uint8)
    assert codec.decode_run(manifest, room, first, run) == end
    assert room.tobytes() == expected.tobytes()


@codecs
@fast
@given(manifest=manifests(min_elements=1), seed=SEEDS)
def test_equal_values_are_coded_to_equal_bytes(codec: Codec, manifest: Manifest, seed: int) -> None:
    flat = flat_of(manifest, seed)
    for index in range(manifest.fragment_count):
        once = coded(codec, manifest, flat, index, index + 1)
        assert coded(codec, manifest, flat.copy(), index, index + 1) == once


@codecs
@fast
@given(manifest=manifests(), data=st.data())
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
    long = Manifest((Variable("v", "float32", (3 << 20,)),), 1 << 20)
    most = MAX_FRAGMENT_SIZE_BYTES // codec.size_bytes(long, 0)
    assert codec.run_end(long, 0, codec.run_size_bytes(long, 0, most)) == most
    assert codec.run_end(long, 0, codec.run_size_bytes(long, 0, most + 1)) is None
    many = Manifest((Variable("v", "float32", (MAX_RUN * 8,)),), 8)
    assert codec.run_end(many, 1, codec.run_size_bytes(many, 1, 1 + MAX_RUN)) == 1 + MAX_RUN
    assert codec.run_end(many, 1, codec.run_size_bytes(many, 1, 2 + MAX_RUN)) is None


@codecs
def test_what_lies_in_memory_is_split_however_long_it_is(codec: Codec) -> None:
    manifest = Manifest((Variable("v", "float32", (MAX_RUN * 8 + 1,)),), 8)
    data = coded(codec, manifest, flat_of(manifest, 0), 1, manifest.fragment_count)
    found = list(codec.split_range(manifest, 1, data))
    assert [index for index, _ in found] == list(range(1, manifest.fragment_count))
    assert b"".join(part for _, part in found) == data


@codecs
@pytest.mark.parametrize("change", [-1, 1])
def test_a_coded_fragment_of_the_wrong_size_is_refused_and_nothing_is_written(codec: Codec, change: int) -> None:
    manifest = Manifest((Variable("v", "float32", (20,)), Variable("w", "float16", (3,))), 40)
    flat = flat_of(manifest, 0)
    data = memoryview(bytes(coded(codec, manifest, flat, 0, 1)) + b"x")[: codec.size_bytes(manifest, 0) + change]
    gives = {"raw": "the manifest gives it 40", "toy": "codec toy gives it 28"}[codec.name]
    before = flat.tobytes()
    for refuse in (
        lambda: codec.check_size(manifest, 0, data),
        lambda: list(codec.split_run(manifest, 0, data)),
        lambda: codec.decode_run(manifest, flat, 0, data),
    ):
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
    assert coded(RAW, manifest, flat, first, end) == flat[start:stop].tobytes()
    assert RAW.run_end(manifest, first, stop - start) == Codec.run_end(RAW, manifest, first, stop - start)


@fast
@given(manifests(min_elements=1), SEEDS)
def test_raw_copies_nothing(manifest: Manifest, seed: int) -> None:
    flat = flat_of(manifest, seed)
    variables = [np.frombuffer(data, np.uint8) for data in variables_of(manifest, flat)]
    (whole,) = RAW.encode_run(manifest, flat, 0, manifest.fragment_count)
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
    with pytest.raises(InvalidRequestError, match="codec 'toy' is not known here, only 'raw'; push raw") as error:
        codec_named("toy")
    assert error.value.reason is Reason.CODEC_UNKNOWN


# On the server.


@pytest.fixture
def job(start_server: StartServer) -> Job:
    """Two workers, and a server that knows the toy."""
    server = start_server(2)
    return Job(RawClient(server.address), server.address)


def test_workers_with_different_codecs_are_in_one_average_and_each_is_answered_in_its_own(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "toy", TOY)
    manifest = wire.manifest_from_message(job.client.pull()[0].manifest)
    chance = np.random.default_rng(0)
    pushes = [
        {name: np.asarray(chance.normal(size=a.shape)).astype(a.dtype) for name, a in CENTER.items()} for _ in range(2)
    ]
    flats = [np.frombuffer(b"".join(fragments_of(values)), np.uint8) for values in pushes]
    toy = [bytes(coded(TOY, manifest, flats[1], index, index + 1)) for index in range(manifest.fragment_count)]
    decoded = flats[1].copy()
    TOY.decode_run(manifest, decoded, 0, memoryview(b"".join(toy)))
    streams = []
    for name, codec, fragments in (("a", "", fragments_of(pushes[0])), ("b", "toy", toy)):
        stream, first = job.admitted(name, codec=codec)
        stream.give(fragments, first)
        stream.half_close()
        streams.append(stream)
    answers = [stream.answer() for stream in streams]
    assert [outcome.outcome for outcome, _ in answers] == [pb.OUTCOME_COMMITTED] * 2
    center = np.frombuffer(bytearray(job.center()), np.uint8)
    assert answers[0][1] == center.tobytes()
    assert answers[1][1] == coded(TOY, manifest, center, 0, manifest.fragment_count)
    for name, array in manifest.arrays(center).items():
        if array.dtype.itemsize > 2:
            mean = (pushes[0][name] + manifest.arrays(decoded)[name]) / array.dtype.type(2)
            assert array.tobytes() == mean.astype(array.dtype).tobytes()
    # A late push also gets the center in its own codec.
    stream = job.client.open_push()
    stream.send(job.header("b", codec="toy", base_step=STEP, push_id=2))
    stream.half_close()
    outcome, came = stream.answer()
    assert outcome.outcome == pb.OUTCOME_STALE
    assert came == answers[1][1]


def test_a_push_of_a_codec_that_is_not_known_is_refused_and_changes_nothing(job: Job) -> None:
    stream = job.client.open_push()
    stream.send(job.header("a", codec="toy"))
    refusal = stream.refusal()
    assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "CODEC_UNKNOWN")
    assert "codec 'toy' is not known here, only 'raw'" in refusal.message
    assert job.client.status().phase == pb.PHASE_IDLE
