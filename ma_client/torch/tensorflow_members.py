"""The members of TensorFlow 1.15's ``ModelAverageOptimizer``, with its names, on a torch optimizer.

docs/porting-from-tensorflow.md has both side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ma_client.torch.habits import not_compiled
from ma_client.torch.hook import ModelAverageHook
from ma_client.torch.local_parameters import LocalParameters
from ma_client.torch.settings import OptimizerSettings
from ma_client.torch.shown_step import ShownGlobalStep
from ma_client.torch.training.base import WorkerTraining

__all__ = ["GradientAndVariable", "Loss", "TensorFlowMembers"]

Loss = torch.Tensor | Callable[[], torch.Tensor]
GradientAndVariable = tuple[torch.Tensor | None, torch.Tensor]


class TensorFlowMembers(torch.optim.Optimizer):
    """What the original's optimizer has and torch's has not. A subclass has `step` and the attributes below."""

    GATE_NONE = 0
    GATE_OP = 1
    GATE_GRAPH = 2

    _local: torch.optim.Optimizer
    _parameters: LocalParameters
    _settings: OptimizerSettings
    _shown: ShownGlobalStep
    _training: WorkerTraining

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
            grad_loss: gradient of the minimized quantity with respect to ``loss``; it has the shape of ``loss``.

        Returns:
            (gradient, variable) for each variable; the gradient is None where ``loss`` does not depend on it.

        Raises:
            ValueError: ``gate_gradients`` is none of the three, or ``var_list`` holds something that is not a parameter
                of this optimizer.
        """
        if gate_gradients not in (self.GATE_NONE, self.GATE_OP, self.GATE_GRAPH):
            raise ValueError(f"gate_gradients {gate_gradients} is not one of GATE_NONE, GATE_OP, GATE_GRAPH (0, 1, 2)")
        variables = self._parameters.all() if var_list is None else list(var_list)
        self._parameters.check_known(variables)
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
        """`step` with these gradients. Every ``.grad`` is restored afterwards.

        Args:
            grads_and_vars: as `compute_gradients` returns it. Variables that are not in it, or whose gradient is None,
                are not updated.
            global_step: required, as in the original. An integer tensor is set to the rounds completed after each
                round; a number is accepted and has no effect.
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
        self._parameters.check_known([variable for _, variable in pairs])
        if isinstance(global_step, torch.Tensor):
            self._shown.tensor = global_step
        parameters = self._parameters.all()
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
        """A callable that replaces the local variables by the center; it waits for the chief if there is no center yet.

        Steps since the last round are lost; a warning says how many. The callable raises ValueError if the server
        averages another number of workers than ``num_worker``.
        """
        return self._training.start_from_center

    def make_session_run_hook(self, final_round: bool = True, wait_for_others_s: float = 0.0) -> ModelAverageHook:
        """A context manager around the training loop: ``with opt.make_session_run_hook(): ...``. All workers get
        the same start and the same end.

        Args:
            final_round: make a last round when the hook is left normally and something was trained since the last one.
            wait_for_others_s: wait at the end, at most this many seconds, until all workers have finished, and install
                the last center of the job, which also has what workers with more data have trained. 0: end with the
                center of this worker's last round.
        """
        return ModelAverageHook(self._training, final_round, wait_for_others_s)

    def get_name(self) -> str:
        """The name given to the constructor."""
        return self._settings.name

    def get_slot(self, var: torch.Tensor, name: str) -> Any:
        """The local optimizer's state ``name`` for ``var`` ("momentum_buffer", "exp_avg"); None where there is none."""
        return self._local.state[var].get(name) if var in self._local.state else None

    def get_slot_names(self) -> list[str]:
        """Names of the local optimizer's states, sorted."""
        return sorted({name for state in self._local.state.values() for name in state})

    def variables(self) -> list[torch.Tensor]:
        """The tensors of the local optimizer's state."""
        return [v for state in self._local.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
