"""The conformance kit: the Python client passes every case, and a client that is broken on purpose does not."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modelaverage.conformance import lines
from modelaverage.conformance.__main__ import main
from modelaverage.conformance.cases import CASES
from modelaverage.conformance.miss import Miss
from modelaverage.conformance.models import mixed
from modelaverage.conformance.program import Program
from tests.broken_client import FAULTS, answers_twice, does_not_try_again, sorts_the_variables
from tests.long_plays import long_except

ROOT = Path(__file__).parents[1]
PYTHON_CLIENT = [sys.executable, "examples/clients/python/client.py", "conform"]
TIMEOUT_S = 300


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def result_of(table: str, name: str) -> str:
    """The table's line for a case."""
    return next(line for line in table.splitlines() if line.startswith(f"{name} ")).split()[-1]


@pytest.mark.parametrize("one_in", long_except([24], [24, 1]))
def test_the_python_client_passes_every_case(one_in: int) -> None:
    names = [case.name for case in CASES[::one_in]]
    only = [word for name in names for word in ("--only", name)] if one_in > 1 else []
    command = [sys.executable, "-m", "modelaverage.conformance", *only, *PYTHON_CLIENT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout
    assert {result_of(done.stdout, name) for name in names} == {"passed"}
    assert len(done.stderr.splitlines()) == len(names)


QUICK_FAULTS = [item for item in FAULTS.items() if item[0] in (does_not_try_again, sorts_the_variables, answers_twice)]


@pytest.mark.parametrize(
    ("fault", "case"), long_except(QUICK_FAULTS, FAULTS.items()), ids=[fault.__name__ for fault in FAULTS]
)
def test_a_client_that_is_broken_misses(
    fault: Callable[[], None], case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--only", case, sys.executable, "-m", "tests.broken_client", fault.__name__])
    printed = capsys.readouterr().out
    assert code == 1
    assert result_of(printed, case) == "missed"
    assert "the case runs to its end" not in printed
    assert "1 cases, 0 passed, 1 missed" in printed


def test_a_program_that_ends_at_once_misses_and_its_last_words_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--only", "a_server_that_stops_says_so", sys.executable, "-c", "raise SystemExit('no such luck')"])
    assert code == 1
    assert "a, stderr: no such luck" in capsys.readouterr().out


def test_a_program_that_does_not_exit_with_0_misses(capsys: pytest.CaptureFixture[str]) -> None:
    says = "import sys; [print('ok stopping 7', flush=True) for _ in sys.stdin]; sys.exit(3)"
    assert main(["--only", "a_server_that_stops_says_so", sys.executable, "-c", says]) == 1
    assert "expected: a exits with 0" in capsys.readouterr().out


def test_an_answer_that_nobody_waited_for_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelaverage.conformance.stage._WAIT_S", 1.0)
    says = (
        "import sys\n"
        "for line in sys.stdin: print('error CLIENT no' if 'push' in line else 'ok 0 77:f32:0:-', flush=True)"
    )
    assert main(["--only", "a_worker_id_in_use_is_tried_again", sys.executable, "-c", says]) == 1
    printed = capsys.readouterr().out
    assert "expected: the case runs to its end" in printed
    assert "a, answer: error CLIENT no" in printed


def test_the_list_names_every_case_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [case.name for case in CASES]
    assert len(set(names)) == len(names) > 70


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the COMMAND"),
        (["no-such-program"], "no program 'no-such-program'"),
        (["--only", "no_such_case", sys.executable], "no case 'no_such_case'"),
        (["--jobs", "0", sys.executable], "'0' is not a whole number from 1 up"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# The lines.


def test_variables_come_back_from_their_line_as_they_were() -> None:
    words = lines.initialize_line(mixed(), 7, 64).split(" ")
    assert words[:3] == ["initialize", "7", "64"]
    pulled = lines.read_pulled(" ".join(["ok", "7", *words[3:]]))
    assert isinstance(pulled, lines.Pulled)
    assert pulled.global_step == 7
    assert lines.same(pulled.center, mixed())


def test_the_example_of_the_page_is_read_as_the_page_says() -> None:
    pulled = lines.read_pulled("ok 7 77:f32:2:0000803f000000c0")
    assert isinstance(pulled, lines.Pulled)
    assert lines.same(pulled.center, {"w": np.array([1, -2], np.float32)})


@pytest.mark.parametrize(
    "line",
    [
        "",
        "yes",
        "ok",
        "ok seven",
        "ok -1",
        "ok 7 ",
        "ok 7 77:f32:2:0000803f",
        "ok 7 77:f32:2",
        "ok 7 77:i32:1:00000000",
        "ok 7 7g:f32:1:00000000",
        "ok 7 ff:f32:1:00000000",
        "ok 7 77:f32:1:00000000 77:f32:1:00000000",
        "error",
        "error ",
    ],
)
def test_a_line_that_is_no_answer_is_a_miss(line: str) -> None:
    with pytest.raises(Miss):
        lines.read_pulled(line)


@pytest.mark.parametrize("line", ["ok done 1 a", "ok committed 1", "ok committed x a", "ok committed 1  "])
def test_an_unknown_outcome_of_a_push_is_a_miss(line: str) -> None:
    with pytest.raises(Miss):
        lines.read_pushed(line)


def test_every_wait_for_a_program_that_has_ended_says_so_at_once() -> None:
    program = Program([sys.executable, "-c", ""], "an address", "a")
    for _ in range(2):
        with pytest.raises(Miss, match="the end of its output"):
            program.answer()


def test_a_command_to_a_program_that_has_ended_is_no_error_in_the_kit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = list[threading.ExceptHookArgs]()
    monkeypatch.setattr(threading, "excepthook", failures.append)
    before = set(threading.enumerate())
    program = Program([sys.executable, "-c", ""], "an address", "a")
    threads = set(threading.enumerate()) - before
    with pytest.raises(Miss, match="the end of its output"):
        program.answer()
    program._process.wait()
    program.send("pull")
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert failures == []
