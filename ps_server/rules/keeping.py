"""When a round must wait for its checkpoint before it commits. Pure: the caller writes and reports the end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ps_server.rules.decisions import KeepFirst, Prepare
from ps_server.rules.policy import KeepingPolicy

__all__ = ["Keeping"]


@dataclass
class Keeping:
    """The writes of checkpoints that affect rounds. Each write has a token.

    - A round that is due is written first. It commits when the write ends, successful or not.
    - Its write begins only after any earlier write has ended.
    - No wait is longer than the timeout. After a timeout, rounds do not wait until the disk has finished all writes.
    - If a round starts over after its write has begun, the disk may hold a center that was never committed. The next
      round is then due whatever its step, so that its checkpoint replaces that one.

    Args:
        policy: which rounds are due; None: no checkpoints are written.
    """

    policy: KeepingPolicy | None = None
    _last_token: int = field(default=0, init=False)
    _under_way: dict[int, bool] = field(default_factory=dict, init=False)  # by token: whether the write is of a round
    _overdue: bool = field(default=False, init=False)  # whether a round's wait for the current writes timed out
    _void: int | None = field(default=None, init=False)  # write of a round that started over, until it is replaced
    # The prepared round: its step, since when it has waited (None: it does not wait), and its write.
    _step: int | None = field(default=None, init=False)
    _since_s: float = field(default=0.0, init=False)
    _own: int | None = field(default=None, init=False)

    @property
    def is_waiting(self) -> bool:
        """Whether a prepared round waits for a write."""
        return self._step is not None

    @property
    def due_at_s(self) -> float | None:
        """When a prepared round stops waiting."""
        if self._step is None or self.policy is None or self.policy.timeout_s is None:
            return None
        return self._since_s + self.policy.timeout_s

    def prepare(self, global_step: int, now_s: float) -> list[KeepFirst | Prepare]:
        """A round is prepared; its commit will reach this step."""
        due = self.policy is not None and (self._void is not None or global_step % self.policy.every_rounds == 0)
        if not due or (self._under_way and self._overdue):
            return [Prepare(global_step)]
        self._step, self._since_s = global_step, now_s
        return [] if self._under_way else self._begin_own(now_s)

    def begin(self) -> int:
        """The caller begins to write the current center, independently of a round. Returns the write's token."""
        return self._begin(of_a_round=False)

    def kept(self, token: int, written: bool, now_s: float) -> list[KeepFirst | Prepare]:
        """A write has ended; `written` is whether it succeeded. Ignored if its round is already over."""
        of_a_round = self._under_way.pop(token, False)
        if not self._under_way:
            self._overdue = False
        if of_a_round and written and self._void is not None and token > self._void:
            self._void = None
        if self._step is None:
            return []
        if token == self._own:
            return self._go_on(self._step)
        return [] if self._under_way or self._own is not None else self._begin_own(now_s)

    def expire(self, now_s: float) -> list[KeepFirst | Prepare]:
        """Time has passed."""
        due_at_s = self.due_at_s
        if self._step is None or due_at_s is None or now_s < due_at_s:
            return []
        self._overdue = True
        return self._go_on(self._step)

    def committed(self) -> None:
        """The prepared round has committed."""
        self._step = self._own = None

    def start_over(self, begun: int | None = None, under_way: Collection[int] = ()) -> None:
        """The round starts over: a write of it that has begun is void.

        Args:
            begun: the last token whose write has begun; None: all have, and their ends were told.
            under_way: otherwise, the tokens of the writes that have begun and not ended.
        """
        if begun is not None:
            self._under_way = {token: self._under_way[token] for token in under_way if token in self._under_way}
        if self._own is not None and (begun is None or self._own <= begun):
            self._void = self._own
        self._step = self._own = None

    def _begin_own(self, now_s: float) -> list[KeepFirst | Prepare]:
        self._own, self._since_s = self._begin(of_a_round=True), now_s
        return [KeepFirst(self._own)]

    def _begin(self, *, of_a_round: bool) -> int:
        self._last_token += 1
        self._under_way[self._last_token] = of_a_round
        return self._last_token

    def _go_on(self, global_step: int) -> list[KeepFirst | Prepare]:
        self._step = None
        return [Prepare(global_step)]
