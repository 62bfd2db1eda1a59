"""Notices, while a job runs, when a worker ends that others wait for, and says so."""

from __future__ import annotations

import asyncio

from ps_worker.engines.engine import Cluster
from ps_worker.engines.processes import LineHandler
from ps_worker.watch.aftermath import missed
from ps_worker.watch.server_watch import ServerWatch

__all__ = ["keep_looking"]

_INTERVAL_S = 1.0


async def keep_looking(cluster: Cluster, watch: ServerWatch, say: LineHandler) -> None:
    """Says so once for each such worker. Never returns.

    The servers are asked only while some workers have ended and some are running.
    """
    before, said = set[str](), set[str]()
    while True:
        await asyncio.sleep(_INTERVAL_S)
        workers = cluster.worker_states()
        if len({worker.exit_code is None for worker in workers}) < 2:
            continue
        found = missed(await watch.statuses(cluster.addresses), workers)
        # Only if it is missed twice in a row: a round with a quorum may be about to go on without it.
        for name in sorted((found.keys() & before) - said):
            said.add(name)
            say(f"ma-launch: {found[name]}")
        before = set(found)
