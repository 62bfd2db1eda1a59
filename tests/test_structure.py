"""What the rooms may know of each other, and what every module and every table has to have."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

from modelaverage.errors import FAULTS, REASON_PREFIX, ModelAverageError, Reason, fault_named, refusal
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb

ROOT = Path(__file__).parents[1]
ROOMS = {
    "modelaverage": ROOT / "proto" / "modelaverage",
    "ps_server": ROOT / "ps_server",
    "ma_client": ROOT / "ma_client",
    "ps_worker": ROOT / "ps_worker",
}
# Which rooms a room may know, besides itself.
KNOWS: dict[str, set[str]] = {
    "modelaverage": set(),
    "ps_server": {"modelaverage"},
    "ma_client": {"modelaverage"},
    "ps_worker": {"ma_client", "modelaverage"},
}


def modules() -> dict[str, Path]:
    """Every hand-written module of the rooms, by its full name; generated code is not."""
    found = {}
    for room, folder in ROOMS.items():
        for path in sorted(folder.rglob("*.py")):
            name = ".".join((room, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
            if not name.endswith(("_pb2", "_pb2_grpc")):
                found[name] = path
    return found


MODULES = modules()


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(module: str) -> set[str]:
    """Full names of all that a module imports, anywhere in it; for `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def rooms_of(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def loaded_by(*names: str) -> set[str]:
    """The top-level packages that a fresh process has loaded after it has imported these modules."""
    code = f"import {', '.join(names)}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    return rooms_of(set(done.stdout.split()))


# Imports.


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    room = module.partition(".")[0]
    assert rooms_of(imports_of(module)) & ROOMS.keys() <= KNOWS[room] | {room}


def test_the_round_loads_neither_grpc_nor_numpy_nor_torch() -> None:
    assert loaded_by("ps_server.rules.round").isdisjoint({"grpc", "google", "numpy", "torch", "asyncio"})


def test_the_server_loads_no_torch() -> None:
    server = [module for module in MODULES if module.startswith("ps_server")]
    assert "torch" not in loaded_by(*server)


def test_a_session_loads_no_torch() -> None:
    assert "torch" not in loaded_by("ma_client", "ma_client.session")


def test_only_the_optimizer_the_reader_of_torchs_files_and_what_they_alone_use_and_the_entry_points_import_torch() -> (
    None
):
    importers = {
        module: {other for other in MODULES if module in imports_of(other) and other != "ma_client"}
        for module in MODULES
    }
    # The second is imported where there is such a file; test_a_session_loads_no_torch holds it to that.
    behind_the_optimizer = {"ma_client.torch.optimizer", "ma_client.tensors.torch_file"}
    while more := {
        module
        for module, users in importers.items()
        if users and users <= behind_the_optimizer and module not in behind_the_optimizer
    }:
        behind_the_optimizer |= more
    for module in MODULES:
        if "torch" in rooms_of(imports_of(module)):
            assert module in behind_the_optimizer or module.startswith("ps_worker"), module


# Names.


def definitions(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module defines at its top level, as opposed to those that it imports."""
    for node in body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If(body=then, orelse=otherwise):
                yield from definitions(then + otherwise)


def public_definitions(module: str) -> set[str]:
    return {name for name in definitions(tree_of(module).body) if not name.startswith("_")}


def declared(module: str) -> list[str]:
    """The module's `__all__`."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


@pytest.mark.parametrize("module", MODULES)
def test_all_names_every_public_definition(module: str) -> None:
    missing = public_definitions(module) - set(declared(module))
    assert not missing, f"{module} defines {sorted(missing)} without naming them in __all__"


@pytest.mark.parametrize("module", MODULES)
def test_all_names_only_what_there_is(module: str) -> None:
    imported = {name.rpartition(".")[2] for name in imports_of(module)}
    assert set(declared(module)) <= public_definitions(module) | imported


@pytest.mark.parametrize("module", MODULES)
def test_all_is_sorted_and_names_nothing_twice(module: str) -> None:
    assert declared(module) == sorted(set(declared(module)))


# The error table.


def test_every_reason_has_its_row_in_the_table() -> None:
    assert FAULTS.keys() == set(Reason)


def test_reasons_are_those_of_the_protocol() -> None:
    ours = {REASON_PREFIX + reason.name: reason.value for reason in Reason}
    assert {**ours, "ERROR_REASON_UNSPECIFIED": 0} == dict(pb.ErrorReason.items())


def test_outcomes_are_those_of_the_protocol() -> None:
    ours = {"OUTCOME_" + outcome.name: outcome.value for outcome in Outcome}
    assert {**ours, "OUTCOME_UNSPECIFIED": 0} == dict(pb.Outcome.items())


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_grpc_status_and_its_own_exception(reason: Reason) -> None:
    assert FAULTS[reason].status in grpc.StatusCode.__members__
    error = refusal(reason, "what happened")
    assert isinstance(error, ModelAverageError)
    assert (type(error), error.reason, str(error)) == (FAULTS[reason].exception, reason, "what happened")


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_comes_back_over_the_wire_as_the_same_exception(reason: Reason) -> None:
    error = fault_named(REASON_PREFIX + reason.name, "what happened")
    assert (type(error), error and error.reason) == (FAULTS[reason].exception, reason)


def test_a_reason_that_this_version_does_not_know_is_no_exception_of_the_table() -> None:
    assert fault_named("ERROR_REASON_OF_THE_FUTURE", "") is None
    assert fault_named("", "") is None


def test_every_reason_is_raised_somewhere() -> None:
    raised = set()
    for module in MODULES:
        if module.startswith(("ps_server", "modelaverage")) and module != "modelaverage.errors":
            for node in ast.walk(tree_of(module)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Reason":
                    raised.add(node.attr)
    assert {reason.name for reason in Reason} - raised == set()


# The protocol file.


@pytest.fixture(scope="module")
def comments(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The comment of every element of the protocol file, by its full name."""
    file = tmp_path_factory.mktemp("protocol") / "set"
    protocol = ROOMS["modelaverage"] / "v1" / "parameter_server.proto"
    arguments = [f"-I{ROOT / 'proto'}", "--include_source_info", f"--descriptor_set_out={file}", str(protocol)]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True, timeout=60)
    described = descriptor_pb2.FileDescriptorSet.FromString(file.read_bytes()).file[0]
    by_path = {tuple(place.path): place.leading_comments.strip() for place in described.source_code_info.location}
    return {name: by_path.get(path, "") for name, path in elements(described)}


def elements(described: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and paths as descriptor.proto counts them: messages are 4, enums 5, services 6 of a file."""
    for m, message in enumerate(described.message_type):
        assert not message.nested_type
        assert not message.enum_type
        yield message.name, (4, m)
        for number, field in enumerate(message.field):
            yield f"{message.name}.{field.name}", (4, m, 2, number)
        for number, oneof in enumerate(message.oneof_decl):
            if not oneof.name.startswith("_"):  # the library's own, for an optional field
                yield f"{message.name}.{oneof.name}", (4, m, 8, number)
    for e, enum in enumerate(described.enum_type):
        yield enum.name, (5, e)
        for number, value in enumerate(enum.value):
            yield f"{enum.name}.{value.name}", (5, e, 2, number)
    for s, service in enumerate(described.service):
        yield service.name, (6, s)
        for number, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (6, s, 2, number)


def test_every_element_of_the_protocol_has_a_comment(comments: Mapping[str, str]) -> None:
    assert len(comments) > 100
    assert {"PushHeader.weight", "Phase.PHASE_IDLE", "ParameterServer.Pull", "PullResponse.message"} <= comments.keys()
    assert [name for name, comment in comments.items() if not comment.endswith(".")] == []


@pytest.mark.parametrize("reason", Reason)
def test_the_comment_of_a_reason_names_the_status_of_the_table(comments: Mapping[str, str], reason: Reason) -> None:
    words = set(re.findall(r"\w+", comments[f"ErrorReason.{REASON_PREFIX}{reason.name}"]))
    assert words & grpc.StatusCode.__members__.keys() == {FAULTS[reason].status}


def test_the_errors_that_a_call_names_are_reasons(comments: Mapping[str, str]) -> None:
    for method in ("Initialize", "Pull", "PushAndAverage"):
        named = re.findall(r"[A-Z]{2,}[A-Z_]*", comments[f"ParameterServer.{method}"].partition("Errors:")[2])
        assert named
        for name in named:
            assert any(reason.name.startswith(name) for reason in Reason), f"{method} names {name}"
