"""A pass of a frozen model over samples, in parts of some thousand, each whole or not at all.

Ranks share the parts out, and the same command goes on with those that are missing. A working
folder holds what the pass is made of (`facts.json`) and the parts; who asked for them joins them.
"""

import io
import json
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from protoclip.data.content import difference
from protoclip.data.loader import Item, read_sample
from protoclip.data.pairs import BadSample, Pairs, Sample, SampleStream
from protoclip.distributed import collectives
from protoclip.distributed.collectives import (
    all_gather_object,
    raise_on_all_ranks,
    rank,
    rank0_first,
    require_shared,
    world_size,
)
from protoclip.encode import store
from protoclip.encode.run import read_ahead
from protoclip.files import checksum, left_by_killed, sealed, to_json, write_atomically
from protoclip.models.precision import Precision
from protoclip.progress import Progress

T = TypeVar("T")
PARTS = "parts"
# Settings that are checksums, and what it means if they differ.
CHECKSUMS = {"ids": "other sample ids", "data": "other data, or before these were changed"}
CHECKSUMS |= {"weights": "other weights", "content": CHECKSUMS["data"]}
CHECKSUMS |= {"captions": "other captions, or before these were changed"}
# 1.0.0 did not note these, so they are unknown where they are missing.
NEW = ("content", "captions")
PRECISIONS = ("auto", *get_args(Precision))
CHOSEN_BEFORE = {"precision": "auto"}  # by versions that had no such setting
FOLDERS = "--out or align.features"  # what says where the parts are
Show = Callable[[int], None]  # is told how many samples of a part are done


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a model makes of some samples.

    Attributes:
        ids: The samples that could be read.
        bad: What is wrong with each of the others: `sample_id`, `where` and `reason`.
        arrays: What was computed, by name.
        values: What else is known of the samples, as JSON.
    """

    ids: list[str]
    bad: list[dict[str, str]]
    arrays: Mapping[str, npt.NDArray[Any]]
    values: Mapping[str, Any] = field(default_factory=dict)


Encode = Callable[[Sequence[Item], Show], Part]


def identity(
    samples: Pairs | SampleStream, ids: Iterable[str], num_samples: int | None
) -> dict[str, Any]:
    """What tells these samples from others. `num_samples` are read of a stream, which has no ids.

    Raises:
        ValueError: A stream lacks the number or has several ranks, or other samples have a number.
    """
    is_stream = isinstance(samples, SampleStream)
    if is_stream and (num_samples is None or world_size() > 1):
        raise ValueError(f"{samples.name}: a stream needs --num_samples, and runs on one rank")
    if not is_stream and num_samples is not None:
        raise ValueError(f"--num_samples: {samples.name} is no stream; all of it is encoded")
    hashes = store.hash_ids(ids)
    return {
        "source": samples.name,
        "samples": num_samples or len(hashes),
        "ids": checksum(hashes.tobytes()),
    }


def require_same(
    facts: Mapping[str, Any], settings: Mapping[str, Any], *, name: Path, way_out: str
) -> None:
    """Refuse facts that differ from the settings."""
    if (key := difference_in(facts, settings)) is not None:
        what = CHECKSUMS.get(key, f"{key} {kept(facts, key)}, not {settings[key]}")
        raise ValueError(f"{name}: was made with {what}; {way_out}")


def difference_in(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first setting in which facts differ; None if they are of these settings."""
    for key, value in settings.items():
        if key in NEW and key not in facts and facts:
            continue
        old: Any = kept(facts, key)
        if difference(old or (), value) is not None if key == "content" else old != value:
            return key
    return None


def kept(facts: Mapping[str, Any], key: str) -> Any:
    """A setting as facts have it, also those of versions that did not know it."""
    return facts.get(key, CHOSEN_BEFORE.get(key))


def begun_precision(
    begun: Mapping[str, Any], settings: Mapping[str, Any], asked: Literal["auto"] | Precision
) -> Literal["auto"] | Precision | None:
    """In which precision that goes on which was begun, if none is asked for; None if it is new.

    Versions that had no such setting noted none, which is `auto`.

    Args:
        settings: All but the precision.
    """
    if asked != "auto" or not begun or difference_in(begun, settings) is not None:
        return None
    noted = kept(begun, "precision")
    return noted if noted in PRECISIONS else None


def claim(
    folder: Path, settings: Mapping[str, Any], *, name: Path, way_out: str = "choose another --out"
) -> tuple[dict[str, Any], list[Path]]:
    """Take a folder that is new, or of these settings: its facts, and its parts so far.

    The facts have `rows` at the end. `name` is what the user knows of the folder.
    """
    if not (folder / store.FACTS).is_file():
        if others := [path.name for path in folder.glob("[!.]*")]:
            raise ValueError(f"{name}: holds {others[0]}; choose a new or empty folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / store.FACTS, to_json(sealed(settings)), durable=True)
    for left in left_by_killed(folder):
        left.unlink(missing_ok=True)
    facts = {key: value for key, value in store.read_facts(folder).items() if key != "checksums"}
    require_same(facts, settings, name=name, way_out=way_out)
    if "rows" in facts:  # parts stay if the process was killed, or could not remove them
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    else:
        (folder / PARTS).mkdir(exist_ok=True)
    return facts, parts_of(folder)


def parts_of(folder: Path) -> list[Path]:
    """The parts that are written, in the order of the samples."""
    return sorted((folder / PARTS).glob("*.npz"))


def encode_missing(
    encode: Encode,
    samples: Any,
    claimed: Callable[[], tuple[dict[str, Any], list[Path]]],
    folder: Path,
    settings: Mapping[str, Any],
    label: str,
) -> dict[str, Any]:
    """The facts of what is finished; otherwise none, once the ranks wrote all parts. Collective.

    Rank 0 alone calls `claimed`, which answers as `claim` does.
    """
    facts, written = rank0_first(claimed)
    if "rows" in facts:
        return facts
    require_shared(folder / store.FACTS, by=FOLDERS, written=True)
    # Of the halves of `align`, which are interpolated, `halves.py` compares the weights.
    alike = ["samples", "ids"] + ["weights"] * ("half" not in str(settings.get("teacher")))
    of_all = all_gather_object([settings.get(name) for name in alike])
    raise_on_all_ranks(lambda: require_same_for_all(of_all, folder))
    raise_on_all_ranks(lambda: write_parts(encode, samples, written, folder, settings, label))
    rank0_first(lambda: require_all_parts(folder, settings))
    return {}


def require_same_for_all(of_all: Sequence[Any], folder: Path) -> None:
    """Refuse hosts that see other samples or weights than rank 0, given what all ranks see."""
    mine, first = of_all[rank()], of_all[0]
    if mine != first:
        raise ValueError(
            f"{folder}: {socket.gethostname()} sees other samples or weights than rank 0; let all "
            "hosts read the same files"
        )


def require_all_parts(folder: Path, settings: Mapping[str, Any]) -> None:
    """Wait until the parts of all hosts are seen here, or raise `ValueError`."""
    number = -(-settings["samples"] // settings["part_rows"])
    deadline = time.monotonic() + collectives.UNSEEN
    while (seen := len(parts_of(folder))) < number:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder}: {seen:,} of {number:,} parts are there; name a place that all hosts "
                f"share by {FOLDERS}, and give the command again"
            )
        time.sleep(0.1)


def write_parts(
    encode: Encode,
    samples: Any,
    written: Sequence[Path],
    folder: Path,
    settings: Mapping[str, Any],
    label: str,
) -> None:
    """Write this rank's share of the parts that are missing."""
    size, of_all = settings["part_rows"], settings["samples"]
    missing = set(range(-(-of_all // size))) - {int(path.stem) for path in written}
    share = sorted(missing)[rank() :: world_size()]
    total = sum(min(size, of_all - number * size) for number in share)
    progress = Progress(f"embed {label}", total)
    show: Show = progress.update if rank() == 0 else lambda done: None
    is_stream = isinstance(samples, SampleStream)
    stream = StreamReader(samples, written, at=len(written) * size) if is_stream else None
    done = 0
    for number in share:
        rows = range(number * size, min((number + 1) * size, of_all))

        def show_within(within: int, before: int = done) -> None:
            show(min(before + within, total - 1))  # the last one is done when its part is written

        part = encode(rows if stream is None else stream.read(len(rows)), show_within)
        position = None if stream is None else samples.state_dict(rows.stop)
        write_part(folder / PARTS / f"{number:06d}.npz", part, position)
        done += len(rows)
        show(done)


class StreamReader:
    """Goes on in a stream behind the parts that are written.

    A stream may give a sample again. The second sample of an id is a bad one, and may come first:
    so a good one counts once, and a bad one if nothing of its id came before.
    """

    def __init__(self, samples: Any, written: Sequence[Path], *, at: int) -> None:
        self.good, self.bad = set[str](), set[str]()  # ids so far
        for note in map(read_note, written):
            self.good.update(note["ids"])
            self.bad.update(entry["sample_id"] for entry in note["bad"])
            samples.load_state_dict(note["position"])
        self.stream = samples.samples(at)

    def read(self, number: int) -> list[Item]:
        """The next samples, less those that it gave before."""
        items = []
        for item in islice(self.stream, number):
            is_good, name = isinstance(item, Sample), item.sample_id
            if name not in self.good and (is_good or name not in self.bad):
                (self.good if is_good else self.bad).add(name)
                items.append(item)
        return items


def write_part(path: Path, part: Part, position: Any) -> None:
    """Write a part; of a stream with the position after it."""
    note = {"ids": part.ids, "bad": part.bad, "position": position, **part.values}
    content = io.BytesIO()
    np.savez(content, note=np.array(json.dumps(note).encode()), **part.arrays)  # type: ignore[arg-type]
    write_atomically(path, content.getvalue(), durable=True)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A part, to read from; raises `ValueError` if it is damaged."""
    try:
        with np.load(path) as part:
            yield part
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete {path.parent.parent}, and give the command again"
        ) from error


def read_note(path: Path) -> dict[str, Any]:
    """What is known of the samples of a part: `ids`, `bad` and more."""
    with opened(path) as part:  # arrays are read when they are asked for
        return json.loads(part["note"].item())  # type: ignore[no-any-return]


def read_part(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The note of a part, and its arrays."""
    with opened(path) as part:
        arrays = {name: part[name] for name in part.files if name != "note"}
        return json.loads(part["note"].item()), arrays


def write_skipped(files: Sequence[Path], path: Path, source: str) -> tuple[int, int]:
    """List the bad samples of all parts in a file; the numbers of good and of bad samples.

    An id is listed once, and not if a later sample of that id is good, as a stream may have it.

    Raises:
        ValueError: There is no good one.
    """
    good, bad = 0, dict[str, dict[str, str]]()
    for note in map(read_note, files):
        good += len(note["ids"])
        bad |= {entry["sample_id"]: entry for entry in note["bad"]}
        for sample_id in note["ids"] if bad else ():
            bad.pop(sample_id, None)
    if bad:
        write_atomically(path, "".join(to_json(entry) + "\n" for entry in bad.values()))
    if not good:
        raise ValueError(f"{source}: no sample could be read; see {path}")
    return good, len(bad)


def prepare_images(
    samples: Any,
    items: Sequence[Item],
    prepare: Callable[[Sample], T],
    batch_size: int,
    threads: int | None,
) -> Generator[list[tuple[Item, tuple[Sample, T] | BadSample]], None, None]:
    """Samples with what `prepare` makes of their images, a batch at a time; see `read_ahead`."""

    def prepare_item(item: Item) -> tuple[Sample, T]:
        sample = read_sample(samples, item)
        try:
            return sample, prepare(sample)
        except ValueError as error:
            raise BadSample(sample.sample_id, sample.where, str(error)) from error

    units = (items[first : first + batch_size] for first in range(0, len(items), batch_size))
    return read_ahead(units, prepare_item, threads)
