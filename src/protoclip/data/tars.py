"""Tar shards from their bytes: members one after the other, and the samples that they form.

The layout is WebDataset's: `000.jpg`, `000.txt`, `000.json` are one sample, its key the path up to
the first dot of the file name. Only the members that a sample needs are read, as bytes; nothing is
ever unpacked to a file, whatever a member's name says.
"""

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from protoclip.data.access import READ_BYTES, reason_of

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif"})
TEXTS = frozenset({"txt", "json"})
# Where a `.json` without a `.txt` beside it has its caption.
CAPTION_KEYS = ("caption", "captions", "title", "text")

BLOCK = 512
# A size beyond these is damage or malice, not a picture with its caption.
MAX_MEMBER_BYTES, MAX_NAME_BYTES = 1 << 28, 1 << 20
COMPRESSED: dict[bytes, Callable[..., io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


class ShardFault(ValueError):
    """A shard cannot be read from some byte on.

    Args:
        reason: What is wrong, in a few words.
        member: Name of the member in whose content it happened, if in one.
        at_start: Not even the first header was read.
    """

    def __init__(self, reason: str, *, member: str = "", at_start: bool = False) -> None:
        super().__init__(reason)
        self.member, self.at_start = member, at_start


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file in a tar: its name, and where its content is. `data` is unset if not read."""

    name: str
    offset: int
    size: int
    data: bytes | None


@dataclass(kw_only=True)
class Group:
    """Consecutive members of one key.

    Attributes:
        key: See `split_name`.
        members: By extension, in lower case.
        fault: Why the group is not whole; empty if it is.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    fault: str = ""

    @property
    def image(self) -> Member | None:
        return next((m for kind, m in self.members.items() if kind in IMAGES), None)


def shard_stem(shard: str) -> str:
    """The name of a shard's file without `.tar` and what follows; it starts the sample ids.

    Of a command, the last such name in it.
    """
    found = re.findall(r"([^/\\\s'\"=]+?)\.(?:tar|tgz|tbz|txz)\b", shard)
    return str(found[-1]) if found else re.split(r"[/\\]", shard.rstrip("/"))[-1]


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extension in lower case; both empty where WebDataset would pass it over.

    >>> split_name("./a.b/000.seg.PNG")
    ('a.b/000', 'seg.png')
    """
    found = re.fullmatch(r"(?:\./)*((?:.*/|)[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return (found[1], found[2].lower()) if found else ("", "")


def read_members(
    file: io.BufferedIOBase, wanted: Callable[[str], bool], *, size: int | None = None
) -> Iterator[Member]:
    """The regular files of a tar, in order: ustar, pax and GNU headers, in one pass.

    Args:
        file: At the tar's first byte.
        wanted: Whether to read the content of a member of that name.
        size: Bytes of a file that can be sought in; what is not wanted is then skipped unread.

    Raises:
        ShardFault: Where the tar ends before its end mark, or is no tar.
    """
    position, name, long_size = 0, "", None
    while True:
        header = _take(file, BLOCK, "", position == 0)
        if len(header) == BLOCK and not any(header):
            return
        if len(header) < BLOCK or not _is_header(header):
            raise _fault("cut short" if len(header) < BLOCK else "damaged", position)
        position += BLOCK
        length = _number(header[124:136]) if long_size is None else long_size
        kind, long_size = header[156:157], None
        if kind in b"xgLK":
            if length > MAX_NAME_BYTES:
                raise ShardFault("damaged")
            extra = _take(file, length + -length % BLOCK, "", False)
            position += len(extra)
            if kind == b"L":
                name = _text(extra[:length].rstrip(b"\0"))
            elif kind == b"x":
                records = _pax(extra[:length])
                name = _text(records[b"path"]) if b"path" in records else name
                long_size = _number(records[b"size"], 10) if b"size" in records else None
            continue
        name = name or _header_name(header)
        # Links, folders and devices have no content, whatever their size says.
        room = 0 if kind in b"123456" else length + -length % BLOCK
        regular = kind in b"0\x007"
        data = None
        if regular and length <= MAX_MEMBER_BYTES and wanted(name):
            data = _take(file, room, name, False)[:length]
            if len(data) < length:
                raise ShardFault("cut short", member=name)
        else:
            if size is not None and position + length > size:
                raise ShardFault("cut short", member=name)
            _skip(file, room, name, seek=size is not None)
        if regular:
            yield Member(name=name, offset=position, size=length, data=data)
        position, name = position + room, ""


def _take(file: io.BufferedIOBase, number: int, member: str, at_start: bool) -> bytes:
    """So many bytes, fewer only at the end of the file."""
    try:
        return file.read(number)
    except Exception as error:  # of decompressors, commands, and any remote file system
        raise ShardFault(reason_of(error), member=member, at_start=at_start) from error


def _skip(file: io.BufferedIOBase, number: int, member: str, *, seek: bool) -> None:
    if seek:
        file.seek(number, io.SEEK_CUR)
        return
    while number > 0:
        taken = len(_take(file, min(number, READ_BYTES), member, False))
        if taken == 0:
            raise ShardFault("cut short", member=member)
        number -= taken


def _fault(reason: str, position: int) -> ShardFault:
    return ShardFault(reason) if position else ShardFault("not a tar file", at_start=True)


def _is_header(header: bytes) -> bool:
    """Whether the checksum is right: the sum of all bytes, its own eight taken for blanks."""
    expected = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        return _number(header[148:156]) == expected
    except ShardFault:
        return False


def _number(digits: bytes, base: int = 8) -> int:
    if digits[:1] == b"\x80":  # GNU: large sizes in binary
        return int.from_bytes(digits[1:], "big")
    try:
        number = int(digits.strip(b"\0 ") or b"0", base)
    except ValueError:
        number = -1
    if number < 0:
        raise ShardFault("damaged")
    return number


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _pax(extra: bytes) -> dict[bytes, bytes]:
    """Records `length key=value\\n`, the length that of the whole record."""
    records, start = {}, 0
    while found := re.compile(rb"(\d{1,20}) ([^=]+)=").match(extra, start):
        end = start + int(found[1])
        if end <= found.end():
            break
        records[found[2]] = extra[found.end() : end - 1]
        start = end
    return records


def read_groups(members: Iterable[Member]) -> Iterator[Group]:
    """Join consecutive members of one key; members that no sample needs are passed over.

    A tar that breaks off is read up to there. What was begun by then, or nothing, is the last
    group, with `fault` set.

    Raises:
        ShardFault: Nothing of it can be read.
    """
    group: Group | None = None
    kinds: set[str] = set()  # of the group before
    try:
        for member in members:
            key, kind = split_name(member.name)
            if kind not in IMAGES | TEXTS:
                continue
            # A kind that comes again starts another sample, which then has the same id.
            if group is None or group.key != key or kind in group.members:
                if group is not None:
                    kinds = set(group.members)
                    yield group
                group = Group(key=key)
            group.members[kind] = member
    except ShardFault as fault:
        if fault.at_start:
            raise
        cut = split_name(fault.member)[0]
        # Whole if the next sample had begun, or if it has all that the one before it had.
        if group is not None and (group.key != cut if cut else set(group.members) == kinds):
            yield group
            group = None
        group = Group(key=group.key if group is not None else cut, fault=str(fault))
    if group is not None:
        yield group


def group_id(group: Group, stem: str) -> str:
    """The id of a sample that brings none of its own."""
    return f"{stem}/{group.key}" if group.key else stem


def sample_facts(
    group: Group, stem: str, caption_keys: Sequence[str] | None
) -> tuple[str, list[bytes]]:
    """A group's sample id, and its captions as they are stored.

    The id is the `sample_id` of the `.json`, where it has one, or `<stem>/<key>`: it depends on the
    shard alone, not on what else is opened.

    Args:
        group: Its texts were read.
        stem: See `shard_stem`.
        caption_keys: Keys of the `.json` whose values, strings or lists of them, are the captions.
            If unset, the `.txt`, or without one the first of `CAPTION_KEYS` that is there.
    """
    found: dict[str, Any] = {}
    if (meta := group.members.get("json")) and meta.data is not None:
        try:
            parsed = json.loads(meta.data)
            found = parsed if isinstance(parsed, dict) else {}
        except (ValueError, RecursionError):
            pass  # then there is no caption in it
    named = found.get("sample_id")
    sample_id = named if isinstance(named, str) and named else group_id(group, stem)
    sample_id = sample_id.encode("utf-8", "backslashreplace").decode()
    text = group.members.get("txt")
    if text is not None and caption_keys is None:
        return sample_id, [text.data or b""]
    keys = caption_keys or [key for key in CAPTION_KEYS if key in found][:1]
    values = [
        v for k in keys for v in (found[k] if isinstance(found.get(k), list) else [found.get(k)])
    ]
    return sample_id, [v.encode("utf-8", "surrogatepass") for v in values if isinstance(v, str)]
