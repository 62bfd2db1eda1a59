"""Runs a Python script as `python SCRIPT [ARGS...]` does, but goes on when its output can no longer be written.

`python run_script.py SCRIPT [ARGS...]`: a program of its own, because the script has to be the process's main module.
"""

from __future__ import annotations

import io
import os
import sys
from importlib.machinery import SourceFileLoader

__all__ = ["main"]


def main() -> None:
    """Runs what the arguments name; returns, or raises, as the script does."""
    del sys.argv[0]
    script = sys.argv[0]
    if not getattr(sys.flags, "safe_path", False):  # in Python's safe-path mode (3.11) there is no such entry
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    from modelaverage.logs import keep_logging
    from modelaverage.runtime.output import OnLoss

    keep_logging("ps-worker", OnLoss.GO_ON)
    path = os.path.abspath(script)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    news = {"__file__": path, "__doc__": None, "__loader__": SourceFileLoader("__main__", path)}
    namespace = sys.modules["__main__"].__dict__  # this module's own; only local names survive the next lines
    for name in [name for name in namespace if not name.startswith("__")] + ["__all__"]:
        del namespace[name]
    namespace.update(news)
    exec(code, namespace)


if __name__ == "__main__":
    main()
