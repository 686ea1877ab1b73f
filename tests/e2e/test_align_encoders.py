"""Encoders of `protoclip align` that are towers of other models: runs, open_clip, transformers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import protoclip
from interrupting import with_changes
from protoclip.config import ModelConfig, TextTowerConfig, build
from protoclip.data.captions import trim_padding
from protoclip.models.projections import FrozenEncoders, Projections
from protoclip.models.start import resolve_start
from protoclip.training.run import align
from testing import build_model, tiny_config
from tiny_align import changed, tiny_alignment
from tiny_hugging_face import (
    TEXT_MODELS,
    save_bert,
    save_mpnet,
    save_roberta,
    save_siglip,
    save_text_model,
    save_xlm_roberta,
)
from tiny_starts import CLIP, TEXT, VIT, save_open_clip

SHORT: dict[str, Any] = {"run": {"evaluate": False}, "episodes": {"size": 16, "count": 2}}
COCA = {
    **CLIP,
    "vision_cfg": {**VIT, "attentional_pool": True, "output_tokens": True},
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    "custom_text": True,
}
PIXELS, TEXTS = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32), ["a cat", "two dogs run"]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Any]:
    settings = tiny_alignment(tmp_path_factory.mktemp("encoders"))
    return {
        **settings,
        "episodes": {"size": 32, "count": 1, "batch_size": 16},
        "loss": {},
        "align": {},
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """References to models that have towers, by kind."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = tiny_config(out=str(folder / "run"))
    protoclip.train(with_changes(config, SHORT))
    save_open_clip(folder / "open_clip")
    protoclip.export(folder / "open_clip", folder / "exported", ("hf",))
    return {
        "run": str(folder / "run"),
        "open_clip": str(folder / "open_clip"),
        "transformers": f"hf:{folder / 'exported'}",
        "mpnet": str(save_mpnet(folder / "mpnet")),
    }


def settings_of(given: dict[str, Any], image: str | None, text: str | None) -> dict[str, Any]:
    """Those of `given` with other encoders."""
    model = dict(given["model"])
    if image is not None:
        model["image"] = {"name": image}
    if text is not None:
        model["text"] = {"name": text}
        if text.endswith("mpnet"):
            model["text"]["context_length"] = 12
    return {**given, "model": model}


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("run", "open_clip"),
        ("open_clip", "run"),
        ("transformers", "transformers"),
    ],
)
def test_an_encoder_is_the_tower_of_another_model(image, text, given, models, tmp_path):
    """It stays what it was there; the run opens by itself, and computes what its encoders do."""
    settings = settings_of(given, models[image], models[text])
    results = align(changed(settings, tmp_path / "run"))
    assert results["metrics"]["eval/validation/retrieval/image_to_text@10"] > 0
    model, _, tokenizer = protoclip.load(results["folder"])
    tokens = tokenizer(TEXTS)
    assert tokens.shape == (2, {"run": 8}.get(text, 12))
    encoders, between = FrozenEncoders(model.towers).eval(), Projections(model.towers)
    with torch.inference_mode():
        features = {"image": encoders.encode_image(PIXELS), "text": encoders.encode_text(tokens)}
        torch.testing.assert_close(
            between.encode_image(features["image"]), model.encode_image(PIXELS)
        )
        torch.testing.assert_close(between.encode_text(features["text"]), model.encode_text(tokens))
        for tower, reference in (("image", image), ("text", text)):
            start = build_model(ModelConfig(start=models[reference]), seed=0).eval()
            pooling = original(start, tower, tokens)
            torch.testing.assert_close(features[tower], pooling, atol=1e-5, rtol=1e-5)


def original(start: Any, tower: str, tokens: torch.Tensor) -> torch.Tensor:
    """What the projection of a model's tower reads, caught there or found by its inverse."""
    towers = start.towers
    if tower == "image":
        if hasattr(towers.visual, "trunk"):
            return towers.visual.trunk(PIXELS)
        towers.visual.proj = None
        return towers.encode_image(PIXELS)
    width = towers.text_projection.shape[0]
    towers.text_projection = torch.nn.Parameter(torch.eye(width))
    return towers.encode_text(tokens)


def save_pooling(folder: Path, settings: dict[str, Any]) -> None:
    """As sentence-transformers keeps it beside a model."""
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("kind", "pooling", "way"),
    [
        *((kind, {"pooling_mode": "mean"}, "mean") for kind in TEXT_MODELS),
        ("distilbert", {"pooling_mode": "cls"}, "cls"),
        ("qwen3", {"pooling_mode": "lasttoken"}, "last"),
        ("bert", {"pooling_mode": "lasttoken"}, "last"),
        (save_mpnet, None, "mean"),
        (save_bert, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        (save_xlm_roberta, {"pooling_mode": "mean", "include_prompt": True}, "mean"),
        (save_roberta, None, "mean"),
    ],
)
def test_any_kind_of_text_model_is_a_tower(kind, pooling, way, tmp_path):
    """Pooled as its sentence-transformers files say, of older and newer versions; padding, which
    some end texts with, changes nothing."""
    folder = tmp_path / "text"
    save_text_model(folder, kind) if isinstance(kind, str) else kind(folder)
    if pooling is not None:
        save_pooling(folder, pooling)
    text = TextTowerConfig(name=str(folder), context_length=20)
    start = resolve_start(ModelConfig(text=text)).model
    assert start.text.pooling == way
    tokens = resolve_start(start).tokenizer()(TEXTS)
    assert tokens.shape == (2, 20)
    opener = transformers.AutoModelForTextEncoding if kind == "t5" else transformers.AutoModel
    theirs = opener.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    built = build_model(start, seed=0).eval()
    with torch.inference_mode():
        found = FrozenEncoders(built.towers).eval().encode_text(trim_padding(tokens))
        for row, caption in zip(found, TEXTS, strict=True):
            inputs = words([caption], return_tensors="pt")
            states = theirs(input_ids=inputs["input_ids"]).last_hidden_state[0]
            places = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}
            torch.testing.assert_close(row, places[way], rtol=1e-4, atol=1e-5)
        whole = built.encode_text(tokens)
        torch.testing.assert_close(built.towers.text.proj(found), whole, rtol=1e-4, atol=1e-5)


def test_another_pooling_is_refused_in_one_line(tmp_path):
    folder = save_bert(tmp_path / "text")
    save_pooling(folder, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True})
    line = "^model.text.name: .* pools its tokens by max and mean; .*choose .* model.text.pooling$"
    with pytest.raises(ValueError, match=line):
        resolve_start(ModelConfig(text=TextTowerConfig(name=str(folder))))
    chosen = ModelConfig(text=TextTowerConfig(name=str(folder), pooling="cls"))
    assert resolve_start(chosen).model.text.pooling == "cls"


def test_an_encoder_of_a_run_is_read_at_the_length_of_the_run(models, tmp_path):
    """Not at that of the model which it started from; one that starts untrained has none yet."""
    config = tiny_config(out=str(tmp_path / "run"))
    start = ModelConfig(
        start=models["open_clip"], text=TextTowerConfig(context_length=9), heads=config.model.heads
    )
    protoclip.train(with_changes(replace(config, model=start), SHORT))
    found = resolve_start(ModelConfig(text=TextTowerConfig(name=str(tmp_path / "run")))).model
    assert found.text.context_length == 9
    assert found.image.size is None


def test_a_trunk_whose_classifier_projects_is_an_encoder(given, tmp_path):
    """As open_clip has EVA's and MobileCLIP's."""
    vision = {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_proj": None}
    vision |= {"image_size": 32, "timm_pool": "avg"}
    model = str(save_open_clip(tmp_path / "model", {**CLIP, "vision_cfg": vision}))
    start = resolve_start(build(ModelConfig, settings_of(given, model, None)["model"], "model."))
    encoders = FrozenEncoders(build_model(start, seed=0).towers).eval()
    trunk = protoclip.load(model)[0].towers.visual.trunk.eval()
    with torch.inference_mode():
        expected = trunk.forward_head(trunk.forward_features(PIXELS), pre_logits=True)
        torch.testing.assert_close(encoders.encode_image(PIXELS), expected)


def test_an_aligned_run_is_exported_with_its_text_files(given, models, tmp_path):
    """Its text model may be gone by then."""
    moved = shutil.copytree(given["model"]["text"]["name"], tmp_path / "bert")
    settings = settings_of(given, models["run"], None)
    settings["model"]["text"] = {"name": str(moved), "context_length": 20}
    align(changed(settings, tmp_path / "run"))
    shutil.rmtree(moved)
    protoclip.export(tmp_path / "run", tmp_path / "out", ("open_clip",))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"\n| image tower | {models['run']} |\n" in card
    assert f"\n| text tower | {moved} |\n" in card
    model, _, tokenizer = protoclip.load(tmp_path / "run")
    theirs, _, _ = protoclip.load(tmp_path / "out")
    with torch.inference_mode():
        ours = model.encode_text(tokenizer(TEXTS))
        torch.testing.assert_close(theirs.encode_text(tokenizer(TEXTS)), ours)


@pytest.fixture(scope="module")
def between_towers(given, models, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run between two towers of open_clip, and what its export to the folder beside says."""
    run = tmp_path_factory.mktemp("between") / "run"
    align(changed(settings_of(given, models["open_clip"], models["open_clip"]), run))
    return run, protoclip.export(run, run.with_name("out"), ("hf",))


def test_a_run_between_two_towers_of_open_clip_is_a_model_of_transformers(between_towers):
    _, facts = between_towers
    assert facts["formats"] == {"hf": "CLIPModel"}
    assert max(facts["differences"]["hf"].values()) < 1e-5


def test_sentence_transformers_opens_a_run_between_two_towers_of_open_clip(between_towers):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    run, facts = between_towers
    model, _, tokenizer = protoclip.load(run)
    theirs = sentence_transformers.SentenceTransformer(facts["folder"], device="cpu")
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    with torch.inference_mode():
        ours = model.encode_text(tokenizer(TEXTS))
        torch.testing.assert_close(torch.from_numpy(theirs.encode(TEXTS)), ours)
        pixels = protoclip.load(run)[1](image)[None]
        ours = model.encode_image(pixels)
        torch.testing.assert_close(torch.from_numpy(theirs.encode([image])), ours)


def save_coca(folder: Path) -> Path:
    return save_open_clip(folder, COCA)


@pytest.mark.parametrize("save", [save_siglip, save_coca])
def test_a_model_without_an_encoder_is_refused_in_one_line(save, given, tmp_path):
    """Which says what can be that encoder."""
    model = str(save(tmp_path / "model"))
    settings = settings_of(given, image=None, text=model)
    message = f"^model.text.name: {model}: .* projection .*; name a text model such"
    with pytest.raises(ValueError, match=message):
        align(changed(settings, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
