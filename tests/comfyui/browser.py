"""A headless Chromium, driven over its DevTools protocol: enough to load ComfyUI's page and ask it things.

https://chromedevtools.github.io/devtools-protocol/ and RFC 6455 for the socket.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
START_SECONDS, CALL_SECONDS = 60, 120
TEXT_FRAME, PING_FRAME = 1, 9


def find_chromium() -> str | None:
    """The browser of CHROMIUM, or one on the path."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for path in map(shutil.which, NAMES) if path), None)


class PageError(Exception):
    """The browser refused a call, or a script on the page threw."""


class Browser:
    """`with Browser(folder for its profile) as browser: page = browser.open(url)`."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1920, 1080)):
        self.profile, self.size = profile, size
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Browser:
        executable = find_chromium()
        assert executable is not None, "no Chromium: set CHROMIUM to its path"
        width, height = self.size
        flags = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-port=0", f"--user-data-dir={self.profile}", f"--window-size={width},{height}",
        )  # fmt: skip
        self._process = subprocess.Popen(
            [executable, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)

    def open(self, url: str) -> Page:
        request = urllib.request.Request(f"http://127.0.0.1:{self._port()}/json/new?{url}", method="PUT")
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            target = json.loads(answer.read())
        return Page(target["webSocketDebuggerUrl"])

    def _port(self) -> int:
        place = self.profile / "DevToolsActivePort"
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if place.exists() and "\n" in (text := place.read_text(encoding="ascii")):
                return int(text.splitlines()[0])
            time.sleep(0.1)
        raise TimeoutError("Chromium did not open its DevTools port")


class Page:
    """One tab."""

    def __init__(self, url: str):
        self._socket = WebSocket(url)
        self._last = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A DevTools call and its result."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.receive())
            if message.get("id") == self._last:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                return dict(message["result"])

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = CALL_SECONDS) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.evaluate(f"Boolean({condition})"):
                return
            time.sleep(0.2)
        raise TimeoutError(f"not after {seconds} s: {condition}")

    def screenshot(self, quality: int = 85) -> bytes:
        """The visible page as JPEG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="jpeg", quality=quality)["data"])


class WebSocket:
    """A client of RFC 6455, for text messages."""

    def __init__(self, url: str):
        place = urlsplit(url)
        self._socket = socket.create_connection((place.hostname or "", place.port or 80), timeout=CALL_SECONDS)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {place.path} HTTP/1.1", f"Host: {place.netloc}", "Upgrade: websocket", "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        )  # fmt: skip
        self._socket.sendall("\r\n".join(lines).encode())
        self._file = self._socket.makefile("rb")
        status = self._file.readline()
        if b" 101 " not in status:
            raise PageError(f"{url}: {status.decode(errors='replace').strip()}")
        while self._file.readline().strip():
            pass

    def send(self, text: str) -> None:
        data = text.encode()
        if len(data) < 126:
            size = struct.pack("!B", 0x80 | len(data))
        elif len(data) < 2**16:
            size = struct.pack("!BH", 0x80 | 126, len(data))
        else:
            size = struct.pack("!BQ", 0x80 | 127, len(data))
        # a mask is required of clients, but any one will do
        self._socket.sendall(struct.pack("!B", 0x80 | TEXT_FRAME) + size + bytes(4) + data)

    def receive(self) -> str:
        """The next whole message."""
        parts = []
        while True:
            final, kind, data = self._frame()
            if kind == PING_FRAME:
                continue  # the browser does not insist on an answer
            parts.append(data)
            if final:
                return b"".join(parts).decode()

    def _frame(self) -> tuple[bool, int, bytes]:
        first, second = self._file.read(2)
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack("!H", self._file.read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self._file.read(8))
        return bool(first & 0x80), first & 0x0F, self._file.read(length)
