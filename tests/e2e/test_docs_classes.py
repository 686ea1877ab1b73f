"""docs/first_steps/classes.md does not rot: its commands and code run in order, on tiny models."""

import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protoclip.cli import main
from protoclip.training import evaluate
from testing import tiny_pairs
from tiny_starts import halves, save_open_clip

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first_steps" / "classes.md"
CLASSES = ("cat", "guinea_pig")
# A run of two steps.
QUICK = "--run.device cpu --run.precision fp32 --data.workers 0 --episodes.size 16"
QUICK += " --episodes.batch_size 8 --episodes.count 1"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the reader of the page has, and models of its names; work is done there."""
    monkeypatch.chdir(tmp_path)
    table = tiny_pairs(24)
    for row, png in enumerate(table["image"].to_pylist()):
        image = Image.open(io.BytesIO(png))
        for folder in ("photos", "split/train" if row < 16 else "split/test"):
            (kind := tmp_path / folder / CLASSES[row % 2]).mkdir(parents=True, exist_ok=True)
            image.save(kind / f"{row}.jpg")
    image.save(tmp_path / "new.jpg")
    kinds = pa.array([CLASSES[row % 2] for row in range(len(table))])
    pq.write_table(table.append_column("kind", kinds), tmp_path / "general.parquet")
    save_open_clip(tmp_path / "model")
    halves(tmp_path / "halves", "test_resnet", size=32)
    return tmp_path


def run(command: str) -> None:
    """A line of a shell block, with what is small or at hand in the place of what is not."""
    for name, ours in {
        "MODEL": "model",
        "wds:GENERAL": "general.parquet,class_column=kind",
        "timm:efficientnet_lite0": "timm:test_resnet --model.image.size 32 "
        "--model.image.weights halves/test_resnet.safetensors",
        "minilm": "halves/bert --model.text.context_length 20",
    }.items():
        command = command.replace(name, ours)
    program, *words = shlex.split(command)
    if program == "protoclip":
        main([*words, *(QUICK.split() if words[0] in ("finetune", "align") else [])])
    elif program == "python":
        if importlib.util.find_spec("duckdb"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words)
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    else:
        assert program == "printf"
        subprocess.run(command, shell=True, check=True)


@pytest.mark.slow
def test_commands_and_code_of_the_page_run(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "ALPHAS", (0.0, 1.0))
    said = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        if language == "sh":
            for command in block.replace("\\\n", " ").strip().splitlines():
                run(command)
                said.append(capfd.readouterr().out)
        else:
            exec(compile(block.replace("MODEL", "model"), str(PAGE), "exec"), {})
            said.append(capfd.readouterr().out)
    evaluated, *_, compared = said
    assert "acc1" in evaluated
    assert "tuned-0" in compared
    probed = next(text for text in said if "lp_acc1" in text)
    assert re.findall(r"(\S+) +│ l?p?_?acc1 ", probed) == [
        *("zeroshot_classification", "knn", "linear_probe"),
    ]
    assert any(text.startswith("a photo of a ") for text in said)
    vectors = pq.read_table(data / "photos.parquet")
    assert len(vectors) == vectors["captions"].null_count == 24
    lines = (data / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "split/train/guinea_pig/9.jpg\ta photo of a guinea pig"
    assert len(lines) == 17
    # What the page says of folders without captions.
    with pytest.raises(SystemExit):
        main(["data", "inspect", "photos"])
    assert "protoclip evaluate MODEL --data photos" in capfd.readouterr().err
