"""Refuses every call of the server's core, one after the other, in plays of several rounds; prints the results.

python -m tests.refusals [--every] : with --every each error at several times of each call, else one error once
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

from tests.refusals.sites import ERRORS, PROBE, install

install()

from tests.refusals.kinds import PLAYS, Wrong  # noqa: E402
from tests.refusals.play import play  # noqa: E402


def hits(count: int, every: bool, turn: int) -> list[int]:
    """The chosen times out of ``count``."""
    some = sorted({1, (count + 1) // 2, count})
    return some if every else [some[turn % len(some)]]


def cases(reached: dict[str, dict[int, int]], every: bool) -> Iterator[tuple[str, int, int, str]]:
    """Play, site, time and error of each case; without ``every`` a site is refused in one play."""
    turns = itertools.count()
    for site in range(len(PROBE.sites)):
        plays = [name for name in PLAYS if reached[name].get(site)]
        if plays and not every:
            plays = [plays[next(turns) % len(plays)]]
        for name in plays:
            turn = next(turns)
            for hit in hits(reached[name][site], every, turn):
                errors = list(ERRORS) if every else [list(ERRORS)[turn % len(ERRORS)]]
                for error in errors:
                    yield name, site, hit, error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.refusals", description=__doc__)
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--play", choices=sorted(PLAYS))
    parser.add_argument("--site", help="only calls at places that contain this text")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    reached: dict[str, dict[int, int]] = {}
    for name in PLAYS:
        PROBE.arm(None)
        play(name)
        reached[name] = dict(PROBE.hits)
    everywhere = set[int]().union(*reached.values())
    report = {"sites": len(PROBE.sites), "reached": len(everywhere), "plays": 0, "refused": 0, "died": 0}
    report |= {"not_started": 0, "retries": 0}
    longest_s, wrong = 0.0, list[str]()
    for name, site, hit, error in cases(reached, arguments.every):
        where = f"{PROBE.sites[site]} (time {hit}, {error}, {name})"
        if (arguments.play or name) != name or (arguments.site or "") not in where:
            continue
        report["plays"] += 1
        PROBE.arm(site, hit, error)
        began_at_s = time.monotonic()
        try:
            result = play(name)
        except Wrong as found:
            wrong.append(f"{where}: {found}")
        except Exception as found:
            wrong.append(f"{where}: {found!r}")
        else:
            report["died"] += result.died
            report["retries"] += result.retries
            report["not_started"] += not result.started
        report["refused"] += PROBE.refused
        longest_s = max(longest_s, time.monotonic() - began_at_s)
        if report["plays"] % 50 == 0:
            gc.collect()
    untouched = [str(site) for number, site in enumerate(PROBE.sites) if number not in everywhere]
    print(json.dumps(report | {"longest_s": round(longest_s, 2), "wrong": wrong, "never_reached": untouched}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a thread whose start was refused halfway may wait forever
