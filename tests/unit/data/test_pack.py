"""Packing a source into tar shards, and reading them back."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image
from tars import facts, index

from protoclip.data import tools as packing
from protoclip.data.pairs import ImageTextPairs, Pairs, Sample
from protoclip.data.shards import read_shard
from protoclip.data.tools import JPEG_QUALITY, pack
from testing import save_to_bytes, tiny_pairs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PREPARED", 4)


def source(count: int = 23, **columns: list) -> ImageTextPairs:
    table = tiny_pairs(count)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return ImageTextPairs(table, name="tiny")


def samples(pairs: Pairs) -> list[Sample]:
    return [pairs.sample(row) for row in range(len(pairs))]


def encoded(width: int, height: int, kind: str = "JPEG", **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return save_to_bytes(smooth, kind, **options)


def only_image(folder: Path) -> bytes:
    (found,) = read_shard(str(folder / "00000.tar"), None)
    assert isinstance(found, Sample)
    return found.image


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_is_packed_reads_back(tmp_path, capsys):
    """The same ids, captions and bytes in order, from an index and by WebDataset. A second call
    reads nothing of the source; a shard that was lost is written again."""
    out = tmp_path / "out"
    packed = pack(source(), out, samples_per_shard=10)
    assert packed == (["00000.tar", "00001.tar", "00002.tar"], 23, 0)
    expected, before = facts(samples(source())), content(out)
    assert facts(samples(index(out))) == expected
    found = list(webdataset.WebDataset(str(out / "{00000..00002}.tar"), shardshuffle=False))
    ids = [json.loads(files["json"])["sample_id"] for files in found]
    texts = [(i, f["png"], (f["txt"].decode(),)) for i, f in zip(ids, found, strict=True)]
    assert texts == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTextPairs, "sample", lambda self, row: pytest.fail("was read"))
        assert pack(source(), out, samples_per_shard=10) == packed
    assert content(out) == before
    (out / "00001.tar").unlink()
    assert pack(source(), out, samples_per_shard=10) == packed
    assert content(out) == before
    assert "is packed already, and images are not checked again" in capsys.readouterr().err


def test_any_id_and_several_captions_are_kept(tmp_path):
    """Ids with slashes, dots and every script; one caption as .txt too, all in the .json."""
    items = source(
        4,
        image=[encoded(8, 8, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")],
        sample_id=["a/b.c/../x y", "😀.jpg", "https://host/?a=b&c", "\\"],
        caption=[["eins"], ["猫", "кот\nзевает", '"'], ["🦊 fox"], ["last"]],
    )
    pack(items, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert {(member.mode, member.mtime, member.uname) for member in tar} == {(0o644, 0, "")}
        names = "0.jpg 0.json 0.txt 1.json 1.png 2.json 2.txt 2.webp 3.gif 3.json 3.txt"
        assert tar.getnames() == [f"00000000{name}" for name in names.split()]
    for keys in (None, ["caption"]):
        found = index(tmp_path / "out", keys)
        assert facts(samples(found)) == facts(samples(items))


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 30), (21, 16)), ((30, 60), (16, 32)), ((16, 400), (16, 400))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_shrunk_never_enlarged(tmp_path, kind, size, expected):
    """The shorter side is at most that asked for; what is small keeps its bytes."""
    original = encoded(*size, kind)
    pack(source(1, image=[original]), tmp_path, resize=16)
    found = only_image(tmp_path)
    assert (found == original) == (size == expected)
    with Image.open(io.BytesIO(found)) as image, Image.open(io.BytesIO(original)) as whole:
        assert (image.size, image.format) == (expected, kind if size == expected else "JPEG")
        if size != expected:
            small = whole.convert("RGB").resize(expected, Image.Resampling.BICUBIC)
            again = io.BytesIO(save_to_bytes(small, "JPEG", quality=JPEG_QUALITY))
            error = np.asarray(image, dtype=float) - np.asarray(Image.open(again))
            assert np.sqrt((error**2).mean()) < 3


def test_shrunk_images_are_upright_and_of_high_quality(tmp_path):
    """EXIF orientation is applied, as nothing states it afterwards; the tables are those of PIL."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pack(source(1, image=[encoded(60, 40, exif=exif)]), tmp_path, resize=20)
    reference = Image.open(io.BytesIO(encoded(8, 8, quality=JPEG_QUALITY)))
    with Image.open(io.BytesIO(only_image(tmp_path))) as image:
        assert image.size == (20, 30)
        assert image.quantization == reference.quantization
        assert not image.getexif()


def test_images_of_other_kinds_become_jpeg(tmp_path):
    """BMP is not read from shards; what is no image is skipped with a reason."""
    packed = pack(source(2, image=[encoded(20, 10, "BMP"), b"nonsense"]), tmp_path)
    assert packed[1:] == (1, 1)
    with Image.open(io.BytesIO(only_image(tmp_path))) as image:
        assert (image.format, image.size) == ("JPEG", (20, 10))
    assert '"reason": "not an image' in (tmp_path / "skipped.jsonl").read_text()


def test_shards_end_by_bytes_too(tmp_path, monkeypatch):
    """As soon as they hold that much."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 3000)
    names, *_ = pack(source(10, image=[b"\xff\xd8" + bytes(998)] * 10), tmp_path)
    sizes = [len(list(read_shard(str(tmp_path / name), None))) for name in names]
    assert sizes == [3, 3, 3, 1]
