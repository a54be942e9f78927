"""The page in a real browser (Debian's chromium and chromium-driver, over WebDriver); skipped where absent."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed")


class Browser:
    """The few WebDriver commands that these tests need."""

    def __init__(self, port: int) -> None:
        self.server = f"http://127.0.0.1:{port}"
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--force-device-scale-factor=1",
        ]
        options = {"args": arguments, "binary": BROWSER}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        found = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{found['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.server + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, page: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)
        self.devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self.call("POST", f"{self.session}/url", {"url": page.resolve().as_uri()})

    def devtools(self, command: str, params: dict[str, Any]) -> Any:
        return self.call("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": params})

    def run(self, script: str) -> Any:
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def log(self) -> list[dict[str, Any]]:
        return self.call("POST", f"{self.session}/se/log", {"type": "browser"})

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.devtools("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.call("DELETE", self.session)


def start_browser() -> tuple[subprocess.Popen[bytes], Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
            return driver, Browser(port)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    driver.terminate()
    raise RuntimeError("chromedriver did not start")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver, browser = start_browser()
    try:
        yield browser
        browser.close()
    finally:
        driver.terminate()
        driver.wait()


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_shows_every_figure(browser: Browser, small_report: Path, width: int, scheme: str) -> None:
    browser.log()
    browser.open(small_report, width, scheme=scheme)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    sizes = browser.run("return [...document.querySelectorAll('figure svg')].map(f => [f.clientWidth, f.clientHeight])")
    assert len(sizes) >= 14
    assert all(across > 150 and down > 80 for across, down in sizes)
    names = browser.run("return [...document.querySelectorAll('figure svg')].map(f => f.getAttribute('aria-label'))")
    assert all(len(name) > 20 for name in names)
    assert browser.log() == []


@needs_browser
def test_tables_sort_both_ways(browser: Browser, small_report: Path) -> None:
    browser.open(small_report)
    final = "return [...document.querySelectorAll('#table-tasks tbody tr')].map(row => row.cells[6].textContent)"
    press = "document.querySelectorAll('#table-tasks th button')[6].click(); "
    rising = [float(text) for text in browser.run(press + final)]
    assert rising == sorted(rising)
    falling = [float(text) for text in browser.run(press + final)]
    assert falling == rising[::-1]


@needs_browser
def test_every_link_of_the_contents_leads_somewhere(browser: Browser, small_report: Path) -> None:
    browser.open(small_report)
    leads = "document.querySelector(link.getAttribute('href'))"
    lost = browser.run(f"return [...document.querySelectorAll('nav a')].filter(link => !{leads}).length")
    assert lost == 0


@needs_browser
def test_no_two_elements_share_an_id(browser: Browser, small_report: Path) -> None:
    browser.open(small_report)
    script = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    assert browser.run(script) == 0
