"""A user's mistake ends in one line on standard error and exit code 2, and loses nothing."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip.checks import check
from protoclip.cli import main
from protoclip.config import PERMISSIONS
from protoclip.models.loading import find_checkpoint
from protoclip.testing import tiny_config, tiny_pairs
from protoclip.training import run


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    written = capsys.readouterr().err.strip().splitlines()
    assert len(written) == 1, written
    assert written[0].startswith("protoclip: error: ")
    return written[0]


TRAIN = {
    "unknown key": ("--run.sede 1", "run.sede"),
    "wrong type": ("--run.seed abc", "run.seed"),
    "wrong choice": ("--data.augmentation heavy", "data.augmentation"),
    "more prototypes than samples": ("--prototypes.number 5000", "prototypes.number: 5000"),
    "more teacher prototypes": (
        "--teacher.features emoji --teacher.number 5000",
        "teacher.number: 5000",
    ),
    "episode larger than the data": (
        "--episodes.size 8192 --episodes.replacement false",
        "episodes.size: 8192 is larger than the 7077 training samples",
    ),
    "batch larger than the episode": (
        "--episodes.batch_size 8192",
        "episodes.batch_size: 8192 is larger than episodes.size",
    ),
    "episode no multiple of the batch": ("--episodes.size 1000", "try 768"),
    "stages longer than the run": ("--episodes.count 1", "episodes.count: 1"),
    "missing recipe": ("--config missing.toml", "missing.toml: no such file"),
    "missing data": ("--data.train missing.parquet", "missing.parquet: no such file"),
    "missing teacher": (
        "--teacher.features missing.parquet",
        "missing.parquet: no such file",
    ),
    "missing checkpoint": ("--model.checkpoint missing", "missing: no such run or checkpoint"),
    "unknown model": ("--model.name RN51", "no model 'RN51'"),
    "unknown timm model": ("--model.image.name resnet10x", "no model 'resnet10x'"),
    "unknown weights": ("--model.name RN50 --model.pretrained mine", "no weights 'mine'"),
    "weights without a model": ("--model.pretrained openai", "model.pretrained: needs model.name"),
    "heads that do not divide": ("--model.text.heads 3", "model.text.heads"),
    "a queue smaller than its prototypes": (
        "--prototypes.source queue --prototypes.queue_size 100",
        "prototypes.queue_size: 100",
    ),
    "zero temperature": ("--prototypes.target_temperature 0", "prototypes.target_temperature"),
    "negative temperature": ("--teacher.target_temperature -1", "teacher.target_temperature"),
    "negative learning rate": ("--optim.learning_rate -1", "optim.learning_rate"),
    "no loss": ("--loss.info_nce 0 --loss.prototypical 0", "loss: all weights are 0"),
    "no loss in the warm-up": ("--loss.info_nce 0", "loss.info_nce: 0"),
    "negative weight": ("--loss.prototypical -1", "loss.prototypical"),
    "no such device": ("--run.device cuda:99", "run.device"),
    "not a device": ("--run.device quantum", "run.device"),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wrong setting is named, and no run folder is left behind."""
    monkeypatch.chdir(tmp_path)
    options, message = TRAIN[case]
    assert message in error_of(["train", *options.split()], capsys)
    assert not list(tmp_path.iterdir())


def test_unknown_keys_in_a_recipe_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typo in a TOML file is named, and so is a file that is no TOML."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[episodes]\nsise = 64\n")
    assert "sise" in error_of(["train", "--config", str(recipe)], capsys)
    recipe.write_text("[episodes\n")
    assert "recipe.toml" in error_of(["train", "--config", str(recipe)], capsys)


@pytest.mark.parametrize("permission", PERMISSIONS)
def test_a_recipe_grants_no_permission(
    permission: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line alone does; what it has granted is not written into the run's recipe."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[data]\n{permission} = true\ntrain = 'pipe:touch {tmp_path}/ran.tar'\n")
    for more in ([], [f"--data.{permission}", "false"]):
        message = error_of(["train", *more, "--config", str(recipe)], capsys)
        assert f"data.{permission}: a recipe cannot allow this" in message
    config = tiny_config(out=str(tmp_path))
    granted = replace(config, data=replace(config.data, **{permission: True}))
    assert permission not in run.to_toml(granted)
    assert not (tmp_path / "ran.tar").exists()


def test_commands_run_where_the_command_line_allows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not before it does."""
    source = f"pipe:touch {tmp_path}/ran.tar"
    assert "--data.allow_commands true" in error_of(["data", "inspect", source], capsys)
    assert not (tmp_path / "ran.tar").exists()
    for given in (["--data.allow_commands", "true"], ["--data.allow_commands=true"]):
        message = error_of(["data", "index", source, *given], capsys)
        assert "a stream has no index" in message
    main(["data", "inspect", source, "--data.allow_commands", "true"])
    assert (tmp_path / "ran.tar").exists()


def test_data_that_is_not_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text file named .parquet, and a Parquet file without captions."""
    path = tmp_path / "pairs.parquet"
    path.write_text("filepath\ttitle\n")
    assert "pairs.parquet: " in error_of(["train", "--data.train", str(path)], capsys)
    pq.write_table(tiny_pairs(8).drop_columns(["caption"]), path)
    assert "no column with captions" in error_of(["train", "--data.train", str(path)], capsys)


def test_a_teacher_that_knows_other_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Teacher features of another data set are counted out before anything is trained."""
    path = tmp_path / "pairs.parquet"
    pq.write_table(tiny_pairs(64), path)
    options = ["--data.train", str(path), "--teacher.features", "emoji", "--run.out"]
    message = error_of(["train", *options, str(tmp_path / "run")], capsys)
    assert "no teacher features for 64 of 64" in message
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run does not overwrite the first."""
    (tmp_path / "notes.txt").write_text("keep me")
    message = error_of(["train", "--run.out", str(tmp_path)], capsys)
    assert "run folder exists" in message
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_evaluate_and_compare_name_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No folder, no checkpoint, no results, damaged results."""
    assert "no such run" in error_of(["evaluate", str(tmp_path / "none")], capsys)
    assert "no checkpoint here" in error_of(["evaluate", str(tmp_path)], capsys)
    assert "no such run folder" in error_of(["compare", str(tmp_path / "none")], capsys)
    assert "has not finished" in error_of(["compare", str(tmp_path)], capsys)
    (tmp_path / "results.json").write_text("{")
    assert "not the results of a run" in error_of(["compare", str(tmp_path)], capsys)
    error_of(["compare"], capsys)
    error_of(["evaluate"], capsys)
    error_of(["unknown"], capsys)


def test_checkpoints_of_another_architecture_or_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights load entirely or not at all, and the reason is said."""
    path = tmp_path / "pairs.parquet"
    pq.write_table(tiny_pairs(64), path)
    run.train(tiny_config(str(path), out=str(tmp_path / "run")))
    capsys.readouterr()
    fresh = ["train", "--model.checkpoint", str(tmp_path / "run"), "--run.out"]
    message = error_of([*fresh, str(tmp_path / "next")], capsys)
    assert "checkpoint of another architecture" in message
    assert not (tmp_path / "next").exists()
    checkpoint = find_checkpoint(tmp_path / "run")
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in error_of(["evaluate", str(checkpoint)], capsys)
    (checkpoint / "model.json").write_text("{}")
    assert "model.json is not what was written" in error_of(["evaluate", str(checkpoint)], capsys)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_picture_that_cannot_be_read_is_named(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from a worker process, the message is one line with the sample's id."""
    path = tmp_path / "pairs.parquet"
    broken = pa.array([b"nonsense"] * 64, pa.binary())
    pq.write_table(tiny_pairs(64).set_column(0, "image", broken), path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(run.to_toml(tiny_config(str(path), out=str(tmp_path / "run"))))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(recipe), "--data.workers", workers])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "65 of 65 samples read are bad, more than data.max_bad_share" in last
    assert "not an image" in last


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where a folder should be is named, without a traceback."""
    (tmp_path / "file").write_text("")
    assert "file" in error_of(["train", "--run.out", str(tmp_path / "file" / "run")], capsys)


def test_a_setting_without_effect_is_said(tmp_path: Path) -> None:
    """Temperature beside hard targets, or prototype settings of a CLIP run, draw one note each."""
    config = tiny_config(out=str(tmp_path))
    assert check(config) == []
    hard = replace(config.prototypes, hard_targets=True, target_temperature=0.5)
    assert check(replace(config, prototypes=hard)) == [
        "prototypes.target_temperature: no effect with prototypes.hard_targets"
    ]
    clip = replace(config, loss=replace(config.loss, prototypical=0.0))
    assert check(clip) == ["prototypes.*: no effect, since loss.prototypical is 0"]
