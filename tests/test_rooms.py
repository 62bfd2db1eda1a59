"""The count of rooms and arrows, on graphs small enough to count by hand."""

from __future__ import annotations

from tests.rooms import Arrows, arrows_up_of, circles_of, floors_of

TOWER: Arrows = {"top": {"left", "right"}, "left": {"bottom"}, "right": {"left"}, "bottom": set()}
RING: Arrows = {"door": {"a"}, "a": {"b"}, "b": {"a", "c", "cellar"}, "c": {"b"}, "cellar": set()}


def test_without_a_circle_nothing_points_up_and_the_longest_chain_counts() -> None:
    assert circles_of(TOWER) == []
    assert floors_of(TOWER, []) == 4


def test_a_circle_is_one_floor_and_has_as_few_arrows_up_as_can_be() -> None:
    assert circles_of(RING) == [["a", "b", "c"]]
    assert floors_of(RING, [["a", "b", "c"]]) == 3
    assert arrows_up_of(RING, ["a", "b", "c"]) == 2, "one of a and b, one of b and c"


def test_two_circles_are_counted_apart() -> None:
    both: Arrows = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}}
    assert circles_of(both) == [["a", "b"], ["c", "d"]]
    assert [arrows_up_of(both, circle) for circle in circles_of(both)] == [1, 1]
