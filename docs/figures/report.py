"""Draws report.png: the top of a report as a browser shows it.

    lesam-dist compare --config digits_noisy --methods sgd,sam,lesam --seeds 3 --run_dir runs/digits_noisy
    python docs/figures/report.py runs/digits_noisy

It writes the report of the runs that are named (`lesam-dist report`) into a folder that goes away, and photographs it
from its headline to the first charts. It needs Chromium, as the tests of the report do (CONTRIBUTING.md).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from lesam_dist.report import write_report

TARGET = Path(__file__).with_name("report.png")
WIDTH = 1200
# The bottom of the first row of charts.
_END = """Math.max(...[...document.querySelectorAll('figure')].slice(0, 2)
    .map(figure => figure.getBoundingClientRect().bottom))"""


def photograph(report: Path, target: Path) -> None:
    """The report's top, in light colours."""
    flags = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1600}, color_scheme="light")
        page.goto(report.as_uri())
        page.locator(".drawn .legend").nth(1).wait_for()
        page.wait_for_timeout(500)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": page.evaluate(_END)}
        page.screenshot(path=target, clip=clip)
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        photograph(write_report(sys.argv[1:], Path(folder) / "report.html"), TARGET)
