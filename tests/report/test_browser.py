"""A report in a real browser: nothing fails, nothing is fetched, nothing hangs over, on a screen and on paper."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lesam_dist.report import write_report
from tests.report.runs import documents, write_document, write_run
from tests.report.test_report import nasty_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = ("gpu", "quic", "background-networking", "component-update", "sync")
_FLAGS = ["--no-first-run", *(f"--disable-{what}" for what in _QUIET)]
_OVERHANG = "document.documentElement.scrollWidth - innerWidth"
# Charts are drawn once they are about to be seen. Waits in the page: Playwright's own waiting needs eval, which the
# page's policy forbids.
_DRAW_ALL = """async () => {
    const end = performance.now() + 60_000;
    const until = async (isTrue, what) => {
        while (!isTrue()) {
            if (performance.now() > end) throw new Error(`no ${what} after a minute`);
            await new Promise(requestAnimationFrame);
        }
    };
    await until(() => window.Plotly, "plotly.js");
    for (let y = 0; y < document.documentElement.scrollHeight; y += 900) {
        scrollTo({top: y, behavior: 'instant'});
        await new Promise(requestAnimationFrame);
    }
    const figures = [...document.querySelectorAll("figure")];
    await until(() => figures.every(figure => figure.querySelector(".main-svg")), "chart");
}"""
# Of each figure: whether its picture and its chart take up room, and whether the picture could be decoded.
_FIGURES = """[...document.querySelectorAll('figure')].map(figure => {
    const picture = figure.querySelector('img'), plot = figure.querySelector('.plot');
    return [picture.offsetWidth > 0, plot.offsetWidth > 0, picture.complete && picture.naturalWidth > 0];
})"""
_PICTURE, _CHART = [True, False, True], [False, True, True]


@pytest.fixture
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail("there is no Chromium: CI installs it, see .ci/run")
        pytest.skip("there is no Chromium: see CONTRIBUTING.md")
    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


def open_page(browser: Browser, report: Path, faults: list[str], *, scripts: bool = True) -> Page:
    """With everything that goes wrong, and every request, added to ``faults``."""
    page = browser.new_page(viewport={"width": 390, "height": 900}, java_script_enabled=scripts)
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda request: _is_own(request.url) or faults.append(request.url[:200]))
    page.goto(report.as_uri())
    return page


def _is_own(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


def test_in_a_browser(seed: int, tmp_path: Path, browser: Browser) -> None:
    draw = random.Random(seed)
    runs = [nasty_run(tmp_path, draw)]
    for k in range(2):
        runs.append(tmp_path / "sgd" / f"seed_{k}")
        write_run(runs[-1], draw, method="sgd", seed=k)
    for stem, document in documents(draw, "sgd").items():
        write_document(runs[1], stem, document)
    faults: list[str] = []
    report = write_report(runs, tmp_path / "report.html")

    page = open_page(browser, report, faults)
    title = page.title()
    page.evaluate(_DRAW_ALL)
    count = page.locator("figure").count()
    assert count > 15
    colours = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate(_OVERHANG) <= 0, f"{width} pixels, {scheme}"
        page.wait_for_timeout(200)  # charts are drawn in the other colours
        assert page.evaluate(_FIGURES) == [_CHART] * count
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.locator(".xtick text").first.evaluate("text => getComputedStyle(text).fill")
        colours[scheme] = paper, ink
    assert len({colour for pair in colours.values() for colour in pair}) == 4, (
        "paper and ink, of the page and its charts"
    )

    page.locator("figure .nsewdrag").first.hover()
    page.wait_for_selector("figure .hoverlayer text")

    page.emulate_media(media="print")
    assert page.evaluate(_FIGURES) == [_PICTURE] * count
    assert page.title() == title, "no name of a file is run as a script"
    page.close()

    plain = open_page(browser, report, faults, scripts=False)
    pictures, charts = plain.locator("figure img"), plain.locator("figure .plot")
    assert pictures.count() == count
    assert all(pictures.nth(i).is_visible() and not charts.nth(i).is_visible() for i in (0, count - 1))
    assert faults == []
