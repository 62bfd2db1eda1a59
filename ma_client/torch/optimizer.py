"""ModelAverageOptimizer: a torch optimizer whose workers meet every `interval_steps` steps and go on from the average.

Source: ``tf.contrib.opt.ModelAverageOptimizer`` of TensorFlow 1.15, member by member; docs/porting-from-tensorflow.md
has both side by side. As an algorithm it is local SGD with periodic averaging (McDonald, Hall and Mann, "Distributed
training strategies for the structured perceptron", 2010; McMahan et al., "Communication-efficient learning of deep
networks from decentralized data", 2017).
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

import numpy as np
import torch
from numpy.typing import NDArray

from ma_client.cluster.spec import ClusterSpec
from ma_client.session import ParameterServerSession, PushResult
from ma_client.tensors.mirror import HostMirror
from ma_client.torch.amp import has_finite_gradients, lent_scaling, scales_itself
from ma_client.torch.custom_getter import GLOBAL_VARIABLE_NAME, ModelAverageCustomGetter
from ma_client.torch.gradient_sync import warn_if_gradients_are_shared
from ma_client.torch.habits import for_torch_checkpointing, not_compiled, with_step_hooks
from ma_client.torch.hook import ModelAverageHook
from ma_client.torch.steps_said import say_discarded, say_finished, say_not_used
from modelaverage.errors import NotInitializedError, Reason, RetryPushError
from modelaverage.outcome import Outcome

__all__ = [
    "GLOBAL_VARIABLE_NAME",
    "GradientAndVariable",
    "Loss",
    "ModelAverageCustomGetter",
    "ModelAverageOptimizer",
]

Loss = torch.Tensor | Callable[[], torch.Tensor]
GradientAndVariable = tuple[torch.Tensor | None, torch.Tensor]
# Where state_dict keeps what is not the local optimizer's.
_STATE_KEY = "model_average"
# What is the local optimizer's, and here only by name.
_SHARED = ("param_groups", "state", "defaults")
# Methods that some local optimizers have, and this one when they do.
_MODES = ("train", "eval")


class ModelAverageOptimizer(torch.optim.Optimizer):
    """Wraps a local optimizer; every ``interval_steps`` of its steps the workers average their models.

    Each worker updates its own local variables. When ``interval_steps`` divides `local_step`, it pushes them, waits
    for the other workers at the barrier, and installs the average. The local optimizer's state (momentum, Adam's
    moments) stays local and is kept.

    It is a ``torch.optim.Optimizer`` with the local optimizer's ``param_groups``, ``state`` and ``defaults``:
    learning-rate schedulers, ``GradScaler`` and checkpoints work with it. An update that ``GradScaler`` skips counts as
    a step, so that workers stay in step. ``train`` and ``eval`` are there if the local optimizer has them.

    Args:
        opt: the local optimizer, over parameters of the getter's model.
        num_worker: how many workers a round waits for, as the server was told; None: as the environment says.
        is_chief: whether this worker initializes the center; None: as the environment says.
        ma_custom_getter: the getter that was given the model; knows the center variables.
        interval_steps: local steps between two meetings at the barrier; any integer type.
        use_locking: hold `lock` during local update and install, so that a thread that holds it meanwhile (evaluation)
            reads a consistent model. It is not held during the wait at the barrier.
        name: what `get_name` returns.
        session: the connection to the parameter servers; None: made from what the environment says
            (`ClusterSpec.from_env`), and closed by the hook.

    Attributes:
        lock: a reentrant lock; see ``use_locking``.
        last_round: how this worker's last push ended; its ``center`` is only valid until the next one.

    Raises:
        ValueError: an argument is out of range or does not fit the others.
        ClusterError: something was to come from the environment and is not there.
    """

    GATE_NONE = 0
    GATE_OP = 1
    GATE_GRAPH = 2
    # GradScaler then calls `step` for an update that is to be skipped, too.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        num_worker: int | None,
        is_chief: bool | None,
        ma_custom_getter: ModelAverageCustomGetter,
        interval_steps: int = 100,
        use_locking: bool = True,
        name: str = "ModelAverageOptimizer",
        *,
        session: ParameterServerSession | None = None,
    ) -> None:
        interval_steps = _whole("interval_steps", interval_steps)
        if num_worker is None or is_chief is None:
            cluster = ClusterSpec.from_env()
            num_worker = cluster.num_workers if num_worker is None else num_worker
            is_chief = cluster.is_chief if is_chief is None else is_chief
        num_worker = _whole("num_worker", num_worker)
        if session is not None and session.is_chief != is_chief:
            raise ValueError(f"is_chief is {is_chief}, but the session was made with is_chief={session.is_chief}")
        # The base class wants a group of its own; from then on, groups, state and defaults are the local optimizer's.
        super().__init__([{"params": []}], opt.defaults)
        for shared in _SHARED:
            del self.__dict__[shared]
        self._opt = opt
        self._getter = ma_custom_getter
        self._check_parameters(self._parameters())
        self._num_worker = num_worker
        self._is_chief = bool(is_chief)
        self._interval_steps = interval_steps
        self._use_locking = use_locking
        self._name = name
        self._local_step = 0
        self.loss: float | None = None
        """What this worker says of its loss with its next pushes, for people who look at the servers' status: set it
        where the number is at hand. A closure's loss is taken by itself. None: nothing."""
        self._names = self._parameter_names()
        self._touched: set[str] = set()  # parameters that have had a gradient since the base step
        self._steps_since_round = 0  # or since the local variables were made equal to the center
        self._steps_pushed: int | None = None  # how many of these the first push had in it that was tried since
        self._global_step_tensor: torch.Tensor | None = None
        self._mirror: HostMirror | None = None
        self.lock = threading.RLock()
        self.last_round: PushResult | None = None
        self._owns_session = session is None
        self._is_closed = False
        self._session = ParameterServerSession.from_env(is_chief=self._is_chief) if session is None else session

    # What torch expects of an optimizer.

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @not_compiled
    @with_step_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One local update; at the interval also one round: push, barrier, install the average.

        Args:
            closure: as the local optimizer takes it; runs while `lock` is held.

        Returns:
            What the closure returned; None when ``GradScaler`` found infinite gradients and the update was skipped.

        Raises:
            NotInitializedError: the hook has not begun.
            ModelAverageError: the round failed (see `ParameterServerSession.push_and_average`). The local update and
                `local_step` stand; `average` tries the round again.
        """
        if for_torch_checkpointing():
            return self._opt.step(closure)
        if self._session.num_workers is None:
            raise NotInitializedError(
                "training has not begun: put the loop into `with opt.make_session_run_hook():`, where the chief "
                "initializes the center variables and all workers pull the center",
                Reason.NOT_INITIALIZED,
            )
        with self._locked():
            loss, updated = self._update(closure)
            self._local_step += 1
            self._steps_since_round += 1
        if updated:
            self._touched |= {name for parameter, name in self._names.items() if parameter.grad is not None}
        if self._local_step % self._interval_steps == 0:
            if loss is not None:
                self.loss = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
            self.average()
        return loss

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the local optimizer does it."""
        self._opt.zero_grad(set_to_none)

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """The local optimizer's state dict, with `local_step` and the base step under ``"model_average"``."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        own = {
            "local_step": self._local_step,
            "base_step": self._session.base_step,
            "touched": sorted(self._touched),
            "steps_since_round": self._steps_since_round,
        }
        found: dict[str, Any] = {**self._opt.state_dict(), _STATE_KEY: own}
        if for_torch_checkpointing() and found["param_groups"]:
            first, *others = found["param_groups"]
            found["param_groups"] = [{**first, _STATE_KEY: own}, *others]
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, found)
            found = found if changed is None else changed
        return found

    @not_compiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; also takes a plain local optimizer's, which leaves `local_step` alone.

        If the center has gone on since the base step, the next push is STALE: the worker then goes on from the center.
        """
        local = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, local)
            local = local if changed is None else dict(changed)
        in_groups = [group[_STATE_KEY] for group in local["param_groups"] if _STATE_KEY in group]
        own = local.pop(_STATE_KEY, in_groups[0] if in_groups else None)
        if in_groups:
            groups = [{key: v for key, v in group.items() if key != _STATE_KEY} for group in local["param_groups"]]
            local["param_groups"] = groups
        self._opt.load_state_dict(local)
        if own is not None:
            self._local_step, self._touched = own["local_step"], set(own["touched"])
            # Before there was this entry, rounds were where the interval divides.
            self._steps_since_round = own.get("steps_since_round", self._local_step % self._interval_steps)
            if own["base_step"] is not None:  # None: saved before the start
                self._session.base_step = own["base_step"]
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of the getter's model to the local optimizer.

        Raises:
            ValueError: the center exists already: its variables are fixed.
        """
        if "_opt" not in self.__dict__:  # the base class's constructor
            super().add_param_group(param_group)
            return
        if self._mirror is not None:
            raise ValueError("the center exists already and its variables are fixed: add parameter groups before")
        parameters = param_group["params"]
        if isinstance(parameters, set):
            raise TypeError("a parameter group has an order: give its parameters as a list, not as a set")
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        self._check_parameters(p[1] if isinstance(p, tuple) else p for p in parameters)
        self._opt.add_param_group({**param_group, "params": parameters})
        self._names = self._parameter_names()

    def __repr__(self) -> str:
        """What is wrapped, with its settings, and how far it is."""
        settings = f"interval_steps: {self._interval_steps}, local_step: {self._local_step}"
        return f"{type(self).__name__} ({settings}, global_step: {self.global_step}) of {self._opt!r}"

    def _patch_step_function(self) -> None:
        """Nothing: `step` has this optimizer's hooks, and subclasses' calls it."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Raises TypeError: see `__reduce_ex__`."""
        self._refuse_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises TypeError: an optimizer holds a connection, and one worker has one."""
        self._refuse_copies()

    def __getattr__(self, name: str) -> Any:
        """The local optimizer's groups, state and defaults; its `train` and `eval`, if it has them."""
        if name in (*_SHARED, *(() if TYPE_CHECKING else _MODES)) and "_opt" in self.__dict__:
            return getattr(self._opt, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Groups, state and defaults are set on the local optimizer."""
        if name not in _SHARED or "_opt" not in self.__dict__:
            super().__setattr__(name, value)
            return
        if name == "param_groups":
            self._check_parameters(parameter for group in value for parameter in group["params"])
        setattr(self._opt, name, value)
        self._names = self._parameter_names()

    # The original's members.

    @not_compiled
    def compute_gradients(
        self,
        loss: Loss,
        var_list: Sequence[torch.Tensor] | None = None,
        gate_gradients: int = GATE_OP,
        aggregation_method: object = None,  # noqa: ARG002
        colocate_gradients_with_ops: bool = False,  # noqa: ARG002
        grad_loss: torch.Tensor | None = None,
    ) -> list[GradientAndVariable]:
        """Gradients of ``loss``; no ``.grad`` is touched.

        Args:
            loss: a tensor, or a callable without arguments that returns one. Not a scalar: the sum of its elements.
            var_list: parameters to differentiate by; None: all of the optimizer's.
            gate_gradients: GATE_NONE, GATE_OP or GATE_GRAPH; checked, without effect (torch has no such gates).
            aggregation_method: accepted, without effect.
            colocate_gradients_with_ops: accepted, without effect.
            grad_loss: gradient of what is to be minimized by ``loss``, with its shape.

        Returns:
            (gradient, variable) for each variable; the gradient is None where ``loss`` does not depend on it.

        Raises:
            ValueError: ``gate_gradients`` is none of the three, or ``var_list`` holds something that is not a parameter
                of this optimizer.
        """
        if gate_gradients not in (self.GATE_NONE, self.GATE_OP, self.GATE_GRAPH):
            raise ValueError(f"gate_gradients {gate_gradients} is none of GATE_NONE, GATE_OP, GATE_GRAPH (0, 1, 2)")
        variables = self._parameters() if var_list is None else list(var_list)
        self._check_known(variables)
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        if not loss.requires_grad:
            return [(None, variable) for variable in variables]
        weights = torch.ones_like(loss) if grad_loss is None else grad_loss
        trained = [variable for variable in variables if variable.requires_grad]
        gradients = torch.autograd.grad(loss, trained, weights, allow_unused=True) if trained else ()
        by_variable = dict(zip(trained, gradients, strict=True))
        return [(by_variable.get(variable), variable) for variable in variables]

    @not_compiled
    def apply_gradients(
        self,
        grads_and_vars: Iterable[GradientAndVariable],
        global_step: torch.Tensor | int | None = None,
        name: str | None = None,  # noqa: ARG002
    ) -> None:
        """`step` with these gradients. Every ``.grad`` is as it was afterwards.

        Args:
            grads_and_vars: as `compute_gradients` returns it. Variables that are not in it, or whose gradient is None,
                are not updated.
            global_step: required, as in the original. An integer tensor is set to the rounds completed after each
                round; a number only says that the caller knows.
            name: accepted, without effect.

        Raises:
            ValueError: no variables, no ``global_step``, no gradient at all, or something that is not a parameter.
        """
        pairs = list(grads_and_vars)
        if not pairs:
            raise ValueError("Must supply at least one variable")
        if global_step is None:
            raise ValueError("Global step is required")
        if all(gradient is None for gradient, _ in pairs):
            raise ValueError("No gradients provided for any variable")
        self._check_known([variable for _, variable in pairs])
        if isinstance(global_step, torch.Tensor):
            self._global_step_tensor = global_step
        parameters = self._parameters()
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            for gradient, variable in pairs:
                variable.grad = gradient
            self.step()
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    @not_compiled
    def minimize(
        self,
        loss: Loss,
        global_step: torch.Tensor | int | None = None,
        var_list: Sequence[torch.Tensor] | None = None,
        gate_gradients: int = GATE_OP,
        aggregation_method: object = None,
        colocate_gradients_with_ops: bool = False,
        name: str | None = None,
        grad_loss: torch.Tensor | None = None,
    ) -> None:
        """`compute_gradients`, then `apply_gradients`. Arguments and errors are theirs."""
        pairs = self.compute_gradients(
            loss, var_list, gate_gradients, aggregation_method, colocate_gradients_with_ops, grad_loss
        )
        self.apply_gradients(pairs, global_step, name)

    def get_init_op(self) -> Callable[[], None]:
        """A callable that makes the local variables equal to the center; it waits for the chief if there is none.

        Steps since the last round are lost by that; a warning says how many. It raises ValueError if the server
        averages another number of workers than ``num_worker``.
        """
        return self._start_from_center

    def make_session_run_hook(self, final_round: bool = True, wait_for_others_s: float = 0.0) -> ModelAverageHook:
        """What brings all workers to the same start, and to the same end: ``with opt.make_session_run_hook(): ...``
        around the loop.

        Args:
            final_round: make a last round when the hook is left normally and something was trained since the last one.
            wait_for_others_s: then wait, for this many seconds at most, until all workers have finished, and take the
                last center of the job: that of those who had more data, too. 0: leave with the center of this worker's
                last round.
        """
        return ModelAverageHook(self, final_round, wait_for_others_s)

    def get_name(self) -> str:
        """The name given to the constructor."""
        return self._name

    def get_slot(self, var: torch.Tensor, name: str) -> Any:
        """The local optimizer's state ``name`` for ``var`` ("momentum_buffer", "exp_avg"); None where there is none."""
        return self._opt.state[var].get(name) if var in self._opt.state else None

    def get_slot_names(self) -> list[str]:
        """Names of the local optimizer's states, sorted."""
        return sorted({name for state in self._opt.state.values() for name in state})

    def variables(self) -> list[torch.Tensor]:
        """The tensors of the local optimizer's state."""
        return [v for state in self._opt.state.values() for v in state.values() if isinstance(v, torch.Tensor)]

    # What the original kept in graph variables.

    @property
    def local_step(self) -> int:
        """Steps of this worker, from 0."""
        return self._local_step

    @property
    def global_step(self) -> int:
        """Rounds completed, as far as this worker knows."""
        return self._session.base_step or 0

    @property
    def session(self) -> ParameterServerSession:
        """The connection to the parameter server. Pulling through it changes the base step: to watch, open another."""
        return self._session

    def initialize_center(self) -> None:
        """The chief sets the center to its local variables, unless it was set before. For others nothing happens.

        A chief that was restored from a checkpoint lets `global_step` go on from its base step.
        """
        warn_if_gradients_are_shared(self._getter.model)
        if self._is_chief:
            values, others = self._host_mirror().gather(), self._getter.other_names()
            done = self._session.initialize(values, global_step=self.global_step, other_names=others)
            if done.initialized:  # what was trained before is in the center
                self._steps_since_round = 0

    def begin(self) -> None:
        """The start of training, as the hook makes it; also after an end: opens another session after `close`."""
        if self._is_closed:
            session = ParameterServerSession.from_env(is_chief=self._is_chief, must_be_new=False)
            session.base_step = self._session.base_step
            self._session, self._is_closed = session, False
        else:
            self._session.resume_training()
        self.initialize_center()
        self._start_from_center()

    def finish(self, final_round: bool = True, wait_for_others_s: float = 0.0) -> None:
        """The end of training, as the hook makes it: a last round if something was trained since the last one; then the
        servers hear that no round has to wait for this worker.

        Args:
            final_round: False: no last round.
            wait_for_others_s: how long to wait for those who still train, to end with their last center.

        Raises:
            ModelAverageError: the last round failed, or a server could not be told: this worker has not finished.
        """
        if final_round and self._has_something_to_average():
            self.average()
        global_step, workers_training = self.global_step, self._session.finish()
        if workers_training > 0 and wait_for_others_s <= 0:
            say_finished(self._session, workers_training)
        if wait_for_others_s > 0:
            self._session.wait_for_others(wait_for_others_s)
            if any(status.global_step > global_step for status in self._session.statuses()):
                self._pull()

    @not_compiled
    def average(self) -> None:
        """One round now, whatever `local_step` is: push, barrier, install the average. `step` calls it.

        Raises:
            ModelAverageError: the round failed; the local variables are untouched.
            ValueError: a parameter is trained that was frozen when the center was made.
        """
        if self.last_round is None:  # trainers wrap the model after the hook's beginning
            warn_if_gradients_are_shared(self._getter.model)
        local = self._host_mirror().gather()
        late = self._touched - local.keys()
        if late:
            raise ValueError(
                f"{min(late)!r} is trained, but was frozen when the center was made and is no center variable; "
                "leave it trainable until the hook has begun, and freeze it then"
            )
        untouched = self._untouched(local)
        pushed_before, base_step = self._steps_pushed, self._session.base_step
        if pushed_before is None:
            self._steps_pushed = self._steps_since_round
        result = self._session.push_and_average(
            local,
            local_step=self._local_step,
            loss=self.loss,
            interval_steps=self._interval_steps,
            untouched=untouched,
            copy=False,
        )
        if result.outcome is not Outcome.COMMITTED:
            self._say_what_is_lost(result, base_step, pushed_before)
        # A push that was not used says nothing of what the center has now.
        kept = result.untouched & untouched if result.outcome is Outcome.COMMITTED else frozenset[str]()
        self._install(result.center, kept)
        try:
            self._session.check_intact()
        except RetryPushError:  # a round with a quorum did not wait until the average was read
            self._pull()
        self.last_round = result

    def close(self) -> None:
        """Closes the session if this optimizer made it. `begin` opens another one."""
        if self._owns_session and not self._is_closed:
            self._is_closed = True
            self._session.close()

    # How it is done.

    def _update(self, closure: Callable[[], float] | None) -> tuple[float | None, bool]:
        """One step of the local optimizer, unless ``GradScaler`` found infinite gradients: its loss, and whether it was
        made."""
        if scales_itself(self._opt):
            with lent_scaling(self, self._opt):
                return self._opt.step(closure), True
        if not has_finite_gradients(self):
            return None, False
        return self._opt.step(closure), True

    @not_compiled
    def _start_from_center(self) -> None:
        steps = self._steps_since_round
        self._pull()
        if steps > 0:
            say_discarded(self._session, steps)

    def _say_what_is_lost(self, result: PushResult, base_step: int | None, pushed_before: int | None) -> None:
        """The push was not used; an earlier one from the same base step, that failed here, may have been."""
        mine = base_step is not None and result.global_step == base_step + 1
        mine = mine and self._session.worker_id in result.contributors
        counted = pushed_before if mine or result.outcome is Outcome.ALREADY_COUNTED else None
        if counted is None or self._steps_since_round > counted:
            say_not_used(self._session, result.outcome, self._steps_since_round - (counted or 0))

    def _pull(self) -> None:
        center, _ = self._session.pull(expected=self._host_mirror().gather(), copy=False)
        if self._session.num_workers != self._num_worker:
            raise ValueError(
                f"num_worker is {self._num_worker}, but the server was started with --num-workers "
                f"{self._session.num_workers}"
            )
        self._install(center, frozenset())

    def _install(self, center: Any, kept: frozenset[str]) -> None:
        with self._locked():
            self._host_mirror().scatter(center, skip=kept)
        self._touched.clear()
        self._steps_since_round, self._steps_pushed = 0, None
        if self._global_step_tensor is not None:
            self._global_step_tensor.fill_(self.global_step)

    def _untouched(self, local: Mapping[str, NDArray[np.generic]]) -> frozenset[str]:
        """The variables that hold the bytes that were installed. That no gradient was seen is not enough: it may have
        been freed in the step, or the change was not this optimizer's."""
        return self._session.unchanged({name: array for name, array in local.items() if name not in self._touched})

    def _has_something_to_average(self) -> bool:
        """Whether there were steps since the last round, or parameters changed without any."""
        if self._steps_since_round > 0:
            return True
        # Buffers follow parameters: statistics that an evaluation moved are no training.
        parameters = {n: v for n, v in self._getter.variables().items() if isinstance(v, torch.nn.Parameter)}
        local = HostMirror(parameters).gather()
        return self._session.unchanged(local) != local.keys()

    def _host_mirror(self) -> HostMirror:
        if self._mirror is None:
            self._mirror = HostMirror(self._getter.variables())
        else:
            self._mirror.follow(self._getter.tensors(self._mirror.names))
        return self._mirror

    def _locked(self) -> contextlib.AbstractContextManager[Any]:
        return self.lock if self._use_locking else contextlib.nullcontext()

    def _parameter_names(self) -> dict[torch.Tensor, str]:
        """The parameters that the local optimizer updates, and what the model calls them."""
        names = {id(parameter): name for name, parameter in self._getter.named_parameters().items()}
        return {parameter: names[id(parameter)] for parameter in self._parameters()}

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._opt.param_groups for parameter in group["params"]]

    def _check_known(self, variables: Iterable[object]) -> None:
        known = {id(parameter) for parameter in self._parameters()}
        for variable in variables:
            if id(variable) not in known:
                shape = f" of shape {list(variable.shape)}" if isinstance(variable, torch.Tensor) else ""
                raise ValueError(f"{type(variable).__name__}{shape} is not a parameter of this optimizer")

    def _check_parameters(self, parameters: Iterable[torch.Tensor]) -> None:
        known = {id(parameter) for parameter in self._getter.model.parameters()}
        for parameter in parameters:
            if id(parameter) not in known:
                raise ValueError(
                    f"the optimizer has a parameter of shape {list(parameter.shape)} that is not in the model given to "
                    "ma_custom_getter; make the optimizer from `getter(Net()).parameters()`"
                )

    def _refuse_copies(self) -> NoReturn:
        raise TypeError(
            "a ModelAverageOptimizer is not copied or pickled: it holds this worker's connection to the servers. Save "
            "its state_dict(), and load that into a new one, made from a new local optimizer"
        )


def _whole(name: str, value: object) -> int:
    """A number from 1 on, of any integer type. Raises ValueError."""
    number: int | None = None
    if not isinstance(value, (bool, np.bool_)):
        with contextlib.suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
    if number is None or number < 1:
        raise ValueError(f"{name} {value} is not a whole number from 1 on")
    return number
