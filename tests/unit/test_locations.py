"""Where data may be read from: protocols, the table's root, regular files, and time."""

import os
import socket
import threading
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from protoclip.data import locations, web
from protoclip.data.folders import open_folder
from protoclip.data.locations import (
    Access,
    in_table,
    open_file,
    read_file,
    visible,
)
from protoclip.data.manifests import open_manifest
from protoclip.data.pairs import BadSample, ImageTextPairs
from protoclip.data.sources import open_source
from protoclip.data.stream import ShardStream
from protoclip.data.web import Limits

# What a cell may hold, and what its row's reason says. None of these may reach anything.
CELLS = {
    "reference://x0::data:application/json;base64,e30=": "'reference://' is not read",
    "simplecache::https://host/a.jpg": "'simplecache::https://' is not read",
    "zip://a.jpg::https://host/a.zip": "'zip://' is not read",
    "tar://a.jpg::a.tar": "'tar://' is not read",
    "file:///etc/passwd": "'file://' is not read",
    "local:///etc/passwd": "'local://' is not read",
    "memory://a.jpg": "'memory://' is not read",
    "data://a": "'data://' is not read",
    "ftp://127.0.0.1/a.jpg": "'ftp://' is not read",
    "ssh://host/a.jpg": "'ssh://' is not read",
    "github://a:b@/c": "'github://' is not read",
    "s3://bucket/a.zip::zip://b": "chained with '::'",
    "https://host/a::zip://b": "chained with '::'",
    "s3://[a::file:///etc/passwd": "chained with '::'",
    "http://": "names no host",
    "http://host:port/a.jpg": "Port could not be cast",
    "http://127.0.0.1:9/a.jpg": "--data.allow_private_hosts true",
    "http://localhost:9/a.jpg": "--data.allow_private_hosts true",
    "HTTP://[::1]:9/a.jpg": "--data.allow_private_hosts true",
    "https://[::ffff:169.254.169.254]/": "--data.allow_private_hosts true",
    "http://10.0.0.1/a.jpg": "--data.allow_private_hosts true",
    "http://0/a.jpg": "--data.allow_private_hosts true",
    "http://2130706433/a.jpg": "--data.allow_private_hosts true",  # 127.0.0.1 as one number
    "gs://bucket/a.jpg": "gcsfs",
    "pipe:touch ran.tar": "a table runs no command",
    "../secret.jpg": r"set data.root to the folder that holds the images \(--data.root /\)",
    "deep/../../secret.jpg": "lies outside of",
    "/etc/passwd": "lies outside of",
    "link.jpg": "secret.jpg, outside of .*--data.allow_links true",
    "folder/hosts": "--data.allow_links true",
    "fifo.jpg": "is a pipe, not a file",
    "socket.jpg": "is a socket, not a file",
    "zero.jpg": "is a device, not a file",
    "deep": "is a folder, not a file",
    "loop.jpg": "cannot be read",
    "closed.jpg": "cannot be read",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table's folder with traps in it; allowed links show what they would lead to."""
    top = tmp_path_factory.mktemp("place")
    (top / "secret.jpg").write_bytes(b"secret")
    folder = top / "table"
    (folder / "deep").mkdir(parents=True)
    (folder / "good.jpg").write_bytes(b"good")
    (folder / "link.jpg").symlink_to(top / "secret.jpg")
    (folder / "within.jpg").symlink_to(folder / "good.jpg")
    (folder / "folder").symlink_to("/etc")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "closed.jpg").write_bytes(b"closed")
    (folder / "closed.jpg").chmod(0)
    os.mkfifo(folder / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.jpg"))
    rows = ["filepath\tcaption\tkey", "good.jpg\tx\tgood", "within.jpg\tx\twithin"]
    rows += [f"{folder}/good.jpg\tx\tabsolute"]
    rows += [f"{cell}\tx\t{cell}" for cell in CELLS]
    (folder / "pairs.tsv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def table(place: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageTextPairs:
    cache = tmp_path_factory.mktemp("cache")
    return open_manifest(str(place / "pairs.tsv"), cache=cache)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_that_leads_astray_costs_its_row(table: ImageTextPairs, cell: str) -> None:
    """At once, with a reason of one line; nothing is run, asked or waited for."""
    if cell == "closed.jpg" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    if cell == "zero.jpg":
        table = ImageTextPairs(table.table, name="x", root=table.root, access=Access(links=True))
    row = list(table.sample_ids()).index(cell)
    started = time.monotonic()
    with pytest.raises(BadSample, match=CELLS[cell]) as error:
        table.sample(row)
    assert time.monotonic() - started < 5
    assert "\n" not in str(error.value)


def test_the_rows_beside_them_are_read(table: ImageTextPairs) -> None:
    """By a path below the root, relative or absolute, and by a link that stays there."""
    assert [table.sample(row).image for row in range(3)] == [b"good"] * 3


def test_links_lead_out_where_the_user_says_so(place: Path) -> None:
    """From below the root; `..` and absolute paths still do not."""
    allowed = Access(links=True)
    assert read_file(in_table(str(place), "link.jpg", allowed), allowed) == b"secret"
    for cell in ("../secret.jpg", "folder/../../secret.jpg"):
        with pytest.raises(ValueError, match="lies outside"):
            in_table(str(place), cell, allowed)


def test_the_root_is_what_the_user_names(place: Path, tmp_path: Path) -> None:
    """A root of `/` reads any absolute path; one that is a link itself means where it leads."""
    secret = str(place.parent / "secret.jpg")
    assert in_table("/", secret, Access()) == secret
    assert in_table(str(place.parent), secret, Access()) == secret
    (tmp_path / "short").symlink_to(place)
    for cell in ("good.jpg", f"{place}/good.jpg", f"{tmp_path}/short/good.jpg"):
        assert in_table(str(tmp_path / "short"), cell, Access()) == f"{place}/good.jpg"


def test_a_root_that_is_a_url_holds_its_table(bucket: str) -> None:
    """Names below it and other URLs; no local path, no way up."""
    assert in_table(bucket, "a/b.jpg", Access()) == f"{bucket}/a/b.jpg"
    assert in_table(bucket, "https://host/b.jpg", Access()) == "https://host/b.jpg"
    for cell in ("/etc/passwd", "../other/b.jpg", "a/../../b.jpg"):
        with pytest.raises(ValueError, match=f"lies outside of {bucket}"):
            in_table(bucket, cell, Access())


def test_the_caller_of_a_folder_follows_its_links(tmp_path: Path) -> None:
    """As the user named the folder itself."""
    (tmp_path / "elsewhere.png").write_bytes(b"far")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "folder" / "a.txt").write_text("caption")
    pairs = open_folder(str(tmp_path / "folder"), cache=tmp_path / "cache")
    assert pairs.sample(0).image == b"far"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"state.json": '{"_data_files": [{"filename": "../a.arrow"}]}'}, "names '../a.arrow'"),
        ({"state.json": '{"_data_files": [{"filename": "/a.arrow"}]}'}, "names '/a.arrow'"),
        ({"state.json": '{"_data_files": [{}]}'}, "names 'None'"),
        ({"dataset_dict.json": '{"splits": ["../other"]}'}, "names '../other'"),
    ],
)
def test_a_saved_dataset_holds_its_own_files(tmp_path: Path, files, message: str) -> None:
    """Others are not opened on its word."""
    for name, text in {"dataset_info.json": "{}", **files}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_folder(str(tmp_path), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:cat {0..2}.tar", "pipe:cat .*--data.allow_commands true"),
        ("reference://x::data:a,b", "'reference://' is not read; use a local file or one of"),
        ("memory://a.tar", "'memory://' is not read"),
        ("ftp://host/{0..2}.tar", "'ftp://' is not read"),
        ("s3://bucket/a.tar::tar://b", "chained with '::'"),
    ],
)
def test_a_source_that_may_not_be_read_is_one_line(source: str, message: str) -> None:
    """Before anything is opened."""
    with pytest.raises(ValueError, match=message):
        open_source(source)
    if ".tar" in source:
        with pytest.raises(ValueError, match=message):
            ShardStream(source, seed=0)


def test_a_root_that_may_not_be_read_is_one_line(place: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.root: ftp://host: 'ftp://' is not read"):
        open_source(str(place / "pairs.tsv"), root="ftp://host")


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_a_file_without_end_is_not_read_whole(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """One of the largest size is."""
    monkeypatch.setattr(locations, "MAX_FILE_BYTES", 1000)
    path = str(tmp_path / "a.jpg") if where == "local" else f"{bucket}/a.jpg"
    for size in (1000, 1001):
        fsspec.filesystem("s3").pipe(path, bytes(size))
        (tmp_path / "a.jpg").write_bytes(bytes(size))
        if size == 1000:
            assert len(read_file(path, Access())) == size
        else:
            with pytest.raises(ValueError, match="has more than 1000 bytes"):
                read_file(path, Access())


def test_what_takes_the_place_of_a_file_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that is put there between looking and opening."""
    (tmp_path / "a").write_bytes(b"x")
    regular = (tmp_path / "a").stat()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with pytest.raises(ValueError, match="is a pipe"):
        open_file(str(tmp_path / "fifo"), Access())


def test_a_store_that_never_answers_costs_one_sample(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time for a sample's file."""
    free = threading.Event()
    monkeypatch.setattr(type(fsspec.filesystem("s3")), "_open", lambda *args, **more: free.wait(9))
    monkeypatch.setattr(web, "LIMITS", Limits(total=0.05))
    table = fsspec.filesystem("s3")  # warm, so that no import is timed
    assert table is not None
    with pytest.raises(TimeoutError, match=r"not read within 0\.05 s"):
        read_file(f"{bucket}/a.jpg", Access())
    free.set()


@pytest.mark.parametrize(
    "error",
    [IndexError("out of range"), ImportError("Install s3fs"), RuntimeError(), KeyError("a")],
)
def test_any_error_of_a_store_is_a_bad_sample(
    bucket: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """With its own words; but no room in memory is not the sample's fault."""

    def fail(*args, **more):
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("s3")), "_open", fail)
    content = pa.table({"path": [f"{bucket}/a.jpg"], "caption": ["x"]})
    pairs = ImageTextPairs(content, name="a")
    with pytest.raises(BadSample, match=f"cannot be read .*{error or 'RuntimeError'}"):
        pairs.sample(0)
    error = MemoryError()
    with pytest.raises(MemoryError):
        pairs.sample(0)


def test_reasons_show_what_a_terminal_would_obey() -> None:
    """Escapes, ends of lines and turned text; letters of any script stay."""
    bad = BadSample("a\x1b]0;x\x07", "b\u202egpj.exe\u2028", "c\r\n\x9b")
    assert str(bad) == r"sample 'a\x1b]0;x\x07' (b\u202egpj.exe\u2028): c\r\n\x9b"
    assert (bad.sample_id, bad.where, bad.reason) == (
        "a\x1b]0;x\x07",
        "b\u202egpj.exe\u2028",
        r"c\r\n\x9b",
    )
    for text in ("猫 schön", "👩\u200d🚀", "plain"):
        assert visible(text) == text
