"""A worker's rounds with the parameter server and with gloo in turns, so that both meet the same machine.

A measured round begins when all workers stand at a gloo barrier and ends, for a worker, when it has the average; gloo's
is an all-reduce, then a division. Every element of every result is checked.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.hosts import INTERFACE
from modelaverage.outer import AVERAGE, OuterOptimizer

if TYPE_CHECKING:
    import torch

    from ma_client import ParameterServerSession

__all__ = ["WARM_UPS", "Turns", "link_bytes", "over_workers", "take_turns", "tolerance_of", "values_of"]

WARM_UPS = 2
# The error of both ways together, as a part of the largest difference between two workers' values.
_ERRORS = {"none": 0.0, "bfloat16": 1 / 64, "int8": 1 / 127, "int4": 1 / 7}


@dataclass(frozen=True)
class Turns:
    """One kind of a worker's rounds: the seconds of each, and the processor seconds that the whole machine, kernel
    included, spent meanwhile."""

    round_s: list[float] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    link_bytes: list[float] = field(default_factory=list)
    """What the kernel counted on this host's link meanwhile, in both directions together, headers included."""

    @contextmanager
    def turn(self, repeat: int) -> Iterator[None]:
        """Times the body of the context, which makes ``repeat`` rounds."""
        busy_before_s, bytes_before, began = _busy_s(), link_bytes(), time.perf_counter()
        yield
        self.round_s.append((time.perf_counter() - began) / repeat)
        self.busy_s.append((_busy_s() - busy_before_s) / repeat)
        self.link_bytes.append((link_bytes() - bytes_before) / repeat)

    @property
    def busy(self) -> float:
        """The share of the time that the processors were busy."""
        return sum(self.busy_s) / (sum(self.round_s) * (os.cpu_count() or 1))

    def after_warm_ups(self) -> Turns:
        """The time that counts."""
        return Turns(self.round_s[WARM_UPS:], self.busy_s[WARM_UPS:], self.link_bytes[WARM_UPS:])


def values_of(rank: int, workers: int, parameters: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A worker's values, and the average of all workers'."""
    values = np.arange(parameters, dtype=np.float32) % 1024
    return values + np.float32(rank), values + np.float32((workers - 1) / 2)


def tolerance_of(compression: str, workers: int) -> float:
    """How far an element of the center may be from the average of `values_of`."""
    return _ERRORS[compression] * (workers - 1)


def take_turns(
    session: ParameterServerSession,
    local: NDArray[np.float32],
    mean: NDArray[np.float32],
    reduced: torch.Tensor,
    rounds: int,
    outer: OuterOptimizer = AVERAGE,
    center: NDArray[np.float32] | None = None,
    tolerance: float = 0.0,
    with_gloo: bool = True,
) -> tuple[Turns, Turns]:
    """All of a worker's rounds, with the server and (``with_gloo``) with gloo, which works in the memory of
    ``reduced``.

    With an outer optimizer, every result is compared with its steps from ``center`` on, the first center. An element of
    a result may differ from what it should be by ``tolerance``.
    """
    import torch
    import torch.distributed as dist

    ours, gloo = Turns(), Turns()
    # Rounds of a tiny model are timed many at a time: a barrier's own jitter is longer than one of them.
    repeat = max(1, 50_000 // local.size)
    expected = mean if center is None else center
    state = outer.init(expected)
    for number in range(WARM_UPS + rounds):
        dist.barrier()
        with ours.turn(repeat):
            for _ in range(repeat):
                result = session.push_and_average({"x": local}, copy=False)
        for step in range(number * repeat, (number + 1) * repeat):
            expected, state = outer.update(expected, mean, state, step)
        wrong_by = _largest_difference(result.center["x"], expected)
        assert wrong_by <= tolerance, f"round {number} is wrong by {wrong_by:g}"
        if not with_gloo:
            continue
        reduced.copy_(torch.from_numpy(local))
        dist.barrier()
        with gloo.turn(repeat):
            for _ in range(repeat):
                dist.all_reduce(reduced)
                reduced.div_(dist.get_world_size())
        assert repeat > 1 or np.array_equal(reduced.numpy(), mean), f"gloo's round {number} is wrong"
    return ours.after_warm_ups(), gloo.after_warm_ups()


def _largest_difference(found: NDArray[np.generic], expected: NDArray[np.float32]) -> float:
    if np.array_equal(found, expected):
        return 0.0
    return float(np.abs(found.astype(np.float32) - expected).max())


def over_workers(turns: Sequence[Turns]) -> tuple[float, float]:
    """The seconds of the slowest worker in each turn: their median, and (largest - smallest) / median."""
    slowest = [max(times) for times in zip(*(one.round_s for one in turns), strict=True)]
    median = statistics.median(slowest)
    return median, (max(slowest) - min(slowest)) / median


def link_bytes() -> int:
    """Bytes received and sent at the link of this host, a network namespace; 0 without one."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.strip().partition(":")
        if name == INTERFACE:
            fields = counts.split()
            return int(fields[0]) + int(fields[8])
    return 0


def _busy_s() -> float:
    """Seconds that this machine's processors have worked since it started, summed over the processors."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
