"""`protoclip data score`: planted wrong captions come first, and what is kept can be trained on."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from protoclip import align
from protoclip.cli import main
from protoclip.config import Config, DataConfig
from protoclip.data.sources import open_samples
from protoclip.data.split import read_chosen
from protoclip.encode.encoder import Encoder
from protoclip.explore.atlas import cross_fit_disagreement
from protoclip.explore.explorer import open_explorer
from protoclip.explore.pairs import explore_pairs
from testing import save_to_bytes, tiny_pairs
from tiny_align import rows_of
from tiny_starts import save_encoders

PAIRS, BAD, COPY = 160, 7, 9


def test_swapped_captions_agree_least_and_their_own_fits_best():
    """Of pairs whose encoders see the same in other directions, and much besides. A caption that
    several images have is no other one of itself."""
    draws = torch.Generator().manual_seed(0)
    seen = torch.randn(400, 12, generator=draws)
    images, texts = (
        seen @ torch.randn(12, width, generator=draws) + torch.randn(400, width, generator=draws)
        for width in (40, 24)
    )
    texts[1::2] = texts[::2].clone()  # of two images each
    images[1::2] = images[::2] + 0.3 * torch.randn(200, 40, generator=draws)
    own = torch.arange(400) // 2 * 2
    given = own.clone()
    swapped = torch.arange(0, 400, 20)
    given[swapped] = own[swapped.roll(1)]
    every = torch.arange(400)
    _, loss, best = cross_fit_disagreement(
        images, texts, every, given, every, compared=own.unique(), seed=0
    )
    assert {*loss.argsort()[-len(swapped) :].tolist()} == {*swapped.tolist()}
    assert (best[swapped] == own[swapped]).all()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two tiny encoders, and shapes of which twelve have the caption of the next one; an image is
    damaged, and another is there twice."""
    folder = tmp_path_factory.mktemp("score")
    torch.manual_seed(0)
    model = save_encoders(folder, "test_resnet", size=32)
    table = tiny_pairs(PAIRS)
    images, captions = table["image"].to_pylist(), table["caption"].to_pylist()
    rows = [row for row in range(20, PAIRS - 1) if captions[row] != captions[row + 1]][:24:2]
    planted = {row: captions[row + 1] for row in rows}
    texts = [[planted.get(row, name)] for row, name in enumerate(captions)]
    texts[COPY].append("a shape")
    images[BAD], images[COPY] = b"no image", images[COPY + 1]
    ids = [f"pair {row}" for row in range(PAIRS)]
    path = folder / "pairs.parquet"
    pq.write_table(pa.table({"image": images, "caption": texts, "sample_id": ids}), path)
    return {
        "planted": {f"pair {row}" for row in planted},
        "data": {"train": str(path), "validation": 0.0},
        "model": {
            "image": {"name": "test_resnet", "weights": model.image.weights, "size": 32},
            "text": {"name": model.text.name},
        },
    }


def words_of(settings: dict[str, Any], out: Path) -> list[str]:
    image, text = settings["model"]["image"], settings["model"]["text"]
    words = ["data", "score", settings["data"]["train"], "--out", str(out)]
    words += ["--model.image.name", image["name"], "--model.image.weights", image["weights"]]
    return [*words, "--model.image.size", "32", "--model.text.name", text["name"]]


def test_wrong_captions_come_first_and_the_rest_can_be_trained_on(
    settings, tmp_path, capsys, monkeypatch
):
    """A row a caption. `align` encodes nothing that was scored."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    main(words_of(settings, tmp_path / "scores.parquet"))
    shown = capsys.readouterr().out
    assert re.search(r"pairs +160\nimages +159\nunusable images +1\n", shown)
    assert shown.count("agrees least") == 3
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table["rank"].to_pylist() == [*range(1, PAIRS + 1)]
    agreement = table["agreement"].to_numpy()
    assert (np.diff(agreement) >= 0).all()
    ids, planted = table["sample_id"].to_pylist(), settings["planted"]
    assert len({*ids[:24]} & planted) >= 10
    assert f"pair {BAD}" not in ids
    rows = {(row["sample_id"], row["caption"]): row for row in table.to_pylist()}
    copies = [
        row for (name, _), row in rows.items() if name in (f"pair {COPY}", f"pair {COPY + 1}")
    ]
    assert len(copies) == 3
    assert len({row["duplicate_of"] for row in copies}) == 1
    assert copies[0]["duplicate_of"]

    encoded, encode = list[int](), Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, inputs: encoded.append(len(inputs)) or encode(self, inputs)
    )
    kept = tmp_path / "kept.csv"
    main([*words_of(settings, kept), "--keep", "0.9", "--json"])
    assert json.loads(capsys.readouterr().out)["kept"] == 144
    only = {**settings["data"], "only": str(kept)}
    chosen = read_chosen(DataConfig(**only))
    assert len(chosen.ids["only"]) == 144
    assert len(chosen.ids["only"] & planted) <= 4
    given = {"model": settings["model"], "data": only}
    plan, rows, _ = rows_of({**given, "run": {"device": "cpu"}})
    assert len(plan.samples) == 144
    assert max(encoded) <= 2  # examples, which tell models apart


def test_a_run_is_explored_with_the_scores_of_its_pairs(settings, tmp_path, monkeypatch):
    """By one rule: the same bits, and as many pairs below chance. It shows first captions."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    draws, data = np.random.default_rng(0), str(tmp_path / "pairs.parquet")
    images = [
        save_to_bytes(Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST))
        for pixels in draws.integers(0, 255, (120, 4, 4, 3), dtype=np.uint8)
    ]
    captions = [[name, "noise"] for name in tiny_pairs(120)["caption"].to_pylist()]
    captions[7::9] = [["red"]] * len(captions[7::9])
    ids = [f"pair {row}" for row in range(120)]
    pq.write_table(pa.table({"image": images, "caption": captions, "sample_id": ids}), data)
    given = {"data": {"train": data, "validation": 0.0}, "model": settings["model"]}
    main(words_of(given, tmp_path / "scores.parquet"))
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    bits = {row["sample_id"]: row["agreement"] for row in rows if row["caption"] != "noise"}
    run = {"out": str(tmp_path / "run"), "device": "cpu"}
    align({**given, "episodes": {"count": 1}, "run": run})
    words = ["--config", f"{run['out']}/config.toml", "--out", str(tmp_path / "again.parquet")]
    main(["data", "score", data, *words])  # by the encoders of the run
    assert pq.read_table(tmp_path / "again.parquet").to_pylist() == rows
    pairs = explore_pairs(open_samples(Config.from_dict(given)))
    atlas = open_explorer(run["out"], pairs, device=torch.device("cpu")).atlas
    assert atlas.unseen
    agreement = (atlas.chance - atlas.loss) / np.log(2)
    np.testing.assert_allclose(agreement, [bits[name] for name in ids], atol=1e-3)
    assert (agreement < 0).sum() == sum(value < 0 for value in bits.values()) > 0
