"""Runs a job for `ma-launch` and turns its end into an exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from modelaverage.commands.slow import says_if_slow
from modelaverage.errors import ModelAverageError
from modelaverage.runtime.output import CLOSED_PIPE_EXIT_CODE, OutputLostError
from ps_worker.commands.stop_signals import end_at_once_on_signals, exit_code_for, stop_signals
from ps_worker.demo.digits_config import DigitsConfig
from ps_worker.engines.engine import Engine, EngineError
from ps_worker.engines.processes import LineHandler, Processes, ProcessFailedError

if TYPE_CHECKING:
    from ps_worker.curves.after_run import RunCurves

__all__ = ["run_digits", "run_script"]

_Job = Callable[[Processes], Coroutine[None, None, None]]


def run_digits(engine: Engine, training: DigitsConfig, runs: Path) -> int:
    """Runs the built-in workload; returns the exit code. The extra `demo` has to be installed."""
    from ps_worker.demo.run import DemoConfig, run_demo

    return _run(lambda processes: run_demo(DemoConfig(training, runs), engine, processes))


def run_script(engine: Engine, command: Sequence[str], runs: Path) -> int:
    """Runs a script and its arguments in every worker, shows the curves of the loss that they report, and keeps them in
    a directory that is made in ``runs``. Returns the exit code."""
    from ps_worker.curves.after_run import RunCurves

    say = _printer("ma-launch: ", sys.stderr)
    try:
        curves = RunCurves(runs, say)
        exit_code = _run(lambda processes: _script(engine, command, curves, processes))
        curves.end(exit_code, sys.stdout)
    except OutputLostError:
        return CLOSED_PIPE_EXIT_CODE
    return exit_code


async def _script(engine: Engine, command: Sequence[str], curves: RunCurves, processes: Processes) -> None:
    from ps_worker.watch.aftermath import what_happened
    from ps_worker.watch.beside import beside
    from ps_worker.watch.lookout import keep_looking
    from ps_worker.watch.server_watch import ServerWatch

    say = _printer("", sys.stderr)
    started_at_s = time.monotonic()
    async with engine(processes, say) as cluster:
        with says_if_slow(say, "ma-launch: waits for the parameter server to listen"):
            await cluster.start_servers()
        has_printed = asyncio.Event()
        for index in range(cluster.num_workers):
            prefix = f"[worker-{index}] "
            output, errors = (_noting(has_printed, _printer(prefix, file)) for file in (sys.stdout, sys.stderr))
            cluster.start_worker(index, command, output, errors, environ=curves.environ)
        workers = "the worker has" if cluster.num_workers == 1 else f"{cluster.num_workers} workers have"
        silent = f"ma-launch: {workers} started and printed nothing yet"
        watch = ServerWatch()

        async def tell(is_well: bool) -> None:
            statuses = await watch.statuses(cluster.addresses)
            curves.heard(statuses, is_well)
            elapsed_s = time.monotonic() - started_at_s
            happened = what_happened(statuses, cluster.worker_states(), elapsed_s, cluster.center_at)
            say(f"ma-launch: {happened}")

        try:
            with says_if_slow(say, silent, lambda: not has_printed.is_set()):
                async with beside(keep_looking(cluster, watch, say)):
                    await cluster.workers_done()
            await tell(is_well=True)
        except (ProcessFailedError, asyncio.CancelledError):
            await tell(is_well=False)
            raise
        finally:
            watch.close()


def _noting(has_printed: asyncio.Event, handle: LineHandler) -> LineHandler:
    def note(line: str) -> None:
        has_printed.set()
        handle(line)

    return note


def _printer(prefix: str, file: TextIO) -> LineHandler:
    return lambda line: print(f"{prefix}{line}", file=file, flush=True)


def _run(job: _Job) -> int:
    try:
        return asyncio.run(_supervise(job))
    except OutputLostError:  # nobody reads the output any more
        return CLOSED_PIPE_EXIT_CODE
    except (ModelAverageError, ProcessFailedError, EngineError) as error:
        print(f"ma-launch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # Ctrl-C after the loop's handlers were removed
        return exit_code_for(signal.SIGINT)
    except OSError as error:
        print(f"ma-launch: {error.filename or 'the system'}: {error.strerror}", file=sys.stderr)
        return 1
    finally:
        end_at_once_on_signals()


async def _supervise(job: _Job) -> int:
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()
    processes = Processes()

    def stop(number: signal.Signals) -> None:
        if not stopped.done():
            stopped.set_result(number)
        elif number != signal.SIGHUP:  # a terminal that closes sends SIGHUP twice
            processes.hurry()
            work.cancel()  # it may be waiting for processes to end

    for number in stop_signals():
        loop.add_signal_handler(number, stop, number)
    async with processes:
        work = asyncio.ensure_future(job(processes))
        waits: list[asyncio.Future[Any]] = [work, stopped]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        await asyncio.wait([work])
        if not work.cancelled():
            work.result()
    if not stopped.done():
        return 0
    print(f"ma-launch: ended by {stopped.result().name}, and every process with it", file=sys.stderr)
    return exit_code_for(stopped.result())
