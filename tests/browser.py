"""A headless Chromium for tests of pages; tests that need it are skipped where none is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
)


@contextmanager
def open_page(url: str, width: int = 1200, height: int = 1400) -> Iterator[tuple[Any, list[str]]]:
    """A page at this address, and everything that went wrong on it: errors, failed requests, requests to elsewhere."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS.split())
        page = browser.new_page(viewport={"width": width, "height": height})
        faults: list[str] = []
        origin = url.partition("//")[2].partition("/")[0]
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("data:", "blob:", "file:")) or origin in request.url
                else faults.append(f"foreign: {request.url}")
            ),
        )
        page.goto(url)
        yield page, faults
        browser.close()
