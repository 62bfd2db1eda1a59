"""Writes scikit-learn's digits as the csv that the clients train on: a row is a label and 64 pixels from 0 to 16.

python examples/clients/digits.py digits.csv
"""

from __future__ import annotations

import sys

import numpy as np
from sklearn.datasets import load_digits


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python examples/clients/digits.py FILE.csv", file=sys.stderr)
        return 2
    pixels, labels = load_digits(return_X_y=True)
    try:
        np.savetxt(sys.argv[1], np.column_stack([labels, pixels]), fmt="%d", delimiter=",")
    except OSError as error:
        print(f"digits.py: cannot write {sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
