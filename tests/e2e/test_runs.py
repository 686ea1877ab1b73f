"""Runs from beginning to end, by the functions and commands that users call."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import protoclip
from protoclip.cli import demo, main
from protoclip.cli.parsing import parse
from protoclip.cli.train import Train
from protoclip.config import (
    Config,
    EpisodeConfig,
    ImageTowerConfig,
    TeacherConfig,
    TextTowerConfig,
    check,
)
from protoclip.evaluation import compare
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.samples import SampleResults
from protoclip.models import loading
from protoclip.models.loading import find_checkpoint
from protoclip.prototypes.features import ExtractedFeatures
from protoclip.testing import tiny_config
from protoclip.training import optim, run
from protoclip.training.run import flat

ROOT = Path(__file__).parents[2]


def metrics_of(folder: Path, name: str = "") -> list[dict[str, float]]:
    """The lines of metrics.jsonl that hold a metric."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if not name or name in line]


def test_a_run_folder_holds_what_it_should(tiny_run: Path) -> None:
    """Configuration, metrics of every step, checkpoint, results, TensorBoard."""
    assert (tiny_run / "config.toml").is_file()
    assert list((tiny_run / "tensorboard").iterdir())
    results = json.loads((tiny_run / "results.json").read_text())
    assert results["samples_seen"] == 4 * 64
    assert results["steps"] == 16
    assert results["train_seconds"] > 0
    lines = metrics_of(tiny_run)
    steps = [line["step"] for line in metrics_of(tiny_run, "train/loss/total")]
    assert steps == list(range(1, 17))
    assert all(np.isfinite(list(line.values())).all() for line in lines)


def test_only_prototypical_episodes_extract_and_cluster(tiny_run: Path) -> None:
    """They are episodes 1 and 2 of 0 to 3."""
    extracted = metrics_of(tiny_run, "train/seconds/extract")
    assert [line["episode"] for line in extracted] == [1, 2]
    grouped = metrics_of(tiny_run, "train/loss/prototypical/image_from_text")
    assert [line["step"] for line in grouped] == list(range(5, 13))


def test_a_clip_run_never_clusters_and_says_what_it_does(
    tiny_parquet: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without prototypical weights InfoNCE is the total. The first line says how much there is to
    train on; the last step is logged, and its loss shown, whatever `run.log_every` is."""
    config = tiny_config(tiny_parquet, out=str(tmp_path / "clip"))
    run.train(
        replace(
            config,
            run=replace(config.run, log_every=1000),
            loss=replace(config.loss, prototypical=0.0),
        )
    )
    losses = metrics_of(tmp_path / "clip", "train/loss/total")
    assert [line["step"] for line in losses] == [16]
    assert losses[0]["train/loss/total"] == losses[0]["train/loss/info_nce"]
    assert metrics_of(tmp_path / "clip", "train/seconds/extract") == []
    shown = capsys.readouterr().err
    expected = "training on 96 pairs: 4 episodes of 64 pairs in batches of 16, 2.67 passes"
    assert expected in shown
    assert f"loss {losses[0]['train/loss/total']:.4g})" in shown.splitlines()[-1]


def test_equal_seeds_give_equal_runs_bit_for_bit(
    tiny_run: Path, tiny_parquet: str, tmp_path: Path
) -> None:
    """Weights and metrics are equal; those of another seed are not."""
    weights, metrics = [], []
    for folder, seed in ((tiny_run, 0), (tmp_path / "b", 0), (tmp_path / "c", 1)):
        if folder != tiny_run:
            config = tiny_config(tiny_parquet, out=str(folder))
            torch.manual_seed(seed + 7)
            run.train(replace(config, run=replace(config.run, seed=seed)))
        weights.append(load_file(find_checkpoint(folder) / "model.safetensors"))
        lines = metrics_of(folder)
        metrics.append([{k: v for k, v in line.items() if "second" not in k} for line in lines])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert metrics[0] == metrics[1]
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_training_learns(tiny_parquet: str, tmp_path: Path) -> None:
    """On nine different captions InfoNCE falls well below its start."""
    config = tiny_config(tiny_parquet, out=str(tmp_path / "run"))
    longer = replace(config.episodes, count=16)
    run.train(replace(config, episodes=longer, optim=replace(config.optim, warm_up_steps=4)))
    name = "train/loss/info_nce"
    losses = [line[name] for line in metrics_of(tmp_path / "run", name)]
    assert np.mean(losses[-12:]) < np.mean(losses[:4]) - 0.5


def test_the_queue_needs_no_extraction(
    tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prototypes from the queue nothing is extracted, and the prototypical loss is there."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("an extraction pass")

    monkeypatch.setattr(ExtractedFeatures, "features", forbidden)
    config = tiny_config(tiny_parquet, out=str(tmp_path / "queue"))
    run.train(replace(config, prototypes=replace(config.prototypes, source="queue")))
    name = "train/loss/prototypical/image_from_text"
    assert len(metrics_of(tmp_path / "queue", name)) == 8
    extract = replace(config.prototypes, source="extract")
    with pytest.raises(AssertionError, match="an extraction pass"):
        run.train(
            replace(config, run=replace(config.run, out=str(tmp_path / "x")), prototypes=extract)
        )


def test_several_teachers_and_samples_they_do_not_know(
    tiny_parquet: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each teacher has its own prototypes, losses and weight. One that knows a third of the samples
    trains on those, and a note says how many are missing."""
    generator = np.random.default_rng(0)
    for name, known in (("all", 96), ("some", 32)):
        flat = pa.array(generator.normal(size=known * 5).astype(np.float32))
        table = {
            "sample_id": [f"tiny/{row}" for row in range(known)],
            "features": pa.FixedSizeListArray.from_arrays(flat, 5),
        }
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    config = replace(
        tiny_config(tiny_parquet, out=str(tmp_path / "run")),
        teachers=[
            TeacherConfig(name="all", features=str(tmp_path / "all.parquet"), number=8),
            TeacherConfig(
                name="some",
                features=str(tmp_path / "some.parquet"),
                number=4,
                weight=0.5,
                hard_targets=False,
            ),
        ],
    )
    run.train(config)
    assert "some: no features of 64 of 96 training samples" in capsys.readouterr().err
    grouped = metrics_of(tmp_path / "run", "train/loss/prototypical/image_from_some")
    assert len(grouped) == 8
    for line in grouped:
        loss = {k.split("/")[-1]: v for k, v in line.items() if "train/loss" in k}
        expected = loss["info_nce"] + (loss["image_from_text"] + loss["text_from_image"]) / 2
        expected += (loss["image_from_all"] + loss["text_from_all"]) / 2
        expected += 0.5 * (loss["image_from_some"] + loss["text_from_some"]) / 2
        assert loss["total"] == pytest.approx(expected, rel=1e-5)


def test_fp16_trains_with_its_scaler(tiny_run: Path, tiny_parquet: str, tmp_path: Path) -> None:
    """The first loss is that of fp32 to a percent. The scaler finds a scale that gradients survive,
    so weights move and stay finite."""
    config = tiny_config(tiny_parquet, out=str(tmp_path / "fp16"))
    run.train(replace(config, run=replace(config.run, precision="fp16")))
    name = "train/loss/total"
    first, exact = (metrics_of(out, name)[0][name] for out in (tmp_path / "fp16", tiny_run))
    assert first == pytest.approx(exact, rel=0.01)
    assert first != exact
    start = loading.model(config.model, seed=0).state_dict()
    end = load_file(find_checkpoint(tmp_path / "fp16") / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in end.values())
    for part in ("towers.visual.trunk.conv1.0.weight", "towers.text_projection"):
        assert not torch.equal(start[part], end[part])


def test_the_model_loads_and_encodes(tiny_run: Path) -> None:
    """`load` takes a run folder or a checkpoint folder."""
    features = []
    for path in (tiny_run, find_checkpoint(tiny_run)):
        model, image_transform, tokenizer = protoclip.load(path)
        images = torch.stack([image_transform(Image.new("RGB", (50, 40), "red"))] * 2)
        with torch.inference_mode():
            image = model.encode_image(images, normalize=True)
            text = model.encode_text(tokenizer(["a red square", "a blue corner"]), normalize=True)
        assert image.shape == text.shape == (2, 16)
        torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
        features.append(torch.cat([image, text]))
    assert torch.equal(features[0], features[1])


@pytest.mark.slow
def test_an_open_clip_model_trains_and_loads_by_name(
    tiny_parquet: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads images and captions of the size that is set. Notes and config.toml name the defaults
    it trains with, which stay the same when the run goes on."""
    config = tiny_config(tiny_parquet, out=str(tmp_path / "named"))
    config = replace(
        config,
        model=replace(
            config.model,
            name="ViT-S-32-alt",
            image=ImageTowerConfig(size=64),
            text=TextTowerConfig(context_length=8),
        ),
        episodes=replace(config.episodes, size=16, count=3, batch_size=8),
    )
    results = run.train(config)
    assert "note: optim.learning_rate = 7.8125e-06, from ViT-S-32-alt" in capsys.readouterr().err
    assert "learning_rate = 7.8125e-06\n" in (tmp_path / "named" / "config.toml").read_text()
    assert run.train(config, resume="auto") == results
    model, image_transform, tokenizer = protoclip.load(tmp_path / "named")
    tokens = tokenizer(["a red square"])
    assert tokens.shape == (1, 8)
    assert model.encode_text(tokens).shape == (1, 256)
    images = image_transform(Image.new("RGB", (300, 200)))[None]
    assert images.shape == (1, 3, 64, 64)
    assert model.encode_image(images).shape == (1, 256)


def test_a_checkpoint_is_where_the_next_run_starts(
    tiny_run: Path, tiny_parquet: str, tmp_path: Path
) -> None:
    """`model.checkpoint` starts from the saved weights."""
    config = tiny_config(tiny_parquet, out=str(tmp_path / "next"))
    model = replace(config.model, checkpoint=str(tiny_run))
    still = replace(config.optim, learning_rate=1e-12, locked_learning_rate=1e-12)
    run.train(replace(config, model=model, optim=still))
    old = load_file(find_checkpoint(tiny_run) / "model.safetensors")
    new = load_file(find_checkpoint(tmp_path / "next") / "model.safetensors")
    for name in old:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(new[name], old[name], atol=1e-6, rtol=0)


def test_train_evaluate_and_compare_from_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    few_emoji: EvaluationData,
) -> None:
    """A recipe with overrides trains; `evaluate` repeats the run's metrics; `compare` puts runs of
    two seeds in one column and shows the difference."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "DRAWS", 20)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(run.to_toml(tiny_config(out="unused")))
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        options = f"--run.name {name} --run.seed {seed} --run.out {name}{seed} --json"
        weight = f"--loss.prototypical {1 if name == 'a' else 0}"
        main(["train", "--config", str(recipe), *options.split(), *weight.split()])
        assert json.loads(capsys.readouterr().out)["seed"] == seed
    main(["evaluate", "a0", "--json"])
    again = json.loads(capsys.readouterr().out)["metrics"]
    assert again == pytest.approx(json.loads(Path("a0/results.json").read_text())["metrics"])
    main(["compare", "a0", "a1", "b0", "--json"])
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["seeds"]) == ("a", [0, 1])
    assert (second["name"], second["seeds"]) == ("b", [0])
    key = "eval/emoji/knn/acc1"
    values = [json.loads(Path(f"a{s}/results.json").read_text())["metrics"][key] for s in (0, 1)]
    assert first["metrics"][key]["mean"] == pytest.approx(np.mean(values))
    assert first["metrics"][key]["spread"] == pytest.approx(np.std(values, ddof=1))
    difference = second["metrics"][key]["difference"]
    assert difference["mean"] == pytest.approx(second["metrics"][key]["mean"] - values[0])
    assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]
    assert (difference["kind"], difference["n"]) == ("bootstrap", len(few_emoji.test))
    written = Path("a0/results/emoji-validation.parquet")
    main(["evaluate", "a0", "--split", "validation", "--json"])
    assert len(SampleResults.read(written).images["sample_id"]) == len(few_emoji.validation)
    capsys.readouterr()
    main(["compare", "a0", "a1", "b0"])
    table = capsys.readouterr().out
    assert re.search(r"kNN .*±", table)
    assert "samples seen" in table


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[Config]:
    """The configurations that `protoclip train` would run."""
    configs: list[Config] = []
    monkeypatch.setattr(
        "protoclip.training.run.train",
        lambda config, resume: configs.append(config) or {"metrics": {}, "folder": ""},
    )
    return configs


def test_the_resolved_configuration_reads_back(tmp_path: Path, seen: list[Config]) -> None:
    """A run's config.toml, given as a recipe, is the same configuration."""
    for name, config in demo.arms(seed=3, out="somewhere").items():
        path = tmp_path / f"{len(seen)}.toml"
        path.write_text(run.to_toml(config), encoding="utf-8")
        main(["train", "--config", str(path)])
        assert seen[-1] == config, name


def test_the_recipes_are_the_demonstrations_arms(seen: list[Config]) -> None:
    """recipes/emoji_*.toml are the three arms but for their length, and say how to run them."""
    recipes = ["emoji_clip", "emoji_protoclip", "emoji_protoclip_teacher"]
    for recipe, arm in zip(recipes, demo.arms().values(), strict=True):
        path = ROOT / "recipes" / f"{recipe}.toml"
        main(["train", "--config", str(path)])
        assert seen[-1] == replace(arm, episodes=EpisodeConfig())
        for word in ("# command:", "# hardware:", "# expected:"):
            assert word in path.read_text(encoding="utf-8")


def test_the_reference_is_one_recipe_away(seen: list[Config]) -> None:
    """Its recipe has each setting with which the README restores the reference."""
    recipe = ROOT / "recipes" / "reference.toml"
    written = flat(tomllib.loads(recipe.read_text(encoding="utf-8")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, departures = readme.partition("### Where it departs")
    departures, _, _ = departures.partition("\n## ")
    restoring = re.findall(r"`(\w+\.[\w.]+ = [^`]+)`", departures)
    assert len(restoring) == 12
    for setting in restoring:
        ((name, value),) = flat(tomllib.loads(setting)).items()
        assert written[name] == value, setting
    for path in (recipe, recipe.with_name("reference_clip.toml")):
        main(["train", "--config", str(path)])
        assert check(seen[-1]) == []
        assert optim.resolved(seen[-1])[0].optim.learning_rate == 5e-4


def test_the_reference_recipe_trains(tiny_parquet: str, tmp_path: Path) -> None:
    """With small towers and episodes: two of five episodes have prototypes, losses are finite."""
    reference = parse(Train, ["--config", str(ROOT / "recipes" / "reference.toml")])
    small = tiny_config(tiny_parquet, out=str(tmp_path / "run"))
    config = replace(
        small,
        data=replace(reference.data, train=tiny_parquet),
        loss=reference.loss,
        episodes=replace(reference.episodes, size=64, count=5, batch_size=16),
        prototypes=replace(reference.prototypes, number=8),
        optim=replace(reference.optim, warm_up_steps=2),
        parallel=reference.parallel,
    )
    run.train(config)
    extracted = metrics_of(tmp_path / "run", "train/seconds/extract")
    assert [line["episode"] for line in extracted] == [1, 2]
    losses = [line["train/loss/total"] for line in metrics_of(tmp_path / "run", "train/loss/total")]
    assert len(losses) == 20
    assert np.isfinite(losses).all()


def test_the_demonstration_trains_compares_and_keeps_what_it_has(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    few_emoji: EvaluationData,
) -> None:
    """Three arms, one table, results.json. A second call trains only what is not finished, and a
    folder with another run is refused."""
    small = tiny_config(out="")

    def arms(*, seed: int, out: str) -> dict[str, Config]:
        return {
            name: replace(
                config,
                model=small.model,
                episodes=small.episodes,
                prototypes=small.prototypes,
                teacher=replace(config.teacher, number=8),
            )
            for name, config in original(seed=seed, out=out).items()
        }

    original = demo.arms
    monkeypatch.setattr(demo, "arms", arms)
    monkeypatch.setattr(compare, "DRAWS", 20)
    entries = demo.demo(tmp_path / "demo")
    assert [entry["name"] for entry in entries] == ["CLIP", "ProtoCLIP", "ProtoCLIP + teacher"]
    assert len({entry["samples_seen"]["mean"] for entry in entries}) == 1
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == entries
    assert "linear probe" in capsys.readouterr().out
    (tmp_path / "demo" / "protoclip" / "results.json").unlink()
    train, trained = run.train, []
    monkeypatch.setattr(
        run,
        "train",
        lambda config, **more: trained.append(config.run.name) or train(config, **more),
    )
    demo.demo(tmp_path / "demo")
    assert trained == ["ProtoCLIP"]
    with pytest.raises(ValueError, match="holds another run"):
        demo.demo(tmp_path / "demo", seed=5)


def test_the_readmes_library_example_works(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    """The Python block of the README runs as it is, on a run of that name."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    named = re.search(r'load\("(.+?)"\)', block.group(1))
    assert named is not None
    target = tmp_path / named.group(1)
    target.parent.mkdir(parents=True)
    target.symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.group(1), "README.md", "exec"), {})
