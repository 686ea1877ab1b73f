"""`align` on several layers of its encoders, and between several encoders of a modality: chosen and
joined, then one model like any other."""

import json
from contextlib import redirect_stderr
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import protoclip
from protoclip import cli
from protoclip.config import Config
from protoclip.models.checkpoint import find_checkpoint
from protoclip.training import plan
from protoclip.training.folder import to_toml
from protoclip.training.run import align
from testing import tiny_pairs
from tiny_align import (
    changed,
    find_moved,
    rows_of,
    run_onnx_example,
    stop_in_episode,
    tiny_alignment,
    weights_of,
)
from tiny_hugging_face import NO_DROPOUT, save_bert, save_mpnet

OTHER = "test_efficientnet"
PARTS = {
    "layered": ["visual.trunk.", "text.transformer."],
    "joined": ["visual.parts.0.", "visual.parts.1.", "text.parts.0.", "text.parts.1."],
}


@pytest.fixture(scope="module")
def layered(tmp_path_factory) -> dict[str, Any]:
    """Settings on enough images to choose layers by, with a text encoder of three blocks."""
    folder = tmp_path_factory.mktemp("layers")
    settings = tiny_alignment(folder)
    pq.write_table(tiny_pairs(160), folder / "more.parquet")
    deep = save_bert(folder / "deep", num_hidden_layers=3, **NO_DROPOUT)
    data = {**settings["data"], "train": str(folder / "more.parquet")}
    return of_side({**settings, "data": data}, text={"name": str(deep)})


@pytest.fixture(scope="module")
def joined(layered, tmp_path_factory) -> dict[str, Any]:
    """Those of a run between two encoders a side."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(1)
    weights = folder / f"{OTHER}.safetensors"
    save_file(timm.create_model(OTHER).state_dict(), weights)
    image, text = layered["model"]["image"], layered["model"]["text"]
    sides = {
        "image": {
            "name": [image["name"], f"timm:{OTHER}"],
            "weights": [image["weights"], str(weights)],
        },
        "text": {"name": [text["name"], str(save_mpnet(folder / "mpnet"))]},
    }
    own = {"align": {**layered["align"], "features": str(folder)}, "loss": {"prototypical": 0.0}}
    return of_side({**layered, **own}, **sides)


class Ended(NamedTuple):
    """A finished run, its settings, and what it said."""

    kind: str
    settings: dict[str, Any]
    run: Path
    said: str


def finish_run(kind: str, settings: dict[str, Any], out: Path) -> Ended:
    with out.with_suffix(".txt").open("w+") as said, redirect_stderr(said):
        align(changed(settings, out))
    return Ended(kind, settings, out, out.with_suffix(".txt").read_text())


@pytest.fixture(scope="module", params=PARTS)
def ended(request, tmp_path_factory) -> Ended:
    settings = request.getfixturevalue(request.param)
    return finish_run(request.param, settings, tmp_path_factory.mktemp("ended") / "run")


def of_side(settings: dict[str, Any], **sides: Any) -> dict[str, Any]:
    """The settings with others of the towers."""
    model = settings["model"]
    towers = {side: {**model[side], **more} for side, more in sides.items()}
    return {**settings, "model": {**model, **towers}}


def only(settings: dict[str, Any], number: int) -> dict[str, Any]:
    """The settings of a run between the first, or the second, of its encoders."""
    image, text = settings["model"]["image"], settings["model"]["text"]
    return of_side(
        settings,
        image={name: image[name][number] for name in ("name", "weights")},
        text={"name": text["name"][number]},
    )


def layers_of(run: Path) -> list[Any]:
    section = json.loads((find_checkpoint(str(run)) / "model.json").read_text())["model"]
    return [section[tower]["joined_layers"] for tower in ("image", "text")]


@torch.no_grad()
def test_the_run_is_one_model(ended, tmp_path):
    """Its features are those of `embed` and of its ONNX, and other formats cannot hold it."""
    model, transform, tokenizer = protoclip.load(ended.run)
    table = pq.read_table(ended.settings["data"]["train"]).slice(0, 4)
    pq.write_table(table, tmp_path / "few.parquet")
    protoclip.embed(ended.run, tmp_path / "few.parquet", tmp_path / "out.parquet")
    images = [transform(Image.open(BytesIO(data))) for data in table["image"].to_pylist()]
    written = pq.read_table(tmp_path / "out.parquet")
    wanted = model.encode_image(torch.stack(images), normalize=True)
    vectors = torch.tensor(written["image_vector"].to_pylist())
    torch.testing.assert_close(vectors, wanted, atol=2e-3, rtol=0)
    wanted = model.encode_text(tokenizer(table["caption"].to_pylist()), normalize=True)
    vectors = torch.tensor([several[0] for several in written["text_vectors"].to_pylist()])
    torch.testing.assert_close(vectors, wanted, atol=2e-3, rtol=0)
    facts = protoclip.export(ended.run, tmp_path / "export", ("onnx", "open_clip", "hf", "timm"))
    assert max(facts["differences"]["onnx"].values()) < 1e-5
    left = run_onnx_example(tmp_path / "export", ended.run)
    wanted = model.encode_text(tokenizer(left["captions"]), normalize=True)
    torch.testing.assert_close(torch.from_numpy(left["text_features"]), wanted, atol=1e-4, rtol=0)
    assert facts["left_out"].keys() == {"open_clip", "hf", "timm"}


def test_a_run_goes_on_bit_for_bit(ended, tmp_path, monkeypatch):
    """With the layers that it chose, though it chooses only once."""
    given = changed(ended.settings, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_in_episode(patch, 2)
        align(given)
    monkeypatch.setattr(plan.PairRows, "choose_columns", None)
    align(given, resume="auto")
    after, before = weights_of(tmp_path / "run"), weights_of(ended.run)
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)


def test_the_run_is_fine_tuned(ended, tmp_path):
    """All of its encoders move, and the layers stay."""
    parts = PARTS[ended.kind]
    assert find_moved(ended.settings, ended.run, tmp_path / "tuned", parts) == parts
    assert layers_of(tmp_path / "tuned") == layers_of(ended.run)


@pytest.mark.parametrize("ended", ["layered"], indirect=True)
def test_a_run_says_which_layers_it_chose_and_why(ended):
    image, text = layers_of(ended.run)
    assert image in ("last", "last+4", "last+3")
    assert text in ("last", "last+2")
    chosen = f"model.image.joined_layers = {image} and model.text.joined_layers = {text}"
    assert chosen in ended.said
    assert ("a partner is found at rank" in ended.said) == ((image, text) != ("last", "last"))


def test_layers_given_on_the_command_line_stay(layered, tmp_path):
    """Also plain encoders, whose word may not read as a setting that is unset."""
    recipe = tmp_path / "align.toml"
    text = to_toml(Config.from_dict(changed(layered, tmp_path / "run")))
    recipe.write_text(text, encoding="utf-8")
    words = ["--model.image.joined_layers", "last+2", "--model.text.joined_layers", "plain"]
    cli.main(["align", "--config", str(recipe), *words])
    assert layers_of(tmp_path / "run") == ["last+2", "plain"]


def test_a_run_of_last_layers_alone_is_exported_as_one_of_plain_towers(layered, tmp_path):
    """Its vectors are the run's, and formats are those of a run of plain encoders."""
    last = {"joined_layers": "last"}
    given = of_side({**layered, "loss": {"prototypical": 0.0}}, image=last, text=last)
    align(changed(given, tmp_path / "run"))
    facts = protoclip.export(tmp_path / "run", tmp_path / "export", ("open_clip", "hf", "timm"))
    assert facts["left_out"].keys() == {"hf"}
    read = [protoclip.load(folder) for folder in (tmp_path / "run", tmp_path / "export")]
    images = torch.randn(2, 3, 32, 32)
    captions = ["a cat", "two dogs"]
    with torch.no_grad():
        vectors = [
            (model.encode_image(images, normalize=True), model.encode_text(words(captions), True))
            for model, _, words in read
        ]
    for one, other in zip(*vectors, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_each_encoder_is_stored_as_if_it_were_alone(joined, tmp_path):
    """Its rows are those of a run between single encoders, and a store has both."""
    own = {"align": {"features": str(tmp_path)}}
    _, rows, model = rows_of({**joined, **own})
    stores = {path for path in tmp_path.iterdir() if path.name != "listings"}
    assert len(stores) == 4
    every = np.arange(len(rows))
    towers = model.towers.visual, model.towers.text
    assert [rows.image.width, rows.text.width] == [sum(tower.widths) for tower in towers]
    for number in (0, 1):
        _, one, _ = rows_of({**only(joined, number), **own})
        assert one.image_rows(every).equal(rows_of_part(rows.image, number)[every])
        captions = rows.listing.captions[every]
        assert one.text_rows(every).equal(rows_of_part(rows.text, number)[captions])
    assert {path for path in tmp_path.iterdir() if path.name != "listings"} == stores


def rows_of_part(rows: Any, number: int) -> torch.Tensor:
    part = rows.parts[number]
    return torch.from_numpy(part[np.arange(len(part.numbers))])


@torch.no_grad()
@pytest.mark.parametrize("ended", ["joined"], indirect=True)
def test_what_was_stored_is_what_the_loaded_model_computes(ended):
    """Although its images are normalised as for the first encoder alone."""
    _, rows, _ = rows_of(ended.settings)
    model, transform, _ = protoclip.load(ended.run)
    image = pq.read_table(ended.settings["data"]["train"])["image"][0].as_py()
    tower = model.towers.visual
    computed = tower(transform(Image.open(BytesIO(image)))[None])
    stored = tower.head(rows.image_rows(np.zeros(1, int)).float())
    torch.testing.assert_close(stored, computed, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("layers", ["plain", ["last+2", "last"]])
def test_layers_are_given_for_each_encoder(joined, tmp_path, layers):
    given = of_side(joined, image={"joined_layers": layers}, text={"joined_layers": "plain"})
    *_, model = rows_of(changed(given, tmp_path / "run"))
    chosen = [(0, 0), (1, 0)] if layers == "plain" else [(0, 0), (0, 2), (1, 0)]
    assert model.towers.visual.chosen == chosen
    assert model.towers.text.chosen == [(0, 0), (1, 0)]


def test_a_side_of_several_goes_with_one_encoder(joined, tmp_path):
    image = only(joined, 1)["model"]["image"]
    _, rows, model = rows_of(changed(of_side(joined, image=image), tmp_path / "run"))
    assert model.towers.visual.given[0] == 0
    assert rows.image.width == sum(model.towers.visual.widths)
    assert [layer for _, layer in model.towers.text.given] == [0, 2, 0]


def test_several_image_encoders_open_with_one_text_encoder(joined, tmp_path):
    text = {"name": joined["model"]["text"]["name"][1]}
    align(changed(of_side(joined, text=text), tmp_path / "run"))
    model, _, tokenizer = protoclip.load(tmp_path / "run")
    assert model.encode_text(tokenizer(["a red square"])).isfinite().all()
