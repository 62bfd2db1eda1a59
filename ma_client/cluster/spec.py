"""The cluster of a job: its parameter servers, the number of workers, and which of them this process is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ma_client.cluster import resolvers
from ma_client.cluster.settings import AUTO, ClusterError, TaskIndex
from modelaverage.access.security import Security
from modelaverage.addresses import check_all
from modelaverage.checks import check_timeout
from modelaverage.errors import InvalidRequestError

__all__ = ["ClusterError", "ClusterSpec"]

_PS = "ps"
_WORKER = "worker"
_JOIN_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class ClusterSpec:
    """The cluster as one worker sees it.

    It has the methods of `tf.train.ClusterSpec`, for the jobs "ps" and "worker". A worker's address is None, because
    no process connects to a worker.

    Args:
        ps_hosts: addresses of the parameter servers, HOST:PORT each.
        num_workers: how many workers the job has.
        task_index: which of them this process is, from 0. Worker 0 is the chief.
        init_from: a file with the values that the chief sets the center to; None: its own.
        must_be_new: whether the chief refuses to go on from a center that is there already.

    Raises:
        ClusterError: a value is out of range.
    """

    ps_hosts: tuple[str, ...]
    num_workers: int
    task_index: int
    init_from: str | None = None
    must_be_new: bool = False

    def __post_init__(self) -> None:
        if not self.ps_hosts or not all(self.ps_hosts):
            raise ClusterError("ps_hosts is empty; give the address of the parameter server, HOST:PORT")
        if isinstance(self.ps_hosts, str):
            raise ClusterError(f"ps_hosts {self.ps_hosts!r} is one string; give a list of addresses, HOST:PORT each")
        try:
            check_all(self.ps_hosts)
        except ValueError as error:
            raise ClusterError(f"ps_hosts: {error}") from None
        if self.num_workers < 1:
            raise ClusterError(f"num_workers {self.num_workers} is not a whole number from 1 up")
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

    # Reading it from the environment, and passing it on.

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ClusterSpec:
        """The cluster that the environment describes: `resolve` without flags.

        Raises:
            ClusterError: variables are missing, unusable or contradict each other; the message names them.
        """
        return cls.resolve(environ)

    @classmethod
    def resolve(
        cls,
        environ: Mapping[str, str] = os.environ,
        *,
        ps_hosts: tuple[str, ...] | None = None,
        num_workers: int | None = None,
        task_index: TaskIndex | None = None,
        init_from: str | None = None,
        must_be_new: bool = False,
        join_timeout_s: float = _JOIN_TIMEOUT_S,
        security: Security | None = None,
    ) -> ClusterSpec:
        """The cluster that explicit flags and the environment describe together.

        They are read in this order: the flags; MA_PS_HOSTS (separated by commas), MA_NUM_WORKERS and MA_TASK_INDEX;
        TF_CONFIG; torchrun's WORLD_SIZE and RANK; Slurm's SLURM_NTASKS and SLURM_PROCID; with MA_WORKER_PER=node these
        launchers' numbers of nodes instead of processes; JOB_COMPLETION_INDEX of a Kubernetes indexed job; and for the
        servers at last the first node of SLURM_JOB_NODELIST, port 2222. Each is read only while a setting is missing
        that it can have, and all that are read have to agree. So a source that has every setting prevails over the
        launchers around it. docs/cluster.md has examples.

        Args:
            environ: the environment. A variable that is empty counts as not set.
            ps_hosts: as the constructor's; None, here and below: to be found in the environment.
            num_workers: as the constructor's.
            task_index: as the constructor's; "auto" (MA_TASK_INDEX=auto): the first server assigns the lowest free
                index, which this process then keeps until it ends. The server also tells the number of workers.
            init_from: as the constructor's; None: MA_INIT_FROM, if it is set.
            must_be_new: as the constructor's; False: MA_FRESH, if it is set.
            join_timeout_s: with "auto", how long to wait for the server and for a free index; above 0.
            security: with "auto", as `ParameterServerSession`'s.

        Raises:
            ClusterError: flags or variables are missing, unusable or contradict each other, or the server has another
                number of workers; the message names them. Or ``join_timeout_s`` is not above 0.
            DeadlineExceededError: no task index was assigned within ``join_timeout_s``; the message says why.
            SecurityError: the server and this process do not trust each other, or a file is missing or unusable.
            ServerUnavailableError: no parameter server answers there in time.
        """
        try:
            check_timeout("join_timeout_s", join_timeout_s, may_be_infinite=True)
        except InvalidRequestError as error:
            raise ClusterError(str(error)) from None
        init_from, must_be_new = _for_the_chief(init_from, must_be_new, environ)
        settings = resolvers.resolve(resolvers.flag_settings(ps_hosts, num_workers, task_index), environ)
        servers, workers, task = settings
        if task.value == AUTO:
            from ma_client.cluster.joining import join  # not above: it needs gRPC

            place = join(servers.value[0], join_timeout_s, security)
            if workers is not None and workers.value != place.num_workers:
                raise ClusterError(
                    f"{workers.source}, but the server at {servers.value[0]} was told --num-workers "
                    f"{place.num_workers}; leave it out here, or start the server with the same number"
                )
            return cls(servers.value, place.num_workers, place.task_index, init_from, must_be_new)
        assert (
            workers is not None
        )  # num_workers may be missing only if the server assigns the index, because it then tells the number
        try:
            return cls(servers.value, workers.value, task.value, init_from, must_be_new)
        except ClusterError as error:
            sources = ", ".join(setting.source for setting in settings if setting is not None)
            raise ClusterError(f"{error} ({sources})") from None

    @classmethod
    def env_for_child(
        cls,
        environ: Mapping[str, str] = os.environ,
        *,
        ps_hosts: tuple[str, ...] | None = None,
        num_workers: int | None = None,
        task_index: TaskIndex | None = None,
        init_from: str | None = None,
        must_be_new: bool = False,
    ) -> dict[str, str]:
        """The MA_* variables that make another process the worker that `resolve` describes; "auto" is passed on as it
        is.

        Args:
            environ: as for `resolve`; so are the others.

        Raises:
            ClusterError: as `resolve`.
        """
        flags = resolvers.flag_settings(ps_hosts, num_workers, task_index)
        servers, workers, task = resolvers.resolve(flags, environ)
        if task.value != AUTO:
            return cls.resolve(
                environ,
                ps_hosts=ps_hosts,
                num_workers=num_workers,
                task_index=task_index,
                init_from=init_from,
                must_be_new=must_be_new,
            ).to_env()
        init_from, must_be_new = _for_the_chief(init_from, must_be_new, environ)
        return _variables(servers.value, None if workers is None else workers.value, AUTO, init_from, must_be_new)

    def to_env(self) -> dict[str, str]:
        """The MA_* variables that describe it; they prevail over all other variables of an environment."""
        return _variables(self.ps_hosts, self.num_workers, self.task_index, self.init_from, self.must_be_new)

    # The methods of tf.train.ClusterSpec.

    @property
    def jobs(self) -> list[str]:
        """Names of the jobs: "ps" and "worker"."""
        return [_PS, _WORKER]

    def as_dict(self) -> dict[str, list[str | None]]:
        """The tasks' addresses by job; None for each worker."""
        return {job: self.job_tasks(job) for job in self.jobs}

    def num_tasks(self, job_name: str) -> int:
        """How many tasks a job has.

        Raises:
            ValueError: there is no such job.
        """
        return len(self.job_tasks(job_name))

    def task_indices(self, job_name: str) -> list[int]:
        """The numbers of a job's tasks, from 0 on.

        Raises:
            ValueError: there is no such job.
        """
        return list(range(self.num_tasks(job_name)))

    def task_address(self, job_name: str, task_index: int) -> str | None:
        """The address of a task; None for a worker.

        Raises:
            ValueError: there is no such job, or no such task in it.
        """
        if task_index not in self.task_indices(job_name):
            last = self.num_tasks(job_name) - 1
            raise ValueError(f"there is no task {task_index!r} in job {job_name!r}; it has 0 to {last}")
        return self.job_tasks(job_name)[task_index]

    def job_tasks(self, job_name: str) -> list[str | None]:
        """The addresses of a job's tasks; None for each worker.

        Raises:
            ValueError: there is no such job.
        """
        if job_name == _PS:
            return list(self.ps_hosts)
        if job_name == _WORKER:
            return [None] * self.num_workers
        raise ValueError(f"there is no job {job_name!r} in the cluster; there are 'ps' and 'worker'")


def _for_the_chief(init_from: str | None, must_be_new: bool, environ: Mapping[str, str]) -> tuple[str | None, bool]:
    return init_from or environ.get(resolvers.INIT_FROM) or None, must_be_new or resolvers.is_fresh(environ)


def _variables(
    ps_hosts: tuple[str, ...],
    num_workers: int | None,
    task_index: TaskIndex,
    init_from: str | None,
    must_be_new: bool,
) -> dict[str, str]:
    found = {
        resolvers.PS_HOSTS: ",".join(ps_hosts),
        resolvers.NUM_WORKERS: num_workers,
        resolvers.TASK_INDEX: task_index,
        resolvers.INIT_FROM: init_from,
        resolvers.FRESH: 1 if must_be_new else None,
    }
    return {name: str(value) for name, value in found.items() if value is not None}
