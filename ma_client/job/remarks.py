"""What sessions log about a center: whose values it has, and whether they are finite."""

from __future__ import annotations

import logging
from pathlib import Path

from modelaverage.logs import event

__all__ = ["NonfiniteRemark", "say_center_goes_on"]

_log = logging.getLogger("ma_client")


def say_center_goes_on(worker_id: str, global_step: int, init_from: str | Path | None) -> None:
    """The chief's initial values, its own or those of the file ``init_from``, are not used: there is a center."""
    whose = "its own initial values are" if init_from is None else f"the values of {init_from} are"
    _log.warning(
        "%s continues from global_step %d of the existing center; %s not used (with --fresh it would refuse)",
        worker_id,
        global_step,
        whose,
        extra=event("center_goes_on", worker=worker_id, round=global_step),
    )


class NonfiniteRemark:
    """Warns of pushes with values that are not finite, once until a push is finite again."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._was_said = False

    def note(self, values: int, base_step: int | None) -> None:
        """The push from this base step had this many values that are not finite."""
        if values and not self._was_said:
            _log.warning(
                "%d values of the last push are not finite (NaN, infinite); neither is the average",
                values,
                extra=event("values_not_finite", worker=self._worker_id, round=base_step, values=values),
            )
        self._was_said = values > 0
