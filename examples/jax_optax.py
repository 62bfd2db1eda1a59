"""A JAX model trained by optax on several workers: the session takes and returns nested parameters.

Needs `pip install jax optax` besides torch-model-average (no torch). Run it from the repository:

    ma-launch --workers 2 -- examples/jax_optax.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ma_client import ClusterSpec, ParameterServerSession

ROUNDS, INTERVAL_STEPS, BATCH_SIZE = 12, 25, 64
Params = Mapping[str, Any]


def points(count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Points of a square; class 1 inside a circle, class 0 outside."""
    x = jax.random.uniform(jax.random.key(seed), (count, 2), minval=-1.0, maxval=1.0)
    return x, (jnp.linalg.norm(x, axis=1) < 0.75).astype(jnp.float32)


def initial(seed: int) -> Params:
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {"kernel": jax.random.normal(first, (2, 32)), "bias": jnp.zeros(32)},
        "out": {"kernel": jax.random.normal(second, (32,)) / 32**0.5, "bias": jnp.zeros(())},
    }


def logits(params: Params, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits(params, x), y).mean()


def main() -> None:
    cluster = ClusterSpec.from_env()  # from the launcher's environment
    x, y = (part[cluster.task_index :: cluster.num_workers] for part in points(2000, seed=0))  # this worker's share
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(params, state, key):  # type: ignore[no-untyped-def]
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(x))
        updates, state = optimizer.update(jax.grad(loss)(params, x[rows], y[rows]), state)
        return optax.apply_updates(params, updates), state

    with ParameterServerSession.from_env() as session:
        params = initial(seed=cluster.task_index)
        if cluster.is_chief:
            session.initialize(params)
        params, _ = session.pull(expected=params)  # everyone starts from the center
        state = optimizer.init(params)  # moments stay local
        key = jax.random.key(1000 + cluster.task_index)
        for _ in range(ROUNDS):
            for _ in range(INTERVAL_STEPS):
                key, now = jax.random.split(key)
                params, state = step(params, state, now)
            result = session.push_and_average(params)
            params = result.center
            print(f"round {result.global_step}: loss {float(loss(params, x, y)):.3f}")
        session.finish()  # later rounds do not wait for this worker

    x, y = points(1000, seed=1)
    accuracy = float(((logits(params, x) > 0) == (y > 0.5)).mean())  # on every worker, params is now the center
    print(f"accuracy of the center: {accuracy:.3f}")


if __name__ == "__main__":
    main()
