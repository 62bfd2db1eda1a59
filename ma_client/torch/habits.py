"""How torch treats optimizers: it compiles code that calls them, adds hooks, and steps them to create state."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["for_torch_checkpointing", "not_compiled", "with_step_hooks"]

_F = TypeVar("_F", bound=Callable[..., Any])
# The module of get_optimizer_state_dict and set_optimizer_state_dict.
_CHECKPOINTING = "torch.distributed.checkpoint.state_dict"
# Other frames may lie in between: schedulers and trainers wrap `step`.
_FRAMES = 16


def not_compiled(function: _F) -> _F:
    """Excludes the function from torch.compile: compiled code around it calls it as it is, every time."""
    disabled = torch.compiler.disable(function, reason="it averages the model with other workers")  # type: ignore[no-untyped-call]
    return cast("_F", disabled)


def with_step_hooks(step: _F) -> _F:
    """An optimizer's ``step`` with the hooks that were registered with this optimizer.

    It replaces torch's `profile_hook_step`, but does not run the global hooks: the local optimizer's ``step`` runs
    them, once.
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
    """Whether ``torch.distributed.checkpoint.state_dict`` is the caller. To create an optimizer's state, it calls
    ``step`` with gradients and learning rates of zero; and it keeps only the state and the groups of a state dict."""
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
