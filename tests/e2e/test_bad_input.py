"""A user's mistake ends in one line on standard error and exit code 2, and loses nothing."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip.cli import main
from protoclip.models.saved import find_checkpoint
from protoclip.testing import tiny_config, tiny_pairs
from protoclip.training import run, run_folder


def error_of(line: str, capsys: pytest.CaptureFixture[str], *, lines: int = 1) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    written = capsys.readouterr().err.strip().splitlines()
    assert len(written) == lines, written
    assert written[-1].startswith("protoclip: error: ")
    return written[-1].removeprefix("protoclip: error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--run.sede 1", "run.sede: no such setting; did you mean run.seed?"),
        ("--run.seed", "--run.seed: needs a value"),
        ("--run.seed abc", "run.seed: 'abc' is no whole number"),
        ("--loss.info_nce nan", "loss.info_nce: nan is not finite"),
        ("--json now", "now: unexpected argument"),
        ("--config missing.toml", "missing.toml: no such file"),
        (
            "--episodes.size 8192 --no-episodes.replacement",
            "episodes.size: 8192 is larger than the 7077 training samples",
        ),
        ("--data.train missing.parquet", "missing.parquet: no such file"),
        ("--teacher.features missing.parquet", "missing.parquet: no such file"),
        ("--model.start missing", "missing: no such run or checkpoint"),
        ("--model.name RN51", "no model 'RN51'"),
        ("--model.image.name resnet10x", "no model 'resnet10x'"),
        ("--model.name RN50 --model.pretrained mine", "no weights 'mine'"),
        ("--run.device quantum", "run.device"),
        ('--data.train a.csv --data.sources [{"path":"b.csv"}]', "leave one of them out"),
    ],
)
def test_train_refuses(options, message, capsys, tmp_path, monkeypatch):
    """Each wrong setting is named, and no run folder is left behind."""
    monkeypatch.chdir(tmp_path)
    assert message in error_of(f"train {options}", capsys)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_recipe_names_the_file(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    for text, message in {
        "[episodes]\nsise = 64\n": "episodes.sise: no such setting; did you mean episodes.size?",
        "[loss]\ninfo_nce = nan\n": "loss.info_nce: nan is not finite",
        "run = 3\n": "run: 3 is no table",
        "resume = 'auto'\n": "resume: no such setting",
        "[episodes\n": "not TOML",
    }.items():
        recipe.write_text(text)
        assert f"{recipe}: {message}" in error_of(f"train --config {recipe}", capsys)


def test_commands_run_only_if_the_command_line_allows_them(tmp_path, capsys):
    (tmp_path / "run.sh").write_text(f"touch {tmp_path}/ran.tar")
    source = f"pipe:/bin/sh<{tmp_path}/run.sh"
    assert "--data.allow_commands true" in error_of(f"data inspect {source}", capsys)
    assert not (tmp_path / "ran.tar").exists()
    for given in ("--data.allow_commands true", "--data.allow_commands=true"):
        assert "a stream has no index" in error_of(f"data index {source} {given}", capsys)
    main(["data", "inspect", source, "--data.allow_commands"])
    assert (tmp_path / "ran.tar").exists()


def test_train_leaves_what_exists(tmp_path, capsys):
    """A folder with something in it, a file instead of a folder; teacher features of other data."""
    (tmp_path / "notes.txt").write_text("keep me")
    assert "run folder exists" in error_of(f"train --run.out {tmp_path}", capsys)
    assert "notes.txt" in error_of(f"train --run.out {tmp_path}/notes.txt/run", capsys)
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    pq.write_table(tiny_pairs(64), tmp_path / "pairs.parquet")
    options = f"--data.train {tmp_path}/pairs.parquet --run.out {tmp_path}/run"
    message = error_of(f"train --teacher.features emoji {options}", capsys)
    assert "no teacher features for 64 of 64" in message
    assert not (tmp_path / "run").exists()


def test_other_commands_name_what_is_missing(tmp_path, capsys):
    """No folder, no checkpoint, no results, damaged results; no argument, no command."""
    (tmp_path / "results.json").write_text("{")
    for line, message in {
        f"evaluate {tmp_path}/none": "no such run",
        f"evaluate {tmp_path}": "no checkpoint here",
        f"compare {tmp_path}/none": "no such run folder",
        f"compare {tmp_path}": "not the results of a run",
        "compare": "runs: is missing",
        "evaluate": "models: is missing",
        "embed here": "data: is missing",
        "embed-teacher --out here": "teacher: is missing",
        "unknown": "unknown: choose one of train, align",
        "trian": "trian: did you mean train?",
        "": "no command: choose one of",
    }.items():
        assert message in error_of(line, capsys)
    (tmp_path / "results.json").unlink()
    assert "has not finished" in error_of(f"compare {tmp_path}", capsys)


def test_checkpoints_of_another_architecture_or_damaged(tmp_path, capsys):
    """Weights load entirely or not at all, and the reason is said."""
    pq.write_table(tiny_pairs(64), tmp_path / "pairs.parquet")
    run.train(tiny_config(f"{tmp_path}/pairs.parquet", out=f"{tmp_path}/run"))
    fresh = f"train --model.start {tmp_path}/run --run.out {tmp_path}/next"
    message = error_of(f"{fresh} --model.embed_dim 64", capsys)
    assert "model.embed_dim: 64 does not go with model.start = " in message
    assert not (tmp_path / "next").exists()
    checkpoint = find_checkpoint(tmp_path / "run")
    (checkpoint / "model.json").write_text("{}")
    assert "model.json is not what was written" in error_of(f"evaluate {checkpoint}", capsys)


def test_too_many_bad_samples_stop_the_run(tmp_path, capsys):
    """With the reasons, in one line, though a worker process wraps its error. What was skipped
    until then stays recorded."""
    path, recipe = tmp_path / "pairs.parquet", tmp_path / "recipe.toml"
    images = tiny_pairs(64)["image"].to_pylist()
    spoiled = [b"nonsense" if row % 8 == 0 else image for row, image in enumerate(images)]
    table = tiny_pairs(64).set_column(0, "image", pa.array(spoiled, pa.binary()))
    pq.write_table(table, path)
    recipe.write_text(run_folder.to_toml(tiny_config(str(path), out=str(tmp_path / "run"))))
    with pytest.raises(SystemExit):
        main(["train", "--config", str(recipe), "--data.workers", "2"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "samples read are bad, more than data.max_bad_share (0.05)" in last
    assert last.count("not an image") >= 3
    assert (tmp_path / "run" / "skipped.jsonl").exists()
