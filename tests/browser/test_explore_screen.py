"""The explorer's first screen: what has room, what stays in sight, and what takes the pointer."""

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "unit" / "explore"))

from worded import distinct_pairs, explorers

from protoclip.config import DataConfig
from protoclip.explore.pages import Pages

pytestmark = pytest.mark.slow

CROWDED, STRAY = 180, 20


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """First images on a circle, far from each other, then a crowd in its middle."""
    path = tmp_path_factory.mktemp("screen") / "pairs.parquet"
    rows = distinct_pairs(STRAY + CROWDED)
    pq.write_table(pa.Table.from_pylist(rows), path)
    (one,) = explorers(DataConfig(train=str(path)), cache=False)
    angles = np.linspace(0, 2 * np.pi, STRAY, endpoint=False)
    circle = 10 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    crowd = np.random.default_rng(0).uniform(-3, 3, (CROWDED, 2))
    positions = np.concatenate([circle, crowd]).astype(np.float32)
    atlas = replace(one.atlas, map_position={"image": positions, "text": positions})
    return Pages([replace(one, atlas=atlas)])


@pytest.fixture
def phone(browser: Any, address: str) -> Iterator[Any]:
    """The map on a phone, drawn."""
    size = {"width": 390, "height": 844}
    context = browser.new_context(viewport=size, has_touch=True, is_mobile=True)
    context.set_default_timeout(90_000)  # machines that test are busy
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#map[data-ready]")
    yield page
    context.close()


MIDDLE_OF_A_NAME = """() => {
  const [name] = [...document.querySelectorAll("#names button")]
    .filter((button) => button.style.visibility === "visible");
  const box = name.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
}"""


def test_one_card_stands_under_the_pointer_and_counts_the_others(phone: Any) -> None:
    phone.set_viewport_size({"width": 1400, "height": 900})
    phone.wait_for_timeout(500)
    point = phone.evaluate(
        """() => {
          const plot = Bokeh.documents[0].roots()[0];
          const source = Bokeh.documents[0].get_model_by_name("pairs");
          for (const name of ["image_x", "image_y"]) source.data[name].fill(0, 0, 8);
          source.change.emit();
          document.getElementById("names").style.display = "none";
          const view = Bokeh.index.get(plot);
          const box = view.el.getBoundingClientRect();
          const { x_scale, y_scale } = view.frame;
          return [box.x + x_scale.compute(0), box.y + y_scale.compute(0)];
        }"""
    )
    phone.mouse.move(point[0] - 3, point[1])
    phone.mouse.move(*point)
    phone.wait_for_selector(".tooltip .more:has-text('more here')")
    assert phone.locator(".tooltip").count() == 1


def test_a_drag_that_selects_may_begin_on_a_name(phone: Any) -> None:
    """With other tools a name takes the pointer."""
    phone.set_viewport_size({"width": 1400, "height": 900})
    phone.wait_for_timeout(500)  # names have found their room
    start = phone.evaluate(MIDDLE_OF_A_NAME)
    box = phone.locator("#map").bounding_box()
    for tool, on_name in (("Lasso Select", False), ("Pan", True), ("Box Select", False)):
        phone.click(f"#map [title='{tool}']")
        on = "([x, y]) => !!document.elementFromPoint(x, y).closest('#names')"
        assert phone.evaluate(on, start) is on_name
    phone.mouse.move(*start)
    phone.mouse.down()
    far = box["x"] + 0.95 * box["width"], box["y"] + 0.95 * box["height"]
    phone.mouse.move(*far, steps=3)
    phone.mouse.up()
    phone.wait_for_selector("#selection:not(.none)")


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
        image.save(buffer := io.BytesIO(), "PNG")
        rows += [
            {"sample_id": f"{number}{n}", "image": buffer.getvalue(), "caption": f"a thing, {n}"}
            for n in "ab"
        ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    explored = explorers(DataConfig(train=str(tmp_path / "pairs.parquet")), cache=False)
    page = browser.new_page()
    page.goto(serve_pages(Pages(explored)).replace("/?", "/1/duplicates.html?"))
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


def test_an_image_finds_itself(phone: Any, pages: Pages) -> None:
    """The text that was asked for before is gone."""
    pairs = pages.explorers[0].pairs
    phone.fill("input[name=text]", "a red square")
    phone.wait_for_url("**/search.html?text=a+red+square")
    phone.set_input_files(
        "#query-image", {"name": "a.png", "mimeType": "image/png", "buffer": pairs.read_encoded(7)}
    )
    phone.wait_for_selector("main:has-text('Nearest to your image by')")
    assert phone.input_value("input[name=text]") == ""
    assert pairs.sample_id(7) in phone.locator("section").first.inner_text()
    phone.set_input_files(
        "#query-image", {"name": "b.png", "mimeType": "image/png", "buffer": b"none"}
    )
    phone.wait_for_selector("#main:has-text('This is no image that can be read')")
