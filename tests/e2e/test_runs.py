"""Runs from beginning to end, by the functions and commands that users call."""

import json
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import protoclip
from interrupting import few_emoji, read_metrics, with_changes
from protoclip.cli import demo, main, spec
from protoclip.config import Config, ImageTowerConfig, TeacherConfig, TextTowerConfig, flatten
from protoclip.evaluation import datasets, probes
from protoclip.models.checkpoint import find_checkpoint
from protoclip.rules import check
from protoclip.training import run
from protoclip.training.folder import to_toml
from protoclip.training.plan import make_plan
from testing import build_model, tiny_config

ROOT = Path(__file__).parents[2]


def short(config: Config, out: Path, *, count: int = 2, **changes: dict[str, Any]) -> Config:
    """An episode of InfoNCE, then prototypical ones, without an evaluation."""
    episodes = {"count": count, "locked_image": 0}
    config = with_changes(config, {"run": {"out": str(out), "evaluate": False}})
    return with_changes(with_changes(config, {"episodes": episodes}), changes)


def test_a_run_folder_holds_what_it_should(tiny_run):
    """Configuration, metrics of every step, checkpoint, results, TensorBoard."""
    assert (tiny_run / "config.toml").is_file()
    assert list((tiny_run / "tensorboard").iterdir())
    results = json.loads((tiny_run / "results.json").read_text())
    assert results["samples_seen"] == 4 * 64
    assert results["steps"] == 16
    assert results["train_seconds"] > 0
    steps = [line["step"] for line in read_metrics(tiny_run, "train/loss/total")]
    assert steps == list(range(1, 17))
    assert all(np.isfinite(list(line.values())).all() for line in read_metrics(tiny_run))
    extracted = read_metrics(tiny_run, "train/seconds/extract")
    assert [line["episode"] for line in extracted] == [1, 2]
    grouped = read_metrics(tiny_run, "train/loss/prototypical/image_from_text")
    assert [line["step"] for line in grouped] == list(range(5, 13))
    for line in read_metrics(tiny_run, "train/loss/total"):
        assert 0 <= line["train/share/data"] <= 1
        assert 0.1 < line["train/memory_gb"] < 100
        assert line["train/samples_per_second"] > 0
        assert line.keys().isdisjoint({"train/share/collectives", "train/mfu"})


def test_a_clip_run_learns_and_says_what_it_does(tiny_parquet, tmp_path, capsys):
    """On nine different captions the loss, which is InfoNCE alone, falls well below its start."""
    given = {
        "run": {"log_every": 5},
        "loss": {"prototypical": 0.0},
        "optim": {"warm_up_steps": 4},
    }
    config = short(tiny_config(tiny_parquet, out=""), tmp_path / "clip", count=12, **given)
    run.train(config)
    lines = read_metrics(tmp_path / "clip", "train/loss/total")
    assert [line["step"] for line in lines] == [*range(5, 50, 5), 48]
    losses = [line["train/loss/total"] for line in lines]
    assert losses == [line["train/loss/info_nce"] for line in lines]
    assert np.mean(losses[-2:]) < losses[0] - 0.3
    assert read_metrics(tmp_path / "clip", "train/seconds/extract") == []
    shown = capsys.readouterr().err
    assert shown.startswith("note: trains test_resnet")
    amount = "12 episodes of 64 pairs in batches of 16, 8 passes"
    assert f"training on 96 pairs from {tiny_parquet}: {amount}" in shown
    assert f"loss {losses[-1]:.4g})" in shown.splitlines()[-1]


# A model shaped as open_clip's SigLIP.
TIMM = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "avg", "timm_proj": "none"}
TEXT = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_scale": 2.5,
    "init_logit_bias": -9.5,
    "custom_text": True,
    "vision_cfg": TIMM,
    "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}


def test_a_named_model_trains_by_the_sigmoid_loss_beside_prototypes(
    tiny_parquet, tmp_path, monkeypatch, capsys
):
    """A model with a logit bias asks for it in place of InfoNCE, and learns its scale and bias. It
    reads images and captions of the size that is set. The next run from these weights goes on with
    them, without being told."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-sig", SIGLIP)
    size = {"image": ImageTowerConfig(size=64), "text": TextTowerConfig(context_length=6)}
    named: dict[str, Any] = {"name": "tiny-sig", **size}
    loss = {"strengths": "constant", "prototypical": 1.0}
    given = {"loss": loss, "optim": {"learning_rate": 2e-3}}
    given["optim"] |= {"warm_up_steps": 2}
    config = tiny_config(tiny_parquet, out="")
    run.train(short(config, tmp_path / "run", count=4, model=named, **given))
    shown = capsys.readouterr().err
    assert "note: loss.instance = sigmoid, since the model has a logit bias" in shown
    assert 'instance = "sigmoid"\n' in (tmp_path / "run" / "config.toml").read_text()
    lines = read_metrics(tmp_path / "run", "train/loss/sigmoid")
    assert not read_metrics(tmp_path / "run", "train/loss/info_nce")
    assert len(lines) == 16
    assert lines[0]["train/logit_bias"] == -9.5
    assert lines[0]["train/logit_scale"] == pytest.approx(math.exp(2.5))
    losses = [line["train/loss/sigmoid"] for line in lines]
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
    for line in lines[4:]:
        names = ("sigmoid", "prototypical/image_from_text", "prototypical/text_from_image")
        one, *two = (line[f"train/loss/{name}"] for name in names)
        assert line["train/loss/total"] == pytest.approx(one + sum(two) / 2, rel=1e-5)
    trained, transform, tokenizer = protoclip.load(tmp_path / "run")
    assert trained.towers.logit_bias.item() != -9.5
    tokens, images = tokenizer(["a red square"]), transform(Image.new("RGB", (300, 200)))[None]
    assert (tokens.shape, images.shape) == ((1, 6), (1, 3, 64, 64))
    assert trained.encode_text(tokens).shape == trained.encode_image(images).shape == (1, 64)
    given = {"model": {**named, "start": str(tmp_path / "run")}}
    run.train(short(config, tmp_path / "next", count=1, **given))
    first = read_metrics(tmp_path / "next", "train/loss/sigmoid")[0]
    assert first["train/logit_bias"] == trained.towers.logit_bias.item()


def test_several_teachers_and_samples_they_do_not_know(tiny_parquet, tmp_path, capsys):
    """Each teacher has its own prototypes and losses."""
    generator = np.random.default_rng(0)
    teachers = []
    for name, number in (("all", 96), ("some", 32)):
        flat = pa.array(generator.normal(size=number * 5).astype(np.float32))
        features = pa.FixedSizeListArray.from_arrays(flat, 5)
        table = {"sample_id": [f"tiny/{row}" for row in range(number)], "features": features}
        path = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table(table), path)
        given = {"name": name, "features": path, "number": 4}
        teachers.append(TeacherConfig(**given))
    config = replace(tiny_config(tiny_parquet, out=""), teachers=teachers)
    loss = {"strengths": "constant", "prototypical": 1.0, "teacher": 0.5}
    run.train(short(config, tmp_path / "run", loss=loss))
    assert "some: no features of 64 of 96 training samples" in capsys.readouterr().err
    grouped = read_metrics(tmp_path / "run", "train/loss/prototypical/image_from_some")
    assert len(grouped) == 4
    for line in grouped:
        loss = {k.split("/")[-1]: v for k, v in line.items() if "train/loss" in k}
        expected = loss["info_nce"] + (loss["image_from_text"] + loss["text_from_image"]) / 2
        expected += 0.5 * (loss["image_from_all"] + loss["text_from_all"]) / 2
        expected += 0.5 * (loss["image_from_some"] + loss["text_from_some"]) / 2
        assert loss["total"] == pytest.approx(expected, rel=1e-5)


def test_fp16_trains_with_its_scaler(tiny_run, tiny_parquet, tmp_path):
    """The first loss is that of fp32 to a percent."""
    fp16 = {"run": {"precision": "fp16"}}
    config = short(tiny_config(tiny_parquet, out=""), tmp_path / "fp16", count=1, **fp16)
    run.train(config)
    name = "train/loss/total"
    first, exact = (read_metrics(out, name)[0][name] for out in (tmp_path / "fp16", tiny_run))
    assert first == pytest.approx(exact, rel=0.01)
    assert first != exact
    start = build_model(config.model, seed=0).state_dict()
    end = load_file(find_checkpoint(tmp_path / "fp16") / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in end.values())
    for part in ("towers.visual.trunk.conv1.0.weight", "towers.text_projection"):
        assert not torch.equal(start[part], end[part])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[Config]:
    """The configurations that `protoclip train` would run."""
    configs: list[Config] = []
    monkeypatch.setattr(
        "protoclip.training.run.train",
        lambda given, resume: (
            configs.append(Config.from_dict(given)) or {"metrics": {}, "folder": ""}
        ),
    )
    return configs


def test_recipes_are_configurations(tmp_path, seen):
    """A run's config.toml, given as a recipe, is the same configuration. recipes/emoji_*.toml are
    the arms of the demonstration but for their length, and say how to run them."""
    recipes = ["emoji_clip", "emoji_protoclip", "emoji_protoclip_teacher"]
    for recipe, arm in zip(recipes, demo.arms().values(), strict=True):
        whole = make_plan(replace(arm, episodes=replace(arm.episodes, count=35))).config
        (tmp_path / "config.toml").write_text(to_toml(whole), encoding="utf-8")
        main(["train", "--config", str(tmp_path / "config.toml")])
        assert seen[-1] == whole
        path = ROOT / "recipes" / f"{recipe}.toml"
        main(["train", "--config", str(path)])
        # The demonstration has a length of its own, and its sizes are those that emoji give.
        assert seen[-1].run.name == arm.run.name
        assert make_plan(seen[-1]).config == whole
        for word in ("# command:", "# hardware:", "# expected:"):
            assert word in path.read_text(encoding="utf-8")


def test_the_reference_is_one_recipe_away(seen):
    """Its recipe has each setting with which docs/method.md restores the reference."""
    recipe = ROOT / "recipes" / "reference.toml"
    written = flatten(tomllib.loads(recipe.read_text(encoding="utf-8")))
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    _, _, departures = page.partition("### Where it departs")
    departures, _, _ = departures.partition("\n## ")
    restoring = re.findall(r"`(\w+\.[\w.]+ = [^`]+)`", departures)
    assert len(restoring) == 17
    for setting in restoring:
        ((name, value),) = flatten(tomllib.loads(setting)).items()
        assert written[name] == value, setting
    for path in (recipe, recipe.with_name("reference_clip.toml")):
        main(["train", "--config", str(path)])
        without = ["teacher.*: no effect, since teacher.features is not set"]
        assert check(seen[-1]) == (without if path == recipe else [])
        assert seen[-1].optim.learning_rate == 5e-4


def test_the_demonstration_and_the_commands_on_its_runs(tmp_path, monkeypatch, capsys):
    """Three arms, one table, results.json, a report; `evaluate` repeats a run's metrics, and
    `compare` shows differences."""
    original, small = demo.arms, tiny_config(out="")

    def arms(*, seed: int, out: str) -> dict[str, Config]:
        tiny = {"model": small.model, "prototypes": small.prototypes}
        tiny["episodes"] = replace(small.episodes, size=32, count=3)
        return {
            name: replace(config, **tiny, teacher=replace(config.teacher, number=8))
            for name, config in original(seed=seed, out=out).items()
        }

    monkeypatch.setattr(datasets, "emoji", few_emoji)
    monkeypatch.setattr(demo, "arms", arms)
    monkeypatch.setattr(probes, "TOLERANCE", 0.03)  # its fits are half of the test's time
    monkeypatch.chdir(tmp_path)
    main(["demo", "--out", "demo"])
    entries = json.loads(Path("demo/results.json").read_text())
    assert [entry["name"] for entry in entries] == ["CLIP", "ProtoCLIP", "ProtoCLIP + teacher"]
    assert len({entry["samples_seen"]["mean"] for entry in entries}) == 1
    said = capsys.readouterr().out
    assert re.search(r"linear probe[^\0]*kNN[^\0]*samples seen[^\0]*demo/report.html", said)
    assert "ProtoCLIP + teacher" in Path("demo/report.html").read_text(encoding="utf-8")

    words = "demo/clip --json --precision fp32 --tasks zero_shot retrieval linear_probe geometry"
    main(["evaluate", *words.split()])
    records = {record["task"]: record for record in json.loads(capsys.readouterr().out)}
    results = json.loads(Path("demo/clip/results.json").read_text())
    for task, metric, own in (
        ("zeroshot_classification", "acc5", "zero_shot/acc5"),
        ("zeroshot_retrieval", "image_retrieval_recall@10", "retrieval/text_to_image@10"),
        ("linear_probe", "lp_acc1", "linear_probe/acc1"),
        ("geometry", "gap", "modality_gap/gap"),
    ):
        again = records[task]["metrics"][metric]
        assert again == pytest.approx(results["metrics"][f"eval/emoji/{own}"])
    main(["compare", "demo/clip", "demo/protoclip", "--json"])
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["seeds"], second["name"]) == ("CLIP", [0], "ProtoCLIP")
    found = second["metrics"]["eval/emoji/knn/acc1"]
    value = results["metrics"]["eval/emoji/knn/acc1"]
    assert found["difference"]["mean"] == pytest.approx(found["mean"] - value)
    assert found["difference"]["kind"] == "samples"
    assert found["difference"]["n"] == len(few_emoji().splits["test"].images)


def test_the_quick_demonstration(tmp_path, monkeypatch, capsys):
    """A model, its recall beside chance, a report and a map; the second call keeps them. Without
    the explorer's libraries it says what to install."""
    original = demo.quick_config

    def quick_config(*paths: Path, seed: int) -> Config:
        config = original(*paths, seed=seed)
        return replace(config, episodes=replace(config.episodes, size=32, count=2, batch_size=16))

    monkeypatch.setattr(demo, "quick_config", quick_config)
    monkeypatch.setattr(demo, "GROUPS", ("activities",))
    monkeypatch.chdir(tmp_path)
    main(["demo", "--quick"])
    said = capsys.readouterr().out
    assert "an artist new to the model, of emoji that it knows from other artists, percent:" in said
    assert re.search(r"Of 57 drawings .*\n.*: [\d.]+\n.*: [\d.]+\n  by chance it is: 17.5\n", said)
    made = [Path("runs/quick/report.html"), Path("runs/quick/explorer/index.html")]
    assert all(f"  {path}   " in said for path in made)
    time = made[1].stat().st_mtime_ns
    monkeypatch.setattr(spec, "find_spec", lambda name: None)
    main(["demo", "--quick"])
    assert time == made[1].stat().st_mtime_ns
    said = capsys.readouterr()
    assert "; pip install 'protoclip[explore]'" in said.err
    assert "Where to look:\n  runs/quick/model/   " in said.out
    styles = {
        name: {
            sample_id.partition("/")[0]
            for sample_id in pq.read_table(path)["sample_id"].to_pylist()
        }
        for name in ("seen", "unseen")
        for path in [f"runs/quick/{name}.parquet"]
    }
    assert styles["unseen"] == {demo.ARTIST}
    assert len(styles["seen"]) == 6
    assert demo.ARTIST not in styles["seen"]


# Pages of docs/ with Python: what stands in it, and what runs in its place. `runs/mine-0` is there.
PYTHON = {
    "training.md": {
        '"runs/small"': '"runs/small", "evaluate": False',
        '"episodes": {"size": 512': (
            '"prototypes": {"number": 8}, "episodes": {"batch_size": 16, "size": 32'
        ),
    },
    "models.md": {"open_clip:ViT-S-32-alt": "runs/mine-0"},
    "evaluation.md": {},
    "embed.md": {},
}
DOWNLOADS = ("import mteb",)  # blocks that are not run begin so


def python_of(page: str) -> list[str]:
    """The blocks of a page that need no network."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [block for block in blocks if not block.startswith(DOWNLOADS)]


@pytest.mark.parametrize(
    ("page", "code"), [(page, code) for page in PYTHON for code in python_of(page)]
)
def test_the_python_of_the_pages_works(page, code, tiny_run, tiny_parquet, tmp_path, monkeypatch):
    """With the tiny run as the model, and with smaller settings."""
    for name, smaller in PYTHON[page].items():
        assert name in code
        code = code.replace(name, smaller)
    monkeypatch.setattr(datasets, "emoji", few_emoji)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/mine-0").symlink_to(tiny_run)
    if page == "embed.md":  # the command above the block
        protoclip.embed("runs/mine-0", tiny_parquet, "vectors.parquet")
    exec(compile(code, page, "exec"), {})
    assert page != "training.md" or Path("runs/small/results.json").is_file()
