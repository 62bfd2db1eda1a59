"""A model of your own, trained by several workers, each on its own share of the data.

Run it from the repository:

    ma-launch --workers 2 -- examples/train.py
"""

from __future__ import annotations

import torch
from torch import nn

from ma_client import ClusterSpec, ModelAverageCustomGetter, ModelAverageOptimizer

ROUNDS, INTERVAL_STEPS, BATCH_SIZE = 12, 25, 32


def points(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a square; class 1 inside a circle, class 0 outside."""
    x = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return x, (x.norm(dim=1) < 0.75).long()


def main() -> None:
    cluster = ClusterSpec.from_env()  # from the launcher's environment
    torch.manual_seed(cluster.task_index)
    x, y = (part[cluster.task_index :: cluster.num_workers] for part in points(2000, seed=0))  # this worker's share

    getter = ModelAverageCustomGetter(worker_device="cpu")
    model = getter(nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = ModelAverageOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        num_worker=cluster.num_workers,
        is_chief=cluster.is_chief,
        ma_custom_getter=getter,
        interval_steps=INTERVAL_STEPS,
    )
    # The chief initializes the center, and everyone starts from it. Leaving the hook averages the remaining steps.
    with optimizer.make_session_run_hook():
        while optimizer.global_step < ROUNDS:  # so a restarted worker makes only the remaining rounds
            for _ in range(INTERVAL_STEPS):
                rows = torch.randint(len(x), (BATCH_SIZE,))
                optimizer.zero_grad()
                loss_fn(model(x[rows]), y[rows]).backward()
                optimizer.step()  # every INTERVAL_STEPS of these, the model becomes the average of all workers
            print(f"round {optimizer.global_step}: loss {loss_fn(model(x), y).item():.3f}")

    x, y = points(1000, seed=1)
    accuracy = (model(x).argmax(dim=1) == y).float().mean().item()  # on every worker, the model is now the center
    print(f"accuracy of the center: {accuracy:.3f}")


if __name__ == "__main__":
    main()
