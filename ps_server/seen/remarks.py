"""Log lines about workers: one has finished, left or come back; their intervals differ; one pushes values that are not
finite. No rule depends on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from modelaverage.logs import event
from modelaverage.names import listed
from ps_server.seen.roster import Roster, WorkerRecord

__all__ = ["Remarks"]

_log = logging.getLogger("ps_server")


class Remarks:
    """Records reports of workers in the roster, and logs each new fact once.

    Args:
        roster: the workers.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._job_was_over = False
        self._intervals: frozenset[int] = frozenset()  # the differing intervals logged last

    def finished(self, worker_id: str, record: WorkerRecord, global_step: int, training: int) -> None:
        """A worker has finished; ``training`` workers have not. 0: the job is over."""
        if not record.has_finished:
            rest = f"rounds go on with {training}" if training else "so have all others"
            what = event("worker_finished", worker=worker_id, round=global_step, training=training)
            _log.info("%r has finished at global_step %d; %s", worker_id, global_step, rest, extra=what)
        record.has_finished, record.has_left = True, False
        if training == 0 and not self._job_was_over:
            self._job_was_over = True
            what = event("job_over", round=global_step)
            _log.info(
                "all workers have finished: the job is over at global_step %d; a new run can begin with this center",
                global_step,
                extra=what,
            )

    def left(self, worker_id: str, is_waited_for: bool) -> bool:
        """The process of a worker leaves without having finished. Returns whether the worker is known and had not
        finished."""
        record = self._roster.records.get(worker_id)
        if record is None or record.has_finished:
            return False
        record.has_left = True
        if is_waited_for and record.has_pushed:
            what = event("worker_left", worker=worker_id)
            _log.warning("%r has left without having finished; rounds wait for it", worker_id, extra=what)
        return True

    def came_back(self, worker_id: str, training: int) -> None:
        """A finished worker trains again."""
        record = self._roster.records.get(worker_id)
        if record is not None:
            record.has_finished = False
        self._job_was_over = False
        what = event("worker_returned", worker=worker_id, training=training)
        _log.info("%r trains again; rounds go on with %d", worker_id, training, extra=what)

    def new_run(self) -> None:
        """The first worker of a new run has arrived: no worker counts as finished."""
        for record in self._roster.records.values():
            record.has_finished = False

    def interval(self, worker_id: str, interval_steps: int) -> None:
        """A worker reports its local steps between two rounds; 0: not reported."""
        record = self._roster.records.get(worker_id)
        if record is None or record.interval_steps == interval_steps:
            return
        record.interval_steps = interval_steps
        by_interval = dict[int, list[str]]()
        for name, each in self._roster.records.items():
            if each.interval_steps and not each.has_finished:
                by_interval.setdefault(each.interval_steps, []).append(name)
        if len(by_interval) < 2 or by_interval.keys() == self._intervals:
            return
        self._intervals = frozenset(by_interval)
        steps = sorted(by_interval)
        words = [
            f"{listed(sorted(by_interval[each])[:3], max(0, len(by_interval[each]) - 3))} {each}" for each in steps
        ]
        _log.info(
            "interval_steps differ: %s; rounds average them all the same",
            "; ".join(words[:8]),
            extra=event("intervals_differ", intervals=steps[:16]),
        )

    def nonfinite(self, values: Mapping[str, int], contributors: tuple[str, ...], global_step: int) -> None:
        """How many values of each worker's push were not finite, in a committed round. Logged for a worker's first such
        push, and again only after one of its pushes was finite."""
        for worker_id in contributors:
            record = self._roster.records.get(worker_id)
            if record is None:
                continue
            count = values.get(worker_id, 0)
            if count and not record.was_nonfinite:
                what = event("values_not_finite", worker=worker_id, round=global_step - 1, values=count)
                _log.warning(
                    "%d values that %r pushed for global_step %d are not finite (NaN, infinite), nor is the average",
                    count,
                    worker_id,
                    global_step,
                    extra=what,
                )
            record.was_nonfinite = count > 0
