"""Faults for a job on test hosts (bench/hosts.py), each as a context during which it lasts.

Some faults (a mount, a frozen disk, a cgroup) outlive the process that causes them. A second process waits for the end
of this program, however it comes, and undoes them.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.hosts import Host, Network, port_to

__all__ = ["DATA_PORT", "FAULTS", "Fault", "Scene"]

DATA_PORT = 2223
# A link that carries smaller packets than its ends assume, like a tunnel whose ICMP messages are filtered.
_HOLE_FROM_BYTES = 600
_DISK_BYTES = 256 << 20
_CGROUPS = Path("/sys/fs/cgroup/pids")  # as of cgroups v1


@dataclass
class Scene:
    """Where a fault happens.

    Args:
        network: the workers' hosts, and the server's, which is the last.
        directory: for files; removed afterwards.
        server_pid: set once the server runs.
        worker_pids: set once the workers run.
    """

    network: Network
    directory: Path
    server_pid: int = 0
    worker_pids: list[int] = field(default_factory=list)

    @property
    def workers(self) -> list[Host]:
        """The workers' hosts."""
        return self.network.hosts[:-1]

    @property
    def server(self) -> Host:
        """The server's host."""
        return self.network.hosts[-1]

    @property
    def down(self) -> list[str]:
        """The switch's ports through which bytes go from the server to workers."""
        return [port_to(host) for host in self.workers]

    @property
    def up(self) -> list[str]:
        """The switch's ports through which bytes go to the server."""
        return [port_to(self.server)]


@dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        name: its name in the table.
        lasts_s: how long it lasts.
        quick_s: the same with --quick.
        happen: lets the fault happen to a running job while the context lasts.
        prepare: sets up what has to exist before the job starts; returns flags for the server.
        one_host: as for `Seat`.
    """

    name: str
    lasts_s: float
    quick_s: float
    happen: Callable[[Scene], AbstractContextManager[None]]
    prepare: Callable[[Scene, ExitStack], Sequence[str]] = lambda _, __: ()
    one_host: bool = False


# Packets.


@contextmanager
def _losing(network: Network, ports: Sequence[str], from_bytes: int) -> Iterator[None]:
    for port in ports:
        network.lose(port, from_bytes)
    yield
    for port in ports:
        network.lose(port, None)


def _detour(scene: Scene, senders: Sequence[Host], which: str) -> None:
    """Bytes of data connections from these hosts take another bridge, `detour`, and return through its port `back`."""
    switch = scene.network.switch
    scene.network.add_bridge("detour")
    _ip(switch, "link add back type veth peer name forth")
    _ip(switch, "link set back master detour up")
    _ip(switch, "link set forth master bridge up")
    for number, host in enumerate(senders):
        _ip(switch, f"link add side{number} type veth peer name eth1 netns {host.pid}")
        _ip(switch, f"link set side{number} master detour up")
        _ip(host, "link set eth1 up")
        _ip(host, "route add 10.0.0.0/24 dev eth1 table 100")
        _ip(host, f"rule add ipproto tcp {which} {DATA_PORT} lookup 100")


def _ip(host: Host, command: str) -> None:
    host.run("ip", *command.split())


def _detour_down(scene: Scene, _: ExitStack) -> Sequence[str]:
    _detour(scene, [scene.server], "sport")
    return ()


def _detour_up(scene: Scene, _: ExitStack) -> Sequence[str]:
    _detour(scene, scene.workers, "dport")
    return ()


# Processes.


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def _without_descriptors(pid: int) -> Iterator[None]:
    """The process keeps what it has, and gets none."""
    soft, hard = _limits(pid)
    _run("prlimit", f"--pid={pid}", f"--nofile=1:{hard}")
    yield
    _run("prlimit", f"--pid={pid}", f"--nofile={soft}:{hard}")


def _limits(pid: int) -> list[str]:
    command = ["prlimit", f"--pid={pid}", "--nofile", "--noheadings", "--output=SOFT,HARD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@contextmanager
def _without_threads(pid: int) -> Iterator[None]:
    """The process keeps what it has, and gets none."""
    group = _CGROUPS / f"bench-waits-{os.getpid()}"
    # A cgroup can be removed once it is empty: its processes have ended, or are moved out first.
    undo = 'for p in $(cat "$1/cgroup.procs"); do echo $p > "$1/../cgroup.procs"; done; rmdir "$1"'
    with _undone_by(undo, str(group)):
        group.mkdir()
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield


# The disk.


def _disk(scene: Scene, cleanup: ExitStack) -> Sequence[str]:
    """A disk of its own for checkpoints."""
    image, disk = scene.directory / "image", scene.directory / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    _run("mkfs.ext4", "-q", str(image))
    cleanup.enter_context(_undone_by('fsfreeze -u "$1"; umount -l "$1"', str(disk)))
    _run("mount", "-o", "loop", str(image), str(disk))
    return "--checkpoint-dir", str(disk / "checkpoints")


def _checkpoints(scene: Scene, _: ExitStack) -> Sequence[str]:
    return "--checkpoint-dir", str(scene.directory / "checkpoints")


@contextmanager
def _frozen(scene: Scene) -> Iterator[None]:
    disk = str(scene.directory / "disk")
    _run("fsfreeze", "-f", disk)
    yield
    _run("fsfreeze", "-u", disk)


@contextmanager
def _undone_by(script: str, argument: str) -> Iterator[None]:
    """Runs these shell commands at the end of the context, or when this process ends."""
    undoing = subprocess.Popen(
        ["sh", "-c", f"cat; {script}", "sh", argument],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert undoing.stdin is not None
    try:
        yield
    finally:
        undoing.stdin.close()
        undoing.wait()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _lost(ways: Callable[[Scene], Sequence[str]], from_bytes: int) -> Callable[[Scene], AbstractContextManager[None]]:
    return lambda scene: _losing(scene.network, ways(scene), from_bytes)


FAULTS = (
    Fault("large packets lost down", 40, 30, _lost(lambda scene: scene.down, _HOLE_FROM_BYTES)),
    Fault("large packets lost up", 40, 30, _lost(lambda scene: scene.up, _HOLE_FROM_BYTES)),
    Fault("large packets lost down, data port", 60, 30, _lost(lambda _: ["back"], _HOLE_FROM_BYTES), _detour_down),
    Fault("large packets lost up, data port", 60, 30, _lost(lambda _: ["back"], _HOLE_FROM_BYTES), _detour_up),
    Fault("black hole down", 40, 15, _lost(lambda scene: scene.down, 0)),
    Fault("black hole up", 40, 15, _lost(lambda scene: scene.up, 0)),
    Fault("server stopped", 35, 15, lambda scene: _stopped(scene.server_pid)),
    Fault("worker stopped", 35, 15, lambda scene: _stopped(scene.worker_pids[-1])),
    Fault("descriptors gone", 20, 8, lambda scene: _without_descriptors(scene.server_pid), _checkpoints, True),
    Fault("threads gone", 20, 8, lambda scene: _without_threads(scene.server_pid), _checkpoints, True),
    Fault("disk frozen", 60, 15, _frozen, _disk),
)
