"""What a command loads before it does anything: `--help` is there at once, and the client needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "not_loaded"),
    [
        ("ps_server.__main__", ("grpc", "google.protobuf", "numpy", "asyncio")),
        ("ma_client", ("torch", "matplotlib", "rich", "aiohttp")),
    ],
)
def test_importing_it_loads_none_of_what_it_does_not_need(module: str, not_loaded: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {not_loaded!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
