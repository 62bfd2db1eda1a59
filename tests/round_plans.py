"""Plans for plays of the round: a job, and random events in phases. In each phase only some workers do anything; the
others are late or dead."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from modelaverage.purpose import Purpose
from ps_server.rules.policy import RoundPolicy
from tests.round_play import EVENTS, SECOND, Event, Play

__all__ = ["Plan", "plans", "random_plan"]


@dataclass(frozen=True)
class Plan:
    """A job, and what happens to it."""

    policy: RoundPolicy
    fragment_count: int
    purposes: tuple[Purpose, ...]
    events: tuple[Event, ...]

    def play(self, surplus: int = 1) -> Play:
        play = Play(self.policy, self.fragment_count, self.purposes, surplus)
        for event in self.events:
            play.happen(event)
        return play


_C, _A, _R = Purpose.CONTRIBUTE, Purpose.ABSTAIN, Purpose.RESTORE
_NUM_WORKERS = [1, 2, 3, 3, 4]
_MIN_WORKERS = [1, 2, 2, 3, 4]
_GRACE_S = [0.0, 2.0, 2.0, 5.0, None]
_ROUND_TIMEOUT_S = [None, None, 1.5, 8.0]
_FRAGMENT_COUNT = [0, 1, 2, 3, 3, 5]
_PURPOSES = [(_C,), (_C,), (_C, _C, _A), (_C, _R, _C, _A), (_R, _A), (_C, _R), (_A,)]
_Phase = tuple[Sequence[int], Sequence[Event]]


def _policy_of(num: int, min_: int, more: int, grace_s: float | None, round_timeout_s: float | None) -> RoundPolicy:
    if min_ >= num:
        return RoundPolicy.strict(num, round_timeout_s)
    return RoundPolicy(num, min_, num + more, grace_s, round_timeout_s)


def _plan_of(policy: RoundPolicy, fragment_count: int, purposes: tuple[Purpose, ...], phases: Sequence[_Phase]) -> Plan:
    events = [
        event if event.actor >= SECOND else Event(event.kind, active[event.actor % len(active)])
        for active, of_phase in phases
        for event in of_phase
    ]
    return Plan(policy, fragment_count, purposes, tuple(events))


def plans() -> st.SearchStrategy[Plan]:
    """Short plans, which hypothesis shrinks."""
    policies = st.builds(
        _policy_of,
        st.sampled_from(_NUM_WORKERS),
        st.sampled_from(_MIN_WORKERS),
        st.integers(0, 1),
        st.sampled_from(_GRACE_S),
        st.sampled_from(_ROUND_TIMEOUT_S),
    )
    active = st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True)
    phases = st.tuples(active, st.lists(st.sampled_from(EVENTS), min_size=4, max_size=16))
    return st.builds(
        _plan_of,
        policies,
        st.sampled_from(_FRAGMENT_COUNT),
        st.sampled_from(_PURPOSES),
        st.lists(phases, min_size=2, max_size=6),
    )


def random_plan(number: int) -> Plan:
    """Longer plans; each number gives another."""
    chance = random.Random(number)
    num_workers, min_workers, more = chance.choice(_NUM_WORKERS), chance.choice(_MIN_WORKERS), chance.randint(0, 1)
    policy = _policy_of(num_workers, min_workers, more, chance.choice(_GRACE_S), chance.choice(_ROUND_TIMEOUT_S))
    phases = [
        (chance.sample(range(5), chance.randint(1, 4)), chance.choices(EVENTS, k=chance.randint(4, 24)))
        for _ in range(chance.randint(3, 8))
    ]
    return _plan_of(policy, chance.choice(_FRAGMENT_COUNT), chance.choice(_PURPOSES), phases)
