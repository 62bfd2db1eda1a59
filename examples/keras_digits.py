"""A Keras model trained on several workers: its variables are averaged as named numpy arrays.

Needs `pip install keras scikit-learn` besides torch-model-average, and a backend: torch, unless the environment names
another. Run it from the repository:

    ma-launch --workers 2 -- examples/keras_digits.py
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")  # before keras is imported

import keras
import numpy as np
from sklearn.datasets import load_digits

from ma_client import ClusterSpec, ParameterServerSession

ROUNDS, INTERVAL_STEPS, BATCH_SIZE, TEST_ROWS = 8, 40, 32, 360


class EveryInterval(keras.callbacks.Callback):  # type: ignore[misc]
    """Makes a round with the other workers after every ``INTERVAL_STEPS`` batches."""

    def __init__(self, session: ParameterServerSession) -> None:
        super().__init__()
        self._session = session
        self._local_step = 0

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        self._local_step += 1
        if self._local_step % INTERVAL_STEPS == 0:
            result = self._session.push_and_average(values(self.model), local_step=self._local_step)
            install(self.model, result.center)
            loss = float((logs or {}).get("loss", np.nan))
            print(f"round {result.global_step}: loss {loss:.3f}")
            self.model.stop_training = result.global_step >= ROUNDS


def values(model: keras.Model) -> dict[str, Any]:
    """The variables to average, by path; the optimizer's moments stay local."""
    return {variable.path: keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables}


def install(model: keras.Model, center: Mapping[str, Any]) -> None:
    for variable in model.trainable_variables:
        variable.assign(center[variable.path])


def main() -> None:
    cluster = ClusterSpec.from_env()  # from the launcher's environment
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order] / 16, y[order]
    rows = slice(TEST_ROWS + cluster.task_index, None, cluster.num_workers)  # this worker's share

    keras.utils.set_random_seed(cluster.task_index)
    layers = [keras.layers.Dense(64, "relu", name="hidden"), keras.layers.Dense(10, name="out")]
    model = keras.Sequential([keras.Input((64,)), *layers], name="digits")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    with ParameterServerSession.from_env() as session:
        if cluster.is_chief:
            session.initialize(values(model))
        center, _ = session.pull(expected=values(model))  # everyone starts from the center
        install(model, center)
        steps = ROUNDS * INTERVAL_STEPS
        epochs = -(-steps * BATCH_SIZE // len(x[rows])) + 1  # more than enough: the callback stops the training
        model.fit(x[rows], y[rows], BATCH_SIZE, epochs, verbose=0, callbacks=[EveryInterval(session)])
        session.finish()  # later rounds do not wait for this worker

    _, accuracy = model.evaluate(x[:TEST_ROWS], y[:TEST_ROWS], verbose=0)  # now the center, on every worker
    print(f"accuracy of the center: {accuracy:.3f}")


if __name__ == "__main__":
    main()
