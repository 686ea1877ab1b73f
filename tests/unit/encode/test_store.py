"""Teacher features: folders, users' files, and look-ups by sample id."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from protoclip.data.pairs import ImageTextPairs
from protoclip.encode import teachers
from protoclip.encode.store import StoredFeatures, write_folder
from protoclip.encode.teachers import read_teacher


def names(count: int) -> list[str]:
    return [f"sample/{row}" for row in range(count)]


def rows(count: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float16)


def in_memory(ids: list[str], features: np.ndarray, folder: Path) -> StoredFeatures:
    return StoredFeatures.in_memory(name="mine", sample_ids=ids, features=features)


def from_folder(ids: list[str], features: np.ndarray, folder: Path) -> StoredFeatures:
    (folder / "t").mkdir(parents=True)
    write_folder(folder / "t", ids, np.array_split(features, 4), {"teacher": "test"})
    return read_teacher(folder / "t")


def from_parquet(ids: list[str], features: np.ndarray, folder: Path) -> StoredFeatures:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    pq.write_table(pa.table({"sample_id": ids, "features": flat}), folder / "mine.parquet")
    return read_teacher(folder / "mine.parquet")


def from_array(ids: list[str], features: np.ndarray, folder: Path) -> StoredFeatures:
    np.save(folder / "mine.npy", features)
    (folder / "mine.ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return read_teacher(folder / "mine.npy")


every_form = pytest.mark.parametrize("opened", [in_memory, from_folder, from_parquet, from_array])


@every_form
def test_features_come_back_by_sample_id(opened, tmp_path):
    """In the order asked for, repeats included, as float32; an unknown id is a row of NaN."""
    ids, features = [*names(33), "ünïcode, with a comma"], rows(34)
    teacher = opened(ids, features, tmp_path)
    assert teacher.width == 6
    asked = [33, 0, 10, 9, 0, 21, 32]
    found = teacher.lookup([ids[row] for row in asked])
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), features[asked].astype(np.float32))
    mixed = teacher.lookup(["nobody", ids[4], "sample/34"])
    assert mixed.isnan().all(1).tolist() == [True, False, True]
    np.testing.assert_array_equal(mixed[1].numpy(), features[4].astype(np.float32))
    assert teacher.lookup([]).shape == (0, 6)


@every_form
def test_faulty_features_are_refused(opened, tmp_path):
    """Duplicate ids and non-finite rows, in one line with their number."""
    with pytest.raises(ValueError, match=r"^[^\n]*2 duplicate sample ids, such as 'sample/3'"):
        opened([*names(10), "sample/3", "sample/3"], rows(12), tmp_path)
    features = rows(12)
    features[1], features[2, 0] = np.nan, np.inf
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match=r"^[^\n]*2 of \d+ features are not finite"):
        opened(names(12), features, other)
    assert not list(tmp_path.glob("**/facts.json"))


class Counted(ImageTextPairs):
    """Pairs that count how many ids are asked for, one by one."""

    asked = 0

    def sample_id(self, row: int) -> str:
        self.asked += 1
        return super().sample_id(row)


def test_of_many_samples_some_are_looked_up(monkeypatch):
    """All of them only if none of these is known."""
    monkeypatch.setattr(teachers, "LOOKED_UP", 10)
    half = StoredFeatures.in_memory(name="half", sample_ids=names(500), features=rows(500))
    ids = names(1000)
    pairs = Counted(pa.table({"sample_id": ids, "image": ids, "caption": ids}), name="counted")
    (note,) = teachers.unknown_to("half", half, pairs)
    assert note.startswith("half: no features of 5 of 10 training samples that were looked up;")
    assert pairs.asked == 10
    few = StoredFeatures.in_memory(name="few", sample_ids=["sample/1"], features=rows(1))
    (note,) = teachers.unknown_to("few", few, pairs)
    assert note.startswith("few: no features of 999 of 1000 training samples;")
    other = StoredFeatures.in_memory(name="other", sample_ids=["x"], features=rows(1))
    with pytest.raises(ValueError, match=r"^other: no teacher features for 1000 of 1000"):
        teachers.unknown_to("other", other, pairs)


def test_missing_samples_are_counted():
    """Features of other data are refused."""
    teacher = in_memory(names(9), rows(9), Path())
    assert teacher.missing(iter(names(9))) == 0
    assert teacher.missing([*(f"x{i}" for i in range(6)), *names(9)]) == 6
    with pytest.raises(ValueError, match=r"mine: no teacher features for 2 of 2 .* as 'x'"):
        teacher.missing(iter(["x", "y"]))


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    """A number above 65504 would be stored as infinity. Nothing is left in the folder."""
    features = rows(12).astype(np.float32)
    features[5] = 1e5
    with pytest.raises(
        ValueError, match=r"1 of \d+ .*at most 65504.*, such as those of 'sample/5'"
    ):
        from_folder(names(12), features, tmp_path)
    assert list((tmp_path / "t").iterdir()) == []


def test_different_ids_of_one_hash_are_refused(monkeypatch):
    """The index holds hashes alone, so both ids are named."""
    monkeypatch.setattr(
        "protoclip.encode.store.hash_ids",
        lambda ids: np.array([len(i) for i in ids], dtype=np.uint64),
    )
    with pytest.raises(ValueError, match="the hash of another, such as 'aa' and 'bb'"):
        in_memory(["a", "aa", "bb"], rows(3), Path())


def test_an_array_needs_an_id_for_each_row(tmp_path):
    np.save(tmp_path / "mine.npy", rows(5))
    with pytest.raises(ValueError, match=r"needs its sample ids, one a line, in .*mine.ids.txt"):
        read_teacher(tmp_path / "mine.npy")
    (tmp_path / "mine.ids.txt").write_text("a\r\nb\r\nc\r\nd\r\ne", encoding="utf-8")
    assert read_teacher(tmp_path / "mine.npy").missing("abcde") == 0
    (tmp_path / "mine.ids.txt").write_text("a\nb\nc", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.npy: 3 sample ids for 5 features"):
        read_teacher(tmp_path / "mine.npy")


def test_of_several_features_a_teacher_has_the_mean(tmp_path):
    """As `embed` writes the vectors of captions, or as an array of views; a sample needs one."""
    several = [[[1.0, 3.0]], [[0.0, 2.0], [4.0, 0.0], [5.0, 1.0]]]
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"sample_id": ["a", "b"], "features": several}), path)
    assert read_teacher(path).lookup(["b", "a"]).tolist() == [[3.0, 1.0], [1.0, 3.0]]
    np.save(tmp_path / "mine.npy", np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float16))
    assert read_teacher(tmp_path / "mine.npy", sample_ids=["a"]).lookup(["a"]).tolist() == [[2, 3]]
    pq.write_table(pa.table({"sample_id": ["a", "b"], "features": [[[1.0]], []]}), path)
    with pytest.raises(ValueError, match="1 of 2 rows lack"):
        read_teacher(path)


@pytest.mark.parametrize(
    ("ids", "features", "message"),
    [
        (["a", "b", "c"], [[1.0, 2.0], [1.0], None], "2 of 3 rows .* not of width 2"),
        (["a", None], [[1.0], [2.0]], "1 of 2 rows lack an id"),
        (["a"], [[]], "needs numbers"),
        ([], [], "not a file of teacher features"),
        (["a"], [1.0], "not a file of teacher features"),
        (["a"], [["x"]], "needs numbers"),
    ],
)
def test_parquet_features_are_lists_of_numbers_of_one_width(ids, features, message, tmp_path):
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.string()), "features": features}), path)
    with pytest.raises(ValueError, match=rf"^.*mine.parquet: [^\n]*{message}[^\n]*$"):
        read_teacher(path)


@pytest.mark.parametrize("array", [np.zeros(4), np.zeros((0, 3)), [["a"]], np.array([[{}]])])
def test_arrays_are_rows_of_numbers(array, tmp_path):
    """Another shape or type, and pickled objects, are refused."""
    np.save(tmp_path / "mine.npy", array, allow_pickle=True)
    (tmp_path / "mine.ids.txt").write_text("\n".join(names(len(array))), encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.npy: not a file of teacher features"):
        read_teacher(tmp_path / "mine.npy")


@pytest.mark.parametrize("cut", [0, 40])
def test_an_archive_of_arrays_is_none(cut, tmp_path):
    """Neither is a damaged one."""
    with (tmp_path / "mine.npy").open("wb") as file:
        np.savez(file, a=rows(2), b=rows(3))
        file.truncate(file.tell() - cut)
    with pytest.raises(ValueError, match=r"mine.npy: not a file of teacher features"):
        read_teacher(tmp_path / "mine.npy", sample_ids=["a", "b"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other.parquet", "teacher.features: .*other.parquet: no such file"),
        ("text.parquet", "text.parquet: not a file of teacher"),
        ("columns.parquet", "columns.parquet: not a file of teacher"),
        ("", "no finished teacher; .* the same command again"),
    ],
)
def test_what_is_no_teacher_is_named(name, message, tmp_path):
    (tmp_path / "text.parquet").write_text("hello", encoding="utf-8")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "columns.parquet")
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}"):
        read_teacher(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("features.npy", lambda file: file.write_bytes(file.read_bytes()[:-20])),
        ("features.npy", lambda file: file.unlink()),
        ("features.npy", lambda file: np.save(file, rows(25, width=7))),
        ("index.npy", lambda file: np.save(file, np.load(file)[:, :20])),
        ("facts.json", lambda file: file.write_text("{", encoding="utf-8")),
    ],
)
def test_a_damaged_folder_is_refused(file, damage, tmp_path):
    """When it is opened, in one line."""
    from_folder(names(25), rows(25), tmp_path)
    damage(tmp_path / "t" / file)
    with pytest.raises(ValueError, match=r"^[^\n]*damaged[^\n]*$"):
        read_teacher(tmp_path / "t")


def test_ids_may_begin_with_a_byte_order_mark(tmp_path):
    np.save(tmp_path / "mine.npy", np.ones((2, 3), np.float32))
    (tmp_path / "mine.ids.txt").write_text("a\nb\n", encoding="utf-8-sig")
    assert not read_teacher(tmp_path / "mine.npy").missing(["a", "b"])
