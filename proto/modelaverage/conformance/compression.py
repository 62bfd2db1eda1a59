"""Cases: jobs with a codec. A client that pushes raw sees nothing of it; one that uses the codec is held to that."""

from __future__ import annotations

import itertools

import numpy as np

from modelaverage.codecs import codec_named
from modelaverage.conformance import lines
from modelaverage.conformance.case import case
from modelaverage.conformance.lines import Arrays
from modelaverage.conformance.miss import Miss, check, short
from modelaverage.conformance.models import coded_fragments_of, decoded, fragments_of, like, manifest_of, unflatten
from modelaverage.conformance.scripted import (
    READ,
    GotPush,
    InCodec,
    Refusal,
    ScriptedServer,
    admission,
    center,
    fragment,
    outcome,
)
from modelaverage.conformance.stage import Stage
from modelaverage.conformance.worker import Worker, check_center, check_pushed
from modelaverage.errors import FAULTS, REASON_PREFIX, Reason
from modelaverage.v1 import parameter_server_pb2 as pb

__all__: list[str] = []

_CODEC = "int8"
# Fragments of 256 elements, which are coded; the last one is shorter.
_SIZE_BYTES = 1024
_MODEL: Arrays = {
    "w": np.linspace(-1, 1, 1100, dtype=np.float32),
    "small": np.arange(7, dtype=np.float32),
    "double": np.arange(1030, dtype=np.float64) / 3,
}
_COUNT = len(fragments_of(_MODEL, _SIZE_BYTES))
_IDS = (0x0123456789ABCDEF, 2**64 - 1, 1 << 63, 7)


def _ready(stage: Stage) -> tuple[ScriptedServer, Worker]:
    """A server of a job with a codec, and a worker that has pulled its center of step 7."""
    server = stage.scripted()
    server.compression = _CODEC
    worker = stage.worker(server.address)
    server.pulls.put(center(_MODEL, 7, _SIZE_BYTES, compression=_CODEC, center_id=_IDS[0]))
    check_center(worker.pull().center, _MODEL)
    return server, worker


def _near(arrays: Arrays, seed: int) -> Arrays:
    """What training may have made of these variables."""
    changes = like(arrays, seed)
    return {name: (value + changes[name] / 1000).astype(value.dtype) for name, value in arrays.items()}


def _admission(first_needed_fragment: int = 0) -> InCodec:
    """An admission; a push in the codec gets its center in the codec, too."""
    coded = pb.PushAdmission(first_needed_fragment=first_needed_fragment, codec=_CODEC)
    return InCodec(pb.PushAndAverageResponse(admission=coded), admission(first_needed_fragment))


def _came(base: Arrays, seed: int) -> tuple[list[InCodec], Arrays]:
    """The fragments of a new center, in the codec and raw, and the center itself: what the codec makes of it."""
    coded = coded_fragments_of(_near(base, seed), base, _SIZE_BYTES, _CODEC)
    manifest = manifest_of(base, _SIZE_BYTES)
    flat = b"".join(fragments_of(base, _SIZE_BYTES))
    new = unflatten(manifest, decoded(codec_named(_CODEC), manifest, coded, flat))
    messages = [
        InCodec(
            pb.PushAndAverageResponse(fragment=pb.Fragment(index=index, data=data)), fragment(new, index, _SIZE_BYTES)
        )
        for index, data in enumerate(coded)
    ]
    return messages, new


def _check_got(got: GotPush, local: Arrays, base: Arrays, center_id: int, first: int = 0) -> None:
    """Raises Miss unless the push is raw or in the job's codec, and is what its header says."""
    first = 0 if got.follows else first
    if not got.is_coded:
        check("the fragments of the raw push", got.data.hex(), b"".join(_raw(local)[first:]).hex())
        return
    check("codec and base_center_id", (got.header.codec, got.header.base_center_id), (_CODEC, center_id))
    coded = coded_fragments_of(local, base, _SIZE_BYTES, _CODEC)
    check(f"the fragments of the push in {_CODEC}", got.data.hex(), b"".join(coded[first:]).hex())


def _raw(arrays: Arrays) -> list[bytes]:
    return fragments_of(arrays, _SIZE_BYTES)


@case
def _raw_and_coded_pushes_stand_in_one_round(stage: Stage) -> None:
    address = stage.server(2).address
    worker, peer = stage.worker(address), stage.peer(address)
    peer.initialize(_MODEL, fragment_size_bytes=_SIZE_BYTES, compression=_CODEC)
    peer.pull()
    check("initialize", worker.initialize(_MODEL, 0, _SIZE_BYTES).by_this_call, False)
    check_center(worker.pull().center, _MODEL)
    for step in range(3):
        worker.begin_push(_near(peer.center, step))
        push = peer.begin_coded_push(_near(peer.center, 10 + step), step)
        pushed = worker.pushed()
        # The average is known only roughly: what the codec makes of it is what counts, and the peer has decoded that.
        check_pushed(pushed, "committed", step + 1, "a peer", peer.take_coded(push))
    check_center(worker.pull().center, peer.center)


@case
def _a_raw_push_in_a_job_with_a_codec_counts_exactly(stage: Stage) -> None:
    address = stage.server(2).address
    worker, peer = stage.worker(address), stage.peer(address)
    # In each block the largest change is 127 times a power of 2, so the codec loses nothing.
    steps = np.resize(np.arange(127, -129, -2), 1024).astype(np.float32)
    start, mine, theirs, after = ({"w": np.round(steps / 3) + factor * steps} for factor in (0, 1, 3, 2))
    peer.initialize(start, fragment_size_bytes=_SIZE_BYTES, compression=_CODEC)
    peer.pull()
    worker.pull()
    worker.begin_push(mine)
    push = peer.begin_coded_push(theirs, 0)
    check_pushed(worker.pushed(), "committed", 1, "a peer", after)
    check_center(peer.take_coded(push), after)


@case
def _a_codec_is_spoken_as_the_header_says(stage: Stage) -> None:
    server, worker = _ready(stage)
    base = _MODEL
    for step, (base_id, next_id) in enumerate(itertools.pairwise(_IDS), 7):
        local = _near(base, step)
        came, new = _came(base, 100 + step)
        server.pushes.put([_admission(), READ, *came, outcome(step + 1, center_id=next_id)])
        check_pushed(worker.push(local), "committed", step + 1, "a", new)
        _check_got(server.got_push(), local, base, base_id)
        base = new


@case
def _a_push_in_a_codec_may_be_answered_by_a_raw_center(stage: Stage) -> None:
    server, worker = _ready(stage)
    current = _near(_MODEL, 1)
    raw = [fragment(current, index, _SIZE_BYTES) for index in range(_COUNT)]
    stale = outcome(20, pb.OUTCOME_STALE, (), _IDS[1])
    server.pushes.put([admission(_COUNT), READ, *raw, stale])
    check_pushed(worker.push(_near(_MODEL, 2)), "stale", 20, "", current)
    server.got_push()
    # This center is the next base.
    local = _near(current, 3)
    came, new = _came(current, 4)
    server.pushes.put([_admission(), READ, *came, outcome(21, center_id=_IDS[2])])
    check_pushed(worker.push(local), "committed", 21, "a", new)
    _check_got(server.got_push(), local, current, _IDS[1])


@case
def _a_push_that_breaks_after_a_part_of_its_center_keeps_its_base(stage: Stage) -> None:
    server, worker = _ready(stage)
    local = _near(_MODEL, 1)
    wrong, _ = _came(_MODEL, 2)
    right, new = _came(_MODEL, 3)
    server.pushes.put([_admission(), READ, *wrong[:-1], Refusal("UNAVAILABLE")])
    server.pushes.put([_admission(2), READ, *right, outcome(center_id=_IDS[1])])
    check_pushed(worker.push(local), "committed", 8, "a", new)
    first, second = server.got_push(), server.got_push()
    _check_got(first, local, _MODEL, _IDS[0])
    _check_got(second, local, _MODEL, _IDS[0], 2)
    check("push_id of the second attempt", second.header.push_id, first.header.push_id)


@case
def _a_base_that_the_server_does_not_have_is_no_end(stage: Stage) -> None:
    server, worker = _ready(stage)
    fault = FAULTS[Reason.BASE_UNKNOWN]
    unknown = Refusal(fault.status, REASON_PREFIX + Reason.BASE_UNKNOWN.name, action=fault.action.value)
    local = _near(_MODEL, 1)
    came, new = _came(_MODEL, 2)
    # A push that is raw from the beginning is taken at once; the second script is for the others.
    script = [_admission(), READ, *came, outcome(center_id=_IDS[1])]
    server.pushes.put([InCodec(unknown), *script])
    server.pushes.put(script)
    worker.send(lines.push_line(local))
    answer = worker.answer()
    first = server.got_push()
    if answer.split(" ")[:2] == ["error", "BASE_UNKNOWN"] and first.is_coded:
        return  # it has followed the action, and left it to its program to pull
    pushed = lines.read_pushed(answer)
    if isinstance(pushed, lines.Failed):
        raise Miss("ok committed 8 a ...", short(answer))
    check_pushed(pushed, "committed", 8, "a", new)
    if first.is_coded:
        second = server.got_push()
        check("whether the second attempt is raw", second.is_coded, False)
        check("push_id of the second attempt", second.header.push_id, first.header.push_id)
        _check_got(second, local, _MODEL, 0)


@case
def _a_codec_that_the_client_does_not_know_changes_nothing(stage: Stage) -> None:
    server = stage.scripted()
    server.compression = "of-the-future:\u00fc"
    worker = stage.worker(server.address)
    server.initializations.put(None)
    check("initialize", worker.initialize(_MODEL, 7, _SIZE_BYTES).by_this_call, True)
    check("status", worker.status().phase, "idle")
    server.pulls.put(center(_MODEL, 7, _SIZE_BYTES, compression=server.compression, center_id=_IDS[0]))
    check_center(worker.pull().center, _MODEL)
    local, after = _near(_MODEL, 1), _near(_MODEL, 2)
    came = [fragment(after, index, _SIZE_BYTES) for index in range(_COUNT)]
    server.pushes.put([admission(), READ, *came, outcome(center_id=_IDS[1])])
    check_pushed(worker.push(local), "committed", 8, "a", after)
    got = server.got_push()
    check("whether the push is raw", got.is_coded, False)
    _check_got(got, local, _MODEL, 0)
