"""Reads the cluster from flags, then from the variables that launchers set."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ma_client.cluster import tf_config
from ma_client.cluster.nodelist import nodes
from ma_client.cluster.settings import AUTO, ClusterError, Setting, TaskIndex, Told, whole
from modelaverage.addresses import Address, split

__all__ = [
    "FRESH",
    "INIT_FROM",
    "NUM_WORKERS",
    "PS_HOSTS",
    "TASK_INDEX",
    "WORKER_PER",
    "flag_settings",
    "index_of_a_process",
    "is_fresh",
    "ranks_of_this_worker",
    "resolve",
]

PS_HOSTS = "MA_PS_HOSTS"
NUM_WORKERS = "MA_NUM_WORKERS"
TASK_INDEX = "MA_TASK_INDEX"
INIT_FROM = "MA_INIT_FROM"
FRESH = "MA_FRESH"
WORKER_PER = "MA_WORKER_PER"

_SLURM_NODES = "SLURM_JOB_NODELIST"
_DEFAULT_PORT = 2222
_POSSIBILITIES = (
    "start the script with `ma-launch --workers N -- SCRIPT`, "
    "`ps-worker run --ps-hosts HOST:PORT --num-workers N --task-index I SCRIPT`, torchrun, srun or as a Kubernetes "
    "indexed job, or set TF_CONFIG (docs/cluster.md has an example of each)"
)
# By setting: its variable, its flag, and what it is.
_FACTS = {
    "ps_hosts": (PS_HOSTS, "--ps-hosts HOST:PORT", "where the parameter servers are"),
    "num_workers": (NUM_WORKERS, "--num-workers N", "how many workers there are"),
    "task_index": (TASK_INDEX, "--task-index I", "which worker this is"),
}

_Environ = Mapping[str, str]


def flag_settings(ps_hosts: tuple[str, ...] | None, num_workers: int | None, task_index: TaskIndex | None) -> Told:
    """The settings from flags; None: the flag was not given."""
    return Told(
        None if ps_hosts is None else Setting(ps_hosts, f"--ps-hosts {','.join(ps_hosts)}"),
        None if num_workers is None else Setting(num_workers, f"--num-workers {num_workers}"),
        None if task_index is None else Setting(task_index, f"--task-index {task_index}"),
    )


def is_fresh(environ: _Environ) -> bool:
    """Whether MA_FRESH requires that there is no center yet. Raises ClusterError for any value but 1 and 0."""
    text = _value(environ, FRESH)
    if text not in (None, "0", "1"):
        raise ClusterError(f"{FRESH}={text!r} is neither 1 nor 0; set it to 1, or unset it")
    return text == "1"


def resolve(flags: Told, environ: _Environ) -> tuple[Setting[tuple[str, ...]], Setting[int] | None, Setting[TaskIndex]]:
    """The servers' addresses, the number of workers, and this worker's index. If the server assigns the index (AUTO),
    it also tells the number of workers, which may be None then.

    Sources are read in order, each only while a setting is missing that it can have. All that are read have to agree.
    Later sources are not read: they belong to a launcher around the one that has set everything.

    Args:
        flags: the settings from explicit flags.
        environ: the environment.

    Raises:
        ClusterError: a setting is missing or malformed, or two sources contradict each other; the message names them.
    """
    told = flags
    for facts, read in _SOURCES:
        if told.missing & facts:
            told = told.and_then(read(environ))
    knows_number = told.num_workers is not None or (told.task_index is not None and told.task_index.value == AUTO)
    if told.ps_hosts is None or told.task_index is None or not knows_number:
        raise ClusterError(_what_is_missing(told))
    return told.ps_hosts, told.num_workers, told.task_index


def _from_ma(environ: _Environ) -> Told:
    """The variables that `ps-worker run`, `ma-launch` or a user sets."""
    text = _value(environ, PS_HOSTS)
    try:
        hosts = None if text is None else Setting(split(text), f"{PS_HOSTS}={text!r}")
    except ValueError as error:
        raise ClusterError(f"{PS_HOSTS}={text!r}: {error}") from None
    return Told(hosts, _whole(environ, NUM_WORKERS, least=1), _ma_task_index(environ))


def _ma_task_index(environ: _Environ) -> Setting[TaskIndex] | None:
    if _value(environ, TASK_INDEX) == AUTO:
        return Setting(AUTO, f"{TASK_INDEX}='{AUTO}'")
    return _whole(environ, TASK_INDEX)


def _from_tf_config(environ: _Environ) -> Told:
    text = _value(environ, "TF_CONFIG")
    return Told() if text is None else tf_config.read(text)


def _from_torchrun(environ: _Environ) -> Told:
    if _is_worker_per_node(environ):  # torchrun's groups are its agents: one on each node
        return Told(num_workers=_whole(environ, "GROUP_WORLD_SIZE", least=1), task_index=_whole(environ, "GROUP_RANK"))
    return Told(num_workers=_whole(environ, "WORLD_SIZE", least=1), task_index=_whole(environ, "RANK"))


def _from_slurm(environ: _Environ) -> Told:
    if _is_worker_per_node(environ):
        return Told(num_workers=_whole(environ, "SLURM_NNODES", least=1), task_index=_whole(environ, "SLURM_NODEID"))
    return Told(num_workers=_whole(environ, "SLURM_NTASKS", least=1), task_index=_whole(environ, "SLURM_PROCID"))


def ranks_of_this_worker(environ: _Environ) -> int:
    """How many processes a launcher has started on this node, if they are one worker (MA_WORKER_PER=node); otherwise 1.

    Raises:
        ClusterError: a variable is malformed.
    """
    ranks = _whole(environ, "LOCAL_WORLD_SIZE", least=1)
    return ranks.value if ranks is not None and _is_worker_per_node(environ) else 1


def index_of_a_process(environ: _Environ) -> str | None:
    """Where a launcher gives this process an index of its own that is taken for its worker's, such as ``RANK='1'``;
    None: the index is said to be the worker's, or there is none.

    Raises:
        ClusterError: a variable is malformed.
    """
    for _, read in _SOURCES:
        task = read(environ).task_index
        if task is not None:
            is_of_processes = read in (_from_torchrun, _from_slurm) and not _is_worker_per_node(environ)
            return task.source if is_of_processes else None
    return None


def _is_worker_per_node(environ: _Environ) -> bool:
    """Whether all processes of a node are one worker (MA_WORKER_PER), and not each of them."""
    text = _value(environ, WORKER_PER)
    if text not in (None, "process", "node"):
        raise ClusterError(f"{WORKER_PER}={text!r} is neither 'process' nor 'node'; set it to one of them, or unset it")
    return text == "node"


def _from_kubernetes(environ: _Environ) -> Told:
    return Told(task_index=_whole(environ, "JOB_COMPLETION_INDEX"))


def _from_slurm_nodes(environ: _Environ) -> Told:
    """The first node of the job, on which its batch script runs."""
    text = _value(environ, _SLURM_NODES)
    if text is None:
        return Told()
    try:
        host = next(nodes(text))
    except ValueError as error:
        raise ClusterError(f"{_SLURM_NODES}={text!r}: {error}") from None
    return Told(ps_hosts=Setting((str(Address(host, _DEFAULT_PORT)),), f"{_SLURM_NODES}={text!r}"))


_SOURCES: tuple[tuple[frozenset[str], Callable[[_Environ], Told]], ...] = (
    (frozenset({"ps_hosts", "num_workers", "task_index"}), _from_ma),
    (frozenset({"ps_hosts", "num_workers", "task_index"}), _from_tf_config),
    (frozenset({"num_workers", "task_index"}), _from_torchrun),
    (frozenset({"num_workers", "task_index"}), _from_slurm),
    (frozenset({"task_index"}), _from_kubernetes),
    (frozenset({"ps_hosts"}), _from_slurm_nodes),
)


def _value(environ: _Environ, name: str) -> str | None:
    """A variable's value; None if it is not set or empty, because a shell can clear a variable for one command only by
    making it empty."""
    return environ.get(name, "").strip() or None


def _whole(environ: _Environ, name: str, least: int = 0) -> Setting[int] | None:
    text = _value(environ, name)
    return None if text is None else whole(name, text, least)


def _what_is_missing(told: Told) -> str:
    variables, flags, meanings = zip(*(row for fact, row in _FACTS.items() if fact in told.missing), strict=True)
    names = ", ".join(variables)
    sources = [setting.source for setting in (told.ps_hosts, told.num_workers, told.task_index) if setting is not None]
    # Names only those MA_ variables that have to be set.
    others = ", ".join(source for source in sources if not source.startswith("MA_"))
    if not others:
        return f"{names} not set; {_POSSIBILITIES}"
    return (
        f"{names} not set, and what is set ({others}) does not say {' and '.join(meanings)}; set it, or start the "
        f"script with `ps-worker run {' '.join(flags)} SCRIPT` (docs/cluster.md has examples)"
    )
