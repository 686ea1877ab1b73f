"""What the explorer's first screen has room for: images among crowded points, and a phone's bar."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit" / "explore"))

from worded import distinct_pairs, explorers

from protoclip.config import DataConfig
from protoclip.explore.render import Pages

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
    atlas = replace(one.atlas, image_map_position=positions, text_map_position=positions)
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


ROWS = """() => [...document.querySelectorAll("#thumbs img")]
  .map((image) => Number(image.src.match(/(\\d+)\\.webp/)[1]))"""


def test_images_stand_first_where_points_are_many(phone: Any) -> None:
    phone.set_viewport_size({"width": 1400, "height": 900})
    phone.wait_for_selector("#thumbs img")
    phone.wait_for_timeout(500)
    shown = [row >= STRAY for row in phone.evaluate(ROWS)]  # as they found room
    assert any(shown)
    assert shown == sorted(shown, reverse=True)
    phone.evaluate(
        """() => {
          const plot = Bokeh.documents[0].roots()[0];
          plot.x_range.setv({ start: 9, end: 11 });
          plot.y_range.setv({ start: -1, end: 1 });
        }"""
    )
    phone.wait_for_selector("#thumbs img[src$='/0.webp']")
    assert phone.evaluate(ROWS) == [0]


def test_a_phone_shows_the_selection_once_there_is_one(phone: Any) -> None:
    """The field for a search is most of its line."""
    assert phone.locator("#selection").is_hidden()
    assert phone.get_by_label("Search by text").bounding_box()["width"] > 390 / 2
    phone.evaluate("() => { Bokeh.documents[0].get_model_by_name('pairs').selected.indices = [4] }")
    assert phone.locator("#selection").is_visible()
    phone.tap("#clear")
    assert phone.locator("#selection").is_hidden()
