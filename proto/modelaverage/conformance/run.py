"""Plays cases, several at a time, and notes how each ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from modelaverage.conformance.case import Case
from modelaverage.conformance.miss import Miss, short
from modelaverage.conformance.stage import Stage

__all__ = ["Result", "run"]


@dataclass(frozen=True)
class Result:
    """How a case ended.

    Args:
        name: of the case.
        took_s: how long it took.
        miss: what the client did wrong; None: it passed.
    """

    name: str
    took_s: float
    miss: Miss | None


def run(cases: Sequence[Case], command: Sequence[str], jobs: int, tell: Callable[[Result], None]) -> list[Result]:
    """Plays the cases; the results are in their order.

    Args:
        cases: what to play.
        command: the words of the client program's COMMAND.
        jobs: how many to play at the same time, besides those that mostly wait.
        tell: called with every result as soon as there is one.
    """
    slow = [case for case in cases if case.slow]
    with ThreadPoolExecutor(max(1, len(slow))) as waiting, ThreadPoolExecutor(jobs) as working:
        futures: dict[Case, Future[Result]] = {case: waiting.submit(_play, case, command) for case in slow}
        futures |= {case: working.submit(_play, case, command) for case in cases if not case.slow}
        try:
            for future in as_completed(futures.values()):
                tell(future.result())
        except KeyboardInterrupt:
            for future in futures.values():
                future.cancel()
            raise
    return [futures[case].result() for case in cases]


def _play(case: Case, command: Sequence[str]) -> Result:
    began_s = time.monotonic()
    miss = None
    try:
        with Stage(command) as stage:
            _play_on(stage, case)
    except Miss as error:
        miss = error
    return Result(case.name, time.monotonic() - began_s, miss)


def _play_on(stage: Stage, case: Case) -> None:
    try:
        case.play(stage)
    except Miss:
        raise
    except Exception as error:  # a wait timed out, or a call of the kit itself failed: show what the clients printed
        came = f"{type(error).__name__}: {short(error)}{stage.last_words()}"
        raise Miss("the case runs to its end", came) from error
