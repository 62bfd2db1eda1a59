"""The built-in workload: what a worker does, and a whole run with everything that it shows and leaves behind."""

from __future__ import annotations

import argparse
import io
import json
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ma_client import ClusterSpec, ConflictError, ParameterServerSession
from modelaverage.outer import AVERAGE, OuterAdam, outer_optimizer, text_of
from ps_worker.curves.metrics import curves_of
from ps_worker.curves.text import plotted
from ps_worker.demo import run_files
from ps_worker.demo.digits import DigitsData, DigitsNet, accuracy, train_alone, train_in_cluster
from ps_worker.demo.digits_config import ALONE, ALONE_WITH_ALL, PLAIN, DigitsConfig, add_training_flags
from ps_worker.demo.play import play
from ps_worker.demo.record import Record, Score
from ps_worker.demo.summary import Summary
from ps_worker.demo.view import Cast, LiveView, PlainView
from ps_worker.events.parse import AccuracyEvent, Event, RoundEvent, ServerEvent, StepEvent, decode, encode
from tests.conftest import StartServer
from tests.launched import Launched, said
from tests.long_plays import long_except

EVENTS: list[Event] = [
    StepEvent("worker-0", 1.0, 40, 0.25, 1234.5, 0.75, 2),
    RoundEvent("worker-0", 1.0, 40, 2, 0.5),
    AccuracyEvent("worker-0", 1.0, 40, 2, 0.975, 0.125),
    ServerEvent("ps-0", 1.0, "averaging", 2, 3 << 20, 2 << 20, ("worker-1",)),
    ServerEvent("ps-1", 1.0, "idle", 3, 5 << 20, 4 << 20, ()),
]


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def train_as_chief(start_server: StartServer, config: DigitsConfig, directory: Path) -> tuple[list[Event], bytes]:
    """The events and the saved center of the only worker of a new server."""
    events: list[Event] = []
    cluster = ClusterSpec((start_server(1).address,), num_workers=1, task_index=0)
    train_in_cluster(config, cluster, events.append, save_center=directory / "center")
    return events, (directory / "center").read_bytes()


def without_times(events: list[Event]) -> list[Event]:
    """The part of an event that does not depend on the speed of this machine, nor on the process that reports it."""
    fields = [json.loads(encode(event)) for event in events]
    return [decode(json.dumps({**f, **{k: 0 for k in f if k.endswith("_s") or k == "moved_bytes"}})) for f in fields]


# A worker


def test_parts_are_disjoint_and_cover_the_training_images() -> None:
    data = DigitsData.load()
    parts = [data.part(3, index, batch_size=1) for index in range(3)]
    assert len(data.train) + len(data.test) == 1797
    assert len(data.test) == 360
    assert sum(len(part) for part in parts) == len(data.train)
    pixels = torch.cat([part.pixels for part in parts]).flatten(1)
    assert sorted(map(tuple, pixels.tolist())) == sorted(map(tuple, data.train.pixels.flatten(1).tolist()))


def test_split_is_the_same_every_time() -> None:
    assert torch.equal(DigitsData.load().test.pixels, DigitsData.load().test.pixels)


def test_part_that_is_less_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size 1000 is more than the 719 images"):
        DigitsData.load().part(2, 0, batch_size=1000)


def test_same_seed_gives_the_same_center(start_server: StartServer, tmp_path: Path) -> None:
    config = DigitsConfig(steps=40, interval_steps=20)
    first, second = (train_as_chief(start_server, config, tmp_path) for _ in range(2))
    other = train_as_chief(start_server, DigitsConfig(steps=40, interval_steps=20, seed=4), tmp_path)
    assert without_times(first[0]) == without_times(second[0])
    assert first[1] == second[1]
    assert first[1] != other[1]


def test_lone_worker_differs_only_in_having_no_server(start_server: StartServer, tmp_path: Path) -> None:
    config = DigitsConfig(steps=40, interval_steps=20, outer=text_of(AVERAGE))
    events, _ = train_as_chief(start_server, config, tmp_path)
    alone: list[Event] = []
    train_alone(config, 1, 0, alone.append)
    together, lone = Record(events), Record(alone)
    # The average of one worker's variables is these variables.
    assert [step.loss for step in lone.steps[ALONE]] == [step.loss for step in together.steps["worker-0"]]
    assert lone.last_accuracy(ALONE) == together.last_accuracy("worker-0")
    assert [r.step for r in together.rounds["worker-0"]] == [20, 40]
    assert not lone.rounds


@pytest.mark.parametrize("outer", ["average", "sgd:lr=0.5,momentum=0.5,nesterov"])
def test_a_play_in_one_process_ends_with_the_center_of_two_workers_and_their_server(
    outer: str, start_server: StartServer, tmp_path: Path
) -> None:
    config = DigitsConfig(steps=60, interval_steps=20, outer=outer)
    address, center = start_server(2).address, tmp_path / "center"
    chief, second = (ClusterSpec((address,), num_workers=2, task_index=index) for index in range(2))
    told: list[Event] = []
    trains = threading.Event()  # both would seed torch's one generator

    def tell(event: Event) -> None:
        told.append(event)
        trains.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(train_in_cluster, config, chief, tell, save_center=center)
        assert trains.wait(60)
        for end in (first, pool.submit(train_in_cluster, config, second, lambda _: None)):
            end.result(timeout=120)
    played: list[Event] = []
    model = play(config, 2, outer_optimizer(outer), PLAIN, played.append)
    for name, value in load_file(center).items():
        assert torch.equal(model.state_dict()[name], value), name
    assert [(event.step, event.accuracy, event.loss) for event in Record(played).accuracies[PLAIN]] == [
        (event.step, event.accuracy, event.loss) for event in Record(told).accuracies["worker-0"]
    ]


@pytest.mark.parametrize("steps_before", [40, 80])
def test_a_worker_that_is_started_again_makes_only_the_steps_that_are_left(
    start_server: StartServer, tmp_path: Path, steps_before: int
) -> None:
    # Momentum would be lost by the restart; without it, the center is that of an uninterrupted run.
    whole = DigitsConfig(steps=80, interval_steps=20, momentum=0)
    undisturbed, center = train_as_chief(start_server, whole, tmp_path)
    cluster = ClusterSpec((start_server(1).address,), num_workers=1, task_index=0)
    first: list[Event] = []
    again: list[Event] = []
    train_in_cluster(replace(whole, steps=steps_before), cluster, first.append)
    train_in_cluster(whole, cluster, again.append, save_center=tmp_path / "center")
    if steps_before < whole.steps:
        assert without_times([*first, *again]) == without_times(undisturbed)
    else:  # nothing is left to do but to report how good the center is
        assert without_times(again) == [event for event in without_times(undisturbed)[-2:] if event.kind == "accuracy"]
    assert (tmp_path / "center").read_bytes() == center


def test_a_worker_that_is_started_again_counts_its_local_steps_on(start_server: StartServer) -> None:
    cluster = ClusterSpec((start_server(1).address,), num_workers=1, task_index=0)
    events: list[Event] = []
    with ParameterServerSession(cluster.ps_hosts, worker_id="observer") as observer:
        for steps in (40, 60):
            train_in_cluster(DigitsConfig(steps=steps, interval_steps=20), cluster, events.append)
            (worker,) = observer.status().workers
            assert worker.local_step == steps
            assert 0 < worker.loss < 3  # ln 10 at the start


def test_a_worker_with_another_outer_optimizer_is_refused_with_both_named(start_server: StartServer) -> None:
    cluster = ClusterSpec((start_server(1).address,), num_workers=1, task_index=0)
    config = DigitsConfig(steps=20, interval_steps=20)
    train_in_cluster(config, cluster, lambda _: None)
    with pytest.raises(ConflictError, match=r"average.*sgd:lr=0\.5,momentum=0\.5,nesterov|sgd:lr=0\.5.*average"):
        train_in_cluster(replace(config, outer="average"), cluster, lambda _: None)


def test_a_worker_with_another_compression_is_refused_with_both_named(start_server: StartServer) -> None:
    cluster = ClusterSpec((start_server(1).address,), num_workers=1, task_index=0)
    config = DigitsConfig(steps=20, interval_steps=20, compression="int8")
    train_in_cluster(config, cluster, lambda _: None)
    with pytest.raises(ConflictError, match=r"compression int8, and this call names int4"):
        train_in_cluster(replace(config, compression="int4"), cluster, lambda _: None)


@pytest.mark.parametrize(
    ("compression", "most"), long_except([("int4", 0.25)], [("bfloat16", 0.6), ("int8", 0.35), ("int4", 0.25)])
)
def test_compression_saves_most_bytes_of_a_run_and_teaches_the_digits(
    compression: str, most: float, start_server: StartServer
) -> None:
    server = start_server(1)
    cluster = ClusterSpec((server.address,), num_workers=1, task_index=0)
    events: list[Event] = []
    train_in_cluster(DigitsConfig(steps=400, interval_steps=20, compression=compression), cluster, events.append)
    with ParameterServerSession(cluster.ps_hosts, worker_id="observer") as observer:
        status = observer.status()
    assert status.compression == compression
    assert status.received_bytes / status.received_raw_bytes < most
    assert status.sent_bytes / status.sent_raw_bytes < most
    accuracy = Record(events).last_accuracy("worker-0")
    assert accuracy is not None
    assert accuracy > 0.95


def test_flags_say_all_of_a_configuration() -> None:
    outer = text_of(OuterAdam(lr=0.5, betas=(0.25, 0.75)))
    config = DigitsConfig(
        steps=60,
        interval_steps=30,
        batch_size=8,
        learning_rate=0.5,
        momentum=0.25,
        seed=7,
        outer=outer,
        compression="int4",
    )
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    assert DigitsConfig.from_flags(parser.parse_args(config.to_argv())) == config
    assert DigitsConfig.from_flags(parser.parse_args([])) == DigitsConfig()


# What it reports


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_event_comes_back_from_its_line(event: Event) -> None:
    line = encode(event)
    assert "\n" not in line
    assert json.loads(encode(decode(line))) == json.loads(line)


@pytest.mark.parametrize("line", ["", "x", "[]", "{}", '{"kind": "walk"}', '{"kind": "step", "loss": 1}'])
def test_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not an event"):
        decode(line)


def test_live_view_shows_every_worker_and_every_server_in_80_columns() -> None:
    out = io.StringIO()
    view = LiveView(Console(file=out, width=80, force_terminal=True, color_system=None, legacy_windows=False))
    servers = {"ps-0": "127.0.0.1:4242", "ps-1": "127.0.0.1:4343"}
    cast = Cast(servers, ("worker-0", "worker-1"), (PLAIN, ALONE, ALONE_WITH_ALL), steps=1200)
    view.show(cast, Record(EVENTS), "2 workers train together")
    view.close()
    picture = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", out.getvalue())
    for shown in ("2 workers train together", "worker-0 (chief)", "40/1200", "0.2500", "1,234", "0.75 s", "worker-1"):
        assert shown in picture
    for shown in (
        "ps-0  ",
        "127.0.0.1:4242",
        "global_step 2",
        "received 3.0 MiB",
        "sent 2.0 MiB",
        "127.0.0.1:4242  waits for worker-1",
        "0.9750",
        "127.0.0.1:4343  idle",
        "global_step 3, received 5.0 MiB, sent 4.0 MiB",
    ):
        assert shown in picture
    assert "…" not in picture


def test_a_live_view_ends_with_a_plot_of_the_losses_and_plain_lines_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    curves, out = curves_of(EVENTS), io.StringIO()
    LiveView(Console(file=out, width=80, force_terminal=True, color_system=None, legacy_windows=False)).plot(curves)
    assert [line.rstrip() for line in out.getvalue().splitlines()] == plotted(curves, 80)
    PlainView().plot(curves)
    assert capsys.readouterr().out == ""


def summary_of(num_workers: int) -> Summary:
    workers = [f"worker-{index}" for index in range(num_workers)]
    return Summary(
        center=Score(0.99444, 0.0148),
        plain=Score(0.99167, 0.0189),
        alone=Score(0.96944, 0.0712),
        all_images=Score(0.98888, 0.0293),
        rounds=60,
        bytes_moved=9 << 20,
        bytes_received=4_820_000,
        bytes_sent=4_820_000,
        bytes_received_raw=19_280_000,
        bytes_sent_raw=9_640_000,
        total_s=121.24,
        cluster_s=110.44,
        alone_s=17.66,
        waited_s=dict.fromkeys(workers, 12.34),
        num_servers=1,
        num_workers=num_workers,
        restarts={"worker-1": 2},
        config=DigitsConfig(),
        files=run_files.ALL,
    )


def drawn(width: int, num_workers: int, num_servers: int) -> tuple[list[str], list[str]]:
    """The live view in a terminal of 24 lines, and the table at the end."""
    workers = tuple(f"worker-{index}" for index in range(num_workers))
    servers = {f"ps-{index}": f"127.0.0.1:4242{index}" for index in range(num_servers)}
    record = Record()
    for worker in (*workers, PLAIN, ALONE, ALONE_WITH_ALL):
        record.add(StepEvent(worker, 1.0, 40_000, 0.25, 12_345.6, 10.75, 2))
        record.add(AccuracyEvent(worker, 1.0, 40, 2, 0.975, 0.125))
    for server in servers:
        record.add(ServerEvent(server, 1.0, "averaging", 20_000, 3 << 30, 2 << 30, workers[-16:], 5))
    pictures = []
    for show_table in (False, True):
        out = io.StringIO()
        console = Console(file=out, width=width, height=24, force_terminal=True, color_system=None)
        view = LiveView(console)
        if show_table:
            view.table("Handwritten digits, test images", summary_of(num_workers).rows())
        else:
            view.show(Cast(servers, workers, (PLAIN, ALONE, ALONE_WITH_ALL), steps=120_000), record, "x" * 100)
        text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", out.getvalue())
        pictures.append([line.rstrip() for line in text.splitlines()])
    return pictures[0], pictures[1]


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(("num_workers", "num_servers"), [(2, 1), (12, 2), (200, 9)])
def test_live_view_and_table_fit_a_small_terminal_whatever_the_cluster(
    width: int, num_workers: int, num_servers: int
) -> None:
    live, table = drawn(width, num_workers, num_servers)
    assert len(live) <= 24
    assert max(map(len, [*live, *table])) <= width
    shown = "\n".join(live)
    for name in ("worker-0 (chief)", "plain ", "alone ", "alone-with-all", "ps-0 ", "test accuracy  center 0.9750"):
        assert name in shown
    assert any(line.startswith("│ and ") for line in live) is (num_workers > 2)
    rows = [line for line in live if line.startswith("│")]
    assert {line[-1] for line in rows} == {"│"}
    if width == 80 and num_workers == 2:  # a line each
        assert len(table) == 3 + len(summary_of(2).rows())


def test_the_table_compares_the_center_with_plain_averages_and_with_lone_workers() -> None:
    config = DigitsConfig()
    assert summary_of(2).rows()[:7] == [
        ("center", "0.9944, loss 0.0148  (2 workers, 1/2 of the images each)"),
        ("plain average", "0.9917, loss 0.0189  (the same without outer steps)"),
        ("alone", "0.9694, loss 0.0712  (1 worker, 1/2 of the images)"),
        ("alone, all images", "0.9889, loss 0.0293  (1 worker, all images)"),
        ("outer optimizer", config.outer),
        ("started again", "worker-1 2"),
        ("rounds", f"60  ({config.steps} steps, a round every {config.interval_steps})"),
    ]
    coded = replace(summary_of(2), config=replace(config, compression="int4"))
    rows = dict(coded.rows())
    assert rows["plain average"].endswith("(the same without outer steps and compression)")
    assert rows["compression"] == "int4"
    assert rows["bytes moved"] == "9.2 MiB  (4.6 MiB to the server, 4.6 MiB back)"
    assert rows["before coding"] == "27.6 MiB  (18.4 MiB to the server, 9.2 MiB back)"
    # The only worker has all images, and its center is a plain average.
    only = replace(summary_of(1), plain=None, all_images=None, restarts={})
    assert [label for label, _ in only.rows()][:4] == ["center", "alone", "outer optimizer", "rounds"]


def test_plain_lines_say_at_growing_gaps_that_something_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 0.0
    monkeypatch.setattr("ps_worker.demo.view.time.monotonic", lambda: now_s)
    view = PlainView()
    cast = Cast({}, ("worker-0",), (ALONE,), steps=80)
    for at_s in (0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0):
        now_s = at_s
        view.show(cast, Record(), "importing torch")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{at_s:5.1f} s  importing torch ..." for at_s in (0, 2, 6)]


def test_a_lone_worker_with_all_images_is_told_from_one_with_its_part() -> None:
    events: list[Event] = []
    train_alone(DigitsConfig(steps=20, interval_steps=20), 2, 0, events.append, all_images=True)
    only: list[Event] = []
    train_alone(DigitsConfig(steps=20, interval_steps=20), 1, 0, only.append)
    assert set(Record(events).steps) == {ALONE_WITH_ALL}
    # One of one worker has all images, too.
    assert [s.loss for s in Record(events).steps[ALONE_WITH_ALL]] == [s.loss for s in Record(only).steps[ALONE]]


# A whole run

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")
DEMO = ("-m", "ps_worker.launch", "--ps", "2", "--runs", "runs")


# Each process of a run spends seconds on its imports. With one worker there are fewer: its part is all images, and with
# the plain average nothing has to be played for comparison.
ALONE_TRAINS = ("1 worker trains", ("--outer", "average"), {"worker-0", ALONE})
TWO_TRAIN = ("2 workers train together", (), {"worker-0", "worker-1", PLAIN, ALONE, ALONE_WITH_ALL})


@needs_proc
@pytest.mark.parametrize(
    ("num_workers", "stage", "flags", "trained"),
    long_except([(1, *ALONE_TRAINS)], [(1, *ALONE_TRAINS), (2, *TWO_TRAIN)]),
)
def test_run_trains_a_good_center_and_leaves_every_file(
    num_workers: int, stage: str, flags: tuple[str, ...], trained: set[str], tmp_path: Path
) -> None:
    command = [*DEMO, "--workers", str(num_workers), "--", "digits", "--steps", "200", "--interval-steps", "20", *flags]
    with Launched(command, cwd=tmp_path) as demo:
        assert demo.ended(timeout_s=240) == 0, demo.printed()
        assert said(demo) == []
        assert demo.descendants() == []
        assert any(line.endswith(f"{stage}: importing torch ...") for line in demo.lines)
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == set(run_files.ALL)
    summary = assert_summary_has_every_number_of_the_table(run, demo.lines)
    assert summary.center.accuracy > 0.9
    assert (summary.rounds, summary.num_servers, summary.num_workers) == (10, 2, num_workers)
    assert summary.bytes_moved == summary.bytes_received + summary.bytes_sent > 0
    assert_center_is_what_the_summary_says(run, summary)
    assert_metrics_have_the_whole_run(run, summary, trained)
    assert (run / run_files.CURVES).read_bytes().startswith(b"\x89PNG")
    written = {path.parent.name for path in (run / run_files.TENSORBOARD).glob("*/events.out.tfevents.*")}
    assert written == {*trained, "ps-0", "ps-1"}


def assert_summary_has_every_number_of_the_table(run: Path, printed: list[str]) -> Summary:
    fields = json.loads((run / run_files.SUMMARY).read_text())
    for field, name in (("center", "center"), ("plain", "plain"), ("alone", "alone"), ("all_images", "all")):
        score = Score(fields.pop(f"{name}_accuracy"), fields.pop(f"{name}_loss"))
        fields[field] = None if score.accuracy is None else score
    summary = Summary(**{**fields, "config": DigitsConfig(**fields["config"]), "files": tuple(fields["files"])})
    table = [line.split("  ", 1) for line in printed[printed.index("") :] if "  " in line]
    shown = {label: value.strip() for label, value in table}
    assert {label: shown[label] for label, _ in summary.rows()} == dict(summary.rows())
    return summary


def assert_center_is_what_the_summary_says(run: Path, summary: Summary) -> None:
    net = DigitsNet()
    net.load_state_dict(load_file(run / run_files.CENTER))
    assert accuracy(net, DigitsData.load().test) == summary.center.accuracy


def assert_metrics_have_the_whole_run(run: Path, summary: Summary, trained: set[str]) -> None:
    record = Record.read(run / run_files.METRICS)
    assert set(record.steps) == trained
    assert {steps[-1].step for steps in record.steps.values()} == {200}
    scores = {"worker-0": summary.center, PLAIN: summary.plain, ALONE: summary.alone}
    scores[ALONE_WITH_ALL] = summary.all_images
    for name, score in scores.items():
        assert (record.last_score(name) if name in trained else None) == score
    workers = [f"worker-{index}" for index in range(summary.num_workers)]
    assert [len(record.rounds[worker]) for worker in workers] == [10] * summary.num_workers
    servers = record.last_of_servers()
    assert [server.global_step for server in servers] == [10, 10]
    # Both have a part of the model, and together they have moved the bytes of the summary.
    assert all(server.received_bytes > 0 for server in servers)
    assert sum(server.received_bytes for server in servers) == summary.bytes_received
    assert sum(server.sent_bytes for server in servers) == summary.bytes_sent
    moved_bytes = [record.steps[worker][-1].moved_bytes for worker in workers]
    assert sum(moved_bytes) == summary.bytes_moved
    assert record.steps[ALONE][-1].moved_bytes == 0


@needs_proc
def test_ctrl_c_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    with Launched([*DEMO, "--workers", "2", "--", "digits"], cwd=tmp_path) as demo:
        demo.wait_for("2 parameter servers start")
        demo.process.send_signal(signal.SIGINT)
        assert demo.ended(timeout_s=5) == 130
        assert said(demo) == ["ma-launch: ended by SIGINT, and every process with it"]
        assert demo.descendants() == []
    assert list((tmp_path / "runs").iterdir()) == []
