"""Cases: models of every kind, and how they lie in the flat buffer and its fragments."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from modelaverage.conformance.case import case
from modelaverage.conformance.lines import Arrays
from modelaverage.conformance.miss import check
from modelaverage.conformance.models import average, fragments_of, like, mixed, vector
from modelaverage.conformance.stage import Stage
from modelaverage.conformance.worker import check_center, check_pushed

__all__: list[str] = []


def _play(stage: Stage, arrays: Arrays, fragment_size_bytes: int = 64, global_step: int = 0) -> None:
    """The client sets this center, pulls it, and averages other values with a peer."""
    server = stage.server(2)
    worker, peer = stage.worker(server.address), stage.peer(server.address)
    initialized = worker.initialize(arrays, global_step, fragment_size_bytes)
    check("initialize", (initialized.by_this_call, initialized.global_step), (True, global_step))
    fragments = fragments_of(arrays, fragment_size_bytes)
    check("the server's center", peer.pull(), (global_step, b"".join(fragments)))
    pulled = worker.pull()
    check("global_step", pulled.global_step, global_step)
    check_center(pulled.center, arrays)
    mine, theirs = like(arrays, 1), like(arrays, 2)
    worker.begin_push(mine)
    peer.push(fragments_of(theirs, fragment_size_bytes), global_step)
    check_pushed(worker.pushed(), "committed", global_step + 1, "a peer", average(mine, theirs))


@case
def _float32_is_averaged(stage: Stage) -> None:
    _play(stage, vector(40))


@case
def _float64_is_averaged(stage: Stage) -> None:
    _play(stage, vector(20, dtype=np.float64))


@case
def _float16_is_averaged(stage: Stage) -> None:
    _play(stage, vector(80, dtype=np.float16))


@case
def _bfloat16_is_averaged(stage: Stage) -> None:
    _play(stage, vector(80, dtype=ml_dtypes.bfloat16))


@case
def _all_types_stand_in_one_model(stage: Stage) -> None:
    _play(stage, mixed())


@case
def _averages_of_16_bits_are_rounded_once(stage: Stage) -> None:
    server = stage.server(2)
    worker, peer = stage.worker(server.address), stage.peer(server.address)
    # Averages halfway between two float16 values, and sums that float16 cannot hold.
    half = np.array([1, 1 + 2**-10, 60000, -60000, 2**-24], np.float16)
    other = np.array([1 + 2**-10, 1 + 2**-9, 61000, -61000, 0], np.float16)
    brain, other_brain = (array.astype(np.float32).astype(ml_dtypes.bfloat16) for array in (half, other))
    mine: Arrays = {"half": half, "brain": brain}
    theirs: Arrays = {"half": other, "brain": other_brain + np.array(2**-7, ml_dtypes.bfloat16)}
    worker.initialize(mine)
    worker.pull()
    worker.begin_push(mine)
    peer.push(fragments_of(theirs), 0)
    check_pushed(worker.pushed(), "committed", 1, "a peer", average(mine, theirs))


@case
def _every_bit_comes_back(stage: Stage) -> None:
    server = stage.server()
    worker, peer = stage.worker(server.address), stage.peer(server.address, "chief")
    patterns = np.arange(1 << 16, dtype=np.uint16)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan]
    arrays: Arrays = {
        "half": patterns.view(np.float16),
        "brain": patterns.view(ml_dtypes.bfloat16),
        "w": np.array([*odd, 1e-45, 3.4e38], np.float32),
        "b": np.array([*odd, 5e-324, 1.7e308], np.float64),
        "quiet": np.array([0xFFC0_0001, 0x7FC1_2345], np.uint32).view(np.float32),
    }
    peer.initialize(arrays, fragment_size_bytes=4096)
    check_center(worker.pull().center, arrays)


@case
def _a_scalar_has_one_element(stage: Stage) -> None:
    _play(stage, {"s": np.array(3.5, np.float32)})


@case
def _a_variable_may_be_empty(stage: Stage) -> None:
    _play(stage, {"none": np.zeros((3, 0, 2), np.float16), "w": np.ones(3, np.float32), "last": np.zeros(0)})


@case
def _a_model_may_have_only_empty_variables(stage: Stage) -> None:
    _play(stage, {"none": np.zeros((3, 0), np.float32), "nothing": np.zeros(0, np.float64)})


@case
def _shapes_are_kept(stage: Stage) -> None:
    deep = np.arange(6, dtype=np.float32).reshape((1,) * 30 + (2, 3))
    _play(stage, {"deep": deep, "column": deep.reshape(6, 1), "row": deep.reshape(1, 6), "one": np.ones(1)})


@case
def _names_are_utf_8(stage: Stage) -> None:
    names = ["größe", "重み/層.0", "🙂", "a b:c,d", "-", "e\u0301", "n" * 1024]
    _play(stage, {name: np.full(2, number, np.float32) for number, name in enumerate(names)})


@case
def _the_order_is_the_manifest_s(stage: Stage) -> None:
    _play(stage, {name: np.full(3, number, np.float32) for number, name in enumerate("zamby")})


@case
def _variables_start_at_multiples_of_8(stage: Stage) -> None:
    sizes = (1, 2, 3, 4, 5, 7, 8, 9)
    _play(stage, {f"v{size}": np.arange(size).astype(np.float16) for size in sizes} | {"b": np.ones(2)}, 16)


@case
def _fragments_may_end_in_padding(stage: Stage) -> None:
    _play(stage, {"a": np.ones(3, np.float16), "b": np.ones(1), "c": np.ones(1, np.float32)}, 8)


@case
def _the_last_fragment_may_be_short(stage: Stage) -> None:
    _play(stage, vector(33))


@case
def _the_last_fragment_may_be_full(stage: Stage) -> None:
    _play(stage, vector(32))


@case
def _the_last_fragment_may_lack_one_element(stage: Stage) -> None:
    _play(stage, vector(31))


@case
def _a_model_may_be_smaller_than_a_fragment(stage: Stage) -> None:
    _play(stage, vector(3), 2 << 20)


@case
def _a_model_may_have_many_fragments(stage: Stage) -> None:
    _play(stage, vector(1001), 8)


@case
def _a_model_may_have_several_mib(stage: Stage) -> None:
    _play(stage, {**vector((5 << 18) + 3), "b": np.arange(7, dtype=np.float64)}, 2 << 20)


@case
def _global_step_may_start_above_0(stage: Stage) -> None:
    _play(stage, vector(3), global_step=41)


@case
def _global_step_may_exceed_2_to_the_53(stage: Stage) -> None:
    _play(stage, vector(3), global_step=2**53 + 1)
