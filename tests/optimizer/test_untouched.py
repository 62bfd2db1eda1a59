"""A variable is untouched only if it holds the very bytes that were installed, whatever its gradient says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession, PushResult
from ma_client.job.assembly import Assembly
from ma_client.values.raw import same_bytes
from modelaverage.errors import DeadlineExceededError
from modelaverage.manifest import Manifest, Variable
from ps_server.rules.policy import RoundPolicy
from tests.conftest import StartServer
from tests.optimizer.workers import QUIET_S, TIMEOUT_S, Join, Net, Worker, sgd, start_all, together

pytestmark = pytest.mark.in_memory


class Telling(ParameterServerSession):
    """A session that records which variables each push called untouched."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.untouched = list[set[str]]()
        self.patience_s: float | None = None

    def push_and_average(self, variables: Mapping[str, ArrayLike], weight: float = 1.0, **options: Any) -> PushResult:
        self.untouched.append(set(options["untouched"]))
        return super().push_and_average(variables, weight, **{"timeout_s": self.patience_s, **options})


def told(worker: Worker) -> set[str]:
    """The variables that the last push called untouched."""
    assert isinstance(worker.session, Telling)
    return worker.session.untouched[-1]


@pytest.fixture
def pair(start_server: StartServer, join: Join) -> Callable[..., list[Worker]]:
    """Two started workers of one job."""

    def start(**options: Any) -> list[Worker]:
        server = start_server(2)
        workers = [join(server, index=index, num_worker=2, **options) for index in range(2)]
        start_all(workers)
        return workers

    return start


@pytest.fixture
def telling(start_server: StartServer, join: Join) -> Callable[..., Worker]:
    """start(model, ...) -> the started worker of a job of one, whose session records untouched variables."""

    def start(model: torch.nn.Module | None = None, **options: Any) -> Worker:
        worker = join(start_server(1), model, session_class=Telling, **options)
        worker.start()
        return worker

    return start


# Gradients that are gone before a round.


def test_gradients_that_are_freed_in_the_step_do_not_make_a_variable_untouched(
    pair: Callable[..., list[Worker]],
) -> None:
    workers = pair()
    for worker in workers:
        worker.local.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    together(lambda: workers[0].step(w=1.0, b=1.0), lambda: workers[1].step(w=3.0, b=5.0))
    assert workers[0].values() == workers[1].values() == {"w": [-1.0] * 3, "b": [-1.0] * 3}


def fuse_into_backward(worker: Worker) -> None:
    """torch's recipe: one optimizer per parameter, which steps and frees the gradient as soon as it is there."""
    own = {parameter: torch.optim.SGD([parameter], lr=1.0) for parameter in worker.model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        own[parameter].step()  # type: ignore[index]
        own[parameter].zero_grad()  # type: ignore[index]

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("by_hand", [True, False], ids=["average", "step"])
def test_optimizers_that_are_fused_into_backward_are_averaged(by_hand: bool, pair: Callable[..., list[Worker]]) -> None:
    workers = pair()

    def train(worker: Worker, factor: float) -> None:
        fuse_into_backward(worker)
        worker.model(torch.full((3,), factor)).sum().backward()
        (worker.opt.average if by_hand else worker.opt.step)()

    together(lambda: train(workers[0], 1.0), lambda: train(workers[1], 3.0))
    assert workers[0].values() == workers[1].values() == {"w": [-1.0] * 3, "b": [1.0] * 3}
    assert [worker.opt.local_step for worker in workers] == [0 if by_hand else 1] * 2


def test_an_inner_step_and_a_round_by_hand_are_averaged(pair: Callable[..., list[Worker]]) -> None:
    workers = pair()

    def train(worker: Worker, gradient: float) -> None:
        worker.give(w=gradient)
        worker.local.step()
        worker.opt.zero_grad()
        worker.opt.average()

    together(lambda: train(workers[0], 1.0), lambda: train(workers[1], 3.0))
    assert workers[0].values() == workers[1].values() == {"w": [-1.0] * 3, "b": [2.0] * 3}


class Decay(torch.optim.Optimizer):
    """Halves every parameter, with a gradient or without."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)


def test_weights_that_decay_without_a_gradient_are_averaged(telling: Callable[..., Worker]) -> None:
    worker = telling(local=Decay)
    worker.step()
    assert told(worker) == set()
    assert worker.session.pull(timeout_s=TIMEOUT_S)[0]["b"].tolist() == [1.0] * 3


# Changes by hand.


def fill(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.fill_(9.0)


def fill_by_data(parameter: torch.Tensor) -> None:
    parameter.data.fill_(9.0)


def replace_data(parameter: torch.Tensor) -> None:
    parameter.data = torch.full_like(parameter, 9.0)


def fill_last_by_numpy(parameter: torch.Tensor) -> None:
    parameter.detach().numpy()[-1] = 9.0


@pytest.mark.parametrize("change", [fill, fill_by_data, replace_data, fill_last_by_numpy])
def test_a_change_in_place_is_averaged(change: Callable[[torch.Tensor], None], telling: Callable[..., Worker]) -> None:
    worker = telling()
    change(worker.model.get_parameter("b"))
    worker.step(w=1.0)
    assert told(worker) == set()
    assert worker.session.pull(timeout_s=TIMEOUT_S)[0]["b"][-1] == 9.0
    assert worker.values()["b"][-1] == 9.0


def test_what_is_changed_and_changed_back_is_untouched(telling: Callable[..., Worker]) -> None:
    worker = telling()
    saved = copy.deepcopy(worker.model.state_dict())
    fill(worker.model.get_parameter("b"))
    worker.model.load_state_dict(saved)
    worker.opt.load_state_dict(worker.opt.state_dict())
    worker.step(w=1.0)
    assert told(worker) == {"b"}


def test_a_model_that_was_restored_with_other_bytes_is_averaged(telling: Callable[..., Worker]) -> None:
    worker = telling()
    worker.model.load_state_dict(Net(w=1.0, b=7.0).state_dict())
    worker.step()
    assert told(worker) == {"w"}


def test_a_base_step_that_was_restored_has_no_center_to_compare_with(telling: Callable[..., Worker]) -> None:
    worker = telling()
    old = worker.opt.state_dict()
    worker.step(w=1.0)
    worker.opt.load_state_dict(old)
    worker.step(w=1.0)
    assert [told(worker), worker.opt.global_step] == [set(), 1]


# Bytes.


@pytest.mark.parametrize("value", [float("nan"), -0.0, float("inf"), 1e-45])
def test_a_value_that_nobody_changed_is_untouched_whatever_it_is(value: float, telling: Callable[..., Worker]) -> None:
    worker = telling(Net(b=value))
    worker.step(w=1.0)
    assert told(worker) == {"b"}


def test_a_zero_that_lost_its_sign_is_averaged(telling: Callable[..., Worker]) -> None:
    worker = telling(Net(b=-0.0))
    with torch.no_grad():
        worker.model.get_parameter("b").fill_(0.0)
    worker.step(w=1.0)
    assert told(worker) == set()
    assert not np.signbit(worker.session.pull(timeout_s=TIMEOUT_S)[0]["b"]).any()


@pytest.mark.parametrize("count", [0, 1, 3, 100_000, 300_001])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_same_bytes_is_the_bytes_being_the_same(count: int, dtype: str) -> None:
    first = np.full(count, np.nan, dtype)
    assert same_bytes(first, first.copy())
    assert not same_bytes(first, np.full(count + 1, np.nan, dtype))
    assert not same_bytes(first, first.view(f"u{first.itemsize}"))
    for at in {0, count // 2, count - 1} if count else ():
        other = first.copy()
        other[at] = -np.nan
        assert not same_bytes(first, other)


def test_same_bytes_takes_arrays_as_they_lie() -> None:
    square = np.arange(300_000, dtype=np.float32).reshape(500, 600)
    assert same_bytes(square.T, square.T.copy())
    assert same_bytes(square[::2], square[::2].copy())
    assert not same_bytes(square.T, square.reshape(600, 500))


# Rounds that fail, quorums, several servers, shared memory.


def test_after_a_round_that_failed_it_is_still_known_what_is_untouched(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    first, second = (join(server, index=index, num_worker=2, session_class=Telling) for index in range(2))
    start_all([first, second])
    assert isinstance(first.session, Telling)
    first.session.patience_s = QUIET_S
    with pytest.raises(DeadlineExceededError):
        first.step(w=1.0)
    first.session.patience_s = None
    together(first.opt.average, lambda: second.step(w=1.0))
    assert first.session.untouched == [{"b"}, {"b"}]


@pytest.mark.parametrize("shared", [False, True], ids=["messages", "shared memory"])
def test_the_center_of_a_round_is_what_the_next_one_is_compared_with(
    shared: bool, start_server: StartServer, join: Join
) -> None:
    server = start_server(2, shared=shared)
    workers = [join(server, index=index, num_worker=2, session_class=Telling) for index in range(2)]
    start_all(workers)
    for round_ in range(4):
        gradient, left = ({"w": 1.0}, "b") if round_ % 2 else ({"b": 1.0}, "w")
        for worker in workers:
            worker.give(**gradient)
        together(*(worker.opt.step for worker in workers))
        assert [told(worker) for worker in workers] == [{left}] * 2
    assert [worker.values() for worker in workers] == [{"w": [-1.0] * 3, "b": [0.0] * 3}] * 2


def test_a_worker_that_rounds_with_a_quorum_have_left_behind_installs_all_of_the_center(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(RoundPolicy(num_workers=2, min_workers=1, max_workers=2, grace_s=0.05), shared=True)
    slow, quick = (join(server, index=index, num_worker=2, session_class=Telling) for index in range(2))
    start_all([slow, quick])
    together(lambda: slow.step(w=1.0), lambda: quick.step(w=1.0))
    for _ in range(2):
        quick.step(b=4.0)
    quick.step(w=1.0)  # the last round leaves b alone, and those before it did not
    slow.step(w=1.0)
    assert slow.values() == quick.values() == {"w": [-1.0] * 3, "b": [-6.0] * 3}


@pytest.mark.parametrize("placement", ["balanced", "round_robin"])
@pytest.mark.parametrize("shared", [False, True], ids=["messages", "shared memory"])
def test_what_lies_on_several_servers_is_untouched_as_a_whole(
    placement: str, shared: bool, start_server: StartServer
) -> None:
    hosts = [start_server(1, shared=shared).address for _ in range(2)]
    sizes = {"first": 40, "large": 100, "last": 40}
    model = torch.nn.ParameterDict({name: torch.ones(size) for name, size in sizes.items()})
    options: dict[str, Any] = {"placement": placement, "fragment_size_bytes": 64}
    session = Telling(hosts, worker_id="chief", is_chief=True, **options)
    with session:
        getter = ModelAverageCustomGetter("cpu")
        getter(model)
        opt = ModelAverageOptimizer(sgd(iter(model.parameters())), 1, True, getter, interval_steps=1, session=session)
        opt.begin()
        for touched in sizes:
            for name, parameter in model.items():
                parameter.grad = torch.ones_like(parameter) if name == touched else None
            opt.step()
            assert session.untouched[-1] == sizes.keys() - {touched}
        with torch.no_grad():
            model["large"][99] = 7.0  # its last element, which may lie on another server than its first
            model["large"].grad = model["first"].grad = model["last"].grad = None
        opt.step()
        assert session.untouched[-1] == {"first", "last"}
        assert session.pull(timeout_s=TIMEOUT_S)[0]["large"][98:].tolist() == [0.0, 7.0]


def test_a_session_without_a_center_knows_of_nothing_that_is_unchanged(start_server: StartServer) -> None:
    with ParameterServerSession([start_server(1).address], worker_id="chief", is_chief=True) as session:
        variables = {"w": np.zeros(3)}
        assert session.unchanged(variables) == set()
        session.initialize(variables)
        assert session.unchanged(variables) == set()  # they were sent, but never came
        session.pull(timeout_s=TIMEOUT_S)
        assert session.unchanged(variables) == {"w"}
        assert session.unchanged({"w": np.ones(3)}) == set()
        session.push_and_average({"w": np.ones(3)})
        assert session.unchanged({"w": np.ones(3)}) == {"w"}


# What it costs.


class Unsearchable(list[int]):
    """Numbers as in a message, in which a search takes time proportional to their count."""

    def __contains__(self, number: object) -> bool:
        raise AssertionError("searched one by one, which takes time that grows with the square of their count")


def test_untouched_variables_are_joined_in_time_that_grows_with_their_count() -> None:
    variables = tuple(Variable(f"v{number}", "float32", (2,)) for number in range(100))
    assembly = Assembly([Manifest(variables)], ["here"])
    even: Collection[int] = Unsearchable(range(0, 100, 2))
    assert assembly.join_numbers([even]) == set(range(0, 100, 2))


def test_what_had_a_gradient_is_not_compared(telling: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = telling()
    compared = list[set[str]]()

    def unchanged(variables: Mapping[str, ArrayLike]) -> frozenset[str]:
        compared.append(set(variables))
        return frozenset()

    monkeypatch.setattr(worker.session, "unchanged", unchanged)
    worker.step(w=1.0, b=1.0)
    worker.step(w=1.0)
    assert compared == [set(), {"b"}]
