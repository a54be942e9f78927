"""The page in a real browser (Debian's chromium and chromium-driver, over WebDriver); skipped where absent."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analysis.report import write_report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Where a browser is required, as in CI, the tests fail without one instead of skipping.
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER or os.environ.get("REQUIRE_BROWSER")), reason="chromium and chromedriver are not installed"
)


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
        deadline = time.monotonic() + 60  # on a busy machine the driver may answer before the page is whole
        while self.run("return document.readyState") != "complete" and time.monotonic() < deadline:
            time.sleep(0.05)

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


# Each column of each table, pressed once and again: does what is known rise, then fall, and is what is missing last?
SORTED = """
const wrong = [];
const key = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort.replace("inf", "Infinity"));
};
const rises = (left, right) =>
  typeof left === "number" && typeof right === "number" ? left <= right
  : String(left).localeCompare(String(right), "en", {numeric: true}) <= 0;
for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    for (const direction of ["ascending", "descending"]) {
      heading.querySelector("button").click();
      const all = [...table.tBodies[0].rows].map((row) => key(row, column));
      const known = all.filter((value) => value !== -Infinity);
      const ordered = direction === "ascending" ? known : [...known].reverse();
      const right = ordered.every((value, place) => place === 0 || rises(ordered[place - 1], value));
      const last = all.slice(0, known.length).every((value) => value !== -Infinity);
      const marks = [...table.querySelectorAll("[aria-sort]")];
      if (!right || !last || marks.length !== 1 || heading.getAttribute("aria-sort") !== direction) {
        wrong.push([table.parentElement.id, column, direction, all]);
      }
    }
  });
}
return [document.querySelectorAll("table").length, wrong];
"""


@needs_browser
def test_every_table_sorts_both_ways(browser: Browser, small_report: Path) -> None:
    browser.open(small_report)
    num_tables, wrong = browser.run(SORTED)
    assert num_tables >= 8 and wrong == []


@needs_browser
def test_a_click_on_a_heading_sorts(browser: Browser, small_report: Path) -> None:
    """A real click, which must reach the heading: nothing lies over it."""
    browser.open(small_report)
    place = "document.querySelectorAll('#table-tasks th button')[6].getBoundingClientRect()"
    browser.run("document.querySelector('#table-tasks').scrollIntoView({block: 'center', behavior: 'instant'})")
    final = "return [...document.querySelectorAll('#table-tasks tbody tr')].map(row => row.cells[6].textContent)"
    seen = []
    for _ in range(2):
        across, down = browser.run(f"const box = {place}; return [box.x + box.width / 2, box.y + box.height / 2]")
        for kind in ("mousePressed", "mouseReleased"):
            where = {"type": kind, "x": across, "y": down, "button": "left", "clickCount": 1}
            browser.devtools("Input.dispatchMouseEvent", where)
        seen.append([float(text) for text in browser.run(final)])
    assert seen[0] == sorted(seen[0]) and seen[1] == seen[0][::-1]


@needs_browser
def test_the_first_screen_holds_the_verdict_the_numbers_and_the_matrix(browser: Browser, small_report: Path) -> None:
    browser.open(small_report, 1280, 900)
    ends = "return ['.verdict', '.numbers', '#figure-score_matrix svg'].map(one => "
    ends += "document.querySelector(one).getBoundingClientRect().bottom)"
    verdict, numbers, matrix = browser.run(ends)
    assert verdict < numbers < matrix <= 900
    assert browser.run("return document.querySelectorAll('.numbers > div').length") == 6
    assert browser.run(
        "return [...document.querySelectorAll('.numbers .beside')].every(one => / to /.test(one.innerText))"
    )


@needs_browser
def test_nothing_is_asked_of_any_network(browser: Browser, small_report: Path) -> None:
    browser.open(small_report)
    assert browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []


@needs_browser
def test_figures_stay_legible_on_a_phone(browser: Browser, small_report: Path) -> None:
    """What is wider than the screen scrolls inside its card, rather than shrink until nobody can read it."""
    browser.open(small_report, 390)
    smallest = "return Math.min(...[...document.querySelectorAll('figure svg')].map(svg => "
    smallest += "svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))"  # CSS pixels a point of 1/72 inch
    assert 7 * browser.run(smallest) > 6.5  # the smallest type of any figure, in pixels
    boxes = "return [...document.querySelectorAll('.card, .table-box')].every(box => "
    boxes += "box.scrollWidth <= box.clientWidth || getComputedStyle(box).overflowX === 'auto')"
    assert browser.run(boxes)


def lightness(browser: Browser, path: Path, selector: str) -> float:
    """Return the mean lightness of an element as it is painted, 0 to 255."""
    box = browser.run(
        f"const b = document.querySelector('{selector}').getBoundingClientRect(); "
        "return [b.x + scrollX, b.y + scrollY, b.width, b.height]"
    )
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
    shot = browser.devtools("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))
    with Image.open(path) as picture:
        return float(np.asarray(picture.convert("L"), dtype=float).mean())


@needs_browser
def test_figures_are_dark_on_a_dark_page(browser: Browser, small_report: Path, tmp_path: Path) -> None:
    found = {}
    for scheme in ("light", "dark"):
        browser.open(small_report, scheme=scheme)
        found[scheme] = lightness(browser, tmp_path / f"{scheme}.png", "#figure-score_curves .card")
    assert found["light"] > 220 and found["dark"] < 60


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_prints_within_the_paper(browser: Browser, small_report: Path, scheme: str) -> None:
    """A4 less its margins is 182 mm, 688 pixels; what is dark on a screen is dark on white on paper."""
    browser.open(small_report, 688)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.devtools("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert browser.run("return document.documentElement.scrollWidth") <= 688
    wide = "return [...document.querySelectorAll('table, figure svg')].filter(one => "
    assert browser.run(wide + "one.getBoundingClientRect().right > 689).length") == 0
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return getComputedStyle(document.querySelector('figure svg')).filter") == "none"
    printed = browser.devtools("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    browser.devtools("Emulation.setEmulatedMedia", {"media": ""})


@needs_browser
def test_planted_markup_stays_text(browser: Browser, make_run: Callable[..., Path]) -> None:
    planted = '<img src=x onerror="window.planted = 1"><script>window.planted = 2</script>'
    names = [f"a{planted}", "b</style></svg><b>&amp;"]
    run = make_run(names=names, instructions=[planted, "'\">" + planted], num_atoms=4, num_rows=20, num_steps=6)
    browser.log()
    browser.open(write_report(run), 390)
    assert browser.run("return [window.planted ?? 0, document.images.length, document.scripts.length]") == [0, 0, 1]
    assert browser.run("return document.querySelectorAll('b, svg script, svg img').length") == 0
    cells = "return [...document.querySelectorAll('#table-stages tbody tr')].map(row => row.cells[2].innerText)"
    assert planted in browser.run(cells)
    assert browser.run("return document.querySelector('#table-tasks tbody tr').cells[1].innerText") == names[0]
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.log() == []


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
