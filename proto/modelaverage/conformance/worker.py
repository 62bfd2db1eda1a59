"""A client program as a case uses it: the commands it gets, and the answers it has to give."""

from __future__ import annotations

from typing import TypeVar

from modelaverage.conformance import lines
from modelaverage.conformance.lines import Arrays, Failed, Initialized, Pulled, Pushed, Status
from modelaverage.conformance.miss import Miss, check, short
from modelaverage.conformance.program import ANSWER_TIMEOUT_S, Program

__all__ = ["Worker", "check_center", "check_pushed"]

_A = TypeVar("_A")


class Worker(Program):
    """A client program, driven by the line protocol. Every method raises Miss if the program answers anything else."""

    def initialize(self, arrays: Arrays, global_step: int = 0, fragment_size_bytes: int = 64) -> Initialized:
        """Tells it to set the center."""
        self.send(lines.initialize_line(arrays, global_step, fragment_size_bytes))
        return _ok(lines.read_initialized(self.answer()))

    def pull(self, wait: bool = False) -> Pulled:
        """Tells it to pull."""
        self.begin_pull(wait)
        return self.pulled()

    def begin_pull(self, wait: bool = False) -> None:
        """Tells it to pull; `pulled` reads the answer."""
        self.send("pull wait" if wait else "pull now")

    def pulled(self) -> Pulled:
        """Waits for the answer to the pull."""
        return _ok(lines.read_pulled(self.answer()))

    def push(self, arrays: Arrays) -> Pushed:
        """Tells it to push, and waits for the end of the round."""
        self.begin_push(arrays)
        return self.pushed()

    def begin_push(self, arrays: Arrays) -> None:
        """Tells it to push; `pushed` reads the answer."""
        self.send(lines.push_line(arrays))

    def pushed(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Pushed:
        """Waits for the answer to the push."""
        return _ok(lines.read_pushed(self.answer(timeout_s)))

    def status(self) -> Status:
        """Tells it to ask for the status."""
        self.send("status")
        return _ok(lines.read_status(self.answer()))

    def leave(self) -> None:
        """Tells it to call Leave."""
        self._say_goodbye("leave")

    def finish(self) -> None:
        """Tells it to call Leave with `finished`."""
        self._say_goodbye("finish")

    def _say_goodbye(self, command: str) -> None:
        self.send(command)
        left = lines.read_left(self.answer())
        if left is not None:
            raise Miss("ok", f"error {left.name} {short(left.message)}")

    def fails(self, name: str, timeout_s: float = ANSWER_TIMEOUT_S, what: str = "") -> None:
        """Raises Miss unless the last command fails with this name. ``what`` tells several commands of a case apart."""
        line = self.answer(timeout_s)
        if line.split(" ")[:2] != ["error", name]:
            raise Miss(f"error {name}{what and f' ({what})'}", short(line))


def check_center(came: Arrays, expected: Arrays) -> None:
    """Raises Miss unless names, their order, types, shapes and all bits are the same."""
    if not lines.same(came, expected):
        raise Miss(f"center {short(lines.describe(expected))}", short(lines.describe(came)))


def check_pushed(came: Pushed, outcome: str, global_step: int, contributors: str, center: Arrays) -> None:
    """Raises Miss unless a push ended like this; contributors are separated by spaces."""
    check("outcome", came.outcome, outcome)
    check("global_step", came.global_step, global_step)
    check("contributors", came.contributors, tuple(contributors.split()))
    check_center(came.center, center)


def _ok(answer: _A | Failed) -> _A:
    if isinstance(answer, Failed):
        raise Miss("ok ...", f"error {answer.name} {short(answer.message)}")
    return answer
