"""Rounds of a job with a codec: whatever the transports, all workers and servers hold the same bits after each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from ma_client import ConflictError, Outcome, OuterAdam, OuterSGD, ParameterServerSession
from ma_client.transports.lent_memory import Loan
from ma_client.transports.push import ClientPush
from ma_client.transports.staging import Staging
from modelaverage import wire
from modelaverage.codecs import CODECS, RAW
from modelaverage.errors import Reason, RetryPushError
from modelaverage.manifest import Manifest
from modelaverage.outer import AVERAGE
from modelaverage.placement import PLACEMENTS
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import RoundPolicy
from tests.compressed import DATA, MESSAGES, MODEL, SHARED, CompressedJob, Seen, bits, local, seen_by
from tests.conftest import StartServer
from tests.optimizer.workers import Running, together
from tests.raw_client import RawClient, flat_bytes, fragments_of, until

pytestmark = pytest.mark.in_memory

LOSSY = [name for name in CODECS if name != RAW.name]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    with seen_by(monkeypatch) as seen:
        yield seen


def started(start_server: StartServer, policy: int | RoundPolicy, servers: int = 1, **options: Any) -> list[str]:
    return [start_server(policy, **options).address for _ in range(servers)]


# Transports, placements, outer optimizers.


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("ways", [(MESSAGES, MESSAGES), (MESSAGES, SHARED, SHARED), (SHARED, SHARED)])
def test_all_hold_the_same_bits_whatever_the_transports(
    codec: str, ways: tuple[dict[str, Any], ...], start_server: StartServer
) -> None:
    with CompressedJob(started(start_server, len(ways), shared=SHARED in ways), codec) as job:
        for worker, way in enumerate(ways):
            job.join(worker, **way)
        for step in range(4):
            assert {result.outcome for result in job.round(step)} == {Outcome.COMMITTED}


@pytest.mark.in_memory(False)
@pytest.mark.parametrize("codec", LOSSY)
def test_all_hold_the_same_bits_with_data_connections_too(codec: str, start_server: StartServer) -> None:
    with CompressedJob(started(start_server, 3, shared=True), codec) as job:
        for worker, way in enumerate((DATA, MESSAGES, SHARED)):
            job.join(worker, **way)
        for step in range(4):
            job.round(step)
        used = {each.worker_id: each.transport for each in job.workers[0].status().workers}
        assert used["worker-0"] == pb.TRANSPORT_DATA_CONNECTION
        assert used["worker-2"] == pb.TRANSPORT_SHARED_MEMORY


@pytest.mark.parametrize("outer", [AVERAGE, OuterSGD(0.7, 0.9, nesterov=True), OuterAdam(0.1)])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("servers", [2, 3])
def test_all_hold_the_same_bits_with_several_servers(
    servers: int, placement: str, outer: Any, start_server: StartServer, seen: Seen
) -> None:
    with CompressedJob(started(start_server, 2, servers), "int4", placement=placement) as job:
        for worker in range(2):
            job.join(worker, outer=outer)
        for step in range(3):
            job.round(step)
        assert set(seen.take()) == {("worker-0", "int4"), ("worker-1", "int4")}


def test_a_center_that_is_not_copied_is_the_same(start_server: StartServer, seen: Seen) -> None:
    with CompressedJob(started(start_server, 2)) as job:
        for worker in range(2):
            job.join(worker)
        for step in range(4):
            job.round(step, copy=False)
        assert seen.take() == {("worker-0", "int8"): 4, ("worker-1", "int8"): 4}


# Who pushes raw, and how often.


def test_a_worker_that_never_pulled_pushes_raw_once_and_then_coded(start_server: StartServer, seen: Seen) -> None:
    with CompressedJob(started(start_server, 2)) as job:
        job.join(0, pulls=False)
        job.centers[0] = MODEL
        job.join(1)
        for step in range(3):
            job.round(step)
        assert seen.take() == {("worker-0", "raw"): 1, ("worker-0", "int8"): 2, ("worker-1", "int8"): 3}
        status = job.workers[0].status()
        size_bytes = len(flat_bytes(MODEL))
        assert status.received_raw_bytes - status.received_bytes > 0.6 * 5 * size_bytes
        assert status.sent_raw_bytes - status.sent_bytes > 0.6 * 5 * size_bytes


def test_a_worker_in_shared_memory_pushes_in_no_codec(start_server: StartServer, seen: Seen) -> None:
    with CompressedJob(started(start_server, 2, shared=True)) as job:
        job.join(0, **SHARED)
        job.join(1)
        for step in range(3):
            job.round(step)
        # After its pull it offers a coded push; the server takes it in shared memory.
        assert seen.take() == {("worker-0", "int8"): 1, ("worker-0", "raw"): 2, ("worker-1", "int8"): 3}


def test_a_worker_that_abstains_gets_the_coded_center(start_server: StartServer, seen: Seen) -> None:
    with CompressedJob(started(start_server, 2)) as job:
        for worker in range(2):
            job.join(worker)
        for step in range(3):
            results = job.round(step, {1: 0.0})
            assert {result.contributors for result in results} == {("worker-0",)}
        assert seen.take() == {("worker-0", "int8"): 3, ("worker-1", "int8"): 3}


def test_if_all_abstain_the_center_stays_and_the_next_round_is_coded(start_server: StartServer, seen: Seen) -> None:
    with CompressedJob(started(start_server, 2)) as job:
        for worker in range(2):
            job.join(worker)
        before = job.check()
        results = job.round(0, {0: 0.0, 1: 0.0})
        assert {result.global_step for result in results} == {1}
        assert job.check() == before
        seen.take()
        job.round(1)
        assert seen.take() == {("worker-0", "int8"): 1, ("worker-1", "int8"): 1}


@pytest.mark.in_memory(False)
def test_a_coded_push_that_is_itself_the_last_to_abstain_is_told_so(start_server: StartServer, seen: Seen) -> None:
    """Its header ends the round, before the server has sent it anything."""
    with CompressedJob(started(start_server, 2)) as job:
        for worker in range(2):
            job.join(worker)
        for step in range(5):
            job.round(step, {0: 0.0, 1: 0.0})
        pushes = seen.take()
        assert {how for _, how in pushes} == {"int8!", "raw"}
        assert sum(pushes.values()) == 20


def test_a_worker_that_pulls_in_between_goes_on_coded(start_server: StartServer, seen: Seen) -> None:
    with CompressedJob(started(start_server, 2)) as job:
        for worker in range(2):
            job.join(worker)
        for step in range(4):
            job.pull(step % 2)
            job.round(step)
        assert seen.take() == {("worker-0", "int8"): 4, ("worker-1", "int8"): 4}


def test_a_newcomer_and_a_stale_worker_get_the_same_bits_and_go_on_coded(start_server: StartServer, seen: Seen) -> None:
    policy = RoundPolicy(num_workers=3, min_workers=1, max_workers=4, grace_s=0.0)
    with CompressedJob(started(start_server, policy)) as job:
        for worker in range(2):
            job.join(worker)
        job.push(0, 0)
        job.push(0, 1)
        assert job.push(1, 0).outcome is Outcome.STALE  # from a coded push
        job.check()
        job.join(2)
        job.push(2, 2)
        assert job.push(0, 3).outcome is Outcome.STALE
        assert job.push(1, 3).outcome is Outcome.STALE
        job.check()
        for worker in range(3):
            job.pull(worker)
        assert {codec for _, codec in seen.take()} == {"int8"}
        assert job.push(1, 4).outcome is Outcome.COMMITTED


def test_after_a_stale_push_the_base_is_the_center_that_came(start_server: StartServer, seen: Seen) -> None:
    policy = RoundPolicy(num_workers=2, min_workers=1, max_workers=2, grace_s=0.0)
    with CompressedJob(started(start_server, policy)) as job:
        job.join(0)
        job.join(1)
        for step in range(3):
            job.push(0, step)
            assert job.push(1, step).outcome is Outcome.STALE
            assert job.push(1, step).outcome is Outcome.COMMITTED
            assert job.push(0, step).outcome is Outcome.STALE
            job.check()
        assert {codec for _, codec in seen.take()} == {"int8"}


# Pushes that fail.


@pytest.mark.parametrize("after", ["admission", "some fragments", "all fragments"])
def test_a_push_whose_answer_breaks_off_is_made_again_in_the_codec(
    after: str, start_server: StartServer, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part of the new center that came has replaced the base: it is restored."""
    with CompressedJob(started(start_server, 2)) as job:
        for worker in range(2):
            job.join(worker)
        job.round(0)
        seen.take()
        broken = list[str]()

        def breaking(moment: str, original: Any) -> Any:
            def call(*arguments: Any) -> Any:
                result = original(*arguments)
                if moment == after and not broken:
                    broken.append(moment)
                    raise RetryPushError("broken off")
                return result

            return call

        monkeypatch.setattr(ClientPush, "admitted", breaking("admission", ClientPush.admitted))
        monkeypatch.setattr(Staging, "put", breaking("some fragments", Staging.put))
        monkeypatch.setattr(ClientPush, "told", breaking("all fragments", ClientPush.told))
        job.round(1)
        assert len(broken) == 1
        job.round(2)
        pushes = seen.take()
        assert {codec for _, codec in pushes} == {"int8", "int8!"}
        assert sum(count for (_, codec), count in pushes.items() if codec == "int8!") == 1


def test_a_push_that_fails_for_good_leaves_the_base_and_the_next_one_is_coded(
    start_server: StartServer, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = RoundPolicy(num_workers=1, min_workers=1, max_workers=1)
    with CompressedJob(started(start_server, policy)) as job:
        job.join(0)
        job.push(0, 0)
        held = bits(job.centers[0])

        def told(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ClientPush, "told", told)
            with pytest.raises(KeyboardInterrupt):
                job.push(0, 1, copy=False)
        assert job.workers[0].unchanged(job.centers[0]) == MODEL.keys()
        assert bits(job.centers[0]) == held
        seen.take()
        assert job.push(0, 2).outcome is Outcome.STALE
        job.check()
        assert job.push(0, 3).outcome is Outcome.COMMITTED
        job.check()
        assert seen.take() == {("worker-0", "int8"): 2}


# Clients that speak the protocol by hand.


class Foreign:
    """A client of its own that pushes raw, or coded from a center that it holds.

    Args:
        address: of the server, which has a center.
        worker_id: its name.
        codec: of its pushes.
    """

    def __init__(self, address: str, worker_id: str, codec: str) -> None:
        self._client, self._worker_id = RawClient(address), worker_id
        header, flat = self._client.pull()
        self.codec = CODECS[codec]
        self.manifest: Manifest = wire.manifest_from_message(header.manifest)
        self._id, self._step, self.center_id, self._number = header.manifest_id, header.global_step, header.center_id, 0
        self.flat = np.frombuffer(bytearray(flat), np.uint8)

    def __enter__(self) -> Foreign:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.__exit__(None, None, None)

    def fragments(self, values: Any) -> list[bytes]:
        flat = np.frombuffer(flat_bytes(values), np.uint8)
        count = self.manifest.fragment_count
        if self.codec is RAW:
            return fragments_of(values, self.manifest.fragment_size_bytes)
        arrays = [
            self.codec.encode(
                self.manifest, i, self.manifest.piece_arrays(i, flat), self.manifest.piece_arrays(i, self.flat)
            )
            for i in range(count)
        ]
        return [b"".join(parts) for parts in arrays]

    def open(self, values: Any, **fields: Any) -> Any:
        """Sends a whole push, and does not read the answer."""
        self._number += 1
        stream = self._client.open_push()
        header = pb.PushHeader(
            worker_id=self._worker_id,
            manifest_id=self._id,
            base_step=self._step,
            push_id=self._number,
            incarnation=b"0123456789abcdef",
            codec=self.codec.name,
            base_center_id=0 if self.codec is RAW else self.center_id,
        )
        for name, value in fields.items():
            setattr(header, name, value)
        stream.send(pb.PushAndAverageRequest(header=header))
        if not header.half_duplex:
            stream.admission()
        stream.give(self.fragments(values) if header.codec else fragments_of(values, self.manifest.fragment_size_bytes))
        stream.half_close()
        return stream

    def push(self, values: Any, **fields: Any) -> pb.PushOutcome:
        stream = self.open(values, **fields)
        if fields.get("half_duplex"):
            stream.admission()
        answer: tuple[pb.PushOutcome, bytes] = stream.answer()
        outcome, data = answer
        flat, at = self.flat.copy(), 0
        for index in range(self.manifest.fragment_count):
            size_bytes = self.codec.size_bytes(self.manifest, index)
            part = memoryview(data[at : at + size_bytes])
            self.codec.decode_into(self.manifest, flat, index, part, self.flat)
            at += size_bytes
        assert at == len(data)
        self.flat, self._step, self.center_id = flat, outcome.global_step, outcome.center_id
        return outcome


def manifest_bits(manifest: Manifest, flat: Any) -> dict[str, bytes]:
    return bits(manifest.arrays(flat))


@pytest.mark.in_memory(False)
@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("half_duplex", [False, True])
def test_a_foreign_client_gets_the_same_bits(codec: str, half_duplex: bool, start_server: StartServer) -> None:
    with CompressedJob(started(start_server, 2)) as job:
        job.join(0)
        with Foreign(job.addresses[0], "foreign", codec) as foreign:
            for step in range(3):
                values = local(MODEL, 7, step)
                pushing = Running(lambda: job.push(0, step))  # noqa: B023
                assert foreign.push(values, half_duplex=half_duplex).outcome == pb.OUTCOME_COMMITTED
                pushing.result()
                assert manifest_bits(foreign.manifest, foreign.flat) == job.check()


@pytest.mark.in_memory(False)
@pytest.mark.parametrize("codec", ["int8", ""])
def test_a_push_may_name_the_codec_raw(codec: str, start_server: StartServer) -> None:
    """In a job with a codec and in one without."""
    with CompressedJob(started(start_server, 1), codec or "none") as job:
        job.join(0)
        with Foreign(job.addresses[0], "foreign", "raw") as foreign:
            assert foreign.push(local(MODEL, 7, 0), codec="raw").outcome == pb.OUTCOME_COMMITTED


@pytest.mark.in_memory(False)
@pytest.mark.parametrize("wrong", [0, 5])
@pytest.mark.parametrize("half_duplex", [False, True])
def test_a_push_from_a_center_that_the_server_does_not_have_is_refused_and_changes_nothing(
    wrong: int, half_duplex: bool, start_server: StartServer
) -> None:
    with CompressedJob(started(start_server, 1)) as job:
        job.join(0)
        before = job.check()
        with Foreign(job.addresses[0], "foreign", "int8") as foreign:
            stream = foreign._client.open_push()
            stream.send(
                pb.PushAndAverageRequest(
                    header=pb.PushHeader(
                        worker_id="foreign",
                        manifest_id=foreign._id,
                        incarnation=b"0123456789abcdef",
                        push_id=1,
                        codec="int8",
                        base_center_id=wrong,
                        half_duplex=half_duplex,
                    )
                )
            )
            refusal = stream.refusal()
            assert (refusal.code.name, refusal.reason) == ("FAILED_PRECONDITION", "BASE_UNKNOWN")
            assert "'foreign' pushes in codec int8" in refusal.message
            assert "push again raw" in refusal.message
            assert job.check() == before
            assert foreign.push(local(MODEL, 7, 0)).outcome == pb.OUTCOME_COMMITTED


# Rounds that restore a center.


@pytest.mark.in_memory(False)
@pytest.mark.parametrize("half_duplex", [False, True])
@pytest.mark.parametrize("first", ["restores", "contributes"])
def test_a_coded_push_of_a_round_that_restores_is_refused_and_comes_again_raw(
    half_duplex: bool, first: str, start_server: StartServer, seen: Seen
) -> None:
    with CompressedJob(started(start_server, 3)) as job:
        job.join(0)
        with (
            Foreign(job.addresses[0], "foreign", "int8") as coded,
            Foreign(job.addresses[0], "restores", "raw") as restores,
        ):
            restored = local(MODEL, 8, 0)
            client = RawClient(job.addresses[0])

            def restore() -> Any:
                return restores.open(restored, purpose=pb.PURPOSE_RESTORE)

            def contribute() -> Any:
                return coded.open(local(MODEL, 7, 0), half_duplex=half_duplex)

            opened = {}
            for what in ("restores", "contributes") if first == "restores" else ("contributes", "restores"):
                opened[what] = restore() if what == "restores" else contribute()
                count = coded.manifest.fragment_count
                name = "restores" if what == "restores" else "foreign"
                until(lambda: client.worker(name).fragments_given == count, "the fragments came")  # noqa: B023
            session = Running(lambda: job.push(0, 0))
            assert opened["contributes"].refusal().reason == "BASE_UNKNOWN"
            assert session.result().global_step == 1
            outcome, flat = opened["restores"].answer()
            assert outcome.outcome == pb.OUTCOME_COMMITTED
            assert flat == flat_bytes(restored)
            assert job.check() == bits(restored)
            assert seen.take() == {("worker-0", "int8!"): 1, ("worker-0", "raw"): 1}
            client.__exit__(None, None, None)


@pytest.mark.in_memory(False)
@pytest.mark.parametrize("fragment_size_bytes", [1024, 1 << 16])
def test_a_half_duplex_push_whose_own_fragment_ends_the_round_that_restores_is_refused(
    fragment_size_bytes: int, start_server: StartServer
) -> None:
    """With one fragment, all of the push has come by then; with many, the rest comes raw."""
    with CompressedJob(started(start_server, 2), fragment_size_bytes=fragment_size_bytes) as job:
        job.join(0)
        with (
            Foreign(job.addresses[0], "foreign", "int8") as coded,
            Foreign(job.addresses[0], "restores", "raw") as restores,
            RawClient(job.addresses[0]) as client,
        ):
            restored, values = local(MODEL, 8, 0), local(MODEL, 7, 0)
            stream = restores.open(restored, purpose=pb.PURPOSE_RESTORE)
            count = coded.manifest.fragment_count
            until(lambda: client.worker("restores").fragments_given == count, "the fragments came")
            assert coded.open(values, half_duplex=True).refusal().reason == "BASE_UNKNOWN"
            again = coded.open(values, half_duplex=True, codec="", base_center_id=0, push_id=1)
            assert again.admission() in range(count + 1)
            outcome, flat = again.answer()
            assert outcome.outcome == (pb.OUTCOME_ALREADY_COUNTED if count == 1 else pb.OUTCOME_COMMITTED)
            assert flat == flat_bytes(restored)
            assert stream.answer()[0].outcome == pb.OUTCOME_COMMITTED
            assert client.status().rounds_restarted == 0
            job.pull(0)
            assert job.check() == bits(restored)


# The choice.


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize(("has", "names"), [("int8", "int4"), ("int8", "none"), ("none", "int8")])
def test_another_compression_is_refused_with_both_named(
    servers: int, has: str, names: str, start_server: StartServer
) -> None:
    with CompressedJob(started(start_server, 1, servers), has) as job:
        job.join(0)
        with (
            ParameterServerSession(job.addresses, worker_id="b", is_chief=True) as chief,
            ParameterServerSession(job.addresses, worker_id="c") as worker,
        ):
            for call in (lambda: chief.initialize(MODEL, compression=names), lambda: worker.pull(compression=names)):
                with pytest.raises(ConflictError) as caught:
                    call()
                assert caught.value.reason is Reason.COMPRESSION_MISMATCH
                assert f"has the compression {has}" in str(caught.value)
                assert f"names {names}" in str(caught.value)
                assert any(address in str(caught.value) for address in job.addresses)
            assert not chief.initialize(MODEL).initialized
            assert chief.compression == {"none": "raw"}.get(has, has)
        assert job.push(0).outcome is Outcome.COMMITTED


def test_of_two_chiefs_the_first_chooses(start_server: StartServer) -> None:
    (address,) = started(start_server, 1)
    sessions = [ParameterServerSession([address], worker_id=name, is_chief=True) for name in "ab"]
    with sessions[0], sessions[1]:

        def initialize(session: ParameterServerSession, codec: str) -> str:
            with suppress(ConflictError):
                session.initialize(MODEL, compression=codec)
                return codec
            return ""

        chosen = together(lambda: initialize(sessions[0], "int8"), lambda: initialize(sessions[1], "int4"))
        assert sorted(map(bool, chosen)) == [False, True]
        assert sessions[0].status().compression == "".join(chosen)


def test_the_loan_of_a_push_that_is_repeated_leaves_the_base_alone(
    start_server: StartServer, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The center came in shared memory, and was overwritten while it was copied: the push is made again, coded."""
    with CompressedJob(started(start_server, 1, shared=True)) as job:
        job.join(0, **SHARED)
        failed, check = list[Loan](), Loan.check_intact

        def check_intact(self: Loan) -> None:
            if not failed:
                failed.append(self)
                raise RetryPushError("overwritten", Reason.ROUND_RESTARTED)
            check(self)

        monkeypatch.setattr(Loan, "check_intact", check_intact)
        assert job.push(0).outcome is Outcome.ALREADY_COUNTED
        job.check()
        assert seen.take() == Counter({("worker-0", "int8"): 2})
        job.push(0, 1)
        job.check()
