from __future__ import annotations

import ctypes
import json
import os


def opts():
    return list(json.loads(os.environ.get("OPTS", "{}")).items())


def malloc():
    m = json.loads(os.environ.get("MALLOPT", "{}"))
    if m:
        libc = ctypes.CDLL(None)
        for k, v in m.items():
            assert libc.mallopt(int(k), int(v)) == 1, (k, v)
