"""This worker at all shards of a job at once, and how they come to one step after a failure."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

from ma_client.job.one_server import Contribution, Member, Worker
from ma_client.process.forking import OwnProcess
from ma_client.process.threads import without_thread
from ma_client.transports.connection import Shard
from ma_client.transports.data_connection import DATA_SETTINGS, DataSettings
from modelaverage.access.channels import Access
from modelaverage.errors import ConflictError, ModelAverageError, Reason
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Members"]

_T = TypeVar("_T")
# How often a shard that is done is looked at while others are not: it may have fallen back meanwhile.
_LOOK_INTERVAL_S = 2.0
# Shards that run on while this worker fetches from the others are another kind of trouble than a failure.
_MAX_TRIES = 100
# Calls that were cancelled end soon.
_END_S = 5.0


class Members:
    """The places of one worker at the shards of a job, in the order of the servers.

    Args:
        addresses: of the parameter servers.
        worker: who takes the places.
        reconnect_timeout_s: how long to try again when a server is away.
        access: the way to servers.
        data: when to use data connections.

    Raises:
        ServerUnavailableError: there are not enough threads for all servers.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        worker: Worker,
        reconnect_timeout_s: float,
        access: Access,
        data: DataSettings = DATA_SETTINGS,
    ) -> None:
        self._process = OwnProcess()
        self._threads = _threads(len(addresses))
        self._members = [Member(Shard(address, access, data), worker, reconnect_timeout_s) for address in addresses]
        self._is_closed = False
        self._under_way = list[Future[Any]]()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    @property
    def steps(self) -> list[int | None]:
        """By shard, the step of the center that this worker has."""
        return [member.step for member in self._members]

    def each(self, call: Callable[[int, Member], _T], on_failure: Callable[[], None] | None = None) -> list[_T]:
        """What ``call`` returns for every shard, called for all at once; the first failure ends the others.

        Args:
            call: gets the shard's index and the worker's place there.
            on_failure: called when one has failed, to end waits that are not the servers'.

        Raises:
            ModelAverageError: the session is closed, or another process's.
        """
        self._process.check()
        if self._is_closed:
            raise ModelAverageError("the session is closed; open another one")
        if len(self._members) == 1:
            return [call(0, self._members[0])]
        futures = list[Future[_T]]()
        self._under_way = futures
        try:
            for index, member in enumerate(self._members):
                futures.append(self._threads.submit(call, index, member))
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            return _results(futures, done)
        except BaseException:
            for member in self._members:
                member.shard.stop()
            if on_failure is not None:
                on_failure()
            wait(futures)  # their calls have been cancelled
            raise
        finally:
            for member in self._members:
                member.shard.stopped.clear()

    def pull(self, wait_initialized: bool, may_push: bool, deadline: Deadline) -> None:
        """Reads the centers of all shards; afterwards all are of one step."""
        self.each(lambda _, member: member.pull(wait_initialized, deadline, will_train=may_push))
        # Copied, so that it is the caller's own: what comes by a push may lie in the server's memory.
        self.settle(True, deadline, may_push)

    def push(
        self, base_step: int, contributions: Sequence[Contribution], copy: bool, deadline: Deadline
    ) -> list[pb.PushOutcome]:
        """One round: pushes to all shards, and returns when it is over on all of them and they are at one step."""
        self._process.check()
        if len(self._members) == 1:
            return [self._members[0].push(base_step, contributions[0], copy, deadline)]
        meeting = _Meeting(len(self._members))

        def take_part(index: int, member: Member) -> pb.PushOutcome:
            outcome = self._push(member, base_step, contributions[index], copy, deadline)
            self._keep_up(index, member, meeting, copy, deadline)
            return outcome

        outcomes = self.each(take_part, meeting.end)
        self.settle(copy, deadline)
        return outcomes

    def settle(self, copy: bool, deadline: Deadline, may_push: bool = True) -> None:
        """Brings all shards to the latest step that this worker has seen on one of them."""
        for _ in range(_MAX_TRIES):
            target = max(step for step in self.steps if step is not None)
            if self.steps == [target] * len(self._members):
                return
            meeting = _Meeting(len(self._members))

            def bring(index: int, member: Member, target: int = target, meeting: _Meeting = meeting) -> None:
                member.bring_to(target, member.nothing_new, copy, deadline, may_push)
                if may_push:
                    self._keep_up(index, member, meeting, copy, deadline)

            self.each(bring, meeting.end)
            if self.steps != [target] * len(self._members):
                # They run on without this worker. To follow them one by one could take for ever: all at once.
                self.each(lambda _, member: member.pull(False, deadline))
        raise ConflictError(f"the parameter servers do not come to one step; they are at {self.steps}")

    def stop(self) -> None:
        """Ends what is under way, from any thread: the calls of the thread that waits for it, and those of the pool."""
        for member in self._members:
            member.shard.stop()
        wait(list(self._under_way), _END_S)

    def close(self) -> None:
        """Leaves all shards, and closes the connections. Does nothing the second time, nor in a forked process."""
        if self._is_closed or not self._process.is_this:
            return
        for member in self._members:
            member.shard.stopped.clear()

        def leave(_: int, member: Member) -> None:
            with contextlib.suppress(ModelAverageError):  # nobody has to hear it
                member.leave()
            member.shard.close()

        self.each(leave)
        self._is_closed = True
        self._threads.shutdown()

    def _push(
        self, member: Member, base_step: int, contribution: Contribution, copy: bool, deadline: Deadline
    ) -> pb.PushOutcome:
        give = contribution
        while True:
            try:
                return member.push(base_step, give, copy, deadline)
            except ConflictError as error:
                if error.reason is not Reason.BASE_STEP_AHEAD:
                    raise
            # The shard has lost rounds that this worker has seen, and others do not agree to leave them out. It gets
            # the center again from which this worker started. If that is gone, too, what it made of it has to do:
            # nothing of that is untouched.
            center = member.center_again()
            if center is None:
                give = replace(contribution, untouched=())
            member.bring_up(base_step, center or give, copy, deadline)

    def _keep_up(self, index: int, member: Member, meeting: _Meeting, copy: bool, deadline: Deadline) -> None:
        """Waits for this worker's other places. A shard that falls back meanwhile is brought up again: another worker
        may wait for that, and this one for it."""
        while not meeting.join(index, _LOOK_INTERVAL_S):
            if member.has_fallen_back():
                meeting.leave(index)
                member.bring_back(copy, deadline)


class _Meeting:
    """Where the threads of all shards wait for each other."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._present: set[int] = set()
        self._condition = threading.Condition()
        self._over = False

    def join(self, index: int, timeout_s: float) -> bool:
        """Whether all are there, or it is over, within this time."""
        with self._condition:
            self._present.add(index)
            if len(self._present) == self._size:
                self.end()
            return self._condition.wait_for(lambda: self._over, timeout_s)

    def leave(self, index: int) -> None:
        """Not there any more."""
        with self._condition:
            self._present.discard(index)

    def end(self) -> None:
        """Nobody waits any longer."""
        with self._condition:
            self._over = True
            self._condition.notify_all()


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads run already, if it is to have several.

    One that gets no thread later keeps the work that it refused, and does it when nobody expects that any more.
    """
    threads, all_run = ThreadPoolExecutor(count, "ma_client"), threading.Barrier(count + 1)
    if count == 1:  # its work is done by who asks for it
        return threads
    try:
        for _ in range(count):
            threads.submit(all_run.wait)
        all_run.wait()
    except BaseException as error:
        all_run.abort()
        threads.shutdown()
        if not isinstance(error, RuntimeError):
            raise
        raise without_thread(f"there are not enough threads for {count} parameter servers", error) from None
    return threads


def _results(futures: Sequence[Future[_T]], done: set[Future[_T]]) -> list[_T]:
    for future in futures:
        if future in done:
            future.result()  # raises what it raised
    return [future.result() for future in futures]
