"""The report in a real browser: nothing is fetched or run, nothing is logged, nothing sticks out, all can be read.

Contract: 1. no request but for the file itself and no message on the console; 2. the page is never wider than the
screen, tables scroll inside their boxes; 3. every link on the page leads somewhere; 4. text stands out in light and in
dark; 5. names from outside stay names.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from pipeline.verify.html import render
from tests.pipeline.report_documents import full, hostile, many_shards, strips

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

DESKTOP, PHONE = (1280, 900), (390, 844)
A4 = (718, 1040)  # between margins of one centimetre
DOCUMENTS = {
    "full": (full, strips),
    "hostile": (hostile, strips),
    "many": (many_shards, list),
    "bare": (lambda: {"run_id": "bare"}, list),
}

# Elements that stick out of the page, other than in a box of their own that scrolls.
STICKING_OUT = """
[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest(".scroll > *, .strip > *, svg > *")).map(e => e.outerHTML.slice(0, 120))
"""
DEAD_LINKS = """
[...document.querySelectorAll("a[href^='#']")].map(e => decodeURIComponent(e.hash.slice(1)))
  .filter(id => !document.getElementById(id))
"""
# Contrast of every text with the background that shows through, after WCAG 2.1; the least for body text is 4.5.
LOW_CONTRAST = """
(() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(parse(e.closest("svg") ? style.fill : style.color)), light(ground(e))];
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) found.push([contrast, e.outerHTML.slice(0, 120)]);
  }
  return found;
})()
"""


class Page:
    """One tab, driven by the DevTools protocol: commands are answered in order, events are kept."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv(timeout=30))).get("id") != self._last:
            self.events.append(message)
        assert "error" not in message, message
        return dict(message["result"])

    def open(self, file: Path, size: tuple[int, int], scheme: str = "light") -> None:
        phone = size == PHONE
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=phone
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self._socket.recv(timeout=30)))

    def value(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def named(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    profile = tmp_path_factory.mktemp("chromium")
    # --no-sandbox: the tests may run as root, and open nothing but their own file.
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
    with (profile / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as browser:
        try:
            port, path = _address(profile / "DevToolsActivePort", browser)
            with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as root:
                target = Page(root).send("Target.createTarget", url="about:blank")["targetId"]
                with connect(f"ws://127.0.0.1:{port}/devtools/page/{target}", max_size=None) as socket:
                    yield Page(socket)
        finally:
            browser.terminate()


def _address(file: Path, browser: subprocess.Popen[bytes]) -> tuple[str, str]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and browser.poll() is None:
        if file.exists() and len(lines := file.read_text().splitlines()) == 2:
            return lines[0], lines[1]
        time.sleep(0.1)
    raise AssertionError(f"chromium does not start: {(file.parent / 'log').read_text()[-2000:]}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    found = {name: folder / f"{name}.html" for name in DOCUMENTS}
    for name, (document, pictures) in DOCUMENTS.items():
        found[name].write_text(render(document(), pictures()), encoding="utf-8")
    return found


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_report_is_quiet_and_fits(page: Page, files: dict[str, Path], name: str, size: tuple[int, int]) -> None:
    page.open(files[name], size)
    assert page.value("innerWidth") == size[0]
    assert page.value("document.documentElement.scrollWidth") <= size[0]
    assert page.value(STICKING_OUT) == []
    assert page.value(DEAD_LINKS) == []
    requests = {item["request"]["url"].partition(":")[0] for item in page.named("Network.requestWillBeSent")}
    assert requests <= {"file", "data"}
    said = [page.named(method) for method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
    assert said == [[], [], []]
    assert page.value("document.scripts.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out(page: Page, files: dict[str, Path], scheme: str) -> None:
    page.open(files["full"], DESKTOP, scheme)
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]
    assert page.value(LOW_CONTRAST) == []


def test_pictures_and_plots_are_drawn(page: Page, files: dict[str, Path]) -> None:
    page.open(files["full"], PHONE)
    widths = page.value("[...document.images].map(e => e.naturalWidth)")
    assert sorted(widths) == [128] * 4 + [512] * 4
    plots = page.value("[...document.querySelectorAll('svg.plot')].map(e => e.getBoundingClientRect().toJSON())")
    assert len(plots) == 4
    assert all(plot["width"] > 300 and plot["height"] > 100 for plot in plots)
    # Drawn as wide as a phone so that its text can be read there.
    sizes = page.value("[...document.querySelectorAll('svg.plot text')].map(e => e.getBoundingClientRect().height)")
    assert min(sizes) > 10


def test_names_from_outside_stay_names(page: Page, files: dict[str, Path]) -> None:
    page.open(files["hostile"], DESKTOP)
    assert page.value("document.title") == "Verification <script>alert(1)</script>"
    assert page.value("document.querySelectorAll('script, iframe, [onerror], [onload]').length") == 0
    assert page.value("[...document.links].filter(e => /^javascript:/i.test(e.href)).length") == 0


def test_the_page_forbids_scripts_to_whoever_gets_one_in(page: Page, files: dict[str, Path], tmp_path: Path) -> None:
    intruded = tmp_path / "intruded.html"
    intruded.write_text(files["bare"].read_text().replace("<main>", "<main><script>document.title = 'owned'</script>"))
    page.open(intruded, DESKTOP)
    assert page.value("document.title") == "Verification bare"
    assert len(page.named("Log.entryAdded")) == 1


def test_print_opens_what_is_folded_and_cuts_nothing_off(page: Page, files: dict[str, Path]) -> None:
    page.open(files["full"], A4)
    height = "document.querySelector('tr.more details').getBoundingClientRect().height"
    assert page.value(height) < 40, "the line to click on alone"
    page.send("Emulation.setEmulatedMedia", media="print")
    assert page.value(height) > 100
    assert page.value(STICKING_OUT.replace(".scroll > *, .strip > *, ", "")) == []
