"""Counts rooms, floors, arrows and circles of each package: `python -m tests.rooms [TREE]`.

A room is a folder of the package or a module directly in it; generated code is no room. An arrow joins a room to one
that it imports from, at the top of a module or inside a function. Floors are counted along the longest chain of arrows;
rooms of one circle share a floor. Arrows up are the smallest set whose removal leaves no circle.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import grimp

__all__ = ["Arrows", "arrows_of", "arrows_up_of", "circles_of", "floors_of", "main"]

PACKAGES = ("modelaverage", "ps_server", "ma_client", "ps_worker")
# By importer, what it imports.
Arrows = dict[str, set[str]]


def arrows_of(graph: grimp.ImportGraph, package: str, depth: int) -> Arrows:
    """The arrows between the modules of a package, or, with a depth of 2, between its rooms."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:depth])

    modules = [module for module in graph.modules if module.split(".")[0] == package and "_pb2" not in module]
    arrows: Arrows = {room(module): set() for module in modules}
    for module in modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if room(imported) in arrows and room(imported) != room(module):
                arrows[room(module)].add(room(imported))
    return {room: below for room, below in arrows.items() if below or any(room in others for others in arrows.values())}


def reached_from(room: str, arrows: Arrows) -> set[str]:
    """The rooms that chains of arrows from this room lead to."""
    found: set[str] = set()
    ahead = [room]
    while ahead:
        ahead.extend(below := arrows[ahead.pop()] - found)
        found |= below
    return found


def circles_of(arrows: Arrows) -> list[list[str]]:
    """The groups of rooms each of which reaches all others of its group and itself."""
    reach = {room: reached_from(room, arrows) for room in arrows}
    circles = {frozenset(other for other in reach[room] if room in reach[other]) for room in arrows}
    return sorted(sorted(circle) for circle in circles if circle)


def floors_of(arrows: Arrows, circles: Iterable[list[str]]) -> int:
    """The rooms on the longest chain of arrows; a circle counts as one."""
    one = {room: room for room in arrows} | {room: circle[0] for circle in circles for room in circle}
    below = {top: {one[low] for room in arrows if one[room] == top for low in arrows[room]} - {top} for top in arrows}

    @cache
    def floor(room: str) -> int:
        return 1 + max((floor(low) for low in below[room]), default=0)

    return max(map(floor, one.values()), default=0)


def arrows_up_of(arrows: Arrows, circle: list[str]) -> int:
    """The smallest number of arrows of a circle that point up, over all orders of its rooms."""
    best = {0: 0}
    for _ in circle:
        longer: dict[int, int] = {}
        for standing, up in best.items():
            for bit, room in enumerate(circle):
                if not standing >> bit & 1:  # placed on the rooms so far: its imports from all others point up
                    ups = sum(not standing >> other & 1 and name in arrows[room] for other, name in enumerate(circle))
                    key = standing | 1 << bit
                    longer[key] = min(longer.get(key, up + ups), up + ups)
        best = longer
    return min(best.values())


def main(argv: list[str]) -> int:
    """Prints a table, and every circle of rooms or of modules."""
    tree = Path(argv[0] if argv else Path(__file__).parents[1]).resolve()
    sys.path[:0] = [str(tree / "proto"), str(tree)]
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    print(f"{'package':<14}{'rooms':>7}{'floors':>8}{'arrows':>8}{'up':>5}{'circles':>9}   circles of modules")
    lines = []
    for package in PACKAGES:
        arrows = arrows_of(graph, package, 2)
        circles, inner = circles_of(arrows), circles_of(arrows_of(graph, package, 9))
        up = sum(arrows_up_of(arrows, circle) for circle in circles)
        count = sum(map(len, arrows.values()))
        floors = floors_of(arrows, circles)
        print(f"{package:<14}{len(arrows):>7}{floors:>8}{count:>8}{up:>5}{len(circles):>9}   {len(inner)}")
        lines += [f"circle of rooms: {', '.join(circle)}" for circle in circles]
        lines += [f"circle of modules: {', '.join(circle)}" for circle in inner if circle not in circles]
    for line in lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
