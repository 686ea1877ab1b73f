"""`align` on several layers of its encoders: chosen, then one model like any other."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import protoclip
from protoclip import cli
from protoclip.config import Config
from protoclip.models.checkpoint import find_checkpoint
from protoclip.training import plan
from protoclip.training.folder import to_toml
from protoclip.training.run import align
from testing import tiny_pairs
from tiny_align import changed, find_moved, stop_in_episode, tiny_alignment, weights_of
from tiny_hugging_face import NO_DROPOUT, save_bert


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    """Those of a run on enough images to choose by, and a text encoder of three blocks."""
    folder = tmp_path_factory.mktemp("layers")
    settings = tiny_alignment(folder)
    pq.write_table(tiny_pairs(160), folder / "more.parquet")
    bert = save_bert(folder / "deep", num_hidden_layers=3, **NO_DROPOUT)
    text = {**settings["model"]["text"], "name": str(bert)}
    return {
        **settings,
        "model": {**settings["model"], "text": text},
        "data": {**settings["data"], "train": str(folder / "more.parquet")},
    }


@pytest.fixture(scope="module")
def ended(settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ended") / "run"
    align(changed(settings, out))
    return out


def layers_of(run: Path) -> list[str]:
    section = json.loads((find_checkpoint(str(run)) / "model.json").read_text())["model"]
    return [section[tower]["joined_layers"] for tower in ("image", "text")]


def test_a_run_says_which_layers_it_chose_and_why(settings, tmp_path, capsys):
    align(changed(settings, tmp_path / "run"))
    image, text = layers_of(tmp_path / "run")
    assert image in ("last", "last+4", "last+3")
    assert text in ("last", "last+2")
    said = capsys.readouterr().err
    assert f"model.image.joined_layers = {image} and model.text.joined_layers = {text}" in said
    assert ("a partner is found at rank" in said) == ((image, text) != ("last", "last"))


def test_layers_given_on_the_command_line_stay(settings, tmp_path):
    """Also plain encoders, whose word may not read as a setting that is unset."""
    recipe = tmp_path / "align.toml"
    text = to_toml(Config.from_dict(changed(settings, tmp_path / "run")))
    recipe.write_text(text, encoding="utf-8")
    words = ["--model.image.joined_layers", "last+2", "--model.text.joined_layers", "plain"]
    cli.main(["align", "--config", str(recipe), *words])
    assert layers_of(tmp_path / "run") == ["last+2", "plain"]


def test_a_run_goes_on_with_the_layers_that_it_chose(settings, ended, tmp_path, monkeypatch):
    """Bit for bit, though it chooses only once."""
    given = changed(settings, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_in_episode(patch, 2)
        align(given)
    monkeypatch.setattr(plan.PairRows, "choose_columns", None)
    align(given, resume="auto")
    after, before = weights_of(tmp_path / "run"), weights_of(ended)
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)


def test_a_run_of_last_layers_alone_is_exported_as_one_of_plain_towers(settings, tmp_path, capsys):
    """Its vectors are the run's, and formats are those of a run of plain encoders."""
    sides = {
        side: {**settings["model"][side], "joined_layers": "last"} for side in ("image", "text")
    }
    given = {**settings, "model": {**settings["model"], **sides}, "loss": {"prototypical": 0.0}}
    align(changed(given, tmp_path / "run"))
    assert "cannot be exported as hf: transformers needs" in capsys.readouterr().err
    facts = protoclip.export(
        tmp_path / "run", tmp_path / "export", ("onnx", "open_clip", "hf", "timm")
    )
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


@torch.no_grad()
def test_the_run_is_one_model(settings, ended, tmp_path):
    """Its features are those of `embed`, which reads what `align` encoded, and of its ONNX."""
    model, transform, tokenizer = protoclip.load(ended)
    table = pq.read_table(settings["data"]["train"]).slice(0, 4)
    pq.write_table(table, tmp_path / "few.parquet")
    protoclip.embed(ended, tmp_path / "few.parquet", tmp_path / "out.parquet")
    images = torch.stack(
        [transform(Image.open(BytesIO(data))) for data in table["image"].to_pylist()]
    )
    wanted = model.encode_image(images, normalize=True)
    written = torch.tensor(pq.read_table(tmp_path / "out.parquet")["image_vector"].to_pylist())
    torch.testing.assert_close(written, wanted, atol=2e-3, rtol=0)
    facts = protoclip.export(ended, tmp_path / "export", ("onnx", "open_clip", "hf", "timm"))
    assert max(facts["differences"]["onnx"].values()) < 1e-5
    assert facts["left_out"].keys() == {"open_clip", "hf", "timm"}
    assert tokenizer(["a cat"]).shape == (1, 20)


def test_the_run_is_fine_tuned(settings, ended, tmp_path):
    """Both encoders move, and the layers stay."""
    parts = ["visual.trunk.", "text.transformer."]
    assert find_moved(settings, ended, tmp_path / "tuned", parts) == parts
    assert layers_of(tmp_path / "tuned") == layers_of(ended)
