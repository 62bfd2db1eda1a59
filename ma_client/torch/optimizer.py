"""ModelAverageOptimizer: a torch optimizer whose workers average their models every `interval_steps` steps.

Source: ``tf.contrib.opt.ModelAverageOptimizer`` of TensorFlow 1.15; docs/porting-from-tensorflow.md has both side by
side. As an algorithm it is local SGD with periodic averaging (McDonald, Hall and Mann, "Distributed training strategies
for the structured perceptron", 2010; McMahan et al., "Communication-efficient learning of deep networks from
decentralized data", 2017).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, overload

import torch

from ma_client.job.results import PushResult
from ma_client.session import ParameterServerSession
from ma_client.torch.amp import step_if_finite
from ma_client.torch.custom_getter import ModelAverageCustomGetter
from ma_client.torch.habits import for_torch_checkpointing, not_compiled, with_step_hooks
from ma_client.torch.local_parameters import LocalParameters
from ma_client.torch.local_state import LocalState
from ma_client.torch.local_variables import LocalVariables
from ma_client.torch.nonfinite import NonfiniteGuard
from ma_client.torch.progress import Progress
from ma_client.torch.role import role_of
from ma_client.torch.settings import settings_of
from ma_client.torch.shown_step import ShownGlobalStep
from ma_client.torch.tensorflow_members import TensorFlowMembers
from ma_client.torch.training.parts import WorkerParts
from ma_client.torch.weighing import Weighing
from modelaverage.errors import NotInitializedError, Reason
from modelaverage.outer import OuterOptimizer

__all__ = ["ModelAverageOptimizer"]

# The key of a state dict, and of its first group for torch's checkpointing, for what the local optimizer does not know.
_STATE_KEY = "model_average"
# Attributes of the local optimizer that this one shows as its own.
_SHARED = ("param_groups", "state", "defaults")
# Methods that this optimizer has if the local optimizer has them.
_MODES = ("train", "eval")


class ModelAverageOptimizer(TensorFlowMembers):
    """Wraps a local optimizer; every ``interval_steps`` of its steps the workers average their models.

    Each worker updates its own local variables. When ``interval_steps`` divides `local_step`, it pushes them, waits
    for the other workers at the barrier, and installs the average. The local optimizer's state (momentum, Adam's
    moments) stays local and is kept.

    It is a ``torch.optim.Optimizer`` with the local optimizer's ``param_groups``, ``state`` and ``defaults``:
    learning-rate schedulers, ``GradScaler`` and checkpoints work with it. An update that ``GradScaler`` skips counts as
    a step, so that all workers reach the same rounds. It has ``train`` and ``eval`` if the local optimizer has them.

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
        outer_optimizer: turns the center and the average of a round into the next center, on the servers: `OuterSGD`,
            `OuterAdam` or `OuterAverage`, or its text. The chief chooses it; a worker that gives another one is
            refused. None: that of the center, or the plain average for a new one. docs/training.md says which to use.
        compression: how local variables and centers travel: ``"int8"`` (a quarter of float32), ``"int4"`` (an eighth),
            ``"bfloat16"`` (half) or ``"none"``. The chief chooses it, like the outer optimizer. None: that of the
            center, or none for a new one.
        overlap_steps: how many steps training may go on while a round is under way, from 0 (training waits for the
            round) to ``interval_steps``. The average is installed when it is there, at the latest after these steps:
            then `step` waits. What was trained meanwhile is kept, on top of it. If the push was not used (STALE), that
            holds, too; only the steps before the push are lost. A round that fails is raised by a later `step`. Needs
            the memory of one more model.
        weight: this worker's share in the average, from 1e-9 to 1e9; or a function that returns what was counted since
            its last call, such as tokens or samples: the push then weighs what was counted since the last round, and
            counts only at the barrier if that is 0.
        nonfinite: what to do if local variables are NaN or infinite at a round. ``"allow"``: push them, as TensorFlow
            1.15 does; the center becomes as bad. ``"abstain"``: this push does not count, and the worker goes on from
            the center. ``"raise"``: `step` raises InvalidRequestError, and nothing is pushed.
        process_group: the ranks of this group of torch.distributed are together one worker: their model is wrapped in
            DistributedDataParallel or sharded by FSDP within the group. All of them make the optimizer, and call its
            methods together; rank 0 talks to the servers. If ``weight`` is a function, it is the sum over the ranks.
            docs/groups.md explains it. None: this process is a worker.

    Raises:
        ValueError: an argument is out of range or does not fit the others.
        TypeError: ``outer_optimizer``, ``compression``, ``weight`` or ``process_group`` is something else than the
            above.
        InvalidRequestError: OUTER_OPTIMIZER_INVALID, CODEC_UNKNOWN, WEIGHT_INVALID.
        ClusterError: something was to come from the environment and is not there.
    """

    # Makes GradScaler call `step` for an update that is to be skipped, too.
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
        outer_optimizer: OuterOptimizer | str | None = None,
        compression: str | None = None,
        overlap_steps: int = 0,
        weight: float | Callable[[], float] = 1.0,
        nonfinite: str = "allow",
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        role = role_of(process_group)
        settings = role.settings(
            lambda: settings_of(
                num_worker,
                is_chief,
                interval_steps,
                use_locking,
                name,
                session,
                outer_optimizer,
                compression,
                overlap_steps,
            )
        )
        weighing = Weighing(role.weight(weight))
        state = LocalState(lambda: opt.state, lambda: self._parameters.names)
        guard = NonfiniteGuard(nonfinite, role.state(state))
        role.check(ma_custom_getter)
        # The base class wants a group of its own; from then on, groups, state and defaults are the local optimizer's.
        super().__init__([{"params": []}], opt.defaults)
        for shared in _SHARED:
            del self.__dict__[shared]
        self._local = opt
        self._settings = settings
        self._parameters = LocalParameters(opt, ma_custom_getter)
        self._variables = LocalVariables(ma_custom_getter, settings.use_locking, role.mirror, role.ranks)
        self._progress = Progress()
        self._shown = ShownGlobalStep()
        self._training = role.training(
            WorkerParts(settings, self._variables, self._progress, weighing, guard, self._shown), session
        )

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
            return self._local.step(closure)
        if not self._training.has_begun:
            raise NotInitializedError(
                "training has not begun: put the loop into `with opt.make_session_run_hook():`, where the chief "
                "initializes the center variables and all workers pull the center",
                Reason.NOT_INITIALIZED,
            )
        with self._variables.locked():
            loss, updated = step_if_finite(self, self._local, closure)
            self._progress.count_step()
        if updated:
            self._progress.touched |= self._parameters.with_gradient()
        self._training.after_step(self._progress.local_step, loss)
        return loss

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the local optimizer does it."""
        self._local.zero_grad(set_to_none)

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """The local optimizer's state dict, with `local_step` and the base step under ``"model_average"``."""
        self._training.wait_to_save()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        own = {**self._progress.state(), "base_step": self._training.base_step}
        found: dict[str, Any] = {**self._local.state_dict(), _STATE_KEY: own}
        if for_torch_checkpointing() and found["param_groups"]:
            first, *others = found["param_groups"]
            # As one value: torch flattens what it has and what it loads, and merges the two.
            found["param_groups"] = [{**first, _STATE_KEY: json.dumps(own)}, *others]
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, found)
            found = found if changed is None else changed
        return found

    @not_compiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; also takes a plain local optimizer's, which leaves `local_step` alone.

        If the center has gone on since the base step, the next push is STALE: the worker then goes on from the center.
        """
        self._training.wait()
        local = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, local)
            local = local if changed is None else dict(changed)
        in_groups = [group[_STATE_KEY] for group in local["param_groups"] if _STATE_KEY in group]
        own = local.pop(_STATE_KEY, in_groups[0] if in_groups else None)
        own = json.loads(own) if isinstance(own, str) else own
        if in_groups:
            groups = [{key: v for key, v in group.items() if key != _STATE_KEY} for group in local["param_groups"]]
            local["param_groups"] = groups
        self._local.load_state_dict(local)
        if own is not None:
            self._progress.load(own, self._settings.interval_steps)
            if own["base_step"] is not None:  # None: saved before the start
                self._training.base_step = own["base_step"]
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of the getter's model to the local optimizer.

        Raises:
            ValueError: the center exists already: its variables are fixed.
        """
        if "_local" not in self.__dict__:  # the base class's constructor
            super().add_param_group(param_group)
            return
        if self._variables.are_fixed:
            raise ValueError("the center exists already and its variables are fixed: add parameter groups before")
        parameters = param_group["params"]
        if isinstance(parameters, set):
            raise TypeError("a parameter group has an order: give its parameters as a list, not as a set")
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        self._parameters.check_in_model(p[1] if isinstance(p, tuple) else p for p in parameters)
        self._local.add_param_group({**param_group, "params": parameters})
        self._parameters.groups_changed()

    def __repr__(self) -> str:
        """The local optimizer, with the settings of this one and how far it is."""
        settings = f"interval_steps: {self._settings.interval_steps}, local_step: {self.local_step}"
        return f"{type(self).__name__} ({settings}, global_step: {self.global_step}) of {self._local!r}"

    def _patch_step_function(self) -> None:
        """Does nothing: `step` runs this optimizer's hooks, also when a subclass's `step` calls it."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Raises TypeError: see `__reduce_ex__`."""
        self._refuse_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises TypeError: an optimizer holds the connection of one worker, which cannot be shared."""
        self._refuse_copies()

    def __getattr__(self, name: str) -> Any:
        """The local optimizer's groups, state and defaults; its `train` and `eval`, if it has them."""
        if name in (*_SHARED, *(() if TYPE_CHECKING else _MODES)) and "_local" in self.__dict__:
            return getattr(self._local, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Groups, state and defaults are set on the local optimizer."""
        if name not in _SHARED or "_local" not in self.__dict__:
            super().__setattr__(name, value)
            return
        if name == "param_groups":
            self._parameters.check_in_model(parameter for group in value for parameter in group["params"])
        setattr(self._local, name, value)
        self._parameters.groups_changed()

    # Where training is.

    @property
    def local_step(self) -> int:
        """Steps of this worker, from 0."""
        return self._progress.local_step

    @property
    def global_step(self) -> int:
        """Rounds completed, as far as this worker knows."""
        return self._training.global_step

    @property
    def session(self) -> ParameterServerSession:
        """The connection to the parameter server. Pulling through it changes the base step: to watch, open another. In
        a worker group rank 0 has it; the others raise ValueError."""
        return self._training.session

    @property
    def lock(self) -> threading.RLock:
        """A reentrant lock; see ``use_locking``."""
        return self._variables.lock

    @lock.setter
    def lock(self, lock: threading.RLock) -> None:
        self._variables.lock = lock

    @property
    def loss(self) -> float | None:
        """The loss that this worker reports with its next pushes; the servers' status shows it. Set it where the number
        is known; the loss that a closure returns at the interval is set without your help. None: nothing."""
        return self._training.loss

    @loss.setter
    def loss(self, loss: float | None) -> None:
        self._training.loss = loss

    @property
    def last_round(self) -> PushResult | None:
        """How this worker's last push ended; its ``center`` is only valid until the next one."""
        return self._training.last_round

    # What the hook does, and what a training loop without it calls.

    def initialize_center(self) -> None:
        """The chief sets the center to its local variables, unless it was set before. Does nothing for other workers.

        With a chief that was restored from a checkpoint, `global_step` goes on from its base step.
        """
        self._training.initialize_center()

    def begin(self) -> None:
        """The start of training, which the hook calls. It may follow an end: after `close` it opens another session."""
        self._training.begin()

    def finish(self, final_round: bool = True, wait_for_others_s: float = 0.0) -> None:
        """The end of training, which the hook calls: a last round if something was trained since the last one; then the
        servers are told that no round has to wait for this worker.

        Args:
            final_round: False: no last round.
            wait_for_others_s: how long to wait for the workers that still train, to end with their last center.

        Raises:
            ModelAverageError: the last round failed, or a server could not be told: this worker has not finished.
        """
        self._training.finish(final_round, wait_for_others_s)

    @not_compiled
    def average(self) -> None:
        """One round now, whatever `local_step` is: push, barrier, install the average. `step` does the same at the
        interval.

        Raises:
            ModelAverageError: the round failed; the local variables are untouched.
            ValueError: a parameter is trained that was frozen when the center was made.
        """
        self._training.average()

    @not_compiled
    def wait(self) -> None:
        """Ends the round that is under way, if ``overlap_steps`` lets training go on during rounds: afterwards its
        average is installed. `state_dict`, `load_state_dict`, `average`, the pull at the start and the end of training
        do it by themselves.

        Raises:
            ModelAverageError: the round failed; the local variables are untouched.
        """
        self._training.wait()

    def close(self) -> None:
        """Closes the session if this optimizer made it. `begin` opens another one."""
        self._training.close()

    def _refuse_copies(self) -> NoReturn:
        raise TypeError(
            "a ModelAverageOptimizer is not copied or pickled: it holds this worker's connection to the servers. Save "
            "its state_dict(), and load that into a new one, made from a new local optimizer"
        )
