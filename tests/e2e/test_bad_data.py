"""Training never dies from one sample and never hides what it skipped; faults of form stop it."""

import json
import os
from typing import Any

import numpy as np
import pytest
from PIL import Image

from interrupting import with_changes
from protoclip.training import run
from testing import save_to_bytes, tiny_config, tiny_pairs

GOOD = 60


def encoded(kind: str, side: int = 40, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return save_to_bytes(Image.fromarray(pixels), kind)


def damaged_png() -> bytes:
    data = bytearray(encoded("PNG"))
    data[60:70] = bytes(10)
    return bytes(data)


# File name, its bytes (None: there is no such file), and what the reason has to say.
FILES: dict[str, tuple[bytes | None, str]] = {
    "zero.jpg": (b"", "empty"),
    "cut.jpg": (encoded("JPEG")[:-200], "truncated"),
    "cut.webp": (encoded("WEBP")[:-100], ""),
    "damaged.png": (damaged_png(), ""),
    "page.jpg": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "missing.jpg": (None, "no such file"),
    "http://127.0.0.1:9/none.jpg": (None, "img2dataset"),
    "/etc/hostname": (None, "lies outside of"),
}
# Name of a sample, its caption, and what the reason has to say.
CAPTIONS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty caption"),
    "line separator\u2028": (b"", "empty caption"),
}
# What stands where a file should be.
ODD = ("a folder.jpg", "dangling.jpg", "fifo.jpg")


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """A run over a TSV file with every kind of bad sample, and the reasons it wrote, by id."""
    folder = tmp_path_factory.mktemp("spoiled")
    lines = [b"id\tfilepath\ttitle"]
    for row, (image, caption) in enumerate(zip(*shapes(GOOD), strict=True)):
        (folder / f"good{row}.png").write_bytes(image)
        lines.append(f"good{row}\tgood{row}.png\t{caption}".encode())
    for name, (content, _) in FILES.items():
        if content is not None:
            (folder / name).write_bytes(content)
        lines.append(f"{name}\t{name}\ta caption".encode())
    os.mkfifo(folder / "fifo.jpg")
    (folder / "a folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    for name in ODD:
        lines.append(f"{name}\t{name}\ta caption".encode())
    for name, (text, _) in CAPTIONS.items():
        lines.append(f"{name}\tgood0.png\t".encode() + text)
    (folder / "pairs.tsv").write_bytes(b"\n".join(lines) + b"\n")

    sections = {
        "data": {
            "id_column": "id",
            "validation": 0.0,
            "max_bad_share": 0.5,
        },
        # Without replacement, so that two turns over the data meet every sample.
        "episodes": {"size": 64, "batch_size": 32, "count": 3, "replacement": False},
        "run": {"evaluate": False},
    }
    config = tiny_config(str(folder / "pairs.tsv"), out=str(folder / "run"))
    results = run.train(with_changes(config, sections))
    skipped = (folder / "run" / "skipped.jsonl").read_text(encoding="utf-8").strip().split("\n")
    records = [json.loads(line) for line in skipped]
    assert len(records) == len({record["sample_id"] for record in records})
    return results, {record["sample_id"]: record["reason"] for record in records}


def shapes(number: int) -> tuple[list[bytes], list[str]]:
    table = tiny_pairs(number)
    return table.column("image").to_pylist(), table.column("caption").to_pylist()


def test_every_bad_sample_is_skipped_and_recorded_and_no_other(
    spoiled: tuple[dict[str, Any], dict[str, str]],
) -> None:
    """Under its id, with a reason of one line; training saw all it should."""
    results, reasons = spoiled
    assert set(reasons) == {*FILES, *CAPTIONS, *ODD}
    for name, reason in reasons.items():
        assert (FILES | CAPTIONS).get(name, (b"", ""))[1] in reason, name
        assert reason
        assert "\n" not in reason
    assert results["samples_skipped"] == len(reasons)
    assert results["samples_seen"] == 3 * 64
