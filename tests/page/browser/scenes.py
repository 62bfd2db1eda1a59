"""Moments of runs that were never played: what a browser is shown in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.page.browser.documents import Run, Scene

__all__ = ["HOSTILE_NAMES", "SCENES", "scene"]

HOSTILE_NAMES = (
    "<img src=x onerror=alert(1)>",
    "worker-" + "long" * 30,
    "\u202etxt.exe\u202c",
    "'><script>document.title='owned'</script>",
    "عامل-٣",
    "a\u0000b\nc\u2028d",
)
_NAMES = ("worker-0", "worker-1", "worker-2", "worker-3")


def _chief(now_at: float) -> Scene:
    return Run(_NAMES).documents(now_at, phase="PHASE_UNINITIALIZED", uptime_s=12.0, model_size_bytes=0)


def _training(now_at: float) -> Scene:
    run = Run(_NAMES)
    run.go_on(140)
    run.mark("stale", "worker-3")
    run.go_on(20)
    run.mark("restarted", "worker-2")
    run.go_on(90)
    return run.documents(now_at, stale_pushes=1)


def _killed(now_at: float) -> Scene:
    run = Run(_NAMES)
    run.go_on(130)
    return run.documents(now_at, waiting_for=["worker-1"], round_age_s=16.3)


def _quorum(now_at: float) -> Scene:
    run = Run(_NAMES)
    run.go_on(110)
    run.go_on(5, without=["worker-1"], grace_s=2.0)
    run.go_on(60)
    run.mark("restarted", "worker-1")
    run.go_on(8, without=["worker-3"], grace_s=2.0)
    return run.documents(
        now_at, min_workers=3, rounds_without_all=13, waiting_for=["worker-3"], round_age_s=1.2, rounds_per_minute=24.0
    )


def _over(now_at: float) -> Scene:
    run = Run(_NAMES)
    run.go_on(300)
    for name in _NAMES:
        run.mark("finished", name)
    return run.documents(now_at, job_over=True, workers_finished=4)


def _hostile(now_at: float) -> Scene:
    run = Run(HOSTILE_NAMES)
    run.go_on(60)
    scene = run.documents(now_at, waiting_for=[HOSTILE_NAMES[0], HOSTILE_NAMES[1]], round_age_s=7.0)
    text = f"refused {HOSTILE_NAMES[3]} \x1b[31mred"
    event = {"id": 9, "at": now_at, "level": "error", "name": "<b>bold</b>", "text": text}
    scene.status["events"].append(event)
    scene.status["status"]["outer_optimizer"] = HOSTILE_NAMES[0]
    return scene


def _many(now_at: float) -> Scene:
    run = Run([f"worker-{index}" for index in range(64)], round_s=2.0)
    run.go_on(220)
    return run.documents(now_at)


def _shards(now_at: float) -> Scene:
    run = Run(_NAMES)
    run.go_on(130)
    shard = {"index": 2, "count": 4, "job_id": "ab"}
    scene = run.documents(now_at, waiting_for=["worker-1"], round_age_s=1.3, shard=shard)
    own = {name: value for name, value in scene.status["status"].items() if name != "workers"}
    scene.status["server"]["shard"] = {"index": 2, "count": 4}
    others: list[tuple[int, str, dict[str, Any]]] = [
        (0, "", {"global_step": 131, "waiting_for": [], "phase": "PHASE_IDLE"}),
        (1, "", {"waiting_for": ["worker-1", "worker-3"], "round_age_s": 7.0}),
        (3, "the parameter server at 10.0.0.4:2222 did not answer within 2 s", {}),
    ]
    scene.status["shards"] = [{"address": "127.0.0.1:2222", "problem": "", "away_s": 0.0, "status": own}] + [
        {
            "address": f"10.0.0.{index + 1}:2222",
            "problem": problem,
            "away_s": 21.0 if problem else 0.0,
            "status": own | {"shard": {"index": index, "count": 4, "job_id": "ab"}} | fields,
        }
        for index, problem, fields in others
    ]
    return scene


def _restored(now_at: float) -> Scene:
    run = Run(_NAMES, first_step=600)
    run.mark("restored", None)
    run.go_on(40)
    run.rounds[20]["nonfinite_values"] = 3
    run.rounds[20]["loss"] = run.rounds[20]["loss_max"] = "NaN"
    return run.documents(now_at, rounds_committed=40, checkpoint_problem="No space left on device: /checkpoints")


def _old(now_at: float) -> Scene:
    """A long history: 10 rounds in each of the older entries."""
    run = Run(_NAMES)
    run.go_on(3000)
    older = [
        {**run.rounds[at], "count": 10, "committed_at": run.rounds[at + 9]["committed_at"]} for at in range(0, 2500, 10)
    ]
    for entry in older:
        for name in ("received_bytes", "received_raw_bytes", "sent_bytes", "sent_raw_bytes"):
            entry[name] *= 10
        del entry["workers"], entry["without"]
    run.rounds[:2500] = older
    scene = run.documents(now_at)
    scene.rounds["detailed_from"] = 2500
    return scene


SCENES: dict[str, Callable[[float], Scene]] = {
    "chief": _chief,
    "training": _training,
    "killed": _killed,
    "quorum": _quorum,
    "over": _over,
    "hostile": _hostile,
    "many": _many,
    "shards": _shards,
    "restored": _restored,
    "old": _old,
}


def scene(name: str) -> Scene:
    """One of SCENES, as of now."""
    return SCENES[name](time.time())
