"""All servers of a job at once, for one worker, and how they return to a common step after a failure."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from ma_client.job.catching_up import catch_up, has_fallen_back, push_again
from ma_client.job.meeting import Meeting
from ma_client.job.one_server import LocalPart, OneServer, WorkerIdentity
from ma_client.job.recovery import Goal, common_step
from ma_client.process.forking import OwnProcess
from ma_client.process.one_thread import session_closed
from ma_client.process.threads import without_thread
from ma_client.transports.connection import Connection
from ma_client.transports.link_bytes import LinkBytes
from ma_client.transports.registry import TransportSettings
from modelaverage.access.channels import Access
from modelaverage.errors import ConflictError, ModelAverageError
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["AllServers"]

_T = TypeVar("_T")
# Limits attempts: if servers keep advancing while this worker reads the others, retries do not help.
_MAX_TRIES = 100
# Cancelled calls end soon.
_END_S = 5.0


class AllServers:
    """All servers of a job, in order, for one worker.

    Args:
        addresses: the addresses of the parameter servers.
        worker: the identity of this worker.
        reconnect_timeout_s: how long to try again when a server is away.
        access: how to connect to servers.
        settings: which transports a push may use, and timeouts.

    Raises:
        ServerUnavailableError: there are not enough threads for all servers.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        worker: WorkerIdentity,
        reconnect_timeout_s: float,
        access: Access,
        settings: TransportSettings = TransportSettings(),  # noqa: B008
    ) -> None:
        self._process = OwnProcess()
        self._worker_id = worker.worker_id
        self._threads = _threads(len(addresses))
        self._servers = [
            OneServer(Connection(address, access, settings), worker, reconnect_timeout_s) for address in addresses
        ]
        self._is_closed = False
        self._under_way = list[Future[Any]]()

    def __len__(self) -> int:
        return len(self._servers)

    def __iter__(self) -> Iterator[OneServer]:
        return iter(self._servers)

    @property
    def steps(self) -> list[int | None]:
        """For each server, the step of the center that this worker has from it."""
        return [server.step for server in self._servers]

    @property
    def moved(self) -> LinkBytes:
        """How many bytes of fragments this worker has sent to all servers, and received from them."""
        counts = [server.connection.moved for server in self._servers]
        return LinkBytes(sum(each.sent for each in counts), sum(each.received for each in counts))

    def each(self, call: Callable[[int, OneServer], _T], on_failure: Callable[[], None] | None = None) -> list[_T]:
        """Calls ``call`` for all servers at once, and returns the results. The first failure ends the others.

        Args:
            call: gets the server's index and the server.
            on_failure: called after a failure, to end waits that are not calls to servers.

        Raises:
            ModelAverageError: the session is closed, or belongs to another process.
        """
        self._process.check()
        if self._is_closed:
            raise session_closed(self._worker_id)
        if len(self._servers) == 1:
            return [call(0, self._servers[0])]
        futures = list[Future[_T]]()
        self._under_way = futures
        try:
            for index, server in enumerate(self._servers):
                futures.append(self._threads.submit(call, index, server))
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            return _results(futures, done)
        except BaseException:
            for server in self._servers:
                server.connection.stop()
            if on_failure is not None:
                on_failure()
            wait(futures)  # their calls have been cancelled
            raise
        finally:
            for server in self._servers:
                server.connection.stopped.clear()

    def pull(self, wait_initialized: bool, may_push: bool, deadline: Deadline) -> None:
        """Reads the centers of all servers; afterwards all have the same step."""
        self.each(lambda _, server: server.pull(wait_initialized, deadline, will_train=may_push))
        # Copied, so that the caller owns it: a center from a push may lie in the server's memory.
        self.settle(True, deadline, may_push)

    def push(self, base_step: int, parts: Sequence[LocalPart], copy: bool, deadline: Deadline) -> list[pb.PushOutcome]:
        """Makes one round: pushes to all servers, and returns when all have committed it and are at one step."""
        self._process.check()
        if len(self._servers) == 1:
            return [self._servers[0].push(base_step, parts[0], copy, deadline, parts[0].purpose)]
        meeting = Meeting(len(self._servers))

        def take_part(index: int, server: OneServer) -> pb.PushOutcome:
            outcome = push_again(server, base_step, parts[index], copy, deadline)
            self._keep_up(index, server, meeting, copy, deadline)
            return outcome

        outcomes = self.each(take_part, meeting.end)
        self.settle(copy, deadline)
        return outcomes

    def settle(self, copy: bool, deadline: Deadline, may_push: bool = True) -> None:
        """Brings all servers to the latest step that this worker has seen on one of them."""
        for _ in range(_MAX_TRIES):
            target = common_step(self.steps)
            if target is None:
                return
            goal, meeting = Goal(target, may_push), Meeting(len(self._servers))

            def bring(index: int, server: OneServer, goal: Goal = goal, meeting: Meeting = meeting) -> None:
                catch_up(server, goal, copy, deadline, is_private=True)
                if may_push:
                    self._keep_up(index, server, meeting, copy, deadline)

            self.each(bring, meeting.end)
            if any(step != target for step in self.steps):
                # The servers advance without this worker. Following one by one could take forever: read all at once.
                self.each(lambda _, server: server.pull(False, deadline))
        raise ConflictError(f"the parameter servers do not reach a common step; they are at {self.steps}")

    def stop(self) -> None:
        """Ends all calls in progress, in the calling thread and in the pool. From any thread."""
        for server in self._servers:
            server.connection.stop()
        wait(list(self._under_way), _END_S)

    def close(self) -> None:
        """Leaves all servers and closes the connections. Does nothing the second time, or in a forked process."""
        if self._is_closed or not self._process.is_this:
            return
        for server in self._servers:
            server.connection.stopped.clear()

        def leave(_: int, server: OneServer) -> None:
            with contextlib.suppress(ModelAverageError):  # the goodbye is optional
                server.leave()
            server.connection.close()

        self.each(leave)
        self._is_closed = True
        self._threads.shutdown()

    def _keep_up(self, index: int, server: OneServer, meeting: Meeting, copy: bool, deadline: Deadline) -> None:
        """Waits for the other servers. If this server falls back meanwhile, restores its center: another worker may
        wait for that center, and this worker for the other worker."""
        while not meeting.join(index, server.connection.timing.fall_back_interval_s):
            if has_fallen_back(server):
                meeting.leave(index)
                assert server.step is not None
                catch_up(server, Goal(server.step), copy, deadline, is_lost=True, is_private=True)


def _threads(count: int) -> ThreadPoolExecutor:
    """A thread pool. If it has several threads, they are already running.

    Otherwise a pool that fails to start a thread later would keep the refused work and run it unexpectedly.
    """
    threads, all_run = ThreadPoolExecutor(count, "ma_client"), threading.Barrier(count + 1)
    if count == 1:  # the calling thread does the work itself
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
            future.result()  # raises its error
    return [future.result() for future in futures]
