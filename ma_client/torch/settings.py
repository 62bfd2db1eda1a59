"""What the constructor of `ModelAverageOptimizer` is told, checked, with gaps filled from the environment."""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass

import numpy as np

from ma_client.cluster.spec import ClusterSpec
from ma_client.job.naming import named
from ma_client.session import ParameterServerSession
from modelaverage.chosen import NOTHING_CHOSEN, Chosen
from modelaverage.outer import OuterOptimizer

__all__ = ["OptimizerSettings", "settings_of"]


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of a `ModelAverageOptimizer`; its docstring explains them."""

    num_worker: int
    is_chief: bool
    interval_steps: int
    use_locking: bool
    name: str
    chosen: Chosen = NOTHING_CHOSEN
    overlap_steps: int = 0


def settings_of(
    num_worker: object,
    is_chief: object,
    interval_steps: object,
    use_locking: bool,
    name: str,
    session: ParameterServerSession | None,
    outer_optimizer: OuterOptimizer | str | None = None,
    compression: str | None = None,
    overlap_steps: object = 0,
) -> OptimizerSettings:
    """Checks the arguments; takes ``num_worker`` and ``is_chief`` from the environment where they are None.

    Raises:
        ValueError: a number is not a whole number from 1 up (``overlap_steps``: from 0 to ``interval_steps``), or the
            session was made with another ``is_chief``.
        InvalidRequestError: OUTER_OPTIMIZER_INVALID: the text names no outer optimizer, or a wrong setting;
            CODEC_UNKNOWN: ``compression`` names no codec.
        TypeError: ``outer_optimizer`` or ``compression`` is something else.
        ClusterError: the environment does not describe the cluster.
    """
    interval_steps = _whole("interval_steps", interval_steps)
    overlap_steps = _whole("overlap_steps", overlap_steps, least=0)
    if overlap_steps > interval_steps:
        raise ValueError(
            f"overlap_steps is {overlap_steps}, and the next round begins after interval_steps {interval_steps}; give "
            "at most that"
        )
    chosen = named(outer_optimizer, compression)
    if num_worker is None or is_chief is None:
        cluster = ClusterSpec.from_env()
        num_worker = cluster.num_workers if num_worker is None else num_worker
        is_chief = cluster.is_chief if is_chief is None else is_chief
    num_worker = _whole("num_worker", num_worker)
    if session is not None and session.is_chief != is_chief:
        raise ValueError(f"is_chief is {is_chief}, but the session was made with is_chief={session.is_chief}")
    return OptimizerSettings(num_worker, bool(is_chief), interval_steps, use_locking, name, chosen, overlap_steps)


def _whole(name: str, value: object, least: int = 1) -> int:
    """A number from ``least`` on, of any integer type. Raises ValueError."""
    number: int | None = None
    if not isinstance(value, (bool, np.bool_)):
        with contextlib.suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
    if number is None or number < least:
        raise ValueError(f"{name} {value} is not a whole number from {least} up")
    return number
