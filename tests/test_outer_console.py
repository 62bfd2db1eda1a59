"""Outer optimizers in `ps-server status` and `ps-server export`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from modelaverage.chosen import Chosen
from modelaverage.manifest import Manifest
from modelaverage.outer import AVERAGE, OuterAdam, OuterOptimizer, OuterSGD, text_of
from modelaverage.placement import PLACEMENTS, place
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.center.center import Center
from ps_server.checkpoints.fields import Checkpoint
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.console.status import Seen, as_text, differing_choices
from ps_server.console.watch import line
from tests.centers import ALL_DTYPES, Array, Arrays, random_arrays
from tests.checkpoints import write_fresh
from tests.conftest import StartServer
from tests.test_watch import drawn, waiting, without_styles

NESTEROV = OuterSGD(0.7, 0.9, nesterov=True)


# The status.


@pytest.mark.parametrize("outer", [AVERAGE, NESTEROV, OuterAdam(0.1)])
def test_the_status_has_the_outer_optimizer(outer: OuterOptimizer) -> None:
    status = waiting()
    status.outer_optimizer = Chosen(text_of(outer)).told.outer_optimizer
    for text in (as_text(status), without_styles(drawn(Seen("ps:2222", status)))):
        (found,) = (words for row in text.splitlines() if (words := row.strip("│ ")).startswith("outer "))
        assert found.split() == ["outer", text_of(outer)]
    assert (f"outer {text_of(outer)}" in line(Seen("ps:2222", status))) == (outer != AVERAGE)


def test_a_server_without_a_center_has_no_outer_optimizer() -> None:
    status = pb.GetStatusResponse(phase=pb.PHASE_UNINITIALIZED)
    for text in (as_text(status), drawn(Seen("ps:2222", status)), line(Seen("ps:2222", status))):
        assert "outer" not in text


def test_the_text_of_an_outer_optimizer_is_shown_as_text() -> None:
    status = waiting()
    status.outer_optimizer = "sgd\x1b[2J[red]\n" + "x" * 500
    for text in (as_text(status, 80), drawn(Seen("ps:2222", status), width=80)):
        assert "\x1b[2J" not in text
        assert max(map(len, without_styles(text).splitlines())) <= 80


def shard(address: str, outer: str, job_id: bytes = b"x" * 16) -> Seen:
    status = waiting()
    status.outer_optimizer = outer
    status.shard.MergeFrom(pb.Shard(count=2, job_id=job_id))
    return Seen(address, status)


def test_servers_of_one_job_with_different_outer_optimizers_are_an_alarm() -> None:
    servers = [shard("ps0:1", ""), shard("ps1:1", "sgd:lr=0.5")]
    said = "OUTER OPTIMIZERS DIFFER within one job: ps0:1 has average; ps1:1 has sgd:lr=0.5"
    assert differing_choices(servers) == [said]
    assert said in without_styles(drawn(*servers))
    assert len(without_styles(drawn(*servers, height=24)).splitlines()) <= 24


@pytest.mark.parametrize(
    "servers",
    [
        [shard("ps0:1", "sgd:lr=0.5"), shard("ps1:1", "sgd:lr=0.5")],
        [shard("ps0:1", "", b"y" * 16), shard("ps1:1", "sgd:lr=0.5")],
        [Seen("ps0:1", waiting()), shard("ps1:1", "sgd:lr=0.5")],
        [Seen("ps0:1"), shard("ps1:1", "sgd:lr=0.5")],
        [Seen("ps0:1", pb.GetStatusResponse(phase=pb.PHASE_UNINITIALIZED)), shard("ps1:1", "sgd:lr=0.5")],
    ],
)
def test_servers_that_agree_and_servers_of_other_jobs_are_none(servers: list[Seen]) -> None:
    assert differing_choices(servers) == []


def test_the_command_shows_it_and_says_where_servers_differ(
    start_server: StartServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = list[str]()
    shards = place(ALL_DTYPES, 2, "round_robin", bytes(16))
    for manifest, outer in zip(shards, (AVERAGE, NESTEROV), strict=True):
        directory = tmp_path / outer.name
        directory.mkdir()
        write_fresh(directory, with_state(manifest, outer))
        addresses.append(start_server(1, checkpoints=CheckpointPolicy(directory)).address)
    assert main(["status", *addresses]) == 0
    printed = capsys.readouterr().out.splitlines()
    text = text_of(NESTEROV)
    assert printed[0] == (
        f"OUTER OPTIMIZERS DIFFER within one job: {addresses[0]} has average; {addresses[1]} has {text}"
    )
    assert [row.split()[1] for row in printed if row.startswith("outer ")] == ["average", text]
    assert main(["status", *addresses, "--json"]) == 0
    assert [each["outer_optimizer"] for each in json.loads(capsys.readouterr().out)] == ["", text]


# An export.


def with_state(manifest: Manifest, outer: OuterOptimizer, seed: int = 0) -> Checkpoint:
    chance = np.random.default_rng(seed)
    current = Center(manifest, outer=outer).current
    for by_variable in current.state.arrays.values():
        for array in by_variable.values():
            array[...] = chance.normal(size=array.shape)
    return Checkpoint(manifest, random_arrays(manifest, chance), 7, counted={}, outer=outer, state=current.state.arrays)


def exported(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def bits(arrays: Arrays) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


@pytest.mark.parametrize("outer", [NESTEROV, OuterAdam(0.1), OuterSGD(0.5)])
def test_an_export_with_the_outer_state_has_every_tensor_of_the_checkpoint(
    outer: OuterOptimizer, tmp_path: Path
) -> None:
    written = with_state(ALL_DTYPES, outer)
    write_fresh(tmp_path, written)
    out = tmp_path / "out.safetensors"
    assert main(["export", str(tmp_path), str(out), "--with-outer-state"]) == 0
    tensors, about = exported(out)
    assert bits(tensors) == bits(written.tensors)
    assert {"outer/momentum/float32", "outer/m/float64", "outer/master/bfloat16"} & tensors.keys()
    assert about == {"global_step": "7", "outer": text_of(outer)}
    assert main(["export", str(tmp_path), str(out)]) == 0
    assert bits(exported(out)[0]) == bits(written.arrays)
    assert exported(out)[1] == {"global_step": "7"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_states_of_all_shards_make_that_of_the_whole_model(placement: str, tmp_path: Path) -> None:
    whole = with_state(ALL_DTYPES, OuterAdam(0.1))
    directories = list[str]()
    for manifest in place(ALL_DTYPES, 3, placement, bytes(16)):

        def cut(arrays: Arrays, manifest: Manifest = manifest) -> dict[str, Array]:
            found = dict[str, Array]()
            for each in manifest.variables:
                if each.name in arrays:
                    assert each.part is not None
                    flat = arrays[each.name].reshape(-1)[each.part.start : each.part.start + each.size]
                    found[each.name] = flat.reshape(each.shape)
            return found

        state = {slot: kept for slot, arrays in whole.state.items() if (kept := cut(arrays))}
        directory = tmp_path / str(len(directories))
        directory.mkdir()
        directories.append(str(directory))
        write_fresh(directory, dataclasses.replace(whole, manifest=manifest, arrays=cut(whole.arrays), state=state))
    out = tmp_path / "out.safetensors"
    assert main(["export", *directories, str(out), "--with-outer-state"]) == 0
    assert bits(exported(out)[0]) == bits(whole.tensors)


def test_shards_with_different_outer_optimizers_are_not_exported_with_their_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, manifest in enumerate(place(ALL_DTYPES, 2, "round_robin", bytes(16))):
        (tmp_path / str(number)).mkdir()
        write_fresh(tmp_path / str(number), with_state(manifest, (AVERAGE, NESTEROV)[number]))
    sources = [str(tmp_path / "0"), str(tmp_path / "1")]
    out = tmp_path / "out.safetensors"
    assert main(["export", *sources, str(out), "--with-outer-state"]) == 1
    said = capsys.readouterr().err
    assert f"the outer optimizers differ: {sources[0]} has average, {sources[1]} has {text_of(NESTEROV)}" in said
    assert not out.exists()
    assert main(["export", *sources, str(out)]) == 0


def test_without_state_there_is_none_to_export_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fresh(tmp_path, with_state(ALL_DTYPES, AVERAGE))
    out = tmp_path / "out.safetensors"
    assert main(["export", str(tmp_path), str(out), "--with-outer-state"]) == 0
    assert capsys.readouterr().err == "ps-server: the outer optimizer is average, which has no state\n"
    assert exported(out)[1] == {"global_step": "7", "outer": "average"}
    assert exported(out)[0].keys() == {each.name for each in ALL_DTYPES.variables}


def test_a_server_sends_no_outer_state_and_the_error_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["export", "127.0.0.1:1", str(out), "--with-outer-state"]) == 1
    said = capsys.readouterr().err
    assert "127.0.0.1:1 is no directory" in said
    assert "give the server's --checkpoint-dir" in said
