"""Test hosts on this machine: network namespaces on one bridge, each behind a link of a limited rate.

For root on Linux (a user namespace's root will do) with ip and tc (iproute2), nsenter and unshare (util-linux). The
namespaces have no names: each lives as long as a process in it, and all of those die with this one, however it ends.
The machine's own network is not touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ps_worker.engines import leash

__all__ = ["INTERFACE", "Host", "Network", "port_to", "unavailable_because"]

INTERFACE = "eth0"
"""The name of every host's interface to its link."""
# The kernel hands packets of up to 64 KiB to the queue. It splits those that are larger than the burst, which costs
# four times as much. 5 ms of packets are about what a port of a small switch holds.
_BURST_BYTES = 131072
_QUEUE = f"burst {_BURST_BYTES}b latency 5ms"
# A slow link lets no more than this through at once.
_SLOW_BURST_BYTES = 16384
_TOOLS = ("ip", "tc", "nsenter", "unshare")
# Tried once in a namespace that ends immediately: is it allowed, and does the kernel support what we need?
_PROBE = (
    "ip link add name bridge0 type bridge && ip link add name veth0 type veth peer name veth1 && "
    f"tc qdisc add dev veth0 root tbf rate 1gbit {_QUEUE}"
)


def unavailable_because() -> str | None:
    """Why this machine cannot have test hosts; None if it can."""
    if sys.platform != "linux":
        return "test hosts are network namespaces, which only Linux has"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root; `unshare --map-root-user --net COMMAND` may do"
    probe = subprocess.run(["unshare", "--net", "sh", "-c", _PROBE], capture_output=True, text=True)
    return f"network namespaces: {probe.stderr.strip()}" if probe.returncode else None


class Host:
    """A network namespace, which has an address once it is linked. `close` ends it.

    Raises:
        OSError: the namespace cannot be made.
    """

    def __init__(self, address: str = "") -> None:
        self.address = address
        self._processes: list[subprocess.Popen[str]] = []
        keeper = self._start([_path("unshare"), "--net", "sh", "-c", "echo made; exec sleep infinity"])
        assert keeper.stdout is not None
        if keeper.stdout.readline() != "made\n":
            self.close()
            raise OSError("unshare --net has failed")
        self.pid = keeper.pid

    def popen(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Starts a command on this host, its stdout a pipe. It is killed when this host or this process ends."""
        return self._start([_path("nsenter"), *self._enter, *command])

    def run(self, *command: str) -> None:
        """Runs a command on this host to its end. Raises CalledProcessError."""
        subprocess.run(["nsenter", *self._enter, *command], check=True)

    def close(self) -> None:
        """Ends all processes on this host, which ends the host."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with process:  # waits for its end and closes the pipe
                pass

    @property
    def _enter(self) -> tuple[str, str]:
        return f"--net=/proc/{self.pid}/ns/net", "--"

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        leashed = [sys.executable, "-I", "-S", str(Path(leash.__file__)), str(os.getpid()), *command]
        # A new session, so that Ctrl-C reaches only this process, which then ends what it has started.
        process = subprocess.Popen(
            leashed, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._processes.append(process)
        return process


class Network:
    """``num_hosts`` hosts on one bridge; each can send and, at the same time, receive ``rate_mbit`` megabits a second.

    Args:
        num_hosts: 1 to 254; their addresses start at 10.0.0.1.
        rate_mbit: of every link, in each direction.
        congestion_control: of TCP on the hosts. Every kernel has "reno", and every namespace may choose it; Linux's
            default, "cubic", behaves the same on such short paths.
        queue_bytes: how much may queue before every link, as in a slow modem; None: 5 ms of packets, as in a small
            switch. Such a queue is in the switch, on the way to a host: in a sending host the kernel would keep it
            short (TCP small queues). What a host sends is limited where it arrives.

    Attributes:
        hosts: linked to the switch.
        switch: where the bridge is.

    Raises:
        CalledProcessError: the machine cannot have them; `unavailable_because` tells the reason in advance.

    Example:
        >>> with Network(2, rate_mbit=1000) as network:
        ...     server = network.hosts[0].popen(["iperf3", "--server"])
        ...     network.hosts[1].run("iperf3", "--client", network.hosts[0].address)
    """

    def __init__(
        self, num_hosts: int, rate_mbit: float, congestion_control: str = "reno", queue_bytes: int | None = None
    ) -> None:
        self.hosts: list[Host] = []
        self.switch: Host
        self._num_hosts, self._rate_mbit = num_hosts, rate_mbit
        self._congestion_control = congestion_control
        self._queue = _QUEUE if queue_bytes is None else f"burst {_SLOW_BURST_BYTES}b limit {queue_bytes}b"

    def __enter__(self) -> Network:
        with contextlib.ExitStack() as cleanup:
            self.switch = switch = Host()
            cleanup.callback(switch.close)
            self.add_bridge("bridge")
            for number in range(1, self._num_hosts + 1):
                host = Host(f"10.0.0.{number}")
                cleanup.callback(host.close)
                self._link(switch, host, port_to(host))
                self.hosts.append(host)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def add_bridge(self, name: str) -> None:
        """Adds a host to the switch."""
        self.switch.run("ip", "link", "add", name, "type", "bridge")
        self.switch.run("ip", "link", "set", name, "up")

    def lose(self, port: str, from_bytes: int | None) -> None:
        """The switch silently drops packets of at least this size on that port; None: it drops none."""
        # A token bucket that is smaller than a packet never lets it through.
        burst = _BURST_BYTES if from_bytes is None else max(8, from_bytes)
        queue = f"root tbf rate {self._rate_mbit}mbit burst {burst}b latency 5ms".split()
        self.switch.run("tc", "qdisc", "replace", "dev", port, *queue)

    def slow_down(self, rate_mbit: float, queue_bytes: int) -> None:
        """Changes the rate of all links and the size of the queues before them."""
        limit = f"root tbf rate {rate_mbit}mbit burst {_SLOW_BURST_BYTES}b limit {queue_bytes}b".split()
        for host in self.hosts:
            self.switch.run("tc", "qdisc", "replace", "dev", port_to(host), *limit)
            host.run("tc", "qdisc", "del", "dev", INTERFACE, "root")

    def _link(self, switch: Host, host: Host, port: str) -> None:
        peer = ("peer", "name", INTERFACE, "netns", str(host.pid))
        switch.run("ip", "link", "add", port, "type", "veth", *peer)
        switch.run("ip", "link", "set", port, "master", "bridge", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "link", "set", INTERFACE, "up")
        # The file belongs to the namespace of the process that opens it.
        host.run("sh", "-c", 'echo "$1" > /proc/sys/net/ipv4/tcp_congestion_control', "sh", self._congestion_control)
        # A queue limits what goes out: one at each end of the cable.
        switch.run("tc", "qdisc", "add", "dev", port, *f"root tbf rate {self._rate_mbit}mbit {self._queue}".split())
        if self._queue == _QUEUE:
            host.run("tc", "qdisc", "add", "dev", INTERFACE, *f"root tbf rate {self._rate_mbit}mbit {_QUEUE}".split())


def port_to(host: Host) -> str:
    """The switch's interface to a host."""
    return f"port{host.address.rpartition('.')[2]}"


def _path(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        raise FileNotFoundError(f"{tool} not found")
    return path
