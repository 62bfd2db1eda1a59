"""After a commit: the outcome for each push, and the log line."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from modelaverage.logs import event
from modelaverage.names import MAX_NAMES, listed, shown
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.flow.open_push import OpenPush
from ps_server.rules.decisions import Commit
from ps_server.seen.observations import Sending

__all__ = ["log_commit", "outcomes_of", "tell"]

_log = logging.getLogger("ps_server")


def outcomes_of(
    commit: Commit, pushes: Mapping[int, OpenPush], nonfinite: Mapping[str, int], center_id: int
) -> dict[OpenPush, pb.PushOutcome]:
    """The outcome for every attached push.

    Args:
        commit: the commit of the round.
        pushes: by stream.
        nonfinite: by worker, how many of the values that it pushed were not finite.
        center_id: names the bits of the new center.
    """
    common = pb.PushOutcome(
        global_step=commit.global_step,
        contributors=commit.contributors,
        untouched_variables=sorted(commit.untouched),
        center_id=center_id,
    )
    outcomes: dict[OpenPush, pb.PushOutcome] = {}
    for stream, verdict in commit.verdicts.items():
        push = pushes[stream]
        outcome = pb.PushOutcome(outcome=pb.Outcome.Name(verdict.outcome.value), waited_s=verdict.waited_s)
        outcome.MergeFrom(common)
        outcome.nonfinite_values = nonfinite.get(push.worker_id, 0)
        outcomes[push] = outcome
    return outcomes


def tell(outcomes: Mapping[OpenPush, pb.PushOutcome], held: Iterable[OpenPush], sending: Sending) -> None:
    """Publishes a commit: sets the outcome of every push and releases the held ones."""
    for push, outcome in outcomes.items():
        push.outcome, push.sending, push.reader.since_s = outcome, sending, sending.since_s
        push.progress.set()
    for push in held:
        push.is_held = False
        push.progress.set()


def log_commit(commit: Commit) -> None:
    """Logs the step reached and the contributors."""
    if not _log.isEnabledFor(logging.DEBUG):  # a line for every round, with many names
        return
    _log.debug(
        "global_step %d: averaged %s",
        commit.global_step,
        listed(commit.contributors, show=shown),
        extra=event(
            "round_committed",
            round=commit.global_step - 1,
            workers=commit.contributors[:MAX_NAMES],
            workers_omitted=max(0, len(commit.contributors) - MAX_NAMES),
            round_s=commit.round_s,
        ),
    )
