"""Cases: connections that break, processes that die, servers that come back; against a real server."""

from __future__ import annotations

import time

from modelaverage.conformance import lines
from modelaverage.conformance.case import case, slow_case
from modelaverage.conformance.lines import Arrays
from modelaverage.conformance.miss import Miss, check
from modelaverage.conformance.models import average, fragments_of, like, size_bytes_of, vector
from modelaverage.conformance.scripted import READ, admission, center, fragment, outcome
from modelaverage.conformance.stage import Stage
from modelaverage.conformance.worker import Worker, check_center, check_pushed

__all__: list[str] = []

_FRAGMENT_SIZE_BYTES = 1 << 14
_SILENCE_S = 0.4
# For how long docs/protocol.md tells a client to try again, and how long its last try may take beyond that.
_LEAST_S, _MOST_S, _SLACK_S = 15.0, 60.0, 10.0


def _large() -> Arrays:
    """40 fragments: more than buffers on the way can hold."""
    return vector(40 * _FRAGMENT_SIZE_BYTES // 4)


@case
def _a_push_that_breaks_upwards_sends_only_what_is_missing(stage: Stage) -> None:
    _break_upwards(stage, [size_bytes_of(_large()) // 2])


@case
def _a_push_may_break_several_times(stage: Stage) -> None:
    _break_upwards(stage, [size_bytes_of(_large()) // 5] * 3)


def _break_upwards(stage: Stage, after_bytes: list[int]) -> None:
    server = stage.server(2)
    proxy = stage.proxy(server.address)
    worker, peer = stage.worker(proxy.address), stage.peer(server.address)
    model, size_bytes = _large(), size_bytes_of(_large())
    peer.initialize(model, fragment_size_bytes=_FRAGMENT_SIZE_BYTES)
    worker.pull()
    mine, theirs = like(model, 1), like(model, 2)
    proxy.cut_after(up_bytes=after_bytes)
    worker.begin_push(mine)
    stage.until_whole(peer, "a")
    check("breaks of the connection", proxy.cuts, len(after_bytes))
    peer.push(fragments_of(theirs, _FRAGMENT_SIZE_BYTES), 0)
    check_pushed(worker.pushed(), "committed", 1, "a peer", average(mine, theirs))
    status = peer.status()
    if _waits_for_the_admission(stage):
        check("bytes of fragments that the server received", status.received_bytes, 3 * size_bytes)
    check("rounds that were started over", status.rounds_restarted, 0)


def _waits_for_the_admission(stage: Stage) -> bool:
    """Whether the client sends only the fragments that the admission asks for."""
    server = stage.scripted()
    worker = stage.worker(server.address)
    server.pulls.put(center(vector(1)))
    worker.pull()
    server.pushes.put([admission(), READ, fragment(vector(1), 0), outcome()])
    worker.push(vector(1))
    return not server.got_push().follows


@case
def _an_average_that_breaks_downwards_is_asked_for_again(stage: Stage) -> None:
    server = stage.server(2)
    proxy = stage.proxy(server.address)
    worker, peer = stage.worker(proxy.address), stage.peer(server.address)
    model = _large()
    peer.initialize(model, fragment_size_bytes=_FRAGMENT_SIZE_BYTES)
    worker.pull()
    mine, theirs = like(model, 1), like(model, 2)
    worker.begin_push(mine)
    stage.until_whole(peer, "a")
    proxy.cut_after(down_bytes=[size_bytes_of(model) // 2])
    peer.push(fragments_of(theirs, _FRAGMENT_SIZE_BYTES), 0)
    _check_counted_once(worker, average(mine, theirs))
    check("breaks of the connection", proxy.cuts, 1)
    if _waits_for_the_admission(stage):
        check("bytes of fragments that the server received", peer.status().received_bytes, 3 * size_bytes_of(model))


@case
def _a_push_whose_answer_is_lost_is_counted_once(stage: Stage) -> None:
    server = stage.server(2)
    proxy = stage.proxy(server.address)
    worker, peer = stage.worker(proxy.address), stage.peer(server.address)
    peer.initialize(vector(40))
    worker.pull()
    worker.begin_push(vector(40, start=4))
    stage.until_whole(peer, "a")
    proxy.hold_down()
    peer.push(fragments_of(vector(40)), 0)
    proxy.cut()
    _check_counted_once(worker, vector(40, start=2))
    # Its base step is now that of the center that it received.
    worker.begin_push(vector(40, start=6))
    peer.push(fragments_of(vector(40)), 1)
    check_pushed(worker.pushed(), "committed", 2, "a peer", vector(40, start=3))


def _check_counted_once(worker: Worker, center: Arrays) -> None:
    pushed = worker.pushed()
    if pushed.outcome == "stale":
        raise Miss("outcome committed or already_counted: it is the same push", "stale")
    check_pushed(pushed, pushed.outcome, 1, "a peer", center)


@case
def _a_pull_that_breaks_is_made_again(stage: Stage) -> None:
    server = stage.server()
    proxy = stage.proxy(server.address)
    worker = stage.worker(proxy.address)
    stage.peer(server.address).initialize(_large(), 3, _FRAGMENT_SIZE_BYTES)
    worker.status()
    proxy.cut_after(down_bytes=[size_bytes_of(_large()) // 2])
    pulled = worker.pull()
    check("breaks of the connection", proxy.cuts, 1)
    check("global_step", pulled.global_step, 3)
    check_center(pulled.center, _large())


@case
def _an_initialization_that_breaks_is_made_again(stage: Stage) -> None:
    server = stage.server()
    proxy = stage.proxy(server.address)
    worker = stage.worker(proxy.address)
    worker.status()
    proxy.cut_after(up_bytes=[size_bytes_of(_large()) // 2])
    check("initialize", worker.initialize(_large(), 3, _FRAGMENT_SIZE_BYTES).by_this_call, True)
    check("breaks of the connection", proxy.cuts, 1)
    check_center(worker.pull().center, _large())


@case
def _a_worker_that_is_killed_after_its_push_is_counted_once(stage: Stage) -> None:
    address = stage.server(2).address
    worker, peer = stage.worker(address), stage.peer(address)
    peer.initialize(vector(40))
    worker.pull()
    worker.begin_push(vector(40, start=4))
    stage.until_whole(peer, "a")
    stage.kill(worker)
    again = stage.worker(address)
    check("global_step", again.pull().global_step, 0)
    again.begin_push(vector(40, start=1000))
    again.says_nothing(_SILENCE_S)
    peer.push(fragments_of(vector(40)), 0)
    check_pushed(again.pushed(), "already_counted", 1, "a peer", vector(40, start=2))


@case
def _a_worker_id_in_use_is_tried_again(stage: Stage) -> None:
    address = stage.server(2).address
    worker, double, peer = stage.worker(address), stage.worker(address), stage.peer(address)
    peer.initialize(vector(40))
    worker.pull()
    double.pull()
    worker.begin_push(vector(40, start=4))
    stage.until_whole(peer, "a")
    double.begin_push(vector(40, start=1000))
    double.says_nothing(2 * _SILENCE_S)
    stage.kill(worker)
    double.says_nothing(_SILENCE_S)
    # Now the server takes it for the killed process, whose push is whole; or it tries again just after the commit.
    peer.push(fragments_of(vector(40)), 0)
    pushed = double.pushed()
    check("outcome", pushed.outcome in ("already_counted", "stale"), True)
    check_pushed(pushed, pushed.outcome, 1, "a peer", vector(40, start=2))


@case
def _a_round_that_is_started_over_is_pushed_to_again(stage: Stage) -> None:
    address = stage.server(2).address
    worker, peer = stage.worker(address), stage.peer(address, "peer")
    fragments = fragments_of(vector(40))
    peer.initialize(vector(40))
    worker.pull()
    worker.begin_push(vector(40, start=4))
    stage.until_whole(peer, "a")
    # Another worker's process dies in the middle of its push, and a new process takes its place.
    peer.begin_push(fragments, 0, give=1)
    stage.until(
        peer,
        lambda status: any(worker.worker_id == "peer" and worker.fragments_given for worker in status.workers),
        "a fragment of the peer has come",
    )
    peer.end()
    restarted = stage.peer(address, "peer")
    push = restarted.begin_push(fragments, 0, give=0)
    check("global_step", push.finish(), 1)
    check_pushed(worker.pushed(), "committed", 1, "a peer", vector(40, start=2))
    check("rounds that were started over", restarted.status().rounds_restarted, 1)


@case
def _another_job_is_noticed(stage: Stage) -> None:
    server = stage.server()
    worker = stage.worker(server.address)
    stage.peer(server.address).initialize(vector(40), 3)
    worker.pull()
    server.kill()
    server.start()
    worker.send(lines.push_line(vector(40)))
    worker.fails("NOT_INITIALIZED", what="a push after the server has lost the center")
    stage.peer(server.address).initialize({"v": vector(40)["w"]})
    worker.send(lines.push_line(vector(40)))
    worker.fails("MANIFEST_UNKNOWN", what="a push to a job with another manifest")
    check("variables", list(worker.pull().center), ["v"])


@case
def _a_server_that_came_back_older_is_noticed(stage: Stage) -> None:
    server = stage.server(2)
    worker = stage.worker(server.address)
    stage.peer(server.address).initialize(vector(40), 3)
    worker.pull()
    server.kill()
    server.start()
    peer = stage.peer(server.address)
    peer.initialize(vector(40))
    push = peer.begin_push(fragments_of(vector(40)), 0)
    worker.send(lines.push_line(vector(40, start=4)))
    worker.fails("BASE_STEP_AHEAD")
    check("global_step", worker.pull().global_step, 0)
    worker.begin_push(vector(40, start=4))
    check("global_step", push.ended(), 1)
    check_pushed(worker.pushed(), "committed", 1, "a peer", vector(40, start=2))


@case
def _a_server_that_is_killed_and_comes_back_averages_the_round(stage: Stage) -> None:
    server = stage.server(2, "--checkpoint-dir", stage.directory())
    worker, peer = stage.worker(server.address), stage.peer(server.address)
    worker.initialize(vector(40), 3)
    worker.pull()
    worker.begin_push(vector(40, start=4))
    stage.until_whole(peer, "a")
    server.kill()
    server.start()
    peer = stage.peer(server.address)
    peer.push(fragments_of(vector(40)), 3)
    check_pushed(worker.pushed(), "committed", 4, "a peer", vector(40, start=2))


@slow_case
def _a_server_that_stays_away_is_unavailable(stage: Stage) -> None:
    server = stage.server()
    pulls, pushes = stage.worker(server.address, "a"), stage.worker(server.address, "b")
    stage.peer(server.address).initialize(vector(40))
    for worker in (pulls, pushes):
        worker.pull()
    server.kill()
    began_s = time.monotonic()
    pulls.begin_pull()
    pushes.begin_push(vector(40))
    for worker in (pulls, pushes):
        worker.fails("UNAVAILABLE", _MOST_S + _SLACK_S)
        _check_patience(began_s)


def _check_patience(began_s: float) -> None:
    took_s = time.monotonic() - began_s
    if took_s < _LEAST_S:
        raise Miss(f"it tries again for {_LEAST_S:g} to {_MOST_S:g} s", f"an answer after {took_s:.1f} s")
