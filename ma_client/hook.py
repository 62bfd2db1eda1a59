"""The start of training: the chief initializes the center, everyone pulls it. After the original's hook."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ma_client.optimizer import ModelAverageOptimizer

__all__ = ["ModelAverageHook"]


class ModelAverageHook:
    """What `ModelAverageOptimizer.make_session_run_hook` returns; a context manager around the training loop.

    The methods are those of TensorFlow 1.15's ``SessionRunHook``, for training loops that call hooks; their arguments
    are accepted and not used.
    """

    def __init__(self, optimizer: ModelAverageOptimizer) -> None:
        self._optimizer = optimizer

    def begin(self) -> None:
        """Before training. Nothing is to be built."""

    def after_create_session(self, session: object = None, coord: object = None) -> None:  # noqa: ARG002
        """The chief initializes the center if nobody has; then everyone makes the local variables equal to it."""
        self._optimizer.initialize_center()
        self._optimizer.get_init_op()()

    def before_run(self, run_context: object = None) -> None:
        """Before a step."""

    def after_run(self, run_context: object = None, run_values: object = None) -> None:
        """After a step."""

    def end(self, session: object = None) -> None:  # noqa: ARG002
        """After training: closes the session if the optimizer made it."""
        self._optimizer.close()

    def __enter__(self) -> ModelAverageHook:
        self.begin()
        self.after_create_session()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
