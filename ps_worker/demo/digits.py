"""The built-in workload: a small convolutional network learns the handwritten digits that scikit-learn bundles.

Source of the data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998: 1,797 images of 8 x 8 pixels.

Measured with the defaults and two workers over the seeds 0 to 9 (`python -m bench.outer --seeds 10`), test accuracy and
loss, mean and standard deviation: the center 0.991 +- 0.004, 0.029 +- 0.012; with plain averages 0.992 +- 0.003, 0.031
+- 0.011; worker 0 alone 0.978 +- 0.007, 0.066 +- 0.021; one worker alone with all images 0.989 +- 0.004, 0.031 +-
0.010. One of the 360 test images is 0.0028. docs/training.md says how the defaults were found.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ma_client import (
    ClusterSpec,
    ModelAverageCustomGetter,
    ModelAverageHook,
    ModelAverageOptimizer,
    ParameterServerSession,
    Security,
)
from modelaverage.commands.slow import says_if_slow
from ps_worker.demo.digits_config import ALONE, ALONE_WITH_ALL, DigitsConfig
from ps_worker.demo.stopping import says_what_follows
from ps_worker.events.parse import AccuracyEvent, Event, RoundEvent, StepEvent

__all__ = [
    "DigitsData",
    "DigitsNet",
    "Images",
    "Meter",
    "Report",
    "accuracy",
    "batches_of",
    "initial_model",
    "local_optimizer",
    "mean_loss",
    "train_alone",
    "train_in_cluster",
]

_TEST_PART = 0.2
_SPLIT_SEED = 2
_STEPS_PER_EVENT = 10

Report = Callable[[Event], None]


class DigitsNet(nn.Module):
    """Two convolutions, one pooling, one linear layer; 10 logits for each 8 x 8 image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.classify = nn.Linear(32 * 4 * 4, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, [N, 10], for pixels from 0 to 1, [N, 1, 8, 8]."""
        hidden = self.conv2(self.conv1(pixels).relu()).relu()
        logits: Tensor = self.classify(nn.functional.max_pool2d(hidden, 2).flatten(1))
        return logits


@dataclass(frozen=True)
class Images:
    """Pixels from 0 to 1, [N, 1, 8, 8], and the digit of each, [N]."""

    pixels: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.digits[index])

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Images]:
        """Endless batches. Each pass shuffles the images again and drops those that do not fill a batch."""
        while True:
            order = torch.randperm(len(self), generator=generator)
            for start in range(0, len(self) - batch_size + 1, batch_size):
                yield self[order[start : start + batch_size]]


@dataclass(frozen=True)
class DigitsData:
    """The images in a fixed split: 80 % to train, 20 % to test, every digit in the same proportion."""

    train: Images
    test: Images

    @classmethod
    def load(cls) -> DigitsData:
        """Reads the files that scikit-learn includes."""
        bunch = load_digits()
        train, test = train_test_split(
            torch.arange(len(bunch.target)), test_size=_TEST_PART, random_state=_SPLIT_SEED, stratify=bunch.target
        )
        images = Images(torch.from_numpy(bunch.images).float().unsqueeze(1) / 16, torch.from_numpy(bunch.target))
        return cls(images[train], images[test])

    def part(self, num_workers: int, task_index: int, batch_size: int) -> Images:
        """One worker's share of the training images: 1/``num_workers`` of them; no two shares overlap.

        Raises:
            ValueError: the share is smaller than a batch, or there is no such worker.
        """
        if task_index >= num_workers:
            raise ValueError(f"--task-index {task_index} is not below --num-workers {num_workers}")
        part = self.train[slice(task_index, None, num_workers)]
        if len(part) < batch_size:
            raise ValueError(f"--batch-size {batch_size} is more than the {len(part)} images of a worker's part")
        return part


def accuracy(model: nn.Module, images: Images) -> float:
    """The fraction (0 to 1) of the images that the model classifies correctly."""
    with torch.no_grad():
        right = int((model(images.pixels).argmax(1) == images.digits).sum())
    return right / len(images)


def mean_loss(model: nn.Module, images: Images) -> float:
    """The mean cross-entropy of the images, in nats."""
    with torch.no_grad():
        return nn.functional.cross_entropy(model(images.pixels), images.digits).item()


def train_in_cluster(
    config: DigitsConfig,
    cluster: ClusterSpec,
    report: Report,
    connect_timeout_s: float = 30.0,
    save_center: Path | None = None,
    security: Security | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> None:
    """Trains as one worker of ``cluster``; the chief also evaluates the center after each round.

    Progress is counted in completed rounds: a worker that is restarted makes only the remaining steps, on the images
    that an uninterrupted worker would have used for them.

    Args:
        config: how to train.
        cluster: the servers, and which worker this is.
        report: called with each event.
        connect_timeout_s: how long to wait until the server answers.
        save_center: where the chief writes the last center, under the names of ``DigitsNet``'s state dict.
        security: as the session's.
        say: called with a line about a start that takes long.

    Raises:
        ModelAverageError: the server does not answer, a round failed, or the center has another outer optimizer or
            compression.
        ValueError: the worker's share is smaller than a batch, or the server averages another number of workers.
    """
    torch.set_num_threads(1)
    data = DigitsData.load()
    part = data.part(cluster.num_workers, cluster.task_index, config.batch_size)
    with says_if_slow(say, f"waits for the parameter server at {', '.join(cluster.ps_hosts)}"):
        session = ParameterServerSession(
            cluster.ps_hosts,
            worker_id=cluster.worker_id,
            is_chief=cluster.is_chief,
            connect_timeout_s=connect_timeout_s,
            init_from=cluster.init_from,
            must_be_new=cluster.must_be_new,
            security=security,
        )
    with session:
        getter = ModelAverageCustomGetter(worker_device="cpu")
        model = getter(initial_model(config))
        optimizer = ModelAverageOptimizer(
            local_optimizer(model, config),
            num_worker=cluster.num_workers,
            is_chief=cluster.is_chief,
            ma_custom_getter=getter,
            interval_steps=config.interval_steps,
            session=session,
            outer_optimizer=config.outer,
            compression=config.compression,
        )
        hook = optimizer.make_session_run_hook()
        with says_what_follows(session, lambda: optimizer.local_step, config.steps), _begun(hook, cluster, say):
            steps_done = min(config.steps, optimizer.global_step * config.interval_steps)
            _set_local_step(optimizer, steps_done)
            meter = Meter(cluster.worker_id, config, report, session, steps_done, optimizer.global_step)

            def evaluate() -> None:
                if cluster.is_chief:
                    meter.evaluated(model, data.test)

            def after_interval() -> None:
                if optimizer.last_round is not None:
                    meter.round_done(optimizer.last_round.global_step, optimizer.last_round.waited_s)
                evaluate()

            if steps_done == config.steps:  # the process that made them may have died before it could report that
                evaluate()
            _train(model, optimizer, part, config, cluster.task_index, meter, after_interval, steps_done)
    if cluster.is_chief and save_center is not None:
        save_file(model.state_dict(), save_center)


@contextmanager
def _begun(hook: ModelAverageHook, cluster: ClusterSpec, say: Callable[[str], object]) -> Iterator[None]:
    """The hook's context; says so if the center does not come soon."""
    waits_for = "sends the center" if cluster.is_chief else "waits for worker-0, the chief, to initialize the center"
    with ExitStack() as stack:
        with says_if_slow(say, waits_for):
            stack.enter_context(hook)
        yield


def train_alone(
    config: DigitsConfig, num_workers: int, task_index: int, report: Report, all_images: bool = False
) -> None:
    """Trains without a server on what worker ``task_index`` of ``num_workers`` would have; the rest is the same.

    With ``all_images`` it trains on all images, with the same number of steps, batch size and initial values.

    Raises:
        ValueError: the share is smaller than a batch, or there is no such worker.
    """
    torch.set_num_threads(1)
    data = DigitsData.load()
    part = data.train if all_images else data.part(num_workers, task_index, config.batch_size)
    model = initial_model(config)
    meter = Meter(ALONE_WITH_ALL if all_images else ALONE, config, report)
    _train(
        model,
        local_optimizer(model, config),
        part,
        config,
        task_index,
        meter,
        after_interval=lambda: meter.evaluated(model, data.test),
    )


class Meter:
    """Reports one worker's training as events.

    Args:
        worker: its name.
        config: how it trains.
        report: called with each event.
        session: of the worker; None: it trains alone.
        steps_done: before this process.
        global_step: at its start.
    """

    def __init__(
        self,
        worker: str,
        config: DigitsConfig,
        report: Report,
        session: ParameterServerSession | None = None,
        steps_done: int = 0,
        global_step: int = 0,
    ) -> None:
        self._worker = worker
        self._batch_size = config.batch_size
        self._steps = config.steps
        self._report = report
        self._session = session
        self._step = steps_done
        self._global_step = global_step
        self._waited_s = 0.0
        self._losses: list[float] = []
        self._since_s = time.monotonic()

    def step_done(self, loss: float) -> None:
        """A local step is done."""
        self._step += 1
        self._losses.append(loss)

    def round_done(self, global_step: int, waited_s: float) -> None:
        """A round is done."""
        self._global_step = global_step
        self._waited_s += waited_s
        self._report(RoundEvent(self._worker, time.time(), self._step, global_step, waited_s))

    def evaluated(self, model: nn.Module, images: Images) -> None:
        """Evaluates the model on the test images."""
        found = accuracy(model, images), mean_loss(model, images)
        self._report(AccuracyEvent(self._worker, time.time(), self._step, self._global_step, *found))

    def report_progress_at(self, step: int) -> None:
        """Reports the steps since the last report, if one is due at this step."""
        if step % _STEPS_PER_EVENT and step != self._steps:
            return
        count, now_s = len(self._losses), time.monotonic()
        self._report(
            StepEvent(
                worker=self._worker,
                unix_time_s=time.time(),
                step=self._step,
                loss=sum(self._losses) / count,
                samples_per_s=count * self._batch_size / (now_s - self._since_s),
                waited_s=self._waited_s,
                global_step=self._global_step,
                moved_bytes=self._moved_bytes(),
            )
        )
        self._losses.clear()
        self._since_s = now_s

    def _moved_bytes(self) -> int:
        return 0 if self._session is None else self._session.sent_bytes + self._session.received_bytes


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    part: Images,
    config: DigitsConfig,
    task_index: int,
    meter: Meter,
    after_interval: Callable[[], None],
    steps_done: int = 0,
) -> None:
    batches = itertools.islice(batches_of(part, config, task_index), steps_done, config.steps)
    for step, batch in enumerate(batches, start=steps_done + 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch.pixels), batch.digits)
        loss.backward()  # type: ignore[no-untyped-call]
        loss_now = loss.item()
        if isinstance(optimizer, ModelAverageOptimizer):
            optimizer.loss = loss_now
        optimizer.step()
        meter.step_done(loss_now)
        if step % config.interval_steps == 0:
            after_interval()
        meter.report_progress_at(step)


def _set_local_step(optimizer: ModelAverageOptimizer, local_step: int) -> None:
    state = optimizer.state_dict()
    state["model_average"]["local_step"] = local_step
    optimizer.load_state_dict(state)


def batches_of(part: Images, config: DigitsConfig, task_index: int) -> Iterator[Images]:
    """A worker's batches. Each worker has its own order of images; the lone worker has the order of the worker whose
    share it trains on."""
    return part.batches(config.batch_size, torch.Generator().manual_seed(1000 * config.seed + task_index))


def initial_model(config: DigitsConfig) -> DigitsNet:
    """The model before training."""
    torch.manual_seed(config.seed)
    return DigitsNet()


def local_optimizer(model: nn.Module, config: DigitsConfig) -> torch.optim.SGD:
    """A worker's optimizer."""
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum)
