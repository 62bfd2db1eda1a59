"""The hook around a training loop: at the start the chief initializes the center and every worker pulls it, at the end
a last round averages what was trained since the one before. Modelled on TensorFlow 1.15's hook."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

__all__ = ["ModelAverageHook"]


class _Training(Protocol):
    """What the hook controls: an optimizer, or its `WorkerTraining`."""

    def begin(self) -> None: ...

    def finish(self, final_round: bool, wait_for_others_s: float) -> None: ...

    def close(self) -> None: ...


class ModelAverageHook:
    """What `ModelAverageOptimizer.make_session_run_hook` returns; a context manager around the training loop.

    Left normally (`sys.exit(0)` included), it makes a last round if there is something to average, and tells the
    servers that this worker has finished. Left by an exception, it does neither: rounds wait for this worker.

    It may be entered again: training then goes on from the center.

    The methods are those of TensorFlow 1.15's ``SessionRunHook``, for training loops that call hooks; their arguments
    are accepted and not used.
    """

    def __init__(self, optimizer: _Training, final_round: bool = True, wait_for_others_s: float = 0.0) -> None:
        self._training = optimizer
        self._final_round = final_round
        self._wait_for_others_s = wait_for_others_s
        self._has_begun = False

    def begin(self) -> None:
        """Before training. Does nothing: there is no graph to build."""

    def after_create_session(self, session: object = None, coord: object = None) -> None:  # noqa: ARG002
        """The chief initializes the center if it is not initialized; then every worker copies it to its local
        variables."""
        self._training.begin()
        self._has_begun = True

    def before_run(self, run_context: object = None) -> None:
        """Before a step. Does nothing."""

    def after_run(self, run_context: object = None, run_values: object = None) -> None:
        """After a step. Does nothing."""

    def end(self, session: object = None) -> None:  # noqa: ARG002
        """After training, if nothing failed: makes the last round, tells the servers that this worker has finished, and
        closes the session if the optimizer opened it. A second call does nothing.

        Raises:
            ModelAverageError: the last round failed, or a server could not be told: this worker has not finished.
        """
        has_begun, self._has_begun = self._has_begun, False
        try:
            if has_begun:
                self._training.finish(self._final_round, self._wait_for_others_s)
        finally:
            self._training.close()

    def __enter__(self) -> ModelAverageHook:
        self.begin()
        self.after_create_session()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Exit code 0 means that the program has done its work.
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.end()
        else:
            self._has_begun = False
            self._training.close()
