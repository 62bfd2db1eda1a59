"""`ma-launch --engine ray`: connects to a Ray cluster, or starts one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from modelaverage.addresses import parse
from ps_worker.engines.engine import EngineError
from ps_worker.engines.local_cluster import usable_cores

__all__ = ["connect", "count_nodes"]

_LOCAL = "local"
_PROBE_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 100 << 20  # in a Ray instance of our own, only lines of text pass through it


def connect(address: str | None, working_dir: Path | None, needed_cpus: int) -> bool:
    """Connects this process to a Ray cluster.

    Args:
        address: HOST:PORT of the cluster; None: the one that Ray finds, otherwise a new one; "local": a new one, of
            this machine only.
        working_dir: a directory to copy to the nodes, where processes start; None: none.
        needed_cpus: how many cores a new cluster claims to have.

    Returns:
        Whether the cluster is new; a new one ends with this process.

    Raises:
        EngineError: there is no such cluster, or this process cannot use it.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if working_dir is not None:
        options["runtime_env"] = {"working_dir": str(working_dir)}
    try:
        if address != _LOCAL and _is_found(address, options):
            return False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address=_LOCAL,
            num_cpus=max(needed_cpus, usable_cores()),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        where = "" if address is None else f" at {address}"
        raise EngineError(f"cannot use Ray{where}: {error}") from None
    return True


def _is_found(address: str | None, options: Mapping[str, Any]) -> bool:
    """Whether this process could connect; False: Ray knows of no cluster."""
    if address is not None:
        _check(address)
    try:
        ray.init(address=address or "auto", **options)
    except ConnectionError:
        if address is not None:
            raise
        return False
    return True


def _check(address: str) -> None:
    """Raises EngineError if no cluster can be there; Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise EngineError(
            f"{address}: a Ray client cannot do this; start ma-launch on a node of the cluster, or with "
            "`ray job submit -- ma-launch ...`"
        )
    if ":" in address:  # otherwise it is one of Ray's words, such as "auto"
        try:
            where = parse(address)
            socket.create_connection((where.host, where.port), _PROBE_TIMEOUT_S).close()
        except (OSError, ValueError) as error:
            raise EngineError(f"there is no Ray cluster at {address}: {error}") from None


def count_nodes() -> int:
    """How many nodes of the cluster have a core to run something on."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in nodes)
