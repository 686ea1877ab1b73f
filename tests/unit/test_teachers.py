"""Teacher features: folders, files of the user's own, look-ups, and PCA."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from protoclip.data.emoji import emoji_table, emoji_teacher_path
from protoclip.teachers.feature_files import open_feature_file
from protoclip.teachers.pca import fit_reduction
from protoclip.teachers.store import TeacherFeatures, read_teacher, write_folder


def names(count: int) -> list[str]:
    return [f"sample/{row}" for row in range(count)]


def rows(count: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float16)


def write(
    folder: Path, ids: list[str], features: np.ndarray, *, block: int = 7, shard_rows: int = 10
) -> TeacherFeatures:
    """A folder written in blocks that do not end where shards do."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = ((ids[i : i + block], features[i : i + block]) for i in range(0, len(ids), block))
    write_folder(
        folder,
        blocks,
        num_rows=len(ids),
        width=features.shape[1],
        facts={"teacher": "test"},
        shard_rows=shard_rows,
    )
    return read_teacher(folder)


def write_parquet(path: Path, ids: list[str], features: list[list[float] | None]) -> Path:
    pq.write_table(
        pa.table({"sample_id": ids, "features": pa.array(features, pa.list_(pa.float32()))}), path
    )
    return path


def in_memory(ids: list[str], features: np.ndarray, folder: Path) -> TeacherFeatures:
    return TeacherFeatures.in_memory(name="mine", sample_ids=ids, features=features)


def from_folder(ids: list[str], features: np.ndarray, folder: Path) -> TeacherFeatures:
    return write(folder / "teacher", ids, features)


def from_parquet(ids: list[str], features: np.ndarray, folder: Path) -> TeacherFeatures:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    pq.write_table(pa.table({"sample_id": ids, "features": flat}), folder / "mine.parquet")
    return read_teacher(folder / "mine.parquet")


def from_array(ids: list[str], features: np.ndarray, folder: Path) -> TeacherFeatures:
    np.save(folder / "mine.npy", features)
    (folder / "mine.ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return read_teacher(folder / "mine.npy")


@pytest.mark.parametrize("opened", [in_memory, from_folder, from_parquet, from_array])
def test_features_come_back_by_sample_id(
    opened: Callable[[list[str], np.ndarray, Path], TeacherFeatures], tmp_path: Path
) -> None:
    """In the order asked for, repeats included, as float32; an unknown id is a row of NaN."""
    ids, features = [*names(33), "ünïcode, with a comma"], rows(34)
    teacher = opened(ids, features, tmp_path)
    assert (len(teacher), teacher.width) == (34, 6)
    asked = [33, 0, 10, 9, 0, 21, 32]
    found = teacher.lookup([ids[row] for row in asked])
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), features[asked].astype(np.float32))
    mixed = teacher.lookup(["nobody", ids[4], "sample/34"])
    assert mixed.isnan().all(1).tolist() == [True, False, True]
    np.testing.assert_array_equal(mixed[1].numpy(), features[4].astype(np.float32))
    assert teacher.lookup([]).shape == (0, 6)


def test_missing_samples_are_counted_and_all_missing_refused() -> None:
    """A run with some samples unknown goes on; features of other data do not pass."""
    teacher = TeacherFeatures.in_memory(name="mine", sample_ids=names(5), features=rows(5))
    assert teacher.missing(iter(names(5))) == 0
    assert teacher.missing(iter([*names(3), "x", "y"])) == 2
    with pytest.raises(ValueError, match=r"mine: no teacher features for 2 of 2 .* such as 'x'"):
        teacher.missing(["x", "y"])


def test_missing_goes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """More ids than a block holds count as they would at once."""
    monkeypatch.setattr("protoclip.teachers.store.BLOCK_ROWS", 4)
    teacher = TeacherFeatures.in_memory(name="mine", sample_ids=names(9), features=rows(9))
    assert teacher.missing([*(f"x{i}" for i in range(6)), *names(9)]) == 6


def broken(row: int, value: float) -> np.ndarray:
    features = rows(12).astype(np.float32)
    features[row] = value
    return features


@pytest.mark.parametrize("opened", [in_memory, from_folder, from_parquet, from_array])
def test_faults_are_counted(
    opened: Callable[[list[str], np.ndarray, Path], TeacherFeatures], tmp_path: Path
) -> None:
    """Duplicate ids and non-finite rows are refused, in one line with their number."""
    with pytest.raises(ValueError, match=r"^[^\n]*2 duplicate sample ids, such as 'sample/3'"):
        opened([*names(10), "sample/3", "sample/3"], rows(12), tmp_path)
    features = broken(2, np.nan)
    features[11, 0] = np.inf
    with pytest.raises(ValueError, match=r"^[^\n]*2 of 12 features are not finite"):
        opened(names(12), features, tmp_path)
    assert not (tmp_path / "teacher" / "facts.json").exists()


def test_what_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    """A finite number above 65504 would be stored as infinity."""
    with pytest.raises(ValueError, match=r"1 of 12 .* range of 65504, such as those of 'sample/5'"):
        write(tmp_path / "teacher", names(12), broken(5, 1e5))
    assert list((tmp_path / "teacher").iterdir()) == []


def test_different_ids_of_one_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index holds hashes alone, so a collision must not pass for a duplicate or a match."""
    monkeypatch.setattr(
        "protoclip.teachers.store.hash_ids",
        lambda ids: np.array([len(i) for i in ids], dtype=np.uint64),
    )
    with pytest.raises(ValueError, match="'aa' and 'bb' have one hash"):
        TeacherFeatures.in_memory(name="mine", sample_ids=["a", "aa", "bb"], features=rows(3))


def test_another_number_of_ids_than_rows(tmp_path: Path) -> None:
    """With both numbers, wherever the ids come from."""
    with pytest.raises(ValueError, match="4 sample ids for 5 features"):
        TeacherFeatures.in_memory(name="mine", sample_ids=names(4), features=rows(5))
    np.save(tmp_path / "mine.npy", rows(5))
    with pytest.raises(ValueError, match=r"needs its sample ids, one a line, in .*mine.ids.txt"):
        read_teacher(tmp_path / "mine.npy")
    with pytest.raises(ValueError, match="5 features for 3 sample ids"):
        open_feature_file(tmp_path / "mine.npy", sample_ids=lambda: names(3))
    (tmp_path / "mine.ids.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(ValueError, match="5 features for 2 sample ids"):
        read_teacher(tmp_path / "mine.npy")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([[1.0, 2.0], [1.0], None], "2 of 3 rows are not of width 2"),
        ([[], [], []], "empty lists"),
        ([], "holds no features"),
    ],
)
def test_parquet_rows_need_one_width(
    features: list[list[float] | None], message: str, tmp_path: Path
) -> None:
    """Rows of unequal width are counted."""
    path = write_parquet(tmp_path / "mine.parquet", names(len(features)), features)
    with pytest.raises(ValueError, match=message):
        read_teacher(path)


@pytest.mark.parametrize("column", [["text", "b"], [1.0, 2.0], [["x"], ["y"]]])
def test_parquet_features_are_lists_of_numbers(column: list[object], tmp_path: Path) -> None:
    """Anything else in the column is named."""
    pq.write_table(pa.table({"sample_id": ["a", "b"], "features": column}), tmp_path / "m.parquet")
    with pytest.raises(ValueError, match="'features' is no column of lists of numbers"):
        read_teacher(tmp_path / "m.parquet")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"not float64 of shape \(4,\)"),
        (np.array([["a", "b"]]), "must be numbers"),
        (np.array([[{}]]), "not a NumPy array"),
    ],
)
def test_arrays_are_rows_of_numbers(array: np.ndarray, message: str, tmp_path: Path) -> None:
    """Another shape or type, and pickled objects, are refused."""
    np.save(tmp_path / "mine.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_teacher(tmp_path / "mine.npy")


def test_what_is_no_teacher_is_named(tmp_path: Path) -> None:
    """Nothing there, no Parquet, a column missing, a folder that is unfinished."""
    with pytest.raises(ValueError, match=r"teacher.features: .*other.parquet: no such file"):
        read_teacher(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="not a Parquet file"):
        read_teacher(tmp_path / "text.parquet")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "columns.parquet")
    with pytest.raises(ValueError, match="no column 'sample_id'"):
        read_teacher(tmp_path / "columns.parquet")
    with pytest.raises(ValueError, match="unfinished: the same command again"):
        read_teacher(tmp_path)


def shorten(folder: Path) -> None:
    file = folder / "features-00001.npy"
    file.write_bytes(file.read_bytes()[:-20])


def remove(folder: Path) -> None:
    (folder / "features-00001.npy").unlink()


def widen(folder: Path) -> None:
    np.save(folder / "features-00002.npy", rows(5, width=7))


def garble(folder: Path) -> None:
    (folder / "facts.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("damage", [shorten, remove, widen, garble])
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """A file that is cut off, missing, or of another width is found when the folder is opened."""
    write(tmp_path / "t", names(25), rows(25))
    damage(tmp_path / "t")
    with pytest.raises(ValueError, match=r"damaged|do not hold 25 rows of width 6"):
        read_teacher(tmp_path / "t")


def test_a_folder_says_what_made_it(tmp_path: Path) -> None:
    """Shards, ids in the order of rows, and facts; nothing else is left behind."""
    write(tmp_path / "t", names(25), rows(25))
    files = sorted(path.name for path in (tmp_path / "t").iterdir())
    shards = [f"features-0000{i}.npy" for i in range(3)]
    assert files == ["facts.json", *shards, "hashes.npy", "ids.arrow", "rows.npy"]
    facts = json.loads((tmp_path / "t" / "facts.json").read_text(encoding="utf-8"))
    assert facts == {"teacher": "test", "rows": 25, "width": 6, "shard_rows": 10}
    stacked = np.concatenate([np.load(tmp_path / "t" / name) for name in shards])
    np.testing.assert_array_equal(stacked, rows(25))
    with pa.memory_map(str(tmp_path / "t" / "ids.arrow")) as source:
        assert pa.ipc.open_file(source).read_all()["sample_id"].to_pylist() == names(25)


def memory(kind: str) -> int:
    """Bytes of this process: `Anonymous`, which no file stands behind, or all that is `Rss`."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["Anonymous", "Rss"])
def test_an_open_folder_costs_little_memory(kind: str, tmp_path: Path) -> None:
    """Neither opening 200,000 features nor looking up some all over the file keeps it in memory."""
    count, width = 200_000, 64
    write(tmp_path / "t", names(count), rows(count, width), block=50_000, shard_rows=65_536)
    read_teacher(tmp_path / "t").lookup(names(10))
    before = memory(kind)
    teacher = read_teacher(tmp_path / "t")
    opened = memory(kind)
    found = teacher.lookup(names(count)[::100])
    assert len(teacher) == count
    assert found.isfinite().all()
    # The features are 26 MB, and of their index of 3 MB pages may stay.
    assert opened - before < 1_000_000
    assert memory(kind) - before < {"Anonymous": 2_000_000, "Rss": 6_000_000}[kind]


def test_the_bundled_teacher_is_a_teacher() -> None:
    """It has features for every sample of the bundled data, as its Parquet file holds them."""
    teacher = read_teacher(emoji_teacher_path())
    ids = emoji_table()["sample_id"].to_pylist()
    assert teacher.missing(ids) == 0
    stored = pq.read_table(emoji_teacher_path())
    assert stored["sample_id"][5].as_py() == ids[5]
    np.testing.assert_array_equal(
        teacher.lookup([ids[5]])[0].numpy(), np.float32(stored["features"][5].as_py())
    )


def pieces(features: np.ndarray) -> Iterator[np.ndarray]:
    yield from np.array_split(features, [3, 40, 41])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_reduction_is_the_svd_of_centred_rows(offset: float) -> None:
    """Block by block, far from zero too, PCA equals the singular vectors of all rows at once."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(90, 8)) @ generator.normal(size=(8, 8)) + offset
    reduce = fit_reduction(pieces(features), 3)
    centred = features - features.mean(0)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:3].T
    ours = reduce(features)
    signs = np.sign((ours * expected).sum(0))
    np.testing.assert_allclose(ours, expected * signs, atol=1e-7)
    assert reduce.variance_kept == pytest.approx((scale[:3] ** 2).sum() / (scale**2).sum())
    assert (reduce.axes[np.arange(3), np.abs(reduce.axes).argmax(1)] > 0).all()


def test_all_axes_keep_distances() -> None:
    """As many axes as dimensions keep all the variance, and every distance between rows."""
    features = rows(30).astype(np.float64)
    reduce = fit_reduction(iter([features]), 6)
    assert reduce.variance_kept == pytest.approx(1)
    np.testing.assert_allclose(
        np.linalg.norm(reduce(features)[:, None] - reduce(features), axis=-1),
        np.linalg.norm(features[:, None] - features, axis=-1),
        atol=1e-9,
    )
