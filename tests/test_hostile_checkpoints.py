"""Hostile checkpoints: one with any defect is skipped, with a reason, and the previous one is used."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import CheckpointError, load_latest
from tests.checkpoints import content, durable, header_of, read, small, write_fresh
from tests.conftest import StartServer
from tests.jobs import Job
from tests.raw_client import RawClient, flat_bytes
from tests.strategies import fast
from tests.test_server_process import ServerProcess

GOOD, EVIL = 3, 5
MODEL_BYTES = 1 << 20  # what the server may hold
NESTED = "[" * 200_000
KEY = "30" * 16

Head = dict[str, Any]


def put(directory: Path, data: bytes) -> Path:
    """Writes any bytes under the name that a durable checkpoint with these bytes would have."""
    path = directory / f"center-{EVIL:020d}.{zlib.crc32(data):08x}.safetensors"
    path.write_bytes(data)
    return path


def with_head(directory: Path, text: bytes, body: bytes = b"") -> Path:
    return put(directory, len(text).to_bytes(8, "little") + text + body)


def forged(directory: Path, change: Callable[[Head], object]) -> Path:
    """Writes a correct checkpoint, except that ``change`` modifies its head."""
    path = write_fresh(directory, small(EVIL))
    head, whole = header_of(path), path.read_bytes()
    path.unlink()
    change(head)
    body = whole[8 + int.from_bytes(whole[:8], "little") :]
    return with_head(directory, json.dumps(head).encode(), body)


def fields(**changed: object) -> Callable[[Path], Path]:
    """A checkpoint with other metadata; values that are not text are written as JSON, None is left out."""

    def make(directory: Path) -> Path:
        def change(head: Head) -> None:
            about = head["__metadata__"]
            for name, value in changed.items():
                about[name] = value if isinstance(value, str) else json.dumps(value)
                if value is None:
                    del about[name]

        return forged(directory, change)

    return make


def tensor(**changed: object) -> Callable[[Path], Path]:
    """A checkpoint with another description of the variable `w`, which is float32[40]."""

    def make(directory: Path) -> Path:
        return forged(directory, lambda head: head["w"].update(changed))

    return make


def a_shard(**changed: object) -> Callable[[Path], Path]:
    """A checkpoint of one of two servers, with something wrong."""
    parts = [[number, 0, each["shape"]] for number, (name, each) in enumerate(ordered().items())]
    return fields(**{"shard": [0, 2, "00" * 16], "parts": parts, **changed})


def ordered() -> Head:
    """The variables as in the manifest: name and shape."""
    return {variable.name: {"shape": list(variable.shape)} for variable in small().manifest.variables}


def special(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Makes something that is not a file, under the name of a fresh checkpoint."""

    def build(directory: Path) -> Path:
        path = directory / f"center-{EVIL:020d}.fresh.safetensors"
        make(path)
        return path

    return build


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        before = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has to be short
        try:
            listening.bind(path.name)
        finally:
            os.chdir(before)


def a_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    except OSError as error:
        pytest.skip(f"no device can be made: {error}")


def a_link_to_a_good_one(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    path.symlink_to(write_fresh(elsewhere, small(EVIL)))


def sparse(size_bytes: int) -> Callable[[Path], Path]:
    """A sparse file: it is long but has no data."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size_bytes)

    return special(make)


def too_large(directory: Path) -> Path:
    """A checkpoint that is correct except for its size: float16, which the server holds four times."""
    size = MODEL_BYTES // 2
    about = {**header_of(write_fresh(directory, small(EVIL)))["__metadata__"], "variables": '["w"]'}
    (directory / f"center-{EVIL:020d}.fresh.safetensors").unlink()
    head = {"__metadata__": about, "w": {"dtype": "F16", "shape": [size], "data_offsets": [0, 2 * size]}}
    about["fragment_size_bytes"] = str(1 << 20)
    return with_head(directory, json.dumps(head).encode(), bytes(2 * size))


def same_name_twice(directory: Path) -> Path:
    path = forged(directory, lambda _: None)
    whole = path.read_bytes()
    path.unlink()
    text = whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip()
    text = text[:-1] + b', "w": {"dtype": "F32", "shape": [40], "data_offsets": [8, 168]}}'
    return with_head(directory, text, whole[-300:])


def longer(directory: Path) -> Path:
    path = forged(directory, lambda _: None)
    whole = path.read_bytes()
    path.unlink()
    return put(directory, whole + bytes(9))


def many(count: int) -> dict[str, list[object]]:
    return {f"w{number}": [KEY, number] for number in range(count)}


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "contributors are numbers": (fields(contributors=[1, 2]), "worker id 1 is not a string"),
    "contributors are text": (fields(contributors='"a"'), "not a list"),
    "contributors are an object": (fields(contributors={"a": 1}), "not a list"),
    "contributors are nested deeply": (fields(contributors=NESTED), "deeply"),
    "a contributor is empty": (fields(contributors=[""]), "worker id '' has 0 bytes"),
    "a contributor is long": (fields(contributors=["x" * 129]), "129 bytes"),
    "a contributor is half a character": (fields(contributors='["\\ud800"]'), "surrogates"),
    "a contributor is there twice": (fields(contributors=["a", "a"]), "twice"),
    "very many contributors": (fields(contributors=[str(n) for n in range(70_000)]), "70000 items is not a list"),
    "counted is a list": (fields(counted=[]), "not an object"),
    "counted is nested deeply": (fields(counted='{"a":' * 100_000), "deeply"),
    "counted is nested deeply within": (fields(counted='{"a": [' + NESTED), "deeply"),
    "somebody counted is long": (fields(counted={"x" * 129: [KEY, 1]}), "129 bytes"),
    "an incarnation is short": (fields(counted={"a": ["30", 1]}), "incarnation is not 16 bytes"),
    "an incarnation is a number": (fields(counted={"a": [7, 1]}), "incarnation 7 is not a string"),
    "an incarnation has blanks": (fields(counted={"a": ["30 " * 10 + "30", 1]}), "incarnation is not 16 bytes"),
    "a push number is negative": (fields(counted={"a": [KEY, -1]}), "push id -1"),
    "a push number is large": (fields(counted={"a": [KEY, 2**64]}), "push id 18446744073709551616"),
    "a push number is a truth": (fields(counted={"a": [KEY, True]}), "push id True"),
    "a push number is a fraction": (fields(counted={"a": [KEY, 1.0]}), "push id 1.0"),
    "a push number has many digits": (fields(counted='{"a": ["' + KEY + '", ' + "9" * 5000 + "]}"), "digits"),
    "a push number is missing": (fields(counted={"a": [KEY]}), "not an incarnation and push id"),
    "very many are counted": (fields(counted=many(10_001)), "10001 items is not an object"),
    "a field is missing": (fields(counted=None), "does not say counted"),
    "JSON that is none": (fields(counted="{'a'"), "damaged"),
    "a list of nothing but brackets": (fields(contributors="[" + "[]," * 2_000_000 + "[]]"), "more than any center"),
    "variables are numbers": (fields(variables=[1, 2, 3, 4, 5, 6]), "not a string"),
    "variables are an object": (fields(variables={}), "not a list"),
    "a variable is missing": (fields(variables=list(ordered())[:-1]), "list of variables"),
    "a variable is there twice": (fields(variables=[*list(ordered())[:-1], "w"]), "list of variables"),
    "variables are nested deeply": (fields(variables=NESTED), "deeply"),
    "the step is of other digits": (fields(global_step="\u0665"), "global_step"),
    "the step has a sign": (fields(global_step="+5"), "global_step"),
    "the step has zeros before it": (fields(global_step="05"), "global_step"),
    "the step has blanks": (fields(global_step=" 5 "), "global_step"),
    "the step is another": (fields(global_step="6"), "name"),
    "the step is huge": (fields(global_step=str(2**63)), "global_step"),
    "the step has many digits": (fields(global_step="5" * 10_000), "global_step"),
    "a fragment has no size": (fields(fragment_size_bytes="0"), "fragment_size_bytes 0"),
    "a fragment is huge": (fields(fragment_size_bytes=str(2**40)), "fragment_size_bytes"),
    "a fragment is a fraction": (fields(fragment_size_bytes="64.0"), "fragment_size_bytes"),
    "a fragment has underscores": (fields(fragment_size_bytes="6_4"), "fragment_size_bytes"),
    "a shard without parts": (a_shard(parts=None), "not both"),
    "parts without a shard": (a_shard(shard=None), "not both"),
    "a shard that there is not": (a_shard(shard=[2, 2, "00" * 16]), "no shard 2 of 2"),
    "a shard is a truth": (a_shard(shard=[False, 2, "00" * 16]), "shard False"),
    "a shard is nested deeply": (a_shard(shard=NESTED), "deeply"),
    "a shard of a short job id": (a_shard(shard=[0, 2, "00"]), "job id is not 16 bytes"),
    "a shard of text": (a_shard(shard='"012"'), "not a list"),
    "a part is a number": (a_shard(parts=[1] * 6), "a part 1 is not a list"),
    "a part is short": (a_shard(parts=[[0, 0]] * 6), "not a variable, start and shape"),
    "a part starts before all": (a_shard(parts=[[n, -1, [40]] for n in range(6)]), "start -1"),
    "a part is number 2**32": (a_shard(parts=[[2**32 + n, 0, [40]] for n in range(6)]), "4294967296"),
    "a part of another shape": (a_shard(parts=[[n, 0, [7]] for n in range(6)]), "not a part of one of shape"),
    "a part of fractions": (a_shard(parts=[[n, 0, [40.0]] for n in range(6)]), "extent 40.0"),
    "too few parts": (a_shard(parts=[]), "damaged"),
    "a tensor of integers": (tensor(dtype="I32"), "only F32"),
    "a tensor's type is a list": (tensor(dtype=[]), "not a string"),
    "a tensor of another shape": (tensor(shape=[41]), "does not fit"),
    "a tensor of negative extents": (tensor(shape=[-8, -5]), "extent -8"),
    "a tensor of truths": (tensor(shape=[40, True]), "extent True"),
    "a tensor of very many extents": (tensor(shape=[1] * 100_000), "not a list"),
    "a tensor is too large to be": (tensor(shape=[2**62, 2**62]), "does not fit"),
    "a tensor that says more": (tensor(more=1), "not an object of at most 3"),
    "a tensor that lies elsewhere": (tensor(data_offsets=[2**40, 2**40 + 160]), "gap"),
    "a tensor that lies on another": (tensor(data_offsets=[0, 160]), "gap"),
    "a tensor that ends before it begins": (tensor(data_offsets=[168, 8]), "does not fit"),
    "a tensor is a number": (lambda d: forged(d, lambda head: head.update(w=7)), "not an object"),
    "the metadata is a list": (lambda d: forged(d, lambda head: head.update(__metadata__=[])), "not an object"),
    "the metadata has numbers": (
        lambda d: forged(d, lambda head: head["__metadata__"].update(global_step=5)),
        "not a string",
    ),
    "there is no metadata": (lambda d: forged(d, lambda head: head.pop("__metadata__")), "not written by ps-server"),
    "of another format": (fields(format="pt"), "not written by ps-server"),
    "a name is half a character": (lambda d: forged(d, lambda h: h.update({"\ud800": h.pop("w")})), "surrogates"),
    "a name is long": (
        lambda d: forged(
            d,
            lambda h: (
                h.update({"x" * 1025: h.pop("last")}),
                h["__metadata__"].update(variables=json.dumps([*list(ordered())[:-1], "x" * 1025])),
            ),
        ),
        "1025 bytes",
    ),
    "a name is there twice": (same_name_twice, "twice"),
    "nothing at all": (lambda d: put(d, b""), "0 bytes"),
    "a head that is none": (lambda d: with_head(d, b"not JSON"), "damaged"),
    "a head that is nested deeply": (lambda d: with_head(d, b"[" * 200_000), "deeply"),
    "a head of nested objects": (lambda d: with_head(d, b'{"a":' * 200_000), "deeply"),
    "a head that is not text": (lambda d: with_head(d, b"\xff\xfe{}"), "damaged"),
    "a head longer than the file": (lambda d: put(d, (2**63).to_bytes(8, "little") + b"{}"), "not all of one"),
    "a body longer than it says": (longer, "its header says"),
    "no variables": (
        lambda d: with_head(d, json.dumps({"__metadata__": {**about(d), "variables": "[]"}}).encode()),
        "no variables",
    ),
    "a FIFO": (special(os.mkfifo), "a FIFO"),
    "a socket": (special(a_socket), "a socket"),
    "a directory": (special(Path.mkdir), "a directory"),
    "a device": (special(a_device), "a device"),
    "a link to a good one": (special(a_link_to_a_good_one), "a link"),
    "a link to nothing": (special(lambda path: path.symlink_to("nowhere")), "a link"),
    "a link to itself": (special(lambda path: path.symlink_to(path.name)), "a link"),
    "a link to a device": (special(lambda path: path.symlink_to("/dev/zero")), "a link"),
    "a file of a terabyte": (sparse(1 << 40), "--max-model-bytes"),
    "a file of zeros": (sparse(1 << 16), "damaged"),
    "a model too large for the server": (too_large, "--max-model-bytes"),
}


def about(directory: Path) -> dict[str, str]:
    """The right metadata."""
    path = write_fresh(directory, small(EVIL))
    found: dict[str, str] = header_of(path)["__metadata__"]
    path.unlink()
    return found


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_passed_over_with_a_reason(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = HOSTILE[kind]
    durable(tmp_path, GOOD)
    evil = make(tmp_path)
    began_s = time.monotonic()
    loaded = load_latest(tmp_path, MODEL_BYTES)
    assert time.monotonic() - began_s < 10
    assert loaded is not None
    assert content(loaded) == content(small(GOOD))
    passed_over = [record for record in caplog.records if "is skipped" in record.getMessage()]
    evil_ones = [record for record in passed_over if str(evil) in record.getMessage()]
    assert len(evil_ones) == 1, caplog.messages
    assert reason in evil_ones[0].getMessage()
    assert len(evil_ones[0].getMessage()) < 1000
    assert evil_ones[0].getMessage().isprintable()
    assert all(record.levelno == logging.WARNING and record.exc_info is None for record in passed_over)


def test_the_forger_can_write_what_is_right(tmp_path: Path) -> None:
    assert content(read(forged(tmp_path, lambda _: None))) == content(small(EVIL))
    shard = read(a_shard()(tmp_path))
    assert shard.manifest.shard is not None
    assert (shard.manifest.shard.index, shard.manifest.shard.count) == (0, 2)


_FIELDS = ["global_step", "variables", "fragment_size_bytes", "contributors", "counted", "boot_id", "shard", "parts"]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values),
    max_leaves=5,
)


@given(st.sampled_from(_FIELDS), _JSON)
@fast
def test_whatever_a_field_says_the_file_is_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: object
) -> None:
    directory = tmp_path_factory.mktemp("forged")
    path = a_shard(**{name: value})(directory) if name in ("shard", "parts") else fields(**{name: value})(directory)
    with suppress(CheckpointError):
        found = read(path)
        pb.PushOutcome(contributors=found.contributors)  # what a call does with them
        assert all(len(key) == 16 and 0 <= number < 2**64 for key, number in (found.counted or {}).values())
    path.unlink()
    directory.rmdir()


def test_a_file_that_becomes_shorter_while_it_is_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, evil = durable(tmp_path, GOOD), write_fresh(tmp_path, small(EVIL))
    read_now = os.readv

    def cut_off(descriptor: int, buffers: Any) -> int:
        if evil.stat().st_size > 100:
            os.truncate(evil, 100)
        return read_now(descriptor, buffers)

    monkeypatch.setattr(os, "readv", cut_off)
    with pytest.raises(CheckpointError, match="shorter"):
        read(evil)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.global_step == GOOD
    assert good.exists()


def test_a_file_that_takes_too_much_memory_is_passed_over(tmp_path: Path) -> None:
    """For real: in a process with limited memory."""
    durable(tmp_path, GOOD)
    size = 1 << 38
    text = json.dumps(
        {
            "__metadata__": {**about(tmp_path), "variables": '["w"]', "fragment_size_bytes": str(1 << 20)},
            "w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
        }
    ).encode()
    evil = tmp_path / f"center-{EVIL:020d}.fresh.safetensors"
    evil.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(evil, 8 + len(text) + size)
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from ps_server.checkpoints.reading import find_latest\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "found, passed_over = find_latest(Path(sys.argv[1]))\n"
        "print(found[1].global_step, *(error for _, error in passed_over))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout == f"{GOOD} there is not enough memory to read it\n"


def test_a_server_passes_over_what_is_hostile_and_serves_the_one_before(tmp_path: Path) -> None:
    durable(tmp_path, GOOD)
    for kind in ("contributors are numbers", "contributors are nested deeply", "a FIFO", "a file of a terabyte"):
        make, reason = HOSTILE[kind]
        evil = make(tmp_path)
        with ServerProcess("--checkpoint-dir", str(tmp_path), "--max-model-bytes", str(MODEL_BYTES)) as server:
            with RawClient(server.address) as client:
                header, center = client.pull()
                assert (header.global_step, center) == (GOOD, flat_bytes(small(GOOD).arrays))
                # What is derived from its metadata later is right, too.
                job = Job(client, server.address)
                outcome, _ = job.push("a", dict(small(GOOD).arrays), base_step=GOOD - 1).answer()
                assert (outcome.outcome, list(outcome.contributors)) == (pb.OUTCOME_STALE, ["a", "b"])
            server.signal(signal.SIGTERM)
            code, _, log = server.end()
        assert code == 0
        assert f"{evil} is skipped: " in log
        assert reason in log
        evil.unlink()


def test_a_server_of_one_size_takes_no_checkpoint_of_another(start_server: StartServer, tmp_path: Path) -> None:
    durable(tmp_path, GOOD)
    with pytest.raises(Exception, match="none of its 1 checkpoints can be used"):
        start_server(2, max_model_bytes=16, checkpoints=CheckpointPolicy(tmp_path))
