"""The documents of the page, from values: what they say, and that OpenAPI describes them."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.console.status import plain
from ps_server.page.documents import COLUMNS, LATE_FROM_S, Since, next_since, rounds_csv, rounds_json, status_json
from ps_server.page.log_tail import LogEvent
from ps_server.page.openapi import api_page, openapi_json
from ps_server.seen.history import DETAILED_ROUNDS, History, HistorySeen
from ps_server.seen.marks import MarkKind
from ps_server.seen.observations import RoundTimes
from ps_server.seen.sample import PageSample
from ps_server.seen.traffic import Traffic
from tests.page.described import check_document

EPOCH_AT = 1_700_000_000.0
EVERYTHING = Since()
SCRIPT = "<script>alert(1)</script>"
HOSTILE = [SCRIPT, "=cmd|' /C calc'!A0", "a\nevent: status\ndata: {}\n\n", '"}', "\u2028\u202e\0", "</style>"]


def status_of(sample: PageSample, *events: LogEvent) -> Any:
    return json.loads(status_json(sample, "127.0.0.1:2222", EPOCH_AT, events))


def rounds_of(seen: HistorySeen, since: Since = EVERYTHING, step: int = 0) -> Any:
    return json.loads(b"".join(rounds_json(seen, step, EPOCH_AT, since)))


def played(rounds: int, names: tuple[str, ...] = ("a", "b"), loss: float | None = 1.0, first_step: int = 0) -> History:
    traffic = Traffic()
    history = History(traffic)
    history.begun(first_step, is_restored=False, now_s=0.0)
    for step in range(first_step, first_step + rounds):
        for name in names:
            history.admitted(name, b"1", 10 * step, loss, now_s=step)
            history.whole(name, now_s=step + 0.25)
        traffic.received_bytes += 100
        history.committed(step + 1, names, {}, (), RoundTimes(step, 0.25, 0.125, 0.125), now_s=step + 0.5)
    return history


def sample_of(history: History, **fields: Any) -> PageSample:
    return PageSample(pb.GetStatusResponse(**fields), history.seen(), replace(history.traffic), 100.0, 40.0)


def test_the_status_has_all_of_the_command_and_times_of_the_calendar() -> None:
    history = played(2, first_step=5)
    sample = sample_of(history, phase=pb.PHASE_IDLE, global_step=7, checkpoint_step=7, workers=[{"worker_id": "a"}])
    found = status_of(sample, LogEvent(3, EPOCH_AT, "warning", "round_restarted", "round 5 starts over"))
    check_document("Status", found)
    assert found["status"] == plain(sample.status)
    assert (found["now_at"], found["server"]["started_at"]) == (EPOCH_AT + 100, EPOCH_AT + 40)
    assert (found["server"]["address"], found["server"]["first_step"]) == ("127.0.0.1:2222", 5)
    assert found["server"]["shard"] == {"index": 0, "count": 1}
    assert found["events"][0]["text"] == "round 5 starts over"


def test_the_shard_of_one_of_several_servers_is_told() -> None:
    sample = sample_of(History(Traffic()), shard=pb.Shard(index=1, count=3))
    assert status_of(sample)["server"]["shard"] == {"index": 1, "count": 3}


def test_server_and_page_call_a_round_late_after_the_same_time() -> None:
    script = files("ps_server.page").joinpath("static").joinpath("phase.js").read_text(encoding="utf-8")
    assert f"const LATE_FROM_S = {LATE_FROM_S:g};" in script


@pytest.mark.parametrize(("age_s", "is_late"), [(5.0, False), (5.1, True)])
def test_a_worker_is_late_after_5_s(age_s: float, is_late: bool) -> None:
    sample = sample_of(History(Traffic()), waiting_for=["b"], round_age_s=age_s)
    assert status_of(sample)["waiting"] == [{"worker_id": "b", "for_s": age_s, "is_late": is_late}]


def test_bytes_are_told_by_the_way_they_took() -> None:
    traffic = Traffic(received_bytes=60, sent_bytes=50, shared_bytes=30, aside_bytes=20)
    by_transport = status_of(sample_of(History(traffic)))["traffic"]["by_transport"]
    assert by_transport == {"messages": 60, "data_connection": 20, "shared_memory": 30}


def test_a_round_is_told_with_its_workers() -> None:
    history = played(1)
    history.admitted("a", b"1", 10, 2.0, now_s=1.0)
    history.admitted("b", b"1", 11, 4.0, now_s=2.0)
    history.whole("a", now_s=1.5)
    history.whole("b", now_s=2.5)
    history.committed(2, ["a", "b"], {"b": 7}, ["c"], RoundTimes(1.0, 1.0, 0.25, 0.25), now_s=3.0)
    found = rounds_of(history.seen(), step=2)
    check_document("Rounds", found)
    one = found["rounds"][1]
    assert (one["step"], one["count"], one["began_at"], one["committed_at"]) == (1, 1, EPOCH_AT + 1, EPOCH_AT + 3)
    assert (one["took_s"], one["waiting_s"], one["receiving_s"], one["averaging_s"]) == (2.0, 1.0, 0.25, 0.25)
    assert (one["loss"], one["loss_min"], one["loss_max"], one["nonfinite_values"]) == (3.0, 2.0, 4.0, 7)
    assert one["workers"][1] == {
        "worker_id": "b",
        "pushed_s": 1.0,
        "whole_s": 1.5,
        "loss": 4.0,
        "local_step": 11,
        "nonfinite_values": 7,
    }
    assert one["without"] == ["c"]


def test_older_rounds_are_thinned_to_means_of_times_and_sums_of_bytes() -> None:
    found = rounds_of(played(DETAILED_ROUNDS + 5).seen(), step=DETAILED_ROUNDS + 5)
    check_document("Rounds", found)
    assert (found["kept_from"], found["detailed_from"]) == (0, 5)
    pair, _, single = found["rounds"][:3]
    assert (pair["count"], pair["took_s"], pair["received_bytes"], pair["loss"]) == (2, 0.5, 200, 1.0)
    assert (single["count"], "workers" in single) == (1, False)  # it waits for its other half
    assert [each["step"] for each in found["rounds"] if "workers" in each] == list(range(5, DETAILED_ROUNDS + 5))


@settings(deadline=None, max_examples=20)
@given(rounds=st.integers(0, 450), cuts=st.lists(st.integers(0, 450), max_size=5))
def test_a_reader_that_asks_again_gets_what_is_new_and_all_of_it(rounds: int, cuts: list[int]) -> None:
    history, since, got, marks = played(0), EVERYTHING, list[Any](), list[int]()
    for step in range(rounds):
        history.admitted("a", b"1", step, None, step)
        history.committed(step + 1, ["a"], {}, (), RoundTimes(step), step)
        history.mark(MarkKind.STALE, 0, step, "b")  # as late as it may be
        if step in cuts or step == rounds - 1:
            seen = history.seen()
            found = rounds_of(seen, since, step + 1)
            assert found["whole"] == (since == EVERYTHING)
            # An entry of several rounds may begin before what is lacking: it takes the place of what it has.
            got = [each for each in got if each["step"] < found["rounds"][0]["step"]] + found["rounds"]
            marks += [mark["id"] for mark in found["marks"]]
            since = next_since(seen)
    assert [each["step"] for each in got] == [sum(one["count"] for one in got[:at]) for at in range(len(got))]
    assert sum(each["count"] for each in got) == rounds
    assert marks == sorted(set(marks))
    if rounds <= DETAILED_ROUNDS:
        assert len(got) == len(marks) == rounds


def test_since_a_step_comes_every_entry_that_reaches_it() -> None:
    seen = played(DETAILED_ROUNDS + 10).seen()
    assert [each["step"] for each in rounds_of(seen, Since(3))["rounds"]][:2] == [2, 4]  # rounds 2 and 3 are one entry
    assert rounds_of(seen, Since(DETAILED_ROUNDS + 10))["rounds"] == []
    assert rounds_of(seen, Since(2**63 - 1))["rounds"] == []


@pytest.mark.parametrize(
    ("loss", "told"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (None, None)]
)
def test_losses_that_json_lacks_are_words_as_in_the_status(loss: float | None, told: str | None) -> None:
    found = rounds_of(played(1, loss=loss).seen())
    check_document("Rounds", found)
    (one,) = found["rounds"]
    assert (one["loss"], one["loss_max"], one["workers"][0]["loss"]) == (told, told, told)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_a_text_on_one_line(name: str) -> None:
    history = played(1, names=(name, "b"))
    history.mark(MarkKind.LEFT, 1, 0.0, name)
    sample = sample_of(history, waiting_for=[name], workers=[{"worker_id": name}])
    event = LogEvent(1, 0.0, "warning", "worker_left", name)
    for part in (status_json(sample, "", EPOCH_AT, [event]), *rounds_json(history.seen(), 1, EPOCH_AT, Since())):
        assert part.isascii()
        assert b"\n" not in part
        assert b"\r" not in part
    found, rounds = status_of(sample, event), rounds_of(history.seen())
    assert found["waiting"][0]["worker_id"] == found["events"][0]["text"] == name
    assert name in [worker["worker_id"] for worker in rounds["rounds"][0]["workers"]]
    assert rounds["marks"][0]["worker_id"] == name
    assert name.encode() not in rounds_csv(history.seen(), EPOCH_AT)


def test_the_table_has_a_row_for_each_entry_and_only_numbers() -> None:
    titles, *rows = csv.reader(io.StringIO(rounds_csv(played(DETAILED_ROUNDS + 5).seen(), EPOCH_AT).decode()))
    assert tuple(titles) == COLUMNS
    assert len(rows) == len(played(DETAILED_ROUNDS + 5).seen().rounds)
    assert all(math.isfinite(float(cell)) for row in rows for cell in row)
    _, without_loss = csv.reader(io.StringIO(rounds_csv(played(1, loss=None).seen(), EPOCH_AT).decode()))
    assert without_loss[COLUMNS.index("loss")] == ""


def test_before_there_is_a_center_the_history_is_empty() -> None:
    found = rounds_of(HistorySeen())
    check_document("Rounds", found)
    assert (found["first_step"], found["rounds"], found["marks"]) == (None, [], [])
    check_document("Status", status_of(sample_of(History(Traffic()))))


def test_the_description_of_the_api_names_every_path_and_shows_it_without_scripts() -> None:
    described = json.loads(openapi_json())
    assert described["openapi"].startswith("3.1")
    shown = api_page()
    for path in described["paths"]:
        assert f"GET {path}<" in shown
    assert "<script" not in shown
    assert "style=" not in shown
