"""What the table of waits counts; its faults happen, and are over afterwards."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest

from bench.hosts import Network, port_to, unavailable_because
from bench.told import Deed, Line, Transcript
from bench.trouble import FAULTS
from bench.waits import evaluate, measure

FROM_S, OVER_S, NOW_S = 100.0, 140.0, 200.0


def did(who: str, from_s: float, to_s: float, **fields: object) -> Line:
    deed = Deed(**{"what": "push", "from_s": from_s, "to_s": to_s, **fields})  # type: ignore[arg-type]
    return Line(to_s, who, json.dumps(asdict(deed)), deed)


def said(who: str, at_s: float, text: str = "it waits") -> Line:
    return Line(at_s, who, text, None)


BEFORE = [did("worker-0", 98, 99), did("worker-1", 98, 99), did("reader", 98, 99)]
AFTERWARDS = [did("worker-0", 145, 146), did("worker-1", 145, 146), did("reader", 146, 147)]


def test_the_longest_wait_is_a_call_and_the_longest_silence_is_between_two_words_of_the_job() -> None:
    lines = [
        *BEFORE,
        said("server", 110),
        said("reader", 120, "not of the job"),
        said("worker-1", 130, "the last word"),
        did("worker-0", 99, 139),
        did("worker-1", 99, 141, error="late"),
        *AFTERWARDS,
    ]
    row = evaluate("it", lines, FROM_S, OVER_S, NOW_S, recovered=True)
    assert (row.silence_s, row.wait_s, row.who, row.said) == (20.0, 42.0, "worker-1", "the last word")
    assert (row.ended, row.recovered_after_s, row.errors, row.right) == (True, 7.0, 1, True)


def test_a_wait_that_still_lasts_has_no_end() -> None:
    row = evaluate("it", [*BEFORE, did("worker-0", 99, 101)], FROM_S, OVER_S, NOW_S, recovered=False)
    assert (row.wait_s, row.ended, row.silence_s, row.recovered_after_s) == (101.0, False, 99.0, None)


def test_one_wrong_value_is_enough() -> None:
    lines = [*BEFORE, did("reader", 120, 121, right=False), *AFTERWARDS]
    assert not evaluate("it", lines, FROM_S, OVER_S, NOW_S, recovered=True).right


REASON = unavailable_because()
where_hosts_can_be = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@where_hosts_can_be
def test_a_fault_happens_to_a_job_and_the_job_goes_on() -> None:
    (stopped,) = (fault for fault in FAULTS if fault.name == "worker stopped")
    transcript = Transcript()
    row = measure(stopped, 1.0, transcript)
    assert row.right
    assert 0.5 < row.wait_s < 20.0
    assert row.recovered_after_s is not None


SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for size in (1, 500, 1000, 2):
        sender.sendto(bytes(size), (sys.argv[1], 5000))
"""
RECEIVE = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
    receiver.bind(("", 5000))
    print("ready", flush=True)
    sizes = []
    while 2 not in sizes:
        sizes.append(len(receiver.recv(2000)))
    print(*sizes, flush=True)
"""


@where_hosts_can_be
def test_a_hole_loses_large_packets_one_way_and_no_others() -> None:
    def got(sender: int, receiver: int) -> str:
        listening = network.hosts[receiver].popen([sys.executable, "-c", RECEIVE])
        assert listening.stdout is not None
        assert listening.stdout.readline() == "ready\n"
        network.hosts[sender].run(sys.executable, "-c", SEND, network.hosts[receiver].address)
        return listening.stdout.readline().strip()

    with Network(2, rate_mbit=100) as network:
        network.lose(port_to(network.hosts[1]), from_bytes=600)
        assert got(0, 1) == "1 500 2"
        assert got(1, 0) == "1 500 1000 2"
        network.lose(port_to(network.hosts[1]), None)
        assert got(0, 1) == "1 500 1000 2"
