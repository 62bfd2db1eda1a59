"""The command `ps-worker`: the only place that reads its flags."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelaverage import __version__
from modelaverage.commands import flag_types
from modelaverage.commands.parser import OneLineParser, help_format
from modelaverage.commands.security_flags import add_security_flags, security_of
from modelaverage.commands.slow import says_if_slow
from modelaverage.logs import event, keep_logging, log_json
from modelaverage.outer import AVERAGE
from modelaverage.runtime.output import OnLoss
from ps_worker.commands import run_script
from ps_worker.commands.extras import MissingExtraError, require
from ps_worker.commands.stop_signals import StoppedBySignal, end_cleanly_on_signals
from ps_worker.curves.command import add_curves_command
from ps_worker.demo.digits_config import MODULES, PLAIN, DigitsConfig, add_training_flags
from ps_worker.events.parse import EVENTS_FLAG

if TYPE_CHECKING:
    from ma_client.cluster.spec import ClusterSpec

__all__ = ["main"]

_log = logging.getLogger("ps_worker")

_RUN_EXAMPLES = """\
examples, for a server on host ps that was started with --num-workers 2:
  ps-worker run --ps-hosts ps:2222 --num-workers 2 --task-index 0 train.py --epochs 3     on one machine: the chief
  ps-worker run --ps-hosts ps:2222 --num-workers 2 --task-index 1 train.py --epochs 3     on another
  MA_PS_HOSTS=ps:2222 MA_NUM_WORKERS=2 MA_TASK_INDEX=1 ps-worker run train.py             the same
  srun --ntasks 2 ps-worker run --ps-hosts ps:2222 train.py                               both, under Slurm
  ps-worker run --ps-hosts ps:2222 --task-index auto train.py                             the server says which it is
  ps-worker run --ps-hosts ps0:2222,ps1:2222 --num-workers 2 --task-index 0 train.py      two servers, half of it each
"""
_DIGITS_EXAMPLES = """\
examples:
  ps-server serve --num-workers 2                                                     in one terminal
  ps-worker digits --ps-hosts 127.0.0.1:2222 --num-workers 2 --task-index 0           in the next: the chief
  ps-worker digits --ps-hosts 127.0.0.1:2222 --num-workers 2 --task-index 1           in a third
  srun --ntasks 2 ps-worker digits --ps-hosts HOST:2222                               both, under Slurm
  ps-worker digits --alone                                                            half of the images, no server
  ps-worker digits --alone --all-images                                               all of them
  ps-worker digits --ps-hosts ... --outer sgd:lr=0.5,momentum=0.5,nesterov            the same for all workers
  ps-worker digits --ps-hosts ... --compression int8                                  a quarter of the bytes
"""
_CLUSTER_HELP = """\
What is not given here is taken from the environment: MA_PS_HOSTS, MA_NUM_WORKERS and MA_TASK_INDEX; TF_CONFIG;
torchrun; Slurm; a Kubernetes indexed job. What is read must agree; docs/cluster.md says what is read.
"""
_PARTS_ALONE = 2


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    # Nothing here needs cleaning up: Ctrl-C ends the process at once, even in the middle of an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # gRPC's own log would answer a server that is not there with a page of C++; set before it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    keep_logging("ps-worker")
    arguments = _parser().parse_args(argv)
    keep_logging("ps-worker", OnLoss.GO_ON)
    from modelaverage.errors import ModelAverageError

    as_json = getattr(arguments, "log_json", False)
    if as_json:
        log_json("ps-worker")
    try:
        arguments.run(arguments)
    except (MissingExtraError, ModelAverageError, OSError, ValueError) as error:
        if as_json:
            _log.error("%s", error, extra=event("failed", cause=str(error)))
        else:
            print(f"ps-worker: {error}", file=sys.stderr)
        return 1
    except StoppedBySignal as stop:
        if as_json:
            _log.warning("%s", stop, extra=event("stopped", cause=str(stop)))
        elif getattr(arguments, "events_fd", None) is None:  # the launcher says why it stops its workers
            print(f"ps-worker: {stop}", file=sys.stderr)
        return stop.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="ps-worker", description="One worker of a model-averaging job.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "run",
        help="run your training script as one worker",
        description="Runs a Python script with the cluster in its environment (MA_PS_HOSTS, MA_NUM_WORKERS,\n"
        "MA_TASK_INDEX), where ClusterSpec.from_env(), ParameterServerSession.from_env() and\n"
        "ModelAverageOptimizer find it.",
        epilog=_RUN_EXAMPLES,
        formatter_class=help_format,
    )
    _add_cluster_flags(command)
    add_security_flags(command)
    command.add_argument("script", type=flag_types.existing_file, metavar="SCRIPT", help="a Python file")
    command.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    command.set_defaults(run=_run)

    command = commands.add_parser(
        "digits",
        help="train the built-in workload as one worker",
        description="Trains a small network on scikit-learn's handwritten digits, each worker on its own part.",
        epilog=_DIGITS_EXAMPLES,
        formatter_class=help_format,
    )
    _add_cluster_flags(command)
    add_security_flags(command)
    command.add_argument(
        "--connect-timeout-s",
        type=flag_types.seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for the server to answer (%(default)g)",
    )
    command.add_argument(
        "--alone",
        action="store_true",
        help=f"no server: train alone on the images of worker 0 of {_PARTS_ALONE} (or --task-index of --num-workers)",
    )
    command.add_argument(
        "--all-images", action="store_true", help="with --alone: train on all images instead of a worker's part"
    )
    command.add_argument(
        "--plain-averages",
        action="store_true",
        help="with --alone: play all workers and their server in this process, with the plain average of each round",
    )
    command.add_argument(
        "--save-center", type=Path, metavar="FILE", help="the chief writes the last center to this file (safetensors)"
    )
    command.add_argument(
        "--log-json", action="store_true", help="every line is a JSON object; docs/observability.md has the fields"
    )
    command.add_argument(EVENTS_FLAG, type=flag_types.whole, help=argparse.SUPPRESS)
    add_training_flags(command)
    command.set_defaults(run=_digits)
    add_curves_command(commands)
    return parser


def _add_cluster_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("cluster", _CLUSTER_HELP)
    group.add_argument(
        "--ps-hosts",
        type=flag_types.ps_hosts,
        metavar="HOST:PORT[,...]",
        help="address of the parameter server; if there are several, of each, in the same order for all workers",
    )
    group.add_argument("--num-workers", type=flag_types.count, metavar="N", help="how many workers the job has")
    group.add_argument(
        "--task-index",
        type=flag_types.or_auto(flag_types.whole),
        metavar="I",
        help="which worker this one is, from 0; 0 is the chief, which initializes the center; auto: the server hands "
        "out the lowest that is free",
    )
    group.add_argument(
        "--init-from",
        metavar="FILE",
        help="the chief sets the center to the values in this file instead of its own: what `ps-server export` wrote, "
        "or any safetensors file or torch.save'd state dict that has all variables",
    )
    group.add_argument(
        "--fresh",
        action="store_true",
        dest="must_be_new",
        help="the chief refuses to continue from a center that an earlier run has left; leave it out to restart a "
        "killed chief",
    )


def _run(arguments: argparse.Namespace) -> None:
    from ma_client.cluster.spec import ClusterSpec

    variables = ClusterSpec.env_for_child(**_cluster_flags(arguments))
    command = [sys.executable, run_script.__file__, str(arguments.script), *arguments.args]
    os.execvpe(command[0], command, {**os.environ, **variables, **security_of(arguments).to_env()})


def _digits(arguments: argparse.Namespace) -> None:
    end_cleanly_on_signals()
    config = DigitsConfig.from_flags(arguments)
    if arguments.all_images and not arguments.alone:
        raise ValueError("--all-images needs --alone: in a cluster every worker has its part")
    if arguments.plain_averages and (arguments.all_images or not arguments.alone):
        raise ValueError("--plain-averages needs --alone without --all-images; in a cluster give --outer average")
    is_plain = arguments.events_fd is None and not arguments.log_json
    cluster = None if arguments.alone else _cluster_of(arguments, _say if is_plain else _say_nothing)
    if arguments.save_center is not None and not os.access(arguments.save_center.parent, os.W_OK):
        raise ValueError(f"--save-center: cannot write to the directory {str(arguments.save_center.parent)!r}")
    require(MODULES)
    if is_plain:
        if cluster is not None:
            print(f"ps-worker: outer optimizer {config.outer}, compression {config.compression}")
        print("ps-worker: importing torch ...", flush=True)
    from ps_worker.demo import digits
    from ps_worker.demo.play import play
    from ps_worker.events.sinks import reporter

    report = reporter(arguments.events_fd, config.steps, arguments.log_json)
    num_workers = _PARTS_ALONE if arguments.num_workers is None else arguments.num_workers
    if cluster is None and arguments.plain_averages:
        play(config, num_workers, AVERAGE, PLAIN, report)
    elif cluster is None:
        index = _alone_index(arguments.task_index)
        digits.train_alone(config, num_workers, index, report, arguments.all_images)
    else:
        digits.train_in_cluster(
            config,
            cluster,
            report,
            arguments.connect_timeout_s,
            arguments.save_center,
            security_of(arguments),
            _say if is_plain else _say_nothing,
        )


def _say(line: str) -> None:
    print(f"ps-worker: {line}", file=sys.stderr, flush=True)


def _say_nothing(_: str) -> None:
    pass


def _alone_index(task_index: int | str | None) -> int:
    if task_index == "auto":
        raise ValueError("--task-index auto asks a server, and --alone has none; give a number")
    return int(task_index or 0)


def _cluster_of(arguments: argparse.Namespace, say: Callable[[str], None]) -> ClusterSpec:
    from ma_client.cluster.spec import ClusterSpec

    with says_if_slow(say, "waits for the parameter server to assign a task index"):
        return ClusterSpec.resolve(
            **_cluster_flags(arguments), join_timeout_s=arguments.connect_timeout_s, security=security_of(arguments)
        )


def _cluster_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(arguments, name) for name in ("ps_hosts", "num_workers", "task_index", "init_from", "must_be_new")
    }


if __name__ == "__main__":
    sys.exit(main())
