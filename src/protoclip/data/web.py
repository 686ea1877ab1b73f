"""Files of web servers: with time limits, a few retries, and no way into private networks.

Every connection, those that a redirect leads to included, is made to an address that was checked;
the name is not resolved a second time. Behind a proxy the proxy resolves names, so only what they
mean here is checked.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

T = TypeVar("T")
# Bytes taken from a connection at once; bytes read past rather than asking the server again.
PIECE, NEAR = 1 << 16, 1 << 20
# Letters of a URL that stand for themselves or are quoted already.
KEPT = "%/:=&?~#+!$,;'@()*[]"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long to wait for what is not on this machine.

    Attributes:
        connect: Seconds until a server has accepted a connection.
        silence: Seconds between two pieces of an answer.
        total: Seconds for the whole file of one sample, with all tries.
        tries: How often a request is made whose failure may pass.
        pause: Seconds before the second try; doubled before each further one.
    """

    connect: float = 10.0
    silence: float = 20.0
    total: float = 60.0
    tries: int = 3
    pause: float = 0.5


LIMITS = Limits()


class WebFile(io.RawIOBase):
    """The bytes of an `http` or `https` URL, in any order.

    Reading goes on after a broken connection. A server that knows no ranges of bytes is read from
    the start for each step back.

    Args:
        url: With user name and password, if it needs them.
        private_hosts: Whether this machine and private networks may be reached.

    Raises:
        FileNotFoundError: HTTP 404 or 410.
        OSError: Any other failure; while reading, too.
        ValueError: The host may not be reached, or this is no URL.
    """

    def __init__(self, url: str, *, private_hosts: bool) -> None:
        self.opener = opener(private_hosts)
        self.request = request(url)
        self.position = 0
        # The answer under way, and the position in the file of its next byte.
        self.response: Any = None
        self.reached = 0
        self.size: int | None = None
        answer = self._persist(self._ask)
        self.size = answer.length
        self.facts = {
            name: answer.headers[name]
            for name in ("Content-Length", "ETag", "Last-Modified")
            if name in answer.headers
        }

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.size is not None

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self.size is None:
            raise OSError("the server does not say how large the file is")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self._persist(partial(self._take, min(len(buffer), PIECE)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _take(self, most: int) -> bytes:
        if self.size is not None and self.position >= self.size:
            return b""
        if self.response is None or not 0 <= self.position - self.reached <= NEAR:
            self._ask()
        while self.reached < self.position:
            self.reached += len(self._piece(min(PIECE, self.position - self.reached)))
        data = self._piece(most)
        self.reached = self.position = self.position + len(data)
        return data

    def _piece(self, most: int) -> bytes:
        data: bytes = self.response.read1(most)
        if not data and (self.size is not None or self.reached < self.position):
            raise ConnectionResetError(f"broke off after {self.reached} of {self.size} bytes")
        return data

    def _ask(self) -> Any:
        self._drop()
        self.request.add_header("Range", f"bytes={self.position}-")
        if not self.position:
            self.request.remove_header("Range")
        self.response = self.opener.open(self.request, timeout=LIMITS.silence)
        self.reached = self.position if self.response.status == 206 else 0
        return self.response

    def _drop(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def _persist(self, action: Callable[[], T]) -> T:
        """Do it, again where a failure may pass; what fails for good is one line."""
        tries = 1
        while True:
            try:
                return action()
            except Exception as error:
                self._drop()
                if tries == LIMITS.tries or not may_pass(error):
                    raise told(error, tries) from None
            time.sleep(LIMITS.pause * 2 ** (tries - 1))
            tries += 1


def may_pass(error: BaseException | str) -> bool:
    """Whether asking again can help: not for what a server refuses or has not."""
    if isinstance(error, HTTPError):
        error.close()
        return error.code in (408, 425, 429) or error.code >= 500
    if isinstance(error, URLError):
        return may_pass(error.reason)
    lost = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
    return isinstance(error, (TimeoutError, *lost, http.client.IncompleteRead))


def told(error: Exception, tries: int) -> Exception:
    """A failure in a few words."""
    if isinstance(error, HTTPError):
        if error.code in (404, 410):
            return FileNotFoundError(f"HTTP {error.code}")
        what = f"HTTP {error.code} {error.reason}"
    elif isinstance(error, URLError):
        what = "no answer in time" if isinstance(error.reason, TimeoutError) else str(error.reason)
    elif isinstance(error, ValueError):
        return error
    else:
        what = "no answer in time" if isinstance(error, TimeoutError) else str(error)
    return OSError(f"{what or type(error).__name__}{f', {tries} times' if tries > 1 else ''}")


def request(url: str) -> urllib.request.Request:
    """A request for a URL as people write them: letters of any script, blanks, a password."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("the URL names no host")
    host = parts.hostname
    if ":" in host:
        host = f"[{host}]"
    elif not host.isascii():
        host = host.encode("idna").decode()
    place = f"{host}:{parts.port}" if parts.port else host
    path, query = quote(parts.path, safe=KEPT), quote(parts.query, safe=KEPT)
    found = urllib.request.Request(
        urlunsplit((parts.scheme, place, path, query, "")), headers={"User-Agent": "protoclip"}
    )
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # A redirect to another host does not get it.
        found.add_unredirected_header("Authorization", f"Basic {b64encode(login).decode()}")
    return found


def is_private(address: str) -> bool:
    """Whether an IP address is this machine's or not of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if not ip.is_global or ip.is_multicast:
        return True
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    try:
        # Only an address of this machine can be bound.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(ip), 0))
        return True
    except OSError:
        return False


def check_addresses(host: str, addresses: list[str]) -> None:
    """Refuse a host that has a private address.

    Raises:
        ValueError: It has one.
    """
    if any(map(is_private, addresses)):
        raise ValueError(
            f"{host} is this machine or in a private network; "
            "--data.allow_private_hosts true lets data be read from there"
        )


def reach(host: str, port: int, *, private_hosts: bool) -> socket.socket:
    """A connection to a host, if it may be reached."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not private_hosts:
        check_addresses(host, [str(address[0]) for *_, address in found])
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(LIMITS.connect)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            connection.settimeout(LIMITS.silence)
            return connection
    raise failure


class _Plain(http.client.HTTPConnection):
    def __init__(self, *args: Any, private_hosts: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.private_hosts = private_hosts

    def connect(self) -> None:
        self.sock = reach(self.host, self.port, private_hosts=self.private_hosts)


class _Encrypted(http.client.HTTPSConnection):
    def __init__(self, *args: Any, private_hosts: bool, **options: Any) -> None:
        super().__init__(*args, context=encryption(), **options)
        self.private_hosts = private_hosts

    def connect(self) -> None:
        connection = reach(self.host, self.port, private_hosts=self.private_hosts)
        self.sock = encryption().wrap_socket(connection, server_hostname=self.host)


@lru_cache
def encryption() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens both kinds of URL, directly or through the proxy that the environment names."""

    def __init__(self, *, private_hosts: bool) -> None:
        super().__init__()
        self.private_hosts = private_hosts

    def http_open(self, found: urllib.request.Request) -> http.client.HTTPResponse:
        asked = urlsplit(found.full_url)
        connection: Any = _Encrypted if found.type == "https" else _Plain
        if found.host == asked.netloc:
            return self.do_open(partial(connection, private_hosts=self.private_hosts), found)
        if not self.private_hosts and asked.hostname:
            try:
                known = socket.getaddrinfo(asked.hostname, None)
            except OSError:
                known = []  # a name that the proxy alone knows
            check_addresses(asked.hostname, [str(address[0]) for *_, address in known])
        # Only the way to the proxy is free to lead into a private network.
        return self.do_open(connection.__base__, found)

    https_open = http_open
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):  # type: ignore[no-untyped-def]
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise ValueError("the server redirects to what is no http or https URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@lru_cache
def opener(private_hosts: bool) -> urllib.request.OpenerDirector:
    """Opens `http` and `https` URLs and no other."""
    found = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
        _Handler(private_hosts=private_hosts),
    ):
        found.add_handler(handler)
    return found
