"""A round whose caller commits as soon as possible, like a server without checkpoints."""

from __future__ import annotations

from typing import TypeAlias

from ps_server.rules.decisions import Commit, Decision, Prepare, Push
from ps_server.rules.round import Round

__all__ = ["CommittingRound", "Decided"]

Decided: TypeAlias = Decision | Commit


class CommittingRound(Round):
    """As Round, but each `Prepare` is replaced by the `Commit` that it asks for."""

    def open(self, stream: int, push: Push, now_s: float) -> list[Decided]:  # type: ignore[override]
        return self._committed(super().open(stream, push, now_s), now_s)

    def take_fragments(self, stream: int, first: int, end: int, now_s: float) -> list[Decided]:  # type: ignore[override]
        return self._committed(super().take_fragments(stream, first, end, now_s), now_s)

    def close(self, stream: int, now_s: float) -> list[Decided]:  # type: ignore[override]
        return self._committed(super().close(stream, now_s), now_s)

    def leave(self, worker_id: str, incarnation: bytes, now_s: float) -> list[Decided]:  # type: ignore[override]
        return self._committed(super().leave(worker_id, incarnation, now_s), now_s)

    def finish(self, worker_id: str, incarnation: bytes, now_s: float) -> list[Decided]:  # type: ignore[override]
        return self._committed(super().finish(worker_id, incarnation, now_s), now_s)

    def expire(self, now_s: float) -> list[Decided]:  # type: ignore[override]
        return self._committed(super().expire(now_s), now_s)

    def _committed(self, decisions: list[Decision], now_s: float) -> list[Decided]:
        if not self.prepared:
            return [*decisions]
        assert isinstance(decisions[-1], Prepare)
        return [*decisions[:-1], self.commit(now_s)]
