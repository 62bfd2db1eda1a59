"""Documents as the page's server gives them, of runs that were never played."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Run", "Scene"]

Document = dict[str, Any]

_MODEL_SIZE_BYTES = 2_400_000


@dataclass
class Scene:
    """A moment of a run.

    Args:
        status: the document of /api/status.
        rounds: the document of /api/rounds, whole.
    """

    status: Document
    rounds: Document


@dataclass
class Run:
    """Rounds that are made up one after another."""

    names: Sequence[str]
    round_s: float = 0.42
    first_step: int = 0
    codec_ratio: float = 3.9
    at: float = 0.0
    rounds: list[Document] = field(default_factory=list)
    marks: list[Document] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(7)
        self._step = self.first_step

    def go_on(self, rounds: int, without: Sequence[str] = (), grace_s: float = 0.0, loss: bool = True) -> None:
        """Plays rounds; with ``without``, each waits for ``grace_s`` and gives these workers up."""
        active = [name for name in self.names if name not in without]
        for _ in range(rounds):
            began_at = self.at + self.round_s * 0.55
            workers = [self._worker(name, self.names.index(name), loss) for name in active]
            first_s = min(worker["pushed_s"] for worker in workers)
            for worker in workers:
                worker["pushed_s"] -= first_s
                worker["whole_s"] -= first_s
            last_s = max(worker["whole_s"] for worker in workers) + grace_s
            took_s = last_s + 0.03 * self.round_s
            losses = [worker["loss"] for worker in workers if worker["loss"] is not None]
            raw_bytes = _MODEL_SIZE_BYTES * len(active)
            moved_bytes = int(raw_bytes / self.codec_ratio)
            self.rounds.append(
                {
                    "step": self._step,
                    "count": 1,
                    "began_at": began_at,
                    "committed_at": began_at + took_s,
                    "took_s": took_s,
                    "waiting_s": last_s * 0.7,
                    "receiving_s": last_s * 0.3,
                    "averaging_s": 0.03 * self.round_s,
                    "received_bytes": moved_bytes,
                    "received_raw_bytes": raw_bytes,
                    "sent_bytes": moved_bytes,
                    "sent_raw_bytes": raw_bytes,
                    "loss": sum(losses) / len(losses) if losses else None,
                    "loss_min": min(losses, default=None),
                    "loss_max": max(losses, default=None),
                    "nonfinite_values": 0,
                    "workers": workers,
                    "without": list(without),
                }
            )
            self.at = began_at + took_s
            self._step += 1
            if self._step % 50 == 0:
                self.mark("checkpoint", None)

    def mark(self, kind: str, worker_id: str | None) -> None:
        """Something happened just before the last commit."""
        self.marks.append({"at": self.at - 0.01, "step": self._step, "kind": kind, "worker_id": worker_id})

    def _worker(self, name: str, index: int, loss: bool) -> Document:
        late_s = self.round_s * (0.02 + 0.05 * (index % 5) + abs(self._chance.gauss(0, 0.06)))
        push_s = self.round_s * self._chance.uniform(0.08, 0.12)
        value = 0.35 + 2.1 * math.exp(-self._step / 160) + 0.04 * (index % 5) + self._chance.gauss(0, 0.05)
        return {
            "worker_id": name,
            "pushed_s": late_s,
            "whole_s": late_s + push_s,
            "loss": max(0.05, value) if loss else None,
            "local_step": (self._step + 1) * 10,
            "nonfinite_values": 0,
        }

    def documents(self, now_at: float, **status: Any) -> Scene:
        """The run so far, moved in time so that its last commit is a while before ``now_at``."""
        since_s = status.get("round_age_s", 0.0) + 0.4 * self.round_s
        move_s = now_at - since_s - self.at
        for round_ in self.rounds:
            round_["began_at"] += move_s
            round_["committed_at"] += move_s
        for mark in self.marks:
            mark["at"] += move_s
        last = self.rounds[-1] if self.rounds else None
        plain = _status(self.names, last, self._step, self.round_s, **status)
        events = [
            {"id": 1, "at": now_at - 90, "level": "info", "name": "listening", "text": "127.0.0.1:2222"},
            {"id": 2, "at": now_at - 80, "level": "info", "name": "initialized", "text": "step 0, 2.3 MiB"},
        ]
        if plain["waiting_for"]:
            text = f"round {self._step} has waited for 5 s for {', '.join(plain['waiting_for'])}"
            events.append({"id": 3, "at": now_at - 1, "level": "warning", "name": "round_waits", "text": text})
        return Scene(
            {
                "now_at": now_at,
                "server": {
                    "version": "0.9.0",
                    "address": "127.0.0.1:2222",
                    "started_at": now_at - plain["uptime_s"],
                    "first_step": self.first_step,
                    "restored": self.first_step > 0,
                    "shard": {"index": 0, "count": 1},
                },
                "status": plain,
                "waiting": [
                    {"worker_id": name, "for_s": plain["round_age_s"], "is_late": plain["round_age_s"] > 5}
                    for name in plain["waiting_for"]
                ],
                "traffic": {
                    "by_transport": {
                        "messages": sum(r["received_bytes"] + r["sent_bytes"] for r in self.rounds),
                        "data_connection": 0,
                        "shared_memory": 0,
                    }
                },
                "shards": [],
                "events": events,
            },
            {
                "whole": True,
                "first_step": self.first_step,
                "next_step": self._step,
                "detailed_from": self.first_step,
                "kept_from": self.first_step,
                "rounds": self.rounds,
                "marks": self.marks,
            },
        )


def _status(names: Sequence[str], last: Document | None, step: int, round_s: float, **fields: Any) -> Document:
    """A status as `ps-server status --json` prints it."""
    awaited = fields.get("waiting_for", [])
    by_name = {} if last is None else {worker["worker_id"]: worker for worker in last["workers"]}
    late_s = {name: worker["whole_s"] for name, worker in by_name.items()}
    first_s = min(late_s.values(), default=0.0)
    workers = [
        {
            "worker_id": name,
            "is_chief": index == 0,
            "local_step": by_name[name]["local_step"] if name in by_name else 10 * step,
            "fragments_given": 0,
            "waiting": bool(awaited) and name not in awaited,
            "last_seen_age_s": fields.get("round_age_s", 0.0) + 0.1 if name in awaited else 0.1,
            "nonfinite_values": 0,
            "pushes_counted": step,
            "lateness_s": late_s[name] - first_s if name in late_s else None,
            "loss": by_name[name]["loss"] if name in by_name else None,
            "transport": "TRANSPORT_TCP",
            "peer": "ipv4:127.0.0.1:50000",
            "has_finished": bool(fields.get("job_over")),
            "has_left": False,
            "interval_steps": 10,
        }
        for index, name in enumerate(names)
    ]
    moved_bytes = step * _MODEL_SIZE_BYTES
    return {
        "phase": "PHASE_AVERAGING" if awaited else "PHASE_IDLE",
        "global_step": step,
        "num_workers": len(names),
        "min_workers": len(names),
        "waiting_for": [],
        "waiting_for_unknown": 0,
        "waiting_for_omitted": 0,
        "round_age_s": 0.0,
        "workers": workers if step else [],
        "workers_omitted": 0,
        "model_size_bytes": _MODEL_SIZE_BYTES,
        "manifest_id": "5f0c",
        "received_bytes": moved_bytes,
        "sent_bytes": moved_bytes,
        "received_raw_bytes": 4 * moved_bytes,
        "sent_raw_bytes": 4 * moved_bytes,
        "shared_bytes": 0,
        "uptime_s": 95.0,
        "last_round_s": 0.0 if last is None else last["took_s"],
        "rounds_restarted": 0,
        "stale_pushes": 0,
        "rounds_without_all": 0,
        "pushes_retried": 0,
        "checkpoint_step": step // 50 * 50 if step >= 50 else None,
        "checkpoint_age_s": 12.0 if step >= 50 else None,
        "checkpoint_problem": "",
        "checkpoint_writing_s": None,
        "shard": None,
        "rounds_committed": step,
        "rounds_per_minute": 60 / max(round_s, fields.get("round_age_s", 0.0)) if step else 0.0,
        "connected_workers": 0,
        "workers_finished": 0,
        "job_over": False,
        "outer_optimizer": "sgd:lr=0.7,momentum=0.9,nesterov" if step else "",
        "compression": "int8" if step else "",
        **fields,
    }
