"""What importing a package loads, and what every module, the table of errors and the protocol file must contain.

Which room may import from which is declared in .importlinter; `make lint` checks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping

import grpc
import pytest
from google.protobuf import descriptor_pb2

from modelaverage.errors import FAULTS, REASON_PREFIX, ModelAverageError, Reason, fault_named, refusal
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.source_tree import MODULES, ROOT, tree_of

# What is loaded: .importlinter sees imports by name, not those that a library makes.


def loaded_by(*names: str) -> set[str]:
    """The top-level packages that a fresh process has loaded after it has imported these modules."""
    code = f"import {', '.join(names)}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_rules_load_neither_grpc_nor_numpy_nor_torch() -> None:
    rules = [module for module in MODULES if module.startswith("ps_server.rules")]
    assert loaded_by(*rules).isdisjoint({"grpc", "google", "numpy", "torch", "asyncio"})


def test_the_server_loads_no_torch() -> None:
    server = [module for module in MODULES if module.startswith("ps_server")]
    assert "torch" not in loaded_by(*server)


def test_a_session_loads_no_torch() -> None:
    assert "torch" not in loaded_by("ma_client", "ma_client.session")


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


def imported_names(module: str) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def declared(module: str) -> list[str]:
    """The module's `__all__`."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def test_all_names_every_public_definition_and_only_what_there_is_sorted() -> None:
    problems = list[str]()
    for module in MODULES:
        names = declared(module)
        public = {name for name in definitions(tree_of(module).body) if not name.startswith("_")}
        problems += [f"{module}: __all__ lacks {name}" for name in sorted(public - set(names))]
        problems += [f"{module}: there is no {name}" for name in sorted(set(names) - public - imported_names(module))]
        if names != sorted(set(names)):
            problems.append(f"{module}: __all__ is not sorted, or names something twice")
    assert not problems, "\n".join(problems)


def test_no_two_classes_have_the_same_name() -> None:
    homes = defaultdict(list)
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    twice = [f"{name}: {', '.join(modules)}" for name, modules in sorted(homes.items()) if len(modules) > 1]
    assert not twice, "\n".join(twice)


# The error table.


def test_every_reason_has_its_row_in_the_table() -> None:
    assert FAULTS.keys() == set(Reason)


def test_reasons_are_those_of_the_protocol() -> None:
    ours = {REASON_PREFIX + reason.name: reason.value for reason in Reason}
    assert {**ours, "ERROR_REASON_UNSPECIFIED": 0} == dict(pb.ErrorReason.items())


def test_outcomes_are_those_of_the_protocol() -> None:
    ours = {"OUTCOME_" + outcome.name: outcome.value for outcome in Outcome}
    assert {**ours, "OUTCOME_UNSPECIFIED": 0} == dict(pb.Outcome.items())


def test_every_reason_has_a_grpc_status_and_its_own_exception() -> None:
    assert {FAULTS[reason].status for reason in Reason} <= grpc.StatusCode.__members__.keys()
    for reason in Reason:
        error = refusal(reason, "what happened")
        assert isinstance(error, ModelAverageError)
        assert (type(error), error.reason, str(error)) == (FAULTS[reason].exception, reason, "what happened")


def test_a_reason_comes_back_over_the_wire_as_the_same_exception() -> None:
    for reason in Reason:
        error = fault_named(REASON_PREFIX + reason.name, "what happened")
        assert (type(error), error and error.reason) == (FAULTS[reason].exception, reason)


def test_a_reason_that_this_version_does_not_know_is_no_exception_of_the_table() -> None:
    assert fault_named("ERROR_REASON_OF_THE_FUTURE", "") is None
    assert fault_named("", "") is None


def test_every_reason_is_raised_somewhere() -> None:
    raised = {
        node.attr
        for module in MODULES
        if module.startswith(("ps_server", "modelaverage")) and module != "modelaverage.errors"
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    }
    assert {reason.name for reason in Reason} - raised == set()


# The protocol file.


@pytest.fixture(scope="module")
def comments(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The comment of every element of the protocol file, by its full name."""
    file = tmp_path_factory.mktemp("protocol") / "set"
    protocol = ROOT / "proto" / "modelaverage" / "v1" / "parameter_server.proto"
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


def test_the_comment_of_a_reason_names_the_status_of_the_table(comments: Mapping[str, str]) -> None:
    for reason in Reason:
        words = set(re.findall(r"\w+", comments[f"ErrorReason.{REASON_PREFIX}{reason.name}"]))
        assert words & grpc.StatusCode.__members__.keys() == {FAULTS[reason].status}, reason


def test_the_errors_that_a_call_names_are_reasons(comments: Mapping[str, str]) -> None:
    for method in ("Initialize", "Pull", "PushAndAverage"):
        named = re.findall(r"[A-Z]{2,}[A-Z_]*", comments[f"ParameterServer.{method}"].partition("Errors:")[2])
        assert named
        for name in named:
            assert any(reason.name.startswith(name) for reason in Reason), f"{method} names {name}"
