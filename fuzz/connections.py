"""Pushes whose bytes go on data connections, and hostile ones: strangers, void keys, bytes that are missing, surplus or
another push's, ends at any byte, readers that stop; on top of all that happens in sequences.py.

What is sent under a push's number is that push's values, as far as it goes. So the witness's rules hold as they are.
"""

from __future__ import annotations

import errno
from collections import Counter
from random import Random

from fuzz.context import ClientCall, Failure
from fuzz.sequences import WORKER_IDS, Push, Sequence
from fuzz.wires import Offer, Place, Wire
from fuzz.world import LONG_ENOUGH_S
from modelaverage.runtime.data_sockets import HALF_KEY_BYTES, NOTICES_IN_SILENCE, NUMBER
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.transports.data_port import _GREETING_TIMEOUT_S, _GREETINGS_AT_ONCE

__all__ = ["ConnectionSequence"]

# Numbers that no push of the fuzzer has.
_NO_NUMBERS = (2**32, 1 << 63, 2**64 - 1)
# How long the server waits after it could not accept a connection.
_PAUSE_S = 1.1


class ConnectionSequence(Sequence):
    """A server that listens for data connections."""

    has_connections = True
    # The server wakes up only now and then for a part of what it waits for; only then has it heard of that part.
    long_enough_s = LONG_ENOUGH_S + SILENCE_TIMEOUT_S / NOTICES_IN_SILENCE

    def __init__(self, rng: Random, endings: Counter[str]) -> None:
        super().__init__(rng, endings)
        self._offers: list[Offer] = []
        self._wires: list[Wire] = []
        self._by_push: dict[ClientCall, Wire | None] = {}
        self._numbers: dict[ClientCall, int] = {}
        self._strangers = 0
        self.begins_with = [self._push_together] * rng.choice((0, 1, 2))
        self._events += [
            (self._push_together, 6),
            (self._connect, 8),
            (self._greet_on, 4),
            (self._wire_on, 16),
            (self._wire_the_rest, 8),
            (self._wire_badly, 2),
            (self._end_wire, 4),
            (self._stop_reading_wire, 1),
            (self._come_as_strangers, 1),
            (self._run_out_of_descriptors, 0.3),
            (self._flood, 0.1),
        ]

    # What push headers say.

    def _adorn(self, header: pb.PushHeader) -> None:
        rng = self._rng
        place = header.worker_id, header.incarnation
        places = [wire.place for wire in self._usable()]
        has_own, has_any = place in places, any(each and each[0] == header.worker_id for each in places)
        header.accepts_data_connection = rng.random() < (0.1 if has_own else 0.8)
        header.uses_data_connection = rng.random() < (0.8 if has_own else 0.3 if has_any else 0.02)

    def _process_of(self, worker_id: str) -> bytes:
        places = [wire.place for wire in self._usable()]
        own = [place[1] for place in places if place is not None and place[0] == worker_id]
        return self._rng.choice(own) if own and self._rng.random() < 0.9 else super()._process_of(worker_id)

    def _begin_push(self, worker_id: str, is_good: bool = False) -> Push:
        push = super()._begin_push(worker_id, is_good)
        self._numbers[push.call] = len(self._numbers)
        self._by_push[push.call] = self._wire_for(push) if push.is_beside else None
        return push

    def _wire_for(self, push: Push) -> Wire | None:
        """Where a client sends the bytes: on its own connection, or on any other of the same worker."""
        own = [wire for wire in self._usable() if wire.place == push.key[:2]]
        others = [wire for wire in self._usable() if wire.place is not None and wire.place[0] == push.key[0]]
        return own[-1] if own and self._rng.random() < 0.95 else self._rng.choice(others) if others else None

    def _usable(self) -> list[Wire]:
        """The client's connections; mostly only those that the server has not closed."""
        closed_too = self._rng.random() < 0.02
        return [
            wire
            for wire in self._wires
            if wire.is_known and not wire.is_gone and (closed_too or not wire.socket.is_ended)
        ]

    # Events.

    def _push_together(self) -> None:
        """Lets every worker that a round waits for push and send everything."""
        for worker_id in WORKER_IDS[: self._policy.num_workers]:
            push = self._begin_push(worker_id, is_good=self._rng.random() < 0.9)
            self.world.settle()
            if push.is_beside:
                wire = self._by_push[push.call]
                if wire is not None and not wire.left:
                    self._begin_bytes(wire)
                    wire.send(len(wire.left))
                continue
            while self._can_send(push):
                push.call.send(self._next_fragment(push))
            push.call.half_close()
            self.world.settle()
            self._hear_offers()
            if self._offers and self._rng.random() < 0.7:
                self._open(self._offers[-1]).greet(HALF_KEY_BYTES)

    def _connect(self) -> None:
        """Opens a connection with a key, mostly the last one, else a void one; at once, in pieces or in part."""
        if not self._offers:
            return
        offer = self._offers[-1] if self._rng.random() < 0.7 else self._rng.choice(self._offers)
        wire = self._open(offer)
        wire.greet(self._rng.choice((HALF_KEY_BYTES, HALF_KEY_BYTES, HALF_KEY_BYTES, 1, 15, 0)))
        if not wire.hello and self._rng.random() < 0.2:  # and pushes before it has the answer
            self._begin_bytes(wire)
            wire.send(self._some_of(wire.left))

    def _open(self, offer: Offer) -> Wire:
        wire = Wire(self.world.listener.connect(), offer, offer.hello)
        newer = [each for each in self._offers if each.place[0] == offer.place[0] and each.made > offer.made]
        wire.is_void = offer.is_used or bool(newer)
        self._wires.append(wire)
        return wire

    def _greet_on(self) -> None:
        greeting = [wire for wire in self._wires if wire.hello and not wire.is_gone]
        if greeting:
            self._rng.choice(greeting).greet(self._rng.choice((1, 1, 7, HALF_KEY_BYTES)))

    def _wire_on(self) -> None:
        wire = self._some_wire()
        if wire is not None:
            if not wire.left:
                self._begin_bytes(wire)
            wire.send(self._some_of(wire.left))

    def _wire_the_rest(self) -> None:
        wire = self._some_wire()
        if wire is not None:
            if not wire.left:
                self._begin_bytes(wire)
            wire.send(len(wire.left))

    def _begin_bytes(self, wire: Wire) -> None:
        """Sends bytes, mostly of the push that waits for them; else of a later one, or under another's number."""
        assert wire.offer is not None
        rng, place = self._rng, wire.offer.place
        waiting = [
            self._pushes[call].key for call, its in self._by_push.items() if its is wire and call in self._pushes
        ]
        last = self._last_push_ids.get(place, 1)
        push_id = waiting[-1][2] if waiting and rng.random() < 0.95 else last + rng.choice((0, 1))
        key = *place, push_id  # of the process that owns the connection
        given = self._given(key)
        number = key[2] if rng.random() < 0.98 else rng.choice(_NO_NUMBERS)
        wire.begin(key, given, self._model.flat(given.value), self._model.manifest, number)

    def _wire_badly(self) -> None:
        """Sends more bytes than a push has. (Wrong bytes inside a push are other values, which nothing can detect.)"""
        wire = self._some_wire()
        if wire is not None and not wire.left:
            wire.send_badly(self._rng.choice((b"\xff", b"\xff" * 7, b"\xff" * 3000, *map(NUMBER.pack, _NO_NUMBERS))))

    def _some_of(self, left: bytes) -> int:
        size_bytes = self._model.manifest.fragment_size_bytes
        return self._rng.choice((1, 7, 8, 9, size_bytes, size_bytes + 1, len(left) // 2, len(left) - 1, len(left)))

    def _end_wire(self) -> None:
        wire = self._some_wire()
        if wire is None or self._rng.random() < 0.3:
            wire = self._rng.choice(self._wires) if self._wires else None
        if wire is not None:
            wire.end(self._rng.choice(("close", "half", "reset")))

    def _stop_reading_wire(self) -> None:
        if self._wires:
            self._rng.choice(self._wires).set_reading(False)

    def _read_again(self) -> None:
        super()._read_again()
        for wire in self._wires:
            wire.set_reading(True)
        self.world.listener.refuses = 0

    def _come_as_strangers(self) -> None:
        """Halves of keys, changed keys, zeros, too much, too little, silence."""
        rng = self._rng
        key = rng.choice(self._offers).key if self._offers else rng.randbytes(2 * HALF_KEY_BYTES)
        flipped = bytearray(key[:HALF_KEY_BYTES])
        flipped[rng.randrange(HALF_KEY_BYTES)] ^= 1 << rng.randrange(8)
        said = (
            bytes(flipped),
            key[HALF_KEY_BYTES:],
            key[8:24],
            bytes(HALF_KEY_BYTES),
            bytes(100),
            b"GET / HTTP/1.1\r\n",
            b"",
        )
        self._come(rng.choice(said))

    def _come(self, says: bytes) -> None:
        wire = Wire(self.world.listener.connect(), None, b"")
        self._strangers += 1
        wire.send_badly(says)
        if self._rng.random() < 0.3:
            wire.end(self._rng.choice(("close", "half", "reset")))
        self._wires.append(wire)

    def _flood(self) -> None:
        for _ in range(self._rng.choice((20, 70, 200))):
            self._come(self._rng.choice((b"", bytes(3), bytes(HALF_KEY_BYTES))))

    def _run_out_of_descriptors(self) -> None:
        self.world.listener.refuses = errno.EMFILE

    def _some_wire(self) -> Wire | None:
        """A known connection, mostly one that a push waits for."""
        usable = self._usable()
        waited_for = [wire for call, wire in self._by_push.items() if call in self._pushes and wire in usable]
        if waited_for and self._rng.random() < 0.8:
            return self._rng.choice(waited_for)
        return self._rng.choice(usable) if usable else None

    # Checks.

    def _check(self) -> None:
        self._hear_offers()
        for wire in self._wires:
            wire.check()
        super()._check()
        if not self._pushes:
            self._check_whole_pushes()

    def _check_whole_pushes(self) -> None:
        """On a connection that is ready for another push, the server waits for no bytes of an earlier one."""
        push_bytes = NUMBER.size + self._model.manifest.buffer_size_bytes
        for wire in self._wires:
            its = wire.socket.peer
            if not its.is_closed and wire.is_known and (its.taken_bytes - HALF_KEY_BYTES) % push_bytes:
                raise Failure("a push is over, and its data connection is still in the middle of it")

    def _hear_offers(self) -> None:
        known = {offer.key for offer in self._offers}
        for call, push in self._pushes.items():
            if call.context.written:
                admission = pb.PushAndAverageResponse.FromString(call.context.written[0]).admission
                key = admission.data_connection.key
                if admission.HasField("data_connection") and key not in known:
                    place: Place = push.header.worker_id, push.header.incarnation
                    self._offers.append(Offer(place, key, self._numbers[call]))

    def _beside(self, call: ClientCall, push: Push | None) -> bytes | None:
        if push is None or not push.is_beside or not call.completed:
            return b""
        # The server uses the last connection that this process opened. A client that has closed a connection does not
        # know what came on it.
        wires = [wire for wire in self._wires if wire.offer is not None and wire.offer.place == push.key[:2]]
        if any(wire.is_gone for wire in wires):
            return None
        size_bytes = self._model.manifest.buffer_size_bytes
        outcome = pb.PushAndAverageResponse.FromString(call.context.written[-1]).outcome
        self._endings["(committed beside)"] += outcome.outcome == pb.OUTCOME_COMMITTED
        ends = [wire.came()[-size_bytes:] for wire in wires if size_bytes]
        return next((end for end in ends if end == self._witness.center_of(outcome.global_step)), b"")

    def _check_may_wait(self, call: ClientCall) -> None:
        push = self._pushes.get(call)
        wire = self._by_push.get(call)
        if push is not None and push.is_beside and wire is not None and not wire.left and wire.is_straight:
            push.next = self._model.manifest.fragment_count
        super()._check_may_wait(call)

    def _end(self) -> None:
        super()._end()
        self.world.listener.refuses = 0
        self.world.advance(_PAUSE_S)
        if self._rng.random() < 0.3:  # strangers are sent away one after the other
            turns = 1 + self._strangers // _GREETINGS_AT_ONCE
            self.world.advance(_PAUSE_S + turns * _GREETING_TIMEOUT_S)
            if self.world.service.data_port._arriving:
                raise Failure("strangers who say nothing are not sent away")
        if self._rng.random() < 0.3:
            self.world.end_data_port()
        for wire in self._wires:
            wire.end("close")
        self._check()
        self.world.settle()
        self.world.advance(LONG_ENOUGH_S - _PAUSE_S)
