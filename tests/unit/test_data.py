"""Pairs, loaders and teacher features."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from protoclip.data.episodes import EpisodeSampler
from protoclip.data.loader import Batch, EpisodeLoader
from protoclip.data.pairs import ImageTextPairs, read_parquet
from protoclip.data.transforms import light_view
from protoclip.models.towers import RememberingTokenizer, build_tokenizer
from protoclip.teachers import TeacherFeatures, read_teacher
from protoclip.testing import tiny_pairs


def loader(workers: int = 0) -> EpisodeLoader:
    return EpisodeLoader(
        pairs=ImageTextPairs(tiny_pairs(), name="tiny"),
        tokenizer=build_tokenizer(None, context_length=8),
        view=light_view(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        batch_size=16,
        seed=1,
        device=torch.device("cpu"),
        workers=workers,
    )


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.sample_id == b.sample_id
        assert torch.equal(a.position, b.position)
        assert torch.equal(a.text, b.text)
        torch.testing.assert_close(a.image, b.image, rtol=0, atol=0)


def test_batches_cover_the_episode_in_order() -> None:
    """Positions count up, and sample ids are those of the rows."""
    source = loader()
    episode = EpisodeSampler(96, 80, seed=0).episode(2)
    batches = list(source.batches(episode))
    assert torch.cat([batch.position for batch in batches]).tolist() == list(range(80))
    ids = [sample_id for batch in batches for sample_id in batch.sample_id]
    assert ids == [f"tiny/{row}" for row in episode.rows.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_position_on_are_those_of_the_whole(workers: int) -> None:
    """Starting at batch 3, with or without workers, equals skipping three batches, bit for bit."""
    episode = EpisodeSampler(96, 80, seed=0).episode(4)
    whole = list(loader().batches(episode))
    assert_same(list(loader(workers).batches(episode, start=3)), whole[3:])


def test_remembered_tokens_are_those_of_the_tokenizer() -> None:
    """Repeats, in a batch and across batches, and more captions than are kept: equal tokens, and
    no caption is tokenized twice while it is remembered."""
    calls: list[str] = []

    def count(texts: list[str]) -> torch.Tensor:
        calls.extend(texts)
        return torch.tensor([[len(text), ord(text[0])] for text in texts])

    tokenizer = RememberingTokenizer(count, capacity=3)
    for texts in (["a", "bb", "a"], ["bb", "ccc"], ["dddd", "a"], ["dddd"]):
        assert tokenizer(texts).tolist() == [[len(text), ord(text[0])] for text in texts]
    assert calls == ["a", "bb", "ccc", "dddd", "dddd"]
    assert tokenizer("bb").tolist() == [[2, ord("b")]]
    assert pickle.loads(pickle.dumps(build_tokenizer(None, context_length=8)))(["x"]).shape == (
        1,
        8,
    )


def test_long_captions_keep_the_end_token() -> None:
    """Truncation never drops the end-of-text token, on which the text tower pools."""
    tokens = build_tokenizer(None, context_length=8)(["one two three four five six seven eight"])
    assert tokens.shape == (1, 8)
    assert tokens[0, -1] == 49407


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table.drop_columns(["caption"]), "no column 'caption'; it has image"),
        (lambda table: table.slice(0, 0), "holds no sample"),
    ],
)
def test_structural_faults_are_named(tmp_path: Path, spoil, message: str) -> None:
    """A missing column is named beside those present; an empty file is refused."""
    path = tmp_path / "pairs.parquet"
    pq.write_table(spoil(tiny_pairs()), path)
    with pytest.raises(ValueError, match=message):
        read_parquet(path)


def test_files_that_are_missing_or_something_else_are_named(tmp_path: Path) -> None:
    """The path and the reason, in one line."""
    with pytest.raises(ValueError, match=r"nothing\.parquet: no such file"):
        read_parquet(tmp_path / "nothing.parquet")
    (tmp_path / "text.parquet").write_text("filepath\ttitle\n")
    with pytest.raises(ValueError, match=r"text\.parquet: not a Parquet file") as error:
        read_parquet(tmp_path / "text.parquet")
    assert "\n" not in str(error.value)


def test_an_unreadable_picture_names_its_sample() -> None:
    """Broken bytes raise with the sample's id."""
    table = tiny_pairs(4).set_column(0, "image", pa.array([b"nonsense"] * 4, pa.binary()))
    with pytest.raises(ValueError, match="tiny/2"):
        ImageTextPairs(table, name="broken").image(2)


def test_captions_keep_their_letters(tmp_path: Path) -> None:
    """UTF-8 in every script comes back as it went in."""
    captions = ["ein schöner Tag", "猫が好き", "смешной кот", "🦊 fox"]
    table = tiny_pairs(4).set_column(1, "caption", [captions])
    pq.write_table(table, tmp_path / "pairs.parquet")
    pairs = read_parquet(tmp_path / "pairs.parquet")
    assert [pairs.caption(row) for row in range(4)] == captions


def teacher(ids: list[str], features: np.ndarray) -> TeacherFeatures:
    return TeacherFeatures(name="bert.parquet", sample_ids=ids, features=features)


def test_teacher_features_are_keyed_by_sample_id() -> None:
    """Rows come back in the order asked for, repeats included, as float32."""
    features = np.arange(12, dtype=np.float16).reshape(4, 3)
    found = teacher(["a", "b", "c", "d"], features).lookup(["c", "a", "c"])
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), features[[2, 0, 2]])


def test_teacher_faults_are_counted() -> None:
    """Duplicates, non-finite rows, unequal lengths and missing ids each say how many."""
    features = np.zeros((3, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="1 duplicate sample ids"):
        teacher(["a", "b", "a"], features)
    with pytest.raises(ValueError, match="2 sample ids for 3 features"):
        teacher(["a", "b"], features)
    with pytest.raises(ValueError, match="1 of 3 features are not finite"):
        teacher(["a", "b", "c"], np.array([[0, 1], [np.nan, 0], [0, 0]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"no teacher features for 2 of 3 .* such as 'x'"):
        teacher(["a", "b", "c"], features).require(["x", "a", "y"])


def test_teacher_files_round_trip(tmp_path: Path) -> None:
    """A Parquet file of ids and half-precision lists reads back; another shape is refused."""
    features = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float16)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), 4)
    path = tmp_path / "teacher.parquet"
    pq.write_table(pa.table({"sample_id": list("abcde"), "features": flat}), path)
    np.testing.assert_array_equal(
        read_teacher(path).lookup(["e", "b"]).numpy(), features[[4, 1]].astype(np.float32)
    )
    with pytest.raises(ValueError, match="no such file"):
        read_teacher(tmp_path / "other.parquet")
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(ValueError, match="no column 'sample_id'"):
        read_teacher(path)
