"""The plays, and what every client must get in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modelaverage.codecs import RAW, Codec
from modelaverage.codecs.int8 import INT8
from modelaverage.manifest import Manifest, Variable
from modelaverage.outer import AVERAGE, OuterOptimizer, OuterSGD
from ps_server.rules.policy import RoundPolicy
from tests.outer_oracles import formula

__all__ = ["CODED_MANIFEST", "INITIAL", "MANIFEST", "PLAYS", "ROUNDS", "Kind", "Result", "Wrong", "value_of"]

MANIFEST = Manifest(
    (Variable("a", "float32", (5,)), Variable("b", "float16", (3,)), Variable("c", "float32", (9,))), 16
)
CODED_MANIFEST = Manifest((Variable("a", "float32", (1100,)), Variable("c", "float32", (9,))), 2048)
ROUNDS = 4
INITIAL = -1.0
# All changes of a round are the same, so they are multiples of the scale, but for its rounding.
_NEAR = 1e-4


class Wrong(Exception):  # noqa: N818  # what this test looks for
    """A client got a value that is not the center, or a call does not end."""


@dataclass(frozen=True)
class Kind:
    """What happens in a play.

    Args:
        ways: how each worker's bytes travel: inline, follows, half (duplex), shared, data.
        policy: whom rounds wait for.
        keeps: whether there are checkpoints.
        readers: whether a reader pulls in every round, and reads nothing until the end.
        breaks: whether in each round a third worker begins a push and disappears in the middle.
        outer: the outer optimizer that the chief names.
        codec: the compression that the chief names. Worker 0 pushes in it, the others raw.
    """

    ways: tuple[str, ...]
    policy: RoundPolicy = field(default_factory=lambda: RoundPolicy.strict(2))
    keeps: bool = False
    readers: bool = False
    breaks: bool = False
    outer: OuterOptimizer = AVERAGE
    codec: Codec = RAW

    @property
    def manifest(self) -> Manifest:
        """Of the center."""
        return MANIFEST if self.codec is RAW else CODED_MANIFEST

    def center_of(self, step: int) -> float:
        """What the center has everywhere at a step. All values are exact in float16."""
        center = np.full(1, INITIAL, np.float32)
        state = {slot: np.zeros_like(center) for slot in self.outer.slots}
        for base_step in range(step):
            average = np.full(1, 10.0 * base_step + 2.0, np.float32)
            # By the formula: the optimizer's own calls may be refused here, too.
            center, state = (average, {}) if self.outer == AVERAGE else formula(self.outer, center, average, state)
        return float(center[0])

    def flat(self, value: float) -> bytes:
        """The flat buffer of a model that has this value everywhere."""
        buffer = np.zeros(self.manifest.buffer_size_bytes, np.uint8)
        for array in self.manifest.arrays(buffer).values():
            array[...] = value
        return buffer.tobytes()

    def check(self, what: str, step: int, flat: bytes | bytearray | memoryview) -> None:
        """Raises Wrong unless these bytes are the center of this step."""
        expected = self.center_of(step)
        for name, array in self.manifest.arrays(np.frombuffer(bytes(flat), np.uint8)).items():
            if not (np.abs(array.astype(np.float64) - expected) <= _NEAR * (self.codec is not RAW)).all():
                raise Wrong(f"{what}: {name} is {array.tolist()} at step {step}, where {expected} belongs")


PLAYS = {
    "messages": Kind(("inline", "follows"), readers=True),
    "half-duplex": Kind(("half", "inline")),
    "shared memory": Kind(("shared", "shared"), readers=True),
    "data connections": Kind(("data", "data")),
    "quorum": Kind(("inline", "shared"), RoundPolicy(3, 2, 3, grace_s=0.01), breaks=True),
    "checkpoints": Kind(("follows", "shared"), keeps=True),
    "outer optimizer": Kind(("follows", "shared"), keeps=True, outer=OuterSGD(0.5, 0.5)),
    "compression": Kind(("inline", "shared"), keeps=True, codec=INT8),
}


@dataclass
class Result:
    """How a play went.

    Args:
        died: how often the server ended its process and was restarted.
        retries: calls that were refused, or failed, and were repeated.
        took_s: seconds.
        started: False if the server said at once that it could not start.
    """

    died: int = 0
    retries: int = 0
    took_s: float = 0.0
    started: bool = True


def value_of(worker: int, step: int) -> float:
    """What a worker pushes from a base step."""
    return 10.0 * step + 2.0 * worker + 1.0
