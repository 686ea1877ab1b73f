"""Captions of several languages in one table, a column each: training draws among them, and
retrieval is measured by column."""

import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protoclip.cli import main
from protoclip.data.captions import CaptionDraw
from testing import save_to_bytes

SETTINGS = """--model.image.name test_resnet --model.image.size 32 --model.embed_dim 16
    --model.text.context_length 16 --model.text.width 16 --model.text.layers 1
    --model.heads.hidden_dim 32 --model.heads.projection_dim 8
    --episodes.size 64 --episodes.count 3 --episodes.batch_size 16 --prototypes.number 8
    --run.device cpu --run.precision fp32 --data.workers 0 --data.validation 0.3 --data.id_column ''
    --data.caption_column caption_de caption_en"""


def write_table(path: Path) -> Path:
    """240 images with an English caption; the first 60 have no German one."""
    pixels = np.random.default_rng(0).integers(0, 256, (240, 16, 16, 3)).astype(np.uint8)
    images = [save_to_bytes(Image.fromarray(image)) for image in pixels]
    english = [f"a picture {row}" for row in range(len(images))]
    german = [f"ein Bild {row}" if row >= 60 else "" for row in range(len(images))]
    columns = {"image": images, "caption_de": german, "caption_en": english}
    pq.write_table(pa.table(columns), path)
    return path


def test_captions_of_two_languages(tmp_path, monkeypatch, capsys):
    """A run draws from both columns, and says recall by language, on the images that have both, and
    among how many; so does `evaluate`."""
    table, drawn = write_table(tmp_path / "photos.parquet"), set[str]()
    choose = CaptionDraw.choose

    def watch(self, captions, draw):
        drawn.update(chosen := choose(self, captions, draw))
        return chosen

    monkeypatch.setattr(CaptionDraw, "choose", watch)
    run = tmp_path / "run"
    main(shlex.split(f"train --data.train {table} --run.out {run} {SETTINGS}"))
    assert {text.split()[0] for text in drawn} == {"a", "ein"}
    results = json.loads((run / "results.json").read_text())
    numbers, printed = list[int](), capsys.readouterr().out
    for name in ("validation", "validation-caption_de", "validation-caption_en"):
        recall = f"eval/{name}/retrieval/text_to_image"
        assert results["metrics"][f"{recall}@10"] > 0
        numbers.append(results["candidates"][recall])
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{recall}@10 ")]
        assert line.endswith(f" among {numbers[-1]}")
    assert numbers[0] == 72 > numbers[1] == numbers[2] > 36

    data = f"{table},caption_column=caption_de,caption_column=caption_en,id_column="
    main(["evaluate", str(run), "--data", data, "--tasks", "retrieval", "--json", "--no-cache"])
    both, *records = json.loads(capsys.readouterr().out)  # and no mean of the three
    assert (both["dataset"], both["samples"]) == ("photos", 240)
    names = [(r["dataset"], r["column"], r["language"], r["samples"]) for r in records]
    assert names == [
        ("photos-caption_de", "caption_de", "de", 180),
        ("photos-caption_en", "caption_en", "en", 180),
    ]
    words = ["--caption_column", "caption_de", "caption_en", "--id_column", ""]
    main(["evaluate", str(run), "--data", str(table), *words, "--tasks", "retrieval", "--no-cache"])
    printed = capsys.readouterr().out
    assert printed.count(" among 180 ") == 12  # recalls of two columns
    assert (printed.count(" among 240 "), printed.count(" among 420 ")) == (3, 3)
    alone = f"{table},caption_column=caption_de,id_column="
    main(["evaluate", str(run), "--data", alone, "--tasks", "retrieval", "--json", "--no-cache"])
    (record,) = json.loads(capsys.readouterr().out)
    assert record["metrics"] == pytest.approx(records[0]["metrics"])
    assert record["intervals"] == {
        name: pytest.approx(ends) for name, ends in records[0]["intervals"].items()
    }
