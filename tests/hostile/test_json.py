"""`--json`, which each command that answers has, and `-q`; in the world of `test_hostile.py`."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from protoclip import terminal
from protoclip.cli import COMMANDS, demo, main
from testing import tiny_pairs

LINES = {
    "train": "--config tiny.toml --run.out new",
    "align": "--config align.toml --run.out new",
    "finetune": "--config tune.toml --run.out new --alpha 0.5",
    "evaluate": "run --data classes.parquet,class_column=kind --tasks zero_shot --workers 0",
    "classify": "run --data pairs.tsv --classes classes.parquet,class_column=kind --out new.csv",
    "compare": "run tuned",
    "analyze": "run",
    "report": "run --out new.html --samples 8",
    "explore": "run --data pairs.tsv --map pca --static new --atlas new.parquet",
    "export": "run new --formats open_clip",
    "embed": "run --data pairs.tsv --out new.parquet",
    "demo": "--out new --quick",
    "match": "--data pairs.tsv --pairs 64 --texts hf:encoders/bert "
    "--images timm:test_resnet/encoders/test_resnet.safetensors",
    "embed-teacher": "--teacher run --data.train pairs.tsv --out new",
    "data inspect": "pairs.tsv --samples 9",
    "data score": "many.parquet --out new.csv --model.image.name timm:test_resnet "
    "--model.image.size 32 --model.image.weights encoders/test_resnet.safetensors "
    "--model.text.name encoders/bert",
    "data pack": "pairs.tsv new",
    "data index": "pairs.tsv",
}


@pytest.fixture
def place(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, as the current folder; the demonstration takes no time there."""
    for name in ("images", "run", "tuned", "encoders"):
        shutil.copytree(built / name, tmp_path / name)
    for file in (*built.glob("*.toml"), *built.glob("*.parquet"), built / "pairs.tsv"):
        shutil.copy(file, tmp_path)
    pq.write_table(tiny_pairs(160), tmp_path / "many.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "is_quiet", False)  # again, after a test whose command was quiet
    monkeypatch.setattr(demo, "quick", lambda out, seed: print("on the way") or {"a": "what it is"})
    return tmp_path


def test_each_command_has_a_line() -> None:
    # `choose` needs pairs that all differ; its own test reads its JSON.
    assert {*LINES} == {*COMMANDS} - {"completion", "choose"}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_the_answer_is_json_and_nothing_else(name, place, capsys):
    """With `-q` no note and no progress is said beside it."""
    main([*name.split(), *LINES[name].split(), "--json", "-q"])
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts
    lines = [line for line in said.err.splitlines() if not line.startswith(("warning: ", "  "))]
    assert lines == ["on the way"] * (name == "demo")
