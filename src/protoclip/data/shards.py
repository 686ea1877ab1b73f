"""Tar shards: which files a pattern names, the samples in one, and an index for random access.

The layout is WebDataset's: `000.jpg`, `000.txt` and `000.json` are one sample with the key `000`.
Nothing is ever unpacked to a file, whatever a member's name says.
"""

import glob
import io
import json
import multiprocessing
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from braceexpand import braceexpand

from protoclip.config import DataConfig
from protoclip.data.access import (
    digest,
    files_like,
    fingerprint,
    is_url,
    list_urls,
    reason_of,
    require_allowed,
)
from protoclip.data.index import ROWS, ArrowIndex, build_index, index_folder
from protoclip.data.pairs import LOST, ImageTextPairs
from protoclip.data.tables import caption_columns, captions_in, pairs_of
from protoclip.files import open_local
from protoclip.progress import Progress
from protoclip.terminal import visible, without_secrets

IMAGES, TEXTS = frozenset({"jpg", "jpeg", "png", "webp", "gif"}), frozenset({"txt", "json"})
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma"}  # and who reads it
# A larger image or text is not read. A longer name, or a larger file of any kind, is damage.
MAX_MEMBER_BYTES, MAX_NAME_BYTES, MAX_SKIPPED_BYTES = 1 << 28, 1 << 20, 1 << 36
# Part of the key of every index. Change it when the rows or facts change.
INDEX_FORM = "tar shards, 4"
ROWS_FORM = "tar shards, 3"  # of the rows alone, by which stores know images
MAX_SHARDS = 1_000_000  # that a pattern may name
PARALLEL_FROM = 8  # this many shards are indexed by several processes
# Where the image is in the tar; null if there is none.
SHARD_ROWS = pa.schema([*ROWS.remove(0), ("offset", pa.int64()), ("size", pa.int64())])
SET_ROWS = SHARD_ROWS.append(pa.field("image", pa.dictionary(pa.int32(), pa.string())))
NOT_ENOUGH = "unexpected end of data"


class Member(tarfile.TarInfo):
    """A file in a tar, with its content if that was read. A damaged header is an error here,
    where `tarfile` takes it for the end of the tar."""

    data: bytes | None = None

    # Not `frombuf`, which Python 3.13.5 does not call.
    @classmethod
    def fromtarfile(cls, tar: Any) -> "Member":
        buf = tar.fileobj.read(tarfile.BLOCKSIZE)
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(NOT_ENOUGH)
        member = cls._plain(buf, tar.encoding, tar.errors)
        if member is None:
            try:
                member = cls.frombuf(buf, tar.encoding, tar.errors)
            except tarfile.HeaderError:
                if not any(buf):
                    raise  # the end of the tar
                raise tarfile.ReadError("damaged header") from None
        member.offset = tar.fileobj.tell() - tarfile.BLOCKSIZE
        return member._proc_member(tar)

    def _proc_member(self, tar: Any) -> "Member":
        # A header that brings a long name is read into memory, whatever size it claims to have.
        is_name = self.type in b"xgXLK"
        if self.size < 0 or (is_name and self.size > MAX_NAME_BYTES):
            raise tarfile.ReadError("damaged header")
        member: Member = super()._proc_member(tar)  # type: ignore[misc]
        return member

    @classmethod
    def _plain(cls, buf: bytes, encoding: str, errors: str) -> "Member | None":
        """Name and size from the header of an ordinary file; `tarfile` would parse ten more fields,
        which takes most of the time that an index takes."""
        with suppress(ValueError):
            checksum = sum(buf) - sum(buf[148:156]) + 8 * ord(" ")
            if buf[156:157] == tarfile.REGTYPE and int(buf[148:156].strip(b"\0 "), 8) == checksum:
                member = cls()
                member.size = int(buf[124:136].strip(b"\0 "), 8)
                parts = (buf[345:500].split(b"\0")[0], buf[:100].split(b"\0")[0])
                member.name = b"/".join(filter(None, parts)).decode(encoding, errors)
                return member
        return None


class _Forward:
    """What `tarfile` asks of a file, for one that can only be read onwards."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.file, self.position = file, 0

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.position += len(data)
        return data

    def seek(self, position: int) -> None:
        while position > self.position and self.read(min(position - self.position, 1 << 20)):
            pass


@dataclass(frozen=True, kw_only=True)
class ShardSample:
    """A sample as a shard holds it; `fault` says why the shard ends with it, if it breaks off.

    `files` are its files by extension, where `read_samples` is asked for a further one.
    """

    sample_id: str
    captions: list[bytes]
    image: Member | None = None
    fault: str = ""
    files: Mapping[str, Member] = field(default_factory=dict)


def shard_stem(shard: str) -> str:
    """The file name without `.tar` and what follows; the last such name in a URL."""
    names = re.findall(r"([^/\\\s'\"=]+?)\.(?:tar|tgz|tbz|txz)\b", shard)
    return str(names[-1]) if names else re.split(r"[/\\]", shard.rstrip("/"))[-1]


def split_name(name: str) -> tuple[str, str]:
    """The key and the lower-case extension; both empty for files that WebDataset ignores.

    >>> split_name("./a.b/000.seg.PNG")
    ('a.b/000', 'seg.png')
    """
    parts = re.fullmatch(r"(?:\./)*((?:.*/|)[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return (parts[1], parts[2].lower()) if parts else ("", "")


def read_samples(
    file: io.BufferedIOBase,
    stem: str,
    caption_keys: Sequence[str] | None = None,
    *,
    stream: bool,
    beside: str | None = None,
    unnamed: Counter[str] | None = None,
) -> Iterator[ShardSample]:
    """The samples of an uncompressed tar, each made of consecutive files with one key.

    Ids start with `stem`. Captions are in the `.json` under `caption_keys`, or if that is None in
    the `.txt`, or without one under the first of the usual keys that is there. A stream is read
    front to back, images included; otherwise images are skipped by seeking. With `beside`,
    samples are images and files with that extension, such as `cls`, not captions. `unnamed` counts
    the images of keys that have them only behind a second dot, as in `dog.1.jpg`.

    Raises `ValueError` if it is not a tar; an error of `file` at the beginning is raised as it is.
    """
    texts = TEXTS if beside is None else {beside}
    members = _Members(file, texts, stream)
    key, files, before, number = "", dict[str, Member](), set[str](), 0

    def make_sample() -> ShardSample:
        sample = _sample(stem, key, files, caption_keys)
        return sample if beside is None else replace(sample, files=files)

    for next_key, kind, member in members:
        used = kind in IMAGES or kind in texts
        if unnamed is not None and kind.rpartition(".")[2] in IMAGES:
            if used:
                unnamed.pop(next_key, None)
            elif next_key != key or IMAGES.isdisjoint(files):
                unnamed[next_key] += 1
        # A second file of one kind starts another sample. It has the same id and is refused.
        if used and files and (next_key != key or kind in files):
            yield make_sample()
            before, files, number = set(files), {}, number + 1
        if used:
            key, files[kind] = next_key, member
    cut = split_name(members.reading)[0]
    # The last sample counts if a later file had begun, or it has all parts that the one before had.
    if files and (not members.fault or (key != cut if cut else set(files) == before)):
        yield make_sample()
        files, number = {}, number + 1
    if members.fault:
        file_name = f" in {visible(members.reading[:200])}" if members.reading else ""
        reason = f"{members.fault}{file_name} after {number} samples; the rest {LOST}"
        sample_id = _sample_id(stem, key if files else cut)
        yield ShardSample(sample_id=sample_id, captions=[], fault=reason)


class _Members:
    """The key, the extension and the file of each member of a tar.

    Files with `texts` have their content, and in a stream images, too.

    Attributes:
        fault: Why iteration ended before the tar did, if so.
        reading: The name of the file that was being read then.
    """

    def __init__(self, file: io.BufferedIOBase, texts: Set[str], stream: bool) -> None:
        self.source: Any = _Forward(file) if stream else file
        self.read = IMAGES | texts if stream else texts
        self.fault = self.reading = ""
        options: dict[str, Any] = {"fileobj": self.source, "tarinfo": Member}
        options |= {"encoding": "utf-8", "errors": "backslashreplace"}
        try:
            self.tar: Any = tarfile.TarFile(**options)
        except tarfile.TarError as error:
            raise ValueError("not a tar file") from error

    def __iter__(self) -> Iterator[tuple[str, str, Member]]:
        try:
            while (member := self.tar.next()) is not None:
                self.tar.members.clear()  # or tarfile would keep all headers
                skipped = self.tar.offset - member.offset_data
                if member.size < 0 or not 0 <= skipped <= MAX_SKIPPED_BYTES:
                    raise tarfile.ReadError("damaged header")
                if not member.isreg() or member.issparse():
                    continue  # nothing opens what a link or device names
                self.reading, size = member.name, member.size
                key, kind = split_name(member.name)
                if size <= MAX_MEMBER_BYTES and kind in self.read:
                    member.data = self.source.read(size)
                    if len(member.data) < size:
                        raise tarfile.ReadError(NOT_ENOUGH)
                elif size:
                    self.source.seek(member.offset_data + size - 1)
                    if not self.source.read(1):
                        raise tarfile.ReadError(NOT_ENOUGH)
                self.reading = ""
                yield key, kind, member
        except Exception as error:
            self.fault = reason_of(error)


def _sample_id(*parts: str) -> str:
    return "/".join(filter(None, parts)).encode("utf-8", "backslashreplace").decode()


def _sample(
    stem: str, key: str, files: dict[str, Member], caption_keys: Sequence[str] | None
) -> ShardSample:
    texts = {kind: file.data or b"" for kind, file in files.items() if kind in TEXTS}
    record: Any = {}
    if "json" in texts:
        with suppress(ValueError, RecursionError):  # a damaged one has no caption
            record = json.loads(texts["json"])
    plain = "txt" in texts and caption_keys is None
    captions = [texts["txt"]] if plain else captions_in(record, caption_keys or ())
    name = record.get("sample_id") if isinstance(record, dict) else None
    parts = (name,) if name and isinstance(name, str) else (stem, key)
    images = (file for kind, file in files.items() if kind in IMAGES)
    image = next((image for image in images if image.size <= MAX_MEMBER_BYTES), None)
    return ShardSample(sample_id=_sample_id(*parts), captions=captions, image=image)


def expand_shards(pattern: str) -> list[str]:
    """The shards that a pattern names, sorted.

    A pattern is a path or URL with `{00000..00331}` for a range, `{a,b}` for alternatives, and `*`
    where files can be listed (not on a web server); a folder, or a URL that ends in `/`, for its
    `*.tar`.

    Raises `ValueError` if nothing matches, a local file is missing, a location is not allowed, the
    braces stand for more than a million names, or two shards would give their samples the same ids.
    """
    label = without_secrets(pattern)
    if (number := number_of_names(pattern)) > MAX_SHARDS:
        raise ValueError(f"{label}: the braces stand for {number:,} shards; name fewer")
    try:
        # Unlike a `Path`, it may be of any length.
        exists = os.path.exists(pattern)  # noqa: PTH110
        names = [pattern] if exists else list(braceexpand(pattern))
    except ValueError:
        raise ValueError(f"{label}: the braces do not pair up") from None
    shards = sorted({shard for name in names for shard in _expand(name)})
    if not shards:
        raise ValueError(f"{label}: no tar shard matches")
    stems: dict[str, str] = {}
    for shard in shards:
        other = stems.setdefault(shard_stem(shard), shard)
        if other != shard:
            raise ValueError(
                f"{visible(shard)}: has the file name of {visible(other)}, and sample ids start "
                "with it; rename one, or list them as two [[data.sources]], each with a name of "
                "its own"
            )
    return shards


def number_of_names(pattern: str) -> int:
    """How many names the braces of a pattern stand for, which is known before any is made.

    Of letters with a step, or of both cases, it is more than there are.

    >>> number_of_names("{a,b}/{000..331}.tar")
    664
    """
    levels = [[0, 1]]  # names of the alternatives before, and of this one so far
    numbers = r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}"
    letters = r"\{([A-Za-z])\.\.([A-Za-z])(?:\.\.-?\d+)?\}"
    for sign in re.finditer(rf"\\.|{numbers}|{letters}|[{{}},]", pattern, re.DOTALL):
        first, last, step, letter, end = sign.groups()
        if first is not None:
            size = sys.maxsize
            if len(sign[0]) < 100:  # Python makes no number of thousands of digits
                size = abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
            levels[-1][1] *= size
        elif letter is not None:
            levels[-1][1] *= abs(ord(end) - ord(letter)) + 1
        elif sign[0] == "{":
            levels.append([0, 1])
        elif sign[0] == "}" and len(levels) > 1:
            inner = sum(levels.pop())
            levels[-1][1] *= inner
        elif sign[0] == "," and len(levels) > 1:
            levels[-1] = [sum(levels[-1]), 1]
    return levels[0][1]


def _expand(name: str) -> list[str]:
    try:
        require_allowed(name)
        if is_url(name) and ("*" in name or name.endswith("/")):
            return list_urls(f"{name}*.tar" if name.endswith("/") else name)
    except Exception as error:  # every store has its own errors
        raise ValueError(f"{without_secrets(name)}: {reason_of(error)}") from None
    if is_url(name):
        return [name]
    path = Path(name).expanduser()
    if path.exists():
        return [*map(str, files_like(path, "*.tar"))] if path.is_dir() else [str(path)]
    if re.search(r"[*?[]", name):
        return glob.glob(str(path))  # noqa: PTH207 (an absolute pattern)
    raise ValueError(f"{name}: no such file")


def open_shards(data: DataConfig, *, name: str | None = None) -> ImageTextPairs:
    """Open the local tar shards `data.train`. New and changed shards are indexed first.

    `.notes` says what is wrong with them. See `expand_shards` and `read_samples`; `name` is what
    messages call the pairs.

    Raises `ValueError` if a shard is missing, remote, compressed or not a tar, if two samples share
    an id, or if there is no sample.
    """
    pattern, folder = data.train, index_folder()
    captions = caption_columns(data) or None
    links = expand_shards(pattern)
    paths = [str(Path(link).resolve()) for link in links]
    with ThreadPoolExecutor(16) as pool:  # most of the time goes into waiting for the disk
        prints = list(pool.map(fingerprint, paths))
    # Ids begin with the name of a link: a hub's cache links to files that are named by a hash.
    stems = [shard_stem(link) for link in links]

    def keys_in(form: str) -> list[str]:
        settings = {"form": form, "captions": captions}
        facts = [
            {"shard": value} if stem == shard_stem(path) else {"shard": value, "stem": stem}
            for value, stem, path in zip(prints, stems, paths, strict=True)
        ]
        shard_keys = [digest({**settings, **value}) for value in facts]
        return [*shard_keys, digest({**settings, "shards": shard_keys})]

    *_, key = keys_in(ROWS_FORM)
    *keys, key_of_set = keys_in(INDEX_FORM)
    shards = list(zip(paths, stems, keys, strict=True))
    index_one = partial(_index_shard, caption_keys=captions, folder=folder)
    join = partial(_join_indexes, shards, index_one)
    way_out = "name the files of a sample as in 000.jpg, 000.txt"
    index = build_index(key_of_set, join, folder=folder, label=pattern, way_out=way_out)
    way_out = "keys must differ, and the files of a sample follow each other (tar --sort=name)"
    data, name = replace(data, root=None), name or pattern
    return pairs_of(index, data, key=key, label=paths[0], name=name, root="", way_out=way_out)


def _index_shard(
    shard: tuple[str, str, str], *, caption_keys: Sequence[str] | None, folder: Path
) -> ArrowIndex:
    """The index of one shard, given its path, its stem and its key."""
    path, stem, key = shard

    def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        unnamed = Counter[str]()
        with open_local(path) as file:
            if file.peek(6).startswith(tuple(COMPRESSED)):
                raise ValueError(f"{path}: is compressed; stream it, or unpack it once (gunzip)")
            try:
                read = read_samples(file, stem, caption_keys, stream=False, unnamed=unnamed)
                samples = list(read)
            except Exception as error:
                raise ValueError(f"{path}: {reason_of(error)}") from None
        if samples and samples[-1].fault:
            facts["notes"] = [f"{path}: {samples.pop().fault}"]
        if unnamed:
            facts["unnamed"] = [unnamed.total(), f"{path}: {visible(min(unnamed))}"]
        images = [s.image for s in samples]
        columns = {
            "sample_id": [s.sample_id for s in samples],
            "caption": [s.captions for s in samples],
            "offset": [image and image.offset_data for image in images],
            "size": [image and image.size for image in images],
        }
        yield pa.RecordBatch.from_pydict(columns, SHARD_ROWS)

    return build_index(key, build, folder=folder, label=path, way_out="")


def _join_indexes(
    shards: Sequence[tuple[str, str, str]], index_one: Any, facts: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The rows of every shard, with its path in a further column."""
    if len(shards) >= PARALLEL_FROM:
        # A forked process does not import PyTorch again.
        fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        progress = Progress(f"Indexing {len(shards)} shards", len(shards))
        with ProcessPoolExecutor(cores, multiprocessing.get_context(fork)) as pool:
            for done, _ in enumerate(pool.map(index_one, shards), 1):
                progress.update(done)
    # One index is open at a time: there may be more shards than a process may have open files.
    names = pa.array([path for path, *_ in shards], pa.string())
    faults, unnamed = list[str](), list[Any]()
    for number, shard in enumerate(shards):
        index = index_one(shard)
        index.check()
        faults += index.notes
        unnamed += [index.facts["unnamed"]] if "unnamed" in index.facts else []
        for batch in index.table.to_batches():
            rows = pa.array(np.full(len(batch), number, dtype=np.int32))
            column = pa.DictionaryArray.from_arrays(rows, names)
            yield pa.RecordBatch.from_arrays([*batch.columns, column], schema=SET_ROWS)
    facts["notes"] = [
        f"{len(faults)} of {len(shards)} shards break off, such as {fault}" for fault in faults[:1]
    ]
    for _, example in unnamed[:1]:
        number = sum(count for count, _ in unnamed)
        facts["left_out"] = [
            f"{number:,} image(s) are left out, such as {example}.*.jpg: the name of a sample ends "
            "at its first dot; rename them, as in 000-1.jpg"
        ]
