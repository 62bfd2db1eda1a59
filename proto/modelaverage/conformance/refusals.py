"""Cases: every way in which a call may be refused, answered by the scripted server."""

from __future__ import annotations

import time

from modelaverage.conformance import lines
from modelaverage.conformance.case import case, slow_case
from modelaverage.conformance.miss import Miss, check
from modelaverage.conformance.models import fragments_of, like, vector
from modelaverage.conformance.scripted import (
    READ,
    GotPush,
    Refusal,
    ScriptedServer,
    admission,
    center,
    fragment,
    outcome,
)
from modelaverage.conformance.stage import Stage
from modelaverage.conformance.worker import Worker, check_center, check_pushed
from modelaverage.errors import FAULTS, REASON_PREFIX, Action, Reason
from modelaverage.v1 import parameter_server_pb2 as pb

__all__: list[str] = []

_MODEL = vector(40)
_LEAST_S, _MOST_S, _SLACK_S = 15.0, 60.0, 10.0
_UNKNOWN_REASON = REASON_PREFIX + "OF_THE_FUTURE"
_NEVER_COMES = {"DATA_CONNECTION_LOST"}  # to a client that asks for none
_TRIED_AGAIN = {reason.name for reason, fault in FAULTS.items() if fault.action in (Action.AGAIN, Action.LATER)}
_TRIED_AGAIN -= _NEVER_COMES
_AT_ONCE = [reason.name for reason in FAULTS if reason.name not in _TRIED_AGAIN | _NEVER_COMES]


def _refusal(name: str) -> Refusal:
    fault = FAULTS[Reason[name]]
    return Refusal(fault.status, REASON_PREFIX + name, action=fault.action.value)


def _unknown(action: str, status: str = "ABORTED") -> Refusal:
    """A refusal with a reason that no client knows."""
    return Refusal(status, _UNKNOWN_REASON, action=action)


def _ready(stage: Stage) -> tuple[ScriptedServer, Worker]:
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.pulls.put(center(_MODEL))
    worker.pull()
    return server, worker


@case
def _a_refused_pull_is_named_by_its_reason(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    for name in _AT_ONCE:
        server.pulls.put([_refusal(name)])
        worker.begin_pull()
        worker.fails(name)
    server.pulls.put(center(_MODEL))
    check_center(worker.pull().center, _MODEL)


@case
def _a_refused_push_is_named_by_its_reason(stage: Stage) -> None:
    server, worker = _ready(stage)
    for name in _AT_ONCE:
        server.pushes.put([_refusal(name)])
        worker.send(lines.push_line(_MODEL))
        worker.fails(name)
        server.pulls.put(center(_MODEL))
        worker.pull()
    _check_goes_on(server, worker)


@case
def _a_push_that_is_refused_in_the_middle_is_named_by_its_reason(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    large = vector(1 << 18)
    server.pulls.put(center(large, fragment_size_bytes=1 << 16))
    worker.pull()
    for name in ("PUSH_SUPERSEDED", "FRAGMENT_SIZE_WRONG"):
        server.pushes.put([admission(), fragment(large, 0, 1 << 16), _refusal(name)])
        worker.send(lines.push_line(large))
        worker.fails(name)


@case
def _a_refused_initialization_is_named_by_its_reason(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    for name in ("MANIFEST_INVALID", "MANIFEST_MISMATCH", "GLOBAL_STEP_INVALID", "WORKER_ID_INVALID"):
        server.initializations.put(_refusal(name))
        worker.send(lines.initialize_line(_MODEL, 0, 64))
        worker.fails(name)


@case
def _an_unknown_reason_is_named_by_its_status(stage: Stage) -> None:
    server, worker = _ready(stage)
    for status in ("FAILED_PRECONDITION", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "ABORTED", "ALREADY_EXISTS"):
        refusal = Refusal(status, "ERROR_REASON_OF_THE_FUTURE")
        server.pulls.put([refusal])
        worker.begin_pull()
        worker.fails(status, what="a pull")
        server.pushes.put([refusal])
        worker.send(lines.push_line(_MODEL))
        worker.fails(status, what="a push")


@case
def _after_an_unknown_reason_the_action_is_followed(stage: Stage) -> None:
    server, worker = _ready(stage)
    for action in (Action.AGAIN, Action.LATER):
        refusal = _unknown(action.value)
        server.pulls.put([refusal])
        server.pulls.put(center(_MODEL))
        check_center(worker.pull().center, _MODEL)
        server.pushes.put([refusal])
        server.pushes.put([admission(), READ, refusal])
        server.pushes.put([admission(), READ, *_average(), outcome(7)])
        began_s = time.monotonic()
        worker.begin_push(_MODEL)
        check_pushed(worker.pushed(), "committed", 7, "a", _MODEL)
        _check_same_push([server.got_push() for _ in range(3)], action.value)
        _check_soon(began_s, action.value)
    server.initializations.put(_unknown(Action.LATER.value))
    server.initializations.put(None)
    check("initialize", worker.initialize(_MODEL, 7).by_this_call, True)


@case
def _after_an_unknown_reason_pull_and_stop_are_errors_at_once(stage: Stage) -> None:
    server, worker = _ready(stage)
    for action, status in ((Action.PULL, "FAILED_PRECONDITION"), (Action.STOP, "ABORTED")):
        refusal = _unknown(action.value, status)
        server.pushes.put([refusal])
        worker.send(lines.push_line(_MODEL))
        worker.fails(status, what=f"a push, {action.value}")
        server.pulls.put([refusal])
        worker.begin_pull()
        worker.fails(status, what=f"a pull, {action.value}")
    # After the action `pull` it is up to the program to pull and continue from that center.
    server.pulls.put(center(like(_MODEL, 1), 9))
    check("global_step", worker.pull().global_step, 9)
    server.pushes.put([admission(), READ, *_average(), outcome(10)])
    check_pushed(worker.push(_MODEL), "committed", 10, "a", _MODEL)


@case
def _an_unknown_action_means_stop(stage: Stage) -> None:
    server, worker = _ready(stage)
    # Without the action, a client would try UNAVAILABLE again.
    for status in ("ABORTED", "UNAVAILABLE"):
        refusal = _unknown("of-the-future", status)
        for script in ([refusal], [admission(), READ, *_average(), outcome(7)]):
            server.pushes.put(script)
        worker.send(lines.push_line(_MODEL))
        worker.fails(status, what="a push")
        check_pushed(worker.push(_MODEL), "committed", 7, "a", _MODEL)
        server.pulls.put([refusal])
        server.pulls.put(center(_MODEL))
        worker.begin_pull()
        worker.fails(status, what="a pull")
        check_center(worker.pull().center, _MODEL)


@case
def _a_refusal_without_a_reason_is_named_by_its_status(stage: Stage) -> None:
    server, worker = _ready(stage)
    for status in ("PERMISSION_DENIED", "INTERNAL", "DATA_LOSS", "OUT_OF_RANGE"):
        server.pulls.put([Refusal(status)])
        worker.begin_pull()
        worker.fails(status, what="a pull")
        server.pushes.put([Refusal(status)])
        worker.send(lines.push_line(_MODEL))
        worker.fails(status, what="a push")


@case
def _the_message_is_one_line(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.pulls.put([Refusal("INTERNAL", None, "one\ntwo\r\nthree")])
    worker.begin_pull()
    worker.fails("INTERNAL")
    server.pulls.put(center(_MODEL))
    check_center(worker.pull().center, _MODEL)


@case
def _a_push_is_made_again_when_the_page_says_so(stage: Stage) -> None:
    server, worker = _ready(stage)
    broken = Refusal("INTERNAL", None, "Received RST_STREAM with error code 2")
    away = {"UNAVAILABLE without a reason": Refusal("UNAVAILABLE"), "INTERNAL with RST_STREAM": broken}
    for what, refusal in (away | {name: _refusal(name) for name in sorted(_TRIED_AGAIN)}).items():
        # Once before the admission, once after the last fragment.
        server.pushes.put([refusal])
        server.pushes.put([admission(), READ, refusal])
        server.pushes.put([admission(), READ, *_average(), outcome(7)])
        began_s = time.monotonic()
        worker.send(lines.push_line(_MODEL))
        check_pushed(worker.pushed(), "committed", 7, "a", _MODEL)
        _check_same_push([server.got_push() for _ in range(3)], what)
        _check_soon(began_s, what)


@case
def _a_pull_is_made_again_when_the_server_stops(stage: Stage) -> None:
    server = stage.scripted()
    worker = stage.worker(server.address)
    for refusal in (_refusal("SERVER_STOPPING"), Refusal("UNAVAILABLE")):
        server.pulls.put([refusal])
        server.pulls.put(center(_MODEL))
        check_center(worker.pull().center, _MODEL)


@slow_case
def _a_worker_id_that_stays_in_use_is_an_error(stage: Stage) -> None:
    server, worker = _ready(stage)
    for _ in range(1000):
        server.pushes.put([_refusal("WORKER_ID_IN_USE")])
    began_s = time.monotonic()
    worker.send(lines.push_line(_MODEL))
    worker.fails("WORKER_ID_IN_USE", _MOST_S + _SLACK_S)
    _check_patience(began_s)


@slow_case
def _an_unknown_reason_that_stays_is_an_error(stage: Stage) -> None:
    server, worker = _ready(stage)
    for _ in range(1000):
        server.pushes.put([_unknown(Action.LATER.value, "UNAVAILABLE")])
    began_s = time.monotonic()
    worker.send(lines.push_line(_MODEL))
    worker.fails("UNAVAILABLE", _MOST_S + _SLACK_S)
    _check_patience(began_s)


def _check_same_push(attempts: list[GotPush], after: str) -> None:
    keys = {(got.header.incarnation, got.header.push_id, got.header.base_step) for got in attempts}
    check(f"number of different headers for one push after {after}:", len(keys), 1)
    check(f"the fragments after {after}:", attempts[-1].data.hex(), b"".join(fragments_of(_MODEL)).hex())


def _check_soon(began_s: float, after: str) -> None:
    if time.monotonic() - began_s > _LEAST_S:
        raise Miss(f"the push is made again soon after {after}", f"{time.monotonic() - began_s:.1f} s")


def _check_patience(began_s: float) -> None:
    if time.monotonic() - began_s < _LEAST_S:
        raise Miss(f"it tries again for {_LEAST_S:g} to {_MOST_S:g} s", f"{time.monotonic() - began_s:.1f} s")


def _average() -> list[pb.PushAndAverageResponse]:
    return [fragment(_MODEL, index) for index in range(len(fragments_of(_MODEL)))]


def _check_goes_on(server: ScriptedServer, worker: Worker) -> None:
    server.pushes.put([admission(), READ, *_average(), outcome()])
    check_pushed(worker.push(_MODEL), "committed", 8, "a", _MODEL)
