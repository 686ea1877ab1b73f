"""Every recipe parses, builds its towers at full size, costs what its head says, and trains."""

import json
import logging
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from safetensors.torch import save_file

from interrupting import read_metrics
from protoclip.cli import COMMANDS, main
from protoclip.cli.spec import parse
from protoclip.config import Config, ModelConfig
from protoclip.rules import check
from protoclip.training import trainer
from protoclip.training.optim import find_stage
from protoclip.training.presets import EPISODES
from scripts_as_modules import script
from testing import tiny_pairs
from tiny_hugging_face import save_bert

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
# Those that have been run, so that docs/LOG.md has their time and numbers.
MEASURED = [name for name in RECIPES if name.startswith("emoji_")]
ESTIMATED = [name for name in RECIPES if name not in MEASURED]

# Sizes that train a step in milliseconds.
TINY = {
    "run.device": "cpu",
    "run.precision": "fp32",
    "run.log_every": 1,
    "run.evaluate": False,
    "run.evaluate_every": 0,
    "data.workers": 0,
    "data.validation": 0,
    "episodes.size": 16,
    "episodes.count": 3,
    "episodes.batch_size": 16,
    "prototypes.number": 4,
    "teacher.number": 4,
}
TINY_HEADS = {"model.heads.hidden_dim": 32, "model.heads.projection_dim": 8}
TINY_TEXT = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}
TINY_TOWERS = {"model.name": None, "model.embed_dim": 16, **TINY_HEADS, "model.image.size": 32}
TINY_TOWERS |= {f"model.text.{name}": value for name, value in TINY_TEXT.items()}
RESNET, VIT = {"model.image.name": "test_resnet"}, {"model.image.name": "test_vit"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands name recipes from there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def cost() -> Iterator[Any]:
    """scripts/recipe_cost.py."""
    with script("scripts/recipe_cost.py") as module, pytest.MonkeyPatch.context() as patch:
        counted, flops = module.forward_flops, {}  # recipes share towers

        def forward_flops(config: ModelConfig) -> Any:
            key = repr(config)
            flops[key] = flops.get(key) or counted(config)
            return flops[key]

        patch.setattr(module, "forward_flops", forward_flops)
        logging.disable(logging.WARNING)  # open_clip warns that there are no weights
        yield module
        logging.disable(logging.NOTSET)


def head(recipe: str) -> dict[str, str]:
    """The entries of the comment that opens a recipe, such as `command`; lines are joined."""
    lines = (ROOT / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8").splitlines()
    found = {"title": ""}
    for line in lines[: lines.index(next(text for text in lines if not text.startswith("#")))]:
        if match := re.match(r"# (\w+): +(.*)", line):
            found[match[1]] = match[2]
        else:
            newest = [*found][-1]
            found[newest] = f"{found[newest].removesuffix(chr(92))} {line[1:].strip()}".strip()
    return found


def commands(recipe: str) -> list[list[str]]:
    """The words behind `protoclip` of each command that a head names."""
    words = shlex.split(head(recipe)["command"])
    starts = [place for place, word in enumerate(words) if word == "protoclip"]
    ends = [*starts[1:], len(words)]
    found = [words[first + 1 : last] for first, last in zip(starts, ends, strict=True)]
    return [part[: part.index("torchrun")] if "torchrun" in part else part for part in found]


def configuration(recipe: str, *changes: str) -> Config:
    """What the last command of a head trains, with other options behind it."""
    command, *words = commands(recipe)[-1]
    found = parse(COMMANDS[command], [*words, *changes])
    return Config(**{entry.name: getattr(found, entry.name) for entry in fields(Config)})


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_head_says_what_to_type_and_what_to_expect(recipe):
    """Every command parses, and no setting is without effect."""
    entries = head(recipe)
    assert {"command", "hardware", "expected"} <= entries.keys()
    assert "data" in entries or recipe in MEASURED  # on the emoji
    assert ("Not run here." in entries["title"]) == (recipe in ESTIMATED)
    for command, *words in commands(recipe)[:-1]:
        parse(COMMANDS[command], words)
    assert f"recipes/{recipe}.toml" in commands(recipe)[-1]
    assert check(configuration(recipe)) == []
    changes = re.findall(r'(--[\w.]+) ("[^"]+"|[\w.]+)', entries.get("baseline", ""))
    assert ("baseline" in entries) == bool(changes)
    baseline = configuration(recipe, *(word.strip('"') for pair in changes for word in pair))
    check(baseline)
    assert not changes or not baseline.uses_prototypes


@pytest.mark.parametrize("recipe", ESTIMATED)
def test_the_towers_build_and_the_hours_are_those_of_the_model_of_cost(recipe, cost):
    """The towers are built at full size, on the meta device."""
    hours, _, command = head(recipe)["time"].partition(
        " hours by a model of cost (docs/scaling.md): python scripts/recipe_cost.py "
    )
    lines = cost.report(shlex.split(command))
    (said,) = (line.split()[1] for line in lines if line.startswith("hours "))
    assert said == hours
    table = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"\| \[{recipe}\].*", table)
    assert f"| {hours} h on " in row


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 48 pairs, and features of a teacher for them."""
    folder = tmp_path_factory.mktemp("pairs")
    table = tiny_pairs(48)
    pq.write_table(table, folder / "pairs.parquet")
    features = np.random.default_rng(0).normal(size=(48, 6)).astype(np.float32)
    teacher = {"sample_id": table["sample_id"], "features": pa.array(list(features))}
    pq.write_table(pa.table(teacher), folder / "teacher.parquet")
    return folder


def train(pairs: Path, settings: dict[str, Any], out: Path, command: str = "train") -> list[str]:
    """Train by the command line; returns the names of the stages that were entered."""
    visited: list[str] = []

    def enter(model: Any, stage: Any) -> None:
        visited.append(stage.name)
        original(model, stage)

    original = trainer.enter_stage
    words = [command]
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "enter_stage", enter)
        main([*words, "--data.train", str(pairs / "pairs.parquet"), "--run.out", str(out)])
    return visited


@pytest.fixture(scope="module")
def starts(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By recipe, settings for weights of this machine in place of those to download."""
    folder = tmp_path_factory.mktemp("starts")
    once = {**TINY, **TINY_TOWERS, **VIT, "episodes.count": 1, "episodes.warm_up": 0}
    once |= {"episodes.locked_image": 0, "loss.prototypical": 0}
    for instance in ("info_nce", "sigmoid"):
        train(pairs, {**once, "loss.instance": instance}, folder / instance)
    save_file(timm.create_model("test_vit").state_dict(), folder / "test_vit.safetensors")
    encoders = {"model.image.weights": folder / "test_vit.safetensors", "model.image.size": 32}
    encoders |= {"model.text.name": save_bert(folder / "bert"), "model.text.context_length": 8}
    return {
        "finetune_vitb32": {"model.start": str(folder / "info_nce")},
        "finetune_siglip": {"model.start": str(folder / "sigmoid")},
        "dual_encoder": {**VIT, **encoders, **TINY_HEADS},
    }


# Those with the same settings as one of these, but for sizes, are left out.
KINDS = [
    *("emoji_protoclip_teacher", "one_gpu_cc3m", "cc12m_rn50", "reference", "yfcc15m_vitb16"),
    *("dual_encoder", "finetune_siglip"),
]


@pytest.mark.parametrize("recipe", KINDS)
def test_three_steps_visit_every_stage(recipe, pairs, starts, tmp_path):
    """With all that the recipe sets but its sizes, and towers of its kind."""
    config = configuration(recipe)
    transformer = config.model.name is not None and config.model.name.startswith("ViT")
    towers = {**TINY_TOWERS, **(VIT if transformer else RESNET)}
    settings = {"config": ROOT / "recipes" / f"{recipe}.toml", **TINY}
    settings |= starts.get(recipe, towers)
    for name in ("warm_up", "locked_image"):
        settings[f"episodes.{name}"] = min(getattr(config.episodes, name), 1)
    if config.episodes.micro_batch_size is not None:
        settings["episodes.micro_batch_size"] = 8
    if config.teacher.features is not None:
        settings["teacher.features"] = pairs / "teacher.parquet"
    if config.teachers:  # a file does not say which tower learns it, as a teacher folder does
        towers = zip(config.teachers, ("image", "text"), strict=True)
        features = str(pairs / "teacher.parquet")
        taught = [{"name": t.name, "distil": t.distil, "tower": tower} for t, tower in towers]
        settings["teachers"] = json.dumps([{**one, "features": features} for one in taught])
    command = commands(recipe)[-1][0]
    if command == "finetune":
        settings |= {"alpha": 1}  # no data are held out to choose by
    visited = train(pairs, settings, tmp_path / "run", command)
    count = config.episodes.count or EPISODES
    whole = replace(config, episodes=replace(config.episodes, count=count))
    expected = [find_stage(whole, index).name for index in range(count)]
    assert len(visited) == 3
    assert [*dict.fromkeys(visited)] == [*dict.fromkeys(expected)]
    lines = read_metrics(tmp_path / "run", "train/loss/total")
    losses = [line["train/loss/total"] for line in lines]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
