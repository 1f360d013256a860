"""Chromium without a window, driven over its own DevTools pipe: real clicks and keys, and no package to install.

Messages are JSON ended by a zero byte, on the descriptors 3 (to the browser) and 4 (from it).
"""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-default-apps --disable-sync --remote-debugging-pipe"
)
_PATIENCE = 60.0  # seconds


def find_chromium() -> str | None:
    """A browser on the path, or the one that playwright keeps."""
    if found := next(filter(None, map(shutil.which, _NAMES)), None):
        return found
    kept = Path.home() / ".cache" / "ms-playwright"
    return next(
        (str(path) for path in sorted(kept.glob("chromium*/chrome-*/*")) if path.name in ("chrome", "headless_shell")), None
    )


class Chromium:
    """One page; ``events`` are all messages that nobody asked for."""

    def __init__(self, executable: str, profile: Path) -> None:
        ours, self._write = _high_pipe()
        self._read, theirs = _high_pipe()

        def wire() -> None:
            os.dup2(ours, 3)
            os.dup2(theirs, 4)

        command = [executable, *_OPTIONS.split(), f"--user-data-dir={profile}", "about:blank"]
        with (profile / "stderr").open("wb") as log:
            self._process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=wire, stdout=log, stderr=log)
        os.close(ours)
        os.close(theirs)
        self._buffer, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result; ``RuntimeError`` when the browser refuses it."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps({"id": self._count, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, path: Path) -> None:
        """Load a page and wait for it; ``events`` start afresh."""
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not self.seen("Page.loadEventFired"):
            self.events.append(self._next())
        self.evaluate("new Promise(done => setTimeout(done, 50))")  # what the page started reports by then

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; ``RuntimeError`` when it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def click(self, element: str) -> None:
        """Press and release the mouse in the middle of the element that a JavaScript expression names."""
        find = f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center', inline: 'center'}}); "
        box = self.evaluate(find + "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press Enter or Tab."""
        code = {"Enter": 13, "Tab": 9}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def shape(self, width: int, *, dark: bool = False, height: int = 900) -> None:
        """The size of the window in pixels, and the colour scheme that the reader prefers."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, *, whole: bool = False) -> Image.Image:
        """What is to be seen, or the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def seen(self, method: str) -> list[dict[str, Any]]:
        """The parameters of the events of one kind."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def complaints(self) -> list[str]:
        """Messages of the console, uncaught errors and violated policies."""
        logged = [entry["entry"]["text"] for entry in self.seen("Log.entryAdded")]
        said = [str(call["args"]) for call in self.seen("Runtime.consoleAPICalled")]
        return logged + said + [str(thrown["exceptionDetails"]) for thrown in self.seen("Runtime.exceptionThrown")]

    def requests(self) -> list[str]:
        """The addresses of all requests, those that a policy blocked included."""
        return [sent["request"]["url"] for sent in self.seen("Network.requestWillBeSent")]

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._write)
        os.close(self._read)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(end - time.monotonic(), 0))
            data = os.read(self._read, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError(f"the browser says nothing (exit code {self._process.poll()})")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def _high_pipe() -> tuple[int, int]:
    """A pipe on descriptors above 9, so that 3 and 4 are free in the child."""
    low = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return read, write
