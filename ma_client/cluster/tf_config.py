"""Reads TF_CONFIG, in which TensorFlow's launchers describe a cluster to each of its processes."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ma_client.cluster.settings import ClusterError, Setting, Told, index_of
from modelaverage.addresses import check_all

__all__ = ["read"]

_WORKER = "worker"
_PS = "ps"
# Names of a separate job for the worker that initializes; `master` is the older one.
_CHIEFS = ("chief", "master")
_DEFAULT_PORT = "2222"


@dataclass(frozen=True)
class _Job:
    """Addresses by task, in order. Those of a JSON object ("partial") may be incomplete."""

    tasks: Mapping[int, str]
    partial: bool

    @property
    def has_gaps(self) -> bool:
        return list(self.tasks) != list(range(len(self.tasks)))


_NOBODY = _Job({}, partial=False)


def read(text: str) -> Told:
    """The settings in it; none if it has no ``cluster``.

    As in TensorFlow 1.15, a chief with a separate job is worker 0, and the tasks of job ``worker`` follow it.

    Args:
        text: the variable's value.

    Raises:
        ClusterError: it is malformed, or this process is not a worker; the message says what to run instead.
    """
    try:
        return _read(json.loads(text))
    except ValueError as error:
        raise ClusterError(f"TF_CONFIG={text!r}: {error}") from None


def _read(config: Any) -> Told:
    if not isinstance(config, dict):
        raise ValueError("it is not a JSON object")
    cluster, task = config.get("cluster"), config.get("task")
    if not cluster:
        return Told()
    if not isinstance(cluster, dict):
        raise ValueError("cluster is not an object with the addresses of each job")
    jobs = {name: _job(name, cluster[name]) for name in (_PS, *_CHIEFS, _WORKER) if cluster.get(name)}
    chiefs = [name for name in _CHIEFS if name in jobs]
    if len(chiefs) > 1 or any(list(jobs[name].tasks) != [0] for name in chiefs):
        raise ValueError("cluster can have one chief: task 0 of either 'chief' or 'master'")
    ps_hosts = _ps_hosts(jobs.get(_PS, _NOBODY))
    num_workers = _num_workers(jobs.get(_WORKER, _NOBODY), len(chiefs))
    return Told(ps_hosts, num_workers, None if task is None else _task_index(task, jobs, num_workers))


def _job(name: str, tasks: Any) -> _Job:
    if isinstance(tasks, list):
        found = dict(enumerate(tasks))
    elif isinstance(tasks, dict):
        found = dict(sorted((index_of(index), address) for index, address in tasks.items()))
    else:
        raise ValueError(f"cluster.{name} is neither a list of addresses nor an object with addresses by index")
    for address in found.values():
        if not isinstance(address, str):
            raise ValueError(f"cluster.{name} has {address!r} where an address belongs")
    return _Job(found, isinstance(tasks, dict))


def _ps_hosts(job: _Job) -> Setting[tuple[str, ...]] | None:
    if not job.tasks:
        return None
    if job.has_gaps:
        raise ValueError("cluster.ps leaves some out; a worker has to know all parameter servers")
    hosts = tuple(job.tasks.values())
    try:
        check_all(hosts)
    except ValueError as error:
        raise ValueError(f"cluster.ps: {error}") from None
    return Setting(hosts, f"TF_CONFIG's cluster.ps={','.join(hosts)!r}")


def _num_workers(workers: _Job, chiefs: int) -> Setting[int] | None:
    count = chiefs + len(workers.tasks)
    if not count or workers.has_gaps:
        return None
    among = " (the chief is one of them)" if chiefs else ""
    agrees = operator.ge if workers.partial else operator.eq
    return Setting(count, f"TF_CONFIG's {count} worker{'s' if count > 1 else ''}{among}", agrees)


def _task_index(task: Any, jobs: Mapping[str, _Job], num_workers: Setting[int] | None) -> Setting[int]:
    if not isinstance(task, dict) or not isinstance(task.get("type"), str) or "index" not in task:
        raise ValueError('task is not an object such as {"type": "worker", "index": 0}')
    name, index = task["type"], index_of(task["index"])
    if name == _PS:
        raise ValueError(_run_a_server_instead(index, jobs.get(_PS, _NOBODY), num_workers))
    if name == "evaluator":
        raise ValueError(
            "this process is an evaluator, not a worker; let it read the center, with "
            "`ParameterServerSession(ps_hosts, worker_id='evaluator').pull()` or `ps-server export`"
        )
    job = jobs.get(name)
    if job is None or name not in (*_CHIEFS, _WORKER):
        raise ValueError(f"task is of type {name!r}, which is not a job with workers in cluster ({', '.join(jobs)})")
    if index not in job.tasks and not job.partial:
        raise ValueError(f"task is {name} {index}, but cluster has {name} 0 to {len(job.tasks) - 1}")
    leader = next((chief for chief in _CHIEFS if chief in jobs and name == _WORKER), None)
    if leader is None:
        return Setting(index, f"TF_CONFIG's task {name} {index}")
    return Setting(index + 1, f"TF_CONFIG's task {name} {index} (it follows the {leader})")


def _run_a_server_instead(index: int, servers: _Job, num_workers: Setting[int] | None) -> str:
    port = servers.tasks.get(index, "").rpartition(":")[2] or _DEFAULT_PORT
    count = "N" if num_workers is None else num_workers.value
    return (
        f"this process is parameter server {index}, not a worker; run "
        f"`ps-server serve --bind 0.0.0.0:{port} --num-workers {count}` instead"
    )
