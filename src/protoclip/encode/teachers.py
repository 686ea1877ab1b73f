"""The external teachers of a run: features that its settings name, whitened as they say.

A teacher is a folder of the store, a user's own file, the bundled emoji's, or the frozen start,
whose features are made when the run begins. Those in a store or on the web are copied to the cache
first, whole or not at all.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protoclip.config import HALVES, START, Config, TeacherConfig
from protoclip.data.access import digest, download, fingerprint, is_url, reason_of
from protoclip.data.content import difference
from protoclip.data.emoji import emoji_teacher_path
from protoclip.data.index import cache_folder
from protoclip.data.pairs import ImageTextPairs, Pairs, Sample, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.data.sources import entries
from protoclip.data.stream import ShardStream
from protoclip.distributed.collectives import rank
from protoclip.encode import store
from protoclip.encode.store import DAMAGED, StoredFeatures, load_array, open_folder
from protoclip.encode.whiten import Whitens
from protoclip.files import in_turn
from protoclip.terminal import say, without_secrets

T = TypeVar("T")
FILES = (".npy", ".parquet")  # of a user's own features
FIRST = 64  # samples of a stream of which a teacher should know one
LOOKED_UP = 100_000  # samples of pairs, so that a run on many begins as soon as one on few


def read_teacher(path: str | Path, *, sample_ids: Sequence[str] | None = None) -> StoredFeatures:
    """Open a teacher folder, or a user's file of features.

    The file is Parquet with the columns `sample_id` and `features` (lists of numbers), or an array
    `NAME.npy` `(n, q)` with its sample ids in `NAME.ids.txt`, one a line. Without that file the
    rows are those of `sample_ids`, if given. Of a sample with several features, such as those of
    its captions or views (lists of lists, or an array `(n, v, q)`), the teacher has the mean.
    Behind a URL there may be the same, but an array needs its ids; `local_copy` fetches it.

    Raises:
        ValueError: There is no such teacher, it is damaged, or its features cannot be used.
    """
    given, path = str(path), local_copy(path)
    if path.is_dir():
        if not is_url(given):
            return open_folder(path)
        url = without_secrets(given)
        again = f"delete {path}, and give the command again, which fetches {url} anew"
        opened = open_folder(path, way_out=again)
        opened.name = f"{url}, copied to {path}"
        return opened
    if not path.is_file():
        what = "is neither a file nor a folder" if path.exists() else "no such file"
        raise ValueError(f"teacher.features: {path}: {what}")
    try:
        if path.suffix == ".npy":
            features, text = load_array(path), path.with_suffix(".ids.txt")
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
    except DAMAGED as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{path}: not a file of teacher features ({reason})") from None
    return StoredFeatures.in_memory(name=path.name, sample_ids=sample_ids, features=features)


def local_copy(path: str | Path) -> Path:
    """A local path as it is; of a URL, a copy in the cache: of a teacher folder, or a user's file.

    What the store says of the files (sizes, checksums, times) names the copy, so that what has
    changed there is fetched anew. The processes of a host fetch in turn.

    Raises:
        ValueError: A file is missing, cannot be read, or changed meanwhile, or the folder is
            damaged; names the URL.
    """
    url = str(path)
    if not is_url(url):
        return Path(path)
    files = files_behind(url)
    prints = [fingerprint(each) for each in files.values()]
    copy = cache_folder() / "teachers" / digest({"files": prints})
    copy.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(copy):
        if not copy.is_dir():
            scratch = copy.with_name(f".{copy.name}.fetched")
            shutil.rmtree(scratch, ignore_errors=True)  # of a fetch that was killed
            say(f"note: {without_secrets(url)} is copied to {copy}")
            try:
                fetch(files, scratch)
                if store.FACTS in files:
                    looked_at(url, scratch, store.open_folder)
                if prints != [fingerprint(each) for each in files.values()]:
                    raise ValueError(
                        f"{without_secrets(url)}: changed while it was fetched; give the same "
                        "command again"
                    )
                scratch.rename(copy)
            except BaseException:  # the next one may have another name
                shutil.rmtree(scratch, ignore_errors=True)
                raise
    return copy if store.FACTS in files else copy / next(iter(files))


def files_behind(url: str) -> dict[str, str]:
    """The URLs of a teacher folder, or of a user's file, by the names of their copies.

    Raises:
        ValueError: The facts of the folder are missing, cannot be read, or are damaged.
    """
    path = url.partition("?")[0].rstrip("/")
    name = path.rpartition("/")[2]
    if name.endswith(".parquet"):
        return {name: url}
    if name.endswith(".npy"):
        stem = path.removesuffix(".npy")
        return {name: url, f"{name.removesuffix('.npy')}.ids.txt": f"{stem}.ids.txt"}
    names = [store.FACTS, store.INDEX, store.CHECKSUMS, store.FEATURES]
    with TemporaryDirectory() as scratch:
        fetch({store.FACTS: f"{path}/{store.FACTS}"}, Path(scratch))
        facts = looked_at(path, Path(scratch), store.read_facts)
    if "checksums" not in facts:  # earlier versions wrote none
        names.remove(store.CHECKSUMS)
    return {name: f"{path}/{name}" for name in names}


def fetch(files: dict[str, str], folder: Path) -> None:
    """Copy files to a new folder."""
    for name, each in files.items():
        try:
            download(each, folder / name)
        except Exception as error:  # the clients of stores have exceptions of their own
            raise ValueError(f"{without_secrets(each)}: {reason_of(error)}") from None


def looked_at(url: str, folder: Path, read: Callable[[Path], T]) -> T:
    """What is read in the copy of a folder; a `ValueError` names the URL in its place."""
    try:
        return read(folder)
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), without_secrets(url))) from None


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


def is_list(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in kinds)


def teachers(
    config: Config, samples: Pairs | SampleStream, note: Callable[[str], None]
) -> dict[str, StoredFeatures]:
    """The external teachers by name, without the frozen start, which is not embedded yet.

    `whiten` is the next step. Notes how many samples a teacher has no features of.

    Raises:
        ValueError: There is no such teacher, it has features of none of the samples, or of others
            under the same numbers of rows.
    """
    sources = zip(samples.sources, entries(config.data), strict=True)
    # In a mixture ids begin with the source's name.
    prefixes = [getattr(s, "prefix", "") for s, entry in sources if entry.path == "emoji"]
    loaded: dict[str, StoredFeatures] = {}
    for name, teacher in config.external_teachers.items():
        assert teacher.features is not None
        if teacher.features == START:  # `start.embed_start` makes these, when the run begins
            if not isinstance(samples, Pairs):
                raise ValueError(
                    f"teacher.features: {START} needs pairs that can be read in any order, not a "
                    "stream; copy the shards, and leave data.read out"
                )
            continue
        if teacher.features in HALVES.values():  # `align` has them
            continue
        if teacher.features == "emoji":
            plain, features = read_parquet(emoji_teacher_path())
            ids = [prefix + sample_id for prefix in prefixes or [""] for sample_id in plain]
            features = np.tile(features, (len(ids) // len(plain), 1))
            stored = StoredFeatures.in_memory(name=name, sample_ids=ids, features=features)
            stored.modality = "text"
        else:
            stored = read_teacher(teacher.features)
        for source in samples.sources:
            require_same_rows(stored, source)
        loaded[name] = stored
        for said in unknown_to(name, stored, samples):
            note(said)
    return loaded


def require_same_rows(stored: StoredFeatures, source: Any) -> None:
    """Refuse features of another table, where ids are the numbers of rows."""
    if not isinstance(source, ImageTextPairs) or source.id_column is not None:
        return
    whole = copy(source)
    whole.rows = None  # features may also be of rows that `data.without` leaves out
    for facts in stored.made_of:
        is_of_source, images = facts.get("ids") == f"{source.name}/row", "sample" in facts
        known = (s.fingerprint(images=images) for s in (whole, source))
        changes = [is_of_source and difference([facts], [of_one]) for of_one in known]
        if all(changes):
            raise ValueError(
                f"teacher.features: {stored.name} was made of another table ({changes[0]}), and "
                f"the ids of '{source.name}' are the numbers of its rows; make it again with "
                "protoclip embed-teacher, or give both tables a column of ids"
            )


def unknown_to(name: str, stored: StoredFeatures, samples: Pairs | SampleStream) -> list[str]:
    """A note on the samples that a teacher has no features of; of a stream on rank 0 alone."""
    if isinstance(samples, Pairs):
        rows = evenly_spaced(len(samples), min(len(samples), LOOKED_UP), seed=0)
        ids = [samples.sample_id(row) for row in rows]
        if (stored.find(ids) < 0).all():
            ids = [*samples.sample_ids()]  # it may know a few of the others
        missing = stored.missing(ids)
        looked_up = " that were looked up" * (len(ids) < len(samples))
        note = (
            f"{name}: no features of {missing} of {len(ids)} training samples{looked_up}; its loss "
            "leaves such samples out"
        )
        return [note] if missing else []
    note = (
        f"{name}: has features of none of the first samples of {samples.name}; a teacher that was "
        "made of other data, or under other names, teaches nothing"
    )
    return [] if rank() != 0 or knows_any(stored, samples) else [note]


def knows_any(stored: StoredFeatures, samples: SampleStream) -> bool:
    """Whether a teacher knows a sample at the beginning of a stream; yes if there is none to see.

    What is not on this machine is not read for it.
    """
    streams = [each for each in samples.sources if isinstance(each, ShardStream)]
    ids = []
    for stream in streams:
        prefix = f"{stream.name}/" if len(streams) > 1 else ""
        if not is_url(stream.shards[0]):
            items = islice(stream.read(stream.shards[0]), FIRST)
            ids += [prefix + item.sample_id for item in items if isinstance(item, Sample)]
    return not ids or bool((stored.find(ids) >= 0).any())


def refuse_halves(config: Config) -> None:
    """Refuse teachers that `align` alone has."""
    for teacher in config.external_teachers.values():
        if teacher.features in HALVES.values():
            raise ValueError(
                f"teacher.features: {teacher.features} is a half of protoclip align; name a file, "
                "a folder of protoclip embed-teacher, or emoji"
            )


def whiten(config: Config, teachers: Mapping[str, Whitens]) -> None:
    """Whiten each teacher as its settings say. Collective."""
    for name, teacher in config.grouping_teachers.items():
        if teacher.whiten:
            teachers[name].whiten(teacher.whiten)


def grouping(config: Config, teachers: Mapping[str, Whitens]) -> dict[str, Whitens]:
    """Those of the teachers whose features are clustered."""
    return {name: each for name, each in teachers.items() if name in config.grouping_teachers}


def with_each(config: Config, change: Callable[[TeacherConfig], TeacherConfig]) -> Config:
    """The settings with every teacher changed."""
    if config.teachers:
        return replace(config, teachers=[change(teacher) for teacher in config.teachers])
    return replace(config, teacher=change(config.teacher))


def undistilled(config: Config) -> Config:
    """The settings with `teacher.distil` 0 where it is unset, as for other commands than `train`:
    what it brings was measured there."""
    return with_each(config, lambda t: replace(t, distil=0.0) if t.distil is None else t)


def stays(config: Config, tower: str) -> bool:
    """Whether the run leaves this tower as it is, its projection too."""
    return tower in config.model.locked and not config.model.projections_are_new


def with_distillation(config: Config, teachers: Mapping[str, Whitens]) -> tuple[Config, list[str]]:
    """The settings with `teacher.distil`, where it is unset: 1 for a teacher that groups, if a
    tower can learn from it. Notes that, and each teacher that does not say which tower.

    Beside groups at the default weights that is the best use of a teacher on four kinds of pairs,
    or within 0.3 points of it (docs/teachers.md).
    """
    notes = list[str]()

    def weight(teacher: TeacherConfig) -> float:
        name = teacher.name
        if name not in config.grouping_teachers or teacher.features == START:
            return 0.0
        tower = teacher.tower or teachers[name].modality
        if tower is None:
            notes.append(
                f"{name}.distil = 0, since {teacher.features} does not say what it was made of; "
                f"with {name}.tower, image or text, that tower learns from its features too"
            )
            return 0.0
        if stays(config, tower):
            notes.append(f"{name}.distil = 0, since model.locked leaves the {tower} tower as it is")
            return 0.0
        notes.append(f"{name}.distil = 1, so the {tower} tower learns from its features too")
        return 1.0

    def filled(teacher: TeacherConfig) -> TeacherConfig:
        return replace(teacher, distil=weight(teacher)) if teacher.distil is None else teacher

    return with_each(config, filled), notes


def with_towers(config: Config, teachers: Mapping[str, Whitens]) -> tuple[Config, list[str]]:
    """The settings with the tower that learns each teacher to be distilled: that of its modality.

    Notes each that is set to the other tower, and what `with_distillation` does.

    Raises:
        ValueError: A tower is not known, or the run leaves it as it is.
    """
    config, notes = with_distillation(config, teachers)

    def filled(teacher: TeacherConfig) -> TeacherConfig:
        name = teacher.name
        if name not in config.distilled_teachers:
            return teacher
        modality = "text" if teacher.features == START else teachers[name].modality
        tower: Any = teacher.tower or modality
        if tower not in ("image", "text"):
            raise ValueError(
                f"teacher.tower: {teacher.features} does not say what it was made of; name the "
                "tower that learns it, image or text"
            )
        if stays(config, tower):
            raise ValueError(
                f"teacher.distil: {name} is for the {tower} tower, which model.locked leaves as "
                f"it is; set teacher.distil = 0, or unlock the tower"
            )
        if modality not in (None, tower):
            notes.append(
                f"{name}.tower = {tower}, though its features were made of {modality}s; {modality} "
                "is usual"
            )
        return replace(teacher, tower=tower)

    return with_each(config, filled), notes


def learning_towers(config: Config) -> dict[str, str]:
    """The tower that learns the relations of each teacher to be distilled, `image` or `text`.

    The towers of `config` are filled.
    """
    return {name: str(teacher.tower) for name, teacher in config.distilled_teachers.items()}
