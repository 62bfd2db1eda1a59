"""Names of workers are shown as safe text wherever people read them; of many names, only a few are shown."""

from __future__ import annotations

import io
import re
import signal
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from modelaverage.missing import Missing
from modelaverage.names import MAX_NAMES, file_name, listed, printable, shown
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker import report
from ps_worker.curves import picture
from ps_worker.demo.digits_config import ALONE
from ps_worker.demo.record import Record
from ps_worker.demo.view import Cast, LiveView, PlainView
from ps_worker.events.parse import AccuracyEvent, Event, RoundEvent, ServerEvent, StepEvent
from ps_worker.events.sinks import reporter
from tests.conftest import StartServer
from tests.jobs import STEP, Job, of
from tests.raw_client import RawClient, push_header
from tests.scraped import scrape
from tests.strategies import fast
from tests.test_server_process import ServerProcess

HOSTILE = (
    "[/]",
    "[red]a[/red]",
    "[link=http://x]",
    ":smile:",
    "two\nlines",
    "back\rward",
    "\x1b[2J\x1b]0;title\x07",
    "\x00\x7f\x9b31m",
    "\u202egnirts\u2066",
    "zero\u200bwidth\ufeff",
    r"$\frac{$",
    "$x_1$ and $",
    "_hidden",
    "../../etc/x",
    "/",
    "..",
    "%s %d {}",
    "a, b",
    "'quoted'",
    "w" * 128,
    "\U0001f600" * 32,
    "\u0627\u0644\u0639" * 20,
)


# How a name is written.


@fast
@given(st.text(max_size=128))
def test_a_name_is_shown_on_one_line_of_printable_characters(name: str) -> None:
    for text in (shown(name), printable(name), listed([name])):
        assert text.isprintable()


@pytest.mark.parametrize("name", ["worker-0", "10.0.0.7:2222", "a/b@c", "\u5de5\u4f5c-3", ":smile:"])
def test_a_plain_name_is_shown_as_it_is(name: str) -> None:
    assert shown(name) == name


@pytest.mark.parametrize("name", ["", "a, b", "nobody else", "it's", "[/]", "a\n", "\u202e", "and 3 more"])
def test_a_name_that_could_be_taken_for_something_else_is_shown_in_quotes(name: str) -> None:
    assert shown(name) == repr(name)


@fast
@given(st.lists(st.text(max_size=128), max_size=40), st.integers(0, 100_000))
def test_a_list_of_names_has_an_end_and_counts_the_rest(names: list[str], omitted: int) -> None:
    text = listed(names, omitted)
    possible = set[str]()
    for count in range(min(len(names), 1), min(len(names), MAX_NAMES) + 1):
        more = len(names) - count + omitted
        words = [", ".join(map(repr, names[:count])), f"{more:,} more" if more else ""]
        possible.add(" and ".join(word for word in words if word))
    assert text in possible
    assert len(text) < 2500


def test_a_list_of_names_says_how_many_more_there_are() -> None:
    assert listed([]) == ""
    assert listed([], 5) == "5 more"
    assert listed(["b", "a"]) == "'b', 'a'"
    assert listed([f"w{n}" for n in range(MAX_NAMES)], show=shown).endswith(", w15")
    assert listed([f"w{n}" for n in range(12_000)], show=shown).endswith(", w15 and 11,984 more")
    assert listed(["a"], 11_999) == "'a' and 11,999 more"


def test_long_names_are_counted_where_a_line_would_have_no_end() -> None:
    text = listed(["\x00" * 128] * 16)
    assert len(text) < 1100
    assert text.endswith(" and 15 more")


@fast
@given(st.text(min_size=1, max_size=128), st.text(min_size=1, max_size=128))
def test_a_file_name_is_one_and_every_name_has_its_own(one: str, other: str) -> None:
    name = file_name(one)
    assert re.fullmatch(r"[A-Za-z0-9_~-][A-Za-z0-9_.~-]*", name)
    assert len(name) <= 128
    assert (name == file_name(other)) == (one == other)


def test_a_plain_name_is_its_own_file_name() -> None:
    assert [file_name(name) for name in ("worker-0", "ps-1", ALONE)] == ["worker-0", "ps-1", ALONE]


# The missing workers, in words.


def test_what_is_missing_is_said_in_words() -> None:
    assert Missing().text() == "nobody"
    assert Missing(("a", "b c")).text() == "'a', 'b c'"
    assert Missing(("a", "b c"), 0, 2).text(shown) == "a, 'b c', 2 not heard from yet"
    assert Missing(("a",), 11_984, 2).text() == "'a' and 11,984 more, 2 not heard from yet"
    assert Missing((), 0, 3).text() == "3 not heard from yet"
    assert [bool(missing) for missing in (Missing(), Missing(("a",)), Missing(omitted=1), Missing(unknown=1))] == [
        False,
        True,
        True,
        True,
    ]


def test_what_a_server_says_is_understood_and_cut_if_it_is_an_older_one() -> None:
    missing = Missing(("a", "b"), 3, 2)
    assert Missing.told(missing.notice(5.0)) == missing
    assert missing.notice(5.0).round_age_s == 5.0
    assert missing.count == 7
    everybody = pb.GetStatusResponse(waiting_for=[f"w{n:05d}" for n in range(10_000)], waiting_for_unknown=1)
    assert Missing.told(everybody) == Missing(tuple(f"w{n:05d}" for n in range(MAX_NAMES)), 10_000 - MAX_NAMES, 1)


# Names in the log.


def test_a_name_makes_no_line_of_its_own_in_the_log() -> None:
    names = [name for name in HOSTILE if len(name.encode()) <= 128]
    with ServerProcess("--verbose", num_workers=1) as server:
        with RawClient(server.address) as client:
            job = Job(client, server.address)
            for number, name in enumerate(names):
                job.push(name, of(1), base_step=STEP + number, push_id=number + 1).answer()
                bad = client.open_push()
                bad.send(push_header("none", name))
                assert bad.refusal().reason == "MANIFEST_UNKNOWN"
        server.signal(signal.SIGTERM)
        code, _, err = server.end()
    assert code == 0
    lines = err.split("\n")
    assert all(line.isprintable() for line in lines), [line for line in lines if not line.isprintable()]
    for name in names:
        assert sum(line.endswith(f"averaged {shown(name)}") for line in lines) == 1
        assert sum(f"MANIFEST_UNKNOWN: {name!r} pushes" in line for line in lines) == 1
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ps-server: ", line) for line in lines if line)


def test_a_name_is_one_label_value_for_prometheus(start_server: StartServer) -> None:
    server = start_server(1, metrics_bind="127.0.0.1:0")
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        for number, name in enumerate(HOSTILE):
            job.push(name, of(1), base_step=STEP + number).answer()
    found = scrape(server.metrics_address)
    assert found.labels("worker_local_step", "worker") == set(HOSTILE)
    assert found["rounds_total"] == len(HOSTILE)


# Names in the demo, and in the files that it leaves behind.


def record_of(names: tuple[str, ...]) -> Record:
    record = Record()
    for name in (*names, ALONE):
        record.add(StepEvent(name, 1.0, 40, 0.25, 1234.5, 0.75, 2))
        record.add(StepEvent(name, 2.0, 80, 0.125, 1234.5, 0.75, 2))
        record.add(RoundEvent(name, 1.0, 40, 2, 0.5))
        record.add(AccuracyEvent(name, 1.0, 40, 2, 0.975, 0.125))
    for name in names:
        record.add(ServerEvent(name, 1.0, "averaging", 2, 3 << 20, 2 << 20, names[:MAX_NAMES], 11_984))
    return record


def test_the_demo_shows_names_as_text() -> None:
    out = io.StringIO()
    console = Console(file=out, width=3000, force_terminal=True, color_system=None, legacy_windows=False, height=500)
    view = LiveView(console)
    servers = {name: name for name in HOSTILE if name.isprintable()}
    view.show(Cast(servers, HOSTILE, (ALONE,), steps=1200), record_of(HOSTILE), "trains")
    view.close()
    view.table("title", [(shown(name), shown(name)) for name in HOSTILE])
    for name in HOSTILE:
        assert shown(name) in out.getvalue()
    assert "[2J" not in out.getvalue().replace(r"\x1b[2J", "")
    assert f"waits for {listed(HOSTILE[:MAX_NAMES], 11_984, shown)}" in out.getvalue()


def test_the_plain_lines_of_the_demo_and_of_a_worker_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    plain = PlainView()
    for name in HOSTILE:
        plain.show(Cast({name: name}, (name,), (name,), steps=1200), record_of((name,)), "trains")
        reporter(None, 80)(StepEvent(name, 2.0, 80, 0.125, 1234.5, 0.75, 2))
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


def test_the_report_has_any_name_in_its_picture_and_a_directory_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = list[Figure]()
    monkeypatch.setattr(
        picture,
        "Figure",
        lambda **settings: figures.append(Figure(**settings)) or figures[-1],  # type: ignore[func-returns-value]
    )
    report.draw(record_of(HOSTILE), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (legend,) = figures[0].legends
    assert len(legend.get_texts()) == len(HOSTILE) + 1  # none is left out, and none is a formula
    runs = tmp_path / "a" / "b" / "runs"
    report.write_tensorboard(record_of(HOSTILE), runs)
    assert len(list(runs.glob("*/events.out.tfevents.*"))) >= len(HOSTILE) + 1
    assert [path for path in tmp_path.rglob("*.tfevents.*") if path.parent.parent != runs] == []


def test_the_report_of_a_run_that_made_no_round_says_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The center was there, and the lone worker trains anyway.
        told: list[Event] = [
            AccuracyEvent("worker-0", 1.0, 40, 2, 0.975, 0.125),
            StepEvent(ALONE, 1.0, 40, 0.25, 1234.5, 0.0, 0),
        ]
        report.draw(Record(told), tmp_path / "curves.png")
