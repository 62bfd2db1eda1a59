"""A training loop with accelerate on several workers: `prepare` takes the optimizer like any other.

Needs `pip install 'torch-model-average[torch,trainers]'`. Run it from the repository:

    ma-launch --workers 2 -- examples/trainers/with_accelerate.py

docs/trainers.md says how to start it with torchrun, so that each worker is a group of several processes.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ma_client import ClusterSpec, ModelAverageCustomGetter, ModelAverageOptimizer

ROUNDS, INTERVAL_STEPS, BATCH_SIZE, ACCUMULATE = 12, 25, 32, 2


def points(count: int, seed: int) -> TensorDataset:
    """Points of a square; class 1 inside a circle, class 0 outside."""
    x = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return TensorDataset(x, (x.norm(dim=1) < 0.75).long())


def main() -> None:
    cluster = ClusterSpec.from_env()  # from the launcher's environment
    set_seed(cluster.task_index)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)  # mixed_precision="bf16" also works
    x, y = (part[cluster.task_index :: cluster.num_workers] for part in points(4000, seed=0).tensors)  # its share

    getter = ModelAverageCustomGetter(worker_device=accelerator.device)
    model = getter(nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)))
    averaging = ModelAverageOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        num_worker=cluster.num_workers,
        is_chief=cluster.is_chief,
        ma_custom_getter=getter,
        interval_steps=INTERVAL_STEPS,
        process_group=torch.distributed.group.WORLD,  # None, unless accelerate has several processes: one worker
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, averaging, loader)

    with averaging.make_session_run_hook():  # the chief initializes the center; everyone starts from it
        while averaging.global_step < ROUNDS:  # so a restarted worker makes only the remaining rounds
            for inputs, labels in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                    accelerator.backward(loss)
                    optimizer.step()  # local_step counts updates, not batches
                    optimizer.zero_grad()
                if averaging.global_step == ROUNDS:
                    break
    accelerator.print(f"rounds: {averaging.global_step}")

    inputs, labels = (part.to(accelerator.device) for part in points(1000, seed=1).tensors)
    accuracy = (model(inputs).argmax(dim=1) == labels).float().mean().item()  # the model is now the center
    accelerator.print(f"accuracy of the center: {accuracy:.3f}")


if __name__ == "__main__":
    main()
