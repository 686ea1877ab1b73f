"""Tar shards, indexed for random access, or read as an endless stream.

The layout is WebDataset's: `000.jpg`, `000.txt` and `000.json` are one sample with the key `000`.
Nothing is ever unpacked to a file. Local shards are indexed. Any can be streamed, front to back:
local or remote, compressed or not. The order of a stream is a pure function of the seed, the
shards, and how many lanes they are dealt to. The stream remembers in which shard each block of
samples begins, so a run resumes without reading what came before.
"""

import glob
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
from braceexpand import braceexpand

from protoclip.config import DataConfig
from protoclip.data import access, tables
from protoclip.data.pairs import (
    LOST,
    BadSample,
    Facts,
    ImageTextPairs,
    Sample,
    SampleStream,
    clean_captions,
    evenly_spaced,
)
from protoclip.data.sampler import BLOCK_STREAM, SHARD_STREAM, generator
from protoclip.data.split import Chosen
from protoclip.files import checksum, open_local, to_json
from protoclip.progress import Progress
from protoclip.terminal import visible, without_secrets

Item = Sample | BadSample
# The number of the first sample, and the samples in the order they were read.
Block = tuple[int, list[Item]]
IMAGES, TEXTS = frozenset({"jpg", "jpeg", "png", "webp", "gif"}), frozenset({"txt", "json"})
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma"}  # and who reads it
# A larger image or text is not read. A longer name, or a larger file of any kind, is damage.
MAX_SHARDS = 1_000_000  # that a pattern may name
MAX_MEMBER_BYTES, MAX_NAME_BYTES, MAX_SKIPPED_BYTES = 1 << 28, 1 << 20, 1 << 36
# Part of the key of every index, by which stores know images. Change it when the rows change.
INDEX_FORM = "tar shards, 3"
PARALLEL_FROM = 8  # this many shards are indexed by several processes
# Where the image is in the tar; null if there is none.
SHARD_ROWS = pa.schema([*tables.ROWS.remove(0), ("offset", pa.int64()), ("size", pa.int64())])
NOT_ENOUGH = "unexpected end of data"
BLOCK_BYTES = 1 << 28  # a block ends when its images have as many; two blocks are in memory
SHARDS, PART = 1000, 1 << 14  # shards of which parts are read, and how many bytes of a part
MAX_FAILED = 32  # a stream ends after as many different shards in a row without a good sample


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
    """A sample as a shard holds it."""

    sample_id: str
    captions: list[bytes]
    image: Member | None = None
    fault: str = ""  # why the shard ends with it, if it breaks off
    beside: bytes | None = None  # the further file that `read_samples` is asked for


def open_shards(
    links: Sequence[str], data: DataConfig, *, name: str, beside: str | None = None
) -> ImageTextPairs:
    """Open local tar shards. New and changed ones are indexed first.

    `name` is what messages call the pairs. Their table has the content of the file with the
    extension `beside` of each sample in a column of that name. Raises `ValueError` if a shard is
    missing, remote, compressed or not a tar, if two samples share an id, or if there is no sample.
    """
    folder = access.index_folder()
    settings = {"form": INDEX_FORM, "captions": tables.caption_columns(data) or None}
    settings |= {"beside": beside} if beside else {}
    paths = [str(Path(link).resolve()) for link in links]
    with ThreadPoolExecutor(16) as pool:  # most of the time goes into waiting for the disk
        prints = list(pool.map(access.fingerprint, paths))
    shards, keys = list[tuple[str, str, str]](), list[str]()
    for link, path, print_ in zip(links, paths, prints, strict=True):
        # Ids begin with the name of a link: a hub's cache links to files that are named by a hash.
        stem = shard_stem(link)
        facts = {"shard": print_} if stem == shard_stem(path) else {"shard": print_, "stem": stem}
        keys.append(access.digest({**settings, **facts}))
        shards.append((path, stem, keys[-1]))
    key = access.digest({**settings, "shards": keys})
    index_one = partial(_index_shard, caption_keys=settings["captions"], beside=beside)
    index = tables.build_index(
        key,
        partial(_join_indexes, shards, index_one),
        folder=folder,
        label=name,
        way_out="name the files of a sample as in 000.jpg, 000.txt",
    )
    way_out = "keys must differ, and the files of a sample follow each other (tar --sort=name)"
    data = replace(data, root=None)
    return tables.make_pairs(
        index, data, key=key, label=paths[0], name=name, root="", way_out=way_out
    )


def _index_shard(
    shard: tuple[str, str, str], *, caption_keys: Sequence[str] | None, beside: str | None
) -> tables.ArrowIndex:
    """The index of one shard, given its path, its stem and its key."""
    path, stem, key = shard

    def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        with open_local(path) as file:
            if file.peek(6).startswith(tuple(COMPRESSED)):
                raise ValueError(f"{path}: is compressed; stream it, or unpack it once (gunzip)")
            try:
                samples = [*read_samples(file, stem, caption_keys, stream=False, beside=beside)]
            except Exception as error:
                raise ValueError(f"{path}: {access.describe_error(error)}") from None
        if samples and samples[-1].fault:
            facts["notes"] = [f"{path}: {samples.pop().fault}"]
        images = [s.image for s in samples]
        columns = {
            "sample_id": [s.sample_id for s in samples],
            "caption": [s.captions for s in samples],
            "offset": [image and image.offset_data for image in images],
            "size": [image and image.size for image in images],
        }
        schema = SHARD_ROWS
        if beside:
            columns["beside"] = [s.beside for s in samples]
            schema = schema.append(pa.field("beside", pa.binary()))
        yield pa.RecordBatch.from_pydict(columns, schema)

    return tables.build_index(key, build, folder=access.index_folder(), label=path, way_out="")


def _join_indexes(
    shards: Sequence[tuple[str, str, str]], index_one: Any, facts: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The rows of every shard, with its path in a further column."""
    if len(shards) >= PARALLEL_FROM:
        # A forked process does not import PyTorch again.
        fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        progress = Progress(f"Indexing {len(shards)} shards", len(shards))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        with ProcessPoolExecutor(cores, multiprocessing.get_context(fork)) as pool:
            for done, _ in enumerate(pool.map(index_one, shards), 1):
                progress.update(done)
    # One index is open at a time: there may be more shards than a process may have open files.
    names = pa.array([path for path, *_ in shards], pa.string())
    faults = list[str]()
    for number, shard in enumerate(shards):
        index = index_one(shard)
        faults += index.notes
        for batch in index.table.to_batches():
            rows = pa.array(np.full(len(batch), number, dtype=np.int32))
            yield batch.append_column("image", pa.DictionaryArray.from_arrays(rows, names))
    facts["notes"] = [
        f"{len(faults)} of {len(shards)} shards break off, such as {fault}" for fault in faults[:1]
    ]


class ShardStream(SampleStream):
    """Image-text pairs from tar shards in one endless order; see `pairs.SampleStream`.

    Each pass over the shards permutes them. The endless sequence of shards is dealt to the lanes in
    turn, so all lanes together have every sample once a pass. Each lane shuffles its samples in
    blocks of `shuffle` samples, or fewer if they have more than `BLOCK_BYTES`. `seed` must be the
    same on all ranks. Raises `ValueError` as `expand_shards`.
    """

    notes: list[str]

    def __init__(
        self,
        pattern: str,
        *,
        seed: int,
        lanes: int = 1,
        shuffle: int = 4096,
        caption_keys: Sequence[str] | None = None,
        name: str | None = None,
        chosen: Chosen | None = None,
        needs_captions: bool = True,
    ) -> None:
        self.shards = expand_shards(pattern)
        self.name, self.notes = name or without_secrets(pattern), list[str]()
        self.seed, self.shuffle = seed, shuffle
        self.caption_keys = caption_keys and list(caption_keys)
        self.chosen, self.needs_captions = chosen, needs_captions
        self.prefix = ""  # with which `chosen` knows ids, in a mixture
        # Of each lane: first sample of a block -> which of the lane's shards holds it, and its
        # number there.
        self._blocks_at: list[dict[int, tuple[int, int]]] = [{0: (0, 0)} for _ in range(lanes)]
        self._usual = 0  # samples of the last shard that was read to its end
        # How many were asked for before training, and those: the first shard may lie far away.
        self.first_items: tuple[int, list[Item]] = (0, [])

    @property
    def lanes(self) -> int:
        return len(self._blocks_at)

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Item]:
        """A lane from its sample number `first` on, where bad samples count too. Threads read one
        block ahead. Iteration raises `ValueError` if no shard can be read."""
        stopped = Event()
        blocks = self._blocks(lane, self._block_before(first, lane), stopped)
        read_ahead = partial(access.start_thread, lambda: next(blocks), name="protoclip-read-ahead")
        ahead = read_ahead()
        try:
            while True:
                start, block = ahead.result()
                ahead = read_ahead()
                # No other block of any lane has this number.
                draw = generator(self.seed, BLOCK_STREAM, start * self.lanes + lane)
                order = draw.permutation(len(block))[max(0, first - start) :]
                left = [block[number] for number in order[::-1]]
                block.clear()  # samples are freed as they are used
                while left:
                    yield left.pop()
        finally:
            stopped.set()

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        """JSON values from which a lane resumes at its sample number `first`."""
        start = self._block_before(first, lane)
        shard, skip = self._blocks_at[lane][start]
        state = {"sample": start, "shard": shard, "place": skip, "stream": self._identity()}
        return {**state, "rank": [lane, self.lanes]}  # the rank that had it when the run began

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the lanes of a state, and make `samples` quick to start where it was taken; raises
        `ValueError` if it belongs to other shards or another order."""
        if state["stream"] != self._identity():
            raise ValueError(
                f"{self.name}: the shards, the seed or data.shuffle_buffer are not those of the "
                "interrupted run, so the stream cannot continue; restore them, or start again"
            )
        lane, lanes = state["rank"]
        if lanes != self.lanes:
            self._blocks_at = [{0: (0, 0)} for _ in range(lanes)]
        self._blocks_at[lane][int(state["sample"])] = (state["shard"], state["place"])

    def fingerprint(self) -> Facts:
        """A hash of the shards by their names, and by a few parts of those that are local files."""
        number = len(self.shards)
        read = {self.shards[n] for n in evenly_spaced(number, SHARDS, 0)}
        parts = [[shard_stem(shard), shard_facts(shard, shard in read)] for shard in self.shards]
        return {"shards": checksum(to_json(parts).encode())}

    def _identity(self) -> str:
        stems = [shard_stem(shard) for shard in self.shards]
        order = {"seed": self.seed, "shuffle": self.shuffle, "block_bytes": BLOCK_BYTES}
        chosen = self.chosen.keys if self.chosen else {}
        return access.digest({"shards": stems, "captions": self.caption_keys, **order, **chosen})

    def read(self, shard: str) -> Iterator[Item]:
        """As `read_shard`; the shard before tells about how many samples a broken one lost."""
        needed, number = self.needs_captions, 0
        for item in read_shard(shard, self.caption_keys, self._keeps, needs_captions=needed):
            if isinstance(item, BadSample) and item.reason.endswith(LOST):
                if self._usual > number:
                    about = f"(about {self._usual - number:,} samples) {LOST}"
                    item.reason = item.reason.removesuffix(LOST) + about
                yield item
                return
            yield item
            number += 1
        self._usual = number

    def _keeps(self, sample_id: str) -> bool:
        return self.chosen is None or self.chosen.keeps(self.prefix + sample_id)

    def _block_before(self, first: int, lane: int) -> int:
        return max(start for start in list(self._blocks_at[lane]) if start <= first)

    def _blocks(self, lane: int, start: int, stopped: Event) -> Iterator[Block]:
        block: list[Item] = []
        held = last_epoch = 0
        for shard, skip, item in self._items(lane, *self._blocks_at[lane][start], stopped):
            epoch = (shard * self.lanes + lane) // len(self.shards)
            # A block also ends with its pass, or a sample could come twice before another came.
            full = len(block) == self.shuffle or held >= BLOCK_BYTES or epoch != last_epoch
            if block and full:
                start += len(block)
                yield start - len(block), block
                block, held = [], 0
            if not block:
                self._blocks_at[lane][start] = (shard, skip)
            block.append(item)
            held += len(item.image) if isinstance(item, Sample) else 0
            last_epoch = epoch

    def _items(
        self, lane: int, number: int, skip: int, stopped: Event
    ) -> Iterator[tuple[int, int, Item]]:
        """Number of a lane's shard, number in it, and sample, from a sample of a shard on."""
        failed = set[str]()  # shards in a row
        # Any number of shards may hold none of the few samples that are chosen.
        most, reason = min(len(self.shards), MAX_FAILED), "it holds no sample"
        if self.chosen is not None:
            most, reason = len(self.shards), f"no sample is left by {self.chosen.settings}"
        while True:
            shard = self._shard(number * self.lanes + lane)
            failed.add(shard)
            for number_in_shard, item in enumerate(self.read(shard)):
                if stopped.is_set():
                    return
                if isinstance(item, Sample):
                    failed.clear()
                else:
                    reason = item.reason
                if number_in_shard >= skip:
                    yield number, number_in_shard, item
            if len(failed) >= most:
                raise ValueError(
                    f"{self.name}: {len(failed)} shards in a row without a usable "
                    f"sample; the last is {without_secrets(shard)}: {reason}"
                    f"{f'; {access.GO_ON}' if access.is_url(shard) else ''}"
                )
            number, skip = number + 1, 0

    def _shard(self, position: int) -> str:
        """The shard at a position in the endless sequence that all lanes share."""
        epoch, number = divmod(position, len(self.shards))
        order = generator(self.seed, SHARD_STREAM, epoch).permutation(len(self.shards))
        return self.shards[int(order[number])]


def read_shard(
    shard: str,
    caption_keys: Sequence[str] | None,
    keeps: Callable[[str], bool] = lambda sample_id: True,
    *,
    needs_captions: bool = True,
) -> Iterator[Item]:
    """The samples of one shard that `keeps` takes, in order. A shard that cannot be read ends with
    a bad sample."""
    stem, seen = shard_stem(shard), set[str]()
    try:
        with access.open_file(shard) as file:
            magic = file.peek(6)
            packed = next((r for start, r in COMPRESSED.items() if magic.startswith(start)), None)
            unpacked = importlib.import_module(packed).open(file) if packed else file
            for found in read_samples(unpacked, stem, caption_keys, stream=True):
                sample_id, reason = found.sample_id, found.fault
                if sample_id in seen:
                    reason = reason or "the same sample id as one before it in the shard"
                seen.add(sample_id)
                if not (found.fault or keeps(sample_id)):
                    continue
                image, texts = found.image and found.image.data, tuple[str, ...]()
                try:
                    if image is None:
                        raise ValueError("no image")
                    texts = clean_captions(found.captions, needed=needs_captions)
                except ValueError as error:
                    reason = reason or str(error)
                if reason:
                    yield BadSample(sample_id, shard, reason)
                else:
                    yield Sample(
                        sample_id=sample_id, image=image or b"", captions=texts, where=shard
                    )
    except Exception as error:  # file systems and decompressors have their own errors
        part = f" after {len(seen)} samples; the rest" if seen else "; all"
        yield BadSample(stem, shard, f"{access.describe_error(error)}{part} {LOST}")


def shard_facts(path: str, is_read: bool) -> list[Any]:
    """Bytes of a local shard, and a hash of both ends and the middle; nothing of another."""
    try:
        with open_local(path) as file:
            size = os.fstat(file.fileno()).st_size
            parts = b""
            for start in (0, size // 2, max(0, size - PART)) if is_read else ():
                file.seek(start)
                parts += file.read(PART)
    except (OSError, ValueError):
        return []
    return [size, checksum(parts)]


def facts_that_may_move(facts: Facts, source: Any) -> Facts:
    """A source's facts, less what differs when shards move between a disk and a store."""
    if not isinstance(source, ShardStream):
        return facts
    names = checksum(to_json([[shard_stem(shard), []] for shard in source.shards]).encode())
    is_on_disk = not any(map(access.is_url, source.shards))
    known_facts = {name: fact for name, fact in facts.items() if is_on_disk or name != "shards"}
    return {**known_facts, "names": names}


def expand_shards(pattern: str) -> list[str]:
    """The shards that a pattern names, sorted.

    A pattern is a path or URL with `{00000..00331}` for a range, `{a,b}` for alternatives, and `*`
    where files can be listed (not on a web server); a folder, or a URL that ends in `/`, for its
    `*.tar`.

    Raises `ValueError` if nothing matches, a local file is missing, a location is not allowed, the
    braces stand for more than `MAX_SHARDS` names, or two shards would give samples the same ids.
    """
    label = without_secrets(pattern)
    bounds = re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)
    if math.prod(abs(int(end) - int(start)) + 1 for start, end in bounds) > MAX_SHARDS:
        raise ValueError(f"{label}: the braces stand for more than {MAX_SHARDS:,} shards")
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


def _expand(name: str) -> list[str]:
    try:
        access.require_allowed(name)
        if access.is_url(name) and ("*" in name or name.endswith("/")):
            return access.list_urls(f"{name}*.tar" if name.endswith("/") else name)
    except Exception as error:  # every store has its own errors
        raise ValueError(f"{without_secrets(name)}: {access.describe_error(error)}") from None
    if access.is_url(name):
        return [name]
    path = Path(name).expanduser()
    if path.exists():
        return [*map(str, access.files_like(path, "*.tar"))] if path.is_dir() else [str(path)]
    if re.search(r"[*?[]", name):
        return glob.glob(str(path))  # noqa: PTH207 (an absolute pattern)
    raise ValueError(f"{name}: no such file")


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
) -> Iterator[ShardSample]:
    """The samples of an uncompressed tar, each made of consecutive files with one key.

    Ids start with `stem`. Captions are in the `.json` under `caption_keys`, or if that is None in
    the `.txt`, or without one under the first of the usual keys that is there. A stream is read
    front to back, images included; otherwise images are skipped by seeking. `beside` is the
    extension of a further file of each sample, such as `cls`.

    Raises `ValueError` if it is not a tar; an error of `file` at the beginning is raised as it is.
    """
    source: Any = _Forward(file) if stream else file
    options: dict[str, Any] = {"fileobj": source, "tarinfo": Member}
    try:
        tar: Any = tarfile.TarFile(**options, encoding="utf-8", errors="backslashreplace")
    except tarfile.TarError as error:
        raise ValueError("not a tar file") from error
    texts = TEXTS | {beside or "txt"}
    key, files, before, number = "", dict[str, Member](), set[str](), 0
    reading = fault = ""  # the file that is being read, and why there is no more
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # or tarfile would keep all headers
            skipped = tar.offset - member.offset_data
            if member.size < 0 or not 0 <= skipped <= MAX_SKIPPED_BYTES:
                raise tarfile.ReadError("damaged header")
            if not member.isreg() or member.issparse():
                continue  # nothing opens what a link or device names
            reading, size = member.name, member.size
            next_key, kind = split_name(member.name)
            if size <= MAX_MEMBER_BYTES and (kind in texts or (stream and kind in IMAGES)):
                member.data = source.read(size)
                if len(member.data) < size:
                    raise tarfile.ReadError(NOT_ENOUGH)
            elif size:
                source.seek(member.offset_data + size - 1)
                if not source.read(1):
                    raise tarfile.ReadError(NOT_ENOUGH)
            reading = ""
            if kind not in texts and kind not in IMAGES:
                continue
            # A second file of one kind starts another sample. It has the same id and is refused.
            if files and (next_key != key or kind in files):
                yield _make_sample(stem, key, files, caption_keys, beside)
                before, files, number = set(files), {}, number + 1
            key, files[kind] = next_key, member
    except Exception as error:
        fault = access.describe_error(error)
    cut = split_name(reading)[0]
    # The last sample counts if a later file had begun, or it has all parts that the one before had.
    if files and (not fault or (key != cut if cut else set(files) == before)):
        yield _make_sample(stem, key, files, caption_keys, beside)
        files, number = {}, number + 1
    if fault:
        file_name = f" in {visible(reading[:200])}" if reading else ""
        reason = f"{fault}{file_name} after {number} samples; the rest {LOST}"
        sample_id = _sample_id(stem, key if files else cut)
        yield ShardSample(sample_id=sample_id, captions=[], fault=reason)


def _sample_id(*parts: str) -> str:
    return "/".join(filter(None, parts)).encode("utf-8", "backslashreplace").decode()


def _make_sample(
    stem: str,
    key: str,
    files: Mapping[str, Member],
    caption_keys: Sequence[str] | None,
    beside: str | None,
) -> ShardSample:
    texts = {kind: file.data or b"" for kind, file in files.items() if kind not in IMAGES}
    record: Any = {}
    if "json" in texts:
        with suppress(ValueError, RecursionError):  # a damaged one has no caption
            record = json.loads(texts["json"])
    plain = "txt" in texts and caption_keys is None
    name = record.get("sample_id") if isinstance(record, dict) else None
    images = (file for kind, file in files.items() if kind in IMAGES)
    return ShardSample(
        sample_id=_sample_id(name) if name and isinstance(name, str) else _sample_id(stem, key),
        captions=[texts["txt"]] if plain else tables.list_captions(record, caption_keys or ()),
        image=next((image for image in images if image.size <= MAX_MEMBER_BYTES), None),
        beside=texts.get(beside or ""),
    )
