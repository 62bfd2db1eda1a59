"""What torch and users do with optimizers besides stepping them, and what they may expect of this one."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer
from ma_client.transports.connection import Connection
from modelaverage.errors import NotInitializedError
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer
from tests.optimizer.workers import Join, Net, momentum

pytestmark = pytest.mark.in_memory


def adam(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


# torch.compile.


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_around_steps_makes_steps_and_rounds(alone: Join) -> None:
    worker = alone(interval_steps=2)

    def train(x: torch.Tensor) -> torch.Tensor:
        worker.opt.zero_grad()
        loss: torch.Tensor = worker.model(x).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        worker.opt.step()
        return loss * 2

    compiled = torch.compile(train, backend="eager")
    losses = [compiled(torch.ones(3)).item() for _ in range(5)]
    assert losses == [18.0, 6.0, -6.0, -18.0, -30.0]
    assert (worker.opt.local_step, worker.opt.global_step) == (5, 2)
    assert worker.values() == {"w": [-4.0] * 3, "b": [-3.0] * 3}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("call", ["step", "average", "minimize", "get_init_op"])
def test_what_the_optimizer_does_is_never_compiled(call: str, alone: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = alone()
    calls: dict[str, Callable[[], Any]] = {
        "step": worker.opt.step,
        "average": worker.opt.average,
        "minimize": lambda: worker.opt.minimize(lambda: worker.model(torch.ones(3)).sum(), 0),
        "get_init_op": worker.opt.get_init_op(),
    }
    compiling = list[bool]()

    def watch(name: str) -> None:
        method = getattr(worker.session, name)

        def watched(*args: Any, **options: Any) -> Any:
            compiling.append(torch.compiler.is_compiling())
            return method(*args, **options)

        monkeypatch.setattr(worker.session, name, watched)

    watch("pull")
    watch("push_and_average")
    compiled = torch.compile(lambda: calls[call](), backend="eager")
    for _ in range(3):
        compiled()
    assert compiling == [False] * 3


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_is_a_step(alone: Join) -> None:
    worker = alone()
    step = torch.compile(worker.opt.step, backend="eager")
    for _ in range(3):
        worker.give(w=1.0)
        step()
    assert (worker.opt.local_step, worker.opt.global_step) == (3, 3)
    assert worker.values()["w"] == [-2.0] * 3


# torch.distributed.checkpoint.


@pytest.mark.parametrize("local", [adam, momentum])
def test_torchs_checkpointing_makes_no_step_and_no_round(local: Callable[..., Any], alone: Join) -> None:
    worker = alone(local=local)
    before = worker.values()
    for _ in range(2):
        state = get_optimizer_state_dict(worker.model, worker.opt)
        set_optimizer_state_dict(worker.model, worker.opt, state)
    assert (worker.opt.local_step, worker.opt.global_step) == (0, 0)
    assert worker.values() == before


@pytest.mark.parametrize("has_begun", [False, True])
def test_torchs_checkpointing_keeps_local_step_and_state(
    has_begun: bool, start_server: StartServer, join: Join
) -> None:
    server = start_server(1)
    stopped, again = (join(server, local=adam, interval_steps=2) for _ in range(2))
    stopped.start()
    for _ in range(3):
        stopped.step(w=1.0, b=2.0)
    _, state = get_state_dict(stopped.model, stopped.opt, options=StateDictOptions(cpu_offload=True))
    saved, model = pickle.dumps(state), copy.deepcopy(stopped.model.state_dict())
    stopped.step(w=1.0, b=2.0)
    stopped.session.close()
    if has_begun:
        again.start()
    again.model.load_state_dict(model)
    set_optimizer_state_dict(again.model, again.opt, pickle.loads(saved))
    assert again.opt.local_step == 3
    assert "model_average" not in again.local.param_groups[0]
    again.give(w=1.0, b=2.0)
    again.local.step()
    assert again.values() == stopped.values()


@pytest.mark.parametrize("steps_before", [0, 1], ids=["nothing touched since a round", "a step since a round"])
def test_torchs_full_checkpoints_replace_all_that_this_worker_knows(
    steps_before: int, start_server: StartServer, join: Join
) -> None:
    worker, options = join(start_server(1), local=adam, interval_steps=2), StateDictOptions(full_state_dict=True)
    worker.start()
    for _ in range(2):
        worker.step(w=1.0, b=1.0)
    for _ in range(steps_before):
        worker.step(w=1.0)
    before = worker.opt.state_dict()["model_average"]
    saved = pickle.dumps(get_optimizer_state_dict(worker.model, worker.opt, options=options))
    while worker.opt.local_step < 5:
        worker.step(b=1.0)
    # Torch flattens both states, in which an empty list leaves nothing, and merges them.
    set_optimizer_state_dict(worker.model, worker.opt, pickle.loads(saved), options=options)
    assert worker.opt.state_dict()["model_average"] == before


def test_torchs_flat_checkpoints_leave_local_step_alone(alone: Join) -> None:
    worker, options = alone(local=adam), StateDictOptions(flatten_optimizer_state_dict=True)
    worker.step(w=1.0, b=1.0)
    state = copy.deepcopy(get_optimizer_state_dict(worker.model, worker.opt, options=options))
    worker.step(w=1.0, b=1.0)
    set_optimizer_state_dict(worker.model, worker.opt, state, options=options)
    assert (worker.opt.local_step, worker.opt.global_step) == (2, 2)
    assert worker.opt.get_slot(worker.model.get_parameter("w"), "step").item() == 1


def test_a_plain_optimizers_checkpoint_can_be_loaded(alone: Join) -> None:
    worker, plain = alone(local=adam), Net()
    worker.step(w=1.0, b=1.0)
    set_optimizer_state_dict(worker.model, worker.opt, get_optimizer_state_dict(plain, adam(plain.parameters())))
    assert (worker.opt.local_step, worker.opt.global_step) == (1, 1)


# Attributes.


def test_groups_state_and_defaults_that_are_assigned_are_the_local_optimizers(alone: Join) -> None:
    worker = alone(local=momentum)
    worker.step(w=1.0, b=1.0)
    w = worker.model.get_parameter("w")
    groups = [{**worker.opt.param_groups[0], "params": [w], "lr": 0.5}]
    state: dict[torch.Tensor, Any] = {w: {}}
    defaults = {**worker.opt.defaults, "lr": 2.0}
    worker.opt.param_groups, worker.opt.state, worker.opt.defaults = groups, state, defaults  # type: ignore[assignment]
    assert worker.local.param_groups is worker.opt.param_groups is groups
    assert worker.local.state is worker.opt.state is state
    assert worker.local.defaults is worker.opt.defaults is defaults
    before = worker.values()["w"]
    worker.step(w=1.0, b=1.0)
    assert worker.values() == {"w": [value - 0.5 for value in before], "b": worker.values()["b"]}


def test_groups_with_parameters_of_another_model_are_refused(alone: Join) -> None:
    worker = alone()
    groups = worker.opt.param_groups
    with pytest.raises(ValueError, match="not in the model given to ma_custom_getter"):
        worker.opt.param_groups = [{"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 1.0}]
    assert worker.opt.param_groups is groups


def test_parameters_that_were_replaced_in_the_groups_are_freed(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(1))
    before = [weakref.ref(parameter) for parameter in worker.model.parameters()]
    for name in dict(worker.model.named_parameters()):
        setattr(worker.model, name, torch.nn.Parameter(torch.ones(3)))
    (group,) = worker.local.param_groups
    group["params"][:] = list(worker.model.parameters())
    assert [parameter() for parameter in before] == [None, None]
    worker.start()
    worker.step(w=1.0, b=1.0)
    assert worker.values() == {"w": [0.0] * 3, "b": [0.0] * 3}


def test_a_parameter_of_another_model_in_the_groups_is_refused_at_the_step(alone: Join) -> None:
    worker = alone()
    worker.local.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="not in the model given to ma_custom_getter"):
        worker.step(w=1.0, b=1.0)


class ScheduleFree(torch.optim.SGD):
    """An optimizer with two modes, like schedule-free optimizers."""

    mode = "none yet"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_train_and_eval_are_passed_on_if_the_local_optimizer_has_them(alone: Join) -> None:
    worker = alone(local=lambda own: ScheduleFree(own, lr=1.0))
    opt: Any = worker.opt
    for mode in ("train", "eval"):
        getattr(opt, mode)()
        assert worker.local.mode == mode  # type: ignore[attr-defined]
    plain: Any = alone().opt
    assert not hasattr(plain, "train")
    assert not hasattr(plain, "eval")
    with pytest.raises(AttributeError, match="'ModelAverageOptimizer' object has no attribute 'no_such_thing'"):
        _ = plain.no_such_thing


def test_repr_says_what_is_wrapped_and_how_far_it_is(alone: Join) -> None:
    worker = alone(local=momentum, interval_steps=2)
    worker.step(w=1.0)
    text = repr(worker.opt)
    assert text.startswith("ModelAverageOptimizer (interval_steps: 2, local_step: 1, global_step: 0) of SGD (")
    assert "momentum: 0.5" in text


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps, lambda opt: copy.deepcopy({"of": [opt]})])
def test_copies_are_refused_with_the_way_out(copied: Callable[[object], object], alone: Join) -> None:
    worker = alone()
    with pytest.raises(TypeError, match=r"not copied or pickled.*connection.*state_dict\(\), and load that into a new"):
        copied(worker.opt)
    assert copy.deepcopy(worker.opt.state_dict())["model_average"]["local_step"] == 0


# Numbers.


@pytest.mark.parametrize("number", [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)])
def test_integers_of_any_type_are_taken(number: Any, alone: Join, start_server: StartServer, join: Join) -> None:
    worker = alone(interval_steps=number)
    for _ in range(4):
        worker.step(w=1.0)
    assert worker.opt.global_step == 2
    assert join(start_server(2), num_worker=number).opt.local_step == 0


@pytest.mark.parametrize("name", ["interval_steps", "num_worker"])
@pytest.mark.parametrize("value", [True, np.True_, 2.0, "2", None, np.int64(0), -1])
def test_what_is_no_whole_number_is_refused(name: str, value: object, start_server: StartServer, join: Join) -> None:
    if name == "num_worker" and value is None:
        return  # which means: from the environment
    with pytest.raises(ValueError, match=f"{name} {value} is not a whole number from 1 up"):
        join(start_server(1), **{name: value})


@pytest.mark.parametrize(("interval_steps", "told"), [(7, 7), (2**40, 2**32 - 1)])
def test_servers_hear_of_the_interval(
    interval_steps: int, told: int, start_server: StartServer, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = list[pb.PushHeader]()
    push = Connection.push_and_average

    def watched(self: Connection, header: pb.PushHeader, *args: Any) -> Any:
        headers.append(header)
        return push(self, header, *args)

    monkeypatch.setattr(Connection, "push_and_average", watched)
    worker = join(start_server(1), interval_steps=interval_steps)
    worker.start()
    worker.opt.average()
    assert [header.interval_steps for header in headers] == [told]


# Hooks.


def test_global_step_hooks_run_once_for_each_step(alone: Join) -> None:
    worker = alone()
    seen = list[str]()
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        worker.step(w=1.0)
        worker.opt.apply_gradients([(torch.ones(3), worker.model.get_parameter("w"))], global_step=0)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "after"] * 2


class Loud(ModelAverageOptimizer):
    """A user's subclass, whose step wraps the inherited step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_step_hooks_run_once_in_a_subclass_too(alone: Join) -> None:
    plain = alone()
    getter = ModelAverageCustomGetter("cpu")
    getter(plain.model)
    loud = Loud(plain.local, 1, True, getter, 1, session=plain.session)
    seen = list[str]()
    loud.register_step_post_hook(lambda *_: seen.append("here"))
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("everywhere"))
    try:
        loud.step()
    finally:
        handle.remove()
    assert seen == ["everywhere", "here"]


def test_a_step_pre_hook_may_change_what_step_is_given(alone: Join) -> None:
    worker = alone()
    worker.opt.register_step_pre_hook(lambda opt, _, kwargs: ((opt, lambda: 42.0), kwargs))
    assert worker.opt.step() == 42.0
    worker.opt.register_step_pre_hook(lambda *_: 1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="returns None or"):
        worker.opt.step()


def test_state_dict_hooks_get_this_optimizer_and_what_it_saves(alone: Join) -> None:
    worker = alone()
    seen = list[tuple[str, object, bool]]()
    opt = worker.opt

    def note(what: str) -> Callable[..., None]:
        def hook(optimizer: object, state: dict[str, Any] | None = None) -> None:
            seen.append((what, optimizer, state is not None and "model_average" in state))

        return hook

    opt.register_state_dict_pre_hook(note("before saving"))
    opt.register_state_dict_post_hook(note("after saving"))
    opt.register_load_state_dict_pre_hook(note("before loading"))
    opt.register_load_state_dict_post_hook(note("after loading"))
    worker.local.register_state_dict_post_hook(note("of the local one"))
    opt.load_state_dict(opt.state_dict())
    assert seen == [
        ("before saving", opt, False),
        ("of the local one", worker.local, False),
        ("after saving", opt, True),
        ("before loading", opt, True),
        ("after loading", opt, False),
    ]


def test_state_dict_hooks_may_give_another_state(alone: Join) -> None:
    worker = alone()
    worker.opt.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    saved = worker.opt.state_dict()
    assert saved["more"] == 1
    worker.opt.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "model_average": {**state["model_average"], "local_step": 40}}
    )
    worker.opt.load_state_dict(saved)
    assert worker.opt.local_step == 40
    assert saved["model_average"]["local_step"] == 0


# The hook that was forgotten.


def test_a_step_before_the_hook_names_it_and_changes_nothing(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(1), interval_steps=100)
    with pytest.raises(NotInitializedError, match=r"with opt\.make_session_run_hook\(\)"):
        worker.step(w=1.0)
    assert (worker.values()["w"], worker.opt.local_step) == ([1.0] * 3, 0)
    stopped = worker.opt.state_dict()
    stopped["model_average"]["base_step"] = 3  # a restored worker has not begun either
    worker.opt.load_state_dict(stopped)
    with pytest.raises(NotInitializedError, match="has not begun"):
        worker.step(w=1.0)


def test_the_hook_may_have_begun_on_another_thread(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(1))
    begins = threading.Thread(target=worker.start)
    begins.start()
    begins.join()
    worker.step(w=1.0)
    assert worker.opt.global_step == 1
