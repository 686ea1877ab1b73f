"""Files of web servers that are slow, broken, or lead elsewhere."""

import http.server
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest

from protoclip.data import web
from protoclip.data.locations import Access
from protoclip.data.pairs import BadSample, ImageTextPairs
from protoclip.data.web import (
    Limits,
    WebFile,
    check_addresses,
    is_private,
    request,
)

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
        if name in ("404", "403") or (name == "500" and first) or name == "503":
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
        elif name == "slow":
            self.start(len(CONTENT))
            for place in range(0, len(CONTENT), 1 << 16):
                time.sleep(0.01)
                self.wfile.write(CONTENT[place : place + (1 << 16)])
        elif name == "cut" or (name == "resume" and first):
            self.start(len(CONTENT))
            self.wfile.write(CONTENT[:1000])
        elif name == "resume":
            assert self.headers["Range"] == "bytes=1000-"
            self.send_response(206)
            self.send_header("Content-Length", str(len(CONTENT) - 1000))
            self.end_headers()
            self.wfile.write(CONTENT[1000:])
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            with suppress(ConnectionError):
                while not self.free.is_set():
                    self.wfile.write(bytes(1 << 16))
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
    """Limits of milliseconds; this machine's own address counts as public."""
    limits = Limits(connect=0.5, silence=0.15, total=1.0, tries=3, pause=0.001)
    monkeypatch.setattr(web, "LIMITS", limits)
    monkeypatch.setattr(web, "is_private", lambda address: address != "127.0.0.1")
    Odd.counts.clear()
    Odd.seen.clear()
    Odd.free.clear()
    yield serve(Odd)
    Odd.free.set()


def image(url: str) -> bytes:
    table = pa.table({"path": [url], "caption": ["x"]})
    return ImageTextPairs(table, name="a").sample(0).image


@pytest.mark.parametrize(
    ("name", "requests"),
    [("good", 1), ("slow", 1), ("500", 2), ("reset", 2), ("resume", 2), ("to:/good", 1)],
)
def test_what_may_pass_is_tried_again(server: str, name: str, requests: int) -> None:
    """And what was read before the connection broke is not asked for again."""
    assert image(f"{server}/{name}") == CONTENT
    assert Odd.counts[name] == requests


@pytest.mark.parametrize(
    ("name", "reason", "requests"),
    [
        ("404", "no such file", 1),
        ("403", "HTTP 403 Forbidden", 1),
        ("503", "HTTP 503 Service Unavailable, 3 times", 3),
        ("hang", "no answer in time, 3 times", 3),
        ("cut", "broke off after 1000 of 256000 bytes, 3 times", 3),
        ("to:file:///etc/passwd", "HTTP 302 .*file:///etc/passwd' is not allowed", 1),
        ("to:ftp://127.0.0.1/a", "redirects to what is no http or https URL", 1),
        ("to:http://10.0.0.1/a", "10.0.0.1 is this machine or in a private network", 1),
    ],
)
def test_what_will_not_pass_is_a_bad_sample(
    server: str, name: str, reason: str, requests: int
) -> None:
    """After as many requests as make sense, in one line."""
    with pytest.raises(BadSample, match=reason) as error:
        image(f"{server}/{name}")
    assert Odd.counts[name] == requests
    assert "\n" not in str(error.value)


def test_an_answer_of_single_bytes_ends_with_the_time_of_a_sample(server: str) -> None:
    """Though no silence in it is long."""
    started = time.monotonic()
    with pytest.raises(BadSample, match=r"not read within 1 s"):
        image(f"{server}/trickle")
    assert time.monotonic() - started < 3


def test_an_answer_without_end_is_cut_off(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protoclip.data.locations.MAX_FILE_BYTES", 1 << 18)
    with pytest.raises(BadSample, match="has more than 262144 bytes"):
        image(f"{server}/endless")


def test_this_machine_is_asked_where_the_user_says_so(serve: Callable[..., str]) -> None:
    """With the true list of private addresses."""
    url = f"{serve(Odd)}/good"
    with pytest.raises(BadSample, match=r"127\.0\.0\.1 is this machine .*allow_private_hosts true"):
        image(url)
    table = pa.table({"path": [url], "caption": ["x"]})
    pairs = ImageTextPairs(table, name="a", access=Access(private_hosts=True))
    assert pairs.sample(0).image == CONTENT


def test_a_name_is_looked_up_once(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one that is used, whatever the name means later."""
    asked: list[str] = []
    original = socket.getaddrinfo

    def look_up(host, port, *rest, **more):
        asked.append(host)
        return original("127.0.0.1" if len(asked) == 1 else "10.0.0.1", port, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert image(server.replace("127.0.0.1", "pictures.example") + "/good") == CONTENT
    assert asked == ["pictures.example"]


def test_one_private_address_among_public_ones_is_refused() -> None:
    with pytest.raises(ValueError, match="host is this machine or in a private network"):
        check_addresses("host", ["93.184.216.34", "192.168.1.1"])


@pytest.mark.parametrize(
    ("address", "private"),
    [
        *((one, True) for one in ("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1")),
        *((one, True) for one in ("192.168.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1")),
        *((one, True) for one in ("::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1")),
        *((one, False) for one in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8")),
    ],
)
def test_private_addresses(address: str, private: bool) -> None:
    assert is_private(address) is private


def test_an_address_of_this_machine_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public or not: what can be bound is its own."""
    monkeypatch.setattr(web.ipaddress.IPv4Address, "is_global", True)
    assert is_private("127.0.0.1")
    assert not is_private("8.8.8.8")


@pytest.mark.parametrize("handler", ["ranges", "whole"])
def test_a_file_is_read_in_any_order(
    tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, handler: str
) -> None:
    """With ranges or without."""
    monkeypatch.setattr(web, "NEAR", 5000)
    (tmp_path / "a").write_bytes(CONTENT)
    with WebFile(f"{serve(handler, tmp_path)}/a", private_hosts=True) as file:
        for place in (100_000, 7, 3000, 255_990, 0):
            assert file.seek(place) == place
            assert file.read(20) == CONTENT[place : place + 20]
        assert file.seek(0, 2) == len(CONTENT)
        assert file.read(1) == b""


def test_urls_as_people_write_them(server: str) -> None:
    """Letters of any script, blanks, a fragment; a password goes to the host itself alone."""
    asked = request("https://bücher.example:8080/a ü%20b.jpg?x=ö&y=1#part")
    assert asked.full_url == ("https://xn--bcher-kva.example:8080/a%20%C3%BC%20b.jpg?x=%C3%B6&y=1")
    place = server.replace("//", "//me:s%40fe@")
    assert image(f"{place}/good") == CONTENT
    assert Odd.seen == ["Basic bWU6c0BmZQ=="]
    assert image(f"{place}/to:/good") == CONTENT
    assert Odd.seen[1:] == [None]


def test_the_way_to_a_proxy_is_free_but_not_what_it_is_asked_for(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy on this machine serves public names; private addresses behind it are refused."""
    monkeypatch.setenv("http_proxy", serve(Odd))
    monkeypatch.delenv("no_proxy", raising=False)
    web.opener.cache_clear()
    try:
        assert image("http://93.184.216.34/a.jpg") == CONTENT
        for url in ("http://127.0.0.1/a.jpg", "http://10.0.0.1/a.jpg"):
            with pytest.raises(BadSample, match="in a private network"):
                image(url)
    finally:
        web.opener.cache_clear()
