"""A headless Chromium, driven through a pipe: the DevTools protocol, of which tests need a handful of commands.

Neither a driver program nor a package is needed, and no port is opened.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Chromium", "Tab", "chromium", "executable"]

_TIMEOUT_S = 240.0  # axe looks at a page of 64 workers for half a minute on a slow machine
# The browser reads commands from descriptor 3 and writes answers to 4.
_START = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'


def executable() -> str | None:
    """Where Chromium is; None: not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class DevToolsError(Exception):
    """The browser refused a command, or a script in the page failed."""


class Chromium:
    """The browser. Commands wait for their answer; events that come meanwhile are kept."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self._process, self._commands, self._answers = process, commands, answers
        self._rest = b""
        self._last_id = 0
        self.events = list[dict[str, Any]]()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Runs a command. Raises DevToolsError."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            answer = self._next(deadline_s, method)
            if answer.get("id") != self._last_id:
                self.events.append(answer)
            elif "error" in answer:
                raise DevToolsError(f"{method}: {answer['error']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def tab(self) -> Tab:
        """A new tab, which reports its console and its requests."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable", session)
        return Tab(self, session, target)

    def _next(self, deadline_s: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise DevToolsError(f"{what}: no answer within {_TIMEOUT_S:.0f} s")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise DevToolsError(f"{what}: the browser has ended")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Runs a command of the DevTools protocol in this tab."""
        return self._browser.send(method, self._session, **params)

    def open(self, url: str) -> None:
        """Goes to a page; returns when its document has come."""
        answer = self.send("Page.navigate", url=url)
        if "errorText" in answer:
            raise DevToolsError(f"{url}: {answer['errorText']}")
        self.wait("document.readyState !== 'loading'")

    def look(self, width: int, height: int = 900, scheme: str = "light", motion: str = "no-preference") -> None:
        """The window's size in CSS pixels, and what the reader prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", motion)]
        self.send("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features])

    def value(self, script: str) -> Any:
        """What an expression gives; promises are awaited. Raises DevToolsError."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise DevToolsError(str(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def wait(self, condition: str, timeout_s: float = 30.0) -> None:
        """Returns once an expression is true. Raises DevToolsError with the page's text."""
        deadline_s = time.monotonic() + timeout_s
        while not self.value(condition):
            if time.monotonic() > deadline_s:
                text = self.value("document.body.innerText")
                raise DevToolsError(f"not within {timeout_s:.0f} s: {condition}\n{text[:2000]}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """The text of the first element, as a reader sees it."""
        found: str = self.value(f"document.querySelector({json.dumps(selector)}).innerText")
        return found.replace("\xa0", " ")

    def press(self, key: str) -> None:
        """A key, by its name in the DOM."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_CODES.get(key, 0))

    def move(self, x: float, y: float) -> None:
        """The mouse, in CSS pixels of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page, also below the window's end."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """What the console has told so far: errors, warnings, uncaught exceptions, violations of the policy."""
        self.value("1")
        found = list[str]()
        for event in self._events():
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", details).get("description", details["text"]))
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found

    def requests(self) -> list[str]:
        """The addresses of all requests so far."""
        self.value("1")
        return [
            event["params"]["request"]["url"]
            for event in self._events()
            if event["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        """Closes the tab."""
        self._browser.send("Target.closeTarget", targetId=self._target)

    def _events(self) -> Iterator[dict[str, Any]]:
        return (event for event in self._browser.events if event.get("sessionId") == self._session)


_CODES = {
    "Tab": 9,
    "Escape": 27,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


@contextmanager
def chromium() -> Iterator[Chromium]:
    """A browser without a window and with a profile of its own."""
    found = executable()
    assert found is not None
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        flags += ["--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--disable-dev-shm-usage"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to run its sandbox as root.
        process = subprocess.Popen(
            ["bash", "-c", _START, "bash", str(command_read), str(answer_write), found, *flags],
            pass_fds=(command_read, answer_write),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(command_read)
        os.close(answer_write)
        browser = Chromium(process, command_write, answer_read)
        try:
            yield browser
        finally:
            try:
                browser.send("Browser.close")
                process.wait(timeout=20)
            except (DevToolsError, OSError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()
            os.close(command_write)
            os.close(answer_read)
