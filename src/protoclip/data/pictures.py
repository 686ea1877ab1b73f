"""Pictures in a folder with captions beside them: which there are, and what was left out."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protoclip.data.columns import CAPTION_COLUMNS
from protoclip.data.locations import NOTHING_MORE, read_file
from protoclip.data.tables import encode, line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".json")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One folder's pictures, each with the file of its captions, if any; names in order."""

    folder: str
    pictures: list[tuple[str, str | None]]


@dataclass(kw_only=True)
class Oddities:
    """What a walk left out: how often, and one example of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        self.examples.setdefault(kind, line(example, 80))

    def notes(self, folder: Path) -> list[str]:
        return [
            f"{folder}: {count} {kind} left out, such as {self.examples[kind]}"
            for kind, count in self.counts.items()
        ]


def walk(top: Path, odd: Oddities) -> Iterator[Listing]:
    """The pictures below a folder, each folder once, in order of the names.

    Links are followed; one that leads to a folder already read (a loop, say) is not. Hidden files
    and folders are passed over.
    """
    read: set[tuple[int, int]] = set()

    def inside(relative: str) -> Iterator[Listing]:
        try:
            status = (top / relative).stat()
            if (place := (status.st_dev, status.st_ino)) in read:
                odd.add("links to folders already read", relative)
                return
            read.add(place)
            with os.scandir(top / relative) as entries:
                found = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        except OSError as error:
            odd.add("folders that cannot be read", f"{relative} ({error.strerror})")
            return
        files: list[str] = []
        folders: list[str] = []
        for entry in found:
            path = below(relative, entry.name)
            if not printable(entry.name):
                odd.add("names that are not UTF-8", path)
            elif is_kind(entry, os.DirEntry.is_dir):
                folders.append(path)
            elif is_kind(entry, os.DirEntry.is_file):
                files.append(entry.name)
            elif entry.is_symlink():
                odd.add("dangling links", path)
        if pictures := paired(files):
            yield Listing(folder=relative, pictures=pictures)
        for path in folders:
            yield from inside(path)

    yield from inside("")


def below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def halves(name: str) -> tuple[str, str]:
    """A file's name without its suffix, and the suffix in lower case."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot else (name, "")


def is_kind(entry: os.DirEntry[str], kind: Callable[[os.DirEntry[str]], bool]) -> bool:
    """What an entry is, links followed; a link to itself is nothing."""
    try:
        return kind(entry)
    except OSError:
        return False


def printable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def paired(files: list[str]) -> list[tuple[str, str | None]]:
    """Each picture with its captions' file: the `.txt` of that name, or else the `.json`."""
    split = [(file, *halves(file)) for file in files]
    beside: dict[str, str] = {}
    for suffix in reversed(CAPTION_SUFFIXES):
        beside |= {stem: file for file, stem, found in split if found == suffix}
    return [(file, beside.get(stem)) for file, stem, found in split if found in IMAGE_SUFFIXES]


def sample_ids(pictures: list[str]) -> list[str]:
    """Names without suffix, where no other picture of the folder would be called the same."""
    stems = [halves(picture)[0] for picture in pictures]
    counts, names = Counter(stems), set(pictures)
    return [
        picture if counts[stem] > 1 or stem in names else stem
        for picture, stem in zip(pictures, stems, strict=True)
    ]


def captions(
    folder: Path, file: str | None, picture: str, keys: tuple[str, ...], odd: Oddities
) -> list[bytes]:
    """The captions of a picture as bytes; none, and counted, where there is nothing to read."""
    if file is None:
        odd.add("pictures without a caption", picture)
        return []
    try:
        raw = read_file(str(folder / file), NOTHING_MORE).removeprefix(b"\xef\xbb\xbf")
        if not file.lower().endswith(".json"):
            return [raw]
        record = json.loads(raw.decode("utf-8", "surrogateescape"))
    except (OSError, ValueError, RecursionError):
        odd.add("pictures whose caption file cannot be read", picture)
        return []
    found: list[Any] = []
    if isinstance(record, dict):
        present = {key.lower(): key for key in reversed(record)}
        detected = [present[key] for key in CAPTION_COLUMNS if key in present][:1]
        for key in keys or detected:
            value = record.get(key)
            found += value if isinstance(value, list) else [value]
    texts = [encode(text) for text in found if isinstance(text, str) and text.strip()]
    if not texts:
        odd.add("pictures whose .json has no caption", picture)
    return texts
