"""The report in a browser: readable, sortable and self-contained.

Tested on a wide and a narrow screen, in the light and the dark scheme.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api")  # comes with '.[test]'
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium on PATH; Debian's package is `chromium`"
    ),
]

# Contrast of every visible text with the first opaque ground behind it.
# WCAG 2.2: (L1 + 0.05) / (L2 + 0.05).
CONTRASTS = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const [r, g, b, a = 1] = numbers(getComputedStyle(node).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const contrasts = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim();
    const node = texts.currentNode.parentElement, style = getComputedStyle(node);
    if (!text || node.closest("script")) continue;
    const colour = numbers(node.closest("svg") ? style.fill : style.color);
    const [one, two] = [luminance(colour), luminance(ground(node))].sort((a, b) => b - a);
    contrasts.push([text, (one + 0.05) / (two + 0.05)]);
  }
  return contrasts;
}"""
COLUMN = """([table, column]) =>
  [...document.querySelectorAll("table")[table].tBodies[0].rows]
    .map(row => row.cells[column].innerText.trim())"""
SMALLEST_CHART_TEXT = """Math.min(...[...document.querySelectorAll("svg text")]
  .map(text => text.getBoundingClientRect().height))"""
SMALLEST_LEGEND_TEXT = """Math.min(...[...document.querySelectorAll(".legend li")]
  .map(key => parseFloat(getComputedStyle(key).fontSize)))"""
REFERENCES = """[...document.querySelectorAll("[src],[href]")]
  .map(node => node.getAttribute("src") ?? node.getAttribute("href"))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        # root may not have a sandbox
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(
    browser: object, path: Path, width: int = 1200, scheme: str = "light"
) -> tuple[object, list[str]]:
    """Open the report; the list collects messages of the browser and requests to the network."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("data:", "file:")) else trouble.append(request.url)
        ),
    )
    page.goto((path / "reports" / "index.html").as_uri())
    return page, trouble


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_everything_is_visible_with_enough_contrast(
    browser: object, project: Path, width: int, scheme: str
) -> None:
    page, trouble = open_page(browser, project, width, scheme)
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB"))
    assert pixels.shape[1] == width
    assert (pixels.mean() > 128) == (scheme == "light")
    assert pixels.std() > 10
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    pale = [(text, round(ratio, 2)) for text, ratio in contrasts if ratio < 4.5]
    assert not pale
    # Type in charts shrinks with them; legends, which are HTML, do not.
    assert page.evaluate(SMALLEST_CHART_TEXT) >= 9
    assert page.evaluate(SMALLEST_LEGEND_TEXT) >= 12
    assert page.evaluate(
        "[...document.images].every(image => image.complete && image.naturalWidth > 0 && image.alt)"
    )
    assert not trouble
    page.close()


def test_the_verdict_is_at_the_top(browser: object, project: Path) -> None:
    page, _ = open_page(browser, project, 400)
    box = page.locator("h1").bounding_box()
    assert box["y"] + box["height"] < 400
    assert page.locator("h1").inner_text().partition(":")[0] in (
        "Yes",
        "No",
        "Not clear",
        "Not known",
    )
    assert page.locator("dl").bounding_box()["y"] < 600
    page.close()


def test_tables_sort_by_mouse_and_by_keyboard(browser: object, project: Path) -> None:
    page, trouble = open_page(browser, project)
    before = page.evaluate(COLUMN, [0, 0])
    assert before == ["baseline", "featuregan-1x", "featuregan-2x"]

    button = page.get_by_role("button", name="mIoU %", exact=True)
    button.click()
    scores = [float(cell) for cell in page.evaluate(COLUMN, [0, 2])]
    assert scores == sorted(scores, reverse=True)
    assert page.locator("th[aria-sort]").evaluate_all(
        "heads => heads.map(head => [head.innerText.trim(), head.ariaSort])"
    ) == [["mIoU %", "descending"]]
    button.focus()
    page.keyboard.press("Enter")
    assert [float(cell) for cell in page.evaluate(COLUMN, [0, 2])] == sorted(scores)
    assert page.locator("th[aria-sort=ascending]").count() == 1

    for _ in range(2):  # the baseline has no difference to itself: last in either direction
        page.get_by_role("button", name="Δ mIoU").press("Space")
        assert page.evaluate(COLUMN, [0, 3])[-1] == "—"
    page.get_by_role("button", name="variant").click()
    assert page.evaluate(COLUMN, [0, 0]) == before

    page.locator("table").nth(1).get_by_role("button", name="class").press("Enter")
    names = page.evaluate(COLUMN, [1, 0])
    assert names == sorted(names)
    assert len(names) == 7
    assert not trouble
    page.close()


def test_the_page_is_self_contained(browser: object, project: Path) -> None:
    """The page refers to nothing outside, and the browser refuses to load what a script adds."""
    page, trouble = open_page(browser, project)
    named = page.evaluate(REFERENCES)
    assert named
    assert all(name.startswith(("data:", "#")) for name in named)
    assert not trouble
    page.evaluate(
        "document.body.append(Object.assign(new Image(), { src: 'https://example.org/x.png' }))"
    )
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in message for message in trouble)
    page.close()
