"""How sessions name the compression of a job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_client import ConflictError, InvalidRequestError, OuterAverage, OuterSGD, ParameterServerSession
from modelaverage.chosen import NOTHING_CHOSEN
from modelaverage.errors import Reason
from tests.conftest import StartServer
from tests.many_sessions import ManySessions

pytestmark = pytest.mark.in_memory

START: dict[str, NDArray[Any]] = {"w": np.linspace(-1, 1, 5000, dtype=np.float32), "b": np.ones(3)}
CODECS = ["bfloat16", "int8", "int4"]


@pytest.fixture(params=[1, 3])
def job(request: pytest.FixtureRequest, start_server: StartServer) -> Iterator[ManySessions]:
    with ExitStack() as sessions:
        yield ManySessions([start_server(1) for _ in range(request.param)], sessions)


@pytest.mark.parametrize("codec", CODECS)
def test_the_chief_chooses_the_compression_and_everybody_is_told(codec: str, job: ManySessions) -> None:
    chief, other = job.worker(0), job.worker(1)
    assert chief.compression is None
    chief.initialize(START, compression=codec)
    assert chief.compression == codec
    other.pull()
    assert other.compression == codec
    assert {status.compression for status in chief.statuses()} == {codec}
    other.pull(compression=codec)


@pytest.mark.parametrize("none", [None, "none", "raw"])
def test_without_compression_everything_is_raw_and_servers_tell_nothing(none: str | None, job: ManySessions) -> None:
    chief = job.worker(0)
    chief.initialize(START, compression=none)
    assert chief.compression == "raw"
    for name in ("none", "none"):
        chief.pull(compression=name)
    assert {status.compression for status in chief.statuses()} == {""}


@pytest.mark.parametrize(("wrong", "said"), [("int4", "int4"), ("none", "none")])
def test_a_worker_that_names_another_is_refused_with_both_named(wrong: str, said: str, job: ManySessions) -> None:
    chief, other = job.worker(0), job.worker(1)
    chief.initialize(START, compression="int8")
    for refused in (other.pull, lambda **named: job.worker(0).initialize(START, **named)):
        with pytest.raises(ConflictError, match=rf"has the compression int8, .* names {said}; give all") as caught:
            refused(compression=wrong)
        assert caught.value.reason is Reason.COMPRESSION_MISMATCH
        assert any(address in str(caught.value) for address in job.addresses)
    other.pull()  # the refusals have changed nothing
    assert other.base_step == 0


def test_a_job_without_compression_is_no_job_for_a_worker_that_names_one(job: ManySessions) -> None:
    job.worker(0).initialize(START)
    with pytest.raises(ConflictError, match=r"has the compression none, .* names int8") as caught:
        job.worker(1).pull(compression="int8")
    assert caught.value.reason is Reason.COMPRESSION_MISMATCH


def test_the_outer_optimizer_is_compared_first_and_each_by_itself(job: ManySessions) -> None:
    outer = OuterSGD(lr=0.7)
    job.worker(0).initialize(START, outer_optimizer=outer, compression="int8")
    other = job.worker(1)
    with pytest.raises(ConflictError, match="has the outer optimizer sgd"):
        other.pull(outer_optimizer=OuterAverage(), compression="int4")
    with pytest.raises(ConflictError, match=r"has the compression int8"):
        other.pull(outer_optimizer=outer, compression="int4")
    other.pull(outer_optimizer=outer, compression="int8")


def test_a_chief_that_names_none_goes_along_with_the_center(job: ManySessions) -> None:
    job.worker(0).initialize(START, compression="int8")
    again = job.worker(0)
    assert not again.initialize(START).initialized
    assert again.compression == "int8"


@pytest.mark.parametrize("named", ["int8", None])
def test_an_interrupted_initialization_is_completed_with_the_same_compression(
    named: str | None, start_server: StartServer
) -> None:
    addresses = [start_server(1).address for _ in range(3)]
    with ParameterServerSession(addresses, worker_id="a", is_chief=True) as chief:
        _, *others = chief._servers  # the chief dies between two servers

        def die(*_: Any) -> Any:
            raise KeyboardInterrupt

        for server in others:
            server.initialize = die  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            chief.initialize(START, compression="int8")
    with ParameterServerSession(addresses, worker_id="a", is_chief=True) as chief:
        with pytest.raises(ConflictError, match=r"has the compression int8, .* names none"):
            chief.initialize(START, compression="none")
        assert chief.initialize(START, compression=named).initialized
        assert {status.compression for status in chief.statuses()} == {"int8"}


def test_a_server_that_knows_no_compression_is_found_out(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("initialization", "service"):
        monkeypatch.setattr(f"ps_server.flow.{module}.named", lambda _: NOTHING_CHOSEN)
    server = start_server(1)
    said = rf"the center at {server.address} has the compression none, .* names int8; .* must be updated"
    with ParameterServerSession([server.address], worker_id="a", is_chief=True) as chief:
        for call in (lambda: chief.initialize(START, compression="int8"), lambda: chief.pull(compression="int8")):
            with pytest.raises(ConflictError, match=said) as caught:
                call()
            assert caught.value.reason is Reason.COMPRESSION_MISMATCH


@pytest.mark.parametrize("unknown", ["zip", "int8 ", "INT8", "\u00fc\n"])
def test_an_unknown_compression_is_refused_before_anything_is_sent(unknown: str, job: ManySessions) -> None:
    chief = job.worker(0)
    for call in (lambda: chief.initialize(START, compression=unknown), lambda: chief.pull(compression=unknown)):
        with pytest.raises(InvalidRequestError, match="is not known here, only none, bfloat16, int8") as caught:
            call()
        assert caught.value.reason is Reason.CODEC_UNKNOWN
        assert "\n" not in str(caught.value)
    assert chief.compression is None
    assert chief.initialize(START).initialized


@pytest.mark.parametrize("wrong", [8, True, b"int8", ["int8"]])
def test_what_is_no_text_is_a_type_error_that_shows_one(wrong: Any, job: ManySessions) -> None:
    chief = job.worker(0)
    for call in (lambda: chief.initialize(START, compression=wrong), lambda: chief.pull(compression=wrong)):
        with pytest.raises(TypeError, match=r'compression is .*; give a text such as "int8", or None'):
            call()
    assert chief.initialize(START).initialized


def test_servers_that_have_different_ones_are_named(start_server: StartServer) -> None:
    addresses = [start_server(1).address for _ in range(2)]
    with ParameterServerSession(addresses, worker_id="a", is_chief=True) as chief:
        chief.initialize(START, compression="int8")
        _, other = chief._servers
        asked = other.center_header

        def says_another(*arguments: Any) -> Any:
            header = asked(*arguments)
            header.compression = "int4"
            return header

        other.center_header = says_another  # type: ignore[method-assign, assignment]
        said = rf"{addresses[1]} has the compression int4, that at {addresses[0]} has int8; they are not of one job"
        for call in (chief.pull, lambda: chief.initialize(START)):
            with pytest.raises(ConflictError, match=said) as caught:
                call()
            assert caught.value.reason is Reason.COMPRESSION_MISMATCH


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_that_this_worker_does_not_know_is_shown_and_pushed_around(
    codec: str, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = start_server(1).address
    with ParameterServerSession([address], worker_id="a", is_chief=True) as session:
        session.initialize(START, compression=codec)
        monkeypatch.setattr("ma_client.job.one_server.CODECS", {})  # an older worker
        center, _ = session.pull()
        assert session.compression == codec
        session.push_and_average({name: value + 1 for name, value in center.items()})
        status = session.status()
        assert status.received_bytes == status.received_raw_bytes > 0
