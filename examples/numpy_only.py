"""Linear regression by hand, without torch. Each worker runs gradient descent on its own data; the server averages.

Run it from the repository:

    ma-launch --workers 2 -- examples/numpy_only.py
"""

from __future__ import annotations

import numpy as np

from ma_client import ClusterSpec, ParameterServerSession

ROUNDS, INTERVAL_STEPS, LEARNING_RATE = 10, 20, 0.1
TRUE_W, TRUE_B = np.array([2.0, -3.0]), 0.5


def main() -> None:
    random = np.random.default_rng(seed=ClusterSpec.from_env().task_index)  # every worker has its own data
    x = random.normal(size=(200, 2))
    y = x @ TRUE_W + TRUE_B + random.normal(scale=0.01, size=200)

    with ParameterServerSession.from_env() as session:
        if session.is_chief:
            session.initialize({"w": np.zeros(2), "b": np.zeros(())})
        center, _ = session.pull()  # waits for the chief
        for _ in range(ROUNDS):
            w, b = center["w"].astype(float), center["b"].astype(float)
            for _ in range(INTERVAL_STEPS):
                error = x @ w + b - y
                w = w - LEARNING_RATE * x.T @ error / len(x)
                b = b - LEARNING_RATE * error.mean()
            result = session.push_and_average({"w": w, "b": b})  # waits for the other workers
            center = result.center
            print(f"round {result.global_step}: error {np.square(error).mean():.5f}")
        session.finish()  # later rounds do not wait for this worker

    print(f"w {center['w'].round(3).tolist()}, b {center['b'].round(3).item()}")


if __name__ == "__main__":
    main()
