"""The rounds of a worker as JSON lines in a file, for curves of its loss: `ps-worker curves` draws them.

A line is written with one call to the system, as soon as its round is over, so a worker that is killed leaves every
round that it has completed. Writing takes some 20 microseconds (130 on a busy machine) and never stops the training.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modelaverage.logs import event
from modelaverage.names import file_name

__all__ = ["LoggedRound", "ROUND_LOG", "RoundLog", "SUFFIX"]

ROUND_LOG = "MA_ROUND_LOG"
"""The variable that names the directory; each worker writes a file of its own there."""
SUFFIX = ".jsonl"
_LARGEST = 1e300
_log = logging.getLogger("ma_client")
_NUMBERS = ("unix_time_s", "elapsed_s", "local_step", "global_step", "sent_bytes", "received_bytes", "waited_s")


@dataclass(frozen=True)
class LoggedRound:
    """A round that has ended, and the loss that was reported with its push.

    Args:
        worker: the id of the worker.
        session: a random text that all rounds of one session have; a worker that starts again has another.
        unix_time_s: when the round ended.
        elapsed_s: the same, since the session began.
        local_step: the worker's count of optimizer steps, as pushed; 0: it counts none.
        global_step: rounds completed.
        loss: as reported; None: it was NaN or infinite, which JSON cannot say.
        sent_bytes: bytes of fragments that the session has sent so far, to all servers.
        received_bytes: that it has received so far.
        waited_s: how long the push waited for those of the others.
    """

    worker: str
    session: str
    unix_time_s: float
    elapsed_s: float
    local_step: int
    global_step: int
    loss: float | None
    sent_bytes: int
    received_bytes: int
    waited_s: float

    def to_line(self) -> str:
        """One line of JSON, without the newline."""
        return json.dumps(vars(self))

    @classmethod
    def from_line(cls, line: str | bytes) -> LoggedRound:
        """What `to_line` gave. Raises ValueError for anything else; fields of a later version are left out."""
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError(f"not a round: {line[:80]!r}")
        try:
            found = cls(**{name: fields[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise ValueError(f"a round without {error}") from None
        numbers = [getattr(found, name) for name in _NUMBERS] + ([] if found.loss is None else [found.loss])
        texts = (found.worker, found.session)
        if not all(isinstance(text, str) for text in texts) or not all(map(_is_number, numbers)):
            raise ValueError(f"not a round: {line[:80]!r}")
        return found


class RoundLog:
    """The file of one session. It is made with the first round that has a loss.

    Args:
        directory: where it is, with one file for each worker; made if need be. None: nothing is written.
        worker_id: names the file.
    """

    def __init__(self, directory: Path | None, worker_id: str) -> None:
        self._path = None if directory is None else directory / (file_name(worker_id) + SUFFIX)
        self._worker_id = worker_id
        self._session = uuid.uuid4().hex[:12]
        self._began_at_s = time.monotonic()
        self._file: int | None = None
        self._is_torn = self._is_said = False

    @classmethod
    def from_env(cls, worker_id: str, environ: Mapping[str, str] = os.environ) -> RoundLog:
        """The log in the directory that MA_ROUND_LOG names; none if it is not set."""
        directory = environ.get(ROUND_LOG, "").strip()
        return cls(Path(directory) if directory else None, worker_id)

    def note(
        self,
        loss: float | None,
        local_step: int,
        global_step: int,
        waited_s: float,
        sent_bytes: int,
        received_bytes: int,
    ) -> None:
        """A round has ended. Arguments are those of `LoggedRound`; a round without a loss is not written."""
        if self._path is None or loss is None:
            return
        number = float(loss)
        done = LoggedRound(
            worker=self._worker_id,
            session=self._session,
            unix_time_s=round(time.time(), 3),
            elapsed_s=round(time.monotonic() - self._began_at_s, 4),
            local_step=int(local_step),
            global_step=global_step,
            loss=number if math.isfinite(number) else None,
            sent_bytes=sent_bytes,
            received_bytes=received_bytes,
            waited_s=round(waited_s, 4),
        )
        try:
            self._write(self._path, done.to_line())
        except OSError as error:
            self._say(self._path, error)

    def close(self) -> None:
        """Nothing more will be written."""
        if self._file is not None:
            os.close(self._file)
        self._path = self._file = None

    def _write(self, path: Path, line: str) -> None:
        if self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._is_torn = os.fstat(self._file).st_size > 0
        # Half a line that an earlier write has left, here or in a session before, must not spoil this one.
        data = (f"\n{line}\n" if self._is_torn else f"{line}\n").encode()
        self._is_torn = True
        self._is_torn = os.write(self._file, data) < len(data)

    def _say(self, path: Path, error: OSError) -> None:
        if self._is_said:
            return
        self._is_said = True
        cause = error.strerror or str(error)
        _log.warning(
            "cannot write the rounds of %s to %s (%s): they will be missing from its curves; training goes on",
            self._worker_id,
            path,
            cause,
            extra=event("round_log_lost", worker=self._worker_id, path=str(path), cause=cause),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
