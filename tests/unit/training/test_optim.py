"""The optimizer and its rates, stages, precision; what fine-tuning trains, and how fast."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
    EpisodeConfig,
    ImageTowerConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
)
from protoclip.data import sources
from protoclip.data.pairs import ImageTextPairs
from protoclip.encode.encoder import Encoder
from protoclip.encode.teachers import embed_start
from protoclip.models import loading
from protoclip.models.protoclip import autocast, grad_scaler, resolve_precision
from protoclip.models.start import resolve_start
from protoclip.training.optim import (
    LOCKED_IMAGE,
    PROTOTYPICAL,
    enter_stage,
    find_stage,
    layer_distances,
    make_optimizer,
    make_schedule,
    warm_up_cosine,
)
from protoclip.training.plan import resolve_settings
from protoclip.training.presets import choose_optimizer, fill
from protoclip.training.run import train
from testing import build_model, tiny_config, tiny_model, tiny_pairs
from tiny_hugging_face import save_dual_encoder, save_siglip


def short(**optim: object) -> Config:
    """A run of 100 steps of a small model, with its optimizer's defaults."""
    episodes = EpisodeConfig(size=50 * 16, count=2, batch_size=16, locked_image=1)
    config = replace(tiny_config(out="unused"), episodes=episodes, optim=OptimConfig(**optim))
    return replace(config, optim=fill(config.optim, choose_optimizer(config, None)))


@pytest.mark.parametrize("heads_decay", [0.2, 0.3])
def test_parameters_have_the_decay_and_rate_of_their_part(heads_decay):
    """Gains, biases and scales have no decay, and temperatures keep the common rate."""
    scales = {"image_lr_scale": 0.1, "heads_lr_scale": 0.05}
    config = short(**scales, heads_weight_decay=heads_decay)
    model = build_model(config.model, seed=0)
    model.add_logit_bias()
    adamw = make_optimizer(config, model)
    groups = {id(p): group for group in adamw.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(groups)
    for name, parameter in model.named_parameters():
        scale, decay = 1.0, 0.2
        if name.startswith(("image_head.", "text_head.")):
            scale, decay = 0.05, heads_decay
        elif name.startswith("towers.visual."):
            scale = 0.1
        group = groups.pop(id(parameter))
        assert group["scale"] == pytest.approx(scale), name
        assert group["weight_decay"] == (decay if parameter.ndim >= 2 else 0.0), name
        # FSDP2 needs scalars apart.
        assert len({p.ndim == 0 for p in group["params"]}) == 1
    assert not groups


def test_the_locked_stage_has_its_own_cosine_unless_its_rate_is_zero():
    """It starts low, reaches its own peak and comes down. Else one cosine covers the whole run."""
    config = short(warm_up_steps=10, locked_learning_rate=5e-4)
    rates = [make_schedule(config)(step) for step in range(100)]
    assert rates[49] < 1e-5
    assert rates[50] == pytest.approx(2.5e-4)
    assert max(rates[50:]) == pytest.approx(5e-4)
    assert rates[99] < 1e-5
    one = make_schedule(replace(config, optim=replace(config.optim, locked_learning_rate=0.0)))
    rates = [one(step) for step in range(100)]
    assert rates[55] == pytest.approx(1e-3)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_models_with_a_logit_bias_get_the_sigmoid_loss():
    """All of open_clip's, and no other model, unless a setting says so. CoCas are refused."""
    for name in (None, *open_clip.list_models()):
        if name is not None and name.startswith("coca"):
            continue
        sigmoid = name is not None and "siglip" in name.lower()
        outlined = resolve_settings(Config(model=ModelConfig(name=name)))
        assert outlined.config.loss.instance == ("sigmoid" if sigmoid else "info_nce"), name
        assert any("loss.instance = sigmoid" in note for note in outlined.notes) == sigmoid
    for instance in ("info_nce", "sigmoid"):
        for name in ("RN50", "ViT-B-16-SigLIP"):
            config = Config(model=ModelConfig(name=name), loss=LossConfig(instance=instance))
            assert resolve_settings(config).config.loss.instance == instance


def test_the_schedule_is_linear_then_cosine():
    """Equal to the formula at every step. A short run still reaches its peak and comes down."""
    for step in range(100):
        expected = (
            (step + 1) / 10 if step < 10 else 0.5 + 0.5 * math.cos(math.pi * (step - 10) / 90)
        )
        assert warm_up_cosine(step, peak=1.0, warm_up=10, total=100) == pytest.approx(expected)
    rates = [warm_up_cosine(step, peak=1.0, warm_up=1000, total=10) for step in range(10)]
    assert max(rates) == 1.0
    assert rates[-1] < 0.2


def test_the_order_of_the_stages():
    """Warm-up, prototypical, locked image. Without prototypes it is CLIP, with the same lock."""
    config = Config(episodes=EpisodeConfig(count=4, warm_up=1, locked_image=1))
    stages = [find_stage(config, index).name for index in range(4)]
    assert stages == ["warm-up", "prototypical", "prototypical", "locked image"]
    clip = replace(config, loss=LossConfig(prototypical=0.0))
    stages = [find_stage(clip, index).name for index in range(4)]
    assert stages == ["contrastive"] * 3 + ["locked image"]


def test_the_locked_stage_fixes_the_image_tower():
    """Neither weights nor BatchNorm statistics of the image tower move; the text tower trains."""
    model = build_model(tiny_model(), seed=0)
    enter_stage(model, LOCKED_IMAGE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model(torch.randn(4, 3, 32, 32), torch.randint(1, 99, (4, 8)), project=False)
    (out.image_features * out.text_features).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    changed = {
        name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()
    }
    assert changed
    assert not {name for name in changed if name.startswith(("towers.visual", "image_head"))}
    assert any(name.startswith("towers.transformer") for name in changed)
    enter_stage(model, PROTOTYPICAL)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_precision_is_as_asked_and_only_as_asked():
    """fp32 opens no autocast, bf16 and fp16 do, and only fp16 scales its loss."""
    cpu, matrix = torch.device("cpu"), torch.randn(4, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(name, cpu)():
            assert (matrix @ matrix).dtype == dtype
        assert resolve_precision(name, cpu) == name
        assert grad_scaler(name, cpu).is_enabled() == (name == "fp16")
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")


def test_cards_that_imitate_bf16_train_in_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda imitated=True: imitated)
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"


VIT = replace(tiny_model(), image=ImageTowerConfig(name="test_vit", size=32))
BATCH = torch.randn(4, 3, 32, 32), torch.randint(1, 99, (4, 8))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs with one or two captions."""
    table = tiny_pairs(64)
    texts = table["caption"].to_pylist()
    captions = [[text, f"{text} again"][: 1 + row % 2] for row, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(table.set_column(1, "caption", pa.array(captions)), path)
    return str(path)


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
        (VIT, {"towers.visual.trunk.norm.weight": 1, "towers.visual.trunk.blocks.5.norm1.bias": 1}),
        (
            replace(tiny_model(), image=ImageTowerConfig(name="test_convnext", size=32)),
            {
                "towers.visual.trunk.head.norm.weight": 0,
                "towers.visual.trunk.stages.3.blocks.0.norm.weight": 1,
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
    with torch.no_grad():
        start.towers.text_projection.mul_(2)
    assert given(samples).name != found.name
