"""Where data may be read from: the one place that opens a path or URL that data name.

Tables and recipes may come from a stranger. URLs are checked against a list of protocols, local
paths in a table must lie below its root, a table's images are not fetched from the web, only
regular files are opened, and everything remote has a time limit. `docs/security.md` has the rules.
The folder of the cache is named here, too.
"""

import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, TypeVar

import fsspec
import httpx2 as httpx

from protoclip.config import NO_COMMANDS
from protoclip.files import checksum, open_local, replacing
from protoclip.terminal import REMOVED, visible, without_secrets

T = TypeVar("T")
WEB, STORES = ("https", "http"), ("s3", "gs", "hf")
NO_WEB_IMAGES = "images on the web are not read; download them with img2dataset, as tar shards"
MAX_FILE_BYTES = 1 << 28  # a larger file of one sample is a mistake or an attack
READ_BYTES, REQUEST_BYTES = 1 << 20, 1 << 24
# Seconds to wait for a connection, for the next bytes, and for the whole file of one sample; how
# often a request is made, and the first pause between two tries (each is twice the last).
CONNECT_SECONDS, SILENCE_SECONDS, TOTAL_SECONDS, TRIES, PAUSE_SECONDS = 3.0, 20.0, 60.0, 3, 0.5
HUB_SECONDS = 3.0  # to wait for the hub's answer
# How long one thing after another may be tried and not read: then it is the network, or the store.
PATIENCE_SECONDS = 600.0
GO_ON = "check the network, and give the same command again (a run: with --resume auto)"
KEYS = (
    "check the credentials that its client finds (of s3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY; FSSPEC_S3_ANON=true reads what is public)"
)
MISSING = "no such file"  # the reason of what is not there
# What botocore says, and raises, without importing it.
NO_BUCKET = "The specified bucket does not exist"
WITHOUT_KEYS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
# What stores call the facts that change with a file, in lower case.
URL_FACTS = {"size", "etag", "checksum", "md5", "md5hash", "mtime", "created", "updated"}
URL_FACTS |= {"last_modified", "lastmodified", "last-modified", "content-length"}


def is_url(path: str) -> bool:
    return "://" in path


def is_web(path: str) -> bool:
    return path.partition("://")[0].lower() in WEB and is_url(path)


def cache_folder() -> Path:
    """`$PROTOCLIP_CACHE`, or `protoclip` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PROTOCLIP_CACHE") or Path(user) / "protoclip")


def index_folder() -> Path:
    return cache_folder() / "index"


def explain_unwritable(folder: Path, error: OSError) -> ValueError:
    """An error for a folder, such as the cache, that cannot be written to."""
    is_cache = folder.is_relative_to(cache_folder())
    way_out = "set PROTOCLIP_CACHE to another" if is_cache else "choose another place"
    return ValueError(f"{folder}: cannot be written ({error.strerror or error}); {way_out}")


def join(root: str, name: str) -> str:
    """A name below a folder or URL; an absolute path or URL stays as it is."""
    if not root or is_url(name) or Path(name).is_absolute():
        return name
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root) / name)


def require_allowed(location: str, *, protocols: tuple[str, ...] = WEB + STORES) -> None:
    """Raises `ValueError`, with the way out, for a path, URL or command that may not be read."""
    if location.startswith("pipe:"):
        raise ValueError(NO_COMMANDS)
    protocol, is_remote, rest = location.partition("://")
    if is_remote and (rest.startswith(f"{REMOVED}@") or rest.endswith(f"?{REMOVED}")):
        raise ValueError(
            f"'{REMOVED}' stands for a user, password or query, which no run keeps; name the whole "
            "URL again, as when the run began"
        )
    if is_remote and protocol.lower() not in protocols:
        names = ", ".join(protocols)
        raise ValueError(f"'{protocol}://' is not read; use a local file or one of {names}")
    # An IPv6 address contains "::".
    if is_remote and "::" in re.sub(r"^\[[^\[\]]*\]", "", rest):
        raise ValueError("URLs chained with '::' are not read")


def resolve_cell(root: str, name: str, *, allow_links: bool) -> str:
    """The path or URL that a table's cell names; raises `ValueError` if it may not name it."""
    if is_web(join(root, name)):
        raise ValueError(NO_WEB_IMAGES)
    if is_url(name):
        require_allowed(name)
        return name
    if is_url(root):
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"lies outside of {root}")
        return join(root, name)
    real = os.path.realpath(join(root, name))
    folder = os.path.abspath(root)  # noqa: PTH100 (links stay as they are)
    if real.startswith(f"{_real(folder).rstrip(os.sep)}{os.sep}"):
        return real
    path = os.path.abspath(join(root, name))  # noqa: PTH100
    if not path.startswith(f"{folder.rstrip(os.sep)}{os.sep}"):
        way_out = "set --root to a folder above it (/ is one), or ,root= behind a data set"
        if not os.path.isabs(name):  # noqa: PTH117
            above = os.path.commonpath([folder, path])
            inside = os.path.relpath(path, above)
            way_out = f"set --root or ,root= to {above}, and write {inside}"
        raise ValueError(f"lies outside of the folder where paths start; {way_out}")
    if not allow_links:
        raise ValueError(f"is a link that leads out; --allow_links true follows it, to {real}")
    return path


_real = lru_cache(16)(os.path.realpath)  # of a root, which every row asks for


def open_file(location: str) -> io.BufferedReader:
    """A file or URL, to be read from its start.

    Raises `OSError` if it cannot be read, `ValueError` if it may not be read or is no regular
    file, or any exception of a store's own client.
    """
    require_allowed(location)
    if not is_url(location):
        return open_local(location)
    if is_web(location):
        return io.BufferedReader(WebFile(location), READ_BYTES)
    filesystem, path = _store(location)
    filesystem.invalidate_cache(path)  # or it would be as long as when it was listed
    return io.BufferedReader(filesystem.open(path, "rb", block_size=REQUEST_BYTES), READ_BYTES)


def _store(url: str) -> tuple[Any, str]:
    """The client of a store, and the path that it knows a URL by."""
    protocol, _, rest = url.partition("://")
    store: tuple[Any, str] = fsspec.core.url_to_fs(f"{protocol.lower()}://{rest}")
    return store


def read_file(location: str) -> bytes:
    """The file of one sample; raises as `open_file`, if it is too large, or after a minute."""

    def read() -> bytes:
        if is_url(location) and not is_web(location):
            require_allowed(location)
            filesystem, path = _store(location)
            data: bytes = filesystem.cat_file(path, start=0, end=MAX_FILE_BYTES + 1)
        else:
            with open_file(location) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"has more than {MAX_FILE_BYTES} bytes")
        return data

    return run_within(TOTAL_SECONDS, read) if is_url(location) else read()


def download(location: str, copy: Path) -> None:
    """Copy a file or URL to a place where it appears whole or not at all; raises as `open_file`."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    opened = open_file(location)
    with opened as source, replacing(copy) as scratch, scratch.open("wb") as target:
        shutil.copyfileobj(source, target, READ_BYTES)


def read_range(path: str, offset: int, size: int) -> bytes:
    """Some bytes of a local file; raises `ValueError` if it ends before them, or for too many."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"has more than {MAX_FILE_BYTES} bytes")
    with open_local(path) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"ends after {len(data)} of {size} bytes")
    return data


def run_within(seconds: float, action: Callable[[], T]) -> T:
    """The result of an action, or `TimeoutError`; its thread then goes on by itself."""
    coming = start_thread(action, name="protoclip-read")
    if not wait([coming], timeout=seconds).done:
        raise TimeoutError(f"not read within {seconds:g} s")
    return coming.result()


def start_thread(action: Callable[[], T], *, name: str) -> "Future[T]":
    """Begin an action in a daemon thread, which keeps no process from ending if it hangs."""
    coming: Future[T] = Future()

    def run() -> None:
        try:
            coming.set_result(action())
        except BaseException as error:
            coming.set_exception(error)

    Thread(target=run, name=name, daemon=True).start()
    return coming


def hub_answer(question: Callable[..., T]) -> T | Exception | None:
    """What a method of `HfApi` answers within seconds, or its refusal; None without a network."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return run_within(HUB_SECONDS, partial(question, timeout=HUB_SECONDS))
    except errors.HfHubHTTPError as refusal:
        return refusal
    except Exception:  # no network, in one of many ways
        return None


def digest(facts: Mapping[str, Any]) -> str:
    """A short name for a set of facts."""
    return checksum(json.dumps(facts, sort_keys=True, default=str).encode())


def fingerprint(path: str) -> str:
    """Identifies the content of a file (by size, time, both ends) or URL (by its headers).

    The query of a URL counts where no ETag tells the content; elsewhere it may be a signature.
    Raises `ValueError`, which names it, if it cannot or may not be read.
    """
    try:
        require_allowed(path)
        if is_url(path):
            said: Mapping[str, Any]
            if is_web(path):
                with WebFile(path) as web:
                    said = web.headers
            else:
                filesystem, place = _store(path)
                filesystem.invalidate_cache(place)
                said = run_within(TOTAL_SECONDS, partial(filesystem.info, place))
            facts = {name: value for name, value in said.items() if name.lower() in URL_FACTS}
            has_etag = any(name.lower() == "etag" for name in facts)
            return digest({"url": path.partition("?")[0] if has_etag else path, **facts})
        with open_local(path) as file:
            status = os.fstat(file.fileno())
            start = file.read(1 << 16)
            file.seek(max(0, status.st_size - (1 << 16)))
            ends = checksum(start + file.read())
    except Exception as error:  # the clients of stores have exceptions of their own
        raise ValueError(f"{without_secrets(path)}: {describe_error(error)}") from None
    facts = {"path": str(Path(path).resolve()), "size": status.st_size, "ends": ends}
    return digest({**facts, "time": status.st_mtime_ns})


def files_like(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, sorted, without hidden ones as of macOS."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def list_urls(pattern: str) -> list[str]:
    """The URLs of a store that match a pattern with `*`; raises as `open_file` does."""
    if is_web(pattern):
        raise ValueError(
            "a web server does not say what it holds; name the files with braces, as in "
            "{00000..00099}.tar"
        )
    filesystem, path = _store(pattern)
    filesystem.invalidate_cache()
    return list(map(filesystem.unstrip_protocol, filesystem.glob(path)))


def too_slow(what: str, last: object) -> str:
    """One line on what was tried for longer than `PATIENCE_SECONDS`, with the last that failed."""
    minutes = f"{PATIENCE_SECONDS / 60:g}"
    return f"{what} took over {minutes} minutes and could not be read, such as {last}; {GO_ON}"


def describe_error(error: BaseException) -> str:
    """`first_line`, and what to do where a store's client finds no credentials, or wrong ones."""
    refused = isinstance(error, PermissionError) and error.errno is None  # not by the system
    refused |= type(error).__name__ in WITHOUT_KEYS
    return f"{first_line(error)}{f'; {KEYS}' if refused else ''}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the exception's name."""
    text = str(error).strip().split("\n")[0].strip()
    if isinstance(error, FileNotFoundError):
        return text if text == NO_BUCKET else MISSING
    return visible(text[:200]) or type(error).__name__


class WebFile(io.RawIOBase):
    """The bytes behind an `http` or `https` URL, in order.

    A request that may succeed later is repeated, and reading continues after a broken connection.
    Raises as `open_file` does, also while reading.
    """

    answered: ClassVar[set[str]] = set()  # hosts that have answered this process

    def __init__(self, url: str) -> None:
        headers = {"User-Agent": "protoclip", "Accept-Encoding": "identity"}
        limits = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        self.client = httpx.Client(follow_redirects=True, headers=headers, timeout=limits)
        self.url, self.position = url, 0
        self.unread = b""  # of a chunk that came
        self.response: httpx.Response | None = None
        self.headers: Mapping[str, str] = self._repeat(self._connect).headers

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.unread = self.unread or self._repeat(self._read_chunk)
        data, self.unread = self.unread[: len(buffer)], self.unread[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.client.close()
        super().close()

    def _connect(self) -> httpx.Response:
        headers = {"Range": f"bytes={self.position}-"} if self.position else {}
        request = self.client.build_request("GET", self.url, headers=headers)
        self.response = self.client.send(request, stream=True)
        self.answered.add(request.url.host)
        self.response.raise_for_status()
        self.chunks: Iterator[bytes] = self.response.iter_raw()
        skip = self.position if self.response.status_code != httpx.codes.PARTIAL_CONTENT else 0
        while skip > 0:  # the server ignores `Range` and begins again at the start
            chunk = next(self.chunks)
            self.chunks = chain([chunk[skip:]] if chunk[skip:] else [], self.chunks)
            skip -= len(chunk)
        return self.response

    def _read_chunk(self) -> bytes:
        if self.response is None:
            self._connect()
        chunk = next(self.chunks, b"")
        self.position += len(chunk)
        return chunk

    def _repeat(self, action: Callable[[], T]) -> T:
        for number in range(1, TRIES + 1):
            try:
                return action()
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                if code in (404, 410):
                    raise FileNotFoundError(f"HTTP {code}") from None
                reason = f"HTTP {code} {error.response.reason_phrase}"
                may_pass = code >= 500 or code in (408, 425, 429)
            except httpx.TimeoutException as error:
                reason = "no answer in time"
                # A host that has never answered is rather a wrong one.
                is_known = httpx.URL(self.url).host in self.answered
                may_pass = is_known or not isinstance(error, httpx.ConnectTimeout)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                broken = (httpx.NetworkError, httpx.RemoteProtocolError)
                reason, may_pass = str(error), isinstance(error, broken)
            if self.response is not None:
                self.response.close()
                self.response = None
            if not may_pass:
                break
            if number < TRIES:
                time.sleep(PAUSE_SECONDS * 2 ** (number - 1))
        raise OSError(f"{reason}{f', {number} times' if number > 1 else ''}")
