"""The server of a played job, and what goes to it and comes from it. The arithmetic is `ps_server.center`'s, the codecs
are the system's, so a play gives the bits of a job over the network whose pushes arrive in the order of the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import RAW, Codec
from modelaverage.manifest import Manifest, Variable, dtype_name
from modelaverage.outer import OuterOptimizer
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
        outer: turns center and average into the next center.
        codec: of every push, and of every center after the first.

    Attributes:
        manifest: one shard, fragments of the default size.
        rounds: how many are done.
    """

    def __init__(self, initial: Variables, outer: OuterOptimizer, codec: Codec) -> None:
        self.manifest = Manifest(
            tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in initial.items())
        )
        self.rounds = 0
        self._center = Center(self.manifest, outer=outer, codec=codec)
        values = _bytes_of(initial)
        for index in range(self.manifest.fragment_count):
            self._center.load(index, memoryview(b"".join(RAW.encode_variables(self.manifest, index, values))))
        # What every worker has: the center that it pulled, and later what it makes of what the server sends.
        self._staging = self._center.current.flat.copy()

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


def _bytes_of(variables: Variables) -> list[memoryview]:
    return [array.reshape(-1).view(np.uint8).data for array in variables.values()]
