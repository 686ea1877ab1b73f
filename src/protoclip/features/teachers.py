"""The external teachers of a run: features that its settings name, whitened as they say.

A teacher is a folder of the store, a user's own file, the bundled emoji's, or the frozen start,
whose features are made when the run begins.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protoclip.config import HALVES, START, Config
from protoclip.data.access import is_local
from protoclip.data.emoji import emoji_teacher_path
from protoclip.data.mixture import sources_of
from protoclip.data.pairs import Pairs, Sample, SampleStream
from protoclip.data.sources import entries
from protoclip.data.stream import ShardStream
from protoclip.distributed.collectives import rank
from protoclip.features.store import DAMAGED, StoredFeatures, load_array, open_folder
from protoclip.features.whiten import Whitens

FILES = (".npy", ".parquet")  # of a user's own features
FIRST = 64  # samples of a stream of which a teacher should know one


def read_teacher(path: str | Path, *, sample_ids: Sequence[str] | None = None) -> StoredFeatures:
    """Open a teacher folder, or a user's file of features.

    The file is Parquet with the columns `sample_id` and `features` (lists of numbers), or an array
    `NAME.npy` `(n, q)` with its sample ids in `NAME.ids.txt`, one a line. Without that file the
    rows are those of `sample_ids`, if given. Of a sample with several features, such as those of
    its captions or views (lists of lists, or an array `(n, v, q)`), the teacher has the mean.

    Raises:
        ValueError: There is no such teacher, it is damaged, or its features cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        what = "is neither a file nor a folder" if path.exists() else "no such file"
        raise ValueError(f"teacher.features: {path}: {what}")
    try:
        if path.suffix == ".npy":
            features, text = load_array(path), path.with_suffix(".ids.txt")
            if text.is_file():
                sample_ids = text.read_text("utf-8").removesuffix("\n").split("\n")
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
) -> dict[str, Whitens]:
    """The external teachers by name, without the frozen start, which is not embedded yet.

    `whiten` is the next step. Notes how many samples a teacher has no features of.

    Raises:
        ValueError: There is no such teacher, or it has features of none of the samples.
    """
    sources = zip(sources_of(samples), entries(config.data), strict=True)
    # In a mixture ids begin with the source's name.
    prefixes = [getattr(s, "prefix", "") for s, entry in sources if entry.path == "emoji"]
    loaded: dict[str, Whitens] = {}
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
        loaded[name] = stored
        if isinstance(samples, Pairs) and (missing := stored.missing(samples.sample_ids())):
            note(
                f"{name}: no features of {missing} of {len(samples)} training samples, which its "
                "loss leaves out"
            )
        is_first = rank() == 0
        if isinstance(samples, SampleStream) and is_first and not knows_any(stored, samples):
            note(
                f"{name}: has features of none of the first samples of {samples.name}; a teacher "
                "that was made of other data, or under other names, teaches nothing"
            )
    return loaded


def knows_any(stored: StoredFeatures, samples: SampleStream) -> bool:
    """Whether a teacher knows a sample at the beginning of a stream; yes if there is none to see.

    What is not on this machine is not read for it.
    """
    streams = [each for each in sources_of(samples) if isinstance(each, ShardStream)]
    ids = []
    for stream in streams:
        prefix = f"{stream.name}/" if len(streams) > 1 else ""
        if is_local(stream.shards[0]):
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


def heads(
    config: Config, teachers: Mapping[str, Whitens], width: int
) -> dict[str, tuple[str, int | None]]:
    """Of each teacher to be distilled the tower that learns, `image` or `text`, and how wide its
    features are; None for relations, which need no head.

    Args:
        width: Of the model's features, which those of the start have too.

    Raises:
        ValueError: The tower is not known, or the run leaves it as it is.
    """
    learned: dict[str, tuple[str, int | None]] = {}
    for name, teacher in config.distilled_teachers.items():
        modality = "text" if teacher.features == START else teachers[name].modality
        tower = teacher.tower or modality
        if tower not in ("image", "text"):
            raise ValueError(
                f"teacher.tower: {teacher.features} does not say what it was made of; name the "
                "tower that learns it, image or text"
            )
        if tower in config.model.locked and not config.model.projections_are_new:
            raise ValueError(
                f"teacher.distil: {name} is for the {tower} tower, which model.locked leaves as "
                f"it is; set teacher.distil = 0, or unlock the tower"
            )
        teacher_width = teachers[name].width if name in teachers else width
        learned[name] = tower, teacher_width if config.loss.distil_by == "features" else None
    return learned
