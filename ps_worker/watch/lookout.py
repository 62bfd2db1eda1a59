"""Looks, while a job runs, whether some worker has ended for whom others wait, and says so."""

from __future__ import annotations

import asyncio

from ps_worker.engines.engine import Cluster
from ps_worker.engines.processes import LineHandler
from ps_worker.watch.aftermath import missed
from ps_worker.watch.server_watch import ServerWatch

__all__ = ["keep_looking"]

_INTERVAL_S = 1.0


async def keep_looking(cluster: Cluster, watch: ServerWatch, say: LineHandler) -> None:
    """Says it once of each such worker. Never ends.

    Asks the servers only while some workers have ended and some run.
    """
    before, said = set[str](), set[str]()
    while True:
        await asyncio.sleep(_INTERVAL_S)
        workers = cluster.worker_states()
        if len({worker.exit_code is None for worker in workers}) < 2:
            continue
        found = missed(await watch.statuses(cluster.addresses), workers)
        # Twice in a row: a round with a quorum may be about to go on without it.
        for name in sorted((found.keys() & before) - said):
            said.add(name)
            say(f"ma-launch: {found[name]}")
        before = set(found)
