"""The explorer in a real browser: no request leaves, the map reacts, and cleaning data works."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "unit" / "explore"))

from worded import explorers

from protoclip.config import DataConfig
from protoclip.data.emoji import emoji_table
from protoclip.data.split import read_ids
from protoclip.explore.pages import Pages
from protoclip.explore.serve import write_static
from testing import save_to_bytes

pytestmark = pytest.mark.slow


@dataclass
class Watched:
    """A page, and what it should not do: ask other hosts, or write errors to the console."""

    page: Any
    own: str
    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.asked(request.url))
        self.page.on("console", lambda message: self.said(message.type, message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def asked(self, url: str) -> None:
        if urlparse(url).netloc != self.own and not url.startswith(("data:", "blob:")):
            self.foreign.append(url)

    def said(self, kind: str, text: str) -> None:
        if kind == "error":
            self.errors.append(text)

    def assert_quiet(self) -> None:
        assert self.foreign == []
        assert self.errors == []


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emoji of hearts and of a few more."""
    whole = emoji_table("train")
    texts = [
        (cell if isinstance(cell, str) else cell[0]).lower()
        for cell in whole["caption"].to_pylist()
    ]
    keep = [row for row, text in enumerate(texts) if "heart" in text][:120]
    keep += list(range(0, len(texts), 50))
    some = whole.take(pa.array(sorted(set(keep)), pa.int64()))
    path = tmp_path_factory.mktemp("browser") / "emoji.parquet"
    pq.write_table(some, path)
    return path


@pytest.fixture(scope="module")
def pages(table: Path) -> Pages:
    return Pages(explorers(DataConfig(train=str(table)), {}, {3: 40, 4: 41}))


@pytest.fixture
def watched(browser: Any, address: str) -> Iterator[Watched]:
    """A page that is empty yet."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    context.set_default_timeout(90_000)  # machines that test are busy
    found = Watched(page=context.new_page(), own=urlparse(address).netloc)
    yield found
    found.assert_quiet()
    context.close()


@pytest.fixture
def map_page(watched: Watched, address: str) -> Any:
    """The map, open and drawn."""
    watched.page.goto(address)
    watched.page.wait_for_selector("#map[data-ready]")
    return watched.page


@pytest.fixture
def list_page(watched: Watched, address: str) -> Any:
    """The text prototypes: a page without the map, which takes a second to draw."""
    watched.page.request.get(address)  # which sets the cookie, and leads to the map
    watched.page.goto(address.partition("?")[0] + "1/prototypes-text.html")
    return watched.page


@pytest.fixture(scope="module")
def files(pages: Pages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as files, in a folder."""
    folder = tmp_path_factory.mktemp("files") / "out"
    write_static(list(pages.explorers), folder)
    return folder


def wait_until(page: Any, condition: str) -> None:
    """Until an expression holds in a page, whose policy forbids what `wait_for_function` does."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


# A point's place on the screen, where no name lies over it.
POINT = """() => {
  const doc = Bokeh.documents[0];
  const plot = doc.roots()[0];
  const view = Bokeh.index.get(plot);
  const source = doc.get_model_by_name("pairs");
  const box = view.el.getBoundingClientRect();
  const inner = view.frame.bbox;
  for (let index = 0; index < source.data.image_x.length; index++) {
    const x = view.frame.x_scale.compute(source.data.image_x[index]);
    const y = view.frame.y_scale.compute(source.data.image_y[index]);
    const inside = (value, low, high) => value > low + 20 && value < high - 20;
    const free = !document.elementFromPoint(box.x + x, box.y + y)?.closest("#names");
    if (free && inside(x, inner.left, inner.right) && inside(y, inner.top, inner.bottom))
      return { x: box.x + x, y: box.y + y };
  }
}"""


def selected(page: Any) -> int:
    return int(page.inner_text("#selected").replace(",", ""))


def test_the_map_reacts(map_page: Any) -> None:
    """It zooms, shows a pair under the pointer, changes colours, and selects."""
    page = map_page
    page.select_option("#colour-by", "distance")
    assert " to " in page.inner_text("#legend")
    page.select_option("#colour-by", "image prototype")
    assert page.locator("#legend li").count() > 3
    box = page.locator("#map").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    extent = "(range => range.end - range.start)(Bokeh.documents[0].roots()[0].x_range)"
    before = page.evaluate(extent)
    page.mouse.move(*middle)
    page.mouse.wheel(0, -300)
    wait_until(page, f"{extent} < {before} * 0.99")
    place = page.evaluate(POINT)
    page.mouse.move(place["x"] - 3, place["y"])
    page.mouse.move(place["x"], place["y"])
    image = page.locator(".tooltip img").first
    image.wait_for()
    assert image.get_attribute("src").endswith(".webp")
    pairs = "Bokeh.documents[0].get_model_by_name('pairs')"
    page.evaluate(f"() => {{ {pairs}.selected.indices = [0, 2, 5] }}")
    assert selected(page) == 3
    beside = page.locator("#picked li")
    assert beside.count() == 3
    data = f"{pairs}.data"
    shown = page.evaluate(f"[0, 2, 5].map(i => `${{{data}.caption[i]}}\n${{{data}.id[i]}}`)")
    assert beside.all_inner_texts() == shown
    page.click("#clear")
    assert selected(page) == 0
    assert page.locator("#picked").is_hidden()
    wait_until(page, f"document.getElementById('map').offsetWidth > {box['width'] - 1}")
    page.mouse.click(place["x"], place["y"])
    wait_until(page, "Number(document.querySelector('#selected').innerText) >= 1")
    page.evaluate(f"() => {{ {pairs}.selected.indices = [2, 5] }}")
    page.reload()  # as from another page: the map knows what it has selected itself
    page.wait_for_selector("#map canvas")
    wait_until(page, f"{pairs}?.selected.indices.length === 2")
    page.evaluate(f"() => {pairs}.selection_manager.clear()")  # as Escape and Reset do
    assert selected(page) == 0
    page.evaluate(f"() => {{ {pairs}.selected.indices = [4] }}")
    assert page.inner_text("#picked h2") == "1 selected"
    page.focus("#picked a")
    page.keyboard.press("Enter")
    page.wait_for_url("**/pair-*.html")


IMAGES = """() => [...document.querySelectorAll("#thumbs img")]
  .map((image) => image.getBoundingClientRect().toJSON())"""
NAMES = """() => [...document.querySelectorAll("#names button")]
  .filter((button) => button.style.visibility === "visible")
  .map((button) => [button.innerText.trim(), button.getBoundingClientRect().toJSON()])
  .map(([name, box]) => ({ name, box }))"""


def assert_apart(box: dict[str, float], other: dict[str, float]) -> None:
    assert (
        box["right"] <= other["left"]
        or other["right"] <= box["left"]
        or box["bottom"] <= other["top"]
        or other["bottom"] <= box["top"]
    )


def test_groups_have_names_that_do_not_overlap_and_more_come_as_one_zooms(map_page: Any) -> None:
    """By the keyboard alone. Images of points stand where names leave room, bordered in their
    colours."""
    page = map_page
    page.set_viewport_size({"width": 600, "height": 700})
    page.wait_for_timeout(1000)
    frame = page.locator("#map").bounding_box()
    assert page.viewport_size["height"] - 20 < frame["y"] + frame["height"] <= 700
    first = page.evaluate(NAMES)
    assert any("heart" in point["name"] for point in first)
    seen = {point["name"] for point in first}
    images = page.evaluate(IMAGES)
    assert len(images) > 3
    for one, other in combinations([*images, *(name["box"] for name in first)], 2):
        assert_apart(one, other)
    colours = """[...new Set([...document.querySelectorAll("#thumbs img")]
      .map((image) => image.style.borderColor))].sort()"""
    by_group = page.evaluate(colours)
    assert len(by_group) > 1
    page.select_option("#colour-by", "loss")
    assert page.evaluate(colours) != by_group
    for _ in range(3):
        name = page.evaluate(NAMES)[-1]["name"]
        page.get_by_role("button", name=name, exact=True).focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(500)
        shown = page.evaluate(NAMES)
        for label, other in combinations([box["box"] for box in shown], 2):
            assert_apart(label, other)
        for label in shown:
            assert frame["x"] <= label["box"]["left"]
            assert label["box"]["right"] <= frame["x"] + frame["width"]
        seen |= {label["name"] for label in shown}
    assert len(seen) > len(first)


def test_answers_come_while_one_types(list_page: Any) -> None:
    """They say why, the field stays in focus, and going back shows the page before."""
    page = list_page
    page.keyboard.press("/")  # leads to the field
    page.keyboard.type("a red heart", delay=30)
    page.wait_for_url("**/search.html?text=a+red+heart")
    first = page.locator("section .card").first
    assert "red heart" in first.inner_text().lower()
    assert "both near" in first.inner_text()
    assert first.locator("a[href^=prototype-image-]").count() == 1
    assert page.evaluate("document.activeElement.name") == "text"
    assert "a red heart" in page.inner_text("main")
    page.go_back()
    page.wait_for_selector(".sortable")
    page.go_forward()
    page.wait_for_selector("section .card")
    assert page.input_value("input[name=text]") == "a red heart"
    page.click("text=Show them on the map")
    page.wait_for_selector("#found .card")
    assert page.input_value("input[name=text]") == "a red heart"


RANGE = """(range => [range.start, range.end])(Bokeh.documents[0].roots()[0].x_range)"""


def test_a_search_lights_its_results_on_the_map_and_a_card_leads_to_its_place(
    map_page: Any,
) -> None:
    """The map stays, and going back from a pair shows the same part of it."""
    page = map_page
    page.fill("input[name=text]", "a red heart")
    page.wait_for_url("**/index.html?text=a+red+heart")
    card = page.locator("#found .card").first
    assert "red heart" in card.inner_text().lower()
    wait_until(page, "document.querySelectorAll('#thumbs i').length === 48")  # images and texts
    assert page.locator("#thumbs i img").count() > 0
    whole = page.evaluate(RANGE)
    card.get_by_text("on the map").click()
    wait_until(page, f"{RANGE}[1] - {RANGE}[0] < {(whole[1] - whole[0]) / 7}")
    assert page.locator("#thumbs i").count() == 2  # the image and its text
    near = page.evaluate(RANGE)
    page.wait_for_timeout(400)
    card.locator("a[href^=pair-]").click()
    page.wait_for_url("**/pair-*.html")
    page.go_back()
    page.wait_for_selector("#map[data-ready]")
    assert page.evaluate(RANGE) == pytest.approx(near)
    id_ = page.evaluate("Bokeh.documents[0].get_model_by_name('pairs').data.id[5]")
    page.fill("input[name=text]", id_.upper())
    first = page.locator("#found section").first
    first.get_by_text("With this id").wait_for()
    assert first.locator("[data-id]").get_attribute("data-id") == id_
    page.fill("input[name=text]", "")
    page.wait_for_selector("#found", state="hidden")
    page.fill("input[name=text]", id_)
    page.press("input[name=text]", "Enter")  # which leads to a page of answers, as elsewhere
    page.wait_for_url("**/search.html?text=*")
    first = page.locator("main section").first
    assert first.locator("h2").inner_text() == "With this id"
    assert first.locator("[data-id]").get_attribute("data-id") == id_


def test_the_map_is_filtered_and_what_it_shows_is_selected(map_page: Any) -> None:
    """By the keyboard alone, with names for the tools. What was cleared comes back."""
    page = map_page
    count = page.evaluate("Bokeh.documents[0].get_model_by_name('pairs').data.loss.length")
    page.select_option("#colour-by", "loss")
    page.select_option("#only", label="the highest 5%")
    page.focus("#pick-shown")
    page.keyboard.press("Enter")
    chosen = selected(page)
    assert 0.03 * count < chosen <= 0.05 * count
    pairs = "Bokeh.documents[0].get_model_by_name('pairs')"
    least = page.evaluate(f"Math.min(...{pairs}.selected.indices.map(i => {pairs}.data.loss[i]))")
    losses = sorted(page.evaluate(f"[...{pairs}.data.loss]"))
    assert least >= losses[int(0.95 * count) - 1]
    page.click("#clear")
    assert selected(page) == 0
    page.keyboard.press("Enter")  # on Undo
    assert selected(page) == chosen
    page.select_option("#colour-by", "image prototype")
    assert page.locator("#only option").count() > 3
    tool = page.get_by_role("button", name="Lasso Select", exact=True)
    assert tool.get_attribute("aria-pressed") == "false"
    tool.focus()
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('#names.selecting') !== null")
    assert tool.get_attribute("aria-pressed") == "true"


def test_a_selection_is_exported(list_page: Any, pages: Pages, tmp_path: Path) -> None:
    """It is kept over pages, for these pairs."""
    page = list_page
    page.click("text=Odd ones out")
    page.wait_for_url("**/odd-*.html")
    for box in page.locator("input[data-id]").all()[:5]:
        box.check()
    ids = page.eval_on_selector_all(
        "input[data-id]:checked", "all => all.map(each => each.dataset.id)"
    )
    page.click("text=Near-duplicates")
    page.wait_for_url("**/duplicates.html")
    assert selected(page) == 5
    stored = page.evaluate("Object.keys(sessionStorage)")
    name = f"protoclip-selection of emoji.parquet, {pages.explorers[0].pairs.key[:16]}"
    assert sorted(stored) == [name, f"{name}, by the map"]
    files = {}
    for form in ("csv", "json"):
        with page.expect_download() as waiting:
            page.click(f"button[data-export={form}]")
        files[form] = tmp_path / f"selection.{form}"
        waiting.value.save_as(files[form])
    assert json.loads(files["json"].read_text(encoding="utf-8")) == ids
    assert read_ids("without", str(files["csv"])) == set(ids)


def test_pages_as_files_work_on_any_web_server_and_from_a_folder(
    browser: Any, files: Path, serve: Callable[..., str]
) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    for address in (serve(Quiet, files), files.as_uri()):
        found = Watched(page=browser.new_page(), own=urlparse(address).netloc)
        found.page.goto(f"{address}/index.html")
        found.page.wait_for_selector("#map[data-ready]")
        assert found.page.locator("#colour-by option").count() > 3
        assert found.page.evaluate(NAMES)
        found.page.evaluate(
            "() => { Bokeh.documents[0].get_model_by_name('pairs').selected.indices = [4] }"
        )
        assert found.page.eval_on_selector(
            "#picked img", "image => image.decode().then(() => true)"
        )
        # Pairs have no pages here, and lead to their place.
        assert found.page.locator("#picked a").get_attribute("href").startswith("index.html?at=")
        # A prototype is shown in the list, to which going back leads, and its ids can be saved.
        found.page.click("text=Image prototypes")
        found.page.click(".sortable th a")
        found.page.wait_for_selector(".card img")
        assert found.page.title().startswith("Image prototype ")
        with found.page.expect_download() as saved:
            found.page.click("a[download]:has-text('JSON')")
        assert len(json.loads(saved.value.path().read_text("utf-8"))) > 0
        assert saved.value.suggested_filename.startswith("ids-image-")
        found.page.go_back()
        found.page.wait_for_selector(".sortable")
        found.page.click("text=What moved")
        found.page.wait_for_selector(".card img")
        assert found.page.eval_on_selector(".card img", "image => image.decode().then(() => true)")
        found.assert_quiet()
        found.page.close()


def test_near_duplicates_are_ticked_with_all_their_pairs(
    browser: Any, serve_pages: Callable[[Pages], str], tmp_path: Path
) -> None:
    """Those of an image together; and the second of each, which leaves the first of all alike. The
    slider lists those that are alike enough."""
    rows = []
    for number in range(4):
        image = Image.new("RGB", (24, 24), "white")
        image.paste("red", (5, 5, 15, 15))
        image.putpixel((23, 23), (number, 0, 0))
        rows += [
            {"sample_id": f"{number}{n}", "image": save_to_bytes(image), "caption": f"a thing, {n}"}
            for n in "ab"
        ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    explored = explorers(DataConfig(train=str(tmp_path / "pairs.parquet")), cache=False)
    page = browser.new_page()
    page.goto(serve_pages(Pages(explored)))
    page.wait_for_url("**/1/index.html")
    page.goto(page.url.replace("index.html", "duplicates.html"))
    ids = "() => JSON.parse(sessionStorage.getItem(KEY)).sort().join()"
    page.get_by_label("select 1a and 1 more of this image").first.check()
    assert page.evaluate(ids) == "1a,1b"
    page.click("text=Select all but one of those alike")
    assert page.evaluate(ids) == "1a,1b,2a,2b,3a,3b"
    page.get_by_label("select 1a and 1 more of this image").first.uncheck()
    assert page.evaluate(ids) == "2a,2b,3a,3b"
    page.goto(page.url.replace("duplicates", "odd-distance"))
    page.get_by_label("select 1b").check()
    page.goto(page.url.replace("odd-distance", "duplicates"))
    assert page.get_by_label("select 1a and").first.evaluate("box => box.indeterminate")
    page.get_by_label("Alike from").fill("1")
    page.wait_for_url("**/duplicates.html?least=1")
    assert "There are none." in page.inner_text("main")
    page.close()


def test_an_image_finds_itself(map_page: Any, pages: Pages) -> None:
    """The text that was asked for before is gone."""
    pairs = pages.explorers[0].pairs
    map_page.fill("input[name=text]", "a red square")
    map_page.wait_for_url("**/index.html?text=a+red+square")
    map_page.set_input_files(
        "#query-image", {"name": "a.png", "mimeType": "image/png", "buffer": pairs.read_encoded(7)}
    )
    map_page.wait_for_selector("main:has-text('Nearest to your image by')")
    assert map_page.input_value("input[name=text]") == ""
    assert pairs.sample_id(7) in map_page.locator("#found section").first.inner_text()


def require_fit(page: Any, width: int) -> None:
    """Nothing on a page is wider than its window, in either scheme of colours."""
    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 29)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, page.url
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 390)])
def test_pages_fit_and_axe_finds_nothing_serious_in_the_explorer(
    browser: Any, serious: Callable[[Any], list[str]], address: str, scheme: Any, width: int
) -> None:
    """The map, groups and one of them, odd pairs, near-duplicates, a pair, answers of a search, and
    two models compared."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(90_000)
    page, found = context.new_page(), {}
    page.goto(address)
    page.wait_for_selector("#map[data-ready]")
    base = page.url.rpartition("/")[0]
    for name in (
        *("index.html", "prototypes-image.html", "prototype-text-0.html", "odd-loss.html"),
        *("duplicates.html", "pair-1.html", "search.html?text=a+red+heart", "moved-image.html"),
    ):
        if name != "index.html":  # which the address has opened
            page.goto(f"{base}/{name}")
        require_fit(page, width)
        if name == "prototypes-image.html":  # nor does its table scroll sideways
            table = page.eval_on_selector(".sortable", "table => table.parentElement.scrollWidth")
            assert table <= width
        page.emulate_media(color_scheme=scheme)
        if name == "index.html":
            # On a phone the map begins in the upper third of the screen.
            assert page.locator("#map").bounding_box()["y"] < 300
            page.evaluate(
                "() => { Bokeh.documents[0].get_model_by_name('pairs').selected.indices = [1, 4] }"
            )
        if said := serious(page):
            found[name] = said
    assert found == {}
    context.close()
