"""How long a round waits: the grace period adapts to how late pushes have been."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ps_server.rules.policy import RoundPolicy
from ps_server.rules.quorum import Lateness
from tests.strategies import fast


def test_until_five_late_pushes_were_seen_the_grace_period_is_30_s() -> None:
    lateness = Lateness()
    lateness.observe([1.0] * 4)
    assert lateness.grace_s == 30.0
    lateness.observe([1.0])
    assert lateness.grace_s == 1.0


def test_the_grace_period_is_the_median_and_four_times_the_median_absolute_deviation() -> None:
    lateness = Lateness()
    lateness.observe([1.0, 2.0, 3.0, 5.0, 100.0])
    assert lateness.grace_s == 3.0 + 4 * 2.0, "deviations 0, 1, 2, 2 and 97"


def test_the_grace_period_is_never_less_than_half_a_second() -> None:
    lateness = Lateness()
    lateness.observe([0.01] * 9)
    assert lateness.grace_s == 0.5


def test_only_the_last_200_late_pushes_matter() -> None:
    lateness = Lateness()
    lateness.observe([60.0] * 500)
    lateness.observe([2.0] * 199)
    assert lateness.grace_s == 2.0
    lateness.observe([2.0])
    assert list(lateness._recent_s) == [2.0] * 200


@given(st.lists(st.floats(0, 1e6), min_size=5, max_size=50))
@fast
def test_the_grace_period_covers_at_least_half_of_the_late_pushes(late_s: list[float]) -> None:
    lateness = Lateness()
    lateness.observe(late_s)
    assert sum(value <= lateness.grace_s for value in late_s) >= len(late_s) / 2


def test_a_round_is_strict_when_it_needs_all() -> None:
    assert RoundPolicy.strict(3, round_timeout_s=9.0) == RoundPolicy(3, 3, 3, None, 9.0)
    assert RoundPolicy.strict(3).is_strict
    assert not RoundPolicy(3, 2, 3).is_strict
