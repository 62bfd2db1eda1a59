"""Descriptors: how many a server needs, what it logs when there are too few, and how soon it answers again."""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from ma_client import ParameterServerSession
from modelaverage.access.channels import Access
from modelaverage.access.security import Security, Tls
from ps_server.console.status import fetch
from ps_server.machine.descriptors import check_limit, raise_limit
from tests.certificates import Authority
from tests.launched import Launched
from tests.test_limits import serving

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

INFINITY = resource.RLIM_INFINITY
LIMIT = 48
# gRPC alone would take 30 s, and longer if more have piled up.
ANSWER_TIMEOUT_S = 15.0
# A client's first words in HTTP/2: gRPC takes it for a client.
FIRST_WORDS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
WITH_LIMITS = """
import resource, sys
soft, hard = map(int, sys.argv.pop(1).split(":"))
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from ps_server.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def limited(directory: Path, soft: int, hard: int, *flags: str) -> Iterator[tuple[Launched, str]]:
    """A server that is started with these limits, and its address."""
    with serving(directory, *flags, program=("-c", WITH_LIMITS, f"{soft}:{hard}")) as (server, address):
        yield server, address


def open_in(server: Launched) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, 4096),
        (1024, 1_000_000_000, 1 << 16),
        (1024, INFINITY, 1 << 16),
        (1 << 20, 1 << 20, 1 << 20),  # never lowered
        (1 << 20, INFINITY, 1 << 20),
        (INFINITY, INFINITY, INFINITY),
        (64, 64, 64),
    ],
)
def test_the_soft_limit_becomes_the_hard_one_within_reason(
    soft: int, hard: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: now.append(limits))
    raise_limit()
    assert now[-1] == (expected, hard)


def test_a_server_raises_its_limit_and_says_nothing_where_that_suffices(tmp_path: Path) -> None:
    with limited(tmp_path, 64, 512, "--num-workers", "40") as (server, _):
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (512, 512)
        assert "descriptors" not in server.printed()


def test_a_server_says_at_the_start_what_its_workers_may_need(tmp_path: Path) -> None:
    with limited(tmp_path, 48, 100, "--num-workers", "40") as (server, _):
        warning = re.search(
            r"40 workers may need (\d+) descriptors.*the limit is 100.*`ulimit -n (\d+)`", "\n".join(server.errors)
        )
        assert warning is not None, server.printed()
        assert warning[1] == warning[2]
        assert int(warning[1]) > 120
        assert "the hard limit, 100, has to be raised" in server.printed()


def test_what_is_needed_is_what_workers_take(tmp_path: Path) -> None:
    model = {"w": np.zeros(1 << 20, np.float32)}
    for flags, has_memory in (((), True), (("--no-shared-memory",), False)):
        with ExitStack() as stack:
            server, address = stack.enter_context(serving(tmp_path, "--num-workers", "1", *flags))
            alone = open_in(server)
            session = stack.enter_context(ParameterServerSession([address], worker_id="w", is_chief=True))
            session.initialize(model)
            for _ in range(3):  # the data connection is opened beside the first push
                session.push_and_average(model)
            taken = open_in(server) - alone
            needed = [check_limit(workers, has_memory, True, open_now=0) for workers in (0, 1)]
            assert taken <= needed[1]
            assert 2 <= needed[1] - needed[0] <= 3


def flood(address: str, count: int, words: bytes) -> list[socket.socket]:
    host, _, port = address.rpartition(":")
    connections = []
    for _ in range(count):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(words)
        connections.append(connection)
    return connections


def test_strangers_that_say_nothing_do_not_keep_a_server_deaf(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.sign("server")
    # With TLS, gRPC gives them two minutes for their first bytes by default, half a minute as it is set here.
    flags = ("--num-workers", "1", "--tls-cert", str(own.cert), "--tls-key", str(own.key))
    with ExitStack() as stack:
        server, address = stack.enter_context(limited(tmp_path, LIMIT, LIMIT, *flags))
        for connection in flood(address, LIMIT, b""):
            stack.enter_context(connection)
        server.wait_for("all 48 descriptors are in use")
        assert fetch(address, ANSWER_TIMEOUT_S, Access(Security(Tls(authority.ca)))).num_workers == 1
        assert server.printed().count("are in use") == 1


def test_a_server_answers_soon_after_hundreds_that_waited_have_gone(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server, address = stack.enter_context(limited(tmp_path, LIMIT, LIMIT, "--num-workers", "1"))
        held = flood(address, LIMIT, FIRST_WORDS)
        server.wait_for("all 48 descriptors are in use")
        # They come, wait, and give up; gRPC would accept them one after the other, about 25 a second.
        for connection in flood(address, 1000, FIRST_WORDS) + held:
            connection.close()
        assert fetch(address, ANSWER_TIMEOUT_S, Access(Security())).num_workers == 1
        server.wait_for("descriptors are free again")
        said = re.search(r"again, after (\d+) s; (\d+) connections were turned away", server.printed())
        assert said is not None
        assert int(said[2]) > 500
        assert server.printed().count("are in use") == 1
