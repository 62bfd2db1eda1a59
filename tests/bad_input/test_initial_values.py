"""Initial values, and a manifest, that are wrong are refused with one line and initialize nothing."""

from __future__ import annotations

import numpy as np
import pytest
from grpc import StatusCode

from ma_client import ParameterServerSession
from modelaverage import wire
from modelaverage.errors import InvalidRequestError, Reason
from modelaverage.manifest import MAX_VARIABLES
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from tests.bad_input.guarded import CENTER, FRAGMENTS, Job, assert_one_line, assert_refused, running
from tests.conftest import StartServer
from tests.raw_client import Arrays, fragment, fragments_of, initialize_header, manifest_of

LONG = 1 << 40


def assert_manifest_refused(job: Job, manifest: pb.Manifest, *named: object) -> None:
    stream = job.client.open_initialize()
    stream.send(initialize_header(manifest))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MANIFEST_INVALID", *named)
    job.assert_still_serves()


def one_variable(name: str = "w", data_type: int = 1, shape: tuple[int, ...] = (2,)) -> pb.Manifest:
    variable = pb.Variable(name=name, shape=shape)
    variable.data_type = data_type  # type: ignore[assignment]  # numbers that the enumeration lacks, too
    return pb.Manifest(variables=[variable], fragment_size_bytes=64)


def test_a_manifest_with_no_variables_is_refused(bare: Job) -> None:
    assert_manifest_refused(bare, pb.Manifest(fragment_size_bytes=64), "no variables")


def test_a_missing_manifest_is_refused(bare: Job) -> None:
    stream = bare.client.open_initialize()
    stream.send(pb.InitializeRequest(header=pb.InitializeHeader(worker_id="chief")))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MANIFEST_INVALID", "no variables")
    bare.assert_still_serves()


def test_a_manifest_with_a_repeated_name_is_refused(bare: Job) -> None:
    manifest = manifest_of(CENTER)
    manifest.variables[2].name = "w"
    assert_manifest_refused(bare, manifest, "'w'", "twice")


def test_a_manifest_of_too_many_variables_is_refused(bare: Job) -> None:
    manifest = pb.Manifest(fragment_size_bytes=64, variables=[pb.Variable()] * (MAX_VARIABLES + 1))
    assert_manifest_refused(bare, manifest, f"{MAX_VARIABLES + 1} variables", MAX_VARIABLES)


def test_a_manifest_that_no_pull_could_be_answered_with_is_refused(bare: Job) -> None:
    manifest = pb.Manifest(fragment_size_bytes=64)
    for number in range(4080):
        manifest.variables.add(name=f"{number:04d}".ljust(1017, "n"), data_type=pb.DATA_TYPE_FLOAT32, shape=[1])
    size_bytes = manifest.ByteSize()
    assert wire.MAX_MANIFEST_BYTES < size_bytes < (4 << 20) - 20  # the header of Initialize fits a message
    assert_manifest_refused(bare, manifest, "4080 variables", f"{size_bytes} bytes", wire.MAX_MANIFEST_BYTES)


def test_a_session_refuses_what_no_message_can_carry_before_it_sends_anything(bare: Job) -> None:
    arrays = {f"{number:04d}".ljust(1017, "n"): np.zeros(1, np.float32) for number in range(4080)}
    with ParameterServerSession([bare.address], worker_id="chief", is_chief=True) as session:
        with pytest.raises(InvalidRequestError) as refused:
            session.initialize(arrays)
        assert refused.value.reason is Reason.MANIFEST_INVALID
        assert refused.value.status is None  # nobody was asked
        assert_one_line(str(refused.value), "4080 variables", wire.MAX_MANIFEST_BYTES)
    bare.assert_still_serves()


@pytest.mark.parametrize(("name", "size"), [("", 0), ("n" * 1025, 1025)])
def test_a_manifest_with_an_empty_or_over_long_name_is_refused(bare: Job, name: str, size: int) -> None:
    assert_manifest_refused(bare, one_variable(name=name), f"{size} bytes", "1 to 1024")


@pytest.mark.parametrize("shape", [(-1,), (3, -2, 0), (-1, -1)])
def test_a_manifest_with_a_negative_shape_is_refused(bare: Job, shape: tuple[int, ...]) -> None:
    assert_manifest_refused(bare, one_variable(shape=shape), "'w'", "negative", min(shape), shape)


@pytest.mark.parametrize("shape", [(2**61,), (2**62, 4), (2**32, 2**32), (2**63 - 1,) * 4])
def test_a_manifest_with_an_overflowing_shape_is_refused(bare: Job, shape: tuple[int, ...]) -> None:
    assert_manifest_refused(bare, one_variable(shape=shape), "'w'", shape)


def test_a_manifest_with_an_overflowing_shape_that_a_zero_makes_empty_is_refused(bare: Job) -> None:
    assert_manifest_refused(bare, one_variable(shape=(0, 2**62, 2**62)), "'w'")


def test_a_manifest_with_too_many_dimensions_is_refused(bare: Job) -> None:
    assert_manifest_refused(bare, one_variable(shape=(1,) * 65), "'w'")


def test_a_manifest_whose_sizes_overflow_together_is_refused(bare: Job) -> None:
    manifest = pb.Manifest(fragment_size_bytes=2 << 20)
    for index in range(3):
        manifest.variables.add(name=f"w{index}", data_type=pb.DATA_TYPE_FLOAT32, shape=[2**60])
    assert_manifest_refused(bare, manifest, 3 * 2**62)


@pytest.mark.parametrize("data_type", [0, 5, 99])
def test_a_manifest_with_an_unknown_dtype_is_refused(bare: Job, data_type: int) -> None:
    assert_manifest_refused(bare, one_variable(data_type=data_type), "'w'", data_type, "float32")


@pytest.mark.parametrize("size_bytes", [0, 4, 12, 63, (2 << 20) + 8, 2**32 - 8])
def test_a_bad_fragment_size_is_refused(bare: Job, size_bytes: int) -> None:
    assert_manifest_refused(bare, manifest_of(CENTER, size_bytes), f"fragment_size_bytes {size_bytes}", 8, 2 << 20)


def test_a_model_cut_into_far_too_many_fragments_is_refused(start_server: StartServer) -> None:
    # Every fragment costs the server some memory even before it comes.
    with running(start_server, max_model_bytes=LONG) as job:
        manifest = one_variable(shape=(LONG // 8,))
        manifest.fragment_size_bytes = 8
        assert_manifest_refused(job, manifest, LONG // 2)


def test_a_model_over_max_model_bytes_is_refused(start_server: StartServer) -> None:
    with running(start_server, max_model_bytes=1000) as job:
        assert_manifest_refused(job, one_variable(shape=(251,)), 1004, "--max-model-bytes", 1000)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-workers", "10001"], "--num-workers 10001"),
        (["--num-workers", "3", "--min-workers", "2", "--max-workers", "10001"], "--max-workers 10001"),
    ],
)
def test_more_workers_than_an_outcome_can_name_are_refused(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--bind", "127.0.0.1:0", *flags]) == 1
    assert_one_line(capsys.readouterr().err[:-1], named, "at most 10000")


def test_an_initial_step_that_does_not_fit_63_bits_is_refused(bare: Job) -> None:
    stream = bare.client.open_initialize()
    stream.send(initialize_header(manifest_of(CENTER), global_step=2**63))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "GLOBAL_STEP_INVALID", 2**63)
    bare.assert_still_serves()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"v": CENTER["w"], "b": CENTER["b"], "scale": CENTER["scale"]}, ("variable 0", "'v'", "'w'")),
        ({**CENTER, "w": np.zeros((5, 7))}, ("'w'", "float64[5, 7]", "float32[5, 7]")),
        ({**CENTER, "b": np.zeros((3, 1))}, ("'b'", "float64[3, 1]", "float64[3]")),
        ({**CENTER, "more": CENTER["b"]}, ("'more'",)),
        ({"w": CENTER["w"], "b": CENTER["b"]}, ("'scale'",)),
        ({"b": CENTER["b"], "w": CENTER["w"], "scale": CENTER["scale"]}, ("variable 0", "'b'", "'w'")),
    ],
    ids=["name", "dtype", "shape", "one more", "one less", "order"],
)
def test_a_second_different_manifest_is_refused(job: Job, other: Arrays, named: tuple[str, ...]) -> None:
    stream = job.client.open_initialize()
    stream.send(initialize_header(manifest_of(other)))
    stream.give(fragments_of(other))
    stream.half_close()
    assert_refused(stream, StatusCode.FAILED_PRECONDITION, "MANIFEST_MISMATCH", *named)
    job.assert_still_serves()


@pytest.mark.parametrize(
    ("sent", "reason", "named"),
    [
        ([0], "FRAGMENT_MISSING", ("1 of 3",)),
        ([], "FRAGMENT_MISSING", ("0 of 3",)),
        ([0, 3], "FRAGMENT_EXTRA", ("fragment 3", 3)),
        ([0, 1, 2, 2], "FRAGMENT_EXTRA", (3,)),
        ([0, 2], "FRAGMENT_MISPLACED", ("fragment 2", 1)),
        ([0, 0], "FRAGMENT_REPEATED", ("fragment 0", 1)),
    ],
)
def test_initial_values_with_wrong_fragments_are_refused(
    bare: Job, sent: list[int], reason: str, named: tuple[object, ...]
) -> None:
    stream = bare.client.open_initialize()
    stream.send(initialize_header(manifest_of(CENTER)))
    for index in sent:
        stream.send(fragment(index, (FRAGMENTS + [bytes(64)])[index]))
    stream.half_close()
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, reason, *named)
    bare.assert_still_serves()


@pytest.mark.parametrize("surplus", [-8, 8])
def test_initial_values_with_a_wrongly_sized_fragment_are_refused(bare: Job, surplus: int) -> None:
    stream = bare.client.open_initialize()
    stream.send(initialize_header(manifest_of(CENTER)), fragment(0, bytes(64 + surplus)))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", "fragment 0", 64 + surplus, 64)
    bare.assert_still_serves()
