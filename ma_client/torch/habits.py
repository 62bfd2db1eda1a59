"""What torch does to optimizers behind their backs: compiles around them, hooks into them, steps them to make state."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["for_torch_checkpointing", "not_compiled", "with_step_hooks"]

_F = TypeVar("_F", bound=Callable[..., Any])
# get_optimizer_state_dict and set_optimizer_state_dict are there.
_CHECKPOINTING = "torch.distributed.checkpoint.state_dict"
# Wrappers may stand in between: schedulers and trainers wrap `step`.
_FRAMES = 16


def not_compiled(function: _F) -> _F:
    """The function as torch.compile leaves it: called as it is, at every call, by what is compiled around it."""
    disabled = torch.compiler.disable(function, reason="it averages the model with other workers")  # type: ignore[no-untyped-call]
    return cast("_F", disabled)


def with_step_hooks(step: _F) -> _F:
    """An optimizer's ``step`` with the hooks that were registered with this optimizer.

    Unlike torch's own `profile_hook_step`, which it stands for, it leaves the global hooks out: the local optimizer's
    ``step`` runs those, once.
    """

    @functools.wraps(step)
    def hooked(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        given: tuple[Any, ...] = (optimizer, *args)
        for before in optimizer._optimizer_step_pre_hooks.values():
            changed = before(optimizer, given, kwargs)
            if changed is None:
                continue
            if not isinstance(changed, tuple) or len(changed) != 2:
                raise RuntimeError(f"a step pre-hook returns None or (args, kwargs), but this one returned {changed!r}")
            given, kwargs = changed
        result = step(*given, **kwargs)
        for after in optimizer._optimizer_step_post_hooks.values():
            after(optimizer, given, kwargs)
        return result

    return cast("_F", hooked)


def for_torch_checkpointing() -> bool:
    """Whether ``torch.distributed.checkpoint.state_dict`` is the caller. To make an optimizer's state, it steps it with
    gradients and learning rates of zero; and of a state dict it keeps nothing but state and groups."""
    if _CHECKPOINTING not in sys.modules:
        return False
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_globals.get("__name__") == _CHECKPOINTING:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
