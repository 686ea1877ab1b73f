"""Packing any source into tar shards, and reading them back."""

import io
import json
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from protoclip.data import pack as packing
from protoclip.data.pack import JPEG_QUALITY, Packed, pack
from protoclip.data.pairs import (
    BadSample,
    ImageTextPairs,
    Pairs,
    Sample,
)
from protoclip.data.shards import open_shards
from protoclip.data.stream import ShardStream, read_shard
from protoclip.testing import tiny_pairs


def source(count: int = 23) -> ImageTextPairs:
    return ImageTextPairs(tiny_pairs(count), name="tiny")


def samples(pairs: Pairs) -> list[Sample]:
    return [pairs.sample(row) for row in range(len(pairs))]


def facts(items: list[Sample]) -> list[tuple]:
    return [(s.sample_id, s.image, s.captions) for s in items]


def picture(width: int, height: int, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    smooth.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(image: bytes, sample_id: str = "a", captions: tuple[str, ...] = ("c",)) -> Sample:
    return Sample(sample_id=sample_id, image=image, captions=captions, where="here")


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
    streamed = [next(stream) for _ in range(23)]
    stream.close()
    assert sorted(facts(streamed)) == sorted(expected)


def test_any_id_and_several_captions_are_kept(tmp_path: Path) -> None:
    """Ids with slashes, dots and every script; captions as .txt or, where several, as .json."""
    items = [
        sample(picture(8, 8), "a/b.c/../x y", ("eins",)),
        sample(picture(8, 8, "PNG"), "😀.jpg", ("猫", "кот\nзевает", '"')),
        sample(picture(8, 8, "WEBP"), "https://host/?a=b&c", ("🦊 fox",)),
        sample(picture(8, 8, "GIF"), "\\", ("last",)),
    ]
    pack(items, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
    assert names[:5] == [f"00000000{n}" for n in ("0.jpg", "0.txt", "0.json", "1.png", "1.json")]
    assert {Path(name).suffix for name in names} == {
        ".jpg",
        ".png",
        ".webp",
        ".gif",
        ".txt",
        ".json",
    }
    pairs = open_shards(str(tmp_path / "out"), cache=tmp_path / "cache")
    assert facts(samples(pairs)) == facts(items)


def test_webdataset_reads_what_we_pack(tmp_path: Path) -> None:
    """Keys, pictures and captions, by the format's own library."""
    webdataset = pytest.importorskip("webdataset")
    pack(source(12), tmp_path / "out", samples_per_shard=5)
    pattern = str(tmp_path / "out" / "{00000..00002}.tar")
    found = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [(f["png"], f["txt"].decode()) for f in found] == [
        (s.image, s.captions[0]) for s in samples(source(12))
    ]
    assert [json.loads(f["json"])["sample_id"] for f in found] == list(source(12).sample_ids())
    assert [f["__key__"] for f in found] == [f"{n:09d}" for n in range(12)]


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    """Its own writer's shards, indexed and streamed."""
    webdataset = pytest.importorskip("webdataset")
    path = str(tmp_path / "7.tar")
    with webdataset.TarWriter(path) as sink:
        for number, item in enumerate(samples(source(6))):
            sink.write({"__key__": f"k{number}", "png": item.image, "txt": item.captions[0]})
    expected = [(f"7/k{n}", s.image, s.captions) for n, s in enumerate(samples(source(6)))]
    assert facts(samples(open_shards(path, cache=tmp_path / "cache"))) == expected
    assert facts(list(read_shard(path, None))) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 30), (21, 16)), ((30, 60), (16, 32)), ((16, 400), (16, 400))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_shrunk_never_enlarged(
    tmp_path: Path, kind: str, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """The shorter side is at most that asked for; what is small keeps its bytes."""
    encoded = picture(*size, kind)
    pack([sample(encoded)], tmp_path / "out", resize=16)
    (found,) = read_shard(str(tmp_path / "out" / "00000.tar"), None)
    with Image.open(io.BytesIO(found.image)) as image:
        assert image.size == expected
        assert image.format == (kind if size == expected else "JPEG")
        if size != expected:
            buffer = io.BytesIO()
            with Image.open(io.BytesIO(encoded)) as whole:
                small = whole.convert("RGB").resize(expected, Image.Resampling.BICUBIC)
            small.save(buffer, "JPEG", quality=JPEG_QUALITY)
            with Image.open(buffer) as reference:
                error = np.asarray(image, dtype=float) - np.asarray(reference)
            assert np.sqrt((error**2).mean()) < 3
    assert (found.image == encoded) == (size == expected)


def test_shrunk_pictures_are_upright_and_of_high_quality(tmp_path: Path) -> None:
    """EXIF orientation is obeyed, as nothing says it afterwards; the tables are those of PIL."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pack([sample(picture(60, 40, exif=exif))], tmp_path / "out", resize=20)
    (found,) = read_shard(str(tmp_path / "out" / "00000.tar"), None)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    with Image.open(io.BytesIO(found.image)) as image, Image.open(buffer) as reference:
        assert image.size == (20, 30)
        assert image.quantization == reference.quantization
        assert not image.getexif()


def test_pictures_of_other_kinds_become_jpeg(tmp_path: Path) -> None:
    """BMP is not read from shards; what is no picture is skipped with a reason."""
    items = [sample(picture(20, 10, "BMP"), "bmp"), sample(b"nonsense", "none")]
    packed = pack(items, tmp_path / "out")
    assert (packed.samples, packed.skipped) == (1, 1)
    (found,) = read_shard(str(tmp_path / "out" / "00000.tar"), None)
    with Image.open(io.BytesIO(found.image)) as image:
        assert (image.format, image.size) == ("JPEG", (20, 10))
    line = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert line["sample_id"] == "none"
    assert line["reason"].startswith("not an image")


def test_bad_samples_are_listed(tmp_path: Path) -> None:
    """Of pairs and of a stream: each once, with where and why."""
    table = tiny_pairs(6).set_column(1, "caption", pa.array(["a", "", "b", None, "c", "d"]))
    packed = pack(ImageTextPairs(table, name="holes"), tmp_path / "pairs", samples_per_shard=2)
    assert (packed.samples, packed.skipped) == (4, 2)
    lines = (tmp_path / "pairs" / "skipped.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"sample_id": f"tiny/{row}", "where": "holes", "reason": "empty caption"} for row in (1, 3)
    ]
    mixed = [
        *samples(source(2)),
        BadSample("x", "y.tar", "cut short"),
        sample(b"", "e", ("\ud800",)),
    ]
    packed = pack(mixed, tmp_path / "stream")
    assert (packed.samples, packed.skipped) == (2, 2)


def test_a_source_of_bad_samples_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sample could be packed; .*skipped\.jsonl says why"):
        pack([BadSample("x", "y.tar", "cut short")], tmp_path / "out")


def test_shards_end_by_bytes_too(tmp_path: Path) -> None:
    """As soon as they hold as much as asked for."""
    packed = pack(
        [sample(b"\xff\xd8" + bytes(998), str(n)) for n in range(10)],
        tmp_path / "out",
        shard_bytes=3000,
    )
    assert len(packed.shards) == 4
    sizes = [len(list(read_shard(str(tmp_path / "out" / name), None))) for name in packed.shards]
    assert sizes == [3, 3, 3, 1]


class Killed(Exception):
    pass


def dying(items: list[Sample | BadSample], after: int) -> Iterator[Sample | BadSample]:
    yield from items[:after]
    raise Killed


@pytest.mark.parametrize("after", [0, 1, 9, 10, 11, 25, 29])
def test_a_run_that_was_killed_goes_on(tmp_path: Path, after: int) -> None:
    """At any sample: the folder ends equal to that of a run that was not, and whole shards stay."""
    bad = [BadSample(f"bad{n}", "w", "r") for n in range(7)]
    items = list(chain.from_iterable(zip(samples(source(23))[::4], bad, strict=False)))
    items += [*samples(source(23))[1::2], bad[6]]
    pack(items, tmp_path / "whole", samples_per_shard=5)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        pack(dying(items, min(after, len(items))), out, samples_per_shard=5, threads=1)
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    (out / "00099.tar.tmp").write_bytes(b"half a shard")
    pack(items, out, samples_per_shard=5)
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())
    (out / "00099.tar.tmp").unlink()
    assert content(out) == content(tmp_path / "whole")


def test_a_run_killed_between_any_two_renames_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard whose name is there before the manifest knows it is written again."""
    pack(source(), tmp_path / "whole", samples_per_shard=10)
    replace = Path.replace
    for limit in range(9):
        out, left = tmp_path / str(limit), [limit]

        def limited(path: Path, target: Path, left: list[int] = left) -> Path:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", limited)
        try:
            pack(source(), out, samples_per_shard=10)
        except Killed:
            monkeypatch.setattr(Path, "replace", replace)
            pack(source(), out, samples_per_shard=10)
        monkeypatch.setattr(Path, "replace", replace)
        found = {k: v for k, v in content(out).items() if not k.endswith(".tmp")}
        assert found == content(tmp_path / "whole")
    assert left[0] > 0  # the last of them was not interrupted


def test_a_finished_folder_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    """Asked again, nothing of the source is read."""
    out = tmp_path / "out"
    first = pack(source(), out, samples_per_shard=10)
    before = content(out)
    monkeypatch.setattr(ImageTextPairs, "sample", lambda self, row: pytest.fail("was read"))
    assert pack(source(), out, samples_per_shard=10) == first
    assert content(out) == before


def test_a_lost_shard_is_written_again(tmp_path: Path) -> None:
    """And those after it; bad samples are not listed twice."""
    items = [*samples(source(12)), BadSample("x", "w", "r"), *samples(source(23))[12:]]
    pack(items, tmp_path / "whole", samples_per_shard=5)
    pack(items, tmp_path / "out", samples_per_shard=5)
    (tmp_path / "out" / "00001.tar").unlink()
    assert pack(items, tmp_path / "out", samples_per_shard=5).skipped == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 9}, "samples_per_shard = 10, not 9"),
        ({"resize": 8}, "resize = None, not 8"),
        ({"shard_bytes": 5}, "shard_bytes = 1073741824, not 5"),
    ],
)
def test_a_restart_with_other_settings_is_refused(tmp_path: Path, options, message: str) -> None:
    """In one line that names both values."""
    pack(source(), tmp_path, samples_per_shard=10)
    with pytest.raises(ValueError, match=message) as error:
        pack(source(), tmp_path, **{"samples_per_shard": 10, **options})
    assert "\n" not in str(error.value)


def test_a_restart_with_another_source_is_refused(tmp_path: Path) -> None:
    """By its name, or by its length."""
    pack(source(), tmp_path)
    with pytest.raises(ValueError, match="source = 'tiny', not 'other'"):
        pack(ImageTextPairs(tiny_pairs(23), name="other"), tmp_path)
    with pytest.raises(ValueError, match="source_samples = 23, not 24"):
        pack(source(24), tmp_path)


def test_foreign_shards_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds tar files of another origin"):
        pack(source(), tmp_path)
    assert content(tmp_path) == {"00000.tar": b"precious"}


def test_shards_are_counted_at_the_end(tmp_path: Path, monkeypatch) -> None:
    """A writer that loses a sample is found out."""
    original, calls = pack._add, []

    def lossy(tar, key, members):
        calls.append(key)
        return 100 if len(calls) == 7 else original(tar, key, members)

    monkeypatch.setattr(packing, "_add", lossy)
    with pytest.raises(ValueError, match=r"00000\.tar: holds 9 samples where 10 were written"):
        pack(source(), tmp_path, samples_per_shard=10)


def test_settings_without_sense_are_refused(tmp_path: Path) -> None:
    for options in ({"samples_per_shard": 0}, {"resize": 0}, {"shard_bytes": 0}):
        with pytest.raises(ValueError, match="are at least 1"):
            pack(source(), tmp_path, **options)
