"""A job of a few rounds on a real event loop, without gRPC: every value that a client gets is known beforehand.

Worker w pushes the number `10 s + 2 w + 1` everywhere from base step s. So the center of each step is known, whatever
fails and however often pushes are made again. One play has an outer optimizer: its center depends on all rounds before.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from modelaverage import wire
from modelaverage.chosen import Chosen
from modelaverage.codecs import RAW, codec_named
from modelaverage.errors import Reason
from modelaverage.outer import text_of
from modelaverage.runtime.data_sockets import NUMBER, halves
from modelaverage.runtime.shared_memory import Segment, SegmentAddress
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.reading import load_latest
from tests.refusals.fallible_server import Context, Died, Refused, Server, next_message
from tests.refusals.kinds import INITIAL, MANIFEST, PLAYS, ROUNDS, Kind, Result, Wrong, value_of
from tests.refusals.sites import PROBE

__all__ = ["play"]

# A play takes some hundredths of a second; one that takes this long hangs, even on a loaded machine.
LIMIT_S = 30.0
_PAUSE_S = 0.002
# How long a client waits for a stranger's answer, which may never come; then it goes on without the connection.
_ANSWER_S = 0.3


class Worker:
    """A client that follows the protocol: it repeats a push until it has its outcome."""

    def __init__(self, server: Server, number: int, way: str) -> None:
        self.server, self.number, self.way = server, number, way
        self.kind, self.manifest = server.kind, server.kind.manifest
        self.center = b""  # that of `center_id`
        self.center_id = 0
        self.incarnation = bytes([number]) * 16
        self.push_id = 0
        self.segment: Segment | None = None
        self.average: Segment | None = None
        self.offer: pb.DataConnection | None = None
        self.connection: socket.socket | None = None

    async def run(self) -> None:
        if self.number == 0:
            await self.until_answered(self.initialize)
        step = await self.until_answered(self.pull)
        while step < ROUNDS:
            self.push_id += 1
            step = await self.until_answered(functools.partial(self.push, step))
        await self.until_answered(self.leave)

    async def until_answered(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await attempt()
            except Refused as refused:
                self.server.result.retries += 1
                if refused.reason is Reason.BASE_UNKNOWN:
                    self.center_id = 0  # the next attempt is raw
                if refused.reason in (
                    Reason.MANIFEST_MISMATCH,
                    Reason.OUTER_OPTIMIZER_MISMATCH,
                    Reason.COMPRESSION_MISMATCH,
                    Reason.BASE_STEP_AHEAD,
                ):
                    raise Wrong(str(refused)) from None
                await asyncio.sleep(_PAUSE_S)

    async def initialize(self) -> None:
        context, task = self.server.call("Initialize")
        chosen = Chosen(text_of(self.kind.outer), self.kind.codec.name).told
        manifest = wire.manifest_to_message(self.manifest)
        header = pb.InitializeHeader(worker_id="0", manifest=manifest)
        header.outer_optimizer, header.compression = chosen.outer_optimizer, chosen.compression
        context.up.put_nowait(pb.InitializeRequest(header=header).SerializeToString())
        flat = memoryview(self.kind.flat(INITIAL))
        for index in range(self.manifest.fragment_count):
            begin, end = self.manifest.fragment_bounds(index)
            context.up.put_nowait(wire.encode_fragment(index, (flat[begin:end],)))
        context.up.put_nowait(None)
        await asyncio.wait((task,))
        self.server.ended(context, task)

    async def pull(self) -> int:
        request = pb.PullRequest(worker_id=str(self.number), wait_initialized=True).SerializeToString()
        context, task = self.server.call("Pull", request)
        header, self.center = await read_center(self.server, context, task)
        self.center_id = header.center_id
        return int(header.global_step)

    async def leave(self) -> None:
        request = pb.LeaveRequest(worker_id=str(self.number), incarnation=self.incarnation).SerializeToString()
        context, task = self.server.call("Leave", request)
        await asyncio.wait((task,))
        self.server.ended(context, task)

    async def push(self, step: int) -> int:
        """Returns the step of the center that came."""
        connection, self.connection = self.connection, None
        flat = memoryview(self.kind.flat(value_of(self.number, step)))
        header = pb.PushHeader(
            worker_id=str(self.number),
            incarnation=self.incarnation,
            push_id=self.push_id,
            base_step=step,
            manifest_id=self.manifest.id,
            accepts_shared_memory=self.way == "shared",
            fragments_follow=self.way == "follows",
            half_duplex=self.way == "half",
            accepts_combined=self.number % 2 == 0,
            accepts_data_connection=self.way == "data" and connection is None,
            uses_data_connection=connection is not None,
        )
        if self.center_id and self.number == 0:
            header.codec, header.base_center_id = self.kind.codec.name, self.center_id
        context, task = self.server.call("PushAndAverage")
        context.up.put_nowait(pb.PushAndAverageRequest(header=header).SerializeToString())
        moving: list[asyncio.Task[Any]] = []
        if connection is not None:
            moving = [asyncio.ensure_future(self.through(connection, flat))]
        elif self.way in ("follows", "half"):
            self.give(context, flat, 0, header.codec)
            if self.way == "half":
                context.up.put_nowait(None)
        try:
            center, outcome = await self.answer(context, task, flat, header)
            if moving:
                (center,) = await asyncio.wait_for(asyncio.gather(*moving), 5.0)
                self.connection, connection = connection, None
            self.kind.check(f"worker {self.number} got", outcome.global_step, center)
            self.center, self.center_id = bytes(center), outcome.center_id
            return int(outcome.global_step)
        except (OSError, asyncio.TimeoutError):
            raise Refused(None, "the data connection broke") from None
        finally:
            for each in moving:
                each.cancel()
            if connection is not None:
                connection.close()
            task.cancel()
            if self.offer is not None and self.connection is None:
                await self.connect(self.offer)
                self.offer = None

    async def answer(
        self, context: Context, task: asyncio.Task[Any], flat: memoryview, header: pb.PushHeader
    ) -> tuple[bytearray, pb.PushOutcome]:
        center = bytearray(self.manifest.buffer_size_bytes)
        generation: int | None = None
        codec_down = RAW.name
        while (data := await next_message(context, task)) is not None:
            message = pb.PushAndAverageResponse.FromString(data)
            if message.HasField("admission"):
                first = message.admission.first_needed_fragment
                codec_down = message.admission.codec
                if message.admission.HasField("data_connection"):
                    self.offer = message.admission.data_connection
                if message.admission.HasField("contribution"):
                    generation = self.lend(message.admission)
                if generation is not None and first < self.manifest.fragment_count:
                    assert self.segment is not None
                    self.segment.body[:] = np.frombuffer(flat, np.uint8)
                    put = pb.SharedFragments(first=first, count=self.manifest.fragment_count - first)
                    context.up.put_nowait(pb.PushAndAverageRequest(shared=put).SerializeToString())
                elif not (header.fragments_follow or header.half_duplex or header.uses_data_connection):
                    self.give(context, flat, first, header.codec)
                if not header.half_duplex:
                    context.up.put_nowait(None)
            if message.HasField("fragment"):
                self.take(center, message.fragment, codec_down)
            if message.HasField("shared"):
                assert self.average is not None
                end = message.shared.first + message.shared.count - 1
                begin, stop = (
                    self.manifest.fragment_bounds(message.shared.first)[0],
                    self.manifest.fragment_bounds(end)[1],
                )
                center[begin:stop] = self.average.body[begin:stop].tobytes()
            if message.HasField("outcome"):
                if generation is not None and self.generation_of_average() != generation:
                    raise Refused(None, "a later round has overwritten the average")
                return center, message.outcome
        self.server.ended(context, task)
        raise Wrong("a push ended without an outcome")

    def give(self, context: Context, flat: memoryview, first: int, codec: str) -> None:
        values, base = (np.frombuffer(each, np.uint8) for each in (flat, self.center or flat))
        for index in range(first, self.manifest.fragment_count):
            with PROBE.elsewhere():
                pieces, theirs = (self.manifest.piece_arrays(index, each) for each in (values, base))
                data = b"".join(codec_named(codec).encode(self.manifest, index, pieces, theirs))
            context.up.put_nowait(wire.encode_fragment(index, (data,)))

    def take(self, center: bytearray, fragment: pb.Fragment, codec: str) -> None:
        """Puts a fragment of the center that comes to its place."""
        flat, base = np.frombuffer(center, np.uint8), np.frombuffer(self.center or bytes(len(center)), np.uint8)
        with PROBE.elsewhere():
            codec_named(codec).decode_into(self.manifest, flat, fragment.index, memoryview(fragment.data), base)

    def lend(self, admission: pb.PushAdmission) -> int | None:
        """Opens the memory that the server lends; returns the generation of the average."""
        opened = list[Segment | None]()
        for memory, writable in ((admission.contribution, True), (admission.average, False)):
            address = SegmentAddress(memory.path, memory.nonce)
            with PROBE.elsewhere():
                opened.append(Segment.open(address, self.manifest.buffer_size_bytes, writable))
        if None in opened:
            return None
        self.segment, self.average = opened
        return self.generation_of_average()

    def generation_of_average(self) -> int:
        """The generation of the average. The worker is another process than the one that is refused things."""
        assert self.average is not None
        with PROBE.elsewhere():
            return self.average.generation

    async def connect(self, offer: pb.DataConnection) -> None:
        hello, answer = halves(offer.key)
        loop = asyncio.get_running_loop()
        connection = socket.socket()
        connection.setblocking(False)
        try:
            await asyncio.wait_for(loop.sock_connect(connection, ("127.0.0.1", offer.port)), _ANSWER_S)
            await loop.sock_sendall(connection, hello)
            came = b""
            while len(came) < len(answer):
                more = await asyncio.wait_for(loop.sock_recv(connection, len(answer) - len(came)), _ANSWER_S)
                if not more:
                    raise ConnectionResetError
                came += more
            self.connection = connection
        except (OSError, asyncio.TimeoutError):
            connection.close()

    async def through(self, connection: socket.socket, flat: memoryview) -> bytearray:
        """Sends a whole push and receives a whole center."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, NUMBER.pack(self.push_id) + bytes(flat))
        center = bytearray()
        while len(center) < len(flat):
            more = await loop.sock_recv(connection, len(flat) - len(center))
            if not more:
                raise ConnectionResetError
            center += more
        return center


async def read_center(server: Server, context: Context, task: asyncio.Task[Any]) -> tuple[pb.CenterHeader, bytes]:
    """Reads a pulled center; returns its header and flat buffer. Raises Refused."""
    manifest = server.kind.manifest
    center, header = bytearray(manifest.buffer_size_bytes), None
    while (data := await next_message(context, task)) is not None:
        message = pb.PullResponse.FromString(data)
        if message.HasField("header"):
            header = message.header
        else:
            begin = manifest.fragment_bounds(message.fragment.index)[0]
            center[begin : begin + len(message.fragment.data)] = message.fragment.data
    await asyncio.wait((task,))
    server.ended(context, task)
    assert header is not None
    server.kind.check("a reader got", header.global_step, center)
    return header, bytes(center)


async def readers(server: Server, workers: asyncio.Future[Any]) -> None:
    """In every round pulls, reads only the header, and reads the rest when the workers are done."""
    slow: list[tuple[Context, asyncio.Task[Any]]] = []
    seen = 0
    while not workers.done():
        job = None if server.service is None else server.service.job
        if job is not None and job.round.global_step >= seen and server.service is not None:
            seen = job.round.global_step + 1
            context, task = server.call("Pull", pb.PullRequest(worker_id=f"reader-{seen}").SerializeToString())
            first = await next_message(context, task)
            context.takes.clear()
            if first is not None:
                context.down.put_nowait(first)  # to be read again, with the rest
            slow.append((context, task))
        await asyncio.sleep(_PAUSE_S)
    for context, task in slow:
        context.takes.set()
        with contextlib.suppress(Refused):
            await read_center(server, context, task)


async def breaker(server: Server, workers: asyncio.Future[Any]) -> None:
    """A third worker whose process always disappears in the middle of its push."""
    worker = Worker(server, 9, "inline")
    while not workers.done() and worker.push_id < 3:
        worker.push_id += 1
        worker.incarnation = worker.push_id.to_bytes(16, "big")
        job = None if server.service is None else server.service.job
        if job is not None:
            header = pb.PushHeader(
                worker_id="9",
                incarnation=worker.incarnation,
                push_id=1,
                base_step=job.round.global_step,
                manifest_id=MANIFEST.id,
            )
            context, task = server.call("PushAndAverage")
            context.up.put_nowait(pb.PushAndAverageRequest(header=header).SerializeToString())
            await next_message(context, task)
            context.up.put_nowait(wire.encode_fragment(0, (memoryview(bytes(MANIFEST.fragment_bounds(0)[1])),)))
            await asyncio.sleep(_PAUSE_S)
            task.cancel()
            await asyncio.wait((task,))
        await asyncio.sleep(4 * _PAUSE_S)


async def _play(kind: Kind, directory: Path, result_of: list[Server]) -> None:
    server = Server(kind, directory)
    result_of.append(server)
    try:
        server.start()
    except (OSError, MemoryError, RuntimeError):
        if not PROBE.refused:
            raise
        server.result.started = False
        return
    workers = asyncio.gather(*(Worker(server, number, way).run() for number, way in enumerate(kind.ways)))
    beside = []
    if kind.readers:
        beside.append(readers(server, workers))
    if kind.breaks:
        beside.append(breaker(server, workers))
    try:
        await asyncio.wait_for(asyncio.gather(workers, *beside), LIMIT_S)
    except asyncio.TimeoutError:
        raise Wrong(f"still not over after {LIMIT_S:g} s") from None
    except Died:
        return
    finally:
        for task in list(server.tasks):
            task.cancel()
    with PROBE.elsewhere():
        assert server.service is not None
        job = server.service.job
        assert job is not None
        kind.check("the server has", job.round.global_step, job.center.current.flat.tobytes())
    try:
        await asyncio.wait_for(server.stop(), LIMIT_S)
    except (OSError, MemoryError, RuntimeError):
        if not PROBE.refused:
            raise  # otherwise it ends in another way, which is allowed


async def _end(server: Server) -> None:
    server.close()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def play(name: str) -> Result:
    """Plays once. Raises Wrong."""
    directory = Path(tempfile.mkdtemp(prefix="play-"))
    servers: list[Server] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # exceptions in callbacks are part of the play
    try:
        began_at_s = loop.time()
        loop.run_until_complete(_play(PLAYS[name], directory, servers))
        PROBE.disarm()
        servers[0].result.took_s = loop.time() - began_at_s
        if PLAYS[name].keeps and servers[0].result.started:
            kept = load_latest(directory)
            if kept is None or kept.global_step != ROUNDS:
                raise Wrong(f"on the disk is {kept and kept.global_step} after a clean stop at step {ROUNDS}")
            manifest = PLAYS[name].manifest
            buffer = np.zeros(manifest.buffer_size_bytes, np.uint8)
            for array, values in zip(manifest.arrays(buffer).values(), kept.arrays.values(), strict=True):
                array[...] = values
            PLAYS[name].check("on the disk is", kept.global_step, buffer.tobytes())
        return servers[0].result
    finally:
        PROBE.disarm()
        for server in servers:
            loop.run_until_complete(_end(server))
        loop.close()
        shutil.rmtree(directory, ignore_errors=True)
