"""Cases: unusual messages that a client must accept, and wrong ones that it must refuse; against the scripted
server."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from modelaverage import wire
from modelaverage.conformance import lines
from modelaverage.conformance.case import case
from modelaverage.conformance.lines import Arrays
from modelaverage.conformance.miss import Miss, check
from modelaverage.conformance.models import fragments_of, like, manifest_of, vector
from modelaverage.conformance.scripted import (
    MANIFEST_ID,
    READ,
    GotPush,
    Refusal,
    ScriptedServer,
    admission,
    center,
    chief_notice,
    fragment,
    outcome,
)
from modelaverage.conformance.stage import Stage
from modelaverage.conformance.worker import Worker, check_center, check_pushed
from modelaverage.manifest import Manifest, Part, Shard, Variable
from modelaverage.v1 import parameter_server_pb2 as pb

__all__: list[str] = []

_M = TypeVar("_M", bound=Message)
# Fields that no message has: a varint, a string, 8 and 4 bytes.
_UNKNOWN_FIELDS = bytes.fromhex("c03e 07 ca3e 03 616263 d13e 0102030405060708 dd3e 01020304")
_AWAY = Refusal("UNAVAILABLE")
# 3 fragments of 64 bytes.
_MODEL = vector(40)
_COUNT = 3


def _ready(stage: Stage, model: Arrays = _MODEL) -> tuple[ScriptedServer, Worker]:
    """A server, and a worker that has pulled its center of step 7."""
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.pulls.put(center(model))
    check_center(worker.pull().center, model)
    return server, worker


def _average(model: Arrays, first: int = 0) -> list[pb.PushAndAverageResponse]:
    return [fragment(model, index) for index in range(first, len(fragments_of(model)))]


def _check_got(got: GotPush, model: Arrays, first: int = 0) -> None:
    """Raises Miss unless the push had exactly the fragments from ``first`` on (all, if the client does not wait for the
    admission), with zeros as padding."""
    first = 0 if got.follows else first
    check("the fragments of the push", got.data.hex(), b"".join(fragments_of(model)[first:]).hex())


@case
def _a_push_says_who_pushes_what(stage: Stage) -> None:
    server, worker = _ready(stage)
    headers = list[pb.PushHeader]()
    for step in (7, 8):
        local, after = like(_MODEL, step), like(_MODEL, step + 100)
        server.pushes.put([admission(), READ, *_average(after), outcome(step + 1)])
        check_pushed(worker.push(local), "committed", step + 1, "a", after)
        got = server.got_push()
        _check_got(got, local)
        check("base_step", got.header.base_step, step)
        headers.append(got.header)
    first, second = headers
    check("worker_id", {header.worker_id for header in headers}, {"a"})
    check("manifest_id", {header.manifest_id for header in headers}, {MANIFEST_ID})
    check("weight", {header.weight if header.HasField("weight") else 1.0 for header in headers}, {1.0})
    check("bytes of the incarnation", len(first.incarnation), 16)
    check("incarnation of the next push", second.incarnation, first.incarnation)
    check("first push_id", first.push_id > 0, True)
    check("whether push_id ascends", second.push_id > first.push_id, True)
    worker.leave()
    left = server.left.get(timeout=1)
    check("who leaves", (left.worker_id, left.incarnation), ("a", first.incarnation))
    check("whether it has finished", left.finished, False)


@case
def _a_worker_says_that_it_has_finished(stage: Stage) -> None:
    server, worker = _ready(stage)
    server.pushes.put([admission(), READ, *_average(_MODEL), outcome()])
    worker.push(_MODEL)
    worker.finish()
    left = server.left.get(timeout=1)
    incarnation = server.got_push().header.incarnation
    check("who has finished", (left.worker_id, left.incarnation, left.finished), ("a", incarnation, True))


@case
def _another_process_has_another_incarnation(stage: Stage) -> None:
    server = stage.scripted()
    incarnations = set[bytes]()
    for _ in range(2):
        worker = stage.worker(server.address)
        server.pulls.put(center(_MODEL))
        worker.pull()
        server.pushes.put([admission(), READ, *_average(_MODEL), outcome()])
        worker.push(_MODEL)
        incarnations.add(server.got_push().header.incarnation)
    check("different incarnations", len(incarnations), 2)


@case
def _padding_is_ignored_and_sent_as_zeros(stage: Stage) -> None:
    model: Arrays = {"a": np.ones(3, np.float16), "b": np.ones(2), "c": np.ones(1, np.float32), "d": np.ones(1)}
    server = stage.scripted()
    worker = stage.worker(server.address)
    manifest = manifest_of(model)
    dirty = bytearray(b"\xaa" * manifest.buffer_size_bytes)
    for start, array in zip(manifest.offsets_bytes, model.values(), strict=True):
        dirty[start : start + array.nbytes] = array.tobytes()
    server.pulls.put([center(model)[0], pb.PullResponse(fragment=pb.Fragment(data=bytes(dirty)))])
    check_center(worker.pull().center, model)
    local = like(model, 1)
    server.pushes.put([admission(), READ, *_average(model), outcome()])
    check_pushed(worker.push(local), "committed", 8, "a", model)
    _check_got(server.got_push(), local)


@case
def _unknown_fields_are_ignored(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.pulls.put([_with_unknown_fields(message) for message in center(_MODEL)])
    check_center(worker.pull().center, _MODEL)
    server.pushes.put(
        [
            _with_unknown_fields(admission()),
            READ,
            *(_with_unknown_fields(message) for message in [*_average(like(_MODEL, 1)), outcome()]),
        ]
    )
    check_pushed(worker.push(_MODEL), "committed", 8, "a", like(_MODEL, 1))


@case
def _an_outer_optimizer_that_the_client_does_not_know_changes_nothing(stage: Stage) -> None:
    server = stage.scripted()
    server.outer_optimizer = "of-the-future:rate=0.5/1,\u00fc"
    worker = stage.worker(server.address)
    server.initializations.put(None)
    check("initialize", worker.initialize(_MODEL, 7).by_this_call, True)
    check("status", worker.status().phase, "idle")
    server.pulls.put(center(_MODEL, outer_optimizer=server.outer_optimizer))
    check_center(worker.pull().center, _MODEL)
    server.pushes.put([admission(), READ, *_average(like(_MODEL, 1)), outcome()])
    check_pushed(worker.push(_MODEL), "committed", 8, "a", like(_MODEL, 1))


def _with_unknown_fields(message: _M) -> _M:
    """The message as a later version of the protocol may send it: with more fields, also in the messages within it."""
    for field, value in message.ListFields():
        for one in value if field.is_repeated else [value]:
            if isinstance(one, Message):
                one.CopyFrom(_with_unknown_fields(one))
    return type(message).FromString(message.SerializeToString() + _UNKNOWN_FIELDS)


@case
def _a_waiting_notice_may_come_at_any_time(stage: Stage) -> None:
    server, worker = _ready(stage)
    notice = pb.PushAndAverageResponse(waiting=pb.WaitingNotice(waiting_for=["b"], round_age_s=5.0))
    first, *rest = _average(_MODEL)
    server.pushes.put([admission(), notice, READ, notice, first, notice, *rest, notice, outcome()])
    check_pushed(worker.push(_MODEL), "committed", 8, "a", _MODEL)


@case
def _the_outcome_may_come_with_the_last_fragment(stage: Stage) -> None:
    server, worker = _ready(stage)
    *others, last = _average(_MODEL)
    last.MergeFrom(outcome())
    server.pushes.put([admission(), READ, *others, last])
    check_pushed(worker.push(_MODEL), "committed", 8, "a", _MODEL)


@case
def _each_message_may_have_one_thing(stage: Stage) -> None:
    server, worker = _ready(stage)
    server.pushes.put([admission(), READ, *_average(_MODEL), outcome()])
    check_pushed(worker.push(_MODEL), "committed", 8, "a", _MODEL)
    # The same holds for a center of one fragment.
    one = vector(4)
    server.pulls.put(center(one, 8))
    worker.pull()
    server.pushes.put([admission(), READ, *_average(one), outcome(9)])
    check_pushed(worker.push(one), "committed", 9, "a", one)


@case
def _a_half_duplex_client_sends_all_before_anything_comes(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    # More than buffers on the way can hold.
    large, size_bytes = vector(1 << 19), 1 << 16
    server.pulls.put(center(large, fragment_size_bytes=size_bytes))
    worker.pull()
    local = like(large, 1)
    sent, average = (b"".join(fragments_of(each, size_bytes)) for each in (local, large))
    came = [fragment(large, index, size_bytes) for index in range(len(average) // size_bytes)]
    # The second attempt sends all again: the client does not learn that the server needs nothing.
    server.pushes.put([admission(), READ, _AWAY])
    server.pushes.put([admission(len(came)), READ, *came, outcome()])
    check_pushed(worker.push(local), "committed", 8, "a", large)
    for got in (server.got_push(), server.got_push()):
        if got.header.half_duplex:
            check("whether all fragments and the half-close came", (got.data == sent, got.half_closed), (True, True))


@case
def _the_average_may_come_before_the_last_fragment_went(stage: Stage) -> None:
    server, worker = _ready(stage)
    *others, last = _average(_MODEL)
    server.pushes.put([admission(), *others, READ, last, outcome()])
    check_pushed(worker.push(_MODEL), "committed", 8, "a", _MODEL)


@case
def _only_the_fragments_that_are_missing_are_sent(stage: Stage) -> None:
    server, worker = _ready(stage)
    for step, first in ((7, 0), (8, 1), (9, _COUNT)):
        local = like(_MODEL, step)
        # The first attempt breaks, so the worker makes a second one, of which the server already has a part.
        server.pushes.put([_AWAY])
        server.pushes.put([admission(first), READ, *_average(local), outcome(step + 1)])
        check_pushed(worker.push(local), "committed", step + 1, "a", local)
        server.got_push()
        _check_got(server.got_push(), local, first)


@case
def _the_new_base_step_is_the_outcome_s(stage: Stage) -> None:
    server, worker = _ready(stage)
    endings = {pb.OUTCOME_STALE: (20, "stale"), pb.OUTCOME_ALREADY_COUNTED: (31, "already_counted")}
    for how, (step, word) in endings.items():
        server.pushes.put([admission(_COUNT), READ, *_average(_MODEL), outcome(step, how, ())])
        check_pushed(worker.push(like(_MODEL, 1)), word, step, "", _MODEL)
        server.pushes.put([admission(), READ, *_average(_MODEL), outcome(step + 1)])
        worker.push(_MODEL)
        server.got_push()
        check("base_step", server.got_push().header.base_step, step)


@case
def _the_last_pull_s_manifest_is_in_force(stage: Stage) -> None:
    server, worker = _ready(stage)
    other: Arrays = {"z": np.ones(2, np.float16), "a": np.ones(3), "w": np.zeros(1, np.float32)}
    server.pulls.put(center(other, 3, manifest_id="another"))
    pulled = worker.pull()
    check("global_step", pulled.global_step, 3)
    check_center(pulled.center, other)
    local = like(other, 1)
    server.pushes.put([admission(), READ, *_average(other), outcome(4)])
    check_pushed(worker.push(local), "committed", 4, "a", other)
    got = server.got_push()
    check("manifest_id and base_step", (got.header.manifest_id, got.header.base_step), ("another", 3))
    _check_got(got, local)


@case
def _fragments_without_an_outcome_are_void(stage: Stage) -> None:
    server, worker = _ready(stage)
    server.pushes.put([admission(), READ, *_average(like(_MODEL, 1))])
    worker.send(lines.push_line(_MODEL))
    worker.fails("CLIENT")


@case
def _an_average_that_breaks_before_its_outcome_is_void(stage: Stage) -> None:
    server, worker = _ready(stage)
    wrong, right = like(_MODEL, 1), like(_MODEL, 2)
    server.pushes.put([admission(), READ, *_average(wrong), _AWAY])
    server.pushes.put([admission(_COUNT), READ, *_average(right), outcome()])
    check_pushed(worker.push(_MODEL), "committed", 8, "a", right)
    first, second = server.got_push(), server.got_push()
    _check_same_push(first, second)
    if not second.follows:
        check("the fragments of the second attempt", second.indexes, [])


def _check_same_push(first: GotPush, second: GotPush) -> None:
    keys = [(got.header.incarnation.hex(), got.header.push_id, got.header.base_step) for got in (first, second)]
    check("incarnation, push_id and base_step of the second attempt", keys[1], keys[0])


@case
def _an_unknown_outcome_is_an_error(stage: Stage) -> None:
    server, worker = _ready(stage)
    for how in (99, pb.OUTCOME_UNSPECIFIED):
        last_word = pb.PushOutcome(global_step=8, contributors=["a"])
        last_word.MergeFromString(bytes([8, how]))
        server.pushes.put([admission(), READ, *_average(_MODEL), pb.PushAndAverageResponse(outcome=last_word)])
        worker.send(lines.push_line(_MODEL))
        worker.fails("CLIENT", what=f"outcome {how}")


@case
def _an_average_that_lacks_a_fragment_is_an_error(stage: Stage) -> None:
    server, worker = _ready(stage)
    first, second, third = _average(_MODEL)
    for what, came in {"the first": [second, third], "the second": [first, third], "the last": [first, second]}.items():
        server.pushes.put([admission(), READ, *came, outcome()])
        worker.send(lines.push_line(_MODEL))
        worker.fails("CLIENT", what=f"{what} fragment is missing")


@case
def _a_center_that_lacks_a_fragment_is_an_error(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    header, first, second, third = center(_MODEL)
    for what, came in {"the first": [second, third], "the second": [first, third], "the last": [first, second]}.items():
        server.pulls.put([header, *came])
        worker.begin_pull()
        worker.fails("CLIENT", what=f"{what} fragment is missing")


@case
def _a_shard_is_refused(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    manifest = Manifest((Variable("w", "float32", (40,), Part(0, 0, (40,))),), 64, Shard(0, 2, bytes(range(16))))
    header, *fragments = center(_MODEL)
    header.header.manifest.CopyFrom(wire.manifest_to_message(manifest))
    server.pulls.put([header, *fragments])
    worker.begin_pull()
    worker.fails("CLIENT")


@case
def _a_pull_that_is_made_again_starts_over(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.pulls.put([*center(like(_MODEL, 1), 7)[:3], _AWAY])
    server.pulls.put(center(_MODEL, 9))
    pulled = worker.pull()
    check("global_step", pulled.global_step, 9)
    check_center(pulled.center, _MODEL)


@case
def _a_pull_that_breaks_may_go_on_where_it_was(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    for given in (1, 3, 4):
        server.pulls.put([*center(_MODEL)[:given], _AWAY])
        server.pulls.put(center(_MODEL))
        pulled = worker.pull()
        check("global_step", pulled.global_step, 7)
        check_center(pulled.center, _MODEL)


@case
def _a_pull_that_waits_may_be_told_so(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.pulls.put([chief_notice(0.0), chief_notice(15.0), *center(_MODEL)])
    worker.begin_pull(wait=True)
    pulled = worker.pulled()
    check("global_step", pulled.global_step, 7)
    check_center(pulled.center, _MODEL)
    # It waits again, this time for a server that goes down meanwhile.
    server.pulls.put([chief_notice(0.0), _AWAY])
    server.pulls.put([chief_notice(0.0), *center(_MODEL, 8)])
    worker.begin_pull(wait=True)
    check("global_step", worker.pulled().global_step, 8)


@case
def _an_initialization_is_made_again(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.initializations.put(_AWAY)
    server.initializations.put(None)
    initialized = worker.initialize(_MODEL, 5)
    check("initialize", (initialized.by_this_call, initialized.global_step), (True, 5))
    header, data = server.got_center()
    check("worker_id and global_step", (header.worker_id, header.global_step), ("a", 5))
    check("manifest", header.manifest, wire.manifest_to_message(manifest_of(_MODEL)))
    check("the fragments", data.hex(), b"".join(fragments_of(_MODEL)).hex())


@case
def _a_server_that_stops_says_so(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.phase = pb.PHASE_STOPPING
    status = worker.status()
    if (status.phase, status.global_step) != ("stopping", 7):
        raise Miss("ok stopping 7", str(status))
