"""Responses to clients: a center, an average as its fragments are finished, the outcome of a push. No rules.

The caller must hold every buffer that is read here (`Center.reading`).
"""

from __future__ import annotations

from modelaverage.codecs import RAW
from modelaverage.manifest import Manifest
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Buffer, Reader
from ps_server.flow.average import Coded
from ps_server.flow.call import Call
from ps_server.flow.open_push import OpenPush
from ps_server.seen.observations import Observations

__all__ = ["send_average", "send_buffer", "send_center"]


async def send_buffer(call: Call, first_message: bytes, buffer: Buffer, reader: Reader, indexes: range) -> None:
    """Sends a message, then these fragments of a buffer, raw."""
    await call.write(first_message)
    for index in indexes:
        reader.read_bytes += await call.write_fragment(index, buffer.encoded(RAW, index, index + 1))


async def send_center(
    push: OpenPush, buffer: Buffer, outcome: Outcome, global_step: int, contributors: tuple[str, ...], count: int
) -> None:
    """Answers a push that is not in the round: a whole center of ``count`` fragments, then the outcome."""
    first_message = pb.PushAndAverageResponse(admission=pb.PushAdmission(first_needed_fragment=count))
    last_word = pb.PushOutcome(
        outcome=pb.Outcome.Name(outcome.value),
        global_step=global_step,
        contributors=contributors,
        center_id=buffer.center_id,
    )
    await send_buffer(push.call, first_message.SerializeToString(), buffer, push.reader, range(count))
    await push.call.write(pb.PushAndAverageResponse(outcome=last_word).SerializeToString())


async def send_average(
    push: OpenPush, admission: pb.PushAdmission, manifest: Manifest, observations: Observations
) -> None:
    """Sends the admission, each fragment of the average once it is finished, and the outcome."""
    call, lane, average, combines = push.call, push.lane, push.average, push.manner.takes_combined
    count, coded = manifest.fragment_count, Coded(average, push.codec)
    message = pb.PushAndAverageResponse(admission=admission).SerializeToString()
    if not (push.manner.follows and combines):
        await call.write(message)
        message = b""
    sent = 0
    while True:
        push.progress.clear()
        if push.lacks_changes:
            await push.progress.wait()  # until the call ends
            continue
        while sent < average.finished:
            first, sent = sent, lane.end_of_range(sent, average.finished, push.manner.takes_runs)
            size_bytes = (RAW if lane.is_shared else push.codec).run_size_bytes(manifest, first, sent)
            push.reader.read_bytes += size_bytes
            raw_bytes = RAW.run_size_bytes(manifest, first, sent)
            call.count_sent(size_bytes, raw_bytes, lane.is_shared, push.is_aside)
            observations.fragments_sent += sent - first
            part = await lane.send(coded, first, sent)
            message += part
            # The last range is sent with the outcome, so a small model takes one message. So is the admission if no
            # range is sent in messages.
            if part and (sent < count or not combines):
                await call.write(message)
                message = b""
        if push.notice is not None:
            message += pb.PushAndAverageResponse(waiting=push.notice).SerializeToString()
            push.notice = None
            await call.write(message)
            message = b""
            continue
        if push.outcome is not None:
            # Before the write: once the client has the outcome, it may push again.
            lane.answered(push.outcome.outcome == pb.OUTCOME_COMMITTED)
            # Concatenated protobuf messages parse as one merged message.
            await call.write(message + pb.PushAndAverageResponse(outcome=push.outcome).SerializeToString())
            return
        await push.progress.wait()
