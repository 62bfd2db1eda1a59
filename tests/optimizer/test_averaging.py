"""What the optimizer averages, bit for bit, under which lock, and what a failed round leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from modelaverage.errors import ConflictError, DeadlineExceededError, ServerUnavailableError
from ps_server.rules.policy import RoundPolicy
from tests.conftest import StartServer
from tests.optimizer.workers import (
    QUIET_S,
    TIMEOUT_S,
    Announced,
    Impatient,
    Join,
    Net,
    Overtaken,
    Running,
    ShortPatience,
    Worker,
    center_of,
    start_all,
    together,
    wait_for_status,
)

pytestmark = pytest.mark.in_memory

# Locking.


def test_the_local_update_waits_for_the_holder_of_the_lock(alone: Join) -> None:
    worker = alone(interval_steps=100)
    worker.give(w=1.0)
    with worker.opt.lock:
        step = Running(worker.opt.step)
        assert not step.finishes_within(QUIET_S)
        assert worker.values()["w"] == [1.0] * 3
    step.result()
    assert worker.values()["w"] == [0.0] * 3


def test_the_install_waits_for_the_holder_of_the_lock(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2, session_class=Announced) for index in range(2)]
    start_all(workers)
    read, other = workers
    assert isinstance(read.session, Announced)
    read.give(w=2.0)
    other.give(w=4.0)
    step = Running(read.opt.step)
    assert read.session.push_begins.wait(TIMEOUT_S)
    assert read.opt.lock.acquire(timeout=TIMEOUT_S)
    try:
        together(other.opt.step)
        assert read.session.push_is_over.wait(TIMEOUT_S)
        assert not step.finishes_within(QUIET_S)
        assert read.values()["w"] == [-1.0] * 3
    finally:
        read.opt.lock.release()
    step.result()
    assert read.values()["w"] == [-2.0] * 3


def test_the_lock_is_free_while_a_worker_waits_at_the_barrier(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2) for index in range(2)]
    start_all(workers)
    first, second = workers
    step = Running(lambda: first.step(w=2.0))
    wait_for_status(server, lambda status: any(w.worker_id == "worker-0" and w.waiting for w in status.workers))
    assert first.opt.lock.acquire(timeout=TIMEOUT_S)
    first.opt.lock.release()
    second.step(w=4.0)
    step.result()


class WatchedLock:
    """A lock that calls a function just after it is taken and just before it is released."""

    def __init__(self, look: Callable[[], object]) -> None:
        self._look = look
        self.seen = list[object]()

    def __enter__(self) -> WatchedLock:
        self.seen.append(self._look())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seen.append(self._look())


def test_whenever_the_lock_is_free_the_model_is_whole(alone: Join) -> None:
    worker = alone(interval_steps=2)
    watched = WatchedLock(worker.values)
    worker.opt.lock = watched  # type: ignore[assignment]
    start, trained = worker.values(), {"w": [-4.0] * 3, "b": [-3.0] * 3}
    worker.step(w=5.0, b=5.0)
    worker.opt.get_init_op()()
    assert watched.seen == [start, trained, trained, start]


def test_without_use_locking_no_lock_is_taken(alone: Join) -> None:
    worker = alone(use_locking=False)
    with worker.opt.lock:
        Running(lambda: worker.step(w=1.0)).result()
    assert worker.opt.global_step == 1


# Which variables, and which bits.


def average_of_equals(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Sums, then divides, as the server does."""
    total = np.zeros_like(values)
    for _ in range(count):
        total += values
    average: NDArray[np.float32] = total / np.float32(count)
    return average


def drifting_value(count: int) -> float:
    """A number such that in float32 the average of ``count`` equal values differs from it."""
    values = np.linspace(0.1, 1.0, 1000, dtype=np.float32)
    return float(values[average_of_equals(values, count) != values][0])


def test_a_variable_without_a_gradient_keeps_its_bits_everywhere(start_server: StartServer, join: Join) -> None:
    count = 7
    value = drifting_value(count)
    server = start_server(count)
    workers = [join(server, Net(b=value), index=index, num_worker=count) for index in range(count)]
    start_all(workers)
    for _ in range(2):
        together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    for worker in workers:
        assert worker.values() == {"w": [-1.0] * 3, "b": [value] * 3}
    assert center_of(server)["b"].tolist() == [value] * 3


def test_untouched_means_in_this_round(start_server: StartServer, join: Join) -> None:
    count = 7
    values = np.linspace(0.1, 1.0, 10_000, dtype=np.float32)
    once = average_of_equals(values, count)
    start, expected = next(
        (float(value), float(first))
        for value, first, second in zip(values, once, average_of_equals(once, count), strict=True)
        if value != first != second
    )
    server = start_server(count)
    workers = [join(server, Net(b=start), index=index, num_worker=count) for index in range(count)]
    start_all(workers)
    together(*((lambda worker=worker: worker.step(b=0.0)) for worker in workers))
    assert workers[0].values()["b"] == [expected] * 3
    together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    assert [worker.values()["b"] for worker in workers] == [[expected] * 3] * count


def test_a_gradient_in_any_step_of_the_interval_touches(alone: Join) -> None:
    worker = alone(interval_steps=2)
    worker.step(w=1.0)
    worker.step(b=1.0)
    center, _ = worker.session.pull(timeout_s=TIMEOUT_S)
    assert {name: value.tolist() for name, value in center.items()} == {"w": [0.0] * 3, "b": [1.0] * 3}


def test_a_gradient_of_none_on_one_worker_is_averaged_like_the_others(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2) for index in range(2)]
    start_all(workers)
    first, second = workers
    together(lambda: first.step(w=1.0, b=2.0), lambda: second.step(w=1.0))
    assert first.values() == second.values() == {"w": [0.0] * 3, "b": [1.0] * 3}


def test_a_parameter_that_the_optimizer_does_not_update_keeps_its_bits(start_server: StartServer, join: Join) -> None:
    count = 3
    value = drifting_value(count)
    server = start_server(count)
    workers = [
        join(
            server,
            Net(b=value),
            index=index,
            num_worker=count,
            local=lambda own: torch.optim.SGD([next(own)], lr=1.0),
        )
        for index in range(count)
    ]
    start_all(workers)
    together(*((lambda worker=worker: worker.step(w=1.0, b=1.0)) for worker in workers))
    assert [worker.values()["b"] for worker in workers] == [[value] * 3] * count


def test_a_parameter_that_another_optimizer_updates_is_averaged(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [
        join(server, index=index, num_worker=2, local=lambda own: torch.optim.SGD([next(own)], lr=1.0))
        for index in range(2)
    ]
    start_all(workers)
    for worker, rate in zip(workers, (1.0, 3.0), strict=True):
        worker.give(b=1.0)
        torch.optim.SGD([worker.model.get_parameter("b")], lr=rate).step()
    together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    assert [worker.values()["b"] for worker in workers] == [[0.0] * 3] * 2


def batch_norm() -> torch.nn.Module:
    return torch.nn.BatchNorm1d(2, momentum=0.5)


def test_floating_point_buffers_are_averaged_and_integer_buffers_stay_local(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(2)
    workers = [join(server, batch_norm(), index=index, num_worker=2) for index in range(2)]
    start_all(workers)

    def train(worker: Worker, batches: int, value: float) -> None:
        for _ in range(batches):
            worker.model(torch.full((4, 2), value))
        worker.step()

    together(lambda: train(workers[0], 1, 2.0), lambda: train(workers[1], 2, 4.0))
    # 0 -> 1 on the first worker, 0 -> 2 -> 3 on the second.
    for worker, batches in zip(workers, (1, 2), strict=True):
        assert worker.model.get_buffer("running_mean").tolist() == [2.0, 2.0]
        assert worker.model.get_buffer("running_var").tolist() == [0.375, 0.375]
        assert worker.model.get_buffer("num_batches_tracked").item() == batches
    assert set(center_of(server)) == {"weight", "bias", "running_mean", "running_var"}


def test_without_average_buffers_exactly_what_is_trained_is_averaged(alone: Join) -> None:
    worker = alone(batch_norm(), average_buffers=False)
    worker.model(torch.full((4, 2), 2.0))
    worker.step(weight=1.0)
    assert set(worker.session.pull(timeout_s=TIMEOUT_S)[0]) == {"weight", "bias"}
    assert worker.model.get_buffer("running_mean").tolist() == [1.0, 1.0]


class RunningMean(torch.nn.Module):
    """Updates a buffer as is common: by assigning a new tensor to it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x
        return self.w * x


def test_a_buffer_that_the_model_replaces_is_averaged(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, RunningMean(), index=index, num_worker=2) for index in range(2)]
    start_all(workers)
    for worker, value in zip(workers, (2.0, 4.0), strict=True):
        worker.model(torch.full((3,), value))
    together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    assert [worker.model.get_buffer("mean").tolist() for worker in workers] == [[1.5] * 3] * 2


@pytest.mark.parametrize("value", [drifting_value(3), torch.finfo(torch.float32).min])
def test_a_buffer_that_nobody_changed_keeps_its_bits(value: float, start_server: StartServer, join: Join) -> None:
    count = 3
    server = start_server(count)
    workers = []
    for index in range(count):
        model = Net()
        model.register_buffer("mask", torch.full((3,), value))
        workers.append(join(server, model, index=index, num_worker=count))
    start_all(workers)
    together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    assert [worker.model.get_buffer("mask").tolist() for worker in workers] == [[value] * 3] * count


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2, bias=False)
        self.outer = torch.nn.Linear(2, 2, bias=False)
        self.outer.weight = self.inner.weight


def test_tied_weights_count_once_and_stay_tied(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, Tied(), index=index, num_worker=2) for index in range(2)]
    start_all(workers)
    start = workers[0].model.get_parameter("inner.weight").detach().clone()
    first, second = workers
    together(lambda: first.step(**{"inner.weight": 1.0}), lambda: second.step(**{"inner.weight": 3.0}))
    assert set(center_of(server)) == {"inner.weight"}
    for worker in workers:
        assert worker.model.get_parameter("outer.weight") is worker.model.get_parameter("inner.weight")
        torch.testing.assert_close(worker.model.get_parameter("outer.weight").detach(), start - 2.0)


def test_frozen_parameters_are_not_sent(start_server: StartServer, join: Join) -> None:
    server = start_server(1)
    model = Net()
    model.b.requires_grad_(False)
    worker = join(server, model)
    worker.start()
    worker.step(w=1.0)
    assert set(center_of(server)) == {"w"}
    assert worker.values() == {"w": [0.0] * 3, "b": [2.0] * 3}


class Assorted(torch.nn.Module):
    """A model with every element type and every unusual shape."""

    def __init__(self) -> None:
        super().__init__()
        tensors = {
            "in_float32": torch.full((2, 3), 2.0),
            "in_float64": torch.full((3,), 2.0, dtype=torch.float64),
            "in_float16": torch.full((5,), 2.0, dtype=torch.float16),
            "in_bfloat16": torch.full((3, 1), 2.0, dtype=torch.bfloat16),
            "scalar": torch.tensor(2.0),
            "bfloat16_scalar": torch.tensor(2.0, dtype=torch.bfloat16),
            "empty": torch.zeros(0, 4),
            "transposed": torch.full((2, 3), 2.0).t(),
            "strided": torch.full((6,), 2.0, dtype=torch.bfloat16)[::2],
        }
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))


def test_all_element_types_and_shapes_are_averaged_in_one_model(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, Assorted(), index=index, num_worker=2) for index in range(2)]
    layout = {name: (p.dtype, p.shape, p.stride()) for name, p in workers[0].model.named_parameters()}
    start_all(workers)
    first, second = workers
    together(lambda: first.step(**dict.fromkeys(layout, 1.0)), lambda: second.step(**dict.fromkeys(layout, -4.0)))
    for worker in workers:
        for name, parameter in worker.model.named_parameters():
            assert (parameter.dtype, parameter.shape, parameter.stride()) == layout[name]
            assert torch.equal(parameter.detach(), torch.full_like(parameter, 3.5)), name


def test_sixteen_bit_variables_do_not_overflow_on_the_way_to_their_average(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(2)
    largest = torch.finfo(torch.float16).max
    workers = [
        join(
            server, torch.nn.ParameterDict({"x": torch.full((3,), largest, dtype=torch.float16)}), index=i, num_worker=2
        )
        for i in range(2)
    ]
    start_all(workers)
    together(*((lambda worker=worker: worker.step(x=0.0)) for worker in workers))
    assert workers[0].values() == workers[1].values() == {"x": [largest] * 3}


def test_a_sparse_gradient_is_applied_and_the_whole_variable_averaged(alone: Join) -> None:
    worker = alone(torch.nn.Embedding(4, 2, sparse=True))
    before = worker.model.get_parameter("weight").detach().clone()
    worker.opt.minimize(lambda: worker.model(torch.tensor([1, 1])).sum(), global_step=0)
    after = worker.model.get_parameter("weight").detach()
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(after[1], before[1] - 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use (CUDA)")
def test_parameters_on_a_gpu_are_averaged(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, Assorted(), index=index, num_worker=2, worker_device="cuda") for index in range(2)]
    start_all(workers)
    first, second = workers
    names = [name for name, _ in first.model.named_parameters()]
    together(lambda: first.step(**dict.fromkeys(names, 1.0)), lambda: second.step(**dict.fromkeys(names, -4.0)))
    for worker in workers:
        for name, parameter in worker.model.named_parameters():
            assert parameter.is_cuda
            assert torch.equal(parameter.detach(), torch.full_like(parameter, 3.5)), name


# Misfits and failures.


@pytest.mark.parametrize("index", [0, 1], ids=["chief", "other"])
def test_a_model_that_does_not_fit_the_center_is_refused_naming_variable_and_shapes(
    index: int, start_server: StartServer, join: Join
) -> None:
    server = start_server(2)
    join(server, num_worker=2).start()
    model = Net()
    model.b = torch.nn.Parameter(torch.zeros(2, 2))
    misfit = join(server, model, index=index, num_worker=2)
    with pytest.raises(ConflictError, match=r"variable 'b' is float32\[2, 2\] .* but float32\[3\]") as refused:
        misfit.start()
    assert "\n" not in str(refused.value)
    assert misfit.values() == {"w": [1.0] * 3, "b": [[0.0, 0.0], [0.0, 0.0]]}


def test_a_round_that_fails_leaves_the_local_variables_untouched(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    worker = join(server, num_worker=2, session_class=Impatient)
    worker.start()
    step = Running(lambda: worker.step(w=1.0, b=1.0))
    wait_for_status(server, lambda status: any(w.worker_id == "worker-0" and w.waiting for w in status.workers))
    server.stop()
    with pytest.raises(ServerUnavailableError):
        step.result()
    assert worker.values() == {"w": [0.0] * 3, "b": [1.0] * 3}
    assert (worker.opt.local_step, worker.opt.global_step, worker.opt.last_round) == (1, 0, None)


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux's memfd")
def test_rounds_that_go_on_without_a_worker_never_tear_the_model_that_it_installs(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(RoundPolicy(num_workers=2, min_workers=1, max_workers=2, grace_s=0.05), shared=True)
    slow, quick = (join(server, index=i, num_worker=2, session_class=Overtaken) for i in range(2))
    start_all([slow, quick])
    assert isinstance(slow.session, Overtaken)

    together(lambda: slow.step(w=1.0, b=1.0), lambda: quick.step(w=1.0, b=1.0))

    def two_rounds_more() -> None:  # after which the memory of the first average has been overwritten
        same_round.result()
        for _ in range(2):
            quick.step(w=8.0, b=8.0)

    slow.session.meanwhile = two_rounds_more
    same_round = Running(lambda: quick.step(w=1.0, b=1.0))
    slow.step(w=1.0, b=1.0)
    assert slow.opt.global_step == quick.opt.global_step == 4
    assert slow.values() == quick.values()


def test_a_round_that_failed_can_be_tried_again(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2, session_class=ShortPatience) for index in range(2)]
    start_all(workers)
    first, second = workers
    assert isinstance(first.session, ShortPatience)
    first.session.patience_s = QUIET_S
    with pytest.raises(DeadlineExceededError, match="the round did not commit"):
        first.step(w=1.0, b=1.0)
    assert first.values() == {"w": [0.0] * 3, "b": [1.0] * 3}
    first.session.patience_s = None
    together(first.opt.average, lambda: second.step(w=3.0, b=3.0))
    assert first.values() == second.values() == {"w": [-1.0] * 3, "b": [0.0] * 3}
    assert (first.opt.local_step, first.opt.global_step) == (1, 1)
