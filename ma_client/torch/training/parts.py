"""What a worker's training is put together from."""

from __future__ import annotations

from dataclasses import dataclass

from ma_client.session import ParameterServerSession
from ma_client.torch.local_variables import LocalVariables
from ma_client.torch.nonfinite import NonfiniteGuard
from ma_client.torch.progress import Progress
from ma_client.torch.replica import Replica
from ma_client.torch.rounds import Rounds
from ma_client.torch.schedules import schedule_for
from ma_client.torch.session_holder import SessionHolder
from ma_client.torch.settings import OptimizerSettings
from ma_client.torch.shown_step import ShownGlobalStep
from ma_client.torch.training.solo import SoloTraining
from ma_client.torch.weighing import Weighing

__all__ = ["WorkerParts", "solo_training"]


@dataclass(frozen=True)
class WorkerParts:
    """What one process has of its worker.

    Args:
        settings: of the optimizer.
        variables: the model's center variables.
        progress: its count of steps.
        weighing: asks for the weight of contributions.
        guard: looks for values that are not finite.
        shown: a caller's tensor that shows `global_step`.
    """

    settings: OptimizerSettings
    variables: LocalVariables
    progress: Progress
    weighing: Weighing
    guard: NonfiniteGuard
    shown: ShownGlobalStep


def solo_training(parts: WorkerParts, session: ParameterServerSession | None) -> SoloTraining:
    """The training of the process that makes a worker's rounds.

    Args:
        parts: of the worker.
        session: the user's; None: one is made from what the environment says.

    Raises:
        ClusterError: the environment does not describe the cluster.
    """
    settings = parts.settings
    holder = SessionHolder(session, settings.is_chief)
    replica = Replica(holder, parts.variables, parts.progress, settings.num_worker, parts.shown.show, settings.chosen)
    rounds = Rounds(replica, settings.interval_steps, parts.weighing, parts.guard)
    return SoloTraining(replica, rounds, schedule_for(settings, rounds), settings.is_chief)
