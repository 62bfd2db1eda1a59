"""What Prometheus reads: names, types and units, and the same values as in the status."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path

import numpy as np
import pytest

from modelaverage.errors import Reason
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.edge import metrics
from ps_server.seen.observations import PHASES, Histogram
from ps_server.seen.sample import MetricsSample
from tests.conftest import RunningServer, StartServer
from tests.jobs import CENTER, COUNT, STEP, Job, of
from tests.raw_client import RawClient, until
from tests.scraped import OURS, scrape

METRICS_BIND = "127.0.0.1:0"
MODEL_BYTES = sum(array.nbytes for array in CENTER.values())


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path) -> RunningServer:
    return start_server(2, metrics_bind=METRICS_BIND, checkpoints=CheckpointPolicy(tmp_path))


def a_round(job: Job, step: int, **fields: float) -> None:
    one = job.push("a", of(1), push_id=step, base_step=step, **fields)
    job.given("a", COUNT)
    other = job.push("b", of(2), push_id=step, base_step=step)
    one.answer()
    other.answer()


def test_names_types_and_units_are_those_of_prometheus_conventions(server: RunningServer) -> None:
    with RawClient(server.address) as client:
        a_round(Job(client, server.address), STEP)
    found = scrape(server.metrics_address)
    ours = {name: family for name, family in found.families.items() if name.startswith(OURS)}
    assert len(ours) > 25
    for name, family in ours.items():
        assert re.fullmatch(r"modelaverage(_[a-z]+)+", name)
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram", "summary")
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_s"))
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
        if family.type == "histogram":
            assert name.endswith("_seconds")
    assert {"process_resident_memory_bytes", "process_start_time_seconds"} <= found.names


def test_values_are_those_of_the_status(server: RunningServer) -> None:
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        for step in range(STEP, STEP + 3):
            a_round(job, step, loss=0.5)
        until(lambda: client.status().checkpoint_step == STEP + 3, "the checkpoint is written")
        job.push("a", of(3), push_id=99, base_step=STEP + 3, loss=0.5)
        job.given("a", COUNT)
        status = client.status()
        found = scrape(server.metrics_address)
    assert {phase for phase in found.labels("phase", "phase") if found.value("phase", phase=phase)} == {"averaging"}
    for name in ("global_step", "num_workers", "min_workers", "connected_workers", "model_size_bytes"):
        assert found[name] == getattr(status, name), name
    for name in (
        "received_bytes",
        "sent_bytes",
        "received_raw_bytes",
        "sent_raw_bytes",
        "rounds_restarted",
        "stale_pushes",
    ):
        assert found[f"{name}_total"] == getattr(status, name), name
    assert found["rounds_total"] == status.rounds_committed == 3
    assert found["retried_pushes_total"] == status.pushes_retried == 0
    assert found["shared_memory_bytes_total"] == status.shared_bytes
    assert found["checkpoint_global_step"] == status.checkpoint_step == STEP + 3
    assert found["missing_workers"] == 1
    assert 0 < status.round_age_s < found["round_age_seconds"]
    assert 0 < status.checkpoint_age_s < found["checkpoint_age_seconds"]
    assert found["received_fragments_total"] == 7 * COUNT
    assert found["sent_fragments_total"] == 6 * COUNT
    assert found["checkpoint_seconds_count"] == 4  # including that of the initial center
    workers = {worker.worker_id: worker for worker in status.workers}
    assert found.value("worker_loss", worker="a") == workers["a"].loss == 0.5
    assert found.labels("worker_loss", "worker") == {"a"}


def test_a_round_has_a_time_in_every_phase_and_lateness_for_every_worker(server: RunningServer) -> None:
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        a_round(job, STEP)
        until(lambda: sending_count(server) == 1, "the answers have ended")
        found = scrape(server.metrics_address)
        late_s = client.worker("b").lateness_s
    assert found["round_seconds_count"] == 1
    for phase in PHASES:
        assert found.value("round_phase_seconds_count", phase=phase) == 1
        assert found.value("round_phase_seconds_sum", phase=phase) > 0
    spent_s = [found.value("round_phase_seconds_sum", phase=phase) for phase in PHASES if phase != "sending"]
    assert sum(spent_s) == pytest.approx(found["round_seconds_sum"])
    assert found.value("barrier_lateness_seconds_count", worker="a") == 1
    assert found.value("barrier_lateness_seconds_sum", worker="a") == 0
    assert found.value("barrier_lateness_seconds_sum", worker="b") == pytest.approx(late_s)
    assert 0 < late_s < found["round_seconds_sum"]


def sending_count(server: RunningServer) -> float:
    return scrape(server.metrics_address).value("round_phase_seconds_count", phase="sending")


def test_stale_pushes_retries_refusals_restarts_and_nonfinite_values_are_counted(server: RunningServer) -> None:
    bad = of(1)
    bad["w"][20:22] = np.nan  # in the second fragment
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        job.push("b", of(1), base_step=0).answer()
        job.break_off("a", of(1), 1)
        job.push("a", bad)  # the same push again: what it still lacks
        job.given("a", COUNT)
        job.push("b", of(2), push_id=5).answer()
        client.open_push().send(job.header("x" * 200))
        until(lambda: refusals(server)["WORKER_ID_INVALID"] == 1, "the call is refused")
        found = scrape(server.metrics_address)
    assert found["stale_pushes_total"] == 1
    assert found["retried_pushes_total"] == 1
    assert found["rounds_restarted_total"] == 0
    assert found.value("nonfinite_values_total", worker="a") == 2
    assert found.value("nonfinite_values_total", worker="b") == 0


def refusals(server: RunningServer) -> dict[str, float]:
    found = scrape(server.metrics_address)
    return {reason.name: found.value("refused_calls_total", reason=reason.name) for reason in Reason}


def test_a_worker_that_was_never_counted_makes_no_series(server: RunningServer) -> None:
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        for number in range(20):
            job.push(f"stranger-{number}", of(1), base_step=0).answer()
        a_round(job, STEP)
        assert len(client.status().workers) == 23
    found = scrape(server.metrics_address)
    for name in found.families:
        if "worker" in {label for sample in found.families[name].samples for label in sample.labels}:
            assert {sample.labels["worker"] for sample in found.families[name].samples} <= {"a", "b"}
    assert found.labels("worker_local_step", "worker") == {"a", "b"}


def test_of_very_many_counted_workers_the_last_heard_of_are_shown(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_MAX_WORKERS_SHOWN", 2)
    server = start_server(1, metrics_bind=METRICS_BIND)
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        for number in range(4):
            job.push(f"w{number}", of(1), base_step=STEP + number).answer()
    found = scrape(server.metrics_address)
    assert found.labels("worker_local_step", "worker") == {"w2", "w3"}
    assert found["rounds_total"] == 4


def test_a_worker_id_with_quotes_and_newlines_is_one_label_value(start_server: StartServer) -> None:
    server, name = start_server(1, metrics_bind=METRICS_BIND), 'a"} 1\nmodelaverage_rounds_total 99\\'
    with RawClient(server.address) as client:
        Job(client, server.address).push(name, of(1)).answer()
    found = scrape(server.metrics_address)
    assert found["rounds_total"] == 1
    assert found.labels("worker_local_step", "worker") == {name}


def test_a_server_without_a_center_serves_metrics(server: RunningServer) -> None:
    found = scrape(server.metrics_address)
    assert found.value("phase", phase="uninitialized") == 1
    assert (found["global_step"], found["rounds_total"], found["round_seconds_count"]) == (0, 0, 0)
    assert f"{OURS}checkpoint_age_seconds" not in found.names


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((0.5, 1.0))
    for duration_s in (0.1, 0.7, 0.8, 3.0):
        histogram.observe(duration_s)
    family = metrics._histogram("x_seconds", "Of x.", [({}, histogram)])
    by_bound = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert by_bound == {"0.5": 1, "1.0": 3, "+Inf": 4}


def test_a_loss_that_is_no_number_is_shown_as_such(start_server: StartServer) -> None:
    server = start_server(1, metrics_bind=METRICS_BIND)
    with RawClient(server.address) as client:
        Job(client, server.address).push("a", of(1), loss=math.nan).answer()
        assert math.isnan(client.worker("a").loss)
    assert math.isnan(scrape(server.metrics_address).value("worker_loss", worker="a"))


def test_a_scrape_does_not_change_what_the_next_one_shows(server: RunningServer) -> None:
    first, second = (scrape(server.metrics_address) for _ in range(2))
    assert first.names == second.names
    assert first["rounds_total"] == second["rounds_total"] == 0


def test_the_phases_are_those_of_the_protocol(server: RunningServer) -> None:
    names = {name.removeprefix("PHASE_").lower() for name, _ in pb.Phase.items()} - {"unspecified"}
    assert scrape(server.metrics_address).labels("phase", "phase") == names


def test_a_server_that_is_too_busy_or_has_ended_leaves_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample() -> MetricsSample:
        raise AssertionError("nobody runs the loop")

    monkeypatch.setattr(metrics, "_SAMPLE_TIMEOUT_S", 0.01)
    loop = asyncio.new_event_loop()
    collector = metrics._Collector(sample, loop)
    assert list(collector.collect()) == []
    loop.close()
    assert list(collector.collect()) == []
