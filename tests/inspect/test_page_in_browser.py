"""The page of `attngen explain --html` in a browser: it fits a phone, its sections open, and the browser has no complaint.

Needs the extra `browser` and a Chromium on the PATH (`apt-get install chromium`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from tests.inspect.test_page import CALLS

sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'attngen[browser]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium: none of {', '.join(NAMES)} is on the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync.sync_playwright() as playwright:
        # Without its sandbox, which a container's root can't have; the pages are our own and load nothing.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def shown(browser: Any, path: Path, width: int, scheme: str) -> tuple[Any, list[str], list[str]]:
    """The page at a width, what the browser complains of, and what it asked for."""
    complaints: list[str] = []
    requests: list[str] = []
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    return page, complaints, requests


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1100, "light")])
@pytest.mark.parametrize("name", ["window", "hyper", "paged"])
def test_a_page_fits_and_opens(browser: Any, name: str, width: int, scheme: str, tmp_path: Path):
    path = tmp_path / "page.html"
    attn, rows, captures = CALLS[name]()
    attn.explain(*rows, html=path, **captures)
    page, complaints, requests = shown(browser, path, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sections = page.locator("details")
    assert sections.count() >= 4
    for place in range(sections.count()):
        section = sections.nth(place)
        if not section.evaluate("own => own.open"):
            section.locator("> summary").click()
        assert section.evaluate("own => own.open && own.getBoundingClientRect().height > 60")
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "too wide once all is open"
    assert "@triton.jit" in page.locator("#sources").inner_text()
    assert not complaints and requests == [path.as_uri()]


def test_light_and_dark_can_be_read(browser: Any, tmp_path: Path):
    path = tmp_path / "page.html"
    ag.compile("i >= j").explain(*[torch.randn(1, 2, 256, 16)] * 3, html=path)
    papers = set()
    for scheme in ("light", "dark"):
        page, _, _ = shown(browser, path, 390, scheme)
        style = "own => [getComputedStyle(own).color, getComputedStyle(document.body).backgroundColor]"
        for element in ("h1", "a", ".note", ".flow"):
            ink, paper = (luminance(color) for color in page.locator(element).first.evaluate(style))
            contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
            assert contrast >= 4.5, f"{element} in {scheme}: {contrast:.1f}"  # WCAG AA
            papers.add(paper)
    assert len(papers) == 2


def luminance(color: str) -> float:
    """Relative, 0 to 1, of "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_hostile_name_runs_nothing(browser: Any, tmp_path: Path):
    path = tmp_path / "page.html"
    name = "</title><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    ag.compile(ag.Spec(mask=ag.causal(), name=name)).explain(*[torch.randn(1, 1, 64, 16)] * 3, html=path)
    page, complaints, requests = shown(browser, path, 390, "light")
    assert page.locator("h1").inner_text() == name and page.title() != "taken"
    assert not complaints and requests == [path.as_uri()]


def test_a_link_opens_the_section_that_it_leads_to(browser: Any, tmp_path: Path):
    path = tmp_path / "page.html"
    attn, rows, captures = CALLS["hyper"]()
    attn.explain(*rows, html=path, **captures)
    page, _, _ = shown(browser, path, 1100, "light")
    last = page.locator("#plan .note a").last
    target = page.locator(last.get_attribute("href"))
    assert not target.is_visible()
    last.click()
    target.locator("h3").first.wait_for(state="visible", timeout=5000)
