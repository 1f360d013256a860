"""The page in a real browser: it looks like something, sorts when its heads are pressed, and asks the network for nothing."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest
import torch

from fastdiff.eval.evaluate import Result
from fastdiff.eval.frechet import FD
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.report import html_report

pytest.importorskip("fcntl")
from chromium import Chromium, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")

TITLE = "</title></h1><script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
FDS = {"teacher (10 steps)": 10.0, "teacher (9 steps)": 9.5, "student": 0.3, TITLE: -2.0, "unknown": None, "real": 0.25}


def result(model: str, fd: float | None) -> Result:
    return Result(
        model=model,
        n=2,
        metrics={} if fd is None else {"fd": fd, "fd_se": 0.1},
        steps=None if model == "real" else 3,
        nfe=None if model == "real" else 3.0 + len(model),
        latency_ms_p50=None if model == "real" else 10.0 + len(model),
        groups={} if fd is None else {TITLE: FD(fd, 0.1, 0.0, 0.0), "bag": FD(1.0, 0.1, 0.0, 0.0)},
        images=torch.linspace(0, 1, 2 * 3 * 64).reshape(2, 3, 8, 8),
        prompts=["a boot", TITLE],
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = [result(model, fd) for model, fd in FDS.items()]
    path = tmp_path_factory.mktemp("page") / "report.html"
    html_report(
        path,
        results,
        title=TITLE,
        command=TITLE,
        facts={TITLE: TITLE},
        protocol=Protocol.load("fashion").replace(n=2, scheduler=TITLE),
        curves={TITLE: [(1, 1.0), (2, 0.5)]},
        previous=[{**r.row(), "fd": 1.0} for r in results[:-1]] + [{"model": f"old {TITLE}"}],
        sweep=[{"steps": k, "guidance_scale": g, "fd": k + g} for k in (1, 3) for g in (1.0, 2.0)],
    )
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Chromium(find_chromium(), tmp_path_factory.mktemp("profile"))
    try:
        yield chromium
    finally:
        chromium.close()


@pytest.fixture
def opened(browser, page):
    browser.shape(1200)
    browser.open(page)
    return browser


def models(browser: Chromium) -> list[str]:
    rows = browser.evaluate("[...document.querySelector('table.sortable tbody').rows].map(row => row.cells[0].textContent)")
    assert sorted(rows) == sorted(FDS)
    return rows


def head(browser: Chromium, start: str) -> str:
    """A JavaScript expression for the button of a column of the first table."""
    found = (
        f"[...document.querySelector('table.sortable').querySelectorAll('button')].find(b => b.textContent.startsWith('{start}'))"
    )
    assert browser.evaluate(f"{found} !== undefined")
    return found


def sorts(browser: Chromium) -> list[str]:
    return browser.evaluate("[...document.querySelector('table.sortable').tHead.rows[0].cells].map(cell => cell.ariaSort)")


def test_the_page_says_nothing_to_the_console_and_asks_for_nothing(opened, page):
    assert opened.complaints() == []
    urls = opened.requests()
    assert [url for url in urls if not url.startswith("data:image/png;base64,")] == [page.as_uri()]
    assert len(urls) > 1


def test_hostile_texts_are_shown_and_do_nothing(opened):
    assert opened.evaluate("document.title") == TITLE
    assert opened.evaluate("document.querySelector('h1').textContent") == TITLE
    assert opened.evaluate("document.scripts.length") == 1
    assert opened.evaluate("document.querySelector('pre').textContent") == TITLE
    assert opened.evaluate("[...document.querySelectorAll('img')].every(i => i.naturalWidth > 0)")


def test_a_click_on_a_head_sorts_by_numbers_in_both_directions(opened):
    assert models(opened) == list(FDS)
    ascending = sorted((m for m in FDS if FDS[m] is not None), key=lambda m: FDS[m])
    button = head(opened, "FD[fashion]-2#")
    opened.click(button)
    assert models(opened) == [*ascending, "unknown"]
    assert sorts(opened).count("ascending") == 1
    opened.click(button)
    assert models(opened) == [*reversed(ascending), "unknown"]
    assert sorts(opened).count("descending") == 1
    opened.click(head(opened, "NFE"))
    by_calls = sorted((m for m in FDS if m != "real"), key=len)
    assert [m for m in models(opened) if m != "real"] == by_calls
    assert models(opened)[-1] == "real"
    assert sorts(opened).count("none") == len(sorts(opened)) - 1


def test_texts_sort_with_their_numbers(opened):
    opened.click(head(opened, "model"))
    order = models(opened)
    assert order.index("student") < order.index("teacher (9 steps)") < order.index("teacher (10 steps)") < order.index("unknown")


def test_the_keyboard_sorts_too(opened):
    button = head(opened, "model")
    opened.evaluate(f"{button}.focus()")
    opened.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "steps"
    opened.press("Tab")
    opened.press("Enter")
    assert sorts(opened)[2] == "ascending"
    assert models(opened)[-1] == "real"


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_is_seen_in_both_schemes_and_fits_its_window(browser, page, width):
    shots = {}
    for dark in (False, True):
        browser.shape(width, dark=dark)
        browser.open(page)
        shots[dark] = np.asarray(browser.screenshot())
        assert shots[dark].shape == (900, width, 3)
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert len(np.unique(shots[dark].reshape(-1, 3), axis=0)) > 20
    assert np.median(shots[False]) > 240
    assert np.median(shots[True]) < 40


class Listening(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_what_gets_in_is_stopped_by_the_policy_and_noticed_here(browser, page, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Listening)
    server.asked = []
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        evil = f'<img src="http://127.0.0.1:{server.server_port}/spy"><script>document.title = "broken"</script>'
        whole = page.read_text(encoding="utf-8").replace("</h1>", f"</h1>{evil}", 1)
        for name, text in (("guarded", whole), ("open", whole.replace("Content-Security-Policy", "x-nothing"))):
            path = tmp_path / f"{name}.html"
            path.write_text(text, encoding="utf-8")
            browser.open(path)
            stopped = name == "guarded"
            assert ("/spy" not in server.asked) == stopped
            assert (browser.evaluate("document.title") == TITLE) == stopped
            assert (len(browser.complaints()) >= 2) == stopped, json.dumps(browser.complaints())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
