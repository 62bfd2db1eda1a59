"""Observes the answers to processes that ask for a task index, and checks them."""

from __future__ import annotations

from dataclasses import dataclass

from fuzz.context import ClientCall, Failure
from fuzz.corpus import INCARNATIONS
from fuzz.world import World
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.task_indexes import DEFAULT_REJOIN_TIMEOUT_S

__all__ = ["PROCESSES", "Joins"]

PROCESSES = (*INCARNATIONS, b"\x01" * 16, b"\x02" * 16)
# This close to the end of the grace period, either result is right.
_ABOUT_S = 0.01


@dataclass
class _Asked:
    """One call.

    Attributes:
        heard: how many of its messages have been checked.
        told: the index that the process was told.
    """

    process: bytes
    wanted: int | None
    heard: int = 0
    told: int | None = None


class Joins:
    """All calls of Join at one server.

    Args:
        world: the server.
        num_workers: how many indexes there are.
    """

    def __init__(self, world: World, num_workers: int) -> None:
        self._world = world
        self._num_workers = num_workers
        self._calls: dict[ClientCall, _Asked] = {}
        self._latest: dict[bytes, ClientCall] = {}
        self._held: dict[bytes, int] = {}  # by process: its index, while its call is open
        self._kept: dict[bytes, tuple[int, float]] = {}  # and since when its call has ended without a goodbye
        self._unsure_until_s = 0.0

    def asked(self, call: ClientCall, process: bytes, wanted: int | None) -> None:
        """Records that a process calls."""
        self._calls[call] = _Asked(process, wanted)
        if len(process) == len(INCARNATIONS[0]) and (wanted is None or wanted < self._num_workers):
            self._latest[process] = call

    def left(self, process: bytes) -> None:
        """Records that a process says goodbye."""
        self._held.pop(process, None)
        self._kept.pop(process, None)

    def check(self) -> None:
        """Raises Failure if two processes have the same index, or one waits while an index is free."""
        now_s = self._world.loop.time()
        for call, asked in list(self._calls.items()):
            self._hear(call, asked, now_s)
            if call.done:
                self._ended(call, now_s)
        if now_s > self._unsure_until_s and all(call.context.reads for call in self._calls):
            for asked in self._calls.values():
                self._check_waits_rightly(asked, now_s)

    def _hear(self, call: ClientCall, asked: _Asked, now_s: float) -> None:
        for data in call.context.written[asked.heard :]:
            message = pb.JoinResponse.FromString(data)
            asked.heard += 1
            if asked.told is not None or message.num_workers != self._num_workers or asked.heard > 2:
                raise Failure(f"message {asked.heard} of a Join is {message}, after the index {asked.told}")
            if not message.HasField("task_index"):
                if asked.heard > 1:
                    raise Failure("a process is told twice that it has to wait")
                continue
            self._told(asked, message.task_index, now_s)

    def _told(self, asked: _Asked, index: int, now_s: float) -> None:
        asked.told = index
        own, since_s = self._kept.pop(asked.process, (self._held.get(asked.process), now_s))
        if now_s > self._unsure_until_s:
            if own not in (None, index) and now_s < since_s + DEFAULT_REJOIN_TIMEOUT_S - _ABOUT_S:
                raise Failure(f"a process that has the index {own} is told {index}")
            if own is None and asked.wanted not in (None, index):
                raise Failure(f"a process that wants the index {asked.wanted} is told {index}")
        if index >= self._num_workers or index in self._certainly_taken(now_s, but=asked.process):
            raise Failure(f"a process is told the index {index}, which is taken or none")
        self._held[asked.process] = index

    def _ended(self, call: ClientCall, now_s: float) -> None:
        asked = self._calls.pop(call)
        if self._latest.get(asked.process) is not call:
            return
        del self._latest[asked.process]
        index = self._held.pop(asked.process, None)
        if not call.context.reads:  # it may have been given an index without learning it, and have ended a while ago
            self._unsure_until_s = now_s + DEFAULT_REJOIN_TIMEOUT_S + _ABOUT_S
        elif index is not None:
            self._kept[asked.process] = index, now_s

    def _certainly_taken(self, now_s: float, but: bytes) -> set[int]:
        timeout_s = DEFAULT_REJOIN_TIMEOUT_S - _ABOUT_S
        kept = {process: index for process, (index, since_s) in self._kept.items() if now_s < since_s + timeout_s}
        return {index for process, index in (self._held | kept).items() if process != but}

    def _check_waits_rightly(self, asked: _Asked, now_s: float) -> None:
        timeout_s = DEFAULT_REJOIN_TIMEOUT_S + _ABOUT_S
        kept = [index for index, since_s in self._kept.values() if now_s < since_s + timeout_s]
        taken = {*self._held.values(), *kept}
        if asked.told is None and (
            len(taken) < self._num_workers if asked.wanted is None else asked.wanted not in taken
        ):
            raise Failure(f"a process waits for the index {asked.wanted}, and of {self._num_workers} {taken} are taken")
