"""`align` between several encoders of a modality: joined, then one model like any other."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import protoclip
from protoclip.training.run import align
from testing import tiny_pairs
from tiny_align import changed, find_moved, rows_of, stop_in_episode, tiny_alignment, weights_of
from tiny_hugging_face import NO_DROPOUT, save_bert, save_mpnet

OTHER = "test_efficientnet"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    """Those of a run between two encoders a side, on enough images to choose layers by."""
    folder = tmp_path_factory.mktemp("encoders")
    settings = tiny_alignment(folder)
    torch.manual_seed(1)
    pq.write_table(tiny_pairs(120), folder / "more.parquet")
    weights = folder / f"{OTHER}.safetensors"
    save_file(timm.create_model(OTHER).state_dict(), weights)
    image, text = settings["model"]["image"], settings["model"]["text"]
    deep = save_bert(folder / "deep", num_hidden_layers=3, **NO_DROPOUT)
    image |= {"name": [image["name"], f"timm:{OTHER}"], "weights": [image["weights"], str(weights)]}
    text |= {"name": [str(deep), str(save_mpnet(folder / "mpnet"))]}
    return {
        **settings,
        "model": {**settings["model"], "image": image, "text": text},
        "data": {**settings["data"], "train": str(folder / "more.parquet")},
        "align": {**settings["align"], "features": str(folder)},
        "loss": {"prototypical": 0.0},
    }


@pytest.fixture(scope="module")
def ended(settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ended") / "run"
    align(changed(settings, out))
    return out


def of_side(settings: dict[str, Any], **sides: Any) -> dict[str, Any]:
    """The settings with others of the towers."""
    model = settings["model"]
    return {
        **settings,
        "model": {**model, **{side: {**model[side], **more} for side, more in sides.items()}},
    }


def only(settings: dict[str, Any], number: int) -> dict[str, Any]:
    """The settings of a run between the first, or the second, of its encoders."""
    image, text = settings["model"]["image"], settings["model"]["text"]
    return of_side(
        settings,
        image={name: image[name][number] for name in ("name", "weights")},
        text={"name": text["name"][number]},
    )


def test_each_encoder_is_stored_as_if_it_were_alone(settings, tmp_path):
    """Its rows are those of a run between single encoders, and a store has both."""
    joined = {**settings, "align": {"features": str(tmp_path)}}
    _, rows, model = rows_of(joined)
    stores = {path for path in tmp_path.iterdir() if path.name != "listings"}
    assert len(stores) == 4
    every = np.arange(len(rows))
    towers = model.towers.visual, model.towers.text
    assert [rows.image.width, rows.text.width] == [sum(tower.widths) for tower in towers]
    for number in (0, 1):
        alone = {**only(settings, number), "align": joined["align"]}
        _, one, _ = rows_of(alone)
        assert one.image_rows(every).equal(rows_of_part(rows.image, number)[every])
        captions = rows.listing.captions[every]
        assert one.text_rows(every).equal(rows_of_part(rows.text, number)[captions])
    assert {path for path in tmp_path.iterdir() if path.name != "listings"} == stores


def rows_of_part(rows: Any, number: int) -> torch.Tensor:
    part = rows.parts[number]
    return torch.from_numpy(part[np.arange(len(part.numbers))])


@torch.no_grad()
def test_the_run_is_one_model(settings, ended, tmp_path):
    """Its features are those of `embed` and of its ONNX, and other formats cannot hold it."""
    model, transform, tokenizer = protoclip.load(ended)
    table = pq.read_table(settings["data"]["train"]).slice(0, 4)
    pq.write_table(table, tmp_path / "few.parquet")
    protoclip.embed(ended, tmp_path / "few.parquet", tmp_path / "out.parquet")
    images = [transform(Image.open(BytesIO(data))) for data in table["image"].to_pylist()]
    written = pq.read_table(tmp_path / "out.parquet")
    wanted = model.encode_image(torch.stack(images), normalize=True)
    vectors = torch.tensor(written["image_vector"].to_pylist())
    torch.testing.assert_close(vectors, wanted, atol=2e-3, rtol=0)
    wanted = model.encode_text(tokenizer(table["caption"].to_pylist()), normalize=True)
    vectors = torch.tensor([several[0] for several in written["text_vectors"].to_pylist()])
    torch.testing.assert_close(vectors, wanted, atol=2e-3, rtol=0)
    facts = protoclip.export(ended, tmp_path / "export", ("onnx", "open_clip", "hf", "timm"))
    assert max(facts["differences"]["onnx"].values()) < 1e-5
    assert facts["left_out"].keys() == {"open_clip", "hf", "timm"}


@torch.no_grad()
def test_what_was_stored_is_what_the_loaded_model_computes(settings, ended):
    """Although its images are normalised as for the first encoder alone."""
    _, rows, _ = rows_of(settings)
    model, transform, _ = protoclip.load(ended)
    image = pq.read_table(settings["data"]["train"])["image"][0].as_py()
    tower = model.towers.visual
    computed = tower(transform(Image.open(BytesIO(image)))[None])
    stored = tower.head(rows.image_rows(np.zeros(1, int)).float())
    torch.testing.assert_close(stored, computed, atol=2e-3, rtol=2e-2)


def test_a_run_goes_on_bit_for_bit(settings, ended, tmp_path, monkeypatch):
    given = changed(settings, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_in_episode(patch, 2)
        align(given)
    align(given, resume="auto")
    after, before = weights_of(tmp_path / "run"), weights_of(ended)
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)


def test_the_run_is_fine_tuned(settings, ended, tmp_path):
    """All of its encoders move, with rates that fall from layer to layer."""
    parts = ["visual.parts.0.", "visual.parts.1.", "text.parts.0.", "text.parts.1."]
    assert find_moved(settings, ended, tmp_path / "tuned", parts) == parts


@pytest.mark.parametrize("layers", ["plain", ["last+2", "last"]])
def test_layers_are_given_for_each_encoder(settings, tmp_path, layers):
    given = of_side(settings, image={"joined_layers": layers}, text={"joined_layers": "plain"})
    *_, model = rows_of(changed(given, tmp_path / "run"))
    chosen = [(0, 0), (1, 0)] if layers == "plain" else [(0, 0), (0, 2), (1, 0)]
    assert model.towers.visual.chosen == chosen
    assert model.towers.text.chosen == [(0, 0), (1, 0)]


def test_a_side_of_several_goes_with_one_encoder(settings, tmp_path):
    image = only(settings, 1)["model"]["image"]
    _, rows, model = rows_of(changed(of_side(settings, image=image), tmp_path / "run"))
    assert model.towers.visual.given[0] == 0
    assert rows.image.width == sum(model.towers.visual.widths)
    assert [layer for _, layer in model.towers.text.given] == [0, 2, 0]


def test_several_image_encoders_open_with_one_text_encoder(settings, tmp_path):
    text = {"name": settings["model"]["text"]["name"][1]}
    align(changed(of_side(settings, text=text), tmp_path / "run"))
    model, _, tokenizer = protoclip.load(tmp_path / "run")
    assert model.encode_text(tokenizer(["a red square"])).isfinite().all()


@pytest.mark.parametrize(
    ("side", "settings_of_it", "message"),
    [
        ("image", {"weights": ["a", "b", "c"]}, r"model\.image\.weights: 3 values for 2 encoders"),
        ("text", {"name": ["minilm", "open_clip:RN50/openai"]}, r"model\.text\.name: open_clip:"),
    ],
)
def test_what_cannot_be_joined_is_refused(settings, side, settings_of_it, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        align(changed(of_side(settings, **{side: settings_of_it}), tmp_path / "run"))
    assert not (tmp_path / "run").exists()
