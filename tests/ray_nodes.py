"""A Ray cluster of several nodes on this machine, as a process: `python -m tests.ray_nodes`.

It answers with its address once it is there, and obeys the lines of its stdin:

    lose worker K   removes a node that has workers but none of the K servers
    lose server K   removes a node that has one of the K servers

The servers are the first K bundles of the only placement group. The answer has the indices of the bundles that were on
the removed node; a new node replaces it. The process ends at the end of stdin.

Answers are lines of stdout that begin with "ray_nodes:"; Ray prints there, too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

NODES = 3
CPUS = 3  # enough for two nodes to run everything that the tests start
OBJECT_STORE_BYTES = 80 << 20


class Nodes:
    """A head, which runs nothing because the driver is connected to it, and nodes with different addresses."""

    def __init__(self) -> None:
        self._made = 0
        self._by_id: dict[str, Any] = {}
        self._cluster = Cluster()
        self._add(cpus=0)
        for _ in range(NODES):
            self.replace()
        self._cluster.wait_for_nodes()
        self.address = self._cluster.address

    def _add(self, cpus: int) -> None:
        self._made += 1
        node = self._cluster.add_node(
            wait=False,
            num_cpus=cpus,
            node_ip_address=f"127.0.0.{self._made + 1}",  # Ray takes 127.0.0.1 for "this machine", by another address
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
        )
        self._by_id[node.node_id] = node

    def lose(self, kind: str, servers: int) -> list[int]:
        """Removes a node; returns the bundles that were on it."""
        (group,) = (group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED")
        bundles: dict[str, list[int]] = {}
        for bundle, node_id in group["bundles_to_node_id"].items():
            bundles.setdefault(node_id, []).append(bundle)
        node_id, lost = next(
            (node_id, sorted(there))
            for node_id, there in bundles.items()
            if (min(there) < servers) == (kind == "server")
        )
        self._cluster.remove_node(self._by_id.pop(node_id), allow_graceful=False)
        return lost

    def replace(self) -> None:
        """Adds a node, with an address that has not been used before."""
        self._add(CPUS)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


def answer(*words: object) -> None:
    """One write, with the ends of the line: Ray's threads print meanwhile, and print() writes in pieces."""
    sys.stdout.flush()
    os.write(sys.stdout.fileno(), ("\n" + " ".join(map(str, ("ray_nodes:", *words))) + "\n").encode())


def main() -> None:
    nodes = Nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    answer(nodes.address)
    for line in sys.stdin:
        _, kind, servers = line.split()
        answer(*nodes.lose(kind, int(servers)))
        nodes.replace()
    nodes.close()


if __name__ == "__main__":
    main()
