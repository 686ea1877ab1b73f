"""The external teachers of a run: features of frozen models by sample id, whitened as settings say.

A teacher is a folder that `embed_teacher` wrote, a user's own file, the bundled emoji's, or the
frozen start, whose features are made when the run begins. Those behind a URL are copied first.

A folder has `features.npy` (in half precision), `index.npy` (the ids' 64-bit hashes in ascending
order, and the row of each), `checksums.npy` (a CRC-32 of each row and its id) and `facts.json`
(what the features were made of, and checksums of the two files before). Features are memory-mapped,
and each row is compared with its checksum when it is read.
"""

import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protoclip.config import ENCODERS, START, Config, EngineName
from protoclip.data.access import (
    cache_folder,
    describe_error,
    digest,
    download,
    fingerprint,
    is_url,
)
from protoclip.data.emoji import emoji_teacher_path
from protoclip.data.loader import Tokenizer
from protoclip.data.pairs import (
    BadSample,
    Facts,
    ImageTextPairs,
    Pairs,
    Sample,
    SampleStream,
    describe_change,
    evenly_spaced,
    fingerprint_sources,
    is_list,
)
from protoclip.data.sources import list_entries
from protoclip.distributed.collectives import (
    all_gather_object,
    choose_device,
    raise_on_all_ranks,
    rank,
    rank0_first,
)
from protoclip.encode.encoder import device_of, open_encoder, text_encoder
from protoclip.encode.linear_maps import Features, Whitening, fit_pca
from protoclip.encode.run import encode_missing, hash_images, read_captions, read_image
from protoclip.encode.store import (
    BLOCK_ROWS,
    HALF,
    Hashes,
    Numbers,
    RowFile,
    Store,
    find_rows,
    hash_ids,
    row_checksums,
)
from protoclip.encode.stream import encode_stream, read_skipped
from protoclip.files import (
    checksum,
    file_checksum,
    in_turn,
    left_by_killed,
    lock_path,
    read_sealed,
    replacing,
    require_regular,
    seal,
    to_json,
    write_atomically,
)
from protoclip.models import loading
from protoclip.models.loading import Pooling
from protoclip.models.protoclip import Autocast, Precision, TowerPair, autocast, resolve_encoding
from protoclip.rules import is_teacher_model
from protoclip.terminal import say, without_secrets

FEATURES, INDEX, CHECKSUMS, FACTS = "features.npy", "index.npy", "checksums.npy", "facts.json"
FILES = (".npy", ".parquet")  # of a user's own features
PARTS = "parts"  # of a folder that is not finished: the store that it is made from
SKIPPED = "skipped.jsonl"
HASHED = ("ids", "data", "weights", "captions")  # facts that are checksums
FIRST = 64  # samples of a stream of which a teacher should know one
LOOKED_UP = 100_000  # samples of pairs, so that a run on many begins as soon as one on few
SAMPLE = 2**14  # rows that a whitening is fitted to
# Of damaged features.
WAY_OUT = "delete the folder, and run protoclip embed-teacher again; of a URL, it is copied anew"
ROWS_A_DIRECTION = 8  # fewest rows that a whitening is fitted to


def embed_teacher(
    teacher: str,
    samples: Pairs | SampleStream,
    out: Path,
    *,
    modality: Literal["auto", "text", "image"] = "auto",
    pooling: Pooling = "mean",
    width: int | None = None,
    batch_size: int = 256,
    device: torch.device,
    precision: Literal["auto"] | Precision = "auto",
    engine: EngineName = "auto",
    num_samples: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Make a teacher folder for a data set, or finish one. All ranks call it.

    A sample with several captions gets the mean of their features.

    Args:
        teacher: A frozen model, as for `open_frozen_encoder`, or a file, as for `read_teacher`.
        out: A new folder, or that of an earlier call with the same arguments.
        modality: What the model reads; `auto` takes the image tower of a model with two.
        pooling: How a Hugging Face model's tokens become one feature.
        width: Dimensions kept by PCA; all if unset.
        precision: Of forward passes; `auto` is that of a folder that is there, else bf16 or fp16 on
            a card, as in training, and fp32 elsewhere.
        engine: As `encode.engine`.
        num_samples: Samples to read of a stream; unset, all.
        threads: How many read images; one a core if unset.

    Returns:
        The facts: settings, `rows`, `width`, `bad` (samples without features,
        listed in `skipped.jsonl`), and after PCA `variance_kept`.

    Raises:
        ValueError: The teacher, the ids or the folder cannot be used.
    """
    settings = {
        "teacher": without_secrets(teacher),
        **raise_on_all_ranks(lambda: identify(samples, num_samples)),
        "reduced_to": width,
    }
    with ExitStack() as stack:
        rank0_first(lambda: stack.enter_context(lock_path(out)))
        if Path(teacher.partition("?")[0] if is_url(teacher) else teacher).suffix in FILES:
            if not isinstance(samples, Pairs):
                raise ValueError(
                    f"{teacher}: a file of features needs pairs that can be read in any order, "
                    "not a stream; leave data.read at auto"
                )
            pairs = samples
            return rank0_first(lambda: convert_file(local_copy(teacher), pairs, out, settings))
        newest = loading.pin_newest(teacher)
        encoder = raise_on_all_ranks(
            lambda: open_encoder(newest, modality=modality, pooling=pooling, device=device)
        )
        encoder.name = settings["teacher"]
        resolved = resolve_encoding(precision, device)
        encoder.autocast, encoder.engine = autocast(resolved, device), engine
        settings |= {
            "content": rank0_first(lambda: read_content(samples, encoder.reads)),
            "weights": encoder.checksum(),
            "modality": encoder.reads,
            "pooling": pooling,
            "precision": resolved,
        }
        if finished := rank0_first(lambda: read_finished(out, settings, precision)):
            return finished
        raise_on_all_ranks(lambda: require_width(settings, encoder.width))
        store = Store(out / PARTS / rank0_first(encoder.key), setting="--out")
        if isinstance(samples, SampleStream):
            samples = encode_stream(
                samples,
                out / PARTS,
                encoder,
                store if encoder.reads == "image" else Store(None, setting="--out"),
                batch_size=batch_size,
                threads=threads,
                number=num_samples,
            )
        pairs = samples
        if encoder.reads == "image":
            hashes, read = hash_images(pairs), partial(read_image, pairs)
        else:
            hashes, read = hash_texts(pairs), partial(read_captions, pairs)
        bad = encode_missing(store, encoder, hashes, read, batch_size=batch_size, threads=threads)

        def write() -> dict[str, Any]:
            numbers, skipped = store.find(hashes), read_skipped(pairs)
            for row in np.flatnonzero(numbers < 0).tolist():
                skipped.append({**vars(bad[int(hashes[row])]), "sample_id": pairs.sample_id(row)})
            found = numbers[numbers >= 0]
            write_skipped(out / SKIPPED, skipped, pairs.name, good=len(found))
            ids = hash_ids(pairs.sample_ids())[numbers >= 0]
            return write_reduced(out, ids, store.read, found, {**settings, "bad": len(skipped)})

        return rank0_first(write)


def identify(samples: Pairs | SampleStream, num_samples: int | None) -> dict[str, Any]:
    """Facts that tell these samples from others; refuses ids that are not unique."""
    hashes = np.empty(0, np.uint64)
    if isinstance(samples, Pairs):
        if num_samples is not None:
            raise ValueError(f"--num_samples: {samples.name} is no stream; all of it is encoded")
        hashes = hash_ids(samples.sample_ids())
        build_index(hashes, samples.sample_id, name=samples.name)
    return {
        "source": samples.name,
        "samples": len(hashes) or num_samples,
        "ids": checksum(hashes.tobytes()),
    }


def read_content(samples: Pairs | SampleStream, modality: str) -> list[Facts]:
    """The facts of what a tower reads of samples, wherever they lie."""
    unread = {"classes", *{"image": ["captions"], "text": ["images", "sample"]}[modality]}
    return [
        {k: v for k, v in facts.items() if k not in unread}
        for facts in fingerprint_sources(samples)
    ]


def read_finished(
    folder: Path, settings: Mapping[str, Any], precision: Literal["auto"] | Precision = "auto"
) -> dict[str, Any]:
    """The facts of a finished teacher folder; none if it is new, or was interrupted."""
    facts = read_facts(folder)
    others = [path.name for path in folder.glob("[!.]*") if path.name != SKIPPED]
    if others and not facts and not (folder / PARTS).is_dir():
        raise ValueError(f"{folder}: holds {others[0]}; choose a new or empty folder with --out")
    for left in left_by_killed(folder):
        left.unlink(missing_ok=True)
    if "rows" not in facts:
        return {}
    if what := find_difference(facts, settings, precision):
        raise ValueError(f"{folder}: was made with {what}; choose another --out, or delete it")
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    del facts["checksums"]
    return facts


def find_difference(
    facts: Mapping[str, Any], settings: Mapping[str, Any], precision: Literal["auto"] | Precision
) -> str | None:
    """What differs between facts and settings, in words; what is unknown equals any."""
    for key, value in settings.items():
        if key not in facts or (key == "precision" and precision == "auto"):
            continue
        old: Any = facts[key]
        if key == "content":
            if what := describe_change(old, value):
                return what
        elif old != value:
            return f"other {key}" if key in HASHED else f"{key} {old}, not {value}"
    return None


def require_width(settings: Mapping[str, Any], full_width: int) -> None:
    """Refuse to reduce features to a width that they do not have."""
    width = settings["reduced_to"]
    if width is not None and not 0 < width <= full_width:
        teacher = settings["teacher"]
        raise ValueError(f"--width: {width} is not between 1 and {full_width}, {teacher}'s own")


def convert_file(
    file: Path, samples: Pairs, out: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Make a teacher folder of a file's features of these samples; `bad` counts those without."""
    ids = [*samples.sample_ids()]
    stored = read_teacher(file, sample_ids=ids)
    bad = stored.count_missing(ids)  # refuses features of other data
    require_width(settings, stored.width)
    settings = {**settings, "weights": file_checksum(file)}
    if finished := read_finished(out, settings):
        return finished
    rows = stored.find(ids)
    taken = [sample_id for sample_id, row in zip(ids, rows, strict=True) if row >= 0]
    facts = {**settings, "bad": bad}
    return write_reduced(out, taken, stored.read, rows[rows >= 0], facts)


def hash_texts(samples: Pairs) -> Hashes:
    """Hashes of each sample's id and captions."""

    def describe(row: int) -> str:
        with suppress(BadSample):
            return f"{samples.sample_id(row)} {samples.sample_captions(row)}"
        return samples.sample_id(row)

    return hash_ids(map(describe, range(len(samples))))


def write_skipped(path: Path, entries: Sequence[Mapping[str, str]], name: str, good: int) -> None:
    """List samples that cannot be read in a file; raises `ValueError` if no other one is left."""
    if entries:
        write_atomically(path, "".join(to_json(entry) + "\n" for entry in entries))
    else:
        path.unlink(missing_ok=True)
    if not good:
        first = f"{entries[0]['where']}: {entries[0]['reason']}" if entries else "it is empty"
        way_out = f"set root to the folder of the images if they lie elsewhere, or see {path}"
        raise ValueError(f"{name}: no sample could be read ({first}); {way_out}")


def write_reduced(
    out: Path,
    ids: Sequence[str] | Hashes,
    read: Callable[[Numbers], Features],
    rows: Numbers,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Make rows of features a teacher folder, after PCA if asked."""
    (out / PARTS).mkdir(parents=True, exist_ok=True)  # until the end it marks the folder as ours
    facts, width = dict(settings), settings["reduced_to"]
    blocks = np.array_split(rows, -(-len(rows) // BLOCK_ROWS))
    features: Iterable[Features] = map(read, blocks)
    if width is not None:
        mean, axes, facts["variance_kept"] = fit_pca(features, width)
        features = ((read(block).astype(np.float64) - mean) @ axes.T for block in blocks)
    facts = write_folder(out, ids, features, facts)
    shutil.rmtree(out / PARTS, ignore_errors=True)  # or the next call does
    return facts


def embed_start(
    start: TowerPair,
    tokenizer: Tokenizer,
    samples: Pairs,
    *,
    cache: Path,
    of_run: Path,
    autocast: Autocast,
) -> "TeacherFeatures":
    """Text features of the model that a run starts from, for all its samples. All ranks call it.

    They are stored in `cache`; by several hosts, which may have a cache each, in `of_run`.
    """
    encoder = text_encoder(
        start, device_of(start), tokenizer, start.encode_text, autocast=autocast, name="the start"
    )
    key, hashes = rank0_first(encoder.key), hash_texts(samples)
    root = cache if len({*all_gather_object(socket.gethostname())}) == 1 else of_run
    folder = root / rank0_first(lambda: checksum(f"{key} {checksum(hashes.tobytes())}".encode()))
    with ExitStack() as stack:
        rank0_first(lambda: root.mkdir(parents=True, exist_ok=True))
        rank0_first(lambda: stack.enter_context(in_turn(folder)))
        store = Store(folder, setting="run.out")
        encode_missing(store, encoder, hashes, partial(read_captions, samples), batch_size=256)
    ids, rows = index_pairs(samples)
    numbers = store.find(hashes)[rows.view(np.int64)]
    store.forget_order()
    return TeacherFeatures(
        name=str(folder),
        index=np.stack([ids, numbers.view(np.uint64)])[:, numbers >= 0],
        read=store.read,
        width=store.width,
    )


def build_index(hashes: Hashes, sample_id: Callable[[int], str], *, name: str) -> Hashes:
    """The ids' hashes in ascending order, and the row of each `(2, n)`; refuses equal hashes."""
    rows = np.argsort(hashes, kind="stable")
    index = np.stack([hashes[rows], rows.astype(np.uint64)])
    if len(equal := np.flatnonzero(index[0, 1:] == index[0, :-1])):
        first, second = (sample_id(int(rows[equal[0] + i])) for i in (0, 1))
        what = "duplicate sample ids" if first == second else "sample ids with the hash of another"
        raise ValueError(f"{name}: {len(equal)} {what}, such as '{first}' and '{second}'")
    return index


def index_pairs(samples: Pairs) -> Hashes:
    """The index of all samples."""
    return build_index(hash_ids(samples.sample_ids()), samples.sample_id, name=samples.name)


@dataclass(kw_only=True, eq=False)
class TeacherFeatures:
    """Features of a frozen model by sample id, whitened when they are looked up, if asked."""

    name: str  # for messages
    index: Hashes  # as `build_index` makes it
    read: Callable[[Numbers], Features]  # some rows by their numbers: `(n,)` to `(n, q)`
    width: int  # of the features, before whitening
    checksums: npt.NDArray[np.uint32] | None = None  # `row_checksums`, where they are known
    is_in_memory: bool = False  # whiten all at once, which then take 128 bytes a sample
    modality: str | None = None  # `image` or `text`, where it is known what they were made of
    made_of: Sequence[Mapping[str, Any]] = ()  # `content` of the sources, where it is known
    whitening: Whitening | None = None
    joint: Float[Tensor, "q k"] | None = None  # a map into a space that another teacher shares

    def __post_init__(self) -> None:
        self.hashes, self.row_of_hash = self.index[0], self.index[1].view(np.int64)

    @classmethod
    def of_array(
        cls, *, name: str, sample_ids: Sequence[str], features: npt.NDArray[Any]
    ) -> "TeacherFeatures":
        """Features that are not in a teacher folder; refuses those that are not finite."""
        if len(sample_ids) != len(features):
            raise ValueError(f"{name}: {len(sample_ids)} sample ids for {len(features)} features")
        # A sum is finite if all its terms are, and needs no memory.
        bad = np.flatnonzero(~np.isfinite(features.sum(1, dtype=np.float64)))
        if len(bad):
            raise ValueError(
                f"{name}: {len(bad)} of {len(features)} features are not finite, such as those of "
                f"'{sample_ids[bad[0]]}'"
            )
        index = build_index(hash_ids(sample_ids), sample_ids.__getitem__, name=name)
        return cls(name=name, index=index, read=row_reader(features), width=features.shape[1])

    def find(self, sample_ids: Iterable[str]) -> Numbers:
        """The row of each id; -1 where there is none."""
        return find_rows(hash_ids(sample_ids), self.hashes, self.row_of_hash)

    def count_missing(self, sample_ids: Iterable[str]) -> int:
        """The number of these samples that have no features; refuses features of other data."""
        sample_ids = [*sample_ids]
        missing = self.find(sample_ids) < 0
        if missing.all():
            raise ValueError(
                f"{self.name}: no teacher features for {len(missing)} of {len(missing)} training "
                f"samples, such as '{sample_ids[0]}'; make them for this data with protoclip "
                "embed-teacher"
            )
        return int(missing.sum())

    def whiten(self, width: int) -> None:
        """Whiten what is looked up from now on, if it is wider. Collective: processors may round
        differently, and the rows of all ranks are clustered together, so rank 0 fits."""

        def fit() -> Whitening | None:
            rows = self.sample()
            # Few different rows would lie equally far from each other along as many directions.
            most = min(width, len(np.unique(rows, axis=0)) // ROWS_A_DIRECTION)
            joined = self.join_rows(torch.from_numpy(rows.astype(np.float32)))
            return Whitening.fit(joined, most) if most else None

        if (self.width if self.joint is None else self.joint.shape[1]) > width:
            self.whitening = rank0_first(fit)
        if self.is_in_memory and self.whitening is not None:
            rows = np.arange(len(self.hashes))
            blocks = map(self.read, np.array_split(rows, -(-len(rows) // BLOCK_ROWS)))
            whitened = torch.cat([self.whiten_rows(torch.from_numpy(b)).half() for b in blocks])
            self.read, self.width = whitened.numpy().__getitem__, whitened.shape[1]
            self.whitening = None

    def sample(self) -> Features:
        """Some thousand of the features, without damaged ones; `lookup` tells of these."""
        # Hashes are as good as random, so every so many of them are a fair sample.
        step = max(1, len(self.hashes) // SAMPLE)
        order = np.argsort(self.row_of_hash[::step])
        hashes, rows = self.hashes[::step][order], self.row_of_hash[::step][order]
        features = self.read(rows)
        if self.checksums is not None:
            features = features[row_checksums(hashes, features) == self.checksums[rows]]
        return features

    @property
    def content(self) -> dict[str, Any]:
        """What tells these features from others: all ids, and checksums of rows."""
        step = 1 if self.checksums is not None else max(1, len(self.hashes) // SAMPLE)
        hashes, rows = self.hashes[::step], self.row_of_hash[::step]
        if self.checksums is not None:
            checksums = self.checksums[rows]
        else:
            checksums = row_checksums(hashes, self.read(rows))
        return {
            "rows": len(self.hashes),
            "ids": checksum(self.hashes.tobytes()),
            "features": checksum(checksums.tobytes()),
        }

    def lookup(self, sample_ids: Sequence[str]) -> Float[Tensor, "m _"]:
        """Features of these samples, as `rows`, in float32; whitened if `whiten` was called."""
        return self.whiten_rows(self.rows(sample_ids))

    def rows(self, sample_ids: Sequence[str]) -> Float[Tensor, "m q"]:
        """Features of these samples, in half precision if they are stored so, else in float32; a
        row of NaN for one without."""
        hashes = hash_ids(sample_ids)
        rows = find_rows(hashes, self.hashes, self.row_of_hash)
        found = np.flatnonzero(rows >= 0)
        stored = self.read(rows[found])
        if self.checksums is not None:
            checksums = row_checksums(hashes[found], stored)
            if len(wrong := np.flatnonzero(checksums != self.checksums[rows[found]])):
                raise ValueError(
                    f"{self.name}: damaged (the checksum of the features of "
                    f"'{sample_ids[found[wrong[0]]]}' differs in {FEATURES}); {WAY_OUT}"
                )
        half = stored.dtype == np.float16
        features = np.full((len(rows), self.width), np.nan, np.float16 if half else np.float32)
        features[found] = stored
        return torch.from_numpy(features)

    def join_rows(self, rows: Float[Tensor, "m q"]) -> Float[Tensor, "m _"]:
        """These rows in float32, on their device; in the joint space if there is one, where they
        have unit norm. A row of NaN stays one."""
        if self.joint is None:
            return rows.float()
        self.joint = self.joint.to(rows.device)  # moved once
        return F.normalize(rows.float() @ self.joint, dim=-1)

    def whiten_rows(self, rows: Float[Tensor, "m q"]) -> Float[Tensor, "m _"]:
        """What `join_rows` makes of these rows; whitened if `whiten` was called."""
        rows = self.join_rows(rows)
        if self.whitening is None:
            return rows
        if self.whitening.mean.device != rows.device:  # moved once
            self.whitening = self.whitening.to(rows.device)
        return self.whitening(rows)


def row_reader(features: npt.NDArray[Any]) -> Callable[[Numbers], Features]:
    """Reads rows of an array, from its file if it is mapped into memory."""
    if not isinstance(features, np.memmap) or not features.flags.c_contiguous:
        return features.__getitem__
    path, shape = Path(str(features.filename)), features.shape
    return RowFile(path, features.dtype, shape, features.offset).__getitem__


def open_folder(folder: Path) -> TeacherFeatures:
    """The features in a folder; raises `ValueError` if it is not finished, or damaged."""
    facts = read_facts(folder)
    if "rows" not in facts:
        raise ValueError(
            f"{folder}: no finished teacher; if protoclip embed-teacher was stopped, the same "
            "command again finishes it"
        )
    try:
        for name in (FEATURES, INDEX):
            require_regular(folder / name)
        features, index = (np.load(folder / name, mmap_mode="r") for name in (FEATURES, INDEX))
        if features.shape != (facts["rows"], facts["width"]) or index.shape != (2, len(features)):
            raise ValueError(f"not {facts['rows']} rows of width {facts['width']}")
        if features.dtype != HALF or not features.flags.c_contiguous:
            raise ValueError(f"{FEATURES} is not in half precision, row by row")
        for name, written in facts["checksums"].items():
            if file_checksum(folder / name) != written:
                raise ValueError(f"{name} is not what was written: its checksum differs")
        checksums = np.load(folder / CHECKSUMS, mmap_mode="r")
    except Exception as error:  # what is raised for a damaged file has no common class
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{folder}: damaged ({reason}); {WAY_OUT}") from None
    return TeacherFeatures(
        name=str(folder),
        index=index,
        read=row_reader(features),
        width=facts["width"],
        checksums=checksums,
        modality=facts.get("modality"),
        made_of=facts.get("content", ()),
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of a folder; empty while it is unfinished. Raises `ValueError` if damaged."""
    path = folder / FACTS
    return read_sealed(path) if path.is_file() else {}


def write_folder(
    folder: Path,
    sample_ids: Sequence[str] | Hashes,
    blocks: Iterable[Features],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write features, which come some rows at a time, into a folder; returns its facts."""
    hashes = sample_ids if isinstance(sample_ids, np.ndarray) else hash_ids(sample_ids)
    index = build_index(hashes, lambda row: str(sample_ids[row]), name=str(folder))
    # Not through a memory map: a full disk would then crash the process.
    with replacing(folder / FEATURES) as temporary, temporary.open("wb") as file:
        done = width = 0
        checksums = np.empty(len(hashes), np.uint32)
        for features in blocks:
            width, end = features.shape[1], done + len(features)
            if not file.tell():
                header = {"descr": HALF, "fortran_order": False, "shape": (len(hashes), width)}
                np.lib.format.write_array_header_1_0(file, header)
            with np.errstate(over="ignore"):
                rows = np.ascontiguousarray(features, HALF)
            if len(bad := np.flatnonzero(~np.isfinite(rows).all(1))):
                raise ValueError(
                    f"{folder}: {len(bad)} of {len(rows)} features are not finite in half "
                    f"precision (at most 65504), such as those of '{sample_ids[done + bad[0]]}'"
                )
            file.write(rows.tobytes())
            checksums[done:end] = row_checksums(hashes[done:end], rows)
            done = end
    facts = {**facts, "rows": done, "width": width, "dtype": HALF}
    checked: dict[str, str] = {}
    for name, array in ((INDEX, index), (CHECKSUMS, checksums)):
        with replacing(folder / name) as temporary, temporary.open("wb") as file:
            np.save(file, array)
        checked[name] = file_checksum(folder / name)
    content = to_json(seal({**facts, "checksums": checked}), indent=2)
    write_atomically(folder / FACTS, content + "\n", durable=True)
    return facts


def read_teacher(path: str | Path, *, sample_ids: Sequence[str] | None = None) -> TeacherFeatures:
    """Open a teacher folder, or a user's file of features.

    The file is Parquet with the columns `sample_id` and `features` (lists of numbers), or an array
    `NAME.npy` `(n, q)` with its sample ids in `NAME.ids.txt`, one a line. Without that file the
    rows are those of `sample_ids`, if given. Of a sample with several features, such as those of
    its captions or views (lists of lists, or an array `(n, v, q)`), the teacher has the mean.
    Behind a URL there may be the same, but an array needs its ids; `local_copy` fetches it.

    Raises:
        ValueError: There is no such teacher, it is damaged, or its features cannot be used.
    """
    path = local_copy(path)
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        what = "is neither a file nor a folder" if path.exists() else "no such file"
        raise ValueError(f"teacher.features: {path}: {what}")
    try:
        if path.suffix == ".npy":
            features, text = np.load(path, mmap_mode="r"), path.with_suffix(".ids.txt")
            if text.is_file():
                sample_ids = text.read_text("utf-8-sig").removesuffix("\n").split("\n")
            elif sample_ids is None:
                raise ValueError(f"needs its sample ids, one a line, in {text}")
        else:
            sample_ids, features = read_parquet(path)
        if features.ndim == 3 and features.size and np.issubdtype(features.dtype, np.number):
            features = features.mean(1, dtype=np.float32)
        if features.ndim != 2 or not features.size or not np.issubdtype(features.dtype, np.number):
            raise ValueError(
                f"needs numbers of shape (samples, width), not {features.dtype} {features.shape}"
            )
    except Exception as error:  # of many classes
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{path}: not a file of teacher features ({reason})") from None
    return TeacherFeatures.of_array(name=path.name, sample_ids=sample_ids, features=features)


def local_copy(path: str | Path) -> Path:
    """A local path as it is; of a URL, a copy in the cache: of a teacher folder, or a user's file.

    What has changed behind the URL is fetched anew. The processes of a host fetch in turn.
    """
    if not is_url(str(path)):
        return Path(path)
    url, base = without_secrets(str(path)), str(path).partition("?")[0].rstrip("/")
    name = base.rpartition("/")[2]
    if name.endswith(".parquet"):
        files = {name: str(path)}
    elif name.endswith(".npy"):
        ids = f"{name.removesuffix('.npy')}.ids.txt"
        files = {name: str(path), ids: f"{base.removesuffix('.npy')}.ids.txt"}
    else:
        files = {name: f"{base}/{name}" for name in (FACTS, INDEX, CHECKSUMS, FEATURES)}
    copy = cache_folder() / "teachers" / digest({"files": [*map(fingerprint, files.values())]})
    copy.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(copy):
        if not copy.is_dir():
            say(f"note: {url} is copied to {copy}")
            # If the fetch breaks off, the next one may have another name.
            with TemporaryDirectory(dir=copy.parent, prefix=".") as folder:
                scratch = Path(folder, copy.name)
                for name, file in files.items():
                    try:
                        download(file, scratch / name)
                    except Exception as error:  # the clients of stores have exceptions of their own
                        raise ValueError(
                            f"{without_secrets(file)}: {describe_error(error)}"
                        ) from None
                scratch.rename(copy)
    return copy if FACTS in files else copy / next(iter(files))


def read_parquet(path: Path) -> tuple[list[str], npt.NDArray[Any]]:
    """Sample ids and their features `(n, q)`, of several features the mean."""
    table = pq.read_table(path, columns=["sample_id", "features"])
    column, counts = table["features"], np.ones(len(table), np.int64)
    if is_list(column.type) and is_list(column.type.value_type):
        counts = pc.list_value_length(column).fill_null(0).to_numpy()
        column = pc.list_flatten(column)
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    width = lengths.max(initial=0)
    narrow, empty = int((lengths != width).sum()), int((counts == 0).sum())
    if wrong := narrow + empty + table["sample_id"].null_count:
        number = len(lengths) + empty
        raise ValueError(f"{wrong} of {number} rows lack an id or are not of width {width}")
    rows = [part.flatten().to_numpy(zero_copy_only=False) for part in column.chunks]
    ids = table["sample_id"].cast(pa.string()).to_pylist()
    features = np.concatenate([np.zeros(0, np.int8), *rows]).reshape(counts.sum(), width)
    if (counts != 1).any():
        sums = np.add.reduceat(features, np.cumsum(counts) - counts, dtype=np.float32)
        features = sums / counts[:, None].astype(np.float32)
    return ids, features


def open_teachers(
    config: Config, samples: Pairs | SampleStream, note: Callable[[str], None]
) -> dict[str, TeacherFeatures]:
    """The external teachers by name that are files; notes how many samples one does not know."""
    sources = zip(samples.sources, list_entries(config.data), strict=True)
    # In a mixture ids begin with the source's name.
    prefixes = [getattr(s, "prefix", "") for s, entry in sources if entry.path == "emoji"]
    loaded: dict[str, TeacherFeatures] = {}
    for name, teacher in config.external_teachers.items():
        assert teacher.features is not None
        is_encoded = teacher.features == START or is_teacher_model(teacher.features)
        if is_encoded and not isinstance(samples, Pairs):
            raise ValueError(
                f"teacher.features: {teacher.features} needs pairs that can be read in any order, "
                "not a stream; copy the shards, and leave data.read out"
            )
        if is_encoded or teacher.features in ENCODERS.values():
            continue
        if teacher.features == "emoji":
            plain, features = read_parquet(emoji_teacher_path())
            ids = [prefix + sample_id for prefix in prefixes or [""] for sample_id in plain]
            features = np.tile(features, (len(ids) // len(plain), 1))
            stored = TeacherFeatures.of_array(name=name, sample_ids=ids, features=features)
            stored.modality = "text"
        else:
            stored = read_teacher(teacher.features)
        for source in samples.sources:
            require_same_rows(stored, source)
        loaded[name] = stored
        for missing in note_unknown(name, stored, samples):
            note(missing)
    return loaded


def embed_teachers(config: Config, pairs: Pairs) -> dict[str, TeacherFeatures]:
    """The external teachers by name that are models: each encodes the pairs once. Collective."""
    device, embedded = choose_device(config.run.device), dict[str, TeacherFeatures]()
    for name, teacher in config.external_teachers.items():
        if teacher.features is None or not is_teacher_model(teacher.features):
            continue
        key = getattr(pairs, "key", "")  # sources of one's own may have none
        of = {"teacher": teacher.features, "key": key, **identify(pairs, None)}
        out = cache_folder() / "teachers" / digest(of)
        embed_teacher(
            teacher.features,
            pairs,
            out,
            device=device,
            engine=config.encode.engine,
            threads=config.data.threads,
        )
        embedded[name] = read_teacher(out)
    return embedded


def require_same_rows(stored: TeacherFeatures, source: Any) -> None:
    """Refuse features of another table, where ids are the numbers of rows."""
    if not isinstance(source, ImageTextPairs) or source.id_column is not None:
        return
    whole = copy(source)
    # Features may also be of rows that `data.without` leaves out.
    whole.rows = range(whole.table.num_rows)
    for facts in stored.made_of:
        is_of_source, images = facts.get("ids") == f"{source.name}/row", "sample" in facts
        fingerprints = (s.fingerprint(images=images) for s in (whole, source))
        changes = [is_of_source and describe_change([facts], [current]) for current in fingerprints]
        if all(changes):
            raise ValueError(
                f"teacher.features: {stored.name} was made of another table ({changes[0]}), and "
                f"the ids of '{source.name}' are the numbers of its rows; make it again with "
                "protoclip embed-teacher, or give both tables a column of ids"
            )


def note_unknown(name: str, stored: TeacherFeatures, samples: Pairs | SampleStream) -> list[str]:
    """A note on the samples that a teacher has no features of; of a stream on rank 0 alone."""
    if isinstance(samples, Pairs):
        rows = evenly_spaced(len(samples), LOOKED_UP, seed=0)
        ids = [samples.sample_id(row) for row in rows]
        if (stored.find(ids) < 0).all():
            ids = [*samples.sample_ids()]  # it may know a few of the others
        missing = stored.count_missing(ids)
        looked_up = " that were looked up" * (len(ids) < len(samples))
        note = (
            f"{name}: no features of {missing} of {len(ids)} training samples{looked_up}; its loss "
            "leaves such samples out"
        )
        return [note] if missing else []
    ids = list[str]()
    for stream in samples.sources if rank() == 0 else ():
        prefix = f"{stream.name}/" if len(samples.sources) > 1 else ""
        if not is_url(stream.shards[0]):  # what is not on this machine is not read for it
            items = islice(stream.read(stream.shards[0]), FIRST)
            ids += [prefix + item.sample_id for item in items if isinstance(item, Sample)]
    note = (
        f"{name}: has features of none of the first samples of {samples.name}; a teacher that was "
        "made of other data, or under other names, teaches nothing"
    )
    return [note] if ids and (stored.find(ids) < 0).all() else []
