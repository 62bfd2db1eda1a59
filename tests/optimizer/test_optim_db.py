"""Every variant of torch's own list of optimizers: with rounds of one worker, each gives the same bits as alone."""

from __future__ import annotations

import copy
import sys
import types
import unittest
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, Outcome, ParameterServerSession, PushResult
from ma_client.values.raw import same_bytes
from tests.conftest import StartServer

STEPS, INTERVAL_STEPS = 6, 2


class Echo:
    """The part of a session that the optimizer uses, for one worker without a server: the average is what it gave."""

    worker_id, is_chief, num_workers, frozen_digests = "worker-0", True, 1, b""

    def __init__(self) -> None:
        self.base_step: int | None = None
        self._center: dict[str, np.ndarray[Any, Any]] = {}

    def initialize(self, variables: Mapping[str, Any], global_step: int = 0, **_: Any) -> Any:
        self._center, self.base_step = {name: array.copy() for name, array in variables.items()}, global_step
        return types.SimpleNamespace(initialized=True, global_step=global_step)

    def pull(self, **_: Any) -> tuple[Mapping[str, Any], int]:
        assert self.base_step is not None
        return self._center, self.base_step

    def unchanged(self, variables: Mapping[str, Any]) -> frozenset[str]:
        return frozenset(name for name, array in variables.items() if same_bytes(array, self._center[name]))

    def push_and_average(self, variables: Mapping[str, Any], *, untouched: frozenset[str], **_: Any) -> PushResult:
        assert self.base_step is not None
        self.initialize(variables, self.base_step + 1)
        return PushResult(self._center, self.base_step, Outcome.COMMITTED, (self.worker_id,), 0.0, untouched)

    def check_intact(self) -> None:
        pass

    def resume_training(self) -> None:
        pass

    def finish(self) -> int:
        return 0


class Weights(torch.nn.Module):
    """Two matrices and, for optimizers that take them, a vector and a scalar."""

    def __init__(self, only_matrices: bool) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        shapes = [(3, 4), (5, 2), *([] if only_matrices else [(7,), ()])]
        self.all = torch.nn.ParameterList([torch.randn(shape, generator=random) for shape in shapes])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Uses one thread: more are slower for tensors of this size, and much slower on a loaded machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def torchs_list() -> tuple[Any, int]:
    """torch's list, and the number of its variants for a CPU. The list is in a module of torch's own tests, which needs
    a stub of `expecttest` and freezes torch's flags; both are dealt with here."""
    sys.modules.setdefault("expecttest", cast("types.ModuleType", types.SimpleNamespace(TestCase=unittest.TestCase)))
    from torch.testing._internal import common_optimizers

    torch.backends.__allow_nonbracketed_mutation_flag = True
    every = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs
    count = sum(len(every("cpu", torch.float32, info)) for info in common_optimizers.optim_db)
    return common_optimizers.optim_db, count


def variants(info: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting of one optimizer: the plain one, and with each implementation (foreach, fused, ...)."""
    ways = [*info.supported_impls, *(["capturable"] if info.has_capturable_arg else [])]
    for case in info.optim_inputs_func(device="cpu"):
        assert case.params is None
        yield case.desc, case.kwargs
        for way in ways:
            yield f"{case.desc}, {way}", case.kwargs | {way: True}


def gradients(model: Weights, sparse: bool) -> Iterator[list[torch.Tensor | None]]:
    """For each step, a gradient for each parameter; in one step, one parameter has none."""
    random = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        found = list[torch.Tensor | None]()
        for parameter in model.all:
            gradient = torch.randn(parameter.shape, generator=random)
            found.append(gradient.to_sparse(1) if sparse else gradient)
        yield [None, *found[1:]] if step == 3 else found


def train(model: Weights, optimizer: torch.optim.Optimizer, sparse: bool, needs_closure: bool) -> None:
    for step in gradients(model, sparse):

        def closure(step: list[torch.Tensor | None] = step) -> float:
            loss = 0.0
            for parameter, gradient in zip(model.all, step, strict=True):
                # Depends on the parameter, since some optimizers evaluate the loss more than once in a step.
                given = None if gradient is None else gradient.clone()
                parameter.grad = given if given is None or sparse else given + 0.1 * parameter.detach()
                loss += float(parameter.detach().square().sum())
            return loss

        if needs_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def exact(value: Any) -> Any:
    """A value that is equal exactly if the bits are."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.is_sparse else value.detach()
        return str(value.dtype), tuple(value.shape), dense.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: exact(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(inner) for inner in value]
    return repr(value)


def outcome_of(run: Callable[[], tuple[Weights, torch.optim.Optimizer]]) -> Any:
    """Parameters, state and settings after the training; or what went wrong."""
    try:
        model, optimizer = run()
    except Exception as error:
        return type(error), str(error)
    state = [exact(optimizer.state.get(parameter, {})) for parameter in model.all]
    settings = [{key: exact(v) for key, v in group.items() if key != "params"} for group in optimizer.param_groups]
    return exact(list(model.all)), state, settings


def compare(info: Any, kwargs: dict[str, Any], session: Any) -> tuple[Any, Any]:
    """The results of one variant alone, and with rounds."""
    sparse = info.only_supports_sparse_grads

    def local(model: Weights) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = info.optim_cls(model.parameters(), **copy.deepcopy(kwargs))
        return optimizer

    def alone() -> tuple[Weights, torch.optim.Optimizer]:
        model = Weights(sparse or info.optim_cls is torch.optim.Muon)
        optimizer = local(model)
        train(model, optimizer, sparse, info.step_requires_closure)
        return model, optimizer

    def averaged() -> tuple[Weights, torch.optim.Optimizer]:
        getter = ModelAverageCustomGetter("cpu")
        model = getter(Weights(sparse or info.optim_cls is torch.optim.Muon))
        assert isinstance(model, Weights)
        optimizer = local(model)
        opt = ModelAverageOptimizer(optimizer, 1, True, getter, interval_steps=INTERVAL_STEPS, session=session)
        with opt.make_session_run_hook():
            train(model, opt, sparse, info.step_requires_closure)
        assert (opt.local_step, opt.global_step) == (STEPS, STEPS // INTERVAL_STEPS)
        return model, optimizer

    return outcome_of(alone), outcome_of(averaged)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_every_variant_of_every_optimizer_of_torch_makes_the_same_bits_as_alone() -> None:
    optimizers, count = torchs_list()
    compared, trained = 0, 0
    differ = list[str]()
    for info in optimizers:
        for what, kwargs in variants(info):
            alone, averaged = compare(info, kwargs, Echo())
            compared += 1
            trained += len(alone) == 3
            if alone != averaged:
                differ.append(f"{info.optim_cls.__name__}: {what}: {kwargs}: {alone[:2]} {averaged[:2]}"[:2000])
    assert not differ, "\n".join(differ)
    assert compared >= count
    assert trained > count // 2  # the others fail alone, too, and in the same way


@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_of_torch_makes_the_same_bits_through_a_server(start_server: StartServer) -> None:
    for info in torchs_list()[0]:
        address = start_server(1).address
        with ParameterServerSession([address], worker_id="worker-0", is_chief=True) as session:
            _, kwargs = next(variants(info))
            alone, averaged = compare(info, kwargs, session)
            assert alone == averaged, info.optim_cls
            assert len(alone) == 3
