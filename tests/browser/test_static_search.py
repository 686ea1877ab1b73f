"""Pages that are files answer texts in a real browser, without a network, as the model does."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / "unit" / name) for name in ("explore", "export")]

from exported import save_run

import protoclip
from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.emoji import emoji_table
from protoclip.explore.explorer import open_explorer
from protoclip.explore.pairs import explore_pairs
from protoclip.explore.serve import write_static
from tiny_hugging_face import save_siglip
from tiny_starts import CLIP, save_encoders, save_open_clip

search = pytest.importorskip("protoclip.export.search")
pytestmark = pytest.mark.slow

TEXTS = [
    "red heart",
    "It’s  “DOG”, rock &amp; 2 cats!",
    "photo of two green corners " * 20,
    "日本 ñ",
]
MODELS: dict[str, Callable[[Path], str]] = {
    "CLIP": lambda folder: str(save_open_clip(folder, CLIP)),
    "BERT": lambda folder: str(save_run(folder, save_encoders(folder.with_name("parts"), size=32))),
    "SigLIP": lambda folder: f"hf:{save_siglip(folder)}",
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Those of npm, in the cache of all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NPM_CONFIG_REGISTRY")
        try:
            search.fetch_packages()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("kind", MODELS)
def test_pages_as_files_search_offline(
    browser: Any, packages: None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They find and doubt what the server does, opened from a folder; texts have the model's
    features."""
    monkeypatch.setattr(search, "MOST_LOST", -2.0)  # so float32 is written
    table = tmp_path / "emoji.parquet"
    pq.write_table(emoji_table("train").slice(0, 60), table)
    pairs = explore_pairs(sources.open_samples(Config(data=DataConfig(train=str(table)))))
    reference = MODELS[kind](tmp_path / "model")
    explorer = open_explorer(reference, pairs, device=torch.device("cpu"), layout="pca")
    nearest = explorer.measure_nearest(explorer.encoder.encode_texts(["red heart"], stage=""))[0]
    explorer.__dict__["by_chance"] = nearest + 0.05
    assert not explorer.search_text("a red heart").fits
    write_static([explorer], tmp_path / "out", search.make_search)
    context = browser.new_context(offline=True)
    context.set_default_timeout(90_000)
    page, errors = context.new_page(), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: said.type == "error" and errors.append(said.text))
    page.goto((tmp_path / "out" / "1" / "odd-loss.html").as_uri())
    page.fill("input[name=text]", "a red heart")
    page.keyboard.press("Enter")
    page.wait_for_selector("#found li")
    images = page.locator("#found [data-modality=image] li")
    shown = images.evaluate_all("all => all.map(each => Number(each.dataset.position))")
    wanted = explorer.search_text("a red heart").images
    assert len(shown) == 24
    assert len({*shown} & {position for position, _ in wanted}) >= 20
    cosines = [float(text.split()[-1]) for text in images.all_inner_texts()]
    assert cosines == pytest.approx([cosine for _, cosine in wanted], abs=0.02)
    doubt = page.get_by_text("Perhaps nothing here fits")
    assert doubt.count() == 1
    page.evaluate("opened.then(({ settings }) => { settings.byChance = [2, -1]; })")
    page.fill("input[name=text]", "red heart")  # is nearer to a word than this
    doubt.wait_for(state="detached")
    id_ = page.evaluate("Bokeh.documents[0].get_model_by_name('pairs').data.id[5]")
    page.fill("input[name=text]", id_)
    page.get_by_text("With this id").wait_for()
    assert page.locator("#found li small").first.inner_text() == id_
    found = page.evaluate(
        """async texts => {
          const all = [];
          for (const text of texts) all.push([...(await encode(await opened, text))]);
          return all;
        }""",
        TEXTS,
    )
    model, _, tokenizer = protoclip.load(reference)
    with torch.no_grad():
        features = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(found, features, atol=1e-4)
    assert errors == []
    context.close()
