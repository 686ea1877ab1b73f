"""Tar shards: the samples in one, indexed and streamed, and the shards that a pattern names."""

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from tars import facts, index, numbered, write_tar

from protoclip.data import shards
from protoclip.data.pairs import BadSample
from protoclip.data.shards import expand_shards, read_shard

IMAGE = b"image"


def streamed(path: Path, keys: list[str] | None = None) -> list[tuple]:
    return facts(list(read_shard(str(path), keys)))


def indexed(pattern: Path | str, keys: list[str] | None = None) -> list[tuple]:
    """All rows; a bad one as what it raises."""
    pairs, found = index(pattern, keys), []
    for row in range(len(pairs)):
        try:
            found.append(pairs.sample(row))
        except BadSample as bad:
            found.append(bad)
    return facts(found)


def both(path: Path, keys: list[str] | None = None) -> list[tuple]:
    """A shard's samples, after checking that index and stream give the same."""
    found = indexed(path, keys)
    assert streamed(path, keys) == found
    return found


def test_samples_of_a_shard(tmp_path):
    """The key ends at the first dot of the file name; hidden, bare and other files are ignored."""
    kinds = ("jpg", "JPEG", "png", "webp", "gif")
    files = {f"./v1.5/{kind}.{kind}": IMAGE for kind in kinds}
    files |= {f"./v1.5/{kind}.txt": b"c" for kind in kinds}
    files = dict(sorted(files.items()))
    files |= {"0.cls": b"3", "0.seg.png": b"x", "._0.jpg": b"x", "no": b"", "a.b/c": b""}
    expected = [(f"00007/v1.5/{kind}", IMAGE, ("c",)) for kind in sorted(kinds)]
    assert both(write_tar(tmp_path / "00007.tar", files)) == expected


@pytest.mark.parametrize(
    ("keys", "meta", "text", "expected"),
    [
        (None, {"caption": "a"}, b"t", ("t",)),
        (None, {"caption": "a"}, None, ("a",)),
        (None, {"title": "b", "text": "c"}, None, ("b",)),
        (None, {"Captions": ["d", " ", "e "]}, None, ("d", "e")),
        (["alt"], {"caption": "a", "alt": "f"}, b"t", ("f",)),
        (["alt", "caption"], {"caption": "a", "alt": ["f", 1, None]}, b"t", ("f", "a")),
        (None, {"sample_id": "emoji/😀 a.b"}, b"t", ("t",)),
    ],
)
def test_what_a_sample_takes_from_its_json(tmp_path, keys, meta, text, expected):
    """Its id, and captions if there is no .txt or keys are named; a list is several captions."""
    files = {"x.json": json.dumps(meta).encode(), "x.png": IMAGE}
    path = write_tar(tmp_path / "a.tar", files | ({} if text is None else {"x.txt": text}))
    assert both(path, keys) == [(meta.get("sample_id", "a/x"), IMAGE, expected)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_form(tmp_path, form):
    """Long ones, some that are not UTF-8, and some that lead elsewhere, where nothing appears."""
    names = {"a" * 90: "a" * 90, "\udce9": "\\xe9", "../evil": "../evil"}
    names[f"{tmp_path}/evil"] = f"{tmp_path}/evil"
    if form != tarfile.USTAR_FORMAT:
        names["ключ" * 30] = "ключ" * 30
    files = [(f"{n}.{kind}", d) for n in names for kind, d in (("jpg", IMAGE), ("txt", b"c"))]
    path = write_tar(tmp_path / "in" / "s.tar", files, format=form)
    assert [found[0] for found in both(path)] == [f"s/{name}" for name in names.values()]
    assert {file.name for file in tmp_path.iterdir()} == {"in"}


def test_links_folders_and_devices_are_ignored(tmp_path):
    """Nothing that they name is opened, whatever size they claim, and what follows is read."""
    path = write_tar(tmp_path / "a.tar", numbered(1))
    content = path.read_bytes()
    with tarfile.open(path, "w") as tar:
        for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            info = tarfile.TarInfo(f"x{kind.decode()}.jpg")
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0 if kind == b"5" else 7
            tar.addfile(info)
        tar.fileobj.flush()
        headers = path.read_bytes()
    path.write_bytes(headers + content)
    assert [found[0] for found in both(path)] == ["a/001"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"x.jpg": b"1"}, "empty caption"),
        ({"x.jpg": b"1", "x.txt": b" \n"}, "empty caption"),
        ({"x.jpg": b"1", "x.json": b"{nonsense"}, "empty caption"),
        ({"x.jpg": b"1", "x.json": b"[" * 100_000}, "empty caption"),
        ({"x.jpg": b"1", "x.json": b'["caption"]'}, "empty caption"),
        ({"x.txt": b"text"}, "no image"),
        ({"x.jpg": b"1" * 201, "x.txt": b"text"}, "no image"),
        ({"x.jpg": b"1", "x.txt": b"\xff\xfe"}, "the caption is not UTF-8"),
        ({"x.jpg": b"1", "x.json": b'{"caption": "\\ud800"}'}, "the caption is not UTF-8"),
    ],
)
def test_incomplete_samples_are_bad_not_missing(tmp_path, monkeypatch, files, reason):
    """They are named with a reason, images that are too large too; the next sample is read."""
    if "no image" in reason:
        monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 200)
    path = write_tar(tmp_path / "a.tar", files | {"y.jpg": b"1" * 200, "y.txt": b"c"})
    assert both(path) == [("a/x", reason), ("a/y", b"1" * 200, ("c",))]


def test_every_cut_keeps_what_is_whole(tmp_path):
    """A shard cut anywhere gives the samples before the cut; a stream adds a bad one."""
    path = write_tar(tmp_path / "a.tar", numbered(0, 1, 2, 3))
    content, complete, lengths = path.read_bytes(), both(path), set()
    for end in (512 * block + odd for block in range(1, 17) for odd in (0, 100)):
        path.write_bytes(content[:end])
        *good, bad = streamed(path)
        assert bad[1].startswith("unexpected end of data")
        assert bad[1].endswith(f"after {len(good)} samples; the rest of the shard is lost")
        assert good == complete[: len(good)]
        assert not good or indexed(path) == good
        lengths.add(len(good))
    assert lengths == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"\xff" * 8),
        (124, b"10000000000\0"),
        (124, b"\x80" + b"\xff" * 11),
        (124, b"\xff" * 12),
        (124, b"nonsense\0\0\0\0"),
        (124, b"77777777777\0" + b" " * 20 + b"x"),
        (124, b"77777777777\0" + b" " * 20 + b"L"),
    ],
    ids=["checksum", "1 GB", "exabytes", "negative", "no number", "pax name", "GNU name"],
)
def test_a_damaged_header_ends_a_shard(tmp_path, offset, value):
    """What comes before it is kept. Neither memory nor time is spent on sizes without sense."""
    path = write_tar(tmp_path / "a.tar", numbered(0, 1, 2))
    data = bytearray(path.read_bytes())
    start = data.index(b"002.jpg")
    data[start + offset : start + offset + len(value)] = value
    if offset:  # the checksum fits
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    *good, (_, reason) = streamed(path)
    assert [sample[0] for sample in good] == ["a/000", "a/001"]
    assert reason.startswith(("damaged header after 2", "unexpected end of data in 002.jpg after"))
    assert indexed(path) == good


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_streamed_only(tmp_path, kind):
    """The same samples as uncompressed. A cut one keeps its beginning."""
    plain = write_tar(tmp_path / "00.tar", numbered(*range(6)))
    expected, content = both(plain), plain.read_bytes()
    path = write_tar(tmp_path / f"00.tar.{kind}", numbered(*range(6)), mode=f"w:{kind}")
    if kind == "gz":  # in pieces, as programs write it that compress on several cores
        path.write_bytes(gzip.compress(content[:3000]) + gzip.compress(content[3000:]))
    assert streamed(path) == expected
    with pytest.raises(ValueError, match="is compressed; stream it, or unpack it"):
        index(path)
    path.write_bytes(path.read_bytes()[:-100])
    *good, bad = streamed(path)
    assert good == expected[: len(good)]
    assert len(bad) == 2


NAMED = {"jpg": b"1", "json": b'{"sample_id": "i", "text": "c"}'}


@pytest.mark.parametrize(
    "files",
    [
        [("x.jpg", b"1"), ("x.txt", b"c"), ("x.jpg", b"2"), ("x.txt", b"d")],
        [("x.jpg", b"1"), ("y.jpg", b"1"), ("x.txt", b"c"), ("y.txt", b"c")],
        [(f"{key}.{kind}", data) for key in "xy" for kind, data in NAMED.items()],
    ],
)
def test_repeated_ids_in_a_shard(tmp_path, files):
    """An index refuses them with their number; a stream takes the first."""
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=r"a\.tar: [12] sample ids come more than once, such as"):
        index(path)
    assert any("the same sample id" in str(found[1]) for found in streamed(path))


def test_ids_over_several_shards(tmp_path):
    """Equal keys do not clash, and ids do not depend on what else is opened; equal ids do clash."""
    one, two = (write_tar(tmp_path / f"{name}.tar", numbered(0, 1)) for name in "ab")
    assert indexed(tmp_path) == both(one) + both(two)
    for name in "ab":
        write_tar(tmp_path / "named" / f"{name}.tar", {f"0.{k}": data for k, data in NAMED.items()})
    with pytest.raises(ValueError, match="1 sample ids come more than once, such as 'i'"):
        index(tmp_path / "named")
    again = write_tar(tmp_path / "other" / "a.tar", numbered(0))
    with pytest.raises(ValueError, match=r"has the file name of .*a\.tar"):
        expand_shards(f"{{{one},{again}}}")


def test_only_new_and_changed_shards_are_indexed(tmp_path, monkeypatch):
    read: list[str] = []
    original = shards.read_samples

    def counted(file, stem: str, *rest, **options):
        read.append(stem)
        return original(file, stem, *rest, **options)

    monkeypatch.setattr(shards, "read_samples", counted)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", numbered(number))
    assert len(indexed(tmp_path)) == len(indexed(tmp_path)) == 3
    assert read == ["0", "1", "2"]
    write_tar(tmp_path / "3.tar", numbered(3))
    write_tar(tmp_path / "1.tar", numbered(50))
    assert indexed(tmp_path)[1][2] == ("caption 50",)
    assert read[3:] == ["1", "3"]


def test_patterns(tmp_path, monkeypatch):
    """Braces, globs and folders: sorted, each shard once."""
    for name in ("00", "01", "02", "10"):
        write_tar(tmp_path / f"{name}.tar", {})
    (tmp_path / "00.json").write_text("{}")
    names = [str(tmp_path / f"{name}.tar") for name in ("00", "01", "02", "10")]
    assert expand_shards(str(tmp_path)) == names
    assert expand_shards(str(tmp_path / "*.tar")) == names
    assert expand_shards(str(tmp_path / "{00..02}.tar")) == names[:3]
    assert expand_shards(str(tmp_path / "{10,0?,00}.tar")) == names
    monkeypatch.chdir(tmp_path)
    assert expand_shards("{01..02}.tar") == ["01.tar", "02.tar"]
    write_tar(tmp_path / "odd{1..2}.tar", {})
    assert expand_shards("odd{1..2}.tar") == ["odd{1..2}.tar"]


def test_a_linked_shard_is_named_as_its_link(tmp_path):
    """As a hub's cache links to files that are named by a hash."""
    write_tar(tmp_path / "blobs" / "4e07.tar", numbered(0))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}-00000.tar").symlink_to(tmp_path / "blobs" / "4e07.tar")
        ((sample_id, *sample),) = both(tmp_path / folder / f"{folder}-00000.tar")
        assert sample_id == f"{folder}-00000/000"
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a-00000.tar").symlink_to(tmp_path / "blobs" / "4e07.tar")
    assert both(tmp_path / "c" / "a-00000.tar") == [("a-00000/000", *sample)]
