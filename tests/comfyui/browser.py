"""A headless Chromium with one page, driven by playwright: the browser of CHROMIUM or one on the path."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
CALL_SECONDS = 120
QUIET_SECONDS = 0.4


def find_chromium() -> str | None:
    named = os.environ.get("CHROMIUM")
    return named or next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def open_page(url: str, size: tuple[int, int]) -> Iterator[QuietPage]:
    """A page of `size` pixels at a URL."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(CALL_SECONDS * 1000)
        quiet = QuietPage(page)
        page.goto(url)
        yield quiet
        browser.close()


class QuietPage:
    """A page that knows when it is done with what it was asked."""

    def __init__(self, page: Page):
        self.page = page
        self._under_way: set[Request] = set()
        self._last_change = time.monotonic()
        page.on("request", self._began)
        page.on("requestfinished", self._ended)
        page.on("requestfailed", self._ended)

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression; a promise is awaited."""
        return self.page.evaluate(script)

    def wait_for(self, condition: str, seconds: float = CALL_SECONDS) -> None:
        self.page.wait_for_function(f"() => Boolean({condition})", timeout=seconds * 1000)

    def screenshot(self, quality: int) -> bytes:
        """The visible page as JPEG."""
        return self.page.screenshot(type="jpeg", quality=quality)

    def settle(self) -> None:
        """Wait until the page has asked its server for nothing, and awaited nothing, for QUIET_SECONDS."""
        self._last_change = time.monotonic()
        end = self._last_change + CALL_SECONDS
        while time.monotonic() < end:
            # a callback of an idle page: what was queued before it is done
            self.page.evaluate("new Promise(done => requestIdleCallback(done))")
            if not self._under_way and time.monotonic() - self._last_change > QUIET_SECONDS:
                return
            self.page.wait_for_timeout(50)
        raise TimeoutError(f"not quiet after {CALL_SECONDS} s: {[request.url for request in self._under_way]}")

    def _began(self, request: Request) -> None:
        self._under_way.add(request)
        self._last_change = time.monotonic()

    def _ended(self, request: Request) -> None:
        self._under_way.discard(request)
        self._last_change = time.monotonic()
