"""docker/compose.yaml on a real engine, as a project of the test's own."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["BUILD_TIMEOUT_S", "FOLDER", "Compose", "Container", "crash", "docker", "no_engine", "until"]

FOLDER = Path(__file__).parents[1] / "docker"
# An image installs packages from the network.
BUILD_TIMEOUT_S = 1200.0
TIMEOUT_S = 120.0


def docker(*arguments: str, environ: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """The output of the command. Raises AssertionError with its output if it fails."""
    done = subprocess.run(
        ["docker", *arguments],
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@functools.cache
def no_engine() -> str:
    """Why no engine with Compose can be used; empty if one can."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    for arguments in (["info"], ["compose", "version"]):
        try:
            subprocess.run(["docker", *arguments], capture_output=True, timeout=20, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return f"`docker {' '.join(arguments)}` does not work: no engine answers"
    return ""


def until(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Asks again and again, for a bounded time, until the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.5)


@dataclass(frozen=True)
class Container:
    """A container as the engine describes it."""

    name: str
    running: bool
    exit_code: int
    restarts: int
    pid: int


class Compose:
    """A project; its containers, networks and volumes are removed after the context.

    Args:
        name: of the project.
        environ: what the file reads.
        files: besides compose.yaml.
        profile: the profile to enable; None: none.
    """

    def __init__(
        self, name: str, environ: Mapping[str, str], files: tuple[str, ...] = (), profile: str | None = None
    ) -> None:
        self._name = name
        self._environ = environ
        self._arguments = ["compose", "--project-name", name]
        for file in ("compose.yaml", *files):
            self._arguments += ["--file", str(FOLDER / file)]
        if profile is not None:
            self._arguments += ["--profile", profile]

    def __enter__(self) -> Compose:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(self("ps", "--all"), self.logs()[-10_000:], sep="\n")
        self("down", "--volumes", "--timeout", "5")

    def __call__(self, *arguments: str, timeout_s: float = TIMEOUT_S) -> str:
        return docker(*self._arguments, *arguments, environ=self._environ, timeout_s=timeout_s)

    def up(self, *arguments: str) -> None:
        """Starts what is not running, and returns."""
        self("up", "--detach", "--no-build", *arguments)

    def containers(self, service: str) -> list[Container]:
        """The containers of a service, by number."""
        names = self("ps", "--all", "--quiet", service).split()
        described: list[dict[str, Any]] = json.loads(docker("inspect", *names)) if names else []
        return sorted(
            (
                Container(
                    each["Name"].removeprefix("/"),
                    each["State"]["Running"],
                    each["State"]["ExitCode"],
                    each["RestartCount"],
                    each["State"]["Pid"],
                )
                for each in described
            ),
            key=lambda container: container.name,
        )

    def wait_for_end(self, service: str = "worker") -> list[Container]:
        """All of a service's containers, once none of them runs or is about to be started again."""
        until(lambda: all(not c.running and c.exit_code == 0 for c in self.containers(service)), f"{service} ends well")
        return self.containers(service)

    def logs(self, *services: str) -> str:
        """What services have printed."""
        return self("logs", "--no-color", *services)

    def step(self, *flags: str) -> int:
        """The server's `global_step`."""
        status = json.loads(self("exec", "-T", "ps", "ps-server", "status", "localhost:2222", "--json", *flags))
        return int(status.get("global_step", 0))

    def read(self, volume: str, path: str) -> bytes:
        """A file of a volume."""
        done = subprocess.run(
            ["docker", "run", "--rm", "--volume", f"{self._name}_{volume}:/it:ro", "--entrypoint", "cat"]
            + ["torch-model-average-ps", f"/it/{path}"],
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        return done.stdout

    def files(self, volume: str) -> list[str]:
        """Names of the files in a volume."""
        mount = f"{self._name}_{volume}:/it:ro"
        return docker("run", "--rm", "--volume", mount, "--entrypoint", "ls", "torch-model-average-ps", "/it").split()


def crash(container: Container) -> None:
    """Kills the container's process as the kernel does when memory runs out, without asking the engine."""
    code = f"import os; os.kill({container.pid}, 9)"
    docker(
        *("run", "--rm", "--pid=host", "--user", "root", "--entrypoint", "python"),
        *("torch-model-average-ps", "-c", code),
    )
