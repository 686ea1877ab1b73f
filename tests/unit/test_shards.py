"""Tar shards by name, their members, and the pairs of an index over them."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest

from protoclip.data import shards, tars
from protoclip.data.access import Access
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample
from protoclip.data.shards import expand_shards, open_shards
from protoclip.data.stream import read_shard
from protoclip.data.tars import shard_stem, split_name
from protoclip.testing import tiny_pairs

NAMED = {"jpg": b"1", "json": b'{"sample_id": "i", "text": "c"}'}
IMAGES = tiny_pairs(8).column("image").to_pylist()


def write(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    """A tar by Python's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, **{"mode": "w", **options}) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def plain(count: int = 4, first: int = 0) -> dict[str, bytes]:
    """Samples as img2dataset writes them, with keys that count from `first`."""
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members[f"{number:04d}.jpg"] = IMAGES[number % 8] + b"%d" % number
        members[f"{number:04d}.json"] = json.dumps({"caption": "?", "key": str(number)}).encode()
        members[f"{number:04d}.txt"] = f"caption {number}".encode()
    return members


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def every(pairs: ImageTextPairs) -> list[Sample | BadSample]:
    """All rows, with what a bad one raises in its place."""
    found: list[Sample | BadSample] = []
    for row in range(len(pairs)):
        try:
            found.append(pairs.sample(row))
        except BadSample as bad:
            found.append(bad)
    return found


def facts(items: list[Sample | BadSample]) -> list[tuple]:
    """What indexed and streaming must agree on."""
    return [
        (s.sample_id, s.image, s.captions) if isinstance(s, Sample) else (s.sample_id, s.reason)
        for s in items
    ]


def both(path: Path, cache: Path, caption_key=None) -> list[tuple]:
    """A shard's samples, after checking that index and stream give the same."""
    indexed = facts(every(open_shards(str(path), cache=cache, caption_key=caption_key)))
    assert facts(list(read_shard(str(path), shards.key_list(caption_key)))) == indexed
    return indexed


def test_samples_of_a_shard(tmp_path: Path, cache: Path) -> None:
    """Ids are shard and key, the caption is the .txt, other members are passed over."""
    members = plain(2) | {"0001.cls": b"3", "0001.npy": b"\0" * 700, ".0002.jpg": b"x", "no": b""}
    path = write(tmp_path / "00007.tar", members)
    assert both(path, cache) == [
        ("00007/0000", IMAGES[0] + b"0", ("caption 0",)),
        ("00007/0001", IMAGES[1] + b"1", ("caption 1",)),
    ]


@pytest.mark.parametrize("kind", ["jpg", "JPEG", "png", "webp", "gif"])
def test_pictures_by_extension(tmp_path: Path, cache: Path, kind: str) -> None:
    """The five kinds are found, in either case."""
    path = write(tmp_path / "a.tar", {f"x.{kind}": IMAGES[0], "x.txt": b"one"})
    assert both(path, cache) == [("a/x", IMAGES[0], ("one",))]


@pytest.mark.parametrize(
    ("caption_key", "meta", "text", "expected"),
    [
        (None, {"caption": "a"}, b"t", ("t",)),
        (None, {"caption": "a"}, None, ("a",)),
        (None, {"title": "b", "text": "c"}, None, ("b",)),
        (None, {"text": "c"}, None, ("c",)),
        (None, {"captions": ["d", " ", "e "]}, None, ("d", "e")),
        ("alt", {"caption": "a", "alt": "f"}, b"t", ("f",)),
        (["alt", "caption"], {"caption": "a", "alt": ["f", 1, None]}, b"t", ("f", "a")),
    ],
)
def test_where_captions_come_from(
    tmp_path: Path, cache: Path, caption_key, meta, text, expected
) -> None:
    """The .txt before the .json unless a key is named; a list is several captions."""
    members = {"x.json": json.dumps(meta).encode(), "x.png": IMAGES[0]}
    path = write(tmp_path / "a.tar", members | ({} if text is None else {"x.txt": text}))
    assert both(path, cache, caption_key) == [("a/x", IMAGES[0], expected)]


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
    """The key ends at the first dot of the file name; hidden and bare names are passed over."""
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
    """Whatever the source and compression, so that unpacking or copying keeps ids."""
    assert shard_stem(shard) == stem


def test_a_sample_id_in_the_json_is_kept(tmp_path: Path, cache: Path) -> None:
    """As it is, whatever letters it has."""
    meta = json.dumps({"sample_id": "emoji/😀 a.b", "caption": "x"}).encode()
    path = write(tmp_path / "a.tar", {"0.webp": IMAGES[0], "0.json": meta})
    assert both(path, cache) == [("emoji/😀 a.b", IMAGES[0], ("x",))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_form(tmp_path: Path, cache: Path, form: int) -> None:
    """Names of 90 and of 240 letters, in the three ways that tars write them."""
    long = "folder" * 15 + "/" + "k" * (90 if form == tarfile.USTAR_FORMAT else 150)
    names = ["a" * 90, long] + ([] if form == tarfile.USTAR_FORMAT else ["ключ" * 30])
    members = {f"{n}.{kind}": d for n in names for kind, d in (("jpg", IMAGES[0]), ("txt", b"c"))}
    path = write(tmp_path / "s.tar", members, format=form)
    assert [found[0] for found in both(path, cache)] == [f"s/{name}" for name in names]


def test_links_and_folders_are_passed_over(tmp_path: Path, cache: Path) -> None:
    """They are no content, and what follows them is read."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"x{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in (("y.jpg", IMAGES[0]), ("y.txt", b"c")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [found[0] for found in both(path, cache)] == ["a/y"]


def test_names_that_lead_elsewhere_are_only_names(tmp_path: Path, cache: Path) -> None:
    """Absolute and `..` members are read like others, and no file appears anywhere."""
    inside = tmp_path / "inside"
    names = [str(tmp_path / "evil"), "../evil", "../../evil"]
    members = [(f"{n}.{k}", d) for n in names for k, d in (("jpg", IMAGES[0]), ("txt", b"c"))]
    path = write(inside / "a.tar", members)
    before = set(tmp_path.parent.rglob("*"))
    assert [found[0] for found in both(path, cache)] == [f"a/{name}" for name in names]
    new = set(tmp_path.parent.rglob("*")) - before
    assert {p for p in new if cache not in p.parents and p != cache} == set()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"x.jpg": b"1"}, "empty caption"),
        ({"x.jpg": b"1", "x.txt": b" \n"}, "empty caption"),
        ({"x.jpg": b"1", "x.json": b"{}"}, "empty caption"),
        ({"x.jpg": b"1", "x.json": b"{nonsense"}, "empty caption"),
        ({"x.jpg": b"1", "x.json": b"[" * 100_000}, "empty caption"),
        ({"x.jpg": b"1", "x.json": b'["caption"]'}, "empty caption"),
        ({"x.txt": b"text"}, "no image"),
        ({"x.jpg": b"1", "x.txt": b"\xff\xfe"}, "the caption is not UTF-8"),
        ({"x.jpg": b"1", "x.json": b'{"caption": "\\ud800"}'}, "the caption is not UTF-8"),
    ],
)
def test_incomplete_samples_are_bad_not_missing(
    tmp_path: Path, cache: Path, members: dict[str, bytes], reason: str
) -> None:
    """They are counted and named with a reason, the same in both ways of reading."""
    good = {"y.jpg": b"1", "y.txt": b"c"}
    path = write(tmp_path / "a.tar", members | good)
    assert both(path, cache) == [("a/x", reason), ("a/y", b"1", ("c",))]


def test_an_index_notes_what_is_missing(tmp_path: Path, cache: Path) -> None:
    """Counts over all shards, and the shards that break off."""
    write(tmp_path / "0.tar", plain(2) | {"x.jpg": b"1", "z.txt": b"c"})
    cut = write(tmp_path / "1.tar", plain(3) | {"y.jpg": b"1"})
    cut.write_bytes(cut.read_bytes()[:7000])
    index = open_shards(str(tmp_path), cache=cache).index
    assert index is not None
    whole = len(every(open_shards(str(cut), cache=cache)))
    assert index.facts["notes"] == [
        "1 samples without a picture",
        "1 samples without a caption",
        f"1 shards broken off, such as {cut}: cut short after {whole} samples; what follows in "
        "them is lost, at least one sample each",
    ]


def test_every_cut_keeps_what_is_whole(tmp_path: Path, cache: Path) -> None:
    """A shard cut at any place gives a beginning of its samples; the stream adds one bad one."""
    path = write(tmp_path / "a.tar", plain(4))
    whole = path.read_bytes()
    complete = both(path, cache)
    ends = [512 * i + odd for i in range(1, 25) for odd in (0, 100)]
    lengths = set()
    for end in ends:
        path.write_bytes(whole[:end])
        streamed = facts(list(read_shard(str(path), None)))
        *good, bad = streamed
        assert len(bad) == 2
        assert good == complete[: len(good)]
        if good:
            indexed = facts(every(open_shards(str(path), cache=cache)))
            assert indexed == good
        lengths.add(len(good))
    assert lengths == {0, 1, 2, 3, 4}


def test_damage_in_the_middle_ends_a_shard(tmp_path: Path, cache: Path) -> None:
    """A header whose checksum is wrong: what comes before it is kept."""
    path = write(tmp_path / "a.tar", plain(3))
    data = bytearray(path.read_bytes())
    start = data.index(b"0002.jpg")
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    assert (
        facts(every(open_shards(str(path), cache=cache)))
        == facts(list(read_shard(str(path), None)))[:2]
    )
    bad = list(read_shard(str(path), None))[2]
    assert bad.reason == "damaged after 2 samples; what follows is lost, at least 1"


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"nonsense\0\0\0\0"])
def test_a_size_without_sense_is_damage(tmp_path: Path, size: bytes) -> None:
    """Neither memory nor time is spent on a member of exabytes."""
    path = write(tmp_path / "a.tar", plain(3))
    data = bytearray(path.read_bytes())
    start = data.index(b"0002.jpg")
    data[start + 124 : start + 136] = size
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    *good, bad = read_shard(str(path), None)
    assert [sample.sample_id for sample in good] == ["a/0000", "a/0001"]
    assert isinstance(bad, BadSample)
    assert bad.reason.split(" after 2 samples")[0] in ("damaged", "cut short")


@pytest.mark.parametrize("content", [b"", b"garbage", b"<html>" * 1000])
def test_garbage_is_named(tmp_path: Path, cache: Path, content: bytes) -> None:
    """One line with the file when it is opened; one bad sample in a stream."""
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S+/a\.tar: not a tar file$"):
        open_shards(str(path), cache=cache)
    (bad,) = read_shard(str(path), None)
    assert isinstance(bad, BadSample)
    assert (bad.sample_id, bad.where, bad.reason) == ("a", str(path), "not a tar file")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_streamed_only(tmp_path: Path, cache: Path, kind: str) -> None:
    """The same samples as unpacked; an index says what to do instead. Cut ones keep a start."""
    expected = both(write(tmp_path / "00.tar", plain(6)), cache)
    path = write(tmp_path / f"00.tar.{kind}", plain(6), mode=f"w:{kind}")
    assert facts(list(read_shard(str(path), None))) == expected
    with pytest.raises(ValueError, match="is compressed; stream it, or unpack it"):
        open_shards(str(path), cache=cache)
    path.write_bytes(path.read_bytes()[:-100])
    *good, bad = facts(list(read_shard(str(path), None)))
    assert good == expected[: len(good)]
    assert len(bad) == 2


@pytest.mark.parametrize(
    "members",
    [
        [("x.jpg", b"1"), ("x.txt", b"c"), ("x.jpg", b"2"), ("x.txt", b"d")],
        [("x.jpg", b"1"), ("y.jpg", b"1"), ("x.txt", b"c"), ("y.txt", b"c")],
        [(f"{key}.{kind}", data) for key in "xy" for kind, data in NAMED.items()],
    ],
)
def test_repeated_ids_in_a_shard(tmp_path: Path, cache: Path, members) -> None:
    """An index refuses them with their number; a stream takes the first."""
    path = write(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=r"a\.tar: [12] sample ids come more than once, such as"):
        open_shards(str(path), cache=cache)
    reasons = [b.reason for b in read_shard(str(path), None) if isinstance(b, BadSample)]
    assert any("the same sample id" in reason for reason in reasons)


def test_repeated_ids_of_two_shards(tmp_path: Path, cache: Path) -> None:
    """Ids that the shards bring along must differ over all of them."""
    members = {"0.jpg": b"1", "0.json": b'{"sample_id": "same", "caption": "c"}'}
    write(tmp_path / "a.tar", members)
    write(tmp_path / "b.tar", members)
    with pytest.raises(ValueError, match="1 sample ids come more than once, such as 'same'"):
        open_shards(str(tmp_path), cache=cache)


def test_ids_do_not_depend_on_what_else_is_opened(tmp_path: Path, cache: Path) -> None:
    """Equal keys in several shards are told no_sync, and alike in a set and alone."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.tar", plain(2))
    whole = facts(every(open_shards(str(tmp_path), cache=cache)))
    alone = both(tmp_path / "a.tar", cache) + both(tmp_path / "b.tar", cache)
    assert whole == alone
    assert len({found[0] for found in whole}) == 4


def test_shards_of_one_name_are_refused(tmp_path: Path, cache: Path) -> None:
    """Their samples could share ids."""
    paths = [str(write(tmp_path / folder / "00.tar", plain(1))) for folder in ("a", "b")]
    with pytest.raises(ValueError, match=r"has the file name of .*a/00\.tar"):
        open_shards(paths, cache=cache)


def test_a_new_shard_alone_is_indexed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one that changed; the second opening reads no shard."""
    read: list[str] = []
    original = shards._rows
    monkeypatch.setattr(
        shards, "_rows", lambda path, *rest: read.append(Path(path).name) or original(path, *rest)
    )
    for number in range(3):
        write(tmp_path / f"{number}.tar", plain(3, first=3 * number))
    pattern = str(tmp_path / "*.tar")
    assert len(open_shards(pattern, cache=cache)) == 9
    assert sorted(read) == ["0.tar", "1.tar", "2.tar"]
    open_shards(pattern, cache=cache)
    write(tmp_path / "3.tar", plain(2, first=9))
    assert len(open_shards(pattern, cache=cache)) == 11
    assert read[3:] == ["3.tar"]
    write(tmp_path / "1.tar", plain(1, first=50))
    pairs = open_shards(pattern, cache=cache)
    assert read[4:] == ["1.tar"]
    assert [s.captions[0] for s in every(pairs)][3] == "caption 50"


def test_many_shards_are_indexed_in_parallel(tmp_path: Path, cache: Path) -> None:
    """The rows come in the order of the shards, and go to a worker process as a path."""
    for number in range(shards.PARALLEL_FROM + 2):
        write(tmp_path / f"{number:02d}.tar", plain(2, first=2 * number))
    pairs = open_shards(str(tmp_path / "{00..09}.tar"), cache=cache)
    assert [s.captions for s in every(pairs)] == [(f"caption {n}",) for n in range(20)]
    assert len(pickle.dumps(pairs)) < 1000
    copy = pickle.loads(pickle.dumps(pairs))
    assert facts(every(copy)) == facts(every(pairs))
    assert list(copy.sample_ids()) == [s.sample_id for s in every(pairs)]


def test_shards_without_a_sample(tmp_path: Path, cache: Path) -> None:
    """An empty shard beside others is fine; nothing at all is not."""
    empty = write(tmp_path / "0.tar", {"readme.md": b"nothing"})
    with pytest.raises(ValueError, match="holds no sample"):
        open_shards(str(empty), cache=cache)
    write(tmp_path / "1.tar", plain(1))
    assert len(open_shards(str(tmp_path), cache=cache)) == 1


def test_oversized_members_are_not_loaded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are bad samples, and the next one is read."""
    monkeypatch.setattr(tars, "MAX_MEMBER_BYTES", 2000)
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 2000)
    members = {"x.jpg": b"1" * 2001, "x.txt": b"c", "y.jpg": b"1" * 2000, "y.txt": b"c"}
    found = both(write(tmp_path / "a.tar", members), cache)
    assert found == [("a/x", "no image"), ("a/y", b"1" * 2000, ("c",))]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Braces, globs, folders and lists of these: sorted, each shard once."""
    for name in ("00", "01", "02", "10"):
        write(tmp_path / f"{name}.tar", {})
    (tmp_path / "00.json").write_text("{}")
    names = [str(tmp_path / f"{name}.tar") for name in ("00", "01", "02", "10")]
    assert expand_shards(str(tmp_path)) == names
    assert expand_shards(str(tmp_path / "*.tar")) == names
    assert expand_shards(str(tmp_path / "{00..02}.tar")) == names[:3]
    assert expand_shards(str(tmp_path / "{10,0?}.tar")) == names
    assert expand_shards([names[3], names[0], str(tmp_path / "0[01].tar")]) == [
        names[0],
        names[1],
        names[3],
    ]
    monkeypatch.chdir(tmp_path)
    assert expand_shards("{01..02}.tar") == ["01.tar", "02.tar"]
    write(tmp_path / "odd{1..2}.tar", {})
    assert expand_shards("odd{1..2}.tar") == ["odd{1..2}.tar"]


def test_remote_patterns(bucket: str) -> None:
    """Braces always, globs and folders where the file system lists; commands as they are."""
    for name in ("a/0.tar", "a/1.tar", "a/x.txt"):
        with fsspec.open(f"{bucket}/{name}", "wb") as file:
            file.write(b"")
    two = [f"{bucket}/a/0.tar", f"{bucket}/a/1.tar"]
    for pattern in (f"{bucket}/a/*.tar", f"{bucket}/a/"):
        assert [n.replace(":///", "://") for n in expand_shards(pattern)] == two
    assert expand_shards("s3://bucket/{000..331}.tar")[331] == "s3://bucket/331.tar"
    assert expand_shards("pipe:curl -s https://host/{0..1}.tar", Access(commands=True)) == [
        "pipe:curl -s https://host/0.tar",
        "pipe:curl -s https://host/1.tar",
    ]
    assert expand_shards("https://host/{0..1}.tar?token=ab") == [
        "https://host/0.tar?token=ab",
        "https://host/1.tar?token=ab",
    ]


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


def test_remote_shards_are_not_indexed(cache: Path) -> None:
    """The line says what to do instead."""
    for pattern in ("https://host/{0..1}.tar", "pipe:cat x.tar"):
        with pytest.raises(ValueError, match="only local shards can be indexed; stream it"):
            open_shards(pattern, cache=cache)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_open_files_do_not_grow_with_the_number_of_shards(tmp_path: Path, cache: Path) -> None:
    """Data sets have more shards than a process may have open files."""
    for number in range(30):
        write(tmp_path / f"{number:02d}.tar", plain(1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    pairs = open_shards(str(tmp_path), cache=cache)
    assert len(every(pairs)) == 30
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
