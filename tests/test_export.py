"""The center as a file for others: from a directory of checkpoints, or from a running server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from ma_client import ParameterServerSession
from ma_client.job.assembly import Assembly
from ma_client.values.raw import bytes_of
from modelaverage import wire
from modelaverage.access import handshake
from modelaverage.manifest import DTYPES, Manifest, Variable, dtype_name
from modelaverage.placement import place
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import Checkpoint
from tests.checkpoints import make_durable, write_fresh
from tests.conftest import StartServer
from tests.jobs import CENTER, STEP, Job, of
from tests.raw_client import Arrays, RawClient, fragments_of, manifest_of, until

SPECIAL: Arrays = {
    "layer.0.weight": np.array([[0.0, -0.0, np.inf], [-np.inf, np.nan, 1e-45]], np.float32),
    "layer.0.bias": np.array([1.0, np.nan, 3.0]).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    "scale": np.array(0.1),
    "half": np.arange(5, dtype=np.float16),
}
TORCH_TYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def checkpoint_of(arrays: Arrays, global_step: int) -> Checkpoint:
    variables = tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items())
    return Checkpoint(Manifest(variables, 64), arrays, global_step)


def assert_is(path: Path, arrays: Arrays, global_step: int) -> None:
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = tensors[name]
        assert tensor.dtype is TORCH_TYPES[dtype_name(array.dtype)]
        assert tuple(tensor.shape) == array.shape
        assert tensor.flatten().view(torch.uint8).numpy().tobytes() == array.tobytes()
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"global_step": str(global_step)}


Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Export:
    """Runs the command; returns its exit code and what it printed, without what it says if the machine is busy."""
    monkeypatch.setattr("ps_server.commands.export.says_if_slow", lambda *_: contextlib.nullcontext())

    def export(*arguments: object) -> tuple[int, str, str]:
        code = main(["export", *map(str, arguments)])
        return code, *capsys.readouterr()

    return export


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def assert_fails(answer: tuple[int, str, str], *named: object) -> None:
    """Checks that the command fails with one line that names these things."""
    code, printed, line = answer
    assert (code, printed, line.count("\n")) == (1, "", 1), line
    assert line.startswith("ps-server: ")
    for each in named:
        assert str(each) in line


# From a directory.


@pytest.mark.parametrize("arrays", [CENTER, SPECIAL], ids=["center", "special"])
@pytest.mark.parametrize("durable", [False, True])
def test_a_checkpoint_becomes_a_plain_file(
    arrays: Arrays, durable: bool, tmp_path: Path, out: Path, export: Export
) -> None:
    path = write_fresh(tmp_path, checkpoint_of(arrays, 12))
    path = make_durable(path) if durable else path
    code, printed, errors = export(tmp_path, out)
    assert (code, errors) == (0, "")
    assert printed == f"{out}: the center of global_step 12\n"
    assert_is(out, arrays, 12)
    assert set(tmp_path.iterdir()) == {path, out}


def test_the_newest_usable_checkpoint_is_taken_and_nothing_is_changed(
    tmp_path: Path, out: Path, export: Export
) -> None:
    directory = tmp_path / "center"
    directory.mkdir()
    make_durable(write_fresh(directory, checkpoint_of(of(1), 1)))
    make_durable(write_fresh(directory, checkpoint_of(of(2), 2)))
    damaged = make_durable(write_fresh(directory, checkpoint_of(of(3), 3)))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (directory / "center-00000000000000000004.fresh.7.tmp").write_bytes(b"a server writes here")
    before = set(directory.iterdir())
    assert export(directory, out)[0] == 0
    assert_is(out, of(2), 2)
    assert set(directory.iterdir()) == before


def test_a_directory_that_a_server_uses_may_be_exported(
    tmp_path: Path, out: Path, export: Export, start_server: StartServer
) -> None:
    server = start_server(2, checkpoints=CheckpointPolicy(tmp_path / "center"))
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        for step in range(STEP, STEP + 3):
            streams = [job.push(name, of(step), base_step=step, push_id=step) for name in ("a", "b")]
            for stream in streams:
                stream.answer()
            assert export(tmp_path / "center", out)[0] == 0
            assert_is(out, of(step), step + 1)


def test_a_directory_without_a_usable_checkpoint_is_an_error(tmp_path: Path, out: Path, export: Export) -> None:
    assert_fails(export(tmp_path, out), "no usable checkpoint", tmp_path)
    damaged = make_durable(write_fresh(tmp_path, checkpoint_of(CENTER, 3)))
    damaged.write_bytes(b"")
    assert_fails(export(tmp_path, out), "no usable checkpoint", damaged.name, "bytes")
    assert not out.exists()


@pytest.mark.parametrize("source", ["center", "runs/center:12", "file", "", ":2222", "host:", "host:port"])
def test_what_is_neither_a_directory_nor_an_address_is_an_error(
    source: str, tmp_path: Path, out: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert_fails(export(source or tmp_path / "none", out), source, "neither a directory nor a server's address")


# From a server.


@pytest.mark.parametrize("arrays", [CENTER, SPECIAL], ids=["center", "special"])
def test_a_servers_center_becomes_a_plain_file(
    arrays: Arrays, out: Path, export: Export, start_server: StartServer
) -> None:
    server = start_server(2)
    with RawClient(server.address) as client:
        client.initialize(arrays, 7)
        code, printed, errors = export(server.address, out)
    assert (code, printed, errors) == (0, f"{out}: the center of global_step 7\n", "")
    assert_is(out, arrays, 7)


def test_a_model_of_many_fragments_is_exported(out: Path, export: Export, start_server: StartServer) -> None:
    arrays: Arrays = {"w": np.arange(1 << 19, dtype=np.float32), "b": np.ones(3)}
    server = start_server(1)
    with RawClient(server.address) as client:
        client.initialize(arrays, 0, fragment_size_bytes=1 << 18)
    assert export(server.address, out)[0] == 0
    assert_is(out, arrays, 0)


def test_a_server_without_a_center_is_an_error(out: Path, export: Export, start_server: StartServer) -> None:
    address = start_server(1).address
    assert_fails(export(address, out), address, "no center yet")
    assert not out.exists()


def test_where_nobody_answers_the_wait_ends_in_time(out: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "_TIMEOUT_S", 0.3)  # asked afterwards: whether the server wants TLS
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = "{}:{}".format(*silent.getsockname())
        assert_fails(export(address, out, "--timeout-s", "0.2"), address, "waited 0.2 s")
    assert_fails(export(f"unix:{out}.sock", out, "--timeout-s", "0.2"), f"unix:{out}.sock", "waited 0.2 s")


def serve_pull(answer: Callable[[], Iterator[bytes]]) -> tuple[grpc.Server, str]:
    """A server that answers Pull as it is told."""

    def handle(_: bytes, __: grpc.ServicerContext) -> Iterator[bytes]:
        return answer()

    server = grpc.server(ThreadPoolExecutor(1))
    pull = {"Pull": grpc.unary_stream_rpc_method_handler(handle)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(wire.SERVICE, pull),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    return server, address


HEADER = pb.PullResponse(header=pb.CenterHeader(manifest=manifest_of(CENTER))).SerializeToString()
FRAGMENTS = [wire.encode_fragment(index, [data]) for index, data in enumerate(fragments_of(CENTER))]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [b"\xff"],
        FRAGMENTS,
        [HEADER],
        [HEADER, *FRAGMENTS[:-1]],
        [HEADER, *FRAGMENTS[1:]],
        [HEADER, HEADER, *FRAGMENTS],
        [HEADER, FRAGMENTS[1], FRAGMENTS[0], *FRAGMENTS[2:]],
        [HEADER, wire.encode_fragment(0, [bytes(63)]), *FRAGMENTS[1:]],
        [pb.PullResponse(header=pb.CenterHeader(manifest=pb.Manifest(fragment_size_bytes=8))).SerializeToString()],
    ],
)
def test_a_center_that_does_not_come_as_it_should_is_not_written(
    messages: list[bytes], out: Path, export: Export
) -> None:
    server, address = serve_pull(lambda: iter(messages))
    assert_fails(export(address, out), address, "did not answer as a parameter server")
    assert not out.exists()
    server.stop(None).wait()


def test_a_server_that_does_not_know_the_call_is_named(out: Path, export: Export) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    assert_fails(export(address, out), address, "did not answer as a parameter server")
    server.stop(None).wait()


def is_timed() -> bool:
    return any(isinstance(thread, threading.Timer) and thread.is_alive() for thread in threading.enumerate())


def test_a_transfer_may_take_longer_than_the_wait_for_its_beginning(out: Path, export: Export) -> None:
    def slowly() -> Iterator[bytes]:
        until(is_timed, "the wait is timed")
        yield HEADER
        until(lambda: not is_timed(), "it no longer is")
        yield from FRAGMENTS

    server, address = serve_pull(slowly)
    code, _, errors = export(address, out, "--timeout-s", "10")
    assert (code, errors) == (0, "")
    assert_is(out, CENTER, 0)
    server.stop(None).wait()


# To a file.


def test_a_file_that_exists_is_replaced_only_by_a_whole_one(tmp_path: Path, out: Path, export: Export) -> None:
    out.write_bytes(b"of before")
    assert export(tmp_path, out)[0] == 1
    assert out.read_bytes() == b"of before"
    write_fresh(tmp_path, checkpoint_of(CENTER, 1))
    assert export(tmp_path, out)[0] == 0
    assert_is(out, CENTER, 1)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path, export: Export) -> None:
    source = tmp_path / "center"
    source.mkdir()
    write_fresh(source, checkpoint_of(CENTER, 1))
    assert_fails(export(source, tmp_path / "none" / "out"), "cannot write", tmp_path / "none" / "out")
    assert_fails(export(source, tmp_path), "cannot write", tmp_path, "is a directory")
    assert_fails(export(source, "/proc/model.safetensors"), "cannot write /proc/model.safetensors")


def test_a_name_that_the_format_cannot_hold_is_an_error(out: Path, export: Export, start_server: StartServer) -> None:
    server = start_server(1)
    with RawClient(server.address) as client:
        client.initialize({"__metadata__": np.zeros(3)})
    assert_fails(export(server.address, out), "cannot write", out, "__metadata__")
    assert not out.exists()


# The command line.


def sharded(directory: Path, arrays: Arrays, *steps: int) -> list[Path]:
    """A directory for each shard, whose last checkpoint is of the given step."""
    variables = tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items())
    shards = place(Manifest(variables, 16), len(steps), "balanced", b"sixteen bytes...")
    values = Assembly(shards, ["?"] * len(steps)).cut([bytes_of(array) for array in arrays.values()])
    directories = []
    for index, (shard, last) in enumerate(zip(shards, steps, strict=True)):
        directories.append(directory / f"ps{index}")
        directories[-1].mkdir()
        parts = {
            variable.name: np.frombuffer(value, DTYPES[variable.dtype]).reshape(variable.shape)
            for variable, value in zip(shard.variables, values[index], strict=True)
        }
        for step in range(last - 1, last + 1):
            write_fresh(directories[-1], Checkpoint(shard, parts, step))
    return directories


def test_the_checkpoints_of_all_shards_make_the_whole_model(export: Export, out: Path, tmp_path: Path) -> None:
    assert export(*sharded(tmp_path, SPECIAL, 7, 7, 7), out)[0] == 0
    assert_is(out, SPECIAL, 7)


def test_of_shards_at_different_steps_the_newest_common_one_is_exported(
    export: Export, out: Path, tmp_path: Path
) -> None:
    assert export(*sharded(tmp_path, SPECIAL, 7, 8), out)[0] == 0
    assert_is(out, SPECIAL, 7)


def test_shards_without_a_common_step_are_refused(export: Export, out: Path, tmp_path: Path) -> None:
    directories = sharded(tmp_path, SPECIAL, 3, 8)
    assert_fails(export(*directories, out), directories[1], 3)
    assert not out.exists()


def test_some_of_the_shards_are_not_exported_as_the_model(export: Export, out: Path, tmp_path: Path) -> None:
    directories = sharded(tmp_path, SPECIAL, 7, 7)
    assert_fails(export(directories[1], out), directories[1], "shard 1 of 2")
    assert_fails(export(*directories[::-1], out), directories[1], "order")
    assert not out.exists()


def test_a_running_job_of_several_servers_is_exported(export: Export, out: Path, start_server: StartServer) -> None:
    addresses = [start_server(1).address for _ in range(3)]
    with ParameterServerSession(addresses, worker_id="worker-0", is_chief=True, fragment_size_bytes=16) as session:
        session.initialize(SPECIAL, global_step=STEP)
    assert export(*addresses, out)[0] == 0
    assert_is(out, SPECIAL, STEP)


def test_help_has_units_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for shown in ("SOURCE", "OUT.safetensors", "--with-outer-state", "--timeout-s SECONDS", "(30.0)", "examples:"):
        assert shown in text
    assert text.partition("examples:")[2].count("ps-server export") == 4


@pytest.mark.parametrize(
    ("arguments", "named"), [([], "SOURCE"), (["center"], "OUT.safetensors"), (["a", "b", "--timeout-s", "0"], "0")]
)
def test_wrong_arguments_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", *arguments])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_an_error_is_one_line_of_the_process_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ps_server", "export", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert_fails((done.returncode, done.stdout, done.stderr), tmp_path)
