"""A job with a codec whose servers end and come back, some with an older center: no coded push is ever decoded with
another center than its own, and all go on with the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ma_client import ConflictError, Outcome, OuterSGD, PushResult
from modelaverage.codecs import CODECS, RAW
from modelaverage.manifest import Manifest, Variable
from ps_server.checkpoints.fields import boot_id, fields_of
from ps_server.checkpoints.reading import CheckpointError
from ps_server.flow import job as server_job
from ps_server.rules.policy import RoundPolicy
from tests.checkpoints import checkpoint_of, content, read, small, write_file, write_fresh
from tests.compressed import DATA, MESSAGES, MODEL, SHARED, CompressedJob, Seen, bits, seen_by
from tests.optimizer.workers import Running, together
from tests.raw_client import until
from tests.shard_faults import FaultyJob, FaultyShard, Watchful, answer_but_the_silent

LOSSY = [codec for codec in CODECS.values() if codec is not RAW]
STRICT = RoundPolicy.strict(2)
ANY = RoundPolicy(num_workers=2, min_workers=1, max_workers=3, grace_s=0.0)
DILOCO = OuterSGD(0.7, 0.9, nesterov=True)
MakeShards = Callable[..., list[FaultyShard]]


@pytest.fixture
def make_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeShards]:
    monkeypatch.setattr(server_job, "tell", answer_but_the_silent)
    with contextlib.ExitStack() as jobs:

        def make(count: int = 1, policy: RoundPolicy = STRICT, every: int = 1, name: str = "a") -> list[FaultyShard]:
            (tmp_path / name).mkdir()
            job = FaultyJob(tmp_path / name, count, policy, [every] * count, shared=True)
            return jobs.enter_context(job).shards

        yield make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    with seen_by(monkeypatch) as seen:
        yield seen


def job_on(shards: list[FaultyShard], codec: str = "int8") -> CompressedJob:
    return CompressedJob([shard.address for shard in shards], codec, session_class=Watchful)


def restart(shard: FaultyShard, at_most: int | None = None) -> None:
    shard.stop()
    shard.start(at_most)


# Nothing is lost.


@pytest.mark.parametrize("codec", [codec.name for codec in LOSSY])
@pytest.mark.parametrize("servers", [1, 2])
def test_servers_that_come_back_with_the_newest_center_go_on_coded_and_bit_for_bit(
    codec: str, servers: int, make_shards: MakeShards, seen: Seen
) -> None:
    results = list[dict[str, bytes]]()
    for ends in (False, True):
        shards = make_shards(servers, name=str(ends))
        with job_on(shards, codec) as job:
            for worker in range(2):
                job.join(worker, outer=DILOCO)
            for step in range(5):
                if ends and step in (1, 3, 4):
                    restart(shards[step % servers])
                job.round(step)
            results.append(job.check())
        pushes = seen.take()
        assert {codec for _, codec in pushes} <= {codec, f"{codec}!"}
        assert sum(count for (_, how), count in pushes.items() if how == codec) == 5 * 2 * servers
    assert results[0] == results[1]


# Rounds are lost.


@pytest.mark.parametrize("lost", [1, 2])
def test_if_all_are_ahead_of_the_server_they_come_back_raw_once(lost: int, make_shards: MakeShards, seen: Seen) -> None:
    (shard,) = shards = make_shards()
    with job_on(shards) as job:
        for worker in range(2):
            job.join(worker, outer=DILOCO)
        for step in range(3):
            job.round(step)
        restart(shard, at_most=3 - lost)
        seen.take()
        results = job.round(3)
        assert {result.global_step for result in results} == {4}
        pushes = seen.take()
        assert {worker: how for worker, how in pushes if not how.endswith("!")} == {
            "worker-0": "raw",
            "worker-1": "raw",
        }
        job.round(4)
        assert seen.take() == {("worker-0", "int8"): 1, ("worker-1", "int8"): 1}


@pytest.mark.parametrize("servers", [2, 3])
@pytest.mark.parametrize("lost", [1, 2])
def test_servers_that_fell_behind_get_their_centers_back_bit_for_bit(
    servers: int, lost: int, make_shards: MakeShards, seen: Seen
) -> None:
    shards = make_shards(servers)
    with job_on(shards, "int4") as job:
        for worker in range(2):
            job.join(worker)
        for step in range(3):
            job.round(step)
        before = job.check()
        restart(shards[0], at_most=3 - lost)
        pulled = list[dict[str, bytes]]()

        def pull_and_push() -> PushResult:
            job.pull(1)
            pulled.append(bits(job.centers[1]))
            return job.push(1, 3)

        together(lambda: job.push(0, 3), pull_and_push)
        assert pulled == [before]
        job.check()
        seen.take()
        job.round(4)
        assert {how for _, how in seen.take()} == {"int4"}


def test_a_center_of_the_same_step_in_another_timeline_is_not_the_base(make_shards: MakeShards, seen: Seen) -> None:
    (shard,) = shards = make_shards(policy=ANY)
    with job_on(shards) as job:
        job.join(0)
        job.join(1)
        for step in range(2):
            job.push(0, step)
        old = bits(job.centers[0])
        restart(shard, at_most=1)
        job.pull(1)
        assert job.push(1, 7).global_step == 2  # round 2 again, with other values
        assert bits(job.centers[1]) != old
        seen.take()
        result = job.push(0, 8)  # from the old center 2
        assert (result.outcome, result.global_step) == (Outcome.COMMITTED, 3)
        assert seen.take() == {("worker-0", "int8!"): 1, ("worker-0", "raw"): 1}
        job.pull(1)
        job.check()
        assert job.push(0, 9).outcome is Outcome.COMMITTED
        assert seen.take() == {("worker-0", "int8"): 1}


def test_if_all_abstain_on_a_server_that_fell_behind_nothing_hangs(make_shards: MakeShards, seen: Seen) -> None:
    """Both pull before anybody could restore the lost center: they bring the server to the others' step."""
    shards = make_shards(2)
    with job_on(shards, "int4") as job:
        for worker in range(2):
            job.join(worker)
        for step in range(3):
            job.round(step)
        restart(shards[0], at_most=2)
        together(*(lambda worker=worker: job.pull(worker) for worker in range(2)))
        job.check()
        job.round(3)
        seen.take()
        job.round(4)
        assert {how for _, how in seen.take()} == {"int4"}


def test_a_server_that_ends_within_a_round_and_loses_one_gets_the_push_again_raw(
    make_shards: MakeShards, seen: Seen
) -> None:
    (shard,) = shards = make_shards()
    with job_on(shards) as job:
        for worker in range(2):
            job.join(worker)
        for step in range(2):
            job.round(step)
        pushing = Running(lambda: job.push(0, 2))
        until(lambda: "worker-0" in shard.whole, "the push is whole")
        restart(shard, at_most=1)
        seen.take()
        job.push(1, 2)
        assert pushing.result().global_step == 3
        job.check()
        assert {how for _, how in seen.take()} >= {"int8!", "raw"}
        job.round(3)
        assert seen.take() == {("worker-0", "int8"): 1, ("worker-1", "int8"): 1}


@pytest.mark.parametrize(
    ("seed", "rounds"), [(0, 12), (1, 12), *(pytest.param(seed, 60, marks=pytest.mark.long) for seed in range(2, 12))]
)
def test_whatever_servers_lose_all_hold_the_same_bits(seed: int, rounds: int, make_shards: MakeShards) -> None:
    """Between rounds servers end, and come back with their newest center or an older one; workers pull, or do not, and
    use all transports."""
    chance = random.Random(seed)
    shards = make_shards(chance.choice([1, 2, 3]), every=chance.choice([1, 1, 3]))
    with job_on(shards, chance.choice(LOSSY).name) as job:
        for worker in range(2):
            job.join(worker, outer=DILOCO, **chance.choice([MESSAGES, SHARED, DATA]))
        for step in range(rounds):
            for shard in shards:
                if chance.random() < 0.3:
                    kept = [each for each in shard.kept if each <= max(shard.kept) - chance.choice([0, 0, 1, 2])]
                    restart(shard, max(kept, default=None))
            if chance.random() < 0.3:
                together(*(lambda worker=worker: job.pull(worker) for worker in range(2)))
            job.round(step)


# Checkpoints.


CODED = Manifest((Variable("w", "float32", (2000,)), Variable("h", "float16", (30,))), 1024)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("center_id", [1, 2**64 - 1])
def test_a_checkpoint_keeps_the_codec_and_the_id(codec: object, center_id: int, tmp_path: Path) -> None:
    written = checkpoint_of(CODED, counted={}, codec=codec, center_id=center_id)
    found = read(write_fresh(tmp_path, written))
    assert (found.codec, found.center_id) == (codec, center_id)
    assert content(found) == content(written)


def test_a_checkpoint_of_a_job_without_a_codec_says_nothing_of_codecs(tmp_path: Path) -> None:
    """It is what earlier versions wrote, and read."""
    fields = fields_of(small(), boot_id())
    assert not {"compression", "center_id"} & fields.keys()
    found = read(write_file(write_fresh(tmp_path, small()), small().tensors, fields))
    assert (found.codec, found.center_id) == (RAW, 0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"compression": None}, "compression or center_id, but not both"),
        ({"center_id": None}, "compression or center_id, but not both"),
        ({"compression": "raw"}, "no server writes the compression raw"),
        ({"compression": ""}, "its compression '' is not known here"),
        ({"compression": "zip"}, "its compression 'zip' is not known here, only 'raw', 'bfloat16', 'int8', 'int4'"),
        ({"compression": "\n" * 1000}, "is not known here"),
        ({"center_id": "-1"}, "center_id"),
        ({"center_id": str(2**64)}, "center_id"),
        ({"center_id": "1.0"}, "center_id"),
        ({"center_id": " 1"}, "center_id"),
        ({"center_id": "01"}, "center_id"),
        ({"center_id": "1" * 100_000}, "center_id"),
        ({"center_id": "ten"}, "center_id"),
        ({"center_id": ""}, "center_id"),
    ],
)
def test_a_hostile_codec_or_id_is_refused_with_a_reason(
    fields: dict[str, str | None], reason: str, tmp_path: Path
) -> None:
    right = dataclasses.replace(small(), codec=CODECS["int8"], center_id=5)
    about = {n: v for n, v in {**fields_of(right, boot_id()), **fields}.items() if v is not None}
    path = write_file(write_fresh(tmp_path, right), right.tensors, about)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_a_checkpoint_without_a_known_id_gives_a_center_that_no_push_is_relative_to(
    tmp_path: Path, make_shards: MakeShards, seen: Seen
) -> None:
    (shard,) = shards = make_shards(policy=ANY)
    with job_on(shards) as job:
        job.join(0)
        job.push(0, 0)
        shard.stop()
        newest = max(tmp_path.glob("a/0/center-*.safetensors"), key=lambda path: path.name.split(".")[0])
        found = read(newest)
        for path in tmp_path.glob("a/0/center-*.safetensors"):
            path.unlink()
        write_fresh(newest.parent, dataclasses.replace(found, center_id=0))
        shard.start()
        seen.take()
        job.push(0, 1)
        job.check()
        job.push(0, 2)
        assert seen.take() == {("worker-0", "int8!"): 1, ("worker-0", "raw"): 1, ("worker-0", "int8"): 1}


def test_the_choice_outlives_the_server(make_shards: MakeShards) -> None:
    (shard,) = shards = make_shards(policy=ANY)
    with job_on(shards, "int4") as job:
        job.join(0)
        job.push(0)
        restart(shard)
        job.pull(0)
        assert job.workers[0].compression == shard.status.compression == "int4"
        with pytest.raises(ConflictError, match="has the compression int4"):
            job.workers[0].pull(compression="int8")
        assert np.isfinite(MODEL["w"]).all()
