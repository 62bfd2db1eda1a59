"""`ps-server status --watch`: how it shows servers that work, wait, go away and come back."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from modelaverage.names import MAX_NAMES, shown
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.console import watch as watching
from ps_server.console.status import NoAnswerError, Seen, as_text
from ps_server.console.status_view import picture
from ps_server.console.watch import json_line, line, watch
from ps_server.console.worker_table import state_of, worker_table, workers_of
from tests.jobs import COUNT, STEP, Job, of
from tests.raw_client import until
from tests.test_names import HOSTILE
from tests.test_server_process import ServerProcess

TIMEOUT_S = 20
RED = "\x1b[1;31m"


def waiting() -> pb.GetStatusResponse:
    return pb.GetStatusResponse(
        phase=pb.PHASE_AVERAGING,
        global_step=7,
        num_workers=2,
        waiting_for=["worker-1"],
        round_age_s=3.5,
        rounds_per_minute=12.25,
        rounds_committed=7,
        workers=[
            pb.WorkerStatus(
                worker_id="worker-0",
                is_chief=True,
                waiting=True,
                local_step=160,
                lateness_s=0.25,
                loss=0.125,
                transport=pb.TRANSPORT_SHARED_MEMORY,
            ),
            pb.WorkerStatus(worker_id="worker-1", last_seen_age_s=75.0),
        ],
    )


def drawn(*servers: Seen, width: int = 130, height: int | None = None) -> str:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(width=width, record=True, force_terminal=True, color_system="standard", file=nowhere)
        console.print(picture(servers, "12:00:00", height))
    return console.export_text(styles=True)


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_who_is_being_waited_for_is_red_and_the_others_are_not() -> None:
    text = drawn(Seen("ps:2222", waiting()))
    red = [found for found in text.splitlines() if RED in found]
    assert len(red) == 2  # the worker that it waits for, and that worker's line
    assert all("worker-1" in found and "worker-0" not in found for found in red)


def test_a_panel_has_the_phase_the_pace_and_every_worker() -> None:
    text = without_styles(drawn(Seen("ps:2222", waiting())))
    for what in ("ps:2222", "averaging", "step 7", "12.2 rounds/min", "worker-1   for 3.5 s", "7 committed"):
        assert what in text
    (chief,) = [found for found in text.splitlines() if "worker-0" in found]
    assert re.search(r"worker-0 \(chief\) +at the barrier +160 +0.125 +250 ms +0 ms +0 +shared memory", chief)
    (other,) = [found for found in text.splitlines() if "worker-1" in found and "last heard from" in found]
    assert re.search(r"last heard from 1 min 15 s ago +0 +- +- +1 min 15 s +0 +-", other)


def test_each_shard_has_a_panel() -> None:
    shards = []
    for index in range(2):
        status = waiting()
        status.shard.CopyFrom(pb.Shard(index=index, count=2, job_id=b"j" * 16))
        shards.append(Seen(f"ps{index}:2222", status))
    text = without_styles(drawn(*shards))
    assert "2 servers" in text
    assert "ps0:2222, shard 0 of 2 of job 6a6a6a6a" in text
    assert "ps1:2222, shard 1 of 2 of job 6a6a6a6a" in text


def test_a_server_that_is_away_is_red_and_keeps_what_it_said_last() -> None:
    text = drawn(Seen("ps:2222", waiting(), "no answer", 12.0), Seen("other:2222", None, "refused"))
    plain = without_styles(text)
    assert "2 away" in plain
    assert "AWAY for 12 s; below is its last status: no answer" in plain
    assert "AWAY: refused" in plain
    assert "step 7" in plain
    assert all(RED in found for found in text.splitlines() if "AWAY" in found)


def test_a_checkpoint_that_failed_is_red() -> None:
    status = waiting()
    status.checkpoint_problem = "no space"
    assert any(RED in found and "FAILED: no space" in found for found in drawn(Seen("ps:2222", status)).splitlines())


def test_a_checkpoint_that_hangs_has_not_failed_and_is_no_news_every_second() -> None:
    def hanging(age_s: float) -> Seen:
        status = waiting()
        status.checkpoint_writing_s = age_s
        status.checkpoint_problem = f"the checkpoint of global_step 2 has been waiting for /center for {age_s:.0f} s"
        return Seen("ps:2222", status)

    shown = "HANGS: the checkpoint of global_step 2 has been waiting for /center for 12 s"
    assert any(RED in found and shown in found for found in drawn(hanging(12), width=200).splitlines())
    assert f"checkpoint {shown}" in line(hanging(12))
    assert watching._news(hanging(12)) == watching._news(hanging(13))
    assert watching._news(hanging(12)) != watching._news(Seen("ps:2222", waiting()))
    failed = hanging(0.5)  # an earlier one failed, and another one is being written
    assert "checkpoint FAILED" in line(failed)


@pytest.mark.parametrize("width", [20, 80, 200])
def test_names_from_outside_and_narrow_terminals_do_no_harm(width: int) -> None:
    status = waiting()
    status.workers[1].worker_id = status.waiting_for[0] = "\x1b[2J[red]\n" + "x" * 100
    text = drawn(Seen("ps:2222", status), width=width)
    assert "\x1b[2J" not in text
    assert max(map(len, without_styles(text).splitlines())) <= width
    assert "\x1b[2J" not in as_text(status, width)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_in_the_picture_in_a_line_and_in_the_status(name: str) -> None:
    status = waiting()
    status.workers[1].worker_id = status.waiting_for[0] = name
    server = Seen("ps:2222", status)
    for text in (without_styles(drawn(server, width=300)), line(server), as_text(status)):
        assert shown(name) in text
        assert all(found.isprintable() for found in text.split("\n"))
    assert json.loads(json_line([server], 5.0))["servers"][0]["status"]["waiting_for"] == [name]


@pytest.mark.parametrize("words", ["[/] [red]", "a\x1b[2Jb\nc"])
def test_what_a_server_says_of_its_troubles_is_text(words: str) -> None:
    status = waiting()
    status.checkpoint_problem = words
    for server in (Seen("ps:2222", status), Seen("ps:2222", status, words)):
        for text in (without_styles(drawn(server)), line(server), as_text(status)):
            assert repr(words)[1:-1] in text
            assert all(found.isprintable() for found in text.split("\n"))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_names_of_usual_length_stay_whole_in_a_narrow_terminal(width: int) -> None:
    status, name = waiting(), "worker-of-a-long-name-1"
    status.workers[1].worker_id = status.waiting_for[0] = name
    status.workers[1].transport = pb.TRANSPORT_DATA_CONNECTION
    text = without_styles(drawn(Seen("ps:2222", status), width=width))
    assert len([found for found in text.splitlines() if f" {name} " in found]) == 2
    assert len([found for found in text.splitlines() if " worker-0 (chief) " in found]) == 1
    assert max(map(len, text.splitlines())) <= width
    # Columns go, the least important first.
    (head,) = [found for found in text.splitlines() if " doing " in found]
    titles = ["by", "counted", "last seen", "late", "loss", "local step", "doing"]
    kept = [title for title in titles if f" {title} " in head]
    assert kept == titles[-len(kept) :]
    assert (kept == titles) is (width >= 200)


def test_a_very_long_name_leaves_the_columns_of_the_others() -> None:
    status = waiting()
    status.workers[1].worker_id = "x" * 128
    text = without_styles(drawn(Seen("ps:2222", status), width=80))
    assert "at the barrier" in text
    assert "local step" in text


def crowd(count: int = 40) -> pb.GetStatusResponse:
    """A strict job of many workers with long names on several hosts; the last two are missing."""
    names = [f"trainer-deployment-7c9f8b5d4f-x2x7k.training.svc.cluster.local/{index}" for index in range(count)]
    status = pb.GetStatusResponse(
        phase=pb.PHASE_AVERAGING,
        global_step=123_456,
        num_workers=count,
        min_workers=count,
        waiting_for=names[-2:],
        round_age_s=23.5,
        rounds_per_minute=12.25,
        rounds_restarted=3,
        stale_pushes=4,
        last_round_s=12.345,
        workers_finished=1,
        rounds_committed=123_456,
        checkpoint_step=123_450,
        checkpoint_age_s=4.7,
    )
    for index, name in enumerate(names):
        status.workers.add(
            worker_id=name,
            is_chief=index == 0,
            waiting=index < count - 2,
            local_step=12_345_600,
            lateness_s=90.0,
            loss=0.19171,
            last_seen_age_s=75.0,
            pushes_counted=123_456,
            interval_steps=100 if index % 2 else 50,
            transport=pb.TRANSPORT_DATA_CONNECTION,
            peer="ipv6:[2001:db8:0:1:2:3:4:5]:51236",
        )
    return status


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("servers", [1, 2, 4])
def test_a_live_picture_fits_a_terminal_and_breaks_no_name(width: int, servers: int) -> None:
    seen = [Seen(f"a-long-host-name-{n}.training.cluster.example.org:2222", crowd()) for n in range(servers)]
    lines = without_styles(drawn(*seen, width=width, height=24)).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= width
    assert all(line[0] in "╭│╰" and line[-1] in "╮│╯" for line in lines[1:])  # whole panels, nothing beside them
    for what in ("averaging", "waits for", "l/38"):  # the end of a name tells workers apart
        assert len([line for line in lines if what in line]) >= servers
    if servers == 1:
        assert "…" in lines[-3]
        assert "more" in lines[-2]


def test_in_a_low_terminal_those_that_a_round_waits_for_come_first() -> None:
    rows = [row for row in worker_table(crowd(), 80, rows=5) if row.is_worker]
    assert [row.is_missing for row in rows] == [True, True, False]


@pytest.mark.parametrize("width", [60, 80])
def test_the_status_fits_a_terminal(width: int) -> None:
    lines = as_text(crowd(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len([line for line in lines if "at the barrier" in line]) == 38
    assert any(line.startswith("waiting for") and "for 23.5 s" in line for line in lines)


def test_the_status_without_a_terminal_leaves_nothing_out() -> None:
    text = as_text(crowd())
    assert "…" not in text
    assert all(worker.worker_id in text for worker in crowd().workers)


def going() -> pb.GetStatusResponse:
    """A strict round that waits: one has finished, one has left, one says nothing, one is at the barrier."""
    status = waiting()
    status.num_workers, status.min_workers, status.workers_finished = 4, 4, 1
    status.workers[1].has_left = True
    status.workers.add(worker_id="worker-2", local_step=160, last_seen_age_s=20.0, interval_steps=50)
    status.workers.add(worker_id="worker-3", local_step=160, last_seen_age_s=90.0, has_finished=True)
    status.workers[0].interval_steps = 100
    status.waiting_for.append("worker-2")
    return status


def test_a_worker_that_is_waited_for_is_never_said_to_compute() -> None:
    status = going()
    states = [state_of(worker, status.waiting_for) for worker in status.workers]
    assert states == ["at the barrier", "has left", "last heard from 20.0 s ago", "finished"]
    for text in (without_styles(drawn(Seen("ps:2222", status))), as_text(status)):
        assert "computes" not in text
        assert all(state in text for state in states)


def test_a_worker_that_nobody_waits_for_computes() -> None:
    status = going()
    del status.waiting_for[:]
    assert state_of(status.workers[2], status.waiting_for) == "computes"
    assert state_of(status.workers[1], status.waiting_for) == "has left"


def test_names_that_the_server_leaves_out_are_not_said_to_compute_either() -> None:
    status = going()
    del status.waiting_for[:]
    status.waiting_for_omitted = 2
    assert "computes" not in as_text(status)


def test_finished_workers_are_counted_and_the_end_of_the_job_is_said() -> None:
    status = going()
    for text in (without_styles(drawn(Seen("ps:2222", status))), line(Seen("ps:2222", status)), as_text(status)):
        assert "1 of 4 has finished; rounds go on with 3" in text
    status.workers_finished, status.job_over = 4, True
    for text in (without_styles(drawn(Seen("ps:2222", status))), line(Seen("ps:2222", status)), as_text(status)):
        assert "all 4 have finished" in text
    assert "the job is over, a new one may begin with this center" in as_text(status)


def test_different_intervals_are_said_once_in_a_line() -> None:
    said = "interval_steps differ: worker-0 100, worker-2 50"
    for text in (without_styles(drawn(Seen("ps:2222", going()))), as_text(going())):
        assert text.count("interval_steps") == 1
        assert said in text
    same = going()
    same.workers[2].interval_steps = 100
    assert "interval_steps" not in as_text(same)
    many = crowd()
    assert as_text(many, 80).count("interval_steps differ") == 1


def test_workers_that_have_pushed_come_before_readers_of_whom_a_few_are_shown() -> None:
    status = waiting()
    status.workers[1].peer = "ipv4:127.0.0.1:1"
    status.workers.extend(pb.WorkerStatus(worker_id=f"a{number:03d}") for number in range(100))
    status.workers_omitted = 8000
    found, more = workers_of(status)
    assert [worker.worker_id for worker in found[:3]] == ["worker-0", "worker-1", "a000"]
    assert (len(found), more) == (2 + MAX_NAMES, 8100 - MAX_NAMES)
    text = without_styles(drawn(Seen("ps:2222", status)))
    assert text.index("worker-1 ") < text.index("a000")
    assert "and 8,084 more" in text
    assert "and 8,084 more" in as_text(status)


def test_names_that_are_left_out_are_counted() -> None:
    status = waiting()
    status.waiting_for_omitted, status.waiting_for_unknown = 11_984, 2
    said = "and 11,984 more, 2 not heard from yet"
    for text in (without_styles(drawn(Seen("ps:2222", status))), line(Seen("ps:2222", status)), as_text(status)):
        assert said in text
    assert (
        json.loads(json_line([Seen("ps:2222", status)], 5.0))["servers"][0]["status"]["waiting_for_omitted"] == 11_984
    )


def test_a_line_says_for_whom_it_waits() -> None:
    expected = "ps:2222  averaging, step 7, 12.2 rounds/min, 1 of 2 at the barrier, waits for worker-1 "
    expected += "(last heard from 75 s ago) (for 3.5 s)"
    assert line(Seen("ps:2222", waiting())) == expected
    assert "waits for the chief" in line(Seen("ps:2222", pb.GetStatusResponse(phase=pb.PHASE_UNINITIALIZED)))
    assert line(Seen("a:1", waiting(), "gone", 9.0)) == "a:1  AWAY: gone, last seen 9 s ago at step 7"


def test_a_line_of_json_is_one_object_with_stable_names() -> None:
    servers = [Seen("a:1", waiting()), Seen("b:1", None, "gone", 2.0)]
    found = json.loads(json_line(servers, 5.0))
    assert found["unix_time_s"] == 5.0
    assert [tuple(server) for server in found["servers"]] == [("address", "problem", "away_s", "status")] * 2
    status = found["servers"][0]["status"]
    assert tuple(status) == tuple(field.name for field in pb.GetStatusResponse.DESCRIPTOR.fields)
    assert status["workers"][0]["transport"] == "TRANSPORT_SHARED_MEMORY"
    assert (status["workers"][0]["loss"], status["workers"][1]["loss"], status["checkpoint_age_s"]) == (
        0.125,
        None,
        None,
    )
    assert found["servers"][1] == {"address": "b:1", "problem": "gone", "away_s": 2.0, "status": None}


def test_where_it_cannot_draw_it_prints_a_line_for_each_change_until_ctrl_c(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answers() -> Iterator[pb.GetStatusResponse | Exception]:
        yield waiting()
        older = waiting()
        older.round_age_s = 4.5  # no news
        yield older
        yield NoAnswerError("no answer")
        yield NoAnswerError("no answer (waited longer)")
        yield waiting()
        yield KeyboardInterrupt()  # type: ignore[misc]

    left = answers()

    def fetch(_: str) -> pb.GetStatusResponse:
        answer = next(left)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    watch(["ps:2222"], fetch, interval_s=0.001, as_json=False)
    out, err = capsys.readouterr()
    printed = [text.split("  ", 1)[1] for text in out.splitlines()]
    assert [("AWAY" in text, "waits for worker-1" in text) for text in printed] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    assert err == ""


class Watching:
    """`ps-server status --watch` as a process; its lines as they come."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "ps_server", "status", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._watchdog = threading.Timer(TIMEOUT_S, self._process.kill)
        self._watchdog.start()

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def line_with(self, what: str) -> str:
        """Waits for a line."""
        assert self._process.stdout is not None
        for found in self._process.stdout:
            if what in found:
                return found
        raise AssertionError(f"it ended before it said {what!r}")

    def interrupt(self) -> tuple[int, str]:
        self._process.send_signal(signal.SIGINT)
        _, err = self._process.communicate(timeout=TIMEOUT_S)
        return self._process.returncode, err


def test_a_server_that_goes_away_and_comes_back_is_shown_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    bind = f"unix:{tmp_path}/ps.sock"
    with Watching("--watch", "0.05", bind) as watcher:
        watcher.line_with("AWAY")
        with ServerProcess("--bind", bind) as server:
            watcher.line_with("waits for the chief")
            server.signal(signal.SIGKILL)
            server.end()
            watcher.line_with("AWAY")
        with ServerProcess("--bind", bind):
            watcher.line_with("waits for the chief")
            assert watcher.interrupt() == (0, "")


def test_json_lines_follow_the_job(job: Job) -> None:
    with Watching(job.address, "--json", "--watch", "0.05") as watcher:
        job.push("a", of(1))
        job.given("a", COUNT)
        found: Any = json.loads(watcher.line_with("PHASE_AVERAGING"))
        assert found["servers"][0]["status"]["global_step"] == STEP
        assert watcher.interrupt() == (0, "")


def test_in_a_terminal_it_draws_and_ctrl_c_gives_the_terminal_back(job: Job) -> None:
    for name in HOSTILE:
        pull = job.client.open_pull()
        pull.send(pb.PullRequest(worker_id=name, header_only=True))
        pull.receive()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ps_server", "status", "--watch", job.address]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    os.close(theirs)
    shown = b""

    def read() -> bool:
        nonlocal shown
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other side is closed
            return True
        return False

    while b"waits for" not in shown:
        assert not read(), shown
    process.send_signal(signal.SIGINT)
    until(read, "it ends")
    _, err = process.communicate(timeout=TIMEOUT_S)
    watchdog.cancel()
    os.close(ours)
    assert (process.returncode, err) == (0, b"")
    _, left, after = shown.partition(b"\x1b[?1049l")  # the other screen is left
    assert left
    assert b"waits for" in after  # the last picture stays


def test_without_rich_a_terminal_gets_lines_and_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(address: str) -> pb.GetStatusResponse:
        if fetch_again:
            raise KeyboardInterrupt
        fetch_again.append(address)
        return waiting()

    fetch_again: list[str] = []
    monkeypatch.setattr(watching, "find_spec", lambda _: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    watch(["ps:2222"], fetch, interval_s=0.001, as_json=False)
    out, err = capsys.readouterr()
    assert "waits for worker-1" in out
    assert err == "for a live picture: pip install 'torch-model-average[watch]'\n"


def test_the_status_in_a_terminal_is_as_wide_as_that(job: Job) -> None:
    name = "trainer-deployment-7c9f8b5d4f-x2x7k.training.svc.cluster.local/1"
    pull = job.client.open_pull()
    pull.send(pb.PullRequest(worker_id=name, header_only=True))
    pull.receive()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ps_server", "status", job.address]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "LINES": "24"}
    subprocess.run(command, stdin=theirs, stdout=theirs, env=environment, check=True, timeout=TIMEOUT_S)
    shown = os.read(ours, 65536).decode()
    os.close(theirs)
    os.close(ours)
    lines = shown.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 60
    assert any("trainer-" in line and "…" in line and "computes" in line for line in lines)
    piped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S, env=environment)
    assert name in piped.stdout


@pytest.mark.parametrize("interval", ["0", "-1", "nan"])
def test_an_interval_that_is_none_is_refused(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", "127.0.0.1:1", "--watch", interval])
    assert f"{interval!r} is not a positive number of seconds" in capsys.readouterr().err
