"""The settings of the built-in workload. Does not need torch, because the launcher reads the same flags."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from modelaverage.chosen import COMPRESSIONS, NO_COMPRESSION, codec_of, compression_of
from modelaverage.commands import flag_types
from modelaverage.outer import outer_optimizer, text_of

__all__ = ["ALONE", "ALONE_WITH_ALL", "DigitsConfig", "LONE", "MODULES", "PLAIN", "add_training_flags"]

ALONE = "alone"
"""The name of a worker that trains without a server on worker 0's share of the images."""
ALONE_WITH_ALL = "alone-with-all"
"""The name of a worker that trains without a server on all images."""
PLAIN = "plain"
"""The name under which plain averages of all workers are shown, played in one process beside an outer optimizer or
compression."""
LONE = (PLAIN, ALONE, ALONE_WITH_ALL)
"""What the workers are compared with."""

MODULES = ("torch", "sklearn", "safetensors")
"""The packages that training needs and a plain installation does not have."""


@dataclass(frozen=True)
class DigitsConfig:
    """How to train.

    Args:
        steps: local steps of each worker; a multiple of ``interval_steps``, so that training ends with a round.
        interval_steps: local steps from one round to the next.
        batch_size: images in a step of one worker.
        learning_rate: SGD's.
        momentum: SGD's; at least 0 and below 1.
        seed: for the initial values and the order of the images.
        outer: text of the outer optimizer, which makes the next center of the average of a round.
        compression: how the models are encoded on the wire; "none": as they are.

    Raises:
        ValueError: ``steps`` is not a multiple of ``interval_steps``.
    """

    steps: int = 1200
    interval_steps: int = 100
    batch_size: int = 32
    learning_rate: float = 0.06
    momentum: float = 0.9
    seed: int = 3
    outer: str = "sgd:lr=0.5,momentum=0.5,nesterov"
    compression: str = NO_COMPRESSION

    def __post_init__(self) -> None:
        if self.steps % self.interval_steps:
            raise ValueError(
                f"--steps {self.steps} is not a multiple of --interval-steps {self.interval_steps}: "
                "the last steps would not come into the center"
            )

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace) -> DigitsConfig:
        """From what `add_training_flags` added. Raises ValueError as the constructor does."""
        return cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})

    def to_argv(self) -> list[str]:
        """The flags that give this configuration."""
        return [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in self.__dataclass_fields__]


def _outer(text: str) -> str:
    """An outer optimizer, as text with all its settings."""
    try:
        return text_of(outer_optimizer(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _compression(text: str) -> str:
    """People's name of a compression."""
    try:
        return compression_of(codec_of(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `DigitsConfig.from_flags` reads."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps",
        type=flag_types.count,
        default=DigitsConfig.steps,
        metavar="N",
        help="local steps of each worker, a multiple of --interval-steps (%(default)s)",
    )
    group.add_argument(
        "--interval-steps",
        type=flag_types.count,
        default=DigitsConfig.interval_steps,
        metavar="N",
        help="local steps from one averaging round to the next (%(default)s)",
    )
    group.add_argument(
        "--batch-size",
        type=flag_types.count,
        default=DigitsConfig.batch_size,
        metavar="N",
        help="images in one step of one worker (%(default)s)",
    )
    group.add_argument(
        "--learning-rate",
        type=flag_types.positive,
        default=DigitsConfig.learning_rate,
        metavar="X",
        help="of SGD (%(default)s)",
    )
    group.add_argument(
        "--momentum",
        type=flag_types.fraction,
        default=DigitsConfig.momentum,
        metavar="X",
        help="of SGD, from 0, below 1 (%(default)s)",
    )
    group.add_argument(
        "--seed",
        type=flag_types.whole,
        default=DigitsConfig.seed,
        metavar="N",
        help="of the initial values and of the order of the images (%(default)s)",
    )
    group.add_argument(
        "--outer",
        type=_outer,
        default=DigitsConfig.outer,
        metavar="TEXT",
        help="outer optimizer, which turns center and average into the next center: average (the average itself), "
        "sgd:lr=0.7,momentum=0.9,nesterov (DiLoCo), sgd:lr=1.0,momentum=0.5 (SlowMo), adam:lr=0.01 (FedAdam) "
        "(%(default)s)",
    )
    group.add_argument(
        "--compression",
        type=_compression,
        default=DigitsConfig.compression,
        metavar="NAME",
        help=f"how the models are encoded on the wire: {', '.join(COMPRESSIONS)} (%(default)s)",
    )
