"""The protocol page agrees with the library: every byte of its examples, every reason, every limit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from modelaverage import missing, wire
from modelaverage.checks import MAX_WORKER_ID_BYTES
from modelaverage.codecs import CODECS, RAW
from modelaverage.codecs.changes import LEAST_ELEMENTS
from modelaverage.errors import FAULTS, Action, Reason
from modelaverage.manifest import (
    MAX_DIMENSIONS,
    MAX_FRAGMENT_SIZE_BYTES,
    MAX_FRAGMENTS,
    MAX_NAME_BYTES,
    MAX_RUN,
    MAX_SHARDS,
    MAX_VARIABLES,
    Manifest,
    Variable,
)
from modelaverage.names import MAX_NAMES
from modelaverage.outer import OUTER_OPTIMIZERS, outer_optimizer
from modelaverage.outer.text import MAX_TEXT_BYTES
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import MAX_WORKERS

PAGE = (Path(__file__).parents[1] / "docs/protocol.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```hex ([^\n]+)\n([^`]+)\n```", PAGE))
MANIFEST = Manifest((Variable("w", "float32", (2,)), Variable("s", "float16", ()), Variable("b", "float64", (1,))), 16)
VALUES = [
    memoryview(array.tobytes()) for array in (np.array([1, -2], "<f4"), np.array(0.5, "<f2"), np.array([3], "<f8"))
]
OUTCOME = pb.PushOutcome(outcome=pb.OUTCOME_COMMITTED, global_step=8, contributors=["a", "b"])
HEADER = pb.PushHeader(worker_id="a", incarnation=bytes(range(16)), push_id=1, base_step=7, manifest_id="x")


def fragment(index: int) -> bytes:
    return b"".join(MANIFEST.fragment_parts(index, VALUES))


BYTES = {
    "fragment 0": fragment(0),
    "fragment 1": fragment(1),
    "Manifest": wire.manifest_to_message(MANIFEST).SerializeToString(),
    "PushAndAverageRequest fragment 0": wire.encode_fragment(0, [fragment(0)]),
    "PushAndAverageRequest fragment 1": wire.encode_fragment(1, [fragment(1)]),
    "PushAndAverageRequest header": pb.PushAndAverageRequest(header=HEADER).SerializeToString(),
    "PushAndAverageResponse admission": pb.PushAndAverageResponse(admission=pb.PushAdmission()).SerializeToString(),
    "PushAndAverageResponse outcome": pb.PushAndAverageResponse(outcome=OUTCOME).SerializeToString(),
}


def test_the_page_has_every_example() -> None:
    assert EXAMPLES.keys() == BYTES.keys()


@pytest.mark.parametrize("name", BYTES)
def test_the_examples_are_what_goes_over_the_wire(name: str) -> None:
    assert bytes.fromhex(EXAMPLES[name]) == BYTES[name]


FAILURES = PAGE.partition("## 3.")[2].partition("## 4.")[0]


def test_the_page_has_every_reason_with_its_status_and_action() -> None:
    rows = re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \| ([a-z]+) \|", FAILURES, re.MULTILINE)
    expected = {(reason.name, FAULTS[reason].status, FAULTS[reason].action.value) for reason in Reason}
    assert (set(rows), len(rows)) == (expected, len(Reason))


def test_the_page_has_every_action() -> None:
    assert re.findall(r"^\| `([a-z]+)`", FAILURES, re.MULTILINE) == [action.value for action in Action]


def test_the_page_has_every_purpose() -> None:
    for name in pb.Purpose.DESCRIPTOR.values_by_name:
        if name != "PURPOSE_UNSPECIFIED":
            assert re.search(rf"^\| {name.removeprefix('PURPOSE_')}\b", PAGE, re.MULTILINE)


def test_the_page_has_every_outcome() -> None:
    for name in pb.Outcome.DESCRIPTOR.values_by_name:
        if name != "OUTCOME_UNSPECIFIED":
            assert f"| {name.removeprefix('OUTCOME_')} |" in PAGE


@pytest.mark.parametrize(
    ("what", "limit"),
    [
        ("fragment size", f"{MAX_FRAGMENT_SIZE_BYTES >> 20} MiB"),
        ("fragments of a model (or shard)", f"{MAX_FRAGMENTS:,}"),
        ("run", f"{MAX_RUN} fragments and {MAX_FRAGMENT_SIZE_BYTES >> 20} MiB"),
        ("variable's name", f"{MAX_NAME_BYTES:,} bytes"),
        ("dimensions", str(MAX_DIMENSIONS)),
        ("worker id", f"{MAX_WORKER_ID_BYTES} bytes"),
        ("outer optimizer, as text", f"{MAX_TEXT_BYTES} bytes"),
        ("servers of a job", f"{MAX_SHARDS:,}"),
        ("variables of a model (or shard)", f"{MAX_VARIABLES:,}"),
        ("manifest as a message", f"{wire.MAX_MANIFEST_BYTES:,} bytes"),
        ("names in `waiting_for`", f"{MAX_NAMES};"),
        ("names in `finished` of a notice", f"{missing._MAX_FINISHED};"),
        ("workers in a round", f"{MAX_WORKERS:,}"),
    ],
)
def test_the_page_has_the_limits_that_are_in_force(what: str, limit: str) -> None:
    assert f"| {what} | {limit}" in PAGE


def test_the_page_has_every_outer_optimizer_with_its_settings_and_their_defaults() -> None:
    table = PAGE.partition("settings of this\nversion:\n\n")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `([a-z]+)` \| (.*) \|$", table, re.MULTILINE))
    assert rows.keys() == OUTER_OPTIMIZERS.keys()
    for name, text in rows.items():
        said = re.findall(r"`([a-z]+)` \(([0-9./a-z]+)", text)
        given = ",".join(f"{setting}={'1' if default == 'none' else default}" for setting, default in said)
        made = outer_optimizer(f"{name}:{given}" if given else name)
        needed = ",".join(f"{setting}=1" for setting, default in said if default == "none")
        assert list(made.settings) == [setting for setting, _ in said]
        assert made == outer_optimizer(f"{name}:{needed}" if needed else name)


# Codecs.

CODED = {name: codec for name, codec in CODECS.items() if codec is not RAW}
CODECS_SECTION = PAGE.partition("## 9. Codecs")[2]


def test_the_page_has_every_codec_with_its_size() -> None:
    rows = dict(re.findall(r"^\| `([a-z0-9]+)` \| ([0-9nb]+) bytes \| ", CODECS_SECTION, re.MULTILINE))
    assert rows.keys() == CODED.keys()
    n = LEAST_ELEMENTS + 1
    sizes = {"2n": 2 * n, "132b": 132 * -(-n // 128), "68b": 68 * -(-n // 128)}
    manifest = Manifest((Variable("w", "float32", (n,)),), 1 << 13)
    assert {name: codec.size_bytes(manifest, 0) for name, codec in CODED.items()} == {
        name: sizes[size] for name, size in rows.items()
    }


def test_the_page_says_which_variables_are_coded() -> None:
    assert f"at least {LEAST_ELEMENTS:,} elements" in CODECS_SECTION
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for name, codec in CODED.items():
            raw, elements = Variable("w", dtype, (LEAST_ELEMENTS,)).size_bytes, LEAST_ELEMENTS
            is_coded = codec.size_bytes(Manifest((Variable("w", dtype, (elements,)),), 1 << 14), 0) < raw
            assert is_coded == (dtype == "float32" or (dtype in ("bfloat16", "float16") and name != "bfloat16"))
    small = Manifest((Variable("w", "float32", (LEAST_ELEMENTS - 1,)),), 1 << 14)
    assert {codec.size_bytes(small, 0) for codec in CODED.values()} == {4 * (LEAST_ELEMENTS - 1)}


@pytest.mark.parametrize("is_special", [False, True])
def test_the_examples_of_the_codecs_are_what_the_library_writes(is_special: bool) -> None:
    # Fragments of 280 bytes: the first piece has 70 elements.
    manifest = Manifest((Variable("w", "float32", (LEAST_ELEMENTS,)),), 280)
    base = np.ones(70, np.float32)
    values = base.copy()
    values[[0, 1, 2, 64]] = 0.5, 1.25, 1.125, 0.75
    if is_special:
        values[3] = np.nan
    *blocks, last = re.findall(r"```text\n([^`]+)\n```", CODECS_SECTION)
    examples = last.splitlines() if is_special else [blocks[1], blocks[2], blocks[0]]
    for name, text in zip(("int8", "int4", "bfloat16"), examples, strict=True):
        encoded = b"".join(CODED[name].encode(manifest, 0, [values], [base]))
        begin = bytes.fromhex(text.partition("...")[0])
        assert encoded[: len(begin)] == begin
        # What is left out are zeros.
        assert encoded.replace(b"\0", b"") == bytes.fromhex(text.replace("...", "")).replace(b"\0", b"")
