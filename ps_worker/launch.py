"""The command `ma-launch`: parameter servers and their workers, on this machine or on a Ray cluster. The only place
that reads its flags."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelaverage import __version__
from modelaverage.commands import flag_types
from modelaverage.commands.parser import OneLineParser, help_format
from modelaverage.commands.serve_flags import ServeFlags, add_serve_flags
from modelaverage.logs import keep_logging
from modelaverage.runtime.output import OnLoss
from ps_worker.commands.extras import MissingExtraError, require
from ps_worker.commands.stop_signals import end_at_once_on_signals
from ps_worker.demo.digits_config import MODULES, DigitsConfig, add_training_flags

if TYPE_CHECKING:
    from ps_worker.engines.engine import Engine

__all__ = ["main"]

_EXAMPLES = """\
examples:
  ma-launch --workers 2 -- digits                        the built-in workload
  ma-launch --workers 2 -- digits --steps 400 --seed 1   `ma-launch -- digits --help` lists its flags
  ma-launch --workers 4 -- train.py --epochs 3           your script, in four processes; worker-0 is the chief
  ma-launch --ps 2 --workers 4 -- train.py               each of two parameter servers has half of the model
  ma-launch --workers 4 --max-restarts 3 --checkpoint-dir center -- train.py   a worker that fails starts again
  ma-launch --workers 4 --min-workers 3 --grace-s 5 -- train.py   rounds go on without one that is 5 s late
  ma-launch --engine ray --ps auto --workers 4 -- train.py   on the nodes of a Ray cluster; docs/ray.md has more

The workers' lines are printed with the worker's name. A worker that fails ends the run, with its last lines, unless
--max-restarts or --min-workers says otherwise; Ctrl-C ends it, too. Unless OMP_NUM_THREADS is set, the workers share
the processor cores evenly.
"""
_SERVERS_HELP = """\
These are passed to every `ps-server serve`. With --checkpoint-dir, the same command continues from the center that an
earlier run left there; several servers (with ray, also a single one) use directories in DIR: ps-0, ps-1, ...
"""
_DIGITS_EXAMPLES = """\
examples:
  ma-launch --workers 2 -- digits
  ma-launch --workers 4 --runs /tmp/runs -- digits --steps 400 --interval-steps 50 --seed 1
  ma-launch --workers 4 -- digits --outer sgd:lr=0.5,momentum=0.5
  ma-launch --workers 4 -- digits --outer average
  ma-launch --workers 4 -- digits --compression int8
"""
_DIGITS = "digits"
_AUTO = "auto"
_LOCAL, _RAY = "local", "ray"
_RAY_FLAGS = ("ray_address", "working_dir", "cpus_per_worker", "gpus_per_worker")
_RAY_MAX_RESTARTS = 3
_LOOPBACK = "127.0.0.1"
_DEMO_MODULES = (*MODULES, "rich", "matplotlib", "tensorboard")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    end_at_once_on_signals()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    keep_logging("ma-launch")
    parser = _parser()
    own, command = _split(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser.parse_known_args(own)
    if not command:
        parser.error("say after -- what the workers run: `-- digits`, or `-- SCRIPT [ARGS...]`")
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    given = [flag for flag in _RAY_FLAGS if getattr(arguments, flag) is not None]
    if given and arguments.engine != _RAY:
        parser.error(f"--{given[0].replace('_', '-')} needs --engine {_RAY}")
    serve = ServeFlags.from_arguments(arguments)
    try:
        serve.check_workers(arguments.workers, "--workers")
        serve.check_checkpoints()
    except ValueError as error:
        parser.error(str(error))
    is_digits = command[0] == _DIGITS
    training = _training(command[1:]) if is_digits else None
    from ps_worker.engines.engine import EngineError
    from ps_worker.supervise import run_digits, run_script

    try:
        require(_DEMO_MODULES if is_digits else ())
        script = [] if is_digits else _script(command, arguments.working_dir)
        engine = (
            _local_engine(arguments, serve) if arguments.engine == _LOCAL else _ray_engine(arguments, serve, is_digits)
        )
    except argparse.ArgumentTypeError as error:
        parser.error(f"SCRIPT: {error}")
    except (MissingExtraError, EngineError) as error:
        print(f"ma-launch: {error}", file=sys.stderr)
        return 1
    keep_logging("ma-launch", OnLoss.END_WITH_PIPE)
    if training is not None:
        return run_digits(engine, training, arguments.runs)
    return run_script(engine, script, arguments.runs)


def _training(argv: list[str]) -> DigitsConfig:
    parser = _digits_parser()
    try:
        return DigitsConfig.from_flags(parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))


def _script(command: list[str], working_dir: Path | None) -> list[str]:
    """The command as seen from the directory where the workers start. Raises ArgumentTypeError."""
    script = flag_types.existing_file(command[0])
    if working_dir is not None:
        try:
            script = script.resolve().relative_to(working_dir.resolve())
        except ValueError:
            raise argparse.ArgumentTypeError(f"{command[0]!r} is not in --working-dir {str(working_dir)!r}") from None
    return [str(script), *command[1:]]


def _local_engine(arguments: argparse.Namespace, serve: ServeFlags) -> Engine:
    """Raises EngineError."""
    from ps_worker.engines.local_cluster import (
        LocalCluster,
        LocalConfig,
        automatic_servers,
        center_directories,
        usable_cores,
    )

    num_workers: int = arguments.workers
    num_servers = automatic_servers(num_workers, usable_cores()) if arguments.ps == _AUTO else arguments.ps
    center_directories(serve.checkpoint_dir, num_servers)
    has_page = _can_have_page() if arguments.page else False
    config = LocalConfig(num_servers, num_workers, serve, arguments.max_restarts or 0, arguments.fresh, has_page)
    return lambda processes, on_message: LocalCluster(processes, config, on_message)


def _can_have_page() -> bool:
    """Whether the servers can serve a page; otherwise says why not."""
    try:
        require(["aiohttp"], extra="page")
    except MissingExtraError as error:
        print(f"ma-launch: no page: {error} (--no-page: without this line)", file=sys.stderr)
        return False
    return True


def _ray_engine(arguments: argparse.Namespace, serve: ServeFlags, is_digits: bool) -> Engine:
    """Raises MissingExtraError, EngineError."""
    require(["ray"], extra="ray")
    from ps_worker.engines.ray_cluster import RayCluster, RayConfig
    from ps_worker.engines.ray_engine import connect, count_nodes

    num_workers: int = arguments.workers
    cpus_per_worker: int = arguments.cpus_per_worker or 1
    num_servers = 1 if arguments.ps == _AUTO else arguments.ps
    is_new = connect(arguments.ray_address, arguments.working_dir, num_servers + num_workers * cpus_per_worker)
    end_at_once_on_signals()  # Ray has replaced the handlers
    directory = serve.checkpoint_dir
    config = RayConfig(
        num_servers=min(num_workers, count_nodes()) if arguments.ps == _AUTO else num_servers,
        num_workers=num_workers,
        max_restarts=_RAY_MAX_RESTARTS if arguments.max_restarts is None else arguments.max_restarts,
        serve=serve if directory is None else replace(serve, checkpoint_dir=directory.absolute()),
        directory=None if is_digits or arguments.working_dir is not None else os.getcwd(),
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=arguments.gpus_per_worker or 0,
        bind_host=_LOOPBACK if is_new else None,
        must_be_new=arguments.fresh,
    )
    return lambda _, on_message: RayCluster(config, on_message)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and those after the first `--`."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="ma-launch",
        usage="ma-launch [--ps K|auto] [--workers N] [--engine local|ray] ... -- digits|SCRIPT [ARGS...]",
        description="Starts parameter servers and their workers as processes of this machine, on loopback, or on the\n"
        "nodes of a Ray cluster, and ends all of them when the workers are done.",
        epilog=_EXAMPLES,
        formatter_class=help_format,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--ps",
        type=flag_types.or_auto(flag_types.count),
        default=1,
        metavar="K",
        help="parameter servers, each with a part of the model; auto: one for every two cores that the workers leave "
        "(with ray: for every node), at least one and at most as many as workers (%(default)s)",
    )
    parser.add_argument(
        "--workers", type=flag_types.count, default=2, metavar="N", help="worker processes (%(default)s)"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="write the run's files to DIR/<time>/; those of a script are the losses that it reports, and their "
        "curves (%(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=(_LOCAL, _RAY),
        default=_LOCAL,
        help="where they run: processes of this machine, or the nodes of a Ray cluster (%(default)s)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="refuse to continue from the center that an earlier run has left in --checkpoint-dir",
    )
    parser.add_argument(
        "--max-restarts",
        type=flag_types.whole,
        metavar="N",
        help="how many times to restart each worker that fails or is killed (0: its failure ends the run); with ray: "
        f"each server, and each worker, that is killed or whose node dies ({_RAY_MAX_RESTARTS})",
    )
    parser.add_argument(
        "--no-page",
        dest="page",
        action="store_false",
        help="serve no page that shows the run; with ray there is none",
    )
    group = parser.add_argument_group("servers", _SERVERS_HELP)
    add_serve_flags(group, without={"max_workers"})
    _add_ray_flags(parser)
    return parser


def _add_ray_flags(parser: argparse.ArgumentParser) -> None:
    """Adds them without defaults, so that `main` notices one that is given without Ray."""
    group = parser.add_argument_group("with --engine ray")
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of the Ray cluster; local: a new one on this machine (the cluster that Ray finds, otherwise local)",
    )
    group.add_argument(
        "--working-dir",
        type=Path,
        metavar="DIR",
        help="copy this directory with SCRIPT in it to the nodes and start the workers there (they start in the "
        "directory where ma-launch was started, which has to be there on all nodes)",
    )
    group.add_argument(
        "--cpus-per-worker", type=flag_types.count, metavar="N", help="cores to reserve for a worker (1)"
    )
    group.add_argument("--gpus-per-worker", type=flag_types.whole, metavar="N", help="GPUs to reserve for a worker (0)")


def _digits_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="ma-launch -- digits",
        description="Trains a small network on scikit-learn's handwritten digits, in all workers together; then, for\n"
        "comparison, with plain averages instead of outer steps, and in one worker alone, on its part of the images\n"
        "and on all of them. Shows all four, and writes center.safetensors, summary.json, metrics.jsonl, curves.png\n"
        "and TensorBoard events.",
        epilog=_DIGITS_EXAMPLES,
        formatter_class=help_format,
    )
    add_training_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
