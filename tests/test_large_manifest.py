"""A manifest of any size does not block the event loop: other calls are answered."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np
import pytest

from modelaverage import wire
from modelaverage.manifest import MAX_VARIABLES
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.safetensors_file import lay_out
from ps_server.machine.helper_thread import HelperThread, no_collections
from tests.conftest import RunningServer, StartServer, freeze_garbage
from tests.raw_client import DEADLINE_S, until

SERVICE = "/modelaverage.v1.ParameterServer/"
BEAT_S = 0.002
# The limit on its own work, without waits for its turn, on an idle or a busy machine. Measured: 5 to 20 ms.
LONGEST_WORK_S = 0.1


@dataclass
class Heart:
    """The longest times between two beats of a server's event loop.

    Attributes:
        work_s: its own work.
        pause_s: by the clock: its work, and its waits for a processor and for Python's lock.
    """

    work_s: float = 0.0
    pause_s: float = 0.0


@contextmanager
def beating(server: RunningServer) -> Iterator[Heart]:
    heart = Heart()

    async def beat() -> None:
        while True:
            worked_s, at_s = time.thread_time(), time.perf_counter()
            await asyncio.sleep(BEAT_S)
            heart.work_s = max(heart.work_s, time.thread_time() - worked_s)
            heart.pause_s = max(heart.pause_s, time.perf_counter() - at_s - BEAT_S)

    future = asyncio.run_coroutine_threadsafe(beat(), server.loop)
    try:
        yield heart
        # The last beat may be overdue.
        asyncio.run_coroutine_threadsafe(asyncio.sleep(2 * BEAT_S), server.loop).result(DEADLINE_S)
    finally:
        future.cancel()


@pytest.fixture(autouse=True)
def _garbage_is_collected_afterwards() -> Iterator[None]:
    before = gc.get_freeze_count()
    yield
    if gc.get_freeze_count() != before:
        freeze_garbage()


def manifest_of(count: int, fragment_size_bytes: int = 1 << 20) -> pb.Manifest:
    """``count`` float64 scalars."""
    variables = [pb.Variable(name=f"{n:x}", data_type=pb.DATA_TYPE_FLOAT64) for n in range(count)]
    return pb.Manifest(variables=variables, fragment_size_bytes=fragment_size_bytes)


class Client:
    """Sends bytes that were made before, and parses no answer, since this process's time is also the server's."""

    def __init__(self, address: str, manifest: pb.Manifest) -> None:
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        )
        self._initialize = self._channel.stream_unary(f"{SERVICE}Initialize", bytes, bytes)
        self._pull = self._channel.unary_stream(f"{SERVICE}Pull", bytes, bytes)
        header = pb.InitializeHeader(worker_id="chief", manifest=manifest)
        self._messages = [pb.InitializeRequest(header=header).SerializeToString()]
        size_bytes, cut = 8 * len(manifest.variables), manifest.fragment_size_bytes
        for index, start in enumerate(range(0, size_bytes, cut)):
            self._messages.append(wire.encode_fragment(index, [bytes(min(cut, size_bytes - start))]))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def initialize(self) -> bytes:
        answer: bytes = self._initialize(iter(self._messages), timeout=DEADLINE_S)
        return answer

    def pull(self, count: int = 1) -> list[bytes]:
        """The headers of ``count`` pulls at once."""
        request = pb.PullRequest(worker_id="reader", header_only=True).SerializeToString()
        calls = [self._pull(request, timeout=DEADLINE_S) for _ in range(count)]
        return [next(iter(call)) for call in calls]


def test_the_most_variables_that_there_may_be_do_not_hold_up_the_event_loop(start_server: StartServer) -> None:
    server, manifest = start_server(1), manifest_of(MAX_VARIABLES)
    with Client(server.address, manifest) as client:
        with beating(server) as setting:
            answer = pb.InitializeResponse.FromString(client.initialize())
        with beating(server) as pulling:
            headers = client.pull(10)
        with beating(server) as again:
            client.initialize()
    header = pb.PullResponse.FromString(headers[0]).header
    assert answer.initialized
    assert (header.manifest, header.manifest_id) == (manifest, answer.manifest_id)
    assert max(setting.work_s, pulling.work_s, again.work_s) < LONGEST_WORK_S


def test_a_call_waits_for_the_event_loop_for_less_time_than_the_manifest_takes(start_server: StartServer) -> None:
    server, manifest = start_server(1), manifest_of(MAX_VARIABLES)
    with Client(server.address, manifest) as client:
        client.initialize()
        tries = list[tuple[float, float]]()
        # In one try the machine may have no time for the event loop; in ten tries it has.
        while len(tries) < 10 and not any(pause_s < took_s / 2 for pause_s, took_s in tries):
            began_s = time.perf_counter()
            wire.manifest_from_message(manifest)  # on this machine, as busy as it is
            took_s = time.perf_counter() - began_s
            with beating(server) as heart:
                client.initialize()
            tries.append((heart.pause_s, took_s))
    assert any(pause_s < took_s / 2 for pause_s, took_s in tries), tries


def test_the_most_fragments_of_a_small_model_do_not_hold_up_the_event_loop(start_server: StartServer) -> None:
    server = start_server(1)
    with Client(server.address, manifest_of(14_000, fragment_size_bytes=8)) as client, beating(server) as heart:
        assert pb.InitializeResponse.FromString(client.initialize()).initialized
    assert heart.work_s < LONGEST_WORK_S / 3  # a nineteenth of the largest number of fragments


def test_while_a_manifest_is_read_others_are_answered(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    read = wire.manifest_from_message

    def slow(message: pb.Manifest) -> object:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        return read(message)

    monkeypatch.setattr(wire, "manifest_from_message", slow)
    # However long it takes, the client is not to blame.
    server = start_server(1, stall_timeout_s=1.0)
    with Client(server.address, manifest_of(1001)) as client:
        call = client._initialize.future(iter(client._messages), timeout=DEADLINE_S)
        assert begun.wait(DEADLINE_S)
        status = client._channel.unary_unary(f"{SERVICE}GetStatus", bytes, pb.GetStatusResponse.FromString)
        over_s = status(b"").uptime_s + 2.0
        until(lambda: status(b"").uptime_s > over_s, "the time for stalled streams is over")
        go_on.set()
        assert pb.InitializeResponse.FromString(call.result()).initialized


def test_of_two_chiefs_with_large_manifests_one_sets_the_center(start_server: StartServer) -> None:
    server = start_server(1)
    with Client(server.address, manifest_of(1500)) as one, Client(server.address, manifest_of(1500)) as other:
        calls = [client._initialize.future(iter(client._messages), timeout=DEADLINE_S) for client in (one, other) * 2]
        answers = [pb.InitializeResponse.FromString(call.result()) for call in calls]
    assert sorted(answer.initialized for answer in answers) == [False, False, False, True]
    assert len({answer.manifest_id for answer in answers}) == 1


@pytest.mark.parametrize("count", [0, 1, 998, 999, 1000, 2500])
def test_the_head_of_a_checkpoint_is_the_text_that_json_makes_of_it(count: int) -> None:
    arrays = {f'v"{number}': np.zeros((2, 1), np.float16) for number in range(count)}
    text = lay_out(arrays, {"global_step": "7"}).head[8:].decode().rstrip(" ")
    content = json.loads(text)
    assert json.dumps(content) == text
    assert list(content) == ["__metadata__", *arrays]
    assert [content[name]["data_offsets"] for name in arrays] == [[4 * n, 4 * n + 4] for n in range(count)]


# The thread.


def test_the_helper_does_one_thing_after_the_other_and_hands_on_what_comes_of_it() -> None:
    async def main() -> None:
        helper, threads = HelperThread(), list[int]()

        def work(number: int) -> Callable[[], int]:
            def run() -> int:
                threads.append(threading.get_ident())
                return number if number else 1 // number

            return run

        assert await helper.run(work(1)) == 1  # not started: at once, here
        assert threads.pop() == threading.get_ident()
        helper.start()
        assert await asyncio.gather(*(helper.run(work(number)) for number in range(1, 9))) == list(range(1, 9))
        with pytest.raises(ZeroDivisionError):
            await helper.run(work(0))
        assert len(set(threads)) == 1
        assert threads[0] != threading.get_ident()
        helper.stop()

    asyncio.run(main())


def test_a_million_objects_that_stay_are_never_looked_through_for_garbage() -> None:
    before = gc.get_freeze_count()
    with no_collections():
        assert not gc.isenabled()
        made: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)
    with pytest.raises(MemoryError), no_collections():
        raise MemoryError
    assert gc.isenabled()


def test_work_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def main() -> None:
        helper, go_on, done = HelperThread(), threading.Event(), list[str]()
        helper.start()
        first = asyncio.ensure_future(helper.run(lambda: go_on.wait(DEADLINE_S)))
        second = asyncio.ensure_future(helper.run(lambda: done.append("second")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        go_on.set()
        assert await first
        await helper.run(lambda: done.append("third"))
        assert done == ["third"]
        helper.stop()

    asyncio.run(main())
