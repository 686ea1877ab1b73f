"""Where data may be read from: protocols, a table's root, regular files, web servers, time."""

import http.server
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock

import fsspec
import pyarrow as pa
import pytest

from protoclip.config import DataConfig
from protoclip.data import access as module
from protoclip.data.access import MAX_FILE_BYTES, fingerprint, read_file, read_range, resolve_cell
from protoclip.data.pairs import BadSample, ImageTextPairs
from protoclip.data.tables import open_table

# What a cell may hold, and what its row's reason says. None of these may reach anything.
CELLS = {
    "reference://x0::data:application/json;base64,e30=": "'reference://' is not read",
    "zip://a.jpg::https://host/a.zip": "'zip://' is not read",
    "file:///etc/passwd": "'file://' is not read",
    "s3://bucket/a.zip::zip://b": "chained with '::'",
    "http://127.0.0.1:9/a.jpg": "images on the web are not read; download .* img2dataset",
    "gs://bucket/a.jpg": "gcsfs",
    "pipe:touch ran.tar": "no such file",
    "../secret.jpg": r"set --root or ,root= to /.*place\d*, and write secret.jpg",
    "/etc/passwd": r"set --root to .* \(/ is one\), or ,root= behind a data set",
    "link.jpg": "leads out; --allow_links true follows it, to .*secret.jpg",
    "fifo.jpg": "is a folder, pipe or device",
    "zero.jpg": "is a folder, pipe or device",
    "deep": "is a folder, pipe or device",
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
    (folder / "folder").symlink_to(top)
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "closed.jpg").write_bytes(b"closed")
    (folder / "closed.jpg").chmod(0)
    os.mkfifo(folder / "fifo.jpg")
    rows = ["filepath\tcaption\tkey", "good.jpg\tx\tgood", "within.jpg\tx\twithin"]
    rows += [f"{folder}/good.jpg\tx\tabsolute"]
    rows += [f"{cell}\tx\t{cell}" for cell in CELLS]
    (folder / "pairs.tsv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def table(place: Path) -> ImageTextPairs:
    return open_table(DataConfig(train=str(place / "pairs.tsv")))


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_that_leads_astray_costs_its_row(table, cell):
    """At once, with a reason of one line; nothing is run, asked or waited for."""
    if cell == "closed.jpg" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    if cell == "zero.jpg":
        table = ImageTextPairs(table.table, name="x", root=table.root, allow_links=True)
    row = list(table.sample_ids()).index(cell)
    started = time.monotonic()
    with pytest.raises(BadSample, match=CELLS[cell]) as error:
        table.sample(row)
    assert time.monotonic() - started < 25
    assert "\n" not in str(error.value)


def test_the_rows_beside_them_are_read(table):
    """By a path below the root, relative or absolute, and by a link that stays there."""
    assert [table.sample(row).image for row in range(3)] == [b"good"] * 3


def test_a_range_has_no_more_bytes_than_a_file(place):
    """A row that claims a petabyte is a bad sample, and not the end of the memory."""
    assert read_range(str(place / "good.jpg"), 1, 2) == b"oo"
    with pytest.raises(ValueError, match=f"has more than {MAX_FILE_BYTES} bytes"):
        read_range(str(place / "good.jpg"), 0, 10**15)


def test_the_user_says_what_a_table_may_name(place, tmp_path):
    """Links that lead out, but not `..`; any path below a root, which may itself be a link."""
    secret = str(place.parent / "secret.jpg")
    assert read_file(resolve_cell(str(place), "link.jpg", allow_links=True)) == b"secret"
    for cell in ("../secret.jpg", "folder/../../secret.jpg"):
        with pytest.raises(ValueError, match="lies outside"):
            resolve_cell(str(place), cell, allow_links=True)
    assert resolve_cell("/", secret, allow_links=False) == secret
    assert resolve_cell(str(place.parent), secret, allow_links=False) == secret
    (tmp_path / "short").symlink_to(place)
    for cell in ("good.jpg", f"{place}/good.jpg", f"{tmp_path}/short/good.jpg"):
        assert resolve_cell(str(tmp_path / "short"), cell, allow_links=False) == f"{place}/good.jpg"


def test_a_root_that_is_a_url_holds_its_table(bucket):
    """Names below it and other URLs; no local path, no way up."""
    assert resolve_cell(bucket, "a/b.jpg", allow_links=False) == f"{bucket}/a/b.jpg"
    assert resolve_cell(bucket, "gs://other/b.jpg", allow_links=False) == "gs://other/b.jpg"
    for cell in ("/etc/passwd", "../other/b.jpg", "a/../../b.jpg"):
        with pytest.raises(ValueError, match=f"lies outside of {bucket}"):
            resolve_cell(bucket, cell, allow_links=False)


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_a_file_without_end_is_not_read_whole(tmp_path, bucket, monkeypatch, where):
    """One of the largest size is."""
    path = str(tmp_path / "a.jpg") if where == "local" else f"{bucket}/a.jpg"
    (tmp_path / "a.jpg").write_bytes(bytes(1000))
    fsspec.filesystem("s3").pipe(f"{bucket}/a.jpg", bytes(1000))
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    assert len(read_file(path)) == 1000
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 999)
    with pytest.raises(ValueError, match="has more than 999 bytes"):
        read_file(path)


def test_a_store_that_never_answers_costs_one_sample(bucket, monkeypatch):
    """After the time for a sample's file."""
    free = threading.Event()
    monkeypatch.setattr(
        type(fsspec.filesystem("s3")), "cat_file", lambda *args, **more: free.wait(9)
    )
    monkeypatch.setattr(module, "TOTAL_SECONDS", 0.05)
    with pytest.raises(TimeoutError, match=r"not read within 0\.05 s"):
        read_file(f"{bucket}/a.jpg")
    free.set()


@pytest.mark.parametrize("error", [IndexError("out of range"), ImportError("Install s3fs")])
def test_any_error_of_a_store_is_a_bad_sample(bucket, monkeypatch, error):
    """With its own words; but no room in memory is not the sample's fault."""
    failing = Mock(side_effect=[error, MemoryError()])
    monkeypatch.setattr(type(fsspec.filesystem("s3")), "cat_file", failing)
    content = pa.table({"path": [f"{bucket}/a.jpg"], "caption": ["x"]})
    pairs = ImageTextPairs(content, name="a")
    with pytest.raises(BadSample, match=f"cannot be read .{error}"):
        pairs.sample(0)
    with pytest.raises(MemoryError):
        pairs.sample(0)


CONTENT = bytes(range(256)) * 1000


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers by the path's name; counts requests."""

    counts: ClassVar[Counter[str]] = Counter()
    free: ClassVar[threading.Event] = threading.Event()
    seen: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.counts[name] += 1
        first = self.counts[name] == 1
        if name in ("404", "503") or (name == "500" and first):
            self.send_error(int(name))
        elif name == "hang":
            self.free.wait(9)
        elif name == "reset" and first:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif name == "trickle":
            self.start(10**6)
            while not self.free.wait(0.01):
                self.wfile.write(b"x")
                self.wfile.flush()
        elif name == "cut" or (name == "resume" and first):
            self.start(len(CONTENT))
            self.wfile.write(CONTENT[:1000])
        elif name == "resume":
            assert self.headers["Range"] == "bytes=1000-"
            self.send_response(206)
            self.send_header("Content-Length", str(len(CONTENT) - 1000))
            self.end_headers()
            self.wfile.write(CONTENT[1000:])
        elif name.startswith("to:"):
            self.send_response(302)
            self.send_header("Location", name[3:])
            self.end_headers()
        else:
            self.seen.append(self.headers["Authorization"])
            self.start(len(CONTENT))
            self.wfile.write(CONTENT)

    def start(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No pause between tries; all other limits are those of users, which a busy machine keeps."""
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.001)
    Odd.counts.clear()
    Odd.seen.clear()
    Odd.free.clear()
    before = {*threading.enumerate()}
    yield serve(Odd)
    Odd.free.set()
    for thread in {*threading.enumerate()} - before:  # reads that were given up, which try again
        if thread.name == "protoclip-read":
            thread.join(30)


# The limits that are reached, so that it takes a second or two.
SHORTER = {"hang": ("SILENCE_SECONDS", 0.5), "trickle": ("TOTAL_SECONDS", 1.0)}


@pytest.mark.parametrize(
    ("name", "requests"),
    [("good", 1), ("500", 2), ("reset", 2), ("resume", 2), ("to:/good", 1)],
)
def test_what_may_pass_is_tried_again(server, name, requests):
    """And what was read before the connection broke is not asked for again."""
    assert read_file(f"{server}/{name}") == CONTENT
    assert Odd.counts[name] == requests


@pytest.mark.parametrize(
    ("name", "reason", "requests"),
    [
        ("404", "HTTP 404", 1),
        ("503", "HTTP 503 Service Unavailable, 3 times", 3),
        ("hang", "no answer in time, 3 times", 3),
        ("cut", "received 1000 bytes, expected 256000.*, 3 times", 3),
        ("trickle", "not read within 1 s", 1),
        ("to:file:///etc/passwd", "unsupported protocol 'file://'", 1),
    ],
)
def test_what_will_not_pass_is_an_error(server, name, reason, requests, monkeypatch):
    """After as many requests as make sense, in one line."""
    if name in SHORTER:
        monkeypatch.setattr(module, *SHORTER[name])
    with pytest.raises(OSError, match=reason) as error:
        read_file(f"{server}/{name}")
    assert Odd.counts[name] == requests
    assert "\n" not in str(error.value)


def test_urls_as_people_write_them(server):
    """Letters of any script, blanks, a fragment; a password goes to its own host alone."""
    place = server.replace("//", "//me:s%40fe@")
    assert read_file(f"{place}/a ü%20b.jpg?x=ö&y=1#part") == CONTENT
    assert Odd.counts["a%20%C3%BC%20b.jpg?x=%C3%B6&y=1"] == 1
    other = server.replace("127.0.0.1", "localhost")
    assert read_file(f"{place}/to:{other}/good") == CONTENT
    assert Odd.seen == ["Basic bWU6c0BmZQ==", None]


def test_a_fingerprint_follows_the_content(tmp_path, bucket, serve):
    """Of a file also if size and time stay the same; of a URL as far as its headers tell."""
    path, url = tmp_path / "a.csv", f"{serve('ranges', tmp_path)}/a.csv"
    found: dict[str, list[str]] = {str(path): [], url: [], f"{bucket}/a.csv": []}
    for content in (b"one", b"two", b"three"):
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        fsspec.filesystem("s3").pipe(f"{bucket}/a.csv", content)
        for place, prints in found.items():
            prints += {fingerprint(place) for _ in range(2)}
    assert [len(prints) for prints in found.values()] == [3, 3, 3]
    assert len(set(found[str(path)])) == 3
    assert len(set(found[url])) == 2  # the server tells nothing but the size
