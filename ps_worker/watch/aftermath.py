"""What `ma-launch` says when workers end: that others wait for one of them, and at the end how the run went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from modelaverage.names import MAX_NAMES
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker.engines.engine import WorkerState
from ps_worker.engines.processes import how_it_ended

__all__ = ["missed", "what_happened"]


def missed(statuses: Sequence[pb.GetStatusResponse], workers: Sequence[WorkerState]) -> Mapping[str, str]:
    """Workers that have ended while others wait for them: by name, what to say about each.

    Args:
        statuses: of the servers.
        workers: all of them, the chief first.
    """
    running = {worker.name for worker in workers if worker.exit_code is None}
    found = {}
    for worker in workers:
        if worker.exit_code is None:
            continue
        ended = f"{worker.name} {_ended(worker.exit_code)}"
        for status in statuses:
            known = {each.worker_id for each in status.workers}
            waiting = sorted(running & {each.worker_id for each in status.workers if each.waiting})
            is_missing = worker.name in status.waiting_for or (
                bool(status.waiting_for_unknown) and worker.name not in known
            )
            if is_missing and waiting:
                found[worker.name] = (
                    f"{ended} while {_names(waiting)} {_s('wait', waiting)} for it at the barrier: it had not finished "
                    "(by leaving its hook normally, or with `session.finish()`). Ctrl-C ends the run"
                )
            elif status.phase == pb.PHASE_UNINITIALIZED and worker is workers[0] and running & known:
                waiting = sorted(running & known)
                found[worker.name] = (
                    f"{ended} without having initialized the center; {_names(waiting)} {_s('wait', waiting)} for that. "
                    "Ctrl-C ends the run"
                )
    return found


def what_happened(
    statuses: Sequence[pb.GetStatusResponse],
    workers: Sequence[WorkerState],
    elapsed_s: float,
    center_at: Sequence[Path] = (),
) -> str:
    """One line for the end of a run.

    Args:
        statuses: of the servers that answer.
        workers: all of them.
        elapsed_s: since the run's start.
        center_at: directories in which the servers keep the center; none: nowhere.
    """
    parts = [f"{_rounds(statuses)}in {elapsed_s:.1f} s"]
    finished = {worker.worker_id for status in statuses for worker in status.workers if worker.has_finished}
    ends: dict[tuple[str, str], list[str]] = {}
    for worker in workers:
        name = worker.name + (f" ({_restarts(worker.restarts)})" if worker.restarts else "")
        ends.setdefault(_end(worker, worker.name in finished), []).append(name)
    parts += [f"{_names(names)} {plural if len(names) > 1 else one}" for (one, plural), names in ends.items()]
    if center_at and any(status.phase != pb.PHASE_UNINITIALIZED for status in statuses):
        where = " ".join(map(str, center_at))
        parts.append(f"the center is in {where}")
    return "; ".join(parts)


def _rounds(statuses: Sequence[pb.GetStatusResponse]) -> str:
    if not statuses:
        return ""
    if any(status.phase == pb.PHASE_UNINITIALIZED for status in statuses):
        return "no center was initialized, "
    rounds = min(status.rounds_committed for status in statuses)
    return f"{rounds} round{'s' * (rounds != 1)}, global_step {min(s.global_step for s in statuses)}, "


def _end(worker: WorkerState, has_finished: bool) -> tuple[str, str]:
    """How a worker ended, in words: for one worker, and for several."""
    if worker.exit_code is None:
        return "was at work", "were at work"
    if worker.exit_code == 0:
        return ("finished", "finished") if has_finished else ("ended with exit code 0", "ended with exit code 0")
    how = how_it_ended(worker.exit_code)
    return how, how.replace("was ", "were ", 1)


def _ended(exit_code: int) -> str:
    return f"ended (exit code {exit_code})" if exit_code >= 0 else how_it_ended(exit_code)


def _names(names: Sequence[str]) -> str:
    if len(names) > MAX_NAMES:
        return f"{', '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES:,} more"
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _s(verb: str, subjects: Sequence[str]) -> str:
    return verb + "s" * (len(subjects) == 1)


def _restarts(count: int) -> str:
    return "1 restart" if count == 1 else f"{count} restarts"
