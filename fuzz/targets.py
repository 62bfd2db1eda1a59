"""Mutated messages for every handler, at a server whose rounds can never commit: the center has to stay as it is."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import Protocol

from google.protobuf.message import DecodeError, Message

from fuzz.connections import ConnectionSequence
from fuzz.context import ClientCall, Failure
from fuzz.corpus import CONVERSATIONS, MODELS, RESPONSES, STEP
from fuzz.fields import with_other_fields
from fuzz.mutate import mutated
from fuzz.pages import PageRequests
from fuzz.sequences import Sequence, Sequences
from fuzz.tls import TlsHandshakes
from fuzz.world import LONG_ENOUGH_S, Center, World
from modelaverage.codecs import codec_named
from modelaverage.outer import AVERAGE, outer_optimizer
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import RoundPolicy

__all__ = ["TARGETS", "Bytes", "Target", "target_named"]

# More workers than ever come.
_NUM_WORKERS = 1 << 20
_POLICIES = (RoundPolicy.strict(_NUM_WORKERS), RoundPolicy(_NUM_WORKERS, _NUM_WORKERS - 1, _NUM_WORKERS))
_UNARY = ("Pull", "Leave", "GetStatus", "Join")
_REQUESTS: Mapping[str, type[Message]] = {
    "Initialize": pb.InitializeRequest,
    "Pull": pb.PullRequest,
    "PushAndAverage": pb.PushAndAverageRequest,
    "Leave": pb.LeaveRequest,
    "GetStatus": pb.GetStatusRequest,
    "Join": pb.JoinRequest,
}
_RESPONSES: Mapping[str, type[Message]] = {
    "Initialize": pb.InitializeResponse,
    "Pull": pb.PullResponse,
    "PushAndAverage": pb.PushAndAverageResponse,
    "Leave": pb.LeaveResponse,
    "GetStatus": pb.GetStatusResponse,
    "Join": pb.JoinResponse,
}


class Target(Protocol):
    """Something to throw hostile input at. Input ``number`` is the same in every run with the same seed.

    Attributes:
        name: its name in reports.
        inputs_per_world: after this many inputs, a new service replaces the old one.
        inputs_each: as how many of the requested inputs one input of this target counts.
        endings: how calls ended, and how often.
    """

    name: str
    inputs_per_world: int
    inputs_each: int
    endings: Counter[str]

    def begin(self, number: int) -> None:
        """Makes the world that the input ``number`` and those after it meet."""

    def play(self, number: int) -> None:
        """One input. Raises Failure."""

    def finish(self) -> dict[str, int]:
        """Ends the world. Returns by how many entries its tables have grown; raises Failure if one must not grow."""


class Bytes:
    """Streams of well-formed messages, of which a few have been changed."""

    inputs_per_world = 500
    inputs_each = 1

    def __init__(self, seed: int, rpc: str) -> None:
        self.name = rpc
        self.endings = Counter[str]()
        self._seed = seed
        self._worlds: list[World] = []
        self._others = {
            model: [m for talks in CONVERSATIONS[number].values() for talk in talks for m in talk] + RESPONSES[number]
            for number, model in enumerate(MODELS)
        }

    def begin(self, number: int) -> None:
        """See Target."""
        for world in self._worlds:
            world.abandon()
        rng = Random(f"{self._seed} {self.name} world {number // self.inputs_per_world}")
        self._number = rng.randrange(len(MODELS))
        self._model = MODELS[self._number]
        self._policy, self._shared = rng.choice(_POLICIES), rng.random() < 0.3
        self._connections = rng.random() < 0.5
        # Initialize meets a server without a center; so does every other call now and then.
        self._initialized = rng.random() < (0.3 if self.name == "Initialize" else 0.95)
        self._compression = rng.choice(("", "int8", "int8", "bfloat16"))
        self._renew()

    @property
    def _world(self) -> World:
        return self._worlds[0]

    def _renew(self) -> None:
        self._worlds = [World(self._policy, self._shared, self._connections)]
        self._center: Center | None = None
        if self._initialized:
            self._center = self._world.initialize(self._model, STEP, self._compression)

    def play(self, number: int) -> None:
        """See Target."""
        rng = Random(f"{self._seed} {self.name} {number}")
        messages = self._messages(rng)
        world = self._world
        if self.name in _UNARY:
            call = world.open(self.name, messages[0])
        else:
            call = world.open(self.name)
            in_steps = rng.random() < 0.1
            for message in messages:
                call.send(message)
                if in_steps:
                    world.settle()
            if rng.random() < 0.8:
                call.half_close()
        world.settle()
        if not call.done and rng.random() < 0.4:
            world.advance(LONG_ENOUGH_S)
            self._check_may_wait(call)
        if not call.done:
            world.vanish(call, first_an_end=rng.random() < 0.5)
        self.endings[call.verdict()] += 1
        self._check_answer(call)
        world.check_calls(0)
        self._check_center(messages)

    def finish(self) -> dict[str, int]:
        """See Target."""
        return self._world.grown()

    def _messages(self, rng: Random) -> list[bytes]:
        """A conversation; in nine out of ten something is wrong."""
        talks = CONVERSATIONS[self._number]
        messages = list(rng.choice(talks[self.name]))
        others = self._others[self._model]
        if rng.random() < 0.05:
            messages[0] = rng.choice(others)
        if rng.random() < 0.1:
            return messages
        if self.name == "PushAndAverage" and rng.random() < 0.5:
            messages[0] = _by_somebody_else(rng, messages[0])
        if self.name not in _UNARY and rng.random() < 0.1:
            del messages[rng.randrange(len(messages)) + 1 :]
        if self.name not in _UNARY and rng.random() < 0.1:
            kind, at = rng.randrange(4), rng.randrange(len(messages))
            if kind == 0:
                messages.insert(at, rng.choice(messages))
            elif kind == 1:
                messages.insert(at, rng.choice(others))
            elif kind == 2 and len(messages) > 1:
                del messages[at]
            else:
                messages[at], messages[-1] = messages[-1], messages[at]
        for _ in range(rng.choice((1, 1, 1, 2))):
            at = 0 if rng.random() < 0.25 else rng.randrange(len(messages))
            if rng.random() < 0.5:
                messages[at] = mutated(rng, messages[at], others)
            else:
                messages[at] = with_other_fields(rng, _REQUESTS[self.name], messages[at])
        return messages

    def _check_may_wait(self, call: ClientCall) -> None:
        """Checks that a call outlasts the stall timeout only if it waits for others or for the end of its process."""
        job = self._world.job
        if call.done or self.name == "Join" or (self.name == "Pull" and job is None):
            return
        if self.name == "PushAndAverage" and job is not None:
            waiting = {part.worker_id for part in job._pushes.values()}
            if waiting and waiting <= job.round.complete:
                return
        raise Failure(f"{self.name} does not end, {LONG_ENOUGH_S:g} s after its last message")

    def _check_answer(self, call: ClientCall) -> None:
        response_type = _RESPONSES[self.name]
        for message in call.context.written:
            response_type.FromString(message)
        if call.completed and call.response is not None:
            response_type.FromString(call.response)

    def _check_center(self, messages: list[bytes]) -> None:
        center = self._world.center()
        if center == self._center:
            return
        if self._center is not None or self.name != "Initialize":
            raise Failure(f"the center changed from {self._center} to {center}")
        _check_initialized(self._world, messages)
        self._renew()


def _by_somebody_else(rng: Random, message: bytes) -> bytes:
    """A push of another worker, since a worker whose push is whole soon has nothing more to send."""
    with contextlib.suppress(DecodeError):
        request = pb.PushAndAverageRequest.FromString(message)
        request.header.worker_id = f"worker-{rng.randrange(1000)}"
        return request.SerializeToString()
    return message


def _check_initialized(world: World, messages: list[bytes]) -> None:
    """Raises Failure unless the center is what a whole stream says, as protobuf itself reads it."""
    job = world.job
    assert job is not None
    parsed = [pb.InitializeRequest.FromString(message) for message in messages]
    header = parsed[0].header
    if not parsed[0].HasField("header") or job.round.global_step != header.global_step:
        raise Failure(f"the center was initialized at {job.round.global_step} by {parsed[0]}")
    if job.center.outer != (outer_optimizer(header.outer_optimizer) if header.outer_optimizer else AVERAGE):
        raise Failure(f"{header.outer_optimizer!r} was named, and the center has {job.center.outer}")
    if job.center.codec is not codec_named(header.compression):
        raise Failure(f"{header.compression!r} was named, and the center has {job.center.codec.name}")
    flat = b"".join(message.fragment.data for message in parsed[1:])
    if [message.fragment.index for message in parsed[1:]] != list(range(job.manifest.fragment_count)):
        raise Failure("the center was initialized by a stream that is not whole")
    offsets = zip(job.manifest.variables, job.manifest.offsets_bytes, job.center.current.arrays.values(), strict=True)
    for variable, offset, array in offsets:
        if array.tobytes() != flat[offset : offset + variable.size_bytes]:
            raise Failure(f"the center has other values of {variable.name!r} than those that were sent")


_SEQUENCES: Mapping[str, type[Sequence]] = {"sequences": Sequence, "data-connections": ConnectionSequence}
_OVER_SOCKETS: Mapping[str, Callable[[int, str], Target]] = {
    "tls-handshakes": TlsHandshakes,
    "page-requests": PageRequests,
}
TARGETS = (*_RESPONSES, *_SEQUENCES, *_OVER_SOCKETS)


def target_named(name: str, seed: int) -> Target:
    """One of TARGETS."""
    if name in _OVER_SOCKETS:
        return _OVER_SOCKETS[name](seed, name)
    return Sequences(seed, name, _SEQUENCES[name]) if name in _SEQUENCES else Bytes(seed, name)
