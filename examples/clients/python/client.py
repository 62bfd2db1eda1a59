"""A worker in Python, over the session of `ma_client`. What its two commands do says ../README.md.

    python examples/clients/python/client.py conform 127.0.0.1:2222 worker-1
    python examples/clients/python/client.py train --server 127.0.0.1:2222 --worker-id worker-1 \
        --data digits.csv --part 1/4 --rounds 100
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ma_client import ParameterServerSession
from modelaverage.errors import ConflictError, ModelAverageError, ServerUnavailableError
from modelaverage.v1 import parameter_server_pb2 as pb

Arrays = Mapping[str, NDArray[Any]]

# The conformance kit: a line in, a line out.

TYPES = {"f32": np.dtype("<f4"), "f64": np.dtype("<f8"), "f16": np.dtype("<f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
RECONNECT_TIMEOUT_S = 20.0


class Conformer:
    """Obeys the commands of the conformance kit, a method each."""

    def __init__(self, address: str, worker_id: str) -> None:
        self._address, self._worker_id = address, worker_id
        self._center: Arrays = {}

    @cached_property
    def _session(self) -> ParameterServerSession:
        return self._open()

    def _open(self, fragment_size_bytes: int | None = None) -> ParameterServerSession:
        return ParameterServerSession(
            [self._address],
            worker_id=self._worker_id,
            is_chief=True,
            reconnect_timeout_s=RECONNECT_TIMEOUT_S,
            fragment_size_bytes=fragment_size_bytes,
        )

    def initialize(self, global_step: str, fragment_size_bytes: str, *variables: str) -> str:
        # The size of fragments is the session's. One that only initializes says no goodbye.
        with self._open(int(fragment_size_bytes)) as session:
            done = session.initialize(dict(map(variable, variables)), int(global_step))
        return f"{'initialized' if done.initialized else 'already'} {done.global_step}"

    def pull(self, how: str) -> str:
        self._center, step = self._session.pull(wait_initialized=how == "wait")
        return f"{step}{words(self._center)}"

    def push(self, *values: str) -> str:
        local = {
            name: elements(data, value.dtype).reshape(value.shape)
            for (name, value), data in zip(self._center.items(), values, strict=True)
        }
        result = self._session.push_and_average(local)
        contributors = ",".join(result.contributors) or "-"
        return f"{result.outcome.name.lower()} {result.global_step} {contributors}{words(result.center)}"

    def status(self) -> str:
        status = self._session.status()
        return f"{pb.Phase.Name(status.phase).removeprefix('PHASE_').lower()} {status.global_step}"

    def leave(self) -> str:
        self._session.close()
        return ""

    def finish(self) -> str:
        self._session.finish()
        return ""


def conform(address: str, worker_id: str) -> None:
    conformer = Conformer(address, worker_id)
    for line in sys.stdin:
        command, *arguments = line.rstrip("\n").split(" ")
        try:
            answer = f"ok {getattr(conformer, command)(*arguments)}".rstrip(" ")
        except ModelAverageError as error:
            answer = f"error {name_of(error)} {' '.join(str(error).split())}"
        print(answer, flush=True)


def name_of(error: ModelAverageError) -> str:
    if isinstance(error, ServerUnavailableError):
        return error.status or "UNAVAILABLE"
    # What no server has called a conflict is one in what it sent.
    found_here = error.status is None and isinstance(error, ConflictError)
    if error.reason is not None and not found_here:
        return error.reason.name
    return error.status or "CLIENT"


def variable(word: str) -> tuple[str, NDArray[Any]]:
    name, type_, shape, data = word.split(":")
    extents = [int(extent) for extent in shape.split(",") if extent]
    return bytes.fromhex(name).decode(), elements(data, TYPES[type_]).reshape(extents)


def elements(data: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(b"" if data == "-" else bytes.fromhex(data), dtype)


def words(center: Arrays) -> str:
    return "".join(
        f" {name.encode().hex()}:{TYPE_NAMES[value.dtype]}:{','.join(map(str, value.shape))}:"
        f"{value.tobytes().hex() or '-'}"
        for name, value in center.items()
    )


# A worker that trains.

CLASSES = 10
STEPS_PER_ROUND = 10
LEARNING_RATE = 0.5
FRAGMENT_SIZE_BYTES = 1024
ROUNDS_PER_REPORT = 10


def train(arguments: argparse.Namespace) -> None:
    labels, inputs = read_digits(arguments.data)
    part, parts = arguments.part
    mine = np.arange(len(labels)) % parts == part
    with ParameterServerSession(
        [arguments.server],
        worker_id=arguments.worker_id,
        is_chief=arguments.chief,
        fragment_size_bytes=FRAGMENT_SIZE_BYTES,
    ) as session:
        if arguments.chief:
            session.initialize({"weights": np.zeros((inputs.shape[1], CLASSES)), "bias": np.zeros(CLASSES)})
        center, step = session.pull()
        rounds = 0
        while step < arguments.rounds:
            weights, bias = center["weights"].copy(), center["bias"].copy()
            for _ in range(STEPS_PER_ROUND):
                descend(weights, bias, inputs[mine], labels[mine])
            result = session.push_and_average({"weights": weights, "bias": bias})
            center, step, rounds = result.center, result.global_step, rounds + 1
            if step % ROUNDS_PER_REPORT == 0:
                report = f"{arguments.worker_id}: global_step {step}, accuracy {accuracy(center, inputs, labels):.4f}"
                print(report, file=sys.stderr)
        session.finish()
    print(
        f"{arguments.worker_id} (python): {rounds} rounds, global_step {step}, "
        f"accuracy {accuracy(center, inputs, labels):.4f}"
    )


def descend(weights: NDArray[Any], bias: NDArray[Any], inputs: NDArray[Any], labels: NDArray[Any]) -> None:
    """One step down the gradient of the mean cross-entropy, in place."""
    scores = inputs @ weights + bias
    wrong = np.exp(scores - scores.max(axis=1, keepdims=True))
    wrong /= wrong.sum(axis=1, keepdims=True)
    wrong[np.arange(len(labels)), labels] -= 1
    weights -= LEARNING_RATE * inputs.T @ wrong / len(labels)
    bias -= LEARNING_RATE * wrong.mean(axis=0)


def accuracy(center: Arrays, inputs: NDArray[Any], labels: NDArray[Any]) -> float:
    return float(np.mean((inputs @ center["weights"] + center["bias"]).argmax(axis=1) == labels))


def read_digits(path: str) -> tuple[NDArray[Any], NDArray[Any]]:
    rows = np.loadtxt(path, delimiter=",")
    return rows[:, 0].astype(int), rows[:, 1:] / 16


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 1/4")
    return int(part), int(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="A worker, or a client for the conformance kit.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("conform", help="let the conformance kit play this client")
    command.add_argument("address")
    command.add_argument("worker_id")
    command = commands.add_parser("train", help="train the digits as one worker")
    command.add_argument("--server", required=True, metavar="HOST:PORT")
    command.add_argument("--worker-id", required=True)
    command.add_argument("--data", required=True, metavar="CSV", help="what examples/clients/digits.py has written")
    command.add_argument("--part", required=True, type=_part, metavar="I/N", help="which of how many parts of the rows")
    command.add_argument("--rounds", required=True, type=int)
    command.add_argument("--chief", action="store_true", help="set the center, if it is not set yet")
    arguments = parser.parse_args()
    try:
        if arguments.command == "conform":
            conform(arguments.address, arguments.worker_id)
        else:
            train(arguments)
    except (ModelAverageError, OSError, ValueError) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
