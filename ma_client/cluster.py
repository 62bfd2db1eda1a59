"""Who is who in a job: which parameter servers, how many workers, which of them this process is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ClusterError", "ClusterSpec"]

_PS_HOSTS = "MA_PS_HOSTS"
_NUM_WORKERS = "MA_NUM_WORKERS"
_TASK_INDEX = "MA_TASK_INDEX"
_INIT_FROM = "MA_INIT_FROM"


class ClusterError(ValueError):
    """The description of the cluster is missing or contradicts itself."""


@dataclass(frozen=True)
class ClusterSpec:
    """The cluster as one worker sees it.

    Args:
        ps_hosts: addresses of the parameter servers, HOST:PORT each.
        num_workers: how many workers the job has.
        task_index: which of them this process is, from 0. Worker 0 is the chief.
        init_from: a safetensors file with the values that the chief sets the center to; None: its own.

    Raises:
        ClusterError: a value is out of range.
    """

    ps_hosts: tuple[str, ...]
    num_workers: int
    task_index: int
    init_from: str | None = None

    def __post_init__(self) -> None:
        if not self.ps_hosts or not all(self.ps_hosts):
            raise ClusterError("ps_hosts is empty; give the address of the parameter server, HOST:PORT")
        if self.num_workers < 1:
            raise ClusterError(f"num_workers {self.num_workers} is not a whole number from 1 on")
        if not 0 <= self.task_index < self.num_workers:
            raise ClusterError(
                f"task_index {self.task_index} is not from 0 to {self.num_workers - 1} (num_workers - 1)"
            )

    @property
    def worker_id(self) -> str:
        """The name of this worker in the job."""
        return f"worker-{self.task_index}"

    @property
    def is_chief(self) -> bool:
        """Whether this worker initializes the center."""
        return self.task_index == 0

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ClusterSpec:
        """Reads what `ps-worker run` and `ma-launch` set: MA_PS_HOSTS (comma-separated), MA_NUM_WORKERS, MA_TASK_INDEX,
        and, if it is there, MA_INIT_FROM.

        Raises:
            ClusterError: naming the variable that is missing or unusable.
        """
        missing = [name for name in (_PS_HOSTS, _NUM_WORKERS, _TASK_INDEX) if name not in environ]
        if missing:
            raise ClusterError(
                f"{', '.join(missing)} not set; start the script with `ma-launch --workers N -- SCRIPT` or "
                "`ps-worker run --ps-hosts HOST:PORT --num-workers N --task-index I SCRIPT`"
            )
        try:
            return cls(
                ps_hosts=tuple(host.strip() for host in environ[_PS_HOSTS].split(",")),
                num_workers=int(environ[_NUM_WORKERS]),
                task_index=int(environ[_TASK_INDEX]),
                init_from=environ.get(_INIT_FROM) or None,
            )
        except ValueError as error:
            settings = " ".join(f"{name}={environ[name]!r}" for name in (_PS_HOSTS, _NUM_WORKERS, _TASK_INDEX))
            raise ClusterError(f"{error} (the environment has {settings})") from None

    def to_env(self) -> dict[str, str]:
        """The variables that `from_env` reads."""
        return {
            _PS_HOSTS: ",".join(self.ps_hosts),
            _NUM_WORKERS: str(self.num_workers),
            _TASK_INDEX: str(self.task_index),
            **({} if self.init_from is None else {_INIT_FROM: self.init_from}),
        }
