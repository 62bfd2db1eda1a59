"""`ps-server serve` that sends itself a signal at a moment named by the test:

python -m tests.killed_server SIGKILL MOMENT COUNT serve --bind ... : the COUNT-th time that MOMENT is reached

With SIGSTOP it stops there until the test continues or kills it. Files are written by the server's checkpoint writers,
so at a moment that concerns files these send the signal.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.center.center import Center
from ps_server.checkpoints import files as checkpoint_files
from ps_server.checkpoints import writer_process
from ps_server.flow import job
from ps_server.flow.call import Call
from ps_server.flow.writes import Writes
from ps_server.rules.round import Round
from tests.checkpoints import faulty_writer

__all__ = ["BETWEEN_TWO_ANSWERS", "MOMENTS"]

# By name: the function's owner, the function, and whether it still runs before the signal.
MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "before a header is taken": (Round, "open", False),
    "after a header is taken": (Round, "open", True),
    "in the middle of the fragments": (Round, "take_fragments", True),
    "when a fragment is averaged": (Center, "finish", True),
    "before the commit": (Center, "commit", False),
    "before the checkpoint": (Writes, "begin", False),
    "in the middle of a checkpoint": (checkpoint_files, "put_in_place", False),
    "after the checkpoint, before the answer": (job, "tell", False),
    "after the answer": (job, "tell", True),
    "while the checkpoint goes to the disk": (checkpoint_files, "make_durable", False),
    "after the checkpoint is on the disk": (checkpoint_files, "make_durable", True),
}


BETWEEN_TWO_ANSWERS = "after one worker's answer, before the other's"


def _has_outcome(message: bytes) -> bool:
    try:
        return pb.PushAndAverageResponse.FromString(message).HasField("outcome")
    except DecodeError:  # of another call
        return False


def arm_between_two_answers(count: int) -> None:
    """Only the first outcome of the COUNT-th round is sent."""
    original = Call.write
    outcomes = 0

    async def deadly(call: Call, message: bytes) -> None:
        nonlocal outcomes
        if _has_outcome(message):
            outcomes += 1
            if outcomes == count:
                asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGKILL)
            elif outcomes > count:
                await asyncio.Event().wait()
        await original(call, message)

    Call.write = deadly  # type: ignore[assignment, method-assign]


def _deadly_to_the_server(name: str, count: int, number: int, runs_before: bool) -> str:
    """A fault of a checkpoint writer, which does nothing more once it has killed its server."""
    return f"""
now, reached = files.{name}, 0
def signal_server():
    os.kill(int(sys.argv[1]), {int(number)})
    if {int(number)} == signal.SIGKILL:
        os._exit(0)
def deadly(*arguments):
    global reached
    reached += 1
    if reached == {count} and not {runs_before}:
        signal_server()
    result = now(*arguments)
    if reached == {count} and {runs_before}:
        signal_server()
    return result
files.{name} = deadly"""


def arm(moment: str, count: int, number: int) -> None:
    owner, name, runs_before = MOMENTS[moment]
    if owner is checkpoint_files:
        writer_process.command = faulty_writer(_deadly_to_the_server(name, count, number, runs_before))
        return
    original: Callable[..., Any] = getattr(owner, name)
    reached = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal reached
        reached += 1
        if reached == count and not runs_before:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if reached == count and runs_before:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    name, moment, count = sys.argv[1:4]
    if moment == BETWEEN_TWO_ANSWERS:
        arm_between_two_answers(int(count))
    else:
        arm(moment, int(count), signal.Signals[name])
    sys.exit(main(sys.argv[4:]))
