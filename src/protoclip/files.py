"""Files that appear whole or not at all, their checksums, and JSON that every parser reads.

It is also the one place that opens a local file whose name somebody gave. URLs and what data name
are opened in `data/access.py`.
"""

import errno
import glob
import hashlib
import io
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from protoclip.terminal import OBEYED, say

QUIET_SECONDS = 10.0  # that a process waits for another without a word
SEAL = "checksum"  # key in a JSON object of the checksum of the rest
UNFINISHED = re.compile(r"\..+\.\d+\.tmp", re.ASCII | re.DOTALL)  # what `replacing` writes to


def open_local(path: str | Path) -> io.BufferedReader:
    """A regular file; raises `ValueError` for what may block or has no end, or `OSError`."""
    require_regular(path)
    return Path(path).open("rb")


def require_regular(path: str | Path) -> None:
    """Refuse what is no regular file, before a library opens it; raises as `open_local`."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("is a folder, pipe or device, not a file")


def open_to_append(path: Path) -> io.FileIO:
    """A file to add to, made if need be. Raises `OSError` for a link, which may lead anywhere."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link; put the file itself in its place", str(path))
    return path.open("ab", buffering=0)


def read_local(path: str | Path, *, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a regular file, every line ended as in Unix; raises as `open_local`."""
    with io.TextIOWrapper(open_local(path), encoding=encoding, errors=errors) as file:
        return file.read()


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file, text as UTF-8, under a temporary name, then rename it; raises as `replacing`.

    `durable` waits until the bytes are on the disk, so that they survive a power failure.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def left_by_killed(folder: Path) -> Iterator[Path]:
    """What `replacing` left in a folder when its process was killed; hidden folders are not ours.

    Nobody may be writing to the folder, or to those below it.
    """
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(top, name) for name in names if UNFINISHED.fullmatch(name))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error.

    Raises `OSError` that names `path` if it cannot be written; then it stays as it is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see `UNFINISHED`
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):  # or it would hide the error, which names the file
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an `OSError`, which errors of `write` and `fsync` do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def require_ours(path: Path, mark: str, way_out: str = "or give --overwrite") -> None:
    """Refuse to replace a file without the mark of what writes it."""
    if not path.exists():
        return
    with suppress(OSError, ValueError), open_local(path) as file:
        if mark.encode() in file.read(1 << 20):
            return
    raise ValueError(f"{path}: exists, and was not made by this command; choose another, {way_out}")


@contextmanager
def lock_path(
    folder: Path, *, way_out: str = "choose another place", wait: float = 0.0
) -> Iterator[None]:
    """Keep other processes from writing a folder or file, which need not exist yet.

    Raises `ValueError` if another one writes it for more than `wait` seconds.
    """
    from filelock import FileLock, Timeout

    real = folder.resolve()
    path = real.with_name(f".{real.name}.lock")
    if real.is_dir() and not os.access(real.parent, os.W_OK):  # as of a volume of a container
        path = real / ".lock"
    lock = FileLock(path, timeout=wait)
    with naming(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{folder}: another process writes here; wait for it, or {way_out}"
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Let one process after the other write a file; who waits for long says so, once a job.

    What `replacing` left of it, when its process was killed, is removed.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=QUIET_SECONDS)
    except Timeout:
        if not int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))):
            say(f"note: waiting for another process to finish with {path}")
        lock.acquire()
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power failure, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checksum(data: bytes) -> str:
    """The BLAKE2b digest of some bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_checksum(path: Path) -> str:
    """`checksum` of a file, which may be larger than memory."""
    with open_local(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of itself, which `has_changed` and `read_sealed` compare."""
    return {**content, SEAL: checksum(to_json(content).encode())}


def has_changed(content: Mapping[str, Any]) -> bool:
    """Whether an object has a checksum of itself, and is not what was written any more."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return SEAL in content and content[SEAL] != checksum(to_json(rest).encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """What `seal` made, from a JSON file, without its checksum; raises as `read_json`."""
    content = read_json(path)
    if SEAL not in content or has_changed(content):
        raise ValueError(f"{path}: damaged (not what was written: its checksum differs)")
    del content[SEAL]
    return content


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text. Numbers that are not finite become null, since JSON has no NaN or infinity.

    Characters that a terminal obeys are escaped, and so are halves of characters.
    """
    text = json.dumps(_finite(value), allow_nan=False, indent=indent, ensure_ascii=False)
    # `json` itself escapes those below space, so lines end only where it ends them.
    return OBEYED.sub(lambda x: x[0] if x[0] == "\n" else f"\\u{ord(x[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; raises `ValueError` that names a file that cannot be read."""
    try:
        value: dict[str, Any] = dict(json.loads(read_local(path)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, whose last one may be cut; none without a file."""
    lines = []
    # Texts may hold line breaks of Unicode's other than "\n".
    for line in read_local(path, errors="replace").split("\n") if path.exists() else ():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def read_toml(path: Path) -> dict[str, Any]:
    """The tree of a TOML file; raises as `read_json`."""
    try:
        return tomllib.loads(read_local(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
