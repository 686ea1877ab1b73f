"""Settings of fine-tuning: what trains and how fast, and runs that stay close to their start."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import protoclip
from interrupting import assert_equal_ends, config_for, end_of, stop_after, with_changes
from protoclip.config import (
    Config,
    ImageTowerConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
)
from protoclip.data import sources
from protoclip.data.pairs import ImageTextPairs
from protoclip.encode.encoder import Encoder
from protoclip.encode.teachers import embed_start
from protoclip.models import loading
from protoclip.models.start import resolve_start
from protoclip.rules import check
from protoclip.training.optim import (
    PROTOTYPICAL,
    enter_stage,
    find_stage,
    layer_distances,
    make_optimizer,
)
from protoclip.training.presets import choose_optimizer, fill
from protoclip.training.run import train
from testing import build_model, tiny_config, tiny_model, tiny_pairs

sys.path.append(str(Path(__file__).parents[2]))
from tiny_hugging_face import save_dual_encoder, save_siglip

VIT = replace(tiny_model(), image=ImageTowerConfig(name="test_vit", size=32))
BATCH = torch.randn(4, 3, 32, 32), torch.randint(1, 99, (4, 8))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs with one or two captions."""
    table = tiny_pairs(64)
    captions = [[text, f"{text} again"][: 1 + row % 2] for row, text in enumerate(column(table))]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(table.set_column(1, "caption", pa.array(captions)), path)
    return str(path)


def column(table: pa.Table) -> list[str]:
    texts: list[str] = table["caption"].to_pylist()
    return texts


@pytest.fixture(scope="module")
def starts(pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], str]:
    """The run to start from, of a model that has been trained for a few steps."""
    folder = tmp_path_factory.mktemp("starts")

    def start(model: ModelConfig) -> str:
        out = folder / model.image.name
        if not out.exists():
            config = tiny_config(pairs, out=str(out))
            short = {"episodes": {"size": 32, "count": 1, "warm_up": 1, "locked_image": 0}}
            train(with_changes(replace(config, model=model), {"run": {"evaluate": False}, **short}))
        return str(out)

    return start


# Learning rates.


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            tiny_model(),
            {
                "towers.visual.head.proj.weight": 0,
                "towers.visual.trunk.layer4.0.conv1.weight": 1,
                "towers.visual.trunk.layer1.0.bn1.bias": 4,
                "towers.visual.trunk.conv1.0.weight": 5,
                "towers.text_projection": 0,
                "towers.ln_final.weight": 0,
                "towers.transformer.resblocks.0.attn.in_proj_weight": 1,
                "towers.token_embedding.weight": 2,
                "towers.logit_scale": 0,
            },
        ),
        (
            ModelConfig(name="ViT-S-32"),
            {
                "towers.visual.proj": 0,
                "towers.visual.transformer.resblocks.11.ln_1.weight": 1,
                "towers.visual.transformer.resblocks.0.ln_1.weight": 12,
                "towers.visual.class_embedding": 13,
                "towers.visual.conv1.weight": 13,
                "towers.positional_embedding": 13,
            },
        ),
        (
            ModelConfig(name="RN50"),
            {"towers.visual.attnpool.c_proj.weight": 0, "towers.visual.bn3.weight": 5},
        ),
        (
            ModelConfig(name="ViT-B-32-SigLIP2-256"),
            {
                "towers.visual.trunk.attn_pool.q.weight": 0,
                "towers.visual.trunk.blocks.11.norm1.weight": 1,
                "towers.visual.trunk.pos_embed": 13,
                "towers.text.transformer.resblocks.11.ln_1.weight": 1,
                "towers.text.text_projection.weight": 0,
            },
        ),
    ],
    ids=lambda value: getattr(value, "name", None) or "small",
)
def test_layers_are_as_far_from_the_output_as_expected(model, expected):
    built = resolve_start(model).build(on_meta=True)
    found = layer_distances(built)
    names = {name for name, _ in built.named_parameters()}
    assert found.keys() <= names
    assert {name: found.get(name, 0) for name in expected} == expected


def test_hugging_face_text_towers_have_layers_too():
    """By the names of its parameters, as BERT has them."""
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1
    )
    built = resolve_start(tiny_model()).build()
    built.towers.text = open_clip.hf_model.HFTextEncoder("", 16, config, "mean_pooler", "linear")
    found = layer_distances(built)
    assert found["towers.text.proj.weight"] == 0
    assert found["towers.text.transformer.encoder.layer.1.output.dense.weight"] == 1
    assert found["towers.text.transformer.embeddings.word_embeddings.weight"] == 3


@pytest.mark.parametrize("save", [save_siglip, save_dual_encoder])
def test_towers_of_transformers_have_layers_too(save, tmp_path):
    """Embeddings, one block, and what is behind it, of both towers."""
    save(tmp_path)
    built = resolve_start(ModelConfig(start=f"hf:{tmp_path}")).build(on_meta=True)
    found = layer_distances(built)
    for tower in ("visual", "text"):
        names = {n: k for n, k in found.items() if n.startswith(f"towers.{tower}.")}
        assert {k for n, k in names.items() if "embeddings." in n} == {2}
        assert {k for n, k in names.items() if ".0." in n and ".layer" in n} == {1}
        assert {k for n, k in names.items() if ".projection.weight" in n} <= {0, 2}
        assert set(names.values()) == {0, 1, 2}


def test_other_towers_of_transformers_have_layers_or_are_refused(tmp_path):
    """ConvNeXt has stages, and DistilBERT calls its layers otherwise than BERT."""
    save_dual_encoder(tmp_path)
    vision = transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=32)
    vision.hidden_size = 8
    text = transformers.DistilBertConfig(dim=8, hidden_dim=8, n_layers=2, n_heads=1, vocab_size=60)
    build = transformers.VisionTextDualEncoderConfig.from_vision_text_configs
    config = build(vision, text, projection_dim=16)
    transformers.VisionTextDualEncoderModel(config).save_pretrained(tmp_path)
    built = resolve_start(ModelConfig(start=f"hf:{tmp_path}")).build(on_meta=True)
    found = layer_distances(built)
    for tower, layers in {"visual": 4, "text": 2}.items():
        distances = {k for n, k in found.items() if n.startswith(f"towers.{tower}.")}
        assert distances == {*range(layers + 2)}
    built.towers.text.model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layers of the text tower are not known; set it to 1$"):
        layer_distances(built)


def test_layer_decay_lowers_the_rate_of_early_layers():
    """By a power of its distance, besides the scales of towers and heads."""
    config = replace(
        tiny_config(out="unused"),
        optim=OptimConfig(layer_decay=0.5, image_lr_scale=0.1, heads_lr_scale=0.3),
    )
    config = replace(config, optim=fill(config.optim, choose_optimizer(config, None)))
    model = build_model(config.model, seed=0)
    groups = {id(p): g for g in make_optimizer(config, model).param_groups for p in g["params"]}
    scales = {name: groups[id(p)]["scale"] for name, p in model.named_parameters()}
    assert scales["towers.visual.head.proj.weight"] == pytest.approx(0.1)
    assert scales["towers.visual.trunk.layer1.0.conv1.weight"] == pytest.approx(0.1 / 16)
    assert scales["towers.token_embedding.weight"] == pytest.approx(1 / 4)
    assert scales["towers.logit_scale"] == 1
    assert scales["image_head.0.weight"] == pytest.approx(0.3)


# What trains.


def test_frozen_batch_norm_keeps_statistics_and_trains_the_rest():
    """Of the towers alone: the heads are new, and need statistics of their own."""
    model = build_model(tiny_model(), seed=0)
    enter_stage(model, replace(PROTOTYPICAL, model=replace(tiny_model(), frozen_batch_norm=True)))
    before = {name: value.clone() for name, value in model.named_buffers()}
    out = model(*BATCH)
    (out.image_projections.sum() + out.text_projections.sum()).backward()
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert moved
    assert {name.partition(".")[0] for name in moved} == {"image_head", "text_head"}
    assert model.towers.visual.trunk.bn1.weight.grad is not None


TRAINED = {
    # Without a start both projections are new.
    ("image", "encoders"): {"visual.head.", "logit_scale", "text"},
    ("text", "encoders"): {"visual", "logit_scale"},
    ("image", "run"): {"logit_scale", "text"},
    ("text", "run"): {"visual", "logit_scale"},
}


@pytest.mark.parametrize(("tower", "start"), TRAINED)
def test_a_locked_tower_stays_as_it_is(tower, start):
    """In every stage, with its BatchNorm statistics; logit scales and new projections train.

    Where the text tower is locked there is no locked-image stage, in which nothing would train.
    """
    settings = replace(tiny_model(), locked=[tower], start="a run" if start == "run" else None)
    config = replace(tiny_config(out="unused"), model=settings)
    model = build_model(tiny_model(), seed=0)
    for episode in range(4):
        stage = find_stage(config, episode)
        enter_stage(model, stage)
        before = {name: value.clone() for name, value in model.towers.named_buffers()}
        model(*BATCH)
        moved = [n for n, v in model.towers.named_buffers() if not torch.equal(v, before[n])]
        assert bool(moved) == (tower == "text")
        trained = {name for name, p in model.towers.named_parameters() if p.requires_grad}
        names = {n for n, _ in model.towers.named_parameters()}
        parts = TRAINED[tower, start]
        if stage.name == "locked image":
            parts = parts - {"visual.head."}
        assert trained == {
            name
            for name in names
            if name.startswith(tuple(parts - {"text"}))
            or ("text" in parts and not name.startswith(("visual", "logit")))
        }


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"model": {"start": "run", "locked": ["text", "image"]}}, "model.locked"),
        ({"teacher": {"features": "start"}}, "teacher.features = start"),
        ({"model": {"lora": 2}, "parallel": {"compile": True}}, "model.lora"),
        ({"optim": {"layer_decay": 1.5}}, "optim.layer_decay"),
    ],
    ids=str,
)
def test_what_cannot_work_names_its_setting(changes, setting):
    with pytest.raises(ValueError, match=f"^{setting}: "):
        check(Config.from_dict(with_changes(tiny_config(out="unused"), changes)))


# Runs.

WAYS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "LoRA, micro-batches": (
        VIT,
        {
            "model": {"lora": 2},
            "loss": {"keep": 1.0},
            "episodes": {"micro_batch_size": 8},
            "optim": {"layer_decay": 0.7},
            "teacher": {"features": "start", "number": 4},
        },
    ),
    "locked": (
        tiny_model(),
        {
            "model": {"locked": ["text"], "frozen_batch_norm": True},
            "loss": {"instance": "sigmoid", "keep": 2.0},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_to_the_bit_and_loads_without_peft(way, pairs, starts, tmp_path, monkeypatch):
    """Interrupted within a prototypical episode. Its weights are those of a plain model."""
    model, changes = WAYS[way]

    def config(name: str) -> Config:
        made = replace(config_for(pairs, tmp_path / name), model=ModelConfig(start=starts(model)))
        made = with_changes(made, {"run": {"evaluate": False}, "data": {"validation": 0.0}})
        made = with_changes(made, {"episodes": {"size": 32}})
        return with_changes(made, changes)

    train(config("whole"))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert train(config("parts"))["steps"] == 3
    train(config("parts"), resume="auto")
    assert_equal_ends(tmp_path / "parts", tmp_path / "whole", 8)
    first = build_model(ModelConfig(start=starts(model)), seed=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    last, _, _ = protoclip.load(tmp_path / "whole")
    assert last.state_dict().keys() - {"towers.logit_bias"} == first.state_dict().keys()
    _, metrics = end_of(tmp_path / "whole", 8)
    kept = [line["train/loss/keep"] for line in metrics if "train/loss/keep" in line]
    if "keep" in changes.get("loss", {}):
        assert len(kept) == 8
        assert max(kept) > 1e-6
    if model is VIT:  # without BatchNorm the first features are the start's
        assert kept[0] < 1e-5
    # A run that starts from this one decides for itself what trains.
    followed = resolve_start(ModelConfig(start=str(tmp_path / "whole"), lora=3)).model
    assert (followed.lora, followed.locked, followed.frozen_batch_norm) == (3, [], False)


def test_the_start_embeds_all_captions_of_a_mixture_once(pairs, starts, tmp_path, monkeypatch):
    """A sample's feature is the mean over its captions, by its id in the mixture."""
    mixed = [SourceConfig(path=pairs, name=name) for name in ("a", "b")]
    config = with_changes(
        tiny_config(out="unused"), {"data": {"sources": mixed, "validation": 0.0}}
    )
    model = ModelConfig(start=starts(tiny_model()))
    config = replace(config, model=resolve_start(model).model)
    samples, tokenizer = sources.open_samples(config), resolve_start(config.model).tokenizer()
    start = loading.frozen_start(config, torch.device("cpu"), resolve_start(config.model))
    folders = {"cache": tmp_path / "features", "of_run": tmp_path / "run"}
    given = partial(embed_start, start, tokenizer, autocast=torch.no_grad, **folders)
    found = given(samples)
    ids = ["b/tiny/1", "a/tiny/0", "b/tiny/3"]
    rows = [ImageTextPairs(pq.read_table(pairs), name="one").sample_captions(r) for r in (1, 0, 3)]
    assert [len(captions) for captions in rows] == [2, 1, 2]
    for row, captions in zip(found.lookup(ids), rows, strict=True):
        expected = start.encode_text(tokenizer([*captions]), normalize=True).mean(0)
        expected = torch.nn.functional.normalize(expected, dim=0)
        torch.testing.assert_close(row, expected, atol=2e-3, rtol=0)  # half precision
    with monkeypatch.context() as patch:
        examples, encode = 2, Encoder.encode
        patch.setattr(Encoder, "encode", lambda s, i: encode(s, i) if len(i) == examples else None)
        assert given(samples).name == found.name  # nothing is encoded again
    table = pq.read_table(pairs)
    captions = pa.array(
        [[f"{text}!" for text in several] for several in table["caption"].to_pylist()]
    )
    pq.write_table(table.set_column(1, "caption", captions), tmp_path / "changed.parquet")
    changed = [SourceConfig(path=str(tmp_path / "changed.parquet"), name=name) for name in "ab"]
    of_changed = sources.open_samples(with_changes(config, {"data": {"sources": changed}}))
    assert [*of_changed.sample_ids()] == [*samples.sample_ids()]
    other = given(of_changed)
    assert not torch.equal(other.lookup(ids), found.lookup(ids))
    assert Path(other.name).parent == Path(found.name).parent == tmp_path / "features"
    with torch.no_grad():
        start.towers.text_projection.mul_(2)
    assert given(samples).name not in (found.name, other.name)
