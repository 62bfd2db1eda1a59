"""Trains the digits while processes are killed and stopped at random, and checks that nothing is lost: `make chaos`.

One parameter server and its workers run as processes. Every second, one of them is chosen at random and killed,
or stopped for a while; a process that ended is started again. With --squeeze, for some seconds the server also
gets no more descriptors or threads than it has; the workers are exempt, since they could not write their own log. The
workers log what they push and what they get. At the end every center has to be the average of one push of each worker,
and the model as good as that of a run without faults.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

from chaos.replay import MAX_WORKERS
from modelaverage.codecs import CODECS, RAW
from modelaverage.commands import flag_types
from modelaverage.outer import AVERAGE, OuterOptimizer, outer_optimizer

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=flag_types.count, default=200, help="planned rounds (%(default)s)")
    parser.add_argument(
        "--workers", type=int, choices=range(2, MAX_WORKERS + 1), default=4, help="how many (%(default)s)"
    )
    parser.add_argument("--seed", type=flag_types.whole, default=0, help="of the faults (%(default)s)")
    parser.add_argument(
        "--squeeze",
        action="store_true",
        help="the server also runs out of descriptors and threads now and then (threads: as root, on Linux with the "
        "pids controller of cgroup v1)",
    )
    parser.add_argument(
        "--faults-every-s",
        type=flag_types.seconds,
        default=1.0,
        help="seconds from one fault to the next (%(default)s)",
    )
    parser.add_argument(
        "--accuracy-points",
        type=flag_types.positive,
        default=1.0,
        help="by how much the test accuracy may differ from a run without faults (%(default)s)",
    )
    parser.add_argument(
        "--outer",
        type=_outer,
        default=AVERAGE,
        metavar="TEXT",
        help="the outer optimizer, such as sgd:lr=0.7,momentum=0.9,nesterov; needs --workers 2 (average)",
    )
    parser.add_argument(
        "--compression",
        choices=["none", *(name for name in CODECS if name != RAW.name)],
        default="none",
        help="the codec of the job; the workers then use different transports (%(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("runs/chaos.json"), help="the report; a picture lies beside it (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.outer != AVERAGE and arguments.workers != 2:
        parser.error("with --outer give --workers 2: more have several orders of summation, which are not replayed")
    if arguments.outer != AVERAGE and arguments.compression != "none":
        parser.error("give --outer or --compression: which of the pushes were coded is not certain enough for a state")
    # gRPC's own log would be full of lost connections. A process that has threads cannot be forked safely.
    os.environ.update(GRPC_VERBOSITY="NONE", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    # Both processes, this one and the one that the others are forked from, import torch, at the same time.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["chaos.preload"])
    forkserver.ensure_running()
    from chaos.runs import Settings, run

    try:
        return 0 if run(Settings(**vars(arguments))) else 1
    except KeyboardInterrupt:
        return 130


def _outer(text: str) -> OuterOptimizer:
    try:
        return outer_optimizer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
