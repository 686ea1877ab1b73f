"""Tar shards: the samples in one, indexed and streamed, and the shards that a pattern names."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest

from protoclip.data import shards
from protoclip.data.access import Access
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample
from protoclip.data.shards import expand_shards, open_shards, shard_stem, split_name
from protoclip.data.stream import read_shard
from protoclip.testing import tiny_pairs

IMAGES = tiny_pairs(8).column("image").to_pylist()
Files = dict[str, bytes] | list[tuple[str, bytes]]


def write(path: Path, files: Files, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, **{"mode": "w", **options}) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def plain(count: int = 4, first: int = 0) -> dict[str, bytes]:
    """Samples as img2dataset writes them, with keys that count from `first`."""
    files: dict[str, bytes] = {}
    for number in range(first, first + count):
        files[f"{number:04d}.jpg"] = IMAGES[number % 8] + b"%d" % number
        files[f"{number:04d}.json"] = json.dumps({"caption": "?", "key": str(number)}).encode()
        files[f"{number:04d}.txt"] = f"caption {number}".encode()
    return files


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def facts(items: list[Sample | BadSample]) -> list[tuple]:
    return [
        (s.sample_id, s.image, s.captions) if isinstance(s, Sample) else (s.sample_id, s.reason)
        for s in items
    ]


def streamed(path: Path, keys: list[str] | None = None) -> list[tuple]:
    return facts(list(read_shard(str(path), keys)))


def indexed(pattern: Path | str, cache: Path, keys: list[str] | None = None) -> list[tuple]:
    """All rows; a bad one as what it raises."""
    pairs, found = open_shards(str(pattern), cache=cache, caption_keys=keys), []
    for row in range(len(pairs)):
        try:
            found.append(pairs.sample(row))
        except BadSample as bad:
            found.append(bad)
    return facts(found)


def both(path: Path, cache: Path, keys: list[str] | None = None) -> list[tuple]:
    """A shard's samples, after checking that index and stream give the same."""
    found = indexed(path, cache, keys)
    assert streamed(path, keys) == found
    return found


def test_samples_of_a_shard(tmp_path: Path, cache: Path) -> None:
    """Ids are shard and key, the caption is the .txt, other files are ignored."""
    files = plain(2) | {"0001.cls": b"3", "0001.npy": b"\0" * 700, ".0002.jpg": b"x", "no": b""}
    assert both(write(tmp_path / "00007.tar", files), cache) == [
        ("00007/0000", IMAGES[0] + b"0", ("caption 0",)),
        ("00007/0001", IMAGES[1] + b"1", ("caption 1",)),
    ]


@pytest.mark.parametrize("kind", ["jpg", "JPEG", "png", "webp", "gif"])
def test_images_by_extension(tmp_path: Path, cache: Path, kind: str) -> None:
    path = write(tmp_path / "a.tar", {f"x.{kind}": IMAGES[0], "x.txt": b"one"})
    assert both(path, cache) == [("a/x", IMAGES[0], ("one",))]


@pytest.mark.parametrize(
    ("keys", "meta", "text", "expected"),
    [
        (None, {"caption": "a"}, b"t", ("t",)),
        (None, {"caption": "a"}, None, ("a",)),
        (None, {"title": "b", "text": "c"}, None, ("b",)),
        (None, {"captions": ["d", " ", "e "]}, None, ("d", "e")),
        (["alt"], {"caption": "a", "alt": "f"}, b"t", ("f",)),
        (["alt", "caption"], {"caption": "a", "alt": ["f", 1, None]}, b"t", ("f", "a")),
    ],
)
def test_where_captions_come_from(
    tmp_path: Path, cache: Path, keys, meta, text: bytes | None, expected
) -> None:
    """The .txt before the .json unless keys are named; a list is several captions."""
    files = {"x.json": json.dumps(meta).encode(), "x.png": IMAGES[0]}
    path = write(tmp_path / "a.tar", files | ({} if text is None else {"x.txt": text}))
    assert both(path, cache, keys) == [("a/x", IMAGES[0], expected)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000.jpg", ("000", "jpg")),
        ("./a/000.JPG", ("a/000", "jpg")),
        ("v1.5/000.seg.png", ("v1.5/000", "seg.png")),
        ("._000.jpg", ("", "")),
        ("000", ("", "")),
        ("a.b/c", ("", "")),
    ],
)
def test_keys_are_those_of_webdataset(name: str, expected: tuple[str, str]) -> None:
    """The key ends at the first dot of the file name; hidden and bare names are ignored."""
    assert split_name(name) == expected


@pytest.mark.parametrize(
    ("shard", "stem"),
    [
        ("/data/00012.tar", "00012"),
        ("s3://bucket/x.tar.d/train.v2.tar.gz", "train.v2"),
        ("pipe:curl -s 'https://h/a.tar?x=1' | cat", "a"),
        ("https://host/00001.tgz?token=abc", "00001"),
    ],
)
def test_ids_start_with_the_stem_of_the_shard(shard: str, stem: str) -> None:
    """Copying or unpacking a shard keeps its ids."""
    assert shard_stem(shard) == stem


def test_a_sample_id_in_the_json_is_kept(tmp_path: Path, cache: Path) -> None:
    meta = json.dumps({"sample_id": "emoji/😀 a.b", "caption": "x"}).encode()
    path = write(tmp_path / "a.tar", {"0.webp": IMAGES[0], "0.json": meta})
    assert both(path, cache) == [("emoji/😀 a.b", IMAGES[0], ("x",))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_form(tmp_path: Path, cache: Path, form: int) -> None:
    """Names of 90 and of 240 letters, and names that are not UTF-8."""
    long = "folder" * 15 + "/" + "k" * (90 if form == tarfile.USTAR_FORMAT else 150)
    names = ["a" * 90, long] + ([] if form == tarfile.USTAR_FORMAT else ["ключ" * 30])
    files = {f"{n}.{kind}": d for n in names for kind, d in (("jpg", IMAGES[0]), ("txt", b"c"))}
    path = write(tmp_path / "s.tar", files, format=form)
    assert [found[0] for found in both(path, cache)] == [f"s/{name}" for name in names]
    latin = {"\udce9.jpg": IMAGES[0], "\udce9.txt": b"c"}
    path = write(tmp_path / "t.tar", latin, format=form)
    assert [found[0] for found in both(path, cache)] == ["t/\\xe9"]


def test_links_folders_and_devices_are_ignored(tmp_path: Path, cache: Path) -> None:
    """Nothing that they name is opened, whatever size they claim, and what follows is read."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            info = tarfile.TarInfo(f"x{kind.decode()}.jpg")
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0 if kind == b"5" else 7
            tar.addfile(info)
        for name, data in (("y.jpg", IMAGES[0]), ("y.txt", b"c")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [found[0] for found in both(path, cache)] == ["a/y"]


def test_names_that_lead_elsewhere_are_only_names(tmp_path: Path, cache: Path) -> None:
    """Absolute and `..` members are read like others, and no file appears anywhere."""
    names = [str(tmp_path / "evil"), "../evil", "../../evil"]
    files = [(f"{n}.{k}", d) for n in names for k, d in (("jpg", IMAGES[0]), ("txt", b"c"))]
    path = write(tmp_path / "inside" / "a.tar", files)
    before = set(tmp_path.parent.rglob("*"))
    assert [found[0] for found in both(path, cache)] == [f"a/{name}" for name in names]
    new = set(tmp_path.parent.rglob("*")) - before
    assert {p for p in new if cache not in p.parents and p != cache} == set()


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
def test_incomplete_samples_are_bad_not_missing(
    tmp_path: Path, cache: Path, monkeypatch, files: dict[str, bytes], reason: str
) -> None:
    """They are named with a reason, images that are too large too; the next sample is read."""
    if "no image" in reason:
        monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 200)
    path = write(tmp_path / "a.tar", files | {"y.jpg": b"1" * 200, "y.txt": b"c"})
    assert both(path, cache) == [("a/x", reason), ("a/y", b"1" * 200, ("c",))]


def test_an_index_notes_what_is_missing(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "0.tar", plain(2) | {"x.jpg": b"1", "z.txt": b"c"})
    cut = write(tmp_path / "1.tar", plain(3) | {"y.jpg": b"1"})
    cut.write_bytes(cut.read_bytes()[: cut.read_bytes().index(b"0001.json") + 520])
    assert open_shards(str(tmp_path), cache=cache).notes == [
        "1 samples without an image",
        "1 samples without a caption",
        f"1 of 2 shards break off, such as {cut}: unexpected end of data in 0001.json after 1 "
        "samples; the rest of the shard is lost",
    ]


def test_every_cut_keeps_what_is_whole(tmp_path: Path, cache: Path) -> None:
    """A shard cut anywhere gives the samples before the cut; a stream adds a bad one."""
    path = write(tmp_path / "a.tar", plain(4))
    content, complete, lengths = path.read_bytes(), both(path, cache), set()
    for end in (512 * block + odd for block in range(1, 25) for odd in (0, 100)):
        path.write_bytes(content[:end])
        *good, bad = streamed(path)
        assert len(bad) == 2
        assert f"unexpected end of data{bad[1][22:]}" == bad[1]
        assert bad[1].endswith(f"after {len(good)} samples; the rest of the shard is lost")
        assert good == complete[: len(good)]
        assert not good or indexed(path, cache) == good
        lengths.add(len(good))
    assert lengths == {0, 1, 2, 3, 4}


def damaged(tmp_path: Path, offset: int, value: bytes) -> Path:
    """A shard in which the header of the third sample is changed, and its checksum adapted."""
    path = write(tmp_path / "a.tar", plain(3))
    data = bytearray(path.read_bytes())
    start = data.index(b"0002.jpg")
    data[start + offset : start + offset + len(value)] = value
    if offset:
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    return path


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
def test_a_damaged_header_ends_a_shard(
    tmp_path: Path, cache: Path, offset: int, value: bytes
) -> None:
    """What comes before it is kept. Neither memory nor time is spent on sizes without sense."""
    path = damaged(tmp_path, offset, value)
    *good, (_, reason) = streamed(path)
    assert [sample[0] for sample in good] == ["a/0000", "a/0001"]
    assert reason.startswith(("damaged header after 2", "unexpected end of data in 0002.jpg after"))
    assert indexed(path, cache) == good


@pytest.mark.parametrize("content", [b"", b"garbage", b"<html>" * 1000])
def test_garbage_is_named(tmp_path: Path, cache: Path, content: bytes) -> None:
    """One line with the file when it is opened; one bad sample in a stream."""
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S+/a\.tar: not a tar file$"):
        open_shards(str(path), cache=cache)
    assert streamed(path) == [("a", "not a tar file")]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_streamed_only(tmp_path: Path, cache: Path, kind: str) -> None:
    """The same samples as uncompressed. A cut one keeps its beginning."""
    expected = both(write(tmp_path / "00.tar", plain(6)), cache)
    path = write(tmp_path / f"00.tar.{kind}", plain(6), mode=f"w:{kind}")
    assert streamed(path) == expected
    with pytest.raises(ValueError, match="is compressed; stream it, or unpack it"):
        open_shards(str(path), cache=cache)
    path.write_bytes(path.read_bytes()[:-100])
    *good, bad = streamed(path)
    assert good == expected[: len(good)]
    assert len(bad) == 2


def test_compression_in_pieces(tmp_path: Path, cache: Path) -> None:
    """As programs write it that compress on several cores."""
    path = write(tmp_path / "0.tar", plain(3))
    expected, content = both(path, cache), path.read_bytes()
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(content[:3000]) + gzip.compress(content[3000:]))
    assert streamed(path) == expected


NAMED = {"jpg": b"1", "json": b'{"sample_id": "i", "text": "c"}'}


@pytest.mark.parametrize(
    "files",
    [
        [("x.jpg", b"1"), ("x.txt", b"c"), ("x.jpg", b"2"), ("x.txt", b"d")],
        [("x.jpg", b"1"), ("y.jpg", b"1"), ("x.txt", b"c"), ("y.txt", b"c")],
        [(f"{key}.{kind}", data) for key in "xy" for kind, data in NAMED.items()],
    ],
)
def test_repeated_ids_in_a_shard(tmp_path: Path, cache: Path, files: Files) -> None:
    """An index refuses them with their number; a stream takes the first."""
    path = write(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=r"a\.tar: [12] sample ids come more than once, such as"):
        open_shards(str(path), cache=cache)
    assert any("the same sample id" in str(found[1]) for found in streamed(path))


def test_ids_over_several_shards(tmp_path: Path, cache: Path) -> None:
    """Equal keys do not clash, and ids do not depend on what else is opened; equal ids do clash."""
    one, two = (write(tmp_path / f"{name}.tar", plain(2)) for name in "ab")
    whole = indexed(tmp_path, cache)
    assert whole == both(one, cache) + both(two, cache)
    assert len({found[0] for found in whole}) == 4
    for name in "ab":
        write(tmp_path / "named" / f"{name}.tar", {f"0.{k}": data for k, data in NAMED.items()})
    with pytest.raises(ValueError, match="1 sample ids come more than once, such as 'i'"):
        open_shards(str(tmp_path / "named"), cache=cache)


def test_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    """Their samples could share ids."""
    for folder in "ab":
        write(tmp_path / folder / "00.tar", plain(1))
    with pytest.raises(ValueError, match=r"has the file name of .*a/00\.tar"):
        expand_shards(str(tmp_path / "{a,b}" / "00.tar"))


def test_only_new_and_changed_shards_are_indexed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = shards.read_samples

    def counted(file, stem: str, *rest, **options):
        read.append(stem)
        return original(file, stem, *rest, **options)

    monkeypatch.setattr(shards, "read_samples", counted)
    for number in range(3):
        write(tmp_path / f"{number}.tar", plain(3, first=3 * number))
    pattern = str(tmp_path / "*.tar")
    assert len(open_shards(pattern, cache=cache)) == 9
    assert sorted(read) == ["0", "1", "2"]
    open_shards(pattern, cache=cache)
    write(tmp_path / "3.tar", plain(2, first=9))
    assert len(open_shards(pattern, cache=cache)) == 11
    assert read[3:] == ["3"]
    write(tmp_path / "1.tar", plain(1, first=50))
    assert indexed(pattern, cache)[3][2] == ("caption 50",)
    assert read[4:] == ["1"]


def test_many_shards_are_indexed_in_parallel(tmp_path: Path, cache: Path) -> None:
    """Rows come in the order of the shards. The pairs go to a worker as a path, with few files."""
    for number in range(30):
        write(tmp_path / f"{number:02d}.tar", plain(1, first=number))
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir())) if files.exists() else 0
    pairs = open_shards(str(tmp_path / "{00..29}.tar"), cache=cache)
    assert isinstance(pairs, ImageTextPairs)
    assert [pairs.sample(row).captions for row in range(30)] == [
        (f"caption {n}",) for n in range(30)
    ]
    assert not files.exists() or len(list(files.iterdir())) <= before + 2
    assert len(pickle.dumps(pairs)) < 1000
    copy = pickle.loads(pickle.dumps(pairs))
    assert [copy.sample(row) for row in range(30)] == [pairs.sample(row) for row in range(30)]
    assert list(copy.sample_ids()) == [f"{n:02d}/{n:04d}" for n in range(30)]


def test_shards_without_a_sample(tmp_path: Path, cache: Path) -> None:
    """An empty shard beside others is fine; nothing at all is not."""
    empty = write(tmp_path / "0.tar", {"readme.md": b"nothing"})
    with pytest.raises(ValueError, match="holds no sample"):
        open_shards(str(empty), cache=cache)
    write(tmp_path / "1.tar", plain(1))
    assert len(open_shards(str(tmp_path), cache=cache)) == 1


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Braces, globs and folders: sorted, each shard once."""
    for name in ("00", "01", "02", "10"):
        write(tmp_path / f"{name}.tar", {})
    (tmp_path / "00.json").write_text("{}")
    names = [str(tmp_path / f"{name}.tar") for name in ("00", "01", "02", "10")]
    assert expand_shards(str(tmp_path)) == names
    assert expand_shards(str(tmp_path / "*.tar")) == names
    assert expand_shards(str(tmp_path / "{00..02}.tar")) == names[:3]
    assert expand_shards(str(tmp_path / "{10,0?,00}.tar")) == names
    monkeypatch.chdir(tmp_path)
    assert expand_shards("{01..02}.tar") == ["01.tar", "02.tar"]
    write(tmp_path / "odd{1..2}.tar", {})
    assert expand_shards("odd{1..2}.tar") == ["odd{1..2}.tar"]


def test_remote_patterns(bucket: str) -> None:
    """Braces always; globs and folders where the store lists its files; commands as they are."""
    for name in ("a/0.tar", "a/1.tar", "a/x.txt"):
        with fsspec.open(f"{bucket}/{name}", "wb") as file:
            file.write(b"")
    two = [f"{bucket}/a/0.tar", f"{bucket}/a/1.tar"]
    for pattern in (f"{bucket}/a/*.tar", f"{bucket}/a/"):
        assert [n.replace(":///", "://") for n in expand_shards(pattern)] == two
    assert expand_shards("s3://bucket/{000..331}.tar")[331] == "s3://bucket/331.tar"
    for start, end in (("pipe:curl -s https://host/", ".tar"), ("https://host/", ".tar?token=ab")):
        found = expand_shards(f"{start}{{0..1}}{end}", Access(commands=True))
        assert found == [f"{start}0{end}", f"{start}1{end}"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/none.tar", "none.tar: no such file"),
        ("{folder}/{{0..2}}.tar", "0.tar: no such file"),
        ("{folder}/*.tar", r"\*.tar: no tar shard matches"),
        ("{folder}", "no tar shard matches"),
        ("{folder}/{{0..2.tar", "the braces do not pair up|no such file"),
        ("s3://nothing/here/*.tar", "no tar shard matches"),
        ("gs://bucket/*.tar", r"gs://bucket/\*.tar: cannot be listed \(.*gcsfs"),
        ("https://host/*.tar", "a web server does not say what it holds; name the files with bra"),
        ("memory://bucket/*.tar", "'memory://' is not read; use a local file or one of https"),
        ("pipe:cat {folder}/none.tar", "--data.allow_commands true"),
    ],
)
def test_patterns_without_a_match_are_errors(
    tmp_path: Path, bucket: str, pattern: str, message: str
) -> None:
    """In one line that names the pattern."""
    with pytest.raises(ValueError, match=message) as error:
        expand_shards(pattern.format(folder=tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["https://host/{0..1}.tar", "pipe:cat x.tar"])
def test_remote_shards_are_not_indexed(cache: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match="only local shards can be indexed; stream it"):
        open_shards(pattern, cache=cache)
