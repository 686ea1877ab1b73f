"""Teachers: features of a data set by a model that is made up, folders, users' files, look-ups."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from protoclip.config import Config, DataConfig, TeacherConfig
from protoclip.data import sources
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tools import pack
from protoclip.distributed.collectives import rank
from protoclip.encode import run as running
from protoclip.encode import teachers
from protoclip.encode.encoder import text_encoder
from protoclip.encode.linear_maps import Whitening, fit_pca
from protoclip.encode.teachers import TeacherFeatures, embed_teacher, read_teacher, write_folder
from testing import run_distributed, tiny_pairs

CPU = torch.device("cpu")
WIDTH = 12


def letters(caption: str) -> np.ndarray:
    """The feature of the model that is made up: counts of letters."""
    return 1 + np.bincount([ord(letter) % WIDTH for letter in caption], minlength=WIDTH)


def stop() -> None:
    raise KeyboardInterrupt


class Letters:
    """A model that records the batches it reads, and may do something at one of them."""

    def __init__(self, at: int | None = None, then: Callable[[], None] = stop) -> None:
        self.at, self.then = at, then
        self.batches: list[list[str]] = []
        self.encoder = text_encoder(nn.Identity(), CPU, self.tokenize, lambda counts: counts)
        self.key = self.encoder.key()
        assert self.encoder.width == WIDTH
        self.encoder.key = lambda: self.key  # which encodes examples
        self.batches.clear()

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        self.batches.append(captions)
        if self.at is not None and len(self.batches) > self.at:
            self.then()
        return torch.from_numpy(np.stack([letters(caption) for caption in captions]))

    @property
    def captions(self) -> list[str]:
        return [caption for batch in self.batches for caption in batch]


def run(model: Letters, samples: Any, out: Path, *, block: int = 10, **settings: Any) -> Any:
    """A pass in blocks of ten samples and batches of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "open_encoder", lambda *_, **__: model.encoder)
        patch.setattr(running, "TEXTS_AT_ONCE", block)
        patch.setattr(running, "BLOCK_ROWS", block)
        chosen: dict[str, Any] = {"teacher": "letters", "batch_size": 4, "device": CPU, **settings}
        return embed_teacher(samples=samples, out=out, **chosen)


def pairs(captions: list[Any], name: str = "made", **columns: list[str]) -> ImageTextPairs:
    """Pairs whose images are not there: whoever reads one finds a bad sample."""
    paths = ["nowhere.png"] * len(captions)
    return ImageTextPairs(pa.table({"caption": captions, "path": paths, **columns}), name=name)


def words(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    alphabet = list("abcdefghijklm")
    return [f"{''.join(generator.choice(alphabet, generator.integers(30)))}x" for _ in range(count)]


def unit(feature: np.ndarray) -> np.ndarray:
    return feature / np.linalg.norm(feature, axis=-1, keepdims=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_caption_is_read_once_without_its_image(tmp_path):
    """Batches hold captions of similar length. Several captions of a sample count alike."""
    captions = [[word] for word in words(47)]
    captions[5] = ["aaa", "bbbb", "cc"]
    flat, model = [word for own in captions for word in own], Letters()
    facts = run(model, pairs(captions), tmp_path / "t")
    assert sorted(model.captions) == sorted(flat)
    assert max(map(len, model.batches)) == 4
    assert model.captions[:12] == sorted(flat[:12], key=len, reverse=True)
    assert (facts["rows"], facts["width"], facts["bad"]) == (47, WIDTH, 0)
    assert (facts["modality"], facts["source"]) == ("text", "made")
    means = [sum(unit(letters(word)) for word in own) for own in captions]
    found = read_teacher(tmp_path / "t").lookup([f"made/{row}" for row in range(47)])
    np.testing.assert_allclose(found.numpy(), unit(np.stack(means)), atol=1e-3)
    assert sorted(content(tmp_path / "t")) == [
        *("checksums.npy", "facts.json", "features.npy", "index.npy"),
    ]


def test_bad_samples_have_no_row(tmp_path):
    """They are counted and listed with the reason; a source of nothing else is refused."""
    captions = words(24)
    captions[3] = captions[20] = " "
    facts = run(Letters(), pairs(captions), tmp_path / "t")
    assert (facts["rows"], facts["bad"]) == (22, 2)
    teacher = read_teacher(tmp_path / "t")
    assert teacher.count_missing(f"made/{row}" for row in range(24)) == 2
    assert teacher.lookup(["made/3"]).isnan().all()
    lines = (tmp_path / "t" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == ["made/3", "made/20"]
    assert json.loads(lines[0])["reason"] == "empty caption"
    with pytest.raises(ValueError, match="no sample could be read"):
        run(Letters(), pairs([" "] * 3), tmp_path / "none")


def test_a_killed_pass_goes_on_after_its_last_block(tmp_path):
    """After SIGKILL in the third of five blocks the first two are not encoded again, and the result
    is, byte for byte, that of a pass that was not interrupted."""
    captions = words(47)
    run(Letters(), pairs(captions), tmp_path / "whole", width=5)

    def interrupted() -> None:
        # Three batches a block: the eighth is in the middle of the third.
        model = Letters(at=7, then=lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(model, pairs(captions), tmp_path / "t", width=5)

    process = multiprocessing.get_context("fork").Process(target=interrupted)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="the same command again"):
        read_teacher(tmp_path / "t")
    for name in (".index.npy.1.tmp", "features.npy"):  # as a kill at the end leaves them
        (tmp_path / "t" / name).write_bytes(b"not whole")
    resumed, again = Letters(), Letters()
    run(resumed, pairs(captions), tmp_path / "t", width=5)
    assert sorted(resumed.captions) == sorted(captions[20:])
    assert content(tmp_path / "t") == content(tmp_path / "whole")
    (tmp_path / "t" / "parts").mkdir()  # as a kill leaves it that comes at the very end
    run(again, pairs(captions), tmp_path / "t", width=5)
    assert again.captions == []
    assert content(tmp_path / "t") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": pairs(words(20), name="other")}, "source made, not other"),
        ({"samples": pairs(words(21))}, "samples 20, not 21"),
        ({"samples": pairs(words(20)[::-1])}, "other captions"),
        ({"width": 3}, "reduced_to None, not 3"),
        ({"teacher": "others"}, "teacher letters, not others"),
    ],
)
def test_a_folder_of_another_pass_is_kept(changed, message, tmp_path):
    """One that is finished. What was begun serves nothing else: other captions are encoded anew."""
    with pytest.raises(KeyboardInterrupt):
        run(Letters(at=4), pairs(words(20)[::-1]), tmp_path / "t")
    run(Letters(), pairs(words(20)), tmp_path / "t")
    rows = read_teacher(tmp_path / "t").lookup([f"made/{row}" for row in range(20)])
    expected = unit(np.stack([letters(word) for word in words(20)]))
    np.testing.assert_allclose(rows, expected, atol=1e-3)
    with pytest.raises(ValueError, match=f"was made with {message}; choose another --out"):
        run(Letters(), out=tmp_path / "t", **{"samples": pairs(words(20)), **changed})


def test_the_samples_of_a_stream_are_encoded_once(tmp_path):
    """All of them, or the first ones; a restart encodes none again. Images are not looked at."""
    table = tiny_pairs(40)
    pack(ImageTextPairs(table, name="tiny"), tmp_path / "shards", samples_per_shard=8)
    data = DataConfig(train=f"{tmp_path}/shards/*.tar", read="streaming")
    stream = sources.open_samples(Config(data=data))
    with pytest.raises(KeyboardInterrupt):
        run(Letters(at=4), stream, tmp_path / "t")  # in the second block of ten
    model = Letters()
    facts = run(model, stream, tmp_path / "t")
    assert (facts["rows"], len(model.captions)) == (40, 30)
    assert run(Letters(), stream, tmp_path / "few", num_samples=12)["rows"] == 12
    found = read_teacher(tmp_path / "t").lookup(table["sample_id"].to_pylist())
    expected = unit(np.stack([letters(text) for text in table["caption"].to_pylist()]))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def make(out: Path, width: int | None) -> dict[str, Any]:
    captions = words(47)
    captions[13] = " "  # a bad sample
    return run(Letters(), pairs(captions), out, block=5, width=width)


@pytest.mark.parametrize("width", [None, 3])
def test_several_ranks_make_the_folder_of_one_process(width, tmp_path):
    """Byte for byte, with ten blocks over two ranks, and the facts on each."""
    one = make(tmp_path / "one", width)
    assert run_distributed(make, 2, tmp_path / "many", width) == [one, one]
    assert (one["rows"], one["bad"]) == (46, 1)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def embed_other(out: Path) -> str:
    """What a rank says whose captions may be others than those of rank 0."""
    captions = words(8) if rank() == 0 else words(9)[1:]
    with pytest.raises(ValueError, match="sees other samples") as error:
        run(Letters(), pairs(captions), out)
    return str(error.value)


def test_ranks_that_see_other_samples_are_refused(tmp_path):
    assert len(run_distributed(embed_other, 2, tmp_path / "t")) == 2


@pytest.mark.parametrize("listed", [20, 15])
def test_features_of_ones_own_become_a_folder(listed, tmp_path):
    """Those of the data's samples, in half precision; PCA of them is exact. An array alone has all
    samples, in order."""
    samples = pairs(words(20))
    ids = list(samples.sample_ids())
    features = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    file = tmp_path / ("own.npy" if listed == 20 else "own.parquet")
    if listed == 20:
        np.save(file, features)
    else:
        save_table(file, [*ids[:15], "else"], [*features[:15].tolist(), [0.0] * 6])
    made = [
        embed_teacher(str(file), samples, tmp_path / str(width), width=width, device=CPU)
        for width in (None, 2)
    ]
    assert [(f["rows"], f["bad"], f["width"]) for f in made] == [
        (listed, 20 - listed, 6),
        (listed, 20 - listed, 2),
    ]
    found = read_teacher(tmp_path / "None").lookup(ids)
    np.testing.assert_allclose(found[:listed], features[:listed], atol=2e-3)
    assert found[listed:].isnan().all()
    mean, axes, _ = fit_pca([features[:listed]], 2)
    reduced = read_teacher(tmp_path / "2").lookup(ids[:listed])
    np.testing.assert_allclose(reduced, (features[:listed] - mean) @ axes.T, atol=5e-3)
    with pytest.raises(ValueError, match=r"--width: 7 is not between 1 and 6"):
        embed_teacher(str(file), samples, tmp_path / "x", width=7, device=CPU)


NUMBERED = tiny_pairs(96).drop(["sample_id"])
NUMBERED = NUMBERED.set_column(1, "caption", [[f"number {row}" for row in range(96)]])
ROWS = {"all": np.arange(96), "turned": np.arange(96)[::-1], "some": np.arange(0, 96, 2)}


@pytest.mark.parametrize(
    ("modality", "rows", "change", "is_refused"),
    [
        ("text", "all", {}, False),
        ("text", "turned", {}, True),
        ("text", "some", {}, True),
        ("image", "turned", {}, True),
        ("text", "all", {"caption": ["other"] * 96}, True),
        ("image", "all", {"caption": ["other"] * 96}, False),
        # Ids that somebody gave stay with their rows.
        ("text", "turned", {"sample_id": [str(row) for row in range(96)]}, False),
    ],
)
def test_a_teacher_of_other_rows_under_the_same_numbers(modality, rows, change, is_refused):
    stored = read_teacher_of(ImageTextPairs(NUMBERED, name="made"), modality)
    table = NUMBERED.take(pa.array(ROWS[rows].copy()))
    for name, values in change.items():
        table = table.drop([name] if name in table.column_names else []).append_column(
            name, [values]
        )
    source = ImageTextPairs(table, name="made")
    refused = pytest.raises(ValueError, match=r"was made of another table .* column of ids")
    with refused if is_refused else nullcontext():
        teachers.require_same_rows(stored, source)
    teachers.require_same_rows(read_teacher_of(source, modality), source.subset(np.arange(9)))


def read_teacher_of(source: ImageTextPairs, modality: str) -> TeacherFeatures:
    features = np.zeros((len(source), 2), np.float32)
    made = {"sample_ids": [*source.sample_ids()], "features": features}
    stored = TeacherFeatures.of_array(name="teacher", **made)
    teachers.require_same_rows(stored, source)  # of an earlier version, it says nothing
    stored.made_of = teachers.read_content(source, modality)
    return stored


@pytest.mark.parametrize(("own", "number"), [("tiny", 0), ("other", 1)])
def test_a_teacher_that_knows_none_of_a_stream_is_told(own, number, tmp_path):
    """Of pairs in a table it is refused, whose ids are all known at once."""
    table = tiny_pairs(20)
    pack(ImageTextPairs(table, name="tiny"), tmp_path / "shards")
    ids = [f"{own}/{row}" for row in range(20)]
    columns = {"sample_id": ids, "features": np.eye(20).tolist()}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    data = DataConfig(train=f"{tmp_path}/shards/*.tar", read="streaming")
    teacher = TeacherConfig(features=str(tmp_path / "t.parquet"), number=4)
    config, notes = Config(data=data, teacher=teacher), list[str]()
    teachers.open_teachers(config, sources.open_samples(config), notes.append)
    assert ["features of none of the first samples" in note for note in notes] == [True] * number


def names(count: int) -> list[str]:
    return [f"sample/{row}" for row in range(count)]


def rows(count: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float16)


def in_memory(ids: list[str], features: np.ndarray, folder: Path) -> TeacherFeatures:
    return TeacherFeatures.of_array(name="mine", sample_ids=ids, features=features)


def from_folder(ids: list[str], features: np.ndarray, folder: Path) -> TeacherFeatures:
    (folder / "t").mkdir(parents=True)
    write_folder(folder / "t", ids, np.array_split(features, 4), {"teacher": "test"})
    return read_teacher(folder / "t")


def from_parquet(ids: list[str], features: np.ndarray, folder: Path) -> TeacherFeatures:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    pq.write_table(pa.table({"sample_id": ids, "features": flat}), folder / "mine.parquet")
    return read_teacher(folder / "mine.parquet")


def from_array(ids: list[str], features: np.ndarray, folder: Path) -> TeacherFeatures:
    save_array(folder / "mine.npy", features, "\n".join(ids) + "\n")
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


def save_table(path: Path, ids: list[Any], features: list[Any]) -> None:
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.string()), "features": features}), path)


def save_array(path: Path, array: Any, ids: str = "a\nb\n") -> None:
    np.save(path, array, allow_pickle=True)
    path.with_suffix(".ids.txt").write_text(ids, encoding="utf-8-sig")


def test_of_many_samples_some_are_looked_up(monkeypatch):
    """All of them only if none of these is known; features of other data are refused."""
    monkeypatch.setattr(teachers, "LOOKED_UP", 10)
    ids = names(1000)
    pairs = ImageTextPairs(pa.table({"sample_id": ids, "image": ids, "caption": ids}), name="made")
    half = TeacherFeatures.of_array(name="half", sample_ids=names(500), features=rows(500))
    assert "half: no features of 5 of 10 " in teachers.note_unknown("half", half, pairs)[0]
    few = TeacherFeatures.of_array(name="few", sample_ids=["sample/1"], features=rows(1))
    assert "few: no features of 999 of 1000 " in teachers.note_unknown("few", few, pairs)[0]
    other = TeacherFeatures.of_array(name="other", sample_ids=["x"], features=rows(1))
    with pytest.raises(ValueError, match=r"^other: no teacher features for 1000 of 1000"):
        teachers.note_unknown("other", other, pairs)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("none.parquet", lambda path: None),
        ("text.parquet", lambda path: path.write_text("hello")),
        ("narrow.parquet", lambda path: save_table(path, ["a", "b"], [[1.0, 2.0], [1.0]])),
        ("unnamed.parquet", lambda path: save_table(path, ["a", None], [[1.0], [2.0]])),
        ("empty.parquet", lambda path: save_table(path, ["a"], [[]])),
        ("flat.npy", lambda path: save_array(path, np.zeros(4))),
        ("objects.npy", lambda path: save_array(path, np.array([[{}]]))),
        ("others.npy", lambda path: save_array(path, rows(3))),
        ("unnamed.npy", lambda path: np.save(path, rows(3))),
        ("cut.npy", lambda path: path.write_bytes(b"cut")),
    ],
)
def test_what_is_no_teacher_is_named(name, save, tmp_path):
    """In one line, whatever is wrong with the file."""
    save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^[^\n]*{name}: [^\n]*$"):
        read_teacher(tmp_path / name)


def test_a_teacher_in_a_joint_space_groups_and_is_learned_there(tmp_path):
    """Stored features stay what they are, and so does what tells them from others."""
    ids, features = names(60), rows(60)
    write_folder(tmp_path, ids, [features], {"teacher": "test"})
    plain, linear = read_teacher(tmp_path), torch.from_numpy(np.eye(6, 5, dtype=np.float32))
    teacher = replace(plain, joint=linear)
    asked = [ids[3], "nobody", ids[40]]
    assert torch.equal(teacher.rows(asked).nan_to_num(), plain.rows(asked).nan_to_num())
    assert teacher.content == plain.content
    joined = teacher.join_rows(teacher.rows(asked))
    expected = torch.from_numpy(features.astype(np.float32))[:, :5]
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(joined[[0, 2]], expected[[3, 40]])
    assert joined[1].isnan().all()
    teacher.whiten(5)  # no wider than that
    assert torch.equal(teacher.lookup(asked).nan_to_num(), joined.nan_to_num())
    teacher.whiten(4)
    found = teacher.lookup(asked)[[0, 2]]
    torch.testing.assert_close(found, Whitening.fit(expected, 4)(expected)[[3, 40]])


def test_few_rows_keep_their_groups():
    """Along 64 directions 40 rows would all be equally far from each other."""
    centres = np.repeat(10 * np.eye(5, 80), 8, axis=0)
    features = centres + np.random.default_rng(0).normal(size=centres.shape)
    ids = [str(row) for row in range(40)]
    teacher = TeacherFeatures.of_array(name="mine", sample_ids=ids, features=features)
    teacher.whiten(64)
    found = teacher.lookup(ids)
    assert found.shape == (40, 5)
    within = (found @ found.T).reshape(5, 8, 5, 8).mean((1, 3)).diagonal()
    assert within.min() > 0.5
