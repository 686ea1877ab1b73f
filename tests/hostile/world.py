"""A folder of small good things: pairs in every form, runs, an export, a teacher's features."""

import io
import os
import shutil
import stat
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from protoclip.cli import main
from testing import save_to_bytes, tiny_pairs
from tiny_starts import save_encoders

PAIRS = 64
# What a run of seconds needs beside a table and a folder.
RUN = """
[run]
device = "cpu"
precision = "fp32"
evaluate = false
keep_checkpoints = 1
"""
SMALL = """
[model.heads]
hidden_dim = 32
projection_dim = 8
[episodes]
size = 32
count = 2
batch_size = 16
"""
TINY = f"""{RUN}
[data]
train = "pairs.parquet"
[model]
embed_dim = 16
[model.image]
name = "test_resnet"
size = 32
[model.text]
context_length = 8
width = 16
layers = 1
{SMALL}
warm_up = 0
locked_image = 0
[prototypes]
number = 8
iterations = 2
"""
ALIGN = f"""{RUN}
[data]
train = "pairs.tsv"
validation = 0.0
[model]
embed_dim = 16
[model.image]
name = "test_resnet"
weights = "encoders/test_resnet.safetensors"
size = 32
[model.text]
name = "encoders/bert"
context_length = 20
{SMALL}
[align]
features = "store"
"""
TUNE = f"""{RUN}
guard = ["classes.parquet,class_column=kind"]
[data]
train = "pairs.parquet"
[model]
start = "run"
[episodes]
size = 32
count = 1
batch_size = 16
"""


def build() -> None:
    """Write everything into the current folder."""
    table = tiny_pairs(PAIRS)
    captions = [f"{caption} {row}" for row, caption in enumerate(table["caption"].to_pylist())]
    kinds = pa.array([caption.split()[1] for caption in captions])
    table = table.set_column(1, "caption", pa.array(captions))
    pq.write_table(table, "pairs.parquet")
    pq.write_table(table.append_column("kind", kinds), "classes.parquet")
    for folder in ("empty", "other"):
        Path(folder).mkdir()
    pq.write_table(table.take(list(range(PAIRS))[::-1]), "other/pairs.parquet")
    pq.write_table(pa.table({"image": ["a"], "caption": [1]}), "numbers.parquet")
    write_images(table)
    write_tar(table)
    write_odd_images()
    Path("tiny.toml").write_text(TINY)
    Path("tune.toml").write_text(TUNE)
    Path("align.toml").write_text(ALIGN)
    with torch.random.fork_rng():
        save_encoders(Path("encoders"), "test_resnet", size=32)
    Path("notes.txt").write_text("keep me\n")
    called("train --config tiny.toml --run.out run --run.evaluate true --data.validation 0.4")
    called("train --config tiny.toml --run.out short")
    called("finetune --config tune.toml --run.out tuned --alpha 0.5")
    called("align --config align.toml --run.out aligned")
    called("export run exported --formats open_clip")
    called("embed-teacher --teacher run --data.train pairs.parquet --out teacher")
    called("data pack pairs.parquet shards --samples_per_shard 24")


def called(line: str) -> None:
    """A command that has to succeed."""
    main(line.split())


def write_images(table: pa.Table) -> None:
    """The images as files, with a TSV and a JSON Lines table of them."""
    Path("images").mkdir()
    rows = []
    for number, (image, caption) in enumerate(columns(table)):
        Path(f"images/{number:02}.png").write_bytes(image)
        rows.append((f"images/{number:02}.png", caption))
    tsv = "".join(f"{path}\t{caption}\n" for path, caption in rows)
    Path("pairs.tsv").write_text(f"image\tcaption\n{tsv}")
    Path("pairs.jsonl").write_text(
        "".join(f'{{"image": "{path}", "caption": "{caption}"}}\n' for path, caption in rows)
    )


def write_tar(table: pa.Table) -> None:
    """The pairs as one tar file."""
    with tarfile.open("pairs.tar", "w") as tar:
        for number, (image, caption) in enumerate(columns(table)):
            for suffix, content in ((".png", image), (".txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:03}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def columns(table: pa.Table) -> list[tuple[bytes, str]]:
    return list(zip(table["image"].to_pylist(), table["caption"].to_pylist(), strict=True))


def encoded(kind: str, *, side: int = 32) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return save_to_bytes(Image.fromarray(noise), kind)


def write_odd_images() -> None:
    """Files that look like images, are damaged, or are no regular files."""
    odd = Path("odd")
    odd.mkdir()
    jpeg, png = encoded("JPEG", side=64), encoded("PNG")
    files = {
        "empty.jpg": b"",
        "cut.jpg": jpeg[:-300],
        "cut.png": png[: len(png) // 2],
        "damaged.png": png[:60] + bytes(10) + png[70:],
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "bomb.png": bomb(),
    }
    for name, content in files.items():
        (odd / name).write_bytes(content)
    write_odd_weights(odd)
    os.mkfifo(odd / "pipe.jpg")
    (odd / "folder.jpg").mkdir()
    (odd / "loop.jpg").symlink_to("loop.jpg")
    (odd / "leaving.png").symlink_to("/etc/hostname")


def write_odd_weights(odd: Path) -> None:
    """Features that are not finite, and weights that hold code."""
    features = np.ones((PAIRS, 4), np.float32)
    features[5, 2] = np.nan
    np.save(odd / "nan.npy", features)
    torch.save({"a": Fraction(1, 2)}, odd / "pickled.pt")


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    png = bytearray(encoded("PNG", side=1))
    png[16:24] = (40_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def copy(source: str, target: str) -> str:
    """Copy a file; a pipe is made anew."""
    if stat.S_ISFIFO(os.lstat(source).st_mode):
        os.mkfifo(target)
        return target
    return shutil.copy2(source, target, follow_symlinks=False)
