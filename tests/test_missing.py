"""The workers that a round waits for: readers hide none, names are bounded, and a restarted server knows them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_client import ParameterServerSession, Security
from modelaverage.missing import Missing
from modelaverage.names import MAX_NAMES
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.edge.security import ServerSecurity
from ps_server.flow.service import ParameterServerService, ServicePolicy
from ps_server.rules.decisions import Push, Restart
from ps_server.rules.policy import RoundPolicy
from ps_server.rules.round import Round
from ps_server.seen import roster as rosters
from ps_server.seen.missing import missing_of as missing_of_at
from ps_server.seen.roster import Rank, Roster, WorkerRecord
from tests.conftest import StartServer
from tests.jobs import COUNT, STEP, Job, of
from tests.raw_client import DEADLINE_S, RawClient, fragments_of, until
from tests.strategies import fast

MANY = 12_000
LARGEST_MESSAGE_BYTES = 4 << 20

missing_of = partial(missing_of_at, now_s=0.0)


def roster_of(pushers: Collection[str] = (), readers: Collection[str] = ()) -> Roster:
    roster = Roster()
    for name in pushers:
        roster.heard_push_of(name, 0.0)
    for name in readers:
        roster.heard_of(name, 0.0).may_push = True
    return roster


def crowd(count: int = MANY) -> list[str]:
    """Names that come before a worker's."""
    return [f"a-{number:05d}" for number in range(count)]


# Which workers are remembered.


def test_a_client_that_only_pulls_never_displaces_a_worker_that_pushes() -> None:
    roster = Roster()
    roster.heard_push_of("counted", 0.0)
    roster.count({"counted": 0.0})
    roster.heard_push_of("pushed", 1.0)
    roster.heard_of("chief", 1.0).is_chief = True
    for name in crowd():
        roster.heard_of(name, 2.0)
    assert len(roster.records) == rosters._MAX_RECORDS
    assert {"counted", "pushed", "chief"} <= roster.records.keys()
    assert crowd()[-1] in roster.records


def test_a_client_that_only_pushes_never_displaces_a_worker_that_was_counted() -> None:
    roster = Roster()
    for name in ("b", "c"):
        roster.heard_push_of(name, 0.0)
    roster.count({"b": 0.0, "c": 0.0})
    for name in crowd():
        roster.heard_push_of(name, 2.0)
    assert len(roster.records) == rosters._MAX_RECORDS
    assert {"b", "c", crowd()[-1]} <= roster.records.keys()


@fast
@given(
    st.lists(st.tuples(st.sampled_from(["pull", "push", "count", "lead"]), st.sampled_from("abcdefgh")), max_size=60)
)
def test_nobody_is_forgotten_while_somebody_of_a_lower_rank_is_remembered(events: list[tuple[str, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rosters, "_MAX_RECORDS", 4)
        roster = Roster()
        for event, name in events:
            before = {other: record.rank for other, record in roster.records.items()}
            match event:
                case "count":
                    roster.count({name: 0.0})
                case "push":
                    before[name] = max(before.get(name, Rank.PUSHER), Rank.PUSHER)
                    roster.heard_push_of(name, 0.0)
                case _:
                    before.setdefault(name, Rank.READER)
                    roster.heard_of(name, 0.0).is_chief |= event == "lead"
            assert len(roster.records) <= 4
            for forgotten in before.keys() - roster.records.keys():
                assert all(record.rank >= before[forgotten] for record in roster.records.values())
            assert sorted(name for queue in roster._queues for name in queue) == sorted(roster.records)


def test_a_call_looks_at_no_more_records_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    rank: property = vars(WorkerRecord)["rank"]

    def look(record: WorkerRecord) -> Rank:
        nonlocal looks
        looks += 1
        found: Rank = rank.__get__(record)
        return found

    roster = roster_of(pushers=[f"w{number}" for number in range(5000)])
    monkeypatch.setattr(WorkerRecord, "rank", property(look))
    for name in crowd(20_000):
        roster.heard_of(name, 1.0)
    assert looks < 4 * 20_000


def test_of_very_many_those_of_the_highest_rank_come_first_and_of_these_the_last_heard_of() -> None:
    roster = roster_of(readers=["r1", "r2"], pushers=["p1", "p2"])
    roster.heard_push_of("c", 0.0)
    roster.count({"c": 0.0})
    roster.heard_of("r1", 1.0)
    names = [[name for name, _ in roster.foremost(count)] for count in (1, 2, 3, 4, 5, 6)]
    assert names == [
        ["c"],
        ["c", "p2"],
        ["c", "p1", "p2"],
        ["c", "p1", "p2", "r1"],
        ["c", "p1", "p2", "r1", "r2"],
        ["c", "p1", "p2", "r1", "r2"],
    ]


# Which workers are named.


def test_a_worker_that_has_pushed_is_named_whatever_readers_there_are() -> None:
    roster = roster_of(pushers=["worker-0", "worker-1"], readers=crowd())
    assert missing_of((), 1, {"worker-0"}, (), roster) == Missing(("worker-1",))


def test_readers_are_named_after_workers_that_have_pushed_and_the_rest_is_counted() -> None:
    roster = roster_of(pushers=["worker-0", "worker-1"], readers=crowd(100))
    missing = missing_of((), 2, {"worker-0"}, (), roster)
    assert missing == Missing(("worker-1", *crowd(MAX_NAMES - 1)), 100 - MAX_NAMES + 1)


def test_the_chief_is_named_before_other_readers() -> None:
    roster = roster_of(readers=[*crowd(100), "worker-0"])
    roster.records["worker-0"].is_chief = True
    assert "worker-0" in missing_of((), 1, (), (), roster).names


def test_those_of_the_last_round_are_named_though_nobody_has_heard_of_them() -> None:
    assert missing_of((), 2, (), ("a", "b"), Roster()) == Missing(("a", "b"))
    assert missing_of((), 1, {"a"}, ("a", "b"), roster_of(pushers=["a"], readers=crowd())) == Missing(("b",))
    assert missing_of((), 3, {"a"}, ("a", "b"), roster_of(pushers=["a"])) == Missing(("b",), 0, 2)


def test_those_whom_the_round_waits_for_in_any_case_are_named_first() -> None:
    others = [f"b{number}" for number in range(100)]
    missing = missing_of({"zoe"}, 5, (), others, roster_of(pushers=["yan", *others]))
    assert missing.names[-1] == "zoe"
    assert (len(missing.names), missing.omitted, missing.unknown) == (MAX_NAMES, 102 - MAX_NAMES, 0)
    assert missing_of({"zoe", "b"}, 0, {"a"}, ("a", "c"), roster_of(pushers=["a", "c"])) == Missing(("b", "zoe"))


@fast
@given(st.data())
def test_names_are_few_and_everybody_is_counted_once(data: st.DataObject) -> None:
    def some(least: int = 0) -> set[str]:
        return data.draw(st.sets(st.integers(0, 60).map("w{}".format), min_size=least))

    pushers, readers, complete, contributors = some(), some(), some(), tuple(sorted(some()))
    named, unnamed = some() - complete, data.draw(st.integers(0, 40))
    roster = roster_of(readers=readers - pushers, pushers=pushers)
    missing = missing_of(named, unnamed, complete, contributors, roster)
    pushed = named | ((pushers | set(contributors)) - complete if unnamed else set())
    needed = len(named) + unnamed
    others = readers - pushers - pushed - complete if len(pushed) < needed else set()
    assert missing.count == len(pushed) + len(others) + max(0, needed - len(pushed) - len(others))
    assert missing.unknown == max(0, needed - len(pushed) - len(others))
    assert len(missing.names) == min(MAX_NAMES, len(pushed) + len(others))
    shown = [name for name in missing.names if name in pushed], [name for name in missing.names if name in others]
    assert missing.names == (*sorted(shown[0]), *sorted(shown[1]))
    assert len(shown[0]) == min(MAX_NAMES, len(pushed))


# What a server says.


def test_a_status_of_any_number_of_workers_fits_a_message() -> None:
    async def status() -> pb.GetStatusResponse:
        service = ParameterServerService(ServicePolicy(RoundPolicy.strict(10_000), 1 << 30, 30.0))
        for number in range(MANY):
            name = f"{number:05d}".ljust(128, "\x01")
            record = service._roster.heard_push_of(name, 1.0)
            record.is_chief, record.local_step, record.nonfinite_values, record.pushes_counted = True, *[2**64 - 1] * 3
            record.lateness_s = record.loss = 0.1
            record.peer, record.transport = "unix:" + "%00" * 110, pb.TRANSPORT_DATA_CONNECTION
        return service.status()

    found = asyncio.run(status())
    assert found.ByteSize() < LARGEST_MESSAGE_BYTES / 2
    assert (len(found.workers), found.workers_omitted) == (2000, 8000)
    assert [worker.worker_id for worker in found.workers] == sorted(worker.worker_id for worker in found.workers)


def test_a_missing_worker_is_named_to_everybody_though_many_pull_and_a_notice_is_short(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rosters, "_MAX_RECORDS", 50)
    caplog.set_level(logging.DEBUG, "ps_server")
    with RawClient(start_server(RoundPolicy.strict(2, round_timeout_s=1.0), first_notice_s=0.05).address) as client:
        job = Job(client, "")
        for stream in [job.push(name, of(1)) for name in ("worker-0", "worker-1")]:
            stream.answer()
        for name in crowd(100):
            pull = client.open_pull()
            pull.send(pb.PullRequest(worker_id=name.ljust(128, "x"), header_only=True))
            pull.half_close()
            pull.receive()
        waits = job.push("worker-0", of(1), base_step=STEP + 1, push_id=2)
        job.given("worker-0", COUNT)
        status = client.status()
        assert (list(status.waiting_for), status.waiting_for_omitted, status.waiting_for_unknown) == (
            ["worker-1"],
            0,
            0,
        )
        assert (len(status.workers), client.worker("worker-1").pushes_counted) == (50, 1)
        notice = waits.receive()
        while not notice.HasField("waiting"):
            notice = waits.receive()
        assert (list(notice.waiting.waiting_for), notice.waiting.waiting_for_omitted) == (["worker-1"], 0)
        refusal = waits.refusal()
        assert (refusal.reason, "for 'worker-1';" in refusal.message) == ("ROUND_TIMED_OUT", True)
    said = [record.getMessage() for record in caplog.records if "has waited" in record.getMessage()]
    assert said
    assert all(message.endswith("for 'worker-1'") for message in said)


def test_names_of_a_large_job_are_few_in_every_message_and_the_rest_is_counted(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ps_server")
    names = [f"w{number:02d}".ljust(128, "x") for number in range(30)]
    with RawClient(start_server(30, first_notice_s=0.05).address) as client:
        job = Job(client, "")
        last, _ = job.admitted(names[-1])
        streams = [*(job.push(name, of(1)) for name in names[:-1]), last]
        refused = client.open_push()
        refused.send(job.header("one too many"))
        assert "and 23 more" in refused.refusal().message  # what a message has room for
        last.give(fragments_of(of(1)))
        last.half_close()
        for stream in streams:
            assert list(stream.answer()[0].contributors) == names
        waits = job.push(names[3], of(1), base_step=STEP + 1, push_id=2)
        notice = waits.receive()
        while not notice.HasField("waiting"):
            notice = waits.receive()
        assert notice.ByteSize() < 4096
        assert (len(notice.waiting.waiting_for), notice.waiting.waiting_for_omitted) == (MAX_NAMES, 29 - MAX_NAMES)
        status = client.status()
        assert (len(status.waiting_for), status.waiting_for_omitted) == (MAX_NAMES, 29 - MAX_NAMES)
    assert max(len(record.getMessage()) for record in caplog.records) < 2500
    (committed,) = [record for record in caplog.records if "averaged" in record.getMessage()]
    fields = vars(committed)["modelaverage_fields"]
    assert (len(fields["workers"]), fields["workers_omitted"]) == (MAX_NAMES, 30 - MAX_NAMES)


def test_a_round_that_starts_over_names_few_of_those_it_does_not_wait_for() -> None:
    round_ = Round(RoundPolicy(41, 1, 41, grace_s=1.0), fragment_count=2)
    names = [f"w{number:02d}".ljust(128, "x") for number in range(40)]
    for stream, name in enumerate(["whole", *names]):
        round_.open(stream, Push(name, bytes(16), 1, 0), 0.0)
        round_.take_fragments(stream, 0, 1, 0.0)
    round_.take_fragments(0, 1, 2, 0.0)
    (cause,) = [decision.cause for decision in round_.expire(1.0) if isinstance(decision, Restart)]
    assert re.fullmatch(r"it waited 1 s for 'w00x*', .* and \d\d more", cause)
    assert len(cause) < 1200


def test_a_client_with_a_readers_token_is_never_waited_for(start_server: StartServer, tmp_path: Path) -> None:
    tokens = {name: tmp_path / name for name in ("chief", "worker", "reader")}
    for name, path in tokens.items():
        path.write_text(f"{name}-0123456789abcdef")
    security = ServerSecurity(
        token_file=tokens["worker"], chief_token_file=tokens["chief"], reader_token_file=tokens["reader"]
    )
    address = start_server(3, security=security).address

    def session(name: str, token: str) -> ParameterServerSession:
        return ParameterServerSession(
            [address], worker_id=name, is_chief=name == "chief", security=Security(token_file=tokens[token])
        )

    values = {"w": np.zeros(3, np.float32)}
    with session("chief", "chief") as chief, session("worker", "worker") as worker, session("eye", "reader") as reader:
        chief.initialize(values)
        worker.pull()
        reader.pull()
        with ThreadPoolExecutor(1) as threads:
            pushing = threads.submit(chief.push_and_average, values, timeout_s=DEADLINE_S)
            until(lambda: any(found.waiting for found in reader.status().workers), "the chief's push is whole")
            status = reader.status()
            chief.close()
            assert pushing.exception() is not None
    assert (list(status.waiting_for), status.waiting_for_unknown) == (["worker"], 1)
    assert "eye" in [found.worker_id for found in status.workers]


def test_a_server_that_goes_on_from_a_checkpoint_knows_the_names_it_waits_for(
    start_server: StartServer,
    tmp_path: Path,
) -> None:
    server = start_server(2, checkpoints=CheckpointPolicy(tmp_path))
    with RawClient(server.address) as client:
        job = Job(client, "")
        for stream in [job.push(name, of(1)) for name in ("worker-0", "worker-1")]:
            stream.answer()
    server.stop()
    second = start_server(2, checkpoints=CheckpointPolicy(tmp_path), first_notice_s=0.05)
    with RawClient(second.address) as client:
        stream = client.open_push()
        stream.push(job.header("worker-0", base_step=STEP + 1, push_id=2), of(2))
        until(lambda: client.worker("worker-0").waiting, "its push is whole")
        status = client.status()
        assert (list(status.waiting_for), status.waiting_for_unknown) == (["worker-1"], 0)
        # The server has not heard of it since, so it knows only its name.
        assert [worker.worker_id for worker in status.workers] == ["worker-0"]
        notice = stream.receive()
        while not notice.HasField("waiting"):
            notice = stream.receive()
        assert (list(notice.waiting.waiting_for), notice.waiting.waiting_for_unknown) == (["worker-1"], 0)
