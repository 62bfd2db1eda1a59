"""A worker that is a group of processes: one model on several GPUs, as torchrun starts them.

Two workers of two processes each, on one machine, without GPUs:

    ps-server serve --bind 127.0.0.1:2222 --num-workers 2 &
    export MA_PS_HOSTS=127.0.0.1:2222 MA_NUM_WORKERS=2
    MA_TASK_INDEX=0 torchrun --standalone --nproc-per-node 2 examples/group.py &
    MA_TASK_INDEX=1 torchrun --standalone --nproc-per-node 2 examples/group.py

On several machines, one worker each; NODE is 0 on the first and 1 on the second:

    MA_PS_HOSTS=ps:2222 MA_WORKER_PER=node torchrun --nnodes 2 --node-rank NODE --master-addr machine0 \\
        --master-port 29500 --nproc-per-node 8 examples/group.py

`--shard` shards the model with FSDP2; otherwise every process has all of it (DistributedDataParallel).
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ma_client import ClusterSpec, ModelAverageCustomGetter, ModelAverageOptimizer

ROUNDS, INTERVAL_STEPS, BATCH_SIZE = 12, 25, 16


def points(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a square; class 1 inside a circle, class 0 outside."""
    x = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return x, (x.norm(dim=1) < 0.75).long()


def main() -> None:
    has_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo")
    # The processes that torchrun has started on this machine: this worker.
    group, _ = dist.new_subgroups(int(os.environ["LOCAL_WORLD_SIZE"]))  # type: ignore[no-untyped-call]
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    cluster = ClusterSpec.from_env()
    x, y = (part[cluster.task_index :: cluster.num_workers] for part in points(2000, seed=0))  # this worker's share
    x, y = (part[rank::size].to(device) for part in (x, y))  # this process's part of it

    torch.manual_seed(cluster.task_index)
    getter = ModelAverageCustomGetter(worker_device=device)
    model: nn.Module = getter(nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)))
    if "--shard" in sys.argv:
        fully_shard(model, mesh=DeviceMesh.from_group(group, device.type))
    else:
        model = DistributedDataParallel(model, process_group=group)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = ModelAverageOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        num_worker=cluster.num_workers,
        is_chief=cluster.is_chief,
        ma_custom_getter=getter,
        interval_steps=INTERVAL_STEPS,
        process_group=group,  # rank 0 of it talks to the servers
    )
    with optimizer.make_session_run_hook():
        while optimizer.global_step < ROUNDS:  # so a restarted worker makes only the remaining rounds
            for _ in range(INTERVAL_STEPS):
                rows = torch.randint(len(x), (BATCH_SIZE,))
                optimizer.zero_grad()
                loss_fn(model(x[rows]), y[rows]).backward()  # gradients are averaged within the group
                optimizer.step()  # every INTERVAL_STEPS of these, the model becomes the average of all workers
            loss = loss_fn(model(x), y).item()  # in all processes: a sharded model computes in all of them together
            if rank == 0:
                print(f"round {optimizer.global_step}: loss {loss:.3f}")

    x, y = (part.to(device) for part in points(1000, seed=1))
    accuracy = (model(x).argmax(dim=1) == y).float().mean().item()  # in every process, the model is now the center
    if rank == 0:
        print(f"accuracy of the center: {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
