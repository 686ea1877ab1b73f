"""Where data may be read from; the one place that opens a path or a URL of theirs.

Tables, recipes and manifests may come from somebody else. What they name is held against a list of
protocols; a local path in a table has to lie below the table's root; only regular files are opened;
and what is not on this machine gets so much time. `docs/security.md` says what is trusted.
"""

import io
import os
import stat
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import fsspec

from protoclip.data import web
from protoclip.data.web import WebFile

T = TypeVar("T")
WEB = ("https", "http")
STORES = ("s3", "gs", "hf")
# No sample's file is larger: more is taken for a mistake or an attack, and not read.
MAX_FILE_BYTES = 1 << 28
# Bytes read ahead from a web server; bytes of a request to another store.
READ_BYTES, REQUEST_BYTES = 1 << 20, 1 << 24
# What stores call the facts that change with a file, in lower case.
URL_FACTS = (
    *("size", "etag", "checksum", "md5", "md5hash", "mtime", "created", "updated"),
    *("last_modified", "lastmodified", "last-modified"),
)
# Characters that turn the direction in which text is shown.
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass(frozen=True, kw_only=True)
class Access:
    """What the user allows beyond reading data: the settings `data.allow_*`.

    Attributes:
        commands: `pipe:COMMAND` is run.
        private_hosts: Web servers on this machine and in private networks are asked.
        links: Symbolic links below a table's root may lead out of it.
    """

    commands: bool = False
    private_hosts: bool = False
    links: bool = False


NOTHING_MORE = Access()


def is_url(path: str) -> bool:
    return "://" in path


def join(root: str, name: str) -> str:
    """A name below a folder or URL; an absolute path or URL stays as it is."""
    if not root or is_url(name) or Path(name).is_absolute():
        return name
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root) / name)


def require_allowed(location: str, access: Access) -> None:
    """Refuse a path, URL or command that data are not read from.

    Raises:
        ValueError: With the reason, and the way out.
    """
    if location.startswith("pipe:"):
        if not access.commands:
            raise ValueError(
                "commands are run only where the command line says --data.allow_commands true"
            )
        return
    protocol, is_remote, rest = location.partition("://")
    if not is_remote:
        return
    if protocol.lower() not in WEB + STORES:
        raise ValueError(
            f"'{protocol}://' is not read; use a local file or one of {', '.join(WEB + STORES)}"
        )
    address, bracket, behind = rest.partition("]")  # an IPv6 address has "::"
    if "::" in (behind if bracket and address.startswith("[") else rest):
        raise ValueError("URLs chained with '::' are not read")


def in_table(root: str, name: str, access: Access) -> str:
    """The location that a table's cell means.

    Args:
        root: Folder or URL that the table's paths start from, and have to lie below.
        name: The cell.
        access: What the user allows.

    Raises:
        ValueError: The cell names what it may not.
    """
    if name.startswith("pipe:"):
        raise ValueError("a table runs no command")
    if is_url(name):
        require_allowed(name, access)
        return name
    if is_url(root):
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"lies outside of {root}")
        return join(root, name)
    real = os.path.realpath(join(root, name))
    if is_below(real, real_root(root)):
        return real
    path = os.path.abspath(join(root, name))  # noqa: PTH100 (links are not to be resolved here)
    if not is_below(path, os.path.abspath(root)):  # noqa: PTH100
        raise ValueError(
            f"lies outside of {root or 'the current folder'}, where the table's paths start; "
            "set data.root to the folder that holds the images (--data.root /)"
        )
    if not access.links:
        raise ValueError(
            f"is a link to {real}, outside of {root or 'the current folder'}; "
            "--data.allow_links true lets links lead there"
        )
    return path


@lru_cache(16)
def real_root(root: str) -> str:
    return os.path.realpath(root)


def is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def open_file(location: str, access: Access) -> io.BufferedReader:
    """A file or URL, to read in any order where its server can.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read.
        ValueError: It may not be read, or is no regular file.
        Exception: Of a store's own client; `ImportError` where that is missing.
    """
    require_allowed(location, access)
    protocol, is_remote, rest = location.partition("://")
    if not is_remote:
        return open_local(location)
    location = f"{protocol.lower()}://{rest}"
    if protocol.lower() in WEB:
        raw = WebFile(location, private_hosts=access.private_hosts)
        return io.BufferedReader(raw, READ_BYTES)
    filesystem, path = fsspec.core.url_to_fs(location)
    return io.BufferedReader(filesystem.open(path, "rb", block_size=REQUEST_BYTES), READ_BYTES)


def open_local(path: str | Path) -> io.BufferedReader:
    """A regular file, never anything that may block or has no end.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is something else.
    """
    require_regular(os.stat(path))  # noqa: PTH116 (opening a device may do something)
    # What was put in its place in the meantime does not block either.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        require_regular(os.fstat(number))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def require_regular(status: os.stat_result) -> None:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"is {kinds.get(kind, 'something else')}, not a file")


def read_file(location: str, access: Access) -> bytes:
    """The whole content of a sample's file, of at most `MAX_FILE_BYTES`.

    Raises:
        Exception: As `open_file`; `TimeoutError` after `Limits.total` seconds; `ValueError` where
            it is larger.
    """

    def read() -> bytes:
        with open_file(location, access) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"has more than {MAX_FILE_BYTES} bytes")
        return data

    return within(web.LIMITS.total, read) if is_url(location) else read()


def within(seconds: float, action: Callable[[], T]) -> T:
    """Do it in so much time. A thread that takes longer is left to the limits of its library.

    Raises:
        TimeoutError: It took longer.
        Exception: What the action raised.
    """
    done: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((action(), None))
        except BaseException as error:
            done.put((None, error))

    Thread(target=run, name="protoclip-read", daemon=True).start()
    try:
        found, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"not read within {seconds:g} s") from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


def url_facts(url: str, access: Access) -> dict[str, Any]:
    """What tells one state of a URL's content from another; raises like `open_file`."""
    require_allowed(url, access)
    if url.partition("://")[0].lower() in WEB:
        with WebFile(url, private_hosts=access.private_hosts) as file:
            return file.facts
    filesystem, path = fsspec.core.url_to_fs(url)
    return {k: v for k, v in filesystem.info(path).items() if k.lower() in URL_FACTS}


def list_urls(pattern: str, access: Access) -> list[str]:
    """The URLs of a store that a pattern with `*` names; raises like `open_file`."""
    require_allowed(pattern, access)
    if pattern.partition("://")[0].lower() in WEB:
        raise ValueError(
            "a web server does not say what it holds; name the files with braces, as in "
            "{00000..00099}.tar"
        )
    filesystem, path = fsspec.core.url_to_fs(pattern)
    return list(map(filesystem.unstrip_protocol, filesystem.glob(path)))


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its kind."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    lines = str(error).strip().split("\n")
    return lines[0].strip()[:200] or type(error).__name__


def visible(text: str) -> str:
    """A text with the characters escaped that a terminal would obey, or that end a line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in TURNING
        else letter
        for letter in text
    )
