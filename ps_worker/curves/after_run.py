"""What `ma-launch` does about the curves of a script: tells workers where to log their rounds, and draws them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from ma_client.files.round_log import ROUND_LOG
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker.curves.logs import curves_in
from ps_worker.curves.run_directory import CURVES, ROUNDS, new_run_directory
from ps_worker.curves.text import plotted

__all__ = ["RunCurves"]

_INTERRUPTED = 128 + signal.SIGINT
_HOW = (
    "no worker has reported a loss, so this run has no curves. To get them: `optimizer.loss = loss.item()` before "
    "`optimizer.step()`, or `push_and_average(..., loss=...)`"
)
_NO_PICTURE = "`ps-worker curves {}` draws them once matplotlib is installed (pip install matplotlib)"


class RunCurves:
    """The logs of one run.

    Args:
        runs: where to make the run's directory; not used if the environment names a directory for the logs.
        say: prints a line.
        environ: of this program.
    """

    def __init__(self, runs: Path, say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> None:
        self._say = say
        self._made = list[Path]()  # what is removed again if no worker reports a loss
        self._has_loss = False
        named = environ.get(ROUND_LOG, "").strip()
        self._directory: Path | None = Path(named).absolute() if named else None
        self._logs = self._directory
        if named:
            return
        try:
            is_new = not runs.exists()
            self._directory = new_run_directory(runs).absolute()
            self._made = [self._directory, *([runs.absolute()] if is_new else [])]
            self._logs = self._directory / ROUNDS
        except OSError as error:
            say(
                f"{runs} cannot be written ({error.strerror}): this run will have no curves; --runs names another place"
            )

    @property
    def environ(self) -> dict[str, str]:
        """What to add to the environment of every worker."""
        return {} if self._logs is None else {ROUND_LOG: str(self._logs)}

    def heard(self, statuses: Sequence[pb.GetStatusResponse], is_well: bool) -> None:
        """The servers' last statuses. Says once how to report a loss if rounds were made and none was reported.
        ``is_well``: the run has ended as it should."""
        self._has_loss = any(worker.HasField("loss") for status in statuses for worker in status.workers)
        if is_well and not self._has_loss and any(status.rounds_committed for status in statuses):
            self._say(_HOW)

    def end(self, exit_code: int, out: TextIO) -> None:
        """Shows the curves and says where they are. Never raises OSError.

        Args:
            exit_code: of the run. After an error there is no plot, which would push the message off the screen.
            out: gets the plot if it is a terminal.
        """
        if self._directory is None or self._logs is None:
            return
        try:
            curves = curves_in(self._logs)
            if not curves:
                self._without()
                return
            if exit_code in (0, _INTERRUPTED) and out.isatty():
                print(*plotted(curves, shutil.get_terminal_size().columns), sep="\n", file=out, flush=True)
            where = _shortest(self._directory)
            if find_spec("matplotlib") is None:
                self._say(f"the loss of every round is in {where}; {_NO_PICTURE.format(where)}")
            elif exit_code in (0, 1, _INTERRUPTED):  # other signals give no time
                from ps_worker.curves.picture import draw

                draw(curves, self._directory / CURVES)
                self._say(f"curves of the loss: {where / CURVES}")
            else:
                self._say(f"the loss of every round is in {where}; `ps-worker curves {where}` draws it")
        except OSError as error:
            self._say(f"no curves: {error.filename or self._directory}: {error.strerror or error}")

    def _without(self) -> None:
        if self._has_loss:
            self._say(
                f"no worker has logged its rounds in {self._logs} on this machine. Workers on other machines keep them "
                "under the same path there: copy them into one directory, and `ps-worker curves DIR` draws them"
            )
        for directory in self._made:
            with contextlib.suppress(OSError):  # another run uses it
                directory.rmdir()


def _shortest(path: Path) -> Path:
    """The path as a user would type it here."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
