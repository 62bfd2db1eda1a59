"""A parameter server or a worker on a Ray cluster, restarted when it dies, up to a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ps_worker.engines.processes import LineHandler, ProcessFailedError, Tail, how_it_ended
from ps_worker.engines.ray_host import ERROR, Command

__all__ = ["RayProcess"]


class RayProcess:
    """A process in an actor, until it ends by itself.

    It is restarted if it is killed or if its actor or node dies; in the latter case Ray first recreates the actor.

    Args:
        name: for messages.
        host: the actor, a `RayHost`.
        command_at: returns what to run, given an address HOST:PORT at which to listen; called at every start.
        handlers: by pipe, what is called with each line.
        max_restarts: how often it may be restarted.
        give_up: why it is not restarted after that, for the message.
        on_message: called at every restart.

    Attributes:
        restarts: how often it was restarted.
        exit_code: of its last process; None: it has not ended for good, or the code is not known.
        listens_at: where it listened last; it gets the same address again if possible. The owner sets it.
        ended: done when the process has ended with exit code 0 or was stopped; fails with ProcessFailedError, or with
            the exception that a handler raised.
    """

    def __init__(
        self,
        name: str,
        host: Any,
        command_at: Callable[[str], Command],
        handlers: Mapping[str, LineHandler],
        max_restarts: int,
        give_up: str,
        on_message: LineHandler,
    ) -> None:
        self.name = name
        self._host = host
        self._command_at = command_at
        self._tail = Tail(handlers[ERROR])
        self._handlers = {**handlers, ERROR: self._tail.add}
        self._max_restarts = max_restarts
        self._give_up = give_up
        self._on_message = on_message
        self.restarts = 0
        self.exit_code: int | None = None
        self.listens_at = ""
        self._ray_says = ""
        self._runs = False
        self._again = False
        self._stopped = False
        self.ended = asyncio.ensure_future(self._keep())
        self.ended.add_done_callback(_take_exception)

    def failure(self, how: str) -> ProcessFailedError:
        """The exception to raise; ``how`` says how it ended."""
        return self._tail.failure(f"{self.name} {how}")

    def run_again(self) -> None:
        """Stops it and starts its present command; does not count as a restart."""
        if self._runs:
            self._again = True
            self._host.stop.remote()

    def stop(self) -> None:
        """Stops it within about 3 s."""
        self._stopped = True
        if self._runs:
            self._host.stop.remote()
        else:
            self.ended.cancel()

    def kill(self) -> None:
        """Kills its actor, and with it the process."""
        self.ended.cancel()
        ray.kill(self._host)

    async def _keep(self) -> None:
        while True:
            code = await self._live()
            if self._stopped:
                return
            how = "has died with its node or actor" if code is None else how_it_ended(code)
            if self._again:
                self._again = False
            elif code == 0:
                self.exit_code = code
                return
            elif code is not None and code > 0:
                self.exit_code = code
                raise self.failure(how)
            elif self.restarts == self._max_restarts:
                self.exit_code = code
                why = f". Ray says: {self._ray_says}" if code is None else ""
                raise self.failure(f"{how} ({self._give_up}){why}")
            else:
                self.restarts += 1
                self._on_message(f"{self.name} {how}; starting it again ({self.restarts} of {self._max_restarts})")

    async def _live(self) -> int | None:
        """Runs it once. Returns its exit code; None if its actor, or what the actor had sent, is lost."""
        try:
            # This call waits until Ray has placed the actor. Ray must not repeat the next call.
            address = await self._host.bind_address.options(max_task_retries=-1).remote(self.listens_at)
            command = self._command_at(address)
            self._runs = True
            async for reference in self._host.run.remote(command):
                news: list[tuple[str, str]] | int = await reference
                if isinstance(news, int):
                    return news
                for pipe, line in news:
                    self._handlers[pipe](line)
        except RayTaskError as error:
            raise ProcessFailedError(f"{self.name} cannot be started on its node: {error.cause}") from None
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise ProcessFailedError(
                    f"{self.name} cannot be started on its node; is modelaverage installed there? {error}"
                ) from None
            details = "\t"  # lines that begin like this help only to debug Ray
            self._ray_says = " ".join(line for line in str(error).splitlines() if not line.startswith(details))
        finally:
            self._runs = False
        return None


def _take_exception(ended: asyncio.Task[None]) -> None:
    # The first failure ends the run; nobody asks for the results of the others.
    if not ended.cancelled():
        ended.exception()
