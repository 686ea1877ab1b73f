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

from protoclip.data import pack as packing
from protoclip.data.pack import JPEG_QUALITY, Packed, pack
from protoclip.data.pairs import ImageTextPairs, Pairs, Sample
from protoclip.data.shards import open_shards
from protoclip.data.stream import ShardStream, read_shard
from protoclip.testing import tiny_pairs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK", 4)


def source(count: int = 23, **columns: list) -> ImageTextPairs:
    table = tiny_pairs(count)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return ImageTextPairs(table, name="tiny")


def with_holes() -> ImageTextPairs:
    """Every third caption is empty."""
    captions = ["" if row % 3 == 1 else f"caption {row}" for row in range(23)]
    return source(caption=captions)


def samples(pairs: Pairs) -> list[Sample]:
    return [pairs.sample(row) for row in range(len(pairs))]


def facts(items: list[Sample]) -> list[tuple]:
    return [(s.sample_id, s.image, s.captions) for s in items]


def encoded(width: int, height: int, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    smooth.save(buffer, kind, **options)
    return buffer.getvalue()


def only_image(folder: Path) -> bytes:
    (found,) = read_shard(str(folder / "00000.tar"), None)
    assert isinstance(found, Sample)
    return found.image


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_is_packed_reads_back(tmp_path: Path) -> None:
    """The same ids, captions and bytes, in order from an index, and as a set from a stream."""
    out = tmp_path / "out"
    packed = pack(source(), out, samples_per_shard=10)
    assert packed == Packed(shards=["00000.tar", "00001.tar", "00002.tar"], samples=23, skipped=0)
    expected = facts(samples(source()))
    assert facts(samples(open_shards(str(out), cache=tmp_path / "cache"))) == expected
    stream = ShardStream(str(out), seed=0, shuffle=23).samples()
    assert sorted(facts([next(stream) for _ in range(23)])) == sorted(expected)
    stream.close()


def test_any_id_and_several_captions_are_kept(tmp_path: Path) -> None:
    """Ids with slashes, dots and every script; one caption as .txt, several in the .json."""
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
    found = open_shards(str(tmp_path / "out"), cache=tmp_path / "cache")
    assert facts(samples(found)) == facts(samples(items))


def test_webdataset_reads_what_we_pack_and_we_read_what_it_writes(tmp_path: Path) -> None:
    items = samples(source(12))
    pack(source(12), tmp_path / "out", samples_per_shard=5)
    pattern = str(tmp_path / "out" / "{00000..00002}.tar")
    found = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [
        (json.loads(f["json"])["sample_id"], f["png"], (f["txt"].decode(),)) for f in found
    ] == (facts(items))
    path = str(tmp_path / "7.tar")
    with webdataset.TarWriter(path) as sink:
        for number, item in enumerate(items):
            sink.write({"__key__": f"k{number}", "png": item.image, "txt": item.captions[0]})
    expected = [(f"7/k{n}", s.image, s.captions) for n, s in enumerate(items)]
    assert facts(samples(open_shards(path, cache=tmp_path / "cache"))) == expected
    assert facts(list(read_shard(path, None))) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 30), (21, 16)), ((30, 60), (16, 32)), ((16, 400), (16, 400))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_shrunk_never_enlarged(
    tmp_path: Path, kind: str, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """The shorter side is at most that asked for; what is small keeps its bytes."""
    original = encoded(*size, kind)
    pack(source(1, image=[original]), tmp_path, resize=16)
    found = only_image(tmp_path)
    with Image.open(io.BytesIO(found)) as image:
        assert (image.size, image.format) == (expected, kind if size == expected else "JPEG")
        if size != expected:
            buffer = io.BytesIO()
            with Image.open(io.BytesIO(original)) as whole:
                small = whole.convert("RGB").resize(expected, Image.Resampling.BICUBIC)
            small.save(buffer, "JPEG", quality=JPEG_QUALITY)
            with Image.open(buffer) as reference:
                error = np.asarray(image, dtype=float) - np.asarray(reference)
            assert np.sqrt((error**2).mean()) < 3
    assert (found == original) == (size == expected)


def test_shrunk_images_are_upright_and_of_high_quality(tmp_path: Path) -> None:
    """EXIF orientation is applied, as nothing states it afterwards; the tables are those of PIL."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pack(source(1, image=[encoded(60, 40, exif=exif)]), tmp_path, resize=20)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    with Image.open(io.BytesIO(only_image(tmp_path))) as image, Image.open(buffer) as reference:
        assert image.size == (20, 30)
        assert image.quantization == reference.quantization
        assert not image.getexif()


def test_images_of_other_kinds_become_jpeg(tmp_path: Path) -> None:
    """BMP is not read from shards; what is no image is skipped with a reason."""
    packed = pack(source(2, image=[encoded(20, 10, "BMP"), b"nonsense"]), tmp_path)
    assert (packed.samples, packed.skipped) == (1, 1)
    with Image.open(io.BytesIO(only_image(tmp_path))) as image:
        assert (image.format, image.size) == ("JPEG", (20, 10))
    line = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert line["sample_id"] == "tiny/1"
    assert line["reason"].startswith("not an image")


def test_bad_samples_are_listed(tmp_path: Path) -> None:
    """Each once, with where and why; bad samples alone are an error."""
    packed = pack(source(4, caption=["a", "", "b", None]), tmp_path / "some", samples_per_shard=1)
    assert (packed.samples, packed.skipped) == (2, 2)
    lines = (tmp_path / "some" / "skipped.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"sample_id": f"tiny/{row}", "where": "tiny", "reason": "empty caption"} for row in (1, 3)
    ]
    with pytest.raises(ValueError, match=r"no sample could be packed; .*skipped\.jsonl says why"):
        pack(source(2, caption=["", ""]), tmp_path / "none")


def test_shards_end_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as they hold that much."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 3000)
    packed = pack(source(10, image=[b"\xff\xd8" + bytes(998)] * 10), tmp_path)
    sizes = [len(list(read_shard(str(tmp_path / name), None))) for name in packed.shards]
    assert sizes == [3, 3, 3, 1]


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 3, 4, 12, 22])
def test_a_run_that_was_killed_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """At any row: the folder ends equal to that of a run that was not; complete shards stay."""
    pack(with_holes(), tmp_path / "whole", samples_per_shard=3)
    out, original = tmp_path / "out", ImageTextPairs.sample

    def dying(pairs: ImageTextPairs, row: int) -> Sample:
        if row >= after:
            raise Killed
        return original(pairs, row)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTextPairs, "sample", dying)
        with pytest.raises(Killed):
            pack(with_holes(), out, samples_per_shard=3)
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert bool(kept) == (after > 3)
    (out / ".00001.tar.1.tmp").write_bytes(b"half a shard")
    pack(with_holes(), out, samples_per_shard=3)
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())
    assert content(out) == content(tmp_path / "whole")


def test_a_run_killed_between_any_two_renames_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is there before the manifest lists it is written again."""
    pack(with_holes(), tmp_path / "whole", samples_per_shard=6)
    replace, left = Path.replace, [0]

    def limited(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return replace(path, target)

    for limit in range(9):
        out, left[0] = tmp_path / str(limit), limit
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", limited)
            if limit < 7:
                with pytest.raises(Killed):
                    pack(with_holes(), out, samples_per_shard=6)
        pack(with_holes(), out, samples_per_shard=6)
        assert content(out) == content(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again, nothing of the source is read."""
    first = pack(source(), tmp_path, samples_per_shard=10)
    before = content(tmp_path)
    monkeypatch.setattr(ImageTextPairs, "sample", lambda self, row: pytest.fail("was read"))
    assert pack(source(), tmp_path, samples_per_shard=10) == first
    assert content(tmp_path) == before


def test_a_lost_shard_is_written_again(tmp_path: Path) -> None:
    """And those after it; bad samples are not listed twice."""
    packed = pack(with_holes(), tmp_path, samples_per_shard=5)
    before = content(tmp_path)
    (tmp_path / "00001.tar").unlink()
    assert pack(with_holes(), tmp_path, samples_per_shard=5) == packed
    assert content(tmp_path) == before


def test_a_restart_with_another_source_or_settings_is_refused(tmp_path: Path) -> None:
    """In one line that names both values."""
    pack(source(), tmp_path, samples_per_shard=10)
    other = ImageTextPairs(tiny_pairs(23), name="other")
    for again, options, message in (
        (source(), {"samples_per_shard": 9}, "samples_per_shard = 10, not 9"),
        (source(), {"resize": 8}, "resize = None, not 8"),
        (other, {}, "source = 'tiny', not 'other'"),
        (source(24), {}, "source_samples = 23, not 24"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            pack(again, tmp_path, **{"samples_per_shard": 10, **options})
        assert "\n" not in str(error.value)


def test_foreign_shards_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds tar files of another origin"):
        pack(source(), tmp_path)
    assert content(tmp_path) == {"00000.tar": b"precious"}


def test_shards_are_counted_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that loses a sample is found out."""
    original, calls = webdataset.TarWriter.write, []

    def lossy(writer: webdataset.TarWriter, files: dict) -> int:
        calls.append(files)
        return 100 if len(calls) == 7 else original(writer, files)

    monkeypatch.setattr(webdataset.TarWriter, "write", lossy)
    with pytest.raises(ValueError, match=r"00000\.tar: holds 9 samples where 10 were written"):
        pack(source(), tmp_path, samples_per_shard=10)
