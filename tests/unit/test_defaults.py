"""What a run is trained with where its configuration leaves it open."""

from dataclasses import asdict, replace
from pathlib import Path

import open_clip
import pytest

from protoclip.config import (
    Config,
    EpisodeConfig,
    ImageTowerConfig,
    ModelConfig,
    OptimConfig,
)
from protoclip.models import loading
from protoclip.models.loading import model_config
from protoclip.models.towers import image_normalisation, named_towers
from protoclip.testing import tiny_model
from protoclip.training import defaults, run
from protoclip.training.build import heads_weight_decays, rate_scales, schedule
from protoclip.training.defaults import Optimisation, optimisation
from protoclip.training.optim import adamw


def named(name: str | None, *, batch: int = 512, steps: int = 1000, **optim: object) -> Config:
    """A run of so many steps, half of them in the first of two episodes."""
    return Config(
        model=ModelConfig(name=name),
        episodes=EpisodeConfig(size=steps // 2 * batch, count=2, batch_size=batch),
        optim=OptimConfig(**optim),
    )


def test_small_towers_have_what_suits_the_emoji() -> None:
    """The values that the bundled recipes were measured with, at any batch; nothing is said."""
    for batch in (64, 256, 4096):
        decided, lines = optimisation(named(None, batch=batch))
        assert asdict(decided) == {
            "learning_rate": 2e-3,
            "warm_up_steps": 50,
            "locked_learning_rate": 2e-4,
            "betas": (0.9, 0.98),
            "eps": 1e-6,
            "weight_decay": 0.2,
            "heads_weight_decay": 0.2,
        }
        assert lines == []
    lower, _ = optimisation(named(None, weight_decay=0.1))
    assert lower.heads_weight_decay == 0.1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ViT-B-32", "transformer"),
        ("EVA02-B-16", "transformer"),
        ("swin_base_patch4_window7_224", "transformer"),
        ("RN50", "convolutional"),
        ("convnext_base", "convolutional"),
    ],
)
def test_a_named_model_has_the_fields_values(name: str, kind: str) -> None:
    """The table of the README, by kind of image tower."""
    decided, _ = optimisation(named(name))
    betas, eps, decay = {
        "transformer": ((0.9, 0.98), 1e-6, 0.2),
        "convolutional": ((0.9, 0.999), 1e-8, 0.1),
    }[kind]
    assert (decided.betas, decided.eps, decided.weight_decay) == (betas, eps, decay)
    assert decided.learning_rate == 5e-4
    assert decided.locked_learning_rate == pytest.approx(5e-5)
    assert decided.heads_weight_decay == 0


@pytest.mark.parametrize(
    ("batch", "rate"), [(64, 6.25e-5), (256, 2.5e-4), (512, 5e-4), (1024, 5e-4), (32768, 5e-4)]
)
def test_the_rate_grows_with_the_batch_to_its_peak(batch: int, rate: float) -> None:
    decided, _ = optimisation(named("ViT-B-32", batch=batch))
    assert decided.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("steps", "batch", "expected"),
    [
        (100_000, 1000, 2000),  # 2%
        (10_000, 1000, 500),  # 500,000 samples
        (1000, 1000, 100),  # a tenth of a short run
        (4, 1000, 1),
    ],
)
def test_warm_up_is_a_share_of_the_run(steps: int, batch: int, expected: int) -> None:
    decided, _ = optimisation(named("RN50", batch=batch, steps=steps))
    assert decided.warm_up_steps == expected


def test_what_is_set_counts_and_what_is_not_is_said() -> None:
    """Also a value that is some other default; each setting left open has a line."""
    _, lines = optimisation(named("ViT-B-32"))
    assert "optim.learning_rate = 5e-4, from ViT-B-32 at batch 512" in lines
    assert len(lines) == len(Optimisation.__dataclass_fields__)
    own = {
        "learning_rate": 2e-3,
        "warm_up_steps": 0,
        "locked_learning_rate": 0.0,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.0,
        "heads_weight_decay": 0.3,
    }
    for name in (None, "ViT-B-32", "RN50"):
        decided, lines = optimisation(named(name, **own))
        assert asdict(decided) == own
        assert lines == []
    decided, lines = optimisation(named("ViT-B-32", learning_rate=1e-4))
    assert decided.locked_learning_rate == pytest.approx(1e-5)
    assert not any("optim.learning_rate" in line for line in lines)


@pytest.mark.parametrize("name", [None, "ViT-B-32"])
def test_a_resolved_configuration_stays_as_it_is(name: str | None) -> None:
    """Decided once, there is nothing left to decide, so that the same command resumes a run."""
    config, _ = defaults.resolved(named(name))
    assert defaults.resolved(config) == (config, [])
    assert f"learning_rate = {config.optim.learning_rate}" in run.to_toml(config)
    size = config.model.image.size, config.model.text.context_length
    assert size == ((40, 16) if name is None else (None, None))


def test_heads_may_decay_on_their_own() -> None:
    """Their matrices have their decay, towers keep theirs, and vectors have none."""
    model = loading.model(tiny_model(), seed=0)
    config = named(None, heads_weight_decay=0.3, heads_lr_scale=1.0)
    decided, _ = optimisation(config)
    optimizer = adamw(
        model,
        learning_rate=1.0,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.2,
        scales=rate_scales(config),
        weight_decays=heads_weight_decays(decided),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    for name, parameter in model.named_parameters():
        own = 0.3 if name.startswith(("image_head.", "text_head.")) else 0.2
        assert found[name] == (own if parameter.ndim >= 2 else 0.0), name


def test_without_a_rate_of_its_own_the_locked_stage_ends_the_one_cosine() -> None:
    """`optim.locked_learning_rate = 0`: half a cosine over the whole run, as in the reference."""
    config = named(None, steps=100, warm_up_steps=10, locked_learning_rate=0.0)
    one = schedule(config, optimisation(config)[0])
    rates = [one.learning_rate(step) for step in range(100)]
    assert rates[55] == pytest.approx(1e-3)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[99] < 1e-6


SIGMOID = [name for name in open_clip.list_models() if "siglip" in name.lower()]


def test_models_of_the_sigmoid_loss_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of open_clip's, before anything is built; and no other."""
    monkeypatch.setattr(open_clip, "create_model", None)
    assert len(SIGMOID) > 20
    for name in open_clip.list_models():
        if name not in SIGMOID:
            defaults.resolved(named(name))
            continue
        with pytest.raises(ValueError, match=f"^model.name: {name} needs the sigmoid loss"):
            run.train(named(name))


def test_a_named_model_reads_what_it_was_made_for() -> None:
    """Its own size and number of tokens, where none are set."""
    config = ModelConfig(name="ViT-S-32-alt")
    assert loading.evaluation_transform(loading.model(config, seed=0)).size == 224
    assert loading.tokenizer(config)(["a star"]).shape == (1, 77)


@pytest.mark.parametrize(("name", "patch"), [("ViT-S-16", 16), ("ViT-B-32", 32), ("RN50", 32)])
def test_an_image_size_that_patches_do_not_fill_is_refused(
    name: str, patch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the towers are built."""
    monkeypatch.setattr(open_clip, "create_model", None)
    config = ModelConfig(name=name, image=ImageTowerConfig(size=72))
    with pytest.raises(ValueError, match=f"model.image.size: 72 is no multiple of the {patch}"):
        loading.model(config, seed=0)


def test_images_are_normalised_as_published_weights_want_it() -> None:
    """Also where the towers have no weights yet, and where those of a checkpoint replace them."""
    towers = named_towers("ViT-L-14", pretrained="laion2b_s32b_b82k", weights="none")
    assert image_normalisation(towers) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    saved = asdict(replace(tiny_model(), name="ViT-L-14", pretrained="laion2b_s32b_b82k"))
    loaded = model_config({"model": saved}, Path("run"))
    assert (loaded.pretrained, loaded.checkpoint) == ("laion2b_s32b_b82k", "run")
