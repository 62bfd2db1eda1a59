"""The server of a played job, and what goes to it and comes from it. The arithmetic is `ps_server.center`'s, the codecs
are the system's, so a play gives the bits of a job over the network whose pushes arrive in the order of the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import RAW, Codec
from modelaverage.manifest import Manifest, Variable, dtype_name
from modelaverage.outer import AVERAGE, OuterOptimizer, text_of
from ps_server.center.center import Center, Finish
from ps_server.center.sums import Contribution

__all__ = ["PlayedServer", "RoundBytes", "Variables"]

Variables = Mapping[str, NDArray[np.generic]]
"""A worker's local variables, by name: C-contiguous arrays of the manifest's shapes and dtypes."""


@dataclass(frozen=True)
class RoundBytes:
    """The encoded values of one worker in one round, without headers.

    Args:
        up: of its push.
        down: of the next center.
    """

    up: int
    down: int


class PlayedServer:
    """One server that every worker pushes to in every round.

    Args:
        initial: the first center.
        outers: those that will turn center and average into the next center, the first one first. Those with state have
            the same state.
        codec: of every push, and of every center after the first.

    Raises:
        ValueError: one cannot go on with another's state.

    Attributes:
        manifest: one shard, fragments of the default size.
        rounds: how many are done.
    """

    def __init__(self, initial: Variables, outers: Sequence[OuterOptimizer], codec: Codec) -> None:
        self.manifest = Manifest(
            tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in initial.items())
        )
        self.rounds = 0
        self._center = Center(self.manifest, outer=_with_state_of_all(outers), codec=codec)
        values = _bytes_of(initial)
        for index in range(self.manifest.fragment_count):
            self._center.load(index, memoryview(b"".join(RAW.encode_variables(self.manifest, index, values))))
        # What every worker has: the center that it pulled, and later what it makes of what the server sends.
        self._staging = self._center.current.flat.copy()
        self.use(outers[0])

    def use(self, outer: OuterOptimizer) -> None:
        """The next rounds have this outer optimizer, one of those named before; momentum is kept, also by rounds that
        only average."""
        self._center.outer = outer

    def round(self, workers: Sequence[Variables]) -> RoundBytes:
        """Averages the workers' variables as a committed round would, and installs the next center in them.

        Args:
            workers: the local variables of each; written to.

        Returns:
            The bytes of one worker; all have the same.
        """
        manifest, center, codec = self.manifest, self._center, self._center.codec
        up = down = 0
        for number, local in enumerate(workers):
            values, up = _bytes_of(local), 0
            for index in range(manifest.fragment_count):
                pushed = b"".join(codec.encode_variables(manifest, index, values, self._staging))
                up += len(pushed)
                contribution = Contribution(f"worker-{number}", 1.0, memoryview(pushed), codec)
                center.accumulate(index, contribution, first=number == 0)
        center.finish([Finish(index, float(len(workers))) for index in range(manifest.fragment_count)], self.rounds)
        for index in range(manifest.fragment_count):
            sent = b"".join(center.next.encoded(codec, index, index + 1))
            down += len(sent)
            codec.decode_into(manifest, self._staging, index, memoryview(sent), self._staging)
        center.commit(center.room(0.0), lambda: None)
        self.rounds += 1
        arrived = manifest.arrays(self._staging)
        for local in workers:
            for name, array in local.items():
                array[...] = arrived[name]
        return RoundBytes(up, down)

    @property
    def center(self) -> NDArray[np.uint8]:
        """The current center as the server has it, a flat buffer."""
        return self._center.current.flat


def _with_state_of_all(outers: Sequence[OuterOptimizer]) -> OuterOptimizer:
    """That for which a center has the state of all."""
    fullest = max(outers, key=lambda outer: len(outer.slots))
    for outer in outers:
        if outer != AVERAGE and outer.slots != fullest.slots:
            raise ValueError(
                f"{text_of(outer)} cannot take turns with {text_of(fullest)}, whose state it would not keep; take the "
                "average, or one with a momentum as well"
            )
    return fullest


def _bytes_of(variables: Variables) -> list[memoryview]:
    return [array.reshape(-1).view(np.uint8).data for array in variables.values()]
