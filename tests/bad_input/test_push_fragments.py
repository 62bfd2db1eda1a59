"""A push whose fragments are wrong is refused with one line and changes no center."""

from __future__ import annotations

import numpy as np
import pytest
from grpc import StatusCode

from ma_client import ParameterServerSession
from modelaverage.errors import ConflictError, InvalidRequestError, Reason
from tests.bad_input.guarded import FRAGMENTS, A, Job, assert_one_line, assert_refused
from tests.raw_client import Arrays, fragment

# A push whose fragments are wrong. What came before the fault is kept: the same push is asked for the rest only.


def test_a_push_with_a_missing_fragment_is_refused(job: Job) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=1)
    stream.half_close()
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_MISSING", "1 of 3")
    job.assert_still_serves()


def test_a_push_without_any_fragment_is_refused(job: Job) -> None:
    stream = job.admitted()
    stream.half_close()
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_MISSING", "0 of 3")
    job.assert_still_serves()


@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize("index", [3, 2**32 - 1])
def test_a_push_with_an_extra_fragment_is_refused(job: Job, given: int, index: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=given)
    stream.send(fragment(index, bytes(64)))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_EXTRA", f"fragment {index}", 3)
    job.assert_still_serves()


def test_a_push_with_a_misplaced_fragment_is_refused(job: Job) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=1)
    stream.give(FRAGMENTS, first=2)
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_MISPLACED", "fragment 2", 1)
    job.assert_still_serves()


@pytest.mark.parametrize("given", [1, 3])
def test_a_push_with_a_repeated_fragment_is_refused(job: Job, given: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=given)
    stream.give(FRAGMENTS, end=1)
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_REPEATED", "fragment 0", given)
    job.assert_still_serves()


@pytest.mark.parametrize(("index", "right"), [(0, 64), (2, 44)])
@pytest.mark.parametrize("surplus", [-1, -8, 1, 8])
def test_a_push_with_a_wrongly_sized_fragment_is_refused(job: Job, index: int, right: int, surplus: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=index)
    stream.send(fragment(index, bytes(right + surplus)))
    assert_refused(
        stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", f"fragment {index}", right + surplus, right
    )
    job.assert_still_serves()


@pytest.mark.parametrize(("first", "size_bytes"), [(0, 64 + 8), (0, 2 * 64 + 1), (1, 64 + 44 + 8), (2, 44 + 64)])
def test_a_run_that_is_not_of_whole_fragments_changes_nothing(job: Job, first: int, size_bytes: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=first)
    stream.send(fragment(first, bytes(size_bytes)))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", f"fragment {first}", size_bytes)
    job.assert_still_serves()


def test_a_run_counts_as_its_fragments_do(job: Job) -> None:
    stream = job.admitted()
    stream.send(fragment(0, b"".join(FRAGMENTS[:2])))
    stream.give(FRAGMENTS, first=0, end=1)
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_REPEATED", "fragment 0", 2)
    job.assert_still_serves()


def test_a_push_from_the_last_step_that_there_is_is_refused(job: Job) -> None:
    stream = job.open_push(job.header(base_step=2**63 - 1))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "GLOBAL_STEP_INVALID", 2**63 - 1)
    job.assert_still_serves()


def test_a_push_with_an_empty_fragment_is_refused(job: Job) -> None:
    stream = job.admitted()
    stream.send(fragment(0, b""))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", "fragment 0", "0 bytes", 64)
    job.assert_still_serves()


def test_a_push_of_other_variables_is_refused(job: Job) -> None:
    wrong: list[tuple[Arrays, tuple[str, ...]]] = [
        ({"w": np.zeros((5, 7))}, ("'w'", "float64[5, 7]", "float32[5, 7]")),
        ({"w": np.zeros((7, 5), np.float32)}, ("'w'", "float32[7, 5]", "float32[5, 7]")),
        ({"scale": np.zeros(1, np.float32)}, ("'scale'", "float32[1]", "float32[]")),
        ({"b": np.zeros(3, np.int64)}, ("'b'", "int64")),
        ({"more": np.zeros(1)}, ("'more'",)),
    ]
    with ParameterServerSession([job.address], worker_id="a") as session:
        session.pull()
        for changed, named in wrong:
            with pytest.raises((ConflictError, InvalidRequestError)) as refused:
                session.push_and_average({**A, **changed})
            assert_one_line(str(refused.value), *named)
    job.assert_still_serves()


def test_a_push_without_one_of_the_variables_is_refused(job: Job) -> None:
    with ParameterServerSession([job.address], worker_id="a") as session:
        session.pull()
        with pytest.raises(ConflictError) as refused:
            session.push_and_average({"w": A["w"], "scale": A["scale"]})
    assert refused.value.reason is Reason.MANIFEST_MISMATCH
    assert_one_line(str(refused.value), "'b'")
    job.assert_still_serves()
