"""The report in a real browser: from a file, without network, in every width and colour."""

import shutil
from itertools import product
from pathlib import Path

import pytest

from protoclip.results.page import write_report
from reported import hostile_pairs, trained


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = hostile_pairs(folder / "pairs.parquet")
    trained(folder / "proto", data, run={"name": "<script>alert(2)</script>\u202ename"})
    trained(folder / "clip", data, loss={"prototypical": 0.0})
    shutil.copytree(folder / "proto", folder / "stopped")
    (folder / "stopped" / "results.json").unlink()
    runs = [folder / name for name in ("clip", "proto", "stopped")]
    return write_report(runs, folder / "report.html")


def test_the_page_opens_from_a_file_and_asks_for_nothing(browser, page_file):
    """No request, no error, no script; no sideways scrolling, nor of the results of two models on a
    phone."""
    asked: list[str] = []
    said: list[str] = []
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(page_file.as_uri())
    for width, scheme in product((1400, 390), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        results = page.get_by_label("Table of metrics")
        assert results.evaluate("it => it.scrollWidth - it.clientWidth") <= 0
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert said == []
    assert page.locator("script").count() == 0
    drawn = page.eval_on_selector_all(
        ".chart", "all => all.map((one) => one.querySelectorAll('path').length)"
    )
    assert len(drawn) > 10
    assert all(drawn)
    # A name shows as it was written, and changes nothing else.
    assert "<script>alert(2)</script>" in page.locator("#results").inner_text()
    assert page.locator("main > section").count() == 7
    context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 390)])
def test_axe_finds_nothing_serious_in_the_report(width, scheme, browser, serious, page_file):
    viewport = {"width": width, "height": 900}
    page = browser.new_page(viewport=viewport, color_scheme=scheme)
    page.goto(page_file.as_uri())
    assert serious(page) == []
    page.close()


def test_the_page_works_by_keyboard(browser, page_file):
    """The first stop skips to the results; tables that scroll can be reached."""
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(page_file.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Table of metrics"
    scrolling = page.evaluate(
        "[...document.querySelectorAll('*')].filter((one) => one.scrollWidth > one.clientWidth + 1"
        " && ['auto', 'scroll'].includes(getComputedStyle(one).overflowX) && one.tabIndex < 0)"
        ".length"
    )
    assert scrolling == 0
    page.close()


def test_the_page_prints_light_and_whole(browser, page_file):
    page = browser.new_page(viewport={"width": 794, "height": 1100}, color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("nav").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
