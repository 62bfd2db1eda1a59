"""Serves a push from its header to its outcome, with any transport."""

from __future__ import annotations

from collections.abc import Sequence

from modelaverage.codecs import codec_named
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Reader
from ps_server.flow.answer import send_average, send_center
from ps_server.flow.average import Coded
from ps_server.flow.call import Call
from ps_server.flow.job import Job
from ps_server.flow.naming import check_push_codec
from ps_server.flow.open_push import Manner, OpenPush, push_of
from ps_server.machine.reserve import Reserve
from ps_server.rules.decisions import Admit, CenterFollows, Hold
from ps_server.transports.base import Lane, Opening, Transport

__all__ = ["serve_push"]


async def serve_push(
    job: Job, call: Call, header: pb.PushHeader, transports: Sequence[Transport], reserve: Reserve
) -> None:
    """Serves a push.

    Args:
        job: the job that it is for.
        call: has read the header and nothing else.
        header: the push header.
        transports: asked in this order whether the push uses them.
        reserve: without spare descriptors, no transport is offered.

    Raises:
        ModelAverageError: the push is refused or ended.
    """
    wanted = push_of(header, job.manifest)
    codec = codec_named(header.codec)
    check_push_codec(codec, job.center.codec)
    job.check_base(header, codec)
    opening = Opening(header, call, job.manifest, codec)
    lane = _lane(opening, transports)
    push = OpenPush(
        call,
        wanted.worker_id,
        wanted.incarnation,
        Manner.of(header),
        lane,
        codec,
        job.average,
        Reader(job.clock(), call.fail),
    )
    try:
        with job.attending(push):
            match job.open(push, wanted, header):
                case CenterFollows(outcome):
                    await _pass_over_fragments(push)
                    await _send_center(job, push, outcome)
                case Hold():
                    await _pass_over_fragments(push)
                    await job.released(push)
                    await _send_center(job, push, Outcome.STALE)
                case Admit(first_needed):
                    admission = pb.PushAdmission(first_needed_fragment=first_needed, codec=header.codec)
                    if push.manner.is_half_duplex:
                        await _exchange_in_turn(job, push, admission)
                        return
                    if not reserve.is_short:
                        lane.admitted(admission, Coded(push.average, codec))
                        for transport in transports:
                            transport.offer(opening, admission)
                    await _exchange(job, push, admission)
    finally:
        lane.close()


def _lane(opening: Opening, transports: Sequence[Transport]) -> Lane:
    for transport in transports:
        lane = transport.open(opening)
        if lane is not None:
            return lane
    raise AssertionError("messages take every push")


async def _exchange(job: Job, push: OpenPush, admission: pb.PushAdmission) -> None:
    """Receives fragments and sends the average at the same time."""
    first_needed = admission.first_needed_fragment
    push.call.expecting = first_needed < job.manifest.fragment_count
    unneeded = first_needed if push.manner.follows else 0
    with job.center.reading(push.average.buffer, push.reader):
        whole = push.lane.whole()
        if whole is not None:  # a small push: a second task and another read would cost more than all the rest
            job.take(push, whole, unneeded)
            job.round.check_complete(push.call.number)
        sending = send_average(push, admission, job.manifest, job.observations)
        if whole is None:
            await push.call.run(sending, beside=_receive(job, push, unneeded))
        else:
            await sending


async def _exchange_in_turn(job: Job, push: OpenPush, admission: pb.PushAdmission) -> None:
    """Receives all fragments, then sends the average.

    Before that, no center is held for the push, so a client that writes slowly does not count as a slow reader. If
    its round and the next one are over by then, the current center is sent in place of the average."""
    push.call.expecting = True
    await _receive(job, push, admission.first_needed_fragment)
    push.reader.since_s = job.clock()
    if push.outcome is not None and push.outcome.global_step != job.round.global_step:
        await _send_center(job, push, Outcome.ALREADY_COUNTED)
        return
    with job.center.reading(push.average.buffer, push.reader):
        await send_average(push, admission, job.manifest, job.observations)


async def _receive(job: Job, push: OpenPush, unneeded: int) -> None:
    """Adds fragments to the average until the client has sent all; ignores those below ``unneeded``."""
    while (run := await push.lane.receive()) is not None:
        job.take(push, run, unneeded)
    push.call.expecting = False
    job.round.check_complete(push.call.number)


async def _pass_over_fragments(push: OpenPush) -> None:
    """The push is not in the round. Discards its fragments until the client half-closes; a half-duplex client reads
    only then."""
    if push.manner.is_half_duplex:
        push.call.expecting = True
        while (run := await push.lane.receive()) is not None:
            push.call.count_received(len(run.data), len(run.data), run.stays, push.is_aside)
    push.call.expecting = False


async def _send_center(job: Job, push: OpenPush, outcome: Outcome) -> None:
    """Answers a push that is not in the round: the whole current center, then the outcome."""
    with job.reading_center(push, outcome) as (buffer, step, contributors):
        await send_center(push, buffer, outcome, step, contributors, job.manifest.fragment_count)
