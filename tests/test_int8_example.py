"""The codec `int8` as a client's author writes it from the protocol page: the same bits as the server's."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from examples.clients.python import int8
from modelaverage import wire
from modelaverage.codecs.int8 import INT8
from modelaverage.conformance.models import coded_fragments_of, fragments_of, manifest_of, unflatten
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer
from tests.optimizer.workers import together
from tests.raw_client import RawClient, Stream, push_header
from tests.strategies import fast

Array = NDArray[Any]
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
NAMES = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", np.dtype(ml_dtypes.bfloat16): "bfloat16"}
ODD = [0.0, -0.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 2.0**100, 1e-45, 2.0**-126, 65504.0, 2.0**7, 1.0]
MODEL = {
    "w": np.linspace(-1, 1, 5001, dtype=np.float32).reshape(3, 1667),
    "empty": np.zeros((0, 3), np.float32),
    "b": np.arange(5, dtype=np.float32),
    "half": np.linspace(-1, 1, 1500).astype(np.float16),
    "brain": np.linspace(-1, 1, 1023).astype(ml_dtypes.bfloat16),
    "double": np.arange(1200) / 3,
}
SIZE_BYTES = 1000


def of_everything(seed: int, dtype: np.dtype[Any], count: int) -> Array:
    """Values of many magnitudes, some of them odd."""
    random = np.random.default_rng(seed)
    values = random.normal(size=count) * 10.0 ** random.integers(-9, 2, count)
    some = random.random(count) < random.choice([0, 0.01])
    values[some] = random.choice(ODD, some.sum())
    with np.errstate(all="ignore"):
        return values.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_piece_is_encoded_and_decoded_as_the_server_does(dtype: np.dtype[Any]) -> None:
    for seed in range(60):
        count = (1, 127, 128, 129, 1000)[seed % 5]
        base, values = (of_everything(2 * seed + each, dtype, count) for each in (0, 1))
        coded, decoded = np.empty(INT8.coded_size_bytes(count), np.uint8), np.empty(count, dtype)
        with np.errstate(all="ignore"):
            INT8.encode_piece(NAMES[dtype], values, base, coded)
            INT8.decode_piece(NAMES[dtype], coded, base, decoded)
        assert int8.encode(values, base) == coded.tobytes()
        assert int8.decode(coded.tobytes(), base).tobytes() == decoded.tobytes()


@fast
@given(st.binary(min_size=132, max_size=132), st.sampled_from(DTYPES), st.integers(0, 99))
def test_any_bytes_are_decoded_as_the_server_does(data: bytes, dtype: np.dtype[Any], seed: int) -> None:
    base, decoded = of_everything(seed, dtype, 128), np.empty(128, dtype)
    with np.errstate(all="ignore"):
        INT8.decode_piece(NAMES[dtype], np.frombuffer(data, np.uint8), base, decoded)
    found = int8.decode(data, base)
    is_nan = np.isnan(decoded.astype(np.float32))
    assert (np.isnan(found.astype(np.float32)) == is_nan).all()
    assert found[~is_nan].tobytes() == decoded[~is_nan].tobytes()


@pytest.mark.parametrize("size_bytes", [8, 512, SIZE_BYTES, 1 << 20])
def test_a_model_is_cut_into_pieces_as_the_server_does(size_bytes: int) -> None:
    local = {name: (value * 1.01).astype(value.dtype) for name, value in MODEL.items()}
    fragments = int8.encode_model(local, MODEL, size_bytes)
    assert fragments == coded_fragments_of(local, MODEL, size_bytes, "int8")
    center = int8.decode_model(fragments, MODEL, size_bytes)
    assert list(center) == list(MODEL)
    assert int8.encode_model(center, MODEL, size_bytes) == coded_fragments_of(center, MODEL, size_bytes, "int8")


def test_it_imports_nothing_but_numpy() -> None:
    tree = ast.parse(Path(int8.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"__future__", "collections.abc", "typing", "numpy", "numpy.typing"}


# A worker with it and the generated stubs.


class StubWorker:
    """Pulls once; then each push is in int8, relative to the center before."""

    def __init__(self, client: RawClient, worker_id: str) -> None:
        self._client, self._worker_id, self._push_id = client, worker_id, 0
        header, flat = client.pull()
        assert header.compression == "int8"
        self._manifest_id, self._id, self.step = header.manifest_id, header.center_id, header.global_step
        self.center: Mapping[str, Array] = unflatten(manifest_of(MODEL, SIZE_BYTES), flat)

    def push(self, local: Mapping[str, Array]) -> None:
        self._push_id += 1
        header = push_header(
            self._manifest_id,
            self._worker_id,
            base_step=self.step,
            push_id=self._push_id,
            codec="int8",
            base_center_id=self._id,
        )
        stream = self._client.open_push()
        stream.send(header)
        admission = stream.receive().admission
        assert (admission.first_needed_fragment, admission.codec) == (0, "int8")
        stream.give(int8.encode_model(local, self.center, SIZE_BYTES))
        stream.half_close()
        outcome, fragments = came(stream)
        assert outcome.outcome == pb.OUTCOME_COMMITTED
        self.center = int8.decode_model(fragments, self.center, SIZE_BYTES)
        self._id, self.step = outcome.center_id, outcome.global_step


def came(stream: Stream[pb.PushAndAverageResponse]) -> tuple[pb.PushOutcome, list[bytes]]:
    fragments = list[bytes]()
    while not (message := stream.receive()).HasField("outcome"):
        fragments.append(message.fragment.data)
    return message.outcome, fragments


def near(arrays: Mapping[str, Array], seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {n: (value + random.normal(size=value.shape) / 100).astype(value.dtype) for n, value in arrays.items()}


def test_a_worker_of_stubs_and_numpy_has_the_same_center_bit_for_bit(start_server: StartServer) -> None:
    address = start_server(2).address
    with RawClient(address) as chief, RawClient(address) as first, RawClient(address) as second:
        stream = chief.open_initialize()
        header = pb.InitializeHeader(worker_id="a", compression="int8")
        header.manifest.CopyFrom(wire.manifest_to_message(manifest_of(MODEL, SIZE_BYTES)))
        stream.send(pb.InitializeRequest(header=header))
        stream.give(fragments_of(MODEL, SIZE_BYTES))
        stream.half_close()
        assert stream.receive().compression == "int8"
        workers = [StubWorker(client, name) for client, name in ((first, "a"), (second, "b"))]
        for step in range(3):
            local = [near(worker.center, 10 * step + number) for number, worker in enumerate(workers)]
            together(*(partial(worker.push, each) for worker, each in zip(workers, local, strict=True)))
            pulled, flat = chief.pull()
            assert pulled.global_step == step + 1
            for worker in workers:
                assert worker.step == step + 1
                assert b"".join(fragments_of(worker.center, SIZE_BYTES)) == flat
        status = chief.status()
        assert status.received_bytes < 0.65 * status.received_raw_bytes
