"""What goes down to clients: a pulled center, an average as it is finished, the last word on a push. No rules."""

from __future__ import annotations

from modelaverage.manifest import Manifest
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Buffer, Reader
from ps_server.flow.call import Call
from ps_server.flow.part import Part, shared_memory_message
from ps_server.seen.observations import Observations
from ps_server.transports.data_port import DataPort

__all__ = ["Sender"]


class Sender:
    """Sends what others have made. Whatever it reads has to be kept as it is meanwhile (`Center.reading`).

    Args:
        manifest: of the center.
        observations: where to count.
        data_port: who gets back the connection of a push that ended well.
    """

    def __init__(self, manifest: Manifest, observations: Observations, data_port: DataPort) -> None:
        self._manifest = manifest
        self._observations = observations
        self._data_port = data_port

    async def send_buffer(
        self, call: Call, first_message: bytes, buffer: Buffer, reader: Reader, indexes: range
    ) -> None:
        """A message, and then these fragments of a buffer."""
        await call.write(first_message)
        for index in indexes:
            data = buffer.fragment(index)
            await call.write_fragment(index, data)
            reader.read_bytes += len(data)

    async def send_center(
        self,
        call: Call,
        buffer: Buffer,
        reader: Reader,
        outcome: Outcome,
        global_step: int,
        contributors: tuple[str, ...],
    ) -> None:
        """Answers a push that is not in the round: a center, whole, and why."""
        count = self._manifest.fragment_count
        admission = pb.PushAdmission(first_needed_fragment=count)
        last_word = pb.PushOutcome(
            outcome=pb.Outcome.Name(outcome.value), global_step=global_step, contributors=contributors
        )
        first_message = pb.PushAndAverageResponse(admission=admission).SerializeToString()
        await self.send_buffer(call, first_message, buffer, reader, range(count))
        await call.write(pb.PushAndAverageResponse(outcome=last_word).SerializeToString())

    async def send_average(self, part: Part, first_needed: int) -> None:
        """Sends each fragment of the average once it is finished, then the outcome."""
        part.call.expecting = first_needed < self._manifest.fragment_count and not part.half_duplex
        message = self._admission(part, first_needed)
        if not (part.follows and part.combined):
            await part.call.write(message)
            message = b""
        sent = 0
        while True:
            part.progress.clear()
            while sent < part.average.finished:
                first, sent = sent, self._end_of_run(part, sent)
                if part.connection is not None:
                    await part.call.write_bytes(part.connection, part.average.buffer.fragments(first, sent))
                    continue
                message += self._naming(first, sent) if part.shared else part.average.message(first, sent)
                if sent < self._manifest.fragment_count or not part.combined:
                    await part.call.write(message)
                    message = b""
            if part.notice is not None:
                message += pb.PushAndAverageResponse(waiting=part.notice).SerializeToString()
                part.notice = None
                await part.call.write(message)
                message = b""
                continue
            if part.outcome is not None:
                # Now, for as soon as the client has the outcome it may push again.
                if part.is_drained and part.outcome.outcome == pb.OUTCOME_COMMITTED:
                    self._give_back(part)
                # Messages that stand one after the other are read as one.
                await part.call.write(message + pb.PushAndAverageResponse(outcome=part.outcome).SerializeToString())
                return
            await part.progress.wait()

    def _admission(self, part: Part, first_needed: int) -> bytes:
        admission = pb.PushAdmission(first_needed_fragment=first_needed)
        if part.contribution is not None and part.average.buffer.segment is not None:
            admission.contribution.CopyFrom(shared_memory_message(part.contribution))
            admission.average.CopyFrom(shared_memory_message(part.average.buffer.segment))
        if part.offer is not None:
            admission.data_connection.CopyFrom(part.offer)
        return pb.PushAndAverageResponse(admission=admission).SerializeToString()

    def _give_back(self, part: Part) -> None:
        """The data connection of this push is ready for the next."""
        connection, part.connection = part.connection, None
        assert connection is not None
        self._data_port.give_back(part.worker_id, part.incarnation, connection)

    def _end_of_run(self, part: Part, first: int) -> int:
        """The fragment after those that go at once of what is finished from ``first`` on: in shared memory all of it,
        else a run, or one fragment."""
        if part.shared:
            end = part.average.finished
        elif part.runs:
            # Runs end at multiples of the longest one, so that workers that keep pace are sent the same ones.
            longest = self._manifest.longest_run
            end = min(part.average.finished, (first // longest + 1) * longest)
        else:
            end = first + 1
        begin, stop = self._manifest.fragment_bounds(first)[0], self._manifest.fragment_bounds(end - 1)[1]
        part.reader.read_bytes += stop - begin
        part.call.count(sent_bytes=stop - begin, shared=part.shared)
        self._observations.fragments_sent += end - first
        return end

    @staticmethod
    def _naming(first: int, end: int) -> bytes:
        shared = pb.SharedFragments(first=first, count=end - first)
        return pb.PushAndAverageResponse(shared=shared).SerializeToString()
