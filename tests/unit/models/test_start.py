"""Starting from a model: its weights are the run's first, and the run loads without it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import protoclip
from protoclip.config import (
    Config,
    EpisodeConfig,
    HeadConfig,
    ImageTowerConfig,
    ModelConfig,
    OptimConfig,
    TextTowerConfig,
)
from protoclip.data.transforms import EvaluationTransform
from protoclip.models.checkpoint import (
    MODEL,
    WEIGHTS,
    find_checkpoint,
    model_config,
    model_json,
    write_checkpoint,
)
from protoclip.models.protoclip import ProtoCLIP, image_input, projection_head
from protoclip.models.start import find_start, names_model, resolve_start
from protoclip.models.transformers import MINILM
from protoclip.training import run
from protoclip.training.plan import make_plan
from testing import build_model, tiny_config, tiny_model, tiny_pairs
from tiny_hugging_face import save_bert, save_siglip
from tiny_starts import CLIP, HEADS, RESNET, VIT, save_encoders, save_open_clip

HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
TEXTS = ["a red square", "a photo of two green corners on a very long blue stripe"]
PIXELS = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(PIXELS), Image.new("RGB", (40, 40), "gold")]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    pq.write_table(tiny_pairs(16), tmp_path / "pairs.parquet")
    return str(tmp_path / "pairs.parquet")


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with starts of open_clip's model `tiny`, each with random weights."""
    folder = tmp_path_factory.mktemp("starts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
        model = open_clip.create_model("tiny", force_quick_gelu=True)
    save_open_clip(folder / "folder", **HALF)
    save_file(model.state_dict(), folder / "weights.safetensors")
    heads = ProtoCLIP(model, projection_head(16, HEADS)).state_dict()
    theirs = {"image_head.": "image_projection_head.", "text_head.": "text_projection_head."}
    names = {key: key.removeprefix("towers.") for key in heads}
    for ours, name in theirs.items():
        names |= {key: key.replace(ours, name) for key in heads if key.startswith(ours)}
    names["prototype_logit_scale"] = "logit_scale_proto"
    content = {names[key]: value for key, value in heads.items()}
    torch.save({"state_dict": content}, folder / "with_heads.pt")
    torch.save({"state_dict": model.state_dict()}, folder / "without_heads.pt")
    return folder


@pytest.fixture
def tiny(starts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the starts, which open_clip knows by name."""
    folder = shutil.copytree(starts, tmp_path / "starts")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    tag = {"file": str(folder / "weights.safetensors"), "quick_gelu": True, **HALF}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"mine": tag})
    return folder


def one_step(train: str, out: Path, model: ModelConfig, **changes: Any) -> Config:
    """A run of one step, which moves no weight by more than rounding."""
    config = tiny_config(train, out=str(out))
    return replace(
        config,
        run=replace(config.run, evaluate=False),
        data=replace(config.data, validation=0.0),
        model=model,
        episodes=EpisodeConfig(size=16, count=1, batch_size=16, warm_up=1, locked_image=0),
        optim=OptimConfig(learning_rate=1e-12),
        **changes,
    )


def features(loaded: Any) -> list[torch.Tensor]:
    model, transform, tokenizer = loaded
    with torch.no_grad():
        images = torch.stack([transform(image) for image in IMAGES])
        return [model.encode_image(images), model.encode_text(tokenizer(TEXTS))]


@pytest.mark.parametrize(
    ("start", "has_heads"),
    [
        ("open_clip:tiny/mine", False),
        ("open_clip:tiny/{}/weights.safetensors", False),
        ("reference:{}/with_heads.pt,model=tiny", True),
        ("reference:{}/without_heads.pt,model=tiny", False),
        ("{}/run", True),
    ],
)
def test_a_run_starts_with_the_weights(start, has_heads, tiny):
    """Also with the tokenizer and the transform; tests/unit/export has exported folders."""
    weights = build_model(tiny_model(), seed=1).state_dict()
    write_checkpoint(tiny / "run", {WEIGHTS: weights}, {MODEL: model_json(tiny_model(), None)})
    before = protoclip.load(start.format(tiny))
    heads = HeadConfig() if has_heads else HEADS
    begun = resolve_start(ModelConfig(start=start.format(tiny), heads=heads))
    built = build_model(begun, seed=0).eval()
    found = features((built, before[1], begun.tokenizer()))
    assert all(map(torch.equal, found, features(before)))
    assert torch.equal(begun.tokenizer()(TEXTS), before[2](TEXTS))
    read = image_input(built.towers)
    assert (read["mean"], read["std"]) == (before[1].mean, before[1].std)
    assert (read["mean"] == (0.5, 0.5, 0.5)) == start.endswith("mine")
    if has_heads:
        assert torch.equal(built.text_head[0].weight, before[0].text_head[0].weight)
    assert built.image_head[0].weight.shape[0] == 32


def test_two_pretrained_encoders(pairs, tmp_path):
    """The text model has its tokenizer, the image model its normalisation. The run loads without
    the files that it started from."""
    sources = tmp_path / "sources"
    given = save_encoders(sources)
    built = build_model(given, seed=0)
    run.train(one_step(pairs, tmp_path / "run", given))
    tokens = resolve_start(given).tokenizer()(TEXTS)
    shutil.rmtree(sources)
    loaded = protoclip.load(tmp_path / "run")
    mean = (0.5, 0.5, 0.5)  # of test_vit
    assert loaded[1] == EvaluationTransform(size=160, mean=mean, std=mean)
    assert torch.equal(loaded[2](TEXTS), tokens)
    assert tokens.shape == (2, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded[0].encode_text(tokens), built.eval().encode_text(tokens), atol=1e-4, rtol=1e-4
        )
    facts = protoclip.export(tmp_path / "run", tmp_path / "out", ("open_clip",))
    assert {*facts["formats"]} == {"open_clip"}
    # The files of the text model go on from run to run, and by an exported folder.
    for start, out in (("run", "next"), ("out", "third")):
        heads = HeadConfig() if start == "run" else HEADS
        given = ModelConfig(start=str(tmp_path / start), heads=heads)
        run.train(one_step(pairs, tmp_path / out, given))
    shutil.rmtree(tmp_path / "run")
    words = find_checkpoint(tmp_path / "next") / "text" / "vocab.txt"
    if not words.exists():
        words = words.with_name("tokenizer.json")
    for out in ("next", "third"):
        again = protoclip.load(tmp_path / out)
        assert torch.equal(again[2](TEXTS), tokens)
        torch.testing.assert_close(features(again), features(loaded), atol=1e-4, rtol=1e-4)
    words.write_text(words.read_text() + " ")
    with pytest.raises(ValueError, match=rf"damaged \(text/{words.name} is not what was written"):
        protoclip.load(tmp_path / "next")


@pytest.mark.parametrize(
    ("vision", "size", "size_before", "width"),
    [
        (VIT, 48, 32, 16),
        ({**RESNET, "image_size": 64}, 96, 64, 16),
        ("test_vit", 96, 160, 16),
        ("siglip", 64, 32, 32),
    ],
)
def test_position_embeddings_of_other_sizes_are_interpolated(
    vision, size, size_before, width, tmp_path
):
    """And a note says so. What has no position embeddings stays as it is."""
    if vision == "siglip":
        reference, length_before = f"hf:{save_siglip(tmp_path / 'model')}", 24
    else:
        if isinstance(vision, str):
            vision = {"timm_model_name": vision, "image_size": size_before, "timm_pool": "avg"}
        config = {**CLIP, "vision_cfg": vision}
        reference, length_before = str(save_open_clip(tmp_path / "model", config)), 12
    given = ModelConfig(
        start=reference,
        image=ImageTowerConfig(size=size),
        text=TextTowerConfig(context_length=23),
        heads=HEADS,
    )
    start, notes = resolve_start(given), list[str]()
    built = build_model(start, seed=0, notes=notes)
    name = f"position embeddings of {reference} interpolated, from"
    assert notes == [
        f"model.image.size: {name} {size_before} to {size} pixels",
        f"model.text.context_length: {name} {length_before} to 23 tokens",
    ]
    before = protoclip.load(reference)[0].state_dict()
    found = built.state_dict()
    changed = {key for key in before if found[key].shape != before[key].shape}
    assert len(changed) == 2
    assert all(torch.equal(found[key], before[key]) for key in before.keys() - changed)
    for key in changed:
        old, new = (weights[key].reshape(-1, weights[key].shape[-1]) for weights in (before, found))
        assert new.std() > 0
        if vision != "siglip":
            # Interpolation keeps the first embedding, of the class or the caption's start.
            assert (old[0] - new[0]).abs().max() < old.std() / 3
        elif "visual" in key:
            # On their grid: the mean of four neighbours is near what they came from.
            means = new.reshape(4, 2, 4, 2, 32).mean((1, 3))
            grid = old.reshape(4, 4, 32)
            assert (means - grid).abs().mean() < (means.transpose(0, 1) - grid).abs().mean() / 2
    assert built.encode_image(torch.zeros(2, 3, size, size)).shape == (2, width)
    tokens = start.tokenizer()(TEXTS)
    assert tokens.shape == (2, 23)
    assert built.encode_text(tokens).shape == (2, width)


def test_settings_follow_the_start(tiny, pairs, tmp_path):
    """Also the defaults of the optimizer."""
    mine = ModelConfig(start="open_clip:tiny/mine")
    assert resolve_start(mine).model == ModelConfig(name="tiny", pretrained="mine")
    untrained = resolve_start(ModelConfig(start="open_clip:tiny"))
    assert untrained.model == ModelConfig(name="tiny")
    assert untrained.notes == ("model.start: open_clip:tiny: untrained; no weights are named",)
    run.train(one_step(pairs, tmp_path / "run", tiny_model()))
    reference = f"reference:{tiny}/without_heads.pt"
    by_name = resolve_start(ModelConfig(start=reference, name="tiny"))
    assert by_name == resolve_start(ModelConfig(start=f"{reference},model=tiny"))
    assert not by_name.has_heads
    found = resolve_start(ModelConfig(start=str(tmp_path / "run"))).model
    small = tiny_model()
    assert replace(found, start=None) == replace(small, image=replace(small.image, pooling="avg"))
    for given in (ModelConfig(start=str(tiny / "folder")), mine):
        plan = make_plan(Config(model=given))
        assert plan.config.optim.eps == 1e-6
        assert plan.config.optim.learning_rate == pytest.approx(2.5e-4)
    assert make_plan(Config(model=found)).config.optim.learning_rate == 2e-3


def test_a_start_and_an_image_tower_squash_images_as_before(tmp_path):
    folder = str(save_open_clip(tmp_path / "model", resize_mode="squash"))
    for given in ({"start": folder}, {"image": ImageTowerConfig(name=folder)}):
        assert resolve_start(ModelConfig(**given)).build(on_meta=True).squashes


@pytest.mark.parametrize(
    ("name", "pooling"), [("test_vit", "own"), ("test_vit3", "own"), ("test_resnet", "avg")]
)
def test_an_image_encoder_is_pooled_as_its_weights_need(name, pooling, tmp_path):
    """By a class token, a layer of attention, or the mean, as timm has it. A new tower takes the
    mean, and so do models that were saved before there was a choice."""
    given = save_encoders(tmp_path, name, size=64)
    start = resolve_start(given)
    assert start.model.image.pooling == pooling
    built, weights = build_model(start, seed=0).eval(), load_file(str(given.image.weights))
    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(weights)
    theirs.reset_classifier(0)
    if hasattr(theirs, "set_input_size"):
        theirs.set_input_size(img_size=(64, 64))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(built.towers.visual.trunk(images), theirs(images))
    untrained = replace(given, image=replace(given.image, weights=None))
    assert resolve_start(untrained).model.image.pooling == "avg"
    text = f"local-dir:{save_open_clip(tmp_path / 'clip')}"
    joined = resolve_start(replace(given, text=TextTowerConfig(name=text)))
    assert joined.model.image.pooling == pooling
    described = joined.open_clip_config["vision_cfg"]
    assert described["timm_pool"] == {"own": "", "avg": "avg"}[pooling]
    saved = model_json(start.model, None)
    del saved["model"]["image"]["pooling"]
    assert model_config(saved, tmp_path).image.pooling == "avg"


@pytest.mark.parametrize(("changed", "new"), [("running_mean", True), ("0.weight", False)])
def test_heads_are_new_until_a_loss_has_trained_them(changed, new, tmp_path):
    """Statistics of BatchNorm move in the warm-up too."""
    weights = build_model(tiny_model(), seed=0).state_dict()
    (name,) = (name for name in weights if name.startswith("text_head") and name.endswith(changed))
    weights[name] = weights[name] + 1
    write_checkpoint(tmp_path, {WEIGHTS: weights}, {MODEL: model_json(tiny_model(), None)})
    assert find_start(str(tmp_path)).heads_are_new == new


def test_a_folder_does_not_take_the_name_of_a_tower(pairs, tmp_path, monkeypatch):
    """Such as that of a run; with `./` before it, it is meant."""
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(image=ImageTowerConfig(name="test_resnet"), text=tiny_model().text)
    run.train(one_step(pairs, Path("test_resnet"), replace(tiny_model(), image=model.image)))
    assert resolve_start(model).is_small
    assert names_model("image", "./test_resnet")
    Path(MINILM).mkdir()
    assert not names_model("text", MINILM)
    resolve_start(ModelConfig(text=TextTowerConfig(name=MINILM)))


def test_a_named_model_keeps_the_files_of_its_text_tower(pairs, tmp_path, monkeypatch):
    """open_clip reads some from the hub, for which a folder stands here that then goes away."""
    bert = save_bert(tmp_path / "hub")
    names = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert)}
    text = {**names, "hf_pooler_type": "mean_pooler", "context_length": 20}
    described = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": text}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-bert.json").write_text(json.dumps(described))
    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(configs))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path / "configs"])
    open_clip.factory._rescan_model_configs()
    run.train(one_step(pairs, tmp_path / "run", ModelConfig(name="tiny-bert", heads=HEADS)))
    model, _, tokenizer = protoclip.load(tmp_path / "run")
    with torch.no_grad():
        before = model.encode_text(tokenizer(["a red square"]))
    shutil.rmtree(bert)
    model, _, tokenizer = protoclip.load(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokenizer(["a red square"])), before)
    # Systems add hidden files to what is copied.
    (find_checkpoint(tmp_path / "run") / "text" / ".DS_Store").write_bytes(b"")
    protoclip.load(tmp_path / "run")
