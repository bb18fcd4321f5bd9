"""The pages of `report` and `compare` in a real headless Chromium: drawn, readable, operable, and alone.

Chromium is `DYNMIX_CHROMIUM` or one of the programs below; where there is none these tests are skipped,
unless DYNMIX_REQUIRE_BROWSER says that there must be one. Screenshots are kept in `build/screenshots`.
"""

import itertools
import json
import os
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from megatron_dynmix.cli import main
from megatron_dynmix.compare.page import page_of_comparison
from megatron_dynmix.compare.results import MEANS, CellResult, compared
from megatron_dynmix.report.pages import html

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from report_fixtures import NAMES, write_run

SCREENSHOTS = Path(__file__).parents[2] / "build/screenshots"
PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
CHARTS = 14
IMAGE = "document.querySelector('[data-chart=gate-load] .mlayer image').href.baseVal"
VALUES = "JSON.stringify(document.querySelector('[data-chart={}]').data[0].z)"
WIDEST = "Math.max(...[...document.querySelectorAll('.main-svg')].map(svg => svg.getAttribute('width')))"
MANY = tuple(f"source_with_a_long_name_{number:02}" for number in range(64))

CONTRASTS = """
() => {
  const parse = (text) => {
    const parts = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
    return text === "transparent" ? [0, 0, 0, 0] : parts;
  };
  const luminance = (rgb) => rgb.slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim())
      .filter(Boolean);
    if (!text.length || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [luminance(ink), luminance(ground(element))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), text[0].slice(0, 40)]);
  }
  return found;
}
"""


def chromium() -> str:
    given = os.environ.get("DYNMIX_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found:
        return found
    reason = f"none of {', '.join(PROGRAMS)} is installed, and DYNMIX_CHROMIUM is not set"
    if os.environ.get("DYNMIX_REQUIRE_BROWSER"):
        pytest.fail(f"{reason}, but DYNMIX_REQUIRE_BROWSER is")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    program = chromium()
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files by name: of a small run, one of many sources, three runs, and a grid of runs."""
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / name, seed=seed) for seed, name in enumerate("abc")]
    many = write_run(folder / "many", sources=MANY, updates=5, experts=16)
    files = {"small": runs[:1], "many": [many], "compared": runs}
    for name, run_dirs in files.items():
        assert main(["report", *map(str, run_dirs), "--output", str(folder / f"{name}.html")]) == 0
    results = [
        CellResult(
            variant=variant,
            seed=seed,
            metrics={name: 2.0 + seed / 10 for name in (*MEANS, "loss/chat", "loss/math")},
            worst_source="chat",
            weights=((0, (0.5, 0.5)), (10, (0.25, 0.75))),
            tokens=1000,
            seconds=2.5,
        )
        for variant in ("uniform", "gate-load_signal=train_interval=50")
        for seed in (1, 2)
    ]
    summary = compared([result.variant for result in results[::2]], ["chat", "math"], results, [])
    grid = page_of_comparison("Comparison", folder, summary)
    (folder / "grid.html").write_text(html(grid, datetime(2026, 1, 2)), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in [*files, "grid"]}


@pytest.fixture
def opened(browser, pages):
    """Open a page; at the end nothing may have been complained of, and nothing have been asked for."""
    complaints, requests, contexts = [], [], []

    def open_page(name, *, width=1400, theme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name].as_uri())
        page.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)
    assert sum(url.startswith("file:") for url in requests) == len(contexts)


def wait_until(page, condition):
    deadline = time.monotonic() + 60  # Playwright's own way evaluates text, which the page's policy forbids
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [
        *(("small", 390, "dark"), ("many", 1400, "light")),
        pytest.param("small", 1400, "light", marks=pytest.mark.slow),
        pytest.param("small", 1400, "dark", marks=pytest.mark.slow),
        pytest.param("many", 390, "light", marks=pytest.mark.slow),
        pytest.param("many", 1400, "dark", marks=pytest.mark.slow),
    ],
)
def test_all_charts_are_drawn_and_readable(opened, name, width, theme):
    page = opened(name, width=width, theme=theme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    picture = SCREENSHOTS / f"report-{name}-{width}-{theme}.png"
    page.screenshot(path=picture, full_page=True)
    print(f"screenshot: {picture}")

    drawn = page.evaluate(
        "[...document.querySelectorAll('[data-chart]')].map(chart => [chart.dataset.chart,"
        " chart.querySelectorAll('.mlayer path, .mlayer image').length, chart.getBoundingClientRect().width])"
    )
    assert len(drawn) == CHARTS
    for chart, marks, chart_width in drawn:
        assert marks > 0, f"{chart} is empty"
        assert 0 < chart_width <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"

    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts)[0] >= 4.5, min(contrasts)


def test_runs_are_drawn_over_one_another(opened):
    page = opened("compared", width=390, theme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    names = page.evaluate("document.querySelector('[data-chart=loss]').data.map(trace => trace.name)")
    assert names == ["a", "b", "c"]
    page.screenshot(path=SCREENSHOTS / "report-compared-390-dark.png", full_page=True)


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1400, "light")])
def test_the_charts_of_a_grid_are_drawn_and_readable(opened, width, theme):
    page = opened("grid", width=width, theme=theme)
    page.screenshot(path=SCREENSHOTS / f"comparison-{width}-{theme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for chart, drawn in (("weights", 8), ("loss", 12)):
        marks = f"document.querySelectorAll('[data-chart={chart}] .mlayer path').length"
        assert page.evaluate(marks) >= drawn, f"{chart} misses lines or points"
    contrasts = page.evaluate(CONTRASTS)
    assert min(contrasts)[0] >= 4.5, min(contrasts)


def test_the_slider_moves_by_keyboard_and_changes_both_heat_maps(opened):
    page = opened("small")
    shown = f"[{VALUES.format('gate-load')}, {VALUES.format('distance')}]"
    before = page.evaluate(shown)
    image = page.evaluate(IMAGE)
    slider = page.locator("#gate-load-slider")
    assert slider.get_attribute("aria-valuetext") == "iteration 100"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    after = page.evaluate(shown)
    assert before[0] != after[0] and before[1] != after[1]
    wait_until(page, f"{IMAGE} !== {json.dumps(image)}")
    assert slider.get_attribute("aria-valuetext") == "iteration 90"
    assert page.locator("#distance-slider").input_value() == "8"
    page.keyboard.press("Home")
    assert page.locator("#distance-slider + output").inner_text() == "iteration 10"


def test_a_source_is_switched_off_by_keyboard(opened):
    page = opened("small")
    bands = "document.querySelectorAll('[data-chart=weights] .mlayer .fills path').length"
    assert page.evaluate(bands) == len(NAMES)
    page.get_by_role("checkbox", name="math_again").first.focus()
    page.keyboard.press("Space")
    wait_until(page, f"{bands} === {len(NAMES) - 1}")
    page.keyboard.press("Space")
    wait_until(page, f"{bands} === {len(NAMES)}")


def test_the_theme_is_switched_by_keyboard_in_the_charts_too(opened):
    page = opened("small", theme="light")
    ink = "getComputedStyle(document.querySelector('[data-chart=weights] .xtick text')).fill"
    light = page.evaluate(ink)
    page.get_by_role("radio", name="auto").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    wait_until(page, f"{ink} !== '{light}'")


def test_everything_to_operate_has_a_name_and_can_be_reached(opened):
    page = opened("small")
    nameless = page.evaluate(
        "[...document.querySelectorAll('input')].filter(input => !input.labels.length).map(input => input.id)"
    )
    assert nameless == []
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    doubled = page.evaluate(
        "(() => { const ids = [...document.querySelectorAll('main [id], header [id]')].filter("
        "e => !e.closest('svg')).map(e => e.id); return ids.filter((id, i) => ids.indexOf(id) !== i); })()"
    )
    assert doubled == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


def test_the_page_prints_light_and_on_paper_width(opened):
    page = opened("small", theme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_until(page, f"{WIDEST} <= 680")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    wait_until(page, f"{WIDEST} > 680")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
