"""Messages in legal and illegal orders, over several streams of several workers at once, at servers of all policies.

Every push has its own values, made from the worker's name and the number of the push. So every center of the server can
be checked: it has to be the average of pushes that came whole.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np

from fuzz.context import ClientCall, Failure
from fuzz.corpus import CENTER_VALUE, INCARNATIONS, MODELS, initialize_messages, odd_fragment, push_header
from fuzz.finishing import Finishing
from fuzz.joins import PROCESSES, Joins
from fuzz.loop import EndlessError
from fuzz.witness import Given, Key, Witness
from fuzz.world import LONG_ENOUGH_S, STALL_TIMEOUT_S, World
from modelaverage.purpose import Purpose
from modelaverage.runtime.shared_memory import Segment, SegmentAddress
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.flow.call import FIRST_WRITE_TIMEOUT_S
from ps_server.rules.policy import RoundPolicy

__all__ = ["Event", "Push", "Sequence", "Sequences", "STEP", "WORKER_IDS"]

WORKER_IDS = ("a", "b", "\U0001f9e0" * 32, "d")
_BAD_IDS = ("", "x" * 129, "\u00fc" * 65)
_ODD_IDS = ("\U0001f9e0" * 32, "\x00\n", "chief")
_POLICIES = (
    *(RoundPolicy.strict(count) for count in (1, 2, 2, 3)),
    RoundPolicy.strict(2, round_timeout_s=20.0),
    RoundPolicy(3, 2, 4, grace_s=1.0),
    RoundPolicy(3, 1, 3, grace_s=0.0),
    RoundPolicy(2, 1, 3, round_timeout_s=7.0),
    RoundPolicy(4, 2, 4),
)
Event = tuple[Callable[[], None], float]
"""Something that may happen, and how often it does."""
_STOP_TIMEOUT_S = 3.0
# What a push is for, by a draw of 16; all others contribute.
_PURPOSES = {0: Purpose.ABSTAIN, 1: Purpose.ABSTAIN, 2: Purpose.RESTORE, 3: Purpose.RESTORE}
STEP = 5
_OTHER_MESSAGES = (
    b"",
    b"\xff\xff\xff\xff",
    b"\x12",
    b"\x12\x00",
    b"\x12\x80\x80\x80\x80\x08",
    pb.InitializeRequest(header=pb.InitializeHeader(worker_id="a")).SerializeToString(),
    pb.PushAndAverageResponse(waiting=pb.WaitingNotice(waiting_for=["a"])).SerializeToString(),
    pb.PushAndAverageRequest(shared=pb.SharedFragments(first=0, count=0)).SerializeToString(),
    pb.PushAndAverageRequest(shared=pb.SharedFragments(first=2**32 - 1, count=2**32 - 1)).SerializeToString(),
    pb.PushAndAverageRequest(fragment=pb.Fragment(), shared=pb.SharedFragments(count=1)).SerializeToString(),
)


@dataclass
class Push:
    """One push as its client sees it."""

    call: ClientCall
    key: Key
    header: pb.PushHeader
    first: int | None = None  # the first fragment that is wanted
    next: int = 0  # the next fragment that the client sends
    is_beside: bool = False  # whether its fragments go beside the call
    segment: Segment | None = None


class Sequences:
    """Plays one sequence of events after the other, each with a new server.

    Args:
        seed: another seed makes other sequences.
        name: of the target.
        kind: what happens in them.
    """

    inputs_per_world = 1
    inputs_each = 20

    def __init__(self, seed: int, name: str, kind: type[Sequence]) -> None:
        self.name = name
        self._kind = kind
        self.endings = Counter[str]()
        self._seed = seed
        self._grown: dict[str, int] = {}

    def begin(self, number: int) -> None:
        """See Target."""

    def play(self, number: int) -> None:
        """See Target."""
        sequence = self._kind(Random(f"{self._seed} {self.name} {number}"), self.endings)
        sequence.run()
        self._grown = sequence.world.grown()

    def finish(self) -> dict[str, int]:
        """See Target."""
        return self._grown


class Sequence:
    """One server, its clients, and what they know about each other."""

    has_connections = False
    long_enough_s = LONG_ENOUGH_S
    """A stream that has been silent for this long is no longer waited for."""

    def __init__(self, rng: Random, endings: Counter[str]) -> None:
        self._rng = rng
        self._endings = endings
        self._model = rng.choice(MODELS)
        self._policy = rng.choice(_POLICIES)
        self.world = World(self._policy, rng.random() < 0.3, self.has_connections)
        self._finishing = Finishing(self.world, self._policy, endings)
        self._witness = Witness(self.world, self._policy, self._finishing, endings)
        self.begins_with: list[Callable[[], None]] = []
        self._joins = Joins(self.world, self._policy.num_workers)
        self._initialized = False
        self._calls: list[ClientCall] = []
        self._pushes: dict[ClientCall, Push] = {}
        self._all_ahead = rng.random() < 0.1
        self._ahead_by = rng.choice((1, 2, 1000, 2**63 - 1))
        self._last_push_ids: dict[tuple[str, bytes], int] = {}
        self._events: list[Event] = [
            (self._open_push, 8),
            (self._push_on, 18),
            (self._push_the_rest, 6),
            (self._push_badly, 3),
            (self._half_close, 2),
            (self._vanish, 3),
            (self._stop_reading, 1),
            (self._read_again, 2),
            (self._pass_time, 3),
            (self._pull, 2),
            (self._initialize, 1),
            (self._leave, 3),
            (self._join, 4),
            (self._ask_status, 1),
            (self._come_in_crowds, 0.1),
            (self._end_job, 0.5),
        ]

    def run(self) -> None:
        """Plays it from the first to the last event."""
        if self._rng.random() < 0.9:
            self._witness.initials.append((STEP, self._model, CENTER_VALUE))
            self.world.initialize(self._model, STEP, "int8" if self._rng.random() < 0.3 else "")
            self._check()
        events, weights = zip(*self._events, strict=True)
        happened = list[str]()
        try:
            for event in (*self.begins_with, *self._rng.choices(events, weights, k=self._rng.choice((5, 20, 20, 40)))):
                happened.append(event.__name__)
                event()
                self.world.settle()
                self._check()
            self._end()
        except (Failure, EndlessError) as error:
            self.world.abandon()
            raise Failure(f"{error}\n{self._policy}, {self._model.manifest}\n{' '.join(happened)}") from error

    # Events.

    def _open_push(self) -> None:
        self._begin_push(self._rng.choice(WORKER_IDS[: self._policy.max_workers + 1]))

    def _begin_push(self, worker_id: str, is_good: bool = False) -> Push:
        """The next push of a worker, or an earlier one; it may be wrong in some way, unless it has to be good."""
        rng = self._rng
        incarnation = self._process_of(worker_id)
        last = self._last_push_ids.get((worker_id, incarnation), 1)
        push_id = last + 1 if is_good else max(0, last + rng.choice((0, 0, 0, 1, 1, 1, 1, -1)))
        self._last_push_ids[worker_id, incarnation] = max(last, push_id)
        key = worker_id, incarnation, push_id
        given = self._given(key)
        header = push_header(
            self._model,
            worker_id,
            self._base_step(is_good),
            incarnation=incarnation,
            push_id=push_id,
            weight=given.weight,
            untouched_variables=sorted(given.untouched),
            purpose=pb.Purpose.Value(f"PURPOSE_{given.purpose.name}"),
            accepts_shared_memory=rng.random() < 0.5,
            fragments_follow=rng.random() < 0.3,
            half_duplex=rng.random() < 0.15,
            accepts_combined=rng.random() < 0.5,
        )
        self._adorn(header)
        if rng.random() < 0.1 and not is_good:
            self._spoil(header)
        push = Push(self._opened("PushAndAverage"), key, header, is_beside=header.uses_data_connection)
        push.call.context.is_half_duplex = header.half_duplex and not header.uses_data_connection
        self._finishing.returned(push.call, header.worker_id)
        self._pushes[push.call] = push
        if rng.random() < 0.05 and not is_good:
            push.call.half_close()
        elif self._fragments_follow(header) and self._model.manifest.fragment_count and rng.random() < 0.5:
            push.call.send(pb.PushAndAverageRequest(header=header).SerializeToString() + self._next_fragment(push))
        else:
            push.call.send(pb.PushAndAverageRequest(header=header).SerializeToString())
        return push

    def _process_of(self, _worker_id: str) -> bytes:
        """The process of a worker that pushes."""
        return INCARNATIONS[self._rng.random() < 0.2]

    def _adorn(self, header: pb.PushHeader) -> None:
        """For subclasses to add to."""

    def _base_step(self, is_good: bool) -> int:
        rng, center = self._rng, self._witness.center
        step = 0 if center is None else center.step
        if rng.random() < 0.15 and not is_good:
            return rng.choice((max(0, step - 1), min(step + self._ahead_by, 2**63 - 2)))
        return min(step + self._ahead_by, 2**63 - 2) if step == STEP and self._all_ahead else step

    def _given(self, key: Key) -> Given:
        return self._witness.given.get(key) or self._witness.given.setdefault(key, self._new_push(key))

    @staticmethod
    def _fragments_follow(header: pb.PushHeader) -> bool:
        return (header.fragments_follow or header.half_duplex) and not header.uses_data_connection

    def _new_push(self, key: Key) -> Given:
        number = zlib.crc32(repr(key).encode())
        variables = range(len(self._model.manifest.variables))
        untouched = frozenset(v for v in variables if number >> 16 + v & 1) if number % 3 == 0 else frozenset[int]()
        purpose = _PURPOSES.get(number >> 10 & 15, Purpose.CONTRIBUTE)
        return Given(float(1 + number % 50), (1.0, 1.0, 2.0, 0.5)[number >> 8 & 3], untouched, purpose)

    def _spoil(self, header: pb.PushHeader) -> None:
        rng = self._rng
        match rng.randrange(8):
            case 0:
                header.worker_id = rng.choice(_BAD_IDS)
            case 1:
                header.incarnation = rng.choice((b"", bytes(15), bytes(17)))
            case 2:
                header.weight = rng.choice((0.0, -1.0, math.nan, math.inf, 1e-10, 1e10))
            case 3:
                header.base_step = rng.choice((2**63 - 1, 2**63, 2**64 - 1))
            case 4:
                header.manifest_id = rng.choice(("", "x" * 100, MODELS[0].manifest.id, MODELS[1].manifest.id))
            case 5:
                header.untouched_variables[:] = rng.choice(([1, 0], [0, 0], [2**32 - 1]))
            case 6:
                header.codec = rng.choice(("int8", "\n", "x" * 300))
            case _:
                header.Clear()

    def _next_fragment(self, push: Push) -> bytes:
        """The next fragment of a push, inline or in shared memory."""
        given, index, rng = self._witness.given[push.key], push.next, self._rng
        count = self._model.manifest.fragment_count
        if push.segment is not None and rng.random() < 0.6:
            push.next = rng.randint(index + 1, count)
            given.indexes.update(range(index, push.next))
            shared = pb.SharedFragments(first=index, count=push.next - index)
            return pb.PushAndAverageRequest(shared=shared).SerializeToString()
        push.next += 1
        given.indexes.add(index)
        if rng.random() < 0.2:
            return odd_fragment(index, self._model.pieces(given.value)[index])
        return self._model.fragments(given.value)[index]

    def _push_on(self) -> None:
        push = self._some_push()
        if push is not None and self._can_send(push):
            push.call.send(self._next_fragment(push))

    def _push_the_rest(self) -> None:
        push = self._some_push()
        while push is not None and self._can_send(push):
            push.call.send(self._next_fragment(push))
        if push is not None and self._rng.random() < 0.7:
            push.call.half_close()

    def _push_badly(self) -> None:
        push, rng = self._some_push(), self._rng
        if push is None:
            return
        pieces = self._model.pieces(99.0)
        index = max(0, min(push.next + rng.choice((-1, 0, 1, 2, 1000, 2**31, 2**32 - 1)), 2**32 - 1))
        piece = pieces[min(index, len(pieces) - 1)] if pieces else b""
        match rng.randrange(4):
            case 0:  # a header, again
                push.call.send(pb.PushAndAverageRequest(header=push.header).SerializeToString())
            case 1 if index != push.next or not pieces:  # another index
                push.call.send(odd_or_not(rng, index, piece))
            case 2:  # another size
                push.call.send(odd_or_not(rng, push.next, piece[:-1] if rng.random() < 0.5 else piece + b"\0"))
            case _:
                push.call.send(rng.choice(_OTHER_MESSAGES))

    def _can_send(self, push: Push) -> bool:
        """Whether a good client would send a fragment now."""
        if push.first is None and push.call.context.written:
            admission = pb.PushAndAverageResponse.FromString(push.call.context.written[0]).admission
            push.first = admission.first_needed_fragment
            push.next = max(push.next, push.first)
            if admission.HasField("contribution") and push.first == 0 == push.next:
                push.segment = self._lent(admission.contribution, self._witness.given[push.key].value)
        if push.is_beside or push.call.context.half_closed or push.next >= self._model.manifest.fragment_count:
            return False
        return self._fragments_follow(push.header) or push.first is not None

    def _lent(self, memory: pb.SharedMemory, value: float) -> Segment:
        flat = np.frombuffer(self._model.flat(value), np.uint8)
        segment = Segment.open(SegmentAddress(memory.path, memory.nonce), flat.size, writable=True)
        if segment is None:
            raise Failure("the memory that the server lends cannot be opened")
        segment.body[:] = flat
        return segment

    def _half_close(self) -> None:
        if self._calls:
            self._rng.choice(self._calls).half_close()

    def _vanish(self) -> None:
        if self._calls:
            self.world.vanish(self._rng.choice(self._calls), first_an_end=self._rng.random() < 0.5)

    def _stop_reading(self) -> None:
        if self._calls:
            self._rng.choice(self._calls).context.set_room(False)

    def _read_again(self) -> None:
        for call in self._calls:
            call.context.set_room(True)

    def _pass_time(self) -> None:
        self.world.advance(self._rng.choice((0.1, 0.6, 1.1, 6.0, STALL_TIMEOUT_S + 0.1, 40.0)))

    def _pull(self) -> None:
        worker_id = self._rng.choice((*WORKER_IDS, *_ODD_IDS, *_BAD_IDS))
        request = pb.PullRequest(
            worker_id=worker_id,
            wait_initialized=self._rng.random() < 0.5,
            header_only=self._rng.random() < 0.1,
            accepts_notices=self._rng.random() < 0.5,
            will_train=self._rng.random() < 0.5,
        )
        if self._rng.random() < 0.3:
            request.first_fragment = self._rng.choice((1, 2, 2**32 - 1))
            request.continued_step = max(0, self._base_step(is_good=True) + self._rng.choice((0, 0, -1)))
        call = self._opened("Pull", request.SerializeToString())
        if request.will_train:
            self._finishing.returned(call, worker_id)
        call.half_close()
        call.context.set_room(self._rng.random() < 0.7)

    def _initialize(self) -> None:
        rng = self._rng
        model = self._model if rng.random() < 0.8 else rng.choice(MODELS)
        step, value = rng.choice((0, STEP, 2**63 - 1, 2**63)), rng.choice((7.0, 8.0))
        messages = initialize_messages(model, rng.choice((*WORKER_IDS, *_ODD_IDS, *_BAD_IDS)), step, value)
        whole = rng.random() < 0.5
        if not whole and (kind := rng.randrange(4)) < 3:
            at = rng.randrange(len(messages))
            messages[at : at + (kind > 0)] = [rng.choice(_OTHER_MESSAGES)] if kind < 2 else []
        call = self._opened("Initialize")
        for message in messages:
            call.send(message)
        if rng.random() < 0.8:
            call.half_close()
        self._witness.initials.append((step, model, value))

    def _leave(self) -> None:
        rng = self._rng
        worker_id = rng.choice((*WORKER_IDS, *WORKER_IDS, *_BAD_IDS))
        incarnation = rng.choice((INCARNATIONS[0], INCARNATIONS[0], INCARNATIONS[1], b"", *PROCESSES))
        request = pb.LeaveRequest(worker_id=worker_id, incarnation=incarnation, finished=rng.random() < 0.4)
        call = self._opened("Leave", request.SerializeToString())
        if worker_id in WORKER_IDS and incarnation:
            self._joins.left(incarnation)
            self._finishing.left(call, request)

    def _end_job(self) -> None:
        """All finish, or all but one."""
        workers = list(WORKER_IDS[: self._policy.num_workers])
        if self._rng.random() < 0.5:
            workers.remove(self._rng.choice(workers))
        for worker_id in workers:
            request = pb.LeaveRequest(worker_id=worker_id, incarnation=INCARNATIONS[0], finished=True)
            self._joins.left(INCARNATIONS[0])
            self._finishing.left(self._opened("Leave", request.SerializeToString()), request)
            self.world.settle()
            self._check()

    def _join(self) -> None:
        rng = self._rng
        process = rng.choice(PROCESSES) if rng.random() < 0.95 else rng.choice((b"", bytes(17)))
        wanted = None if rng.random() < 0.6 else rng.choice((0, 0, 1, 1, 2, 3, 2**32 - 1))
        request = pb.JoinRequest(incarnation=process, task_index=wanted).SerializeToString()
        self._joins.asked(self._opened("Join", request), process, wanted)

    def _ask_status(self) -> None:
        self._opened("GetStatus", b"")

    def _come_in_crowds(self) -> None:
        """Connects many clients that do nothing, under names of the maximum length."""
        for number in range(40):
            request = pb.PullRequest(worker_id=f"{number:4}" + 31 * "\U0001f9e0")
            self._opened("Pull", request.SerializeToString())

    def _opened(self, rpc: str, request: bytes | None = None) -> ClientCall:
        self._calls.append(self.world.open(rpc, request))
        return self._calls[-1]

    def _some_push(self) -> Push | None:
        pushes = list(self._pushes.values())
        return self._rng.choice(pushes) if pushes else None

    def _check(self) -> None:
        has_committed = self._witness.look()
        self._finishing.check(has_committed)
        if self._witness.model is not None and not self._initialized:
            self._initialized, self._model = True, self._witness.model
            for given in self._witness.given.values():  # what came before belonged to another model
                given.indexes.clear()
            self.world.count_from_here()
        for call in [call for call in self._calls if call.done]:
            self._calls.remove(call)
            push = self._pushes.pop(call, None)
            self._endings[call.verdict()] += 1
            self._witness.hear(call, self._beside(call, push))
        self._joins.check()
        self.world.check_calls(len(self._calls))

    def _beside(self, _call: ClientCall, _push: Push | None) -> bytes | None:
        """The part of the answer to a push that has come outside its call."""
        return b""

    # The end.

    def _end(self) -> None:
        how = self._rng.randrange(4)
        if how == 0:
            self._read_again()
            self.world.advance(self.long_enough_s)
            self._check()
            for call in self._calls:
                self._check_may_wait(call)
        elif how == 1:
            self._stop_service()
        for call in self._calls:
            if not call.done:
                self.world.vanish(call, first_an_end=self._rng.random() < 0.5)
        self._check()

    def _check_may_wait(self, call: ClientCall) -> None:
        """Checks that, after the timeout for stalled streams, only calls that wait for others are still open."""
        job = self.world.job
        if call.rpc == "Join" or (call.rpc == "Pull" and job is None):
            return
        push = self._pushes.get(call)
        if push is not None and job is not None:
            self._can_send(push)
            # An earlier push of the worker may be whole; then this one waits for the round to end.
            is_whole = push.next >= job.manifest.fragment_count or push.key[0] in job.round.complete
            if is_whole or (push.first is None and job.round._held):
                return
        raise Failure(f"{call.rpc} does not end, though its client does nothing")

    def _stop_service(self) -> None:
        stopped = self.world.loop.create_task(self.world.service.stop(_STOP_TIMEOUT_S))
        self.world.settle()
        refused = self._opened("Pull", pb.PullRequest(worker_id="a").SerializeToString())
        self.world.settle()
        self.world.advance(_STOP_TIMEOUT_S + FIRST_WRITE_TIMEOUT_S + 0.1)
        if not stopped.done() or (left := [call.rpc for call in self._calls if not call.done]):
            raise Failure(f"{left} outlive the service" if stopped.done() else "the service does not stop")
        stopped.result()
        if refused.verdict() != "SERVER_STOPPING":
            raise Failure("a service that stops begins a new call")


def odd_or_not(rng: Random, index: int, piece: bytes) -> bytes:
    """A message with a fragment, in one encoding or another."""
    if rng.random() < 0.5:
        return odd_fragment(index, piece)
    return pb.PushAndAverageRequest(fragment=pb.Fragment(index=index, data=piece)).SerializeToString()
