"""README and the pages of docs/tasks do not rot: their commands and code run, on tiny models.

A block runs unless a `<!-- not run: why -->` stands before it. A comment below a command is what it
prints, with other numbers.
"""

import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protoclip.cli import main
from protoclip.explore import serve
from protoclip.results import choose
from protoclip.training import evaluate
from testing import tiny_pairs
from tiny_starts import save_encoders, save_open_clip

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "SKILL.md", *sorted((ROOT / "docs" / "tasks").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.:@/-])\d[\d,]*(?:\.\d+)?(?![\w:/]|\.\d)")
NUM_PAIRS = 120
# What is small, or at hand, in the place of what is not.
TINY = {
    "--out titles.csv": "--model.image.name timm:tf_efficientnet_lite0 "
    "--model.text.name minilm --out titles.csv",
    "data score photos ": "data score photos --model.image.name timm:tf_efficientnet_lite0 "
    "--model.text.name minilm ",
    "open_clip:ViT-B-32/laion2b_s34b_b79k": "model",
    "open_clip:ViT-B-16-SigLIP/webli": "model",
    "MODEL": "model",
    "--held-out 600": "--held-out 8",
    "wds:GENERAL": "general.parquet,class_column=kind",
    "timm:tf_efficientnet_lite0 ": "timm:test_resnet --model.image.size 32 "
    "--model.image.weights encoders/test_resnet.safetensors ",
    "intfloat/multilingual-e5-small": "encoders/bert --model.text.context_length 20",
    "minilm": "encoders/bert --model.text.context_length 20",
}
QUICK = "--run.device cpu --run.precision fp32 --data.workers 0 --episodes.size 16"
QUICK += " --episodes.batch_size 8 --episodes.count 3"


def read_numbers(text: str) -> list[str]:
    """Those of prose and tables, and of blocks that are not run; without versions and addresses."""
    text = re.sub(r"```(?:sh\npip|sh\nprotoclip|python\n).*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|`[^`\n]+`|Python \d\.\d+|arXiv [\d.]+", "", text)
    return NUMBER.findall(text)


def test_readme_is_short_and_its_numbers_are_results() -> None:
    readme = README.read_text(encoding="utf-8")
    numbers = read_numbers(readme)
    assert len(readme.splitlines()) <= 90
    assert len(re.findall(r"\w\S*", re.sub(r"\]\([^)]*\)", "]", readme))) <= 800
    assert 15 < len(numbers) <= 30
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert set(numbers) <= set(NUMBER.findall(results))


def test_rows_of_readme_are_those_of_the_results() -> None:
    """The table of the README is a part of that of docs/results.md, which has more rows."""

    def read_rows(text: str, title: str) -> set[tuple[str, ...]]:
        part = text.partition(title)[2].partition("\n## ")[0]
        rows = re.findall(r"^\| ([\d,]+ \w+ ?photo.*|[\d,]+ photo.*) \|$", part, re.MULTILINE)
        return {tuple(re.findall(r"[\d,.]*\d", row)) for row in rows}

    readme = read_rows(README.read_text(encoding="utf-8"), "## What you get")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(readme) == 3
    assert readme <= read_rows(results, "## Between two pretrained encoders")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What readers have, under the names of the pages; work is done there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate, "ALPHAS", (0.0, 1.0))
    monkeypatch.setattr(serve, "make_server", Mock())  # the explorer's ends as soon as it is open
    monkeypatch.setattr(choose, "accelerate", lambda encoder, number: encoder)
    table = tiny_pairs(NUM_PAIRS)
    rows = ["image,caption,sku,kind"]
    (tmp_path / "photos").mkdir()
    for row, (png, caption) in enumerate(
        zip(table["image"].to_pylist(), table["caption"].to_pylist(), strict=True)
    ):
        image = Image.open(io.BytesIO(png))
        image.save(tmp_path / "photos" / f"{row}.jpg")
        for folder in ("pets", "split/train" if row < 80 else "split/test"):
            pets = tmp_path / folder / ("cat", "guinea_pig")[row % 2]
            pets.mkdir(parents=True, exist_ok=True)
            image.save(pets / f"{row}.jpg")
        (tmp_path / "photos" / f"{row}.txt").write_text(f"{caption} {row}", encoding="utf-8")
        rows.append(f"photos/{row}.jpg,{caption} {row},A-{row},{caption.split()[1]}")
    for name in ("all", "shop", "field", "photos"):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows[:-12]), encoding="utf-8")
        (tmp_path / f"{name}_test.csv").write_text("\n".join([rows[0], *rows[-12:]]), "utf-8")
    image.save(tmp_path / "new.jpg")
    records = [f"M{row};{row}.jpg;a {row} jar, clay" for row in range(NUM_PAIRS)]
    (tmp_path / "catalogue.csv").write_text("\n".join(["number;file;title", *records]), "utf-8")
    ids = "\n".join(["sample_id", "photos/3", "photos/5"])
    (tmp_path / "wrong.csv").write_text(ids, encoding="utf-8")
    kinds = pa.array([caption.split()[1] for caption in table["caption"].to_pylist()])
    pq.write_table(table.append_column("kind", kinds), tmp_path / "general.parquet")
    save_open_clip(tmp_path / "model")
    save_encoders(tmp_path / "encoders", "test_resnet", size=32)
    return tmp_path


def run(command: str) -> None:
    """A line of a shell block."""
    command += " "
    if command.startswith("printf"):
        subprocess.run(command, shell=True, check=True)
        return
    if " match " in command:
        command = re.sub(
            r"--images .* --texts",
            "--images timm:test_resnet/encoders/test_resnet.safetensors --texts",
            command,
        )
        command = command.replace("minilm", "hf:encoders/bert")
    for name, ours in TINY.items():
        command = command.replace(name, ours)
    if " choose " in command:
        command += "--images timm:test_resnet/encoders/test_resnet.safetensors "
        command += "--texts hf:encoders/bert --models model --minutes 0"
    program, *words = shlex.split(command, comments=True)
    if words == ["--version"]:
        with pytest.raises(SystemExit, match="0"):
            main(words)
    elif program == "protoclip":
        main([*words, *(QUICK.split() if words[0] in ("train", "align", "finetune") else [])])
    elif "duckdb" not in words[0] or importlib.util.find_spec("duckdb"):
        assert program == "python"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def split_commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command with the lines that it prints."""
    lines = re.findall(r"(?:^|\n)([^#\n].*)((?:\n#.*)*)", "\n" + block.replace("\\\n", " "))
    for command, printed in lines:
        yield command, [line.removeprefix("# ") for line in printed.strip().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    for not_run, language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if (
            not_run
            or language not in ("sh", "python")
            or block.startswith(("pip", "make", "python3 -m venv"))
        ):
            continue
        if language == "python":
            exec(compile(block.replace("MODEL", "model"), str(page), "exec"), scope)
            continue
        for command, printed in split_commands(block):
            run(command)
            output = "".join(capfd.readouterr())
            for line in printed:
                words = re.escape(line.removesuffix("...")).replace("\\ ", r"\s+").replace("\n", "")
                assert re.search(re.sub(r"\d[\d,.:]*", r"[\\d,.:]+", words), output), line
