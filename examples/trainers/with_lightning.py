"""Lightning on several workers: a callback wraps the optimizer that the LightningModule returns.

Needs `pip install 'torch-model-average[torch,trainers]'`. Run it from the repository:

    ma-launch --workers 2 -- examples/trainers/with_lightning.py

docs/trainers.md says how to start it with torchrun, so that each worker is a group of several processes.
"""

from __future__ import annotations

import os

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ma_client import ClusterSpec, ModelAverageCustomGetter, ModelAverageHook, ModelAverageOptimizer

ROUNDS, INTERVAL_STEPS, BATCH_SIZE = 12, 25, 32


class ModelAverageCallback(lightning.Callback):
    """Averages the models of all workers every ``interval_steps`` optimizer steps.

    The environment tells which worker this is (`ClusterSpec.from_env`). With several optimizers, the callback counts
    the steps of the first and averages the whole model. Lightning's checkpoints include its state.
    """

    def __init__(self, interval_steps: int = 100) -> None:
        self.interval_steps = interval_steps
        self.optimizer: ModelAverageOptimizer | None = None
        self._hook: ModelAverageHook | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wraps the module's optimizer, before Lightning restores it from a checkpoint."""
        getter = ModelAverageCustomGetter(worker_device=pl_module.device)
        getter(trainer.model)  # the module, in its wrapper if it has one
        self.optimizer = ModelAverageOptimizer(
            trainer.optimizers[0],
            num_worker=None,
            is_chief=None,
            ma_custom_getter=getter,
            interval_steps=self.interval_steps,
            process_group=torch.distributed.group.WORLD,  # None, unless Lightning has several processes: one worker
        )
        trainer.strategy.optimizers = [self.optimizer, *trainer.optimizers[1:]]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        """The chief initializes the center; everyone starts from it."""
        assert self.optimizer is not None
        self._hook = self.optimizer.make_session_run_hook()
        self._hook.__enter__()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        """Leaves the hook normally: makes the last round."""
        self._leave(None)

    def on_exception(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,  # noqa: ARG002
        exception: BaseException,
    ) -> None:
        """Leaves the hook as a `with` statement would on an exception."""
        self._leave(exception)

    def _leave(self, error: BaseException | None) -> None:
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.__exit__(None if error is None else type(error), error, None if error is None else error.__traceback__)


class Circle(lightning.LightningModule):
    """Class 1 inside a circle, class 0 outside. It does not know about other workers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.net(x)
        return scores

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:  # noqa: ARG002
        x, y = batch
        self.log("accuracy", (self(x).argmax(dim=1) == y).float().mean(), batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)}


def points(count: int, seed: int) -> TensorDataset:
    x = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return TensorDataset(x, (x.norm(dim=1) < 0.75).long())


def main() -> None:
    cluster = ClusterSpec.from_env()  # from the launcher's environment
    lightning.seed_everything(cluster.task_index, verbose=False)
    x, y = (part[cluster.task_index :: cluster.num_workers] for part in points(4000, seed=0).tensors)  # its share
    callback = ModelAverageCallback(INTERVAL_STEPS)
    trainer = lightning.Trainer(
        max_steps=ROUNDS * INTERVAL_STEPS,
        # Under torchrun its processes are this worker; otherwise there is one process, whatever Slurm says.
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        plugins=[] if TorchElasticEnvironment.detect() else [LightningEnvironment()],
        accelerator="auto",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Circle()
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE, shuffle=True))
    assert callback.optimizer is not None
    (result,) = trainer.test(model, DataLoader(points(1000, seed=1), batch_size=1000), verbose=False)
    if trainer.is_global_zero:
        print(f"rounds: {callback.optimizer.global_step}")
        print(f"accuracy of the center: {result['accuracy']:.3f}")  # on every worker, the model is now the center


if __name__ == "__main__":
    main()
