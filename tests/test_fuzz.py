"""The fuzzer of `make fuzz`: a short run of every target finds nothing, and it finds every broken server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from mmap import mmap
from typing import Any, cast

import pytest

from fuzz.__main__ import main
from fuzz.context import FakeContext
from fuzz.loop import EndlessError, VirtualLoop
from fuzz.run import MAX_GROWTH_BYTES, Result, run
from fuzz.sockets import MemorySocket
from fuzz.targets import TARGETS, target_named
from modelaverage.codecs import RAW, Codec
from modelaverage.errors import Reason, refusal
from modelaverage.runtime.data_sockets import NUMBER
from ps_server.center.sums import Sums
from ps_server.flow.call import Call
from ps_server.flow.joining import Joining
from ps_server.page.guard import Guard
from ps_server.rules.decisions import Accumulate, Addition, Decision
from ps_server.rules.entry import Entry
from ps_server.rules.fragments import Fragments
from ps_server.rules.quorum import Quorum
from ps_server.rules.round import Round
from ps_server.rules.task_indexes import TaskIndexes
from ps_server.seen.roster import Roster, WorkerRecord
from ps_server.transports import data_lane, data_port
from ps_server.transports.arriving import write_all
from ps_server.transports.data_connection import DataConnection
from ps_server.transports.data_port import DataPort, Place

# Of 20 calls each, or as costly.
INPUTS = {"sequences": 60, "data-connections": 60, "tls-handshakes": 150, "page-requests": 100}


def played(name: str, inputs: int, first: int = 0) -> Result:
    return run(target_named(name, seed=0), inputs, first)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_is_refused_and_changes_nothing_and_leaves_nothing_behind(name: str) -> None:
    inputs = INPUTS.get(name, 1500)
    result = played(name, inputs)
    assert result.failures == []
    assert result.inputs == inputs
    assert result.growth_bytes < MAX_GROWTH_BYTES


def test_the_same_seed_gives_the_same_inputs() -> None:
    assert played("PushAndAverage", 200).endings == played("PushAndAverage", 200).endings
    for name in ("sequences", "data-connections"):
        assert played(name, 12).endings == played(name, 12).endings


def test_sequences_meet_commits_most_refusals_ends_of_jobs_notices_and_pulls_that_go_on() -> None:
    endings = played("sequences", 120).endings
    assert endings["(rounds committed)"] > 20
    assert endings["OUTCOME_STALE"] > 10
    assert endings["(centers given back)"] > 3
    assert endings["(rounds with abstentions)"] > 2
    assert len([name for name in endings if name.isupper()]) > 20
    assert endings["(job over)"] > 5
    assert endings["(notices)"] > 3
    assert endings["(pulls that go on)"] > 3


def test_connections_meet_commits_beside_the_call_and_losses() -> None:
    endings = played("data-connections", 100).endings
    assert endings["(committed beside)"] > 20
    assert endings["DATA_CONNECTION_LOST"] > 20
    assert endings["(rounds committed)"] > 50


# A fuzzer that never fails proves nothing.


def finds(name: str, inputs: int, *texts: str, likely: int = 0) -> bool:
    """Whether these inputs find a failure with one of these texts; a sequence of calls ends with its first failure.
    ``likely``: the inputs to begin with, because they found it when the test was written."""
    at_once = 10 if name in INPUTS else inputs
    return any(
        text in failure.what
        for first in sorted(range(0, inputs, at_once), key=lambda first: (first < likely, first))
        for failure in played(name, at_once, first).failures
        for text in texts
    )


def test_a_page_that_tells_strangers_what_it_knows_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "refusal", lambda *_: None)
    assert finds("page-requests", 40, "was answered with b'HTTP/1.1 200")


def test_a_page_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(Guard, "refusal", fail)
    assert finds("page-requests", 40, "the page fails at")


def test_an_exception_that_is_no_refusal_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(Sums, "accumulate", fail)
    assert finds("sequences", 100, "the server failed: ValueError: no")


def test_a_center_that_takes_wrong_values_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_start(self: Fragments, entry: Entry) -> Accumulate:
        return replace(take(self, entry), how=Addition.START)

    take = Fragments.take
    monkeypatch.setattr(Fragments, "take", always_start)
    assert finds("sequences", 60, "not the average")


def test_a_round_of_pushes_that_are_not_whole_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_all(self: Fragments, entry: Entry) -> Accumulate:
        first = take(self, entry)
        while entry.wanted < self.count:
            take(self, entry)
        return first

    take = Fragments.take
    monkeypatch.setattr(Fragments, "take", take_all)
    assert finds("sequences", 200, "never came whole")


@pytest.mark.parametrize(
    ("room", "name", "broken", "found"),
    [
        (Round, "come_back", lambda *_: None, "no round waits for"),
        (Round, "finish", lambda *_: [], "has finished, and rounds wait for it"),
        (Quorum, "_of_those_left", lambda _, workers, __: workers, "a round waits for nobody"),
        (Quorum, "_of_those_left", lambda *_: 1, "committed with RoundPolicy"),
    ],
    ids=["for ever", "never", "waited for", "without others"],
)
def test_a_server_that_is_wrong_about_who_has_finished_is_found_out(
    room: type, name: str, broken: Callable[..., Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, name, broken)
    assert finds("sequences", 300, found)


def test_a_process_that_finishes_for_another_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: Round, worker_id: str, _: bytes, now_s: float) -> list[Decision]:
        self._quorum.finish(worker_id)
        return self._advance(None, now_s)

    monkeypatch.setattr(Round, "finish", finish)
    assert finds("sequences", 300, "by the word of a process that is not the one that pushes", likely=100)


def test_a_center_with_another_codec_than_the_chiefs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps_server.flow.initialization.codec_named", lambda _: RAW)
    assert finds("Initialize", 1000, "was named, and the center has raw")


def test_pushes_in_codecs_are_refused_with_their_reasons() -> None:
    endings = played("PushAndAverage", 1500).endings
    assert endings["BASE_UNKNOWN"] > 3
    assert endings["CODEC_UNKNOWN"] > 50


def test_a_server_that_takes_another_pushs_bytes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class AnyNumber:
        size = NUMBER.size

        def unpack_from(self, _: object) -> AnyNumber:
            return self

        def __eq__(self, _: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    monkeypatch.setattr(data_lane, "NUMBER", AnyNumber())
    assert finds("data-connections", 200, "not the average", "never came whole")


def test_a_connection_that_another_process_may_use_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    take = DataPort.take

    def take_any(self: DataPort, place: Place) -> DataConnection:
        owner, _ = self._connections.get(place.worker_id, (None, None))
        return take(self, place if owner is None else owner)

    monkeypatch.setattr(DataPort, "take", take_any)
    assert finds("data-connections", 400, "never came whole", likely=260)


def test_a_connection_that_goes_on_after_a_failed_push_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataConnection, "close", lambda _: None)
    assert finds("data-connections", 100, "data connections are that nobody can use")


def test_a_key_that_opens_twice_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class NeverForgets(dict[Any, Any]):
        def pop(self, key: Any, *default: Any) -> Any:
            return self.get(key, *default)

    offer_to = DataPort.offer_to

    def offer_for_ever(self: DataPort, place: Place) -> Any:
        if not isinstance(self._offers, NeverForgets):
            self._offers = NeverForgets(self._offers)
        return offer_to(self, place)

    monkeypatch.setattr(DataPort, "offer_to", offer_for_ever)
    assert finds("data-connections", 100, "a stranger on the data port is answered", "not the last one of any worker")


def test_strangers_who_are_not_sent_away_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_port, "_GREETING_TIMEOUT_S", 1e6)
    assert finds("data-connections", 200, "strangers who say nothing are not sent away")


def test_two_processes_with_one_index_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskIndexes, "ended", lambda self, process, *_: self.leave(process))
    assert finds("sequences", 600, "which is taken or none")


def test_a_process_that_waits_for_an_index_that_is_free_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Joining, "_wake", lambda _: None)
    assert finds("sequences", 600, "a process waits for the index", likely=140)


def test_a_call_that_does_not_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "fail", lambda *_: None)
    assert finds("sequences", 150, "does not end, though its client does nothing")


def test_a_refusal_that_the_protocol_does_not_name_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise refusal(Reason.ROUND_FULL, "no")

    monkeypatch.setattr("ps_server.flow.service.check_incarnation", refuse)
    assert finds("Leave", 100, "does not allow Leave to be refused with ROUND_FULL")


def test_a_table_that_grows_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    heard_of: Callable[[Roster, str, float], WorkerRecord] = Roster.heard_of

    def remember(self: Roster, worker_id: str, now_s: float) -> WorkerRecord:
        vars(self).setdefault("log", []).append(worker_id)
        return heard_of(self, worker_id, now_s)

    monkeypatch.setattr(Roster, "heard_of", remember)
    assert finds("Pull", 1000, "roster.log has")


def test_memory_that_is_not_given_back_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[mmap]()

    def check(_: str) -> None:
        kept.append(mmap(-1, 64 << 10))  # separate pages, since earlier tests may have left free memory behind
        kept[-1].write(b"x" * (64 << 10))

    monkeypatch.setattr("ps_server.flow.service.check_worker_id", check)
    assert finds("Leave", 3000, "memory has grown")


def test_a_part_that_is_left_behind_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Round, "close", lambda *_: [])
    assert finds("PushAndAverage", 1000, "no call is open, but")


def test_the_command_says_how_to_play_a_failure_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Codec, "check_size", lambda *_: None)
    assert main(["--inputs", "2000", "--handler", "sequences"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED"))
    again = line.partition("-m fuzz ")[2].split()
    assert main(again) == 1
    assert line in capsys.readouterr().out
    monkeypatch.undo()
    assert main(again) == 0


# What stands in for gRPC and for time.


def test_what_never_comes_to_rest_is_found_out() -> None:
    loop = VirtualLoop.create()

    def again() -> None:
        loop.call_soon(again)

    loop.call_soon(again)
    with pytest.raises(EndlessError, match="after 100 steps"):
        loop.settle(100)

    loop = VirtualLoop.create()

    def later() -> None:
        loop.call_later(0, later)

    later()
    with pytest.raises(EndlessError, match="after 100 timers"):
        loop.advance(1.0, 100)


def test_timers_go_off_in_their_order_each_at_its_time() -> None:
    loop, heard = VirtualLoop.create(), list[tuple[str, float]]()
    began_s = loop.time()

    def note(name: str) -> None:
        heard.append((name, round_to_ms(loop.time() - began_s)))

    loop.call_later(2, note, "b")
    loop.call_later(1, note, "a")
    loop.call_later(1.5, note, "never").cancel()
    loop.call_later(9, note, "too late")
    loop.advance(5, 100)
    assert heard == [("a", 1.0), ("b", 2.0)]
    assert round_to_ms(loop.time() - began_s) == 5.0


def round_to_ms(seconds: float) -> float:
    return float(f"{seconds:.3f}")


def test_a_client_that_does_not_read_holds_up_the_writer() -> None:
    loop = VirtualLoop.create()
    context = FakeContext(loop, "Pull")
    context.set_room(False)
    task: asyncio.Task[None] = loop.create_task(context.write(b"x"))
    loop.settle(100)
    assert (task.done(), context.blocked) == (False, True)
    context.set_room(True)
    loop.settle(100)
    assert (task.done(), context.written) == (True, [b"x"])


# What stands in for sockets.


def test_a_reader_is_called_when_as_many_bytes_have_come_as_are_wanted() -> None:
    loop, (ours, theirs) = VirtualLoop.create(), MemorySocket.pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 3)
    read = list[bytes]()
    loop.add_reader(ours, lambda: read.append(ours.recv(10)))
    theirs.send(b"ab")
    loop.settle(100)
    assert read == []
    theirs.send(b"c")
    loop.settle(100)
    assert read == [b"abc"]


def test_a_sender_waits_for_room() -> None:
    loop, (ours, theirs) = VirtualLoop.create(), MemorySocket.pair()
    theirs.room_bytes = 2
    sent: asyncio.Task[None] = loop.create_task(write_all(cast("Any", ours), memoryview(b"xyz")))
    loop.settle(100)
    assert (sent.done(), bytes(theirs.inbox)) == (False, b"xy")
    theirs.recv(2)
    loop.settle(100)
    assert (sent.done(), bytes(theirs.inbox), len(loop.watched)) == (True, b"z", 0)


def test_a_reader_is_called_again_until_it_has_read() -> None:
    loop, (ours, theirs) = VirtualLoop.create(), MemorySocket.pair()
    read = list[bytes]()
    loop.add_reader(ours, lambda: read.append(ours.recv(1)))
    theirs.send(b"abc")
    loop.settle(100)
    assert read == [b"a", b"b", b"c"]
    theirs.close()
    with pytest.raises(EndlessError):  # the end stays readable
        loop.settle(100)
    assert loop.remove_reader(ours)


def test_a_socket_that_is_closed_while_somebody_waits_for_it_is_a_problem() -> None:
    loop, (ours, _) = VirtualLoop.create(), MemorySocket.pair()
    loop.add_reader(ours, lambda: None)
    ours.close()
    loop.settle(100)
    assert [problem["message"] for problem in loop.problems] == ["a socket was closed while it was watched"]


def test_a_broken_connection_gives_what_came_and_then_its_error() -> None:
    ours, theirs = MemorySocket.pair()
    theirs.send(b"abc")
    theirs.reset()
    assert ours.recv(10) == b"abc"
    with pytest.raises(ConnectionResetError):
        ours.recv(10)
    with pytest.raises(BrokenPipeError):
        ours.send(b"x")
