"""What ranks run in the tests of worker groups: small trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession
from tests.groups.ranks import RANKS_PER_WORKER, Rank

Values = dict[str, NDArray[Any]]
INTERVAL_STEPS = 3


def net(seed: int = 0) -> torch.nn.Module:
    """Layers whose sizes no number of ranks divides, a tied parameter, and buffers."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7, track_running_stats=True), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    )


def batch(worker: int, rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank learns from in a step."""
    random = torch.Generator().manual_seed(10_000 * worker + 100 * rank + step)
    return torch.randn(4, 5, generator=random), torch.randint(0, 3, (4,), generator=random)


def in_ddp(model: torch.nn.Module, rank: Rank) -> torch.nn.Module:
    return DistributedDataParallel(model, process_group=rank.group)


def in_fsdp2(model: torch.nn.Module, rank: Rank) -> torch.nn.Module:
    mesh = DeviceMesh.from_group(rank.group, "cpu")
    for layer in model.children():
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def in_fsdp1(model: torch.nn.Module, rank: Rank) -> torch.nn.Module:
    device = torch.device("cpu")
    last = FullyShardedDataParallel(model.get_submodule("3"), rank.group, device_id=device, use_orig_params=True)
    model.register_module("3", last)
    return FullyShardedDataParallel(model, rank.group, device_id=device, use_orig_params=True)


WRAPPERS: dict[str, Callable[[torch.nn.Module, Rank], torch.nn.Module]] = {
    "ddp": in_ddp,
    "fsdp2": in_fsdp2,
    "fsdp1": in_fsdp1,
    "none": lambda model, rank: model,  # noqa: ARG005
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def joined(
    rank: Rank, address: str, wrapper: str, model: torch.nn.Module, num_worker: int = 2, **options: Any
) -> tuple[torch.nn.Module, ModelAverageOptimizer]:
    """A rank's model, wrapped, and its optimizer."""
    getter = ModelAverageCustomGetter("cpu")
    wrapped = getter(WRAPPERS[wrapper](model, rank)) if wrapper == "fsdp1" else WRAPPERS[wrapper](getter(model), rank)
    session = None
    if rank.is_leader:
        session = ParameterServerSession([address], worker_id=f"worker-{rank.worker}", is_chief=rank.worker == 0)
    opt = ModelAverageOptimizer(
        sgd(wrapped.parameters()),
        num_worker,
        rank.worker == 0,
        getter,
        session=session,
        process_group=rank.group,
        **{"interval_steps": INTERVAL_STEPS, **options},
    )
    return wrapped, opt


def step(model: torch.nn.Module, opt: ModelAverageOptimizer, rank: Rank, number: int) -> None:
    inputs, labels = batch(rank.worker, rank.rank, number)
    opt.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
    opt.step()


def close(opt: ModelAverageOptimizer, rank: Rank) -> None:
    opt.close()
    if rank.is_leader:
        opt.session.close()


def train(rank: Rank, address: str, wrapper: str, steps: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """A whole training; returns what this rank has at its end."""
    model, opt = joined(rank, address, wrapper, net(rank.worker), **options)
    try:
        with opt.make_session_run_hook():
            for number in range(steps):
                step(model, opt, rank, number)
        return {"values": whole(model), "global_step": opt.global_step, "local_step": opt.local_step}
    finally:
        close(opt, rank)


def whole(model: torch.nn.Module) -> Values:
    """The model's floating-point tensors; whole ones, if they are sharded."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return _values(model)
    return _values(model)


def _values(model: torch.nn.Module) -> Values:
    found = Values()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            plain = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
            found[name.replace("module.", "").replace("_fsdp_wrapped_module.", "")] = plain.clone().numpy()
    return found


def train_plain(place: Rank, address: str, steps: int, options: Mapping[str, Any]) -> Values:
    """The same training by a worker of one process: the leader's. It adds halves of the gradients, as DDP's ranks
    do."""
    if not place.is_leader:
        return {}
    worker = place.worker
    getter = ModelAverageCustomGetter("cpu")
    model = getter(net(worker))
    with ParameterServerSession([address], worker_id=f"worker-{worker}", is_chief=worker == 0) as session:
        opt = ModelAverageOptimizer(
            sgd(model.parameters()),
            2,
            worker == 0,
            getter,
            session=session,
            **{"interval_steps": INTERVAL_STEPS, **options},
        )
        with opt.make_session_run_hook():
            for number in range(steps):
                opt.zero_grad()
                statistics = [buffer.clone() for buffer in model.buffers()]
                for rank in range(RANKS_PER_WORKER):
                    # Each rank begins its step with the statistics of rank 0, and rank 0's are what counts.
                    if rank == 1:
                        own = [buffer.clone() for buffer in model.buffers()]
                        _set(model, statistics)
                    inputs, labels = batch(worker, rank, number)
                    loss = torch.nn.functional.cross_entropy(model(inputs), labels) / RANKS_PER_WORKER
                    loss.backward()  # type: ignore[no-untyped-call]
                _set(model, own)
                opt.step()
        return {name: np.copy(value) for name, value in whole(model).items()}


def _set(model: torch.nn.Module, buffers: list[torch.Tensor]) -> None:
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
