"""A picture of a run's weights for a README or a talk: the first chart of its report, drawn by Chromium.

    python tools/picture_of_weights.py runs/quickstart/report.html docs/images/weights.png

Needs playwright (of the `dev` extra) and `chromium-headless-shell`, or another Chromium as DYNMIX_CHROMIUM.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    """Open the report and keep its section of weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, metavar="REPORT.html")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    parser.add_argument("--width", type=int, default=760, help="in CSS pixels")
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    arguments = parser.parse_args()
    program = os.environ.get("DYNMIX_CHROMIUM") or shutil.which("chromium-headless-shell")
    if program is None:
        parser.error("there is no chromium-headless-shell; install it, or set DYNMIX_CHROMIUM")
    if not arguments.report.is_file():
        parser.error(f"{arguments.report} is not there; write it: megatron-dynmix report RUN")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        viewport = {"width": arguments.width, "height": 600}
        page = browser.new_page(viewport=viewport, color_scheme=arguments.theme)
        page.goto(arguments.report.resolve().as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        page.locator("#weights").screenshot(path=arguments.picture)
        browser.close()


if __name__ == "__main__":
    main()
