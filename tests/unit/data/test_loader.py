"""Loaders: order, position, worker processes and bad samples."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from endless import TinyStream
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from interrupting import quick_config
from protoclip.config import Config, DataConfig
from protoclip.data.captions import CaptionDraw, caption_draw
from protoclip.data.loader import Batch, EpisodeLoader, Pass, SkipLog
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, SampleStream
from protoclip.data.sampler import EXTRACTION_STREAM, Episode, EpisodeSampler
from protoclip.data.sources import join_sources
from protoclip.data.transforms import EvaluationTransform, light_transform
from protoclip.models.open_clip import open_clip_tokenizer
from protoclip.models.opening import RememberingTokenizer
from protoclip.training.run import train
from testing import tiny_pairs

GREY = (0.5, 0.5, 0.5)


def loader(
    workers: int = 0, pairs: Pairs | SampleStream | None = None, **settings: Any
) -> EpisodeLoader:
    return EpisodeLoader(
        pairs=pairs or ImageTextPairs(tiny_pairs(), name="tiny"),
        tokenizer=open_clip_tokenizer({}, context_length=8),
        transform=light_transform(size=16, mean=GREY, std=GREY),
        workers=workers,
        **{"batch_size": 16, "seed": 1, "device": torch.device("cpu"), **settings},
    )


def with_bad(rows: set[int]) -> ImageTextPairs:
    """The tiny pairs, with nonsense in place of some images."""
    images = tiny_pairs()["image"].to_pylist()
    images = [b"nonsense" if row in rows else image for row, image in enumerate(images)]
    table = tiny_pairs().set_column(0, "image", pa.array(images, pa.binary()))
    return ImageTextPairs(table, name="tiny")


def episode_of(size: int, index: int = 0) -> Episode:
    return Episode(index=index, rows=torch.arange(index * size, (index + 1) * size))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.sample_id == b.sample_id
        assert torch.equal(a.position, b.position)
        assert torch.equal(a.text, b.text)
        assert torch.equal(a.image, b.image)
        assert (a.groups is None) == (b.groups is None)
        assert a.groups is None or torch.equal(a.groups, b.groups)


def test_pairs_that_show_the_same_have_a_key_in_common():
    """Captions but for case and space, images to the byte. A bad one leaves no key behind."""
    images = tiny_pairs()["image"].to_pylist()[:2]
    rows = [
        (b"nonsense", "a cat"),
        (images[0], "A red  dog"),
        (images[1], " a Red dog"),
        (images[0], "a cat"),
        (images[0] + b"\0", "straße"),
        (images[0] + b"\1", "STRASSE"),
        (images[1], "a red dog!"),  # takes the place of the bad one
    ]
    named = zip(("image", "caption"), zip(*rows, strict=True), strict=True)
    table = pa.table({name: list(values) for name, values in named})
    made = loader(pairs=ImageTextPairs(table, name="p"), batch_size=6)
    by = ("caption", "image")
    batch = next(made.batches(Pass(episode_of(7), group_by=by)))
    assert batch.sample_id == [f"p/{row}" for row in (6, 1, 2, 3, 4, 5)]
    same = (batch.groups[:, None] == batch.groups).permute(2, 0, 1)
    expected = [{(1, 2), (4, 5)}, {(1, 3), (0, 2)}]
    for key, matches in zip(same, expected, strict=True):
        assert set(map(tuple, key.triu(1).nonzero().tolist())) == matches


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_workers_serve_episodes_from_any_position(kind):
    """The same processes serve training and extraction, over episodes, after an iteration that was
    left early and from a start within an episode: bit for bit what this process makes."""
    evaluation = EvaluationTransform(size=12, mean=GREY, std=GREY)
    stream = TinyStream() if kind == "stream" else None
    ours, alone = loader(2, stream), loader(0, TinyStream() if stream else None)
    extraction = {"transform": evaluation, "stream": EXTRACTION_STREAM}
    processes = set()
    for index in (0, 1):
        episode = episode_of(64, index) if stream else EpisodeSampler(96, 64, seed=0).episode(index)
        everything = list(alone.batches(Pass(episode)))
        if stream:
            ids = [sample_id for batch in everything for sample_id in batch.sample_id]
            assert ids == [f"tiny/{(index * 64 + i) % 96}" for i in range(64)]
        left = ours.batches(Pass(episode))
        assert_same([next(left)], everything[:1])
        left.close()
        for settings in ({}, extraction, {"group_by": ("caption", "image")}, {"start": 3}):
            expected = list(alone.batches(Pass(episode, **settings)))
            assert_same(list(ours.batches(Pass(episode, **settings))), expected)
        assert_same(expected, everything[3:])
        assert stream is None or stream.open <= 2  # one for each kind of pass
        processes.add(tuple(worker.pid for worker in ours._loader._iterator._workers))
    assert len(processes) == 1
    assert len(*processes) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"prototypes": {"source": "extract"}},
        {"prototypes": {"source": "queue"}, "episodes": {"warm_up": 0, "locked_image": 0}},
    ],
    ids=["extraction", "queue without warm-up"],
)
def test_a_run_has_one_iteration(changes, tmp_path, monkeypatch):
    """It foretells every pass, the locked-image stage included: else workers would start cold."""
    iterations = []
    started = DataLoader.__iter__
    monkeypatch.setattr(
        DataLoader, "__iter__", lambda loader: iterations.append(1) or started(loader)
    )
    pairs = tmp_path / "pairs.parquet"
    pq.write_table(tiny_pairs(), pairs)
    config = quick_config(str(pairs), tmp_path / "run", data={"workers": 1}, **changes)
    assert train(config)["steps"] == 3 * 2
    assert len(iterations) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_bring_features_of_their_samples(workers):
    """Only where they are asked for; what is wrong with them is one line."""
    lengths = {"length": lambda ids: torch.tensor([[float(len(name))] for name in ids]).half()}
    source = loader(workers, with_bad({3}), features_of=lengths)
    for batch in source.batches(Pass(episode_of(32), with_features=True)):
        expected = [[float(len(name))] for name in batch.sample_id]
        assert batch.features["length"].tolist() == expected
        assert batch.captions == [row.numpy().tobytes() for row in batch.text]
    assert not next(source.batches(Pass(episode_of(32)))).features

    def damaged(ids: list[str]) -> torch.Tensor:
        raise ValueError(f"features: damaged at {ids[0]}")

    source = loader(workers, features_of={"length": damaged})
    with pytest.raises(ValueError, match=r"\Afeatures: damaged at tiny/0\Z"):
        list(source.batches(Pass(episode_of(32), with_features=True)))


def test_a_gpu_gets_batches_from_pinned_memory(monkeypatch):
    """Every tensor of a batch is pinned; ids and bad samples come through."""
    assert not loader(2)._loader.pin_memory
    made = loader(2, with_bad({0}), device=torch.device("cuda"))
    assert made._loader.pin_memory
    batch = made._loader.dataset[next(made.requests(Pass(episode_of(16))))]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: tensor.clone())
    pinned = pin_memory(batch)
    for before, after in ((batch.images, pinned.images), (batch.packed, pinned.packed)):
        assert after is not before
    for before, after in zip(batch, pinned, strict=True):
        assert str(after) == str(before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_bad_samples_are_replaced_by_those_after_the_batch(workers, kind):
    """By what has their place there, or in a stream by what comes first. Everything else is as
    without them, and each is reported with its reason."""
    bad = {3, 7, 18, 23}
    read: list[tuple[int, list[BadSample]]] = []
    source = loader(
        workers,
        with_bad(bad) if kind == "rows" else TinyStream(frozenset(bad)),
        on_read=lambda number, found: read.append((number, found)),
    )
    clean = list(loader().batches(Pass(episode_of(64))))
    batches = list(source.batches(Pass(episode_of(64))))
    expected = [list(batch.sample_id) for batch in clean]
    # 23 itself would stand in for 7, and is bad too.
    expected[0][3], expected[0][7] = "tiny/19", "tiny/39"
    expected[1][2], expected[1][7] = "tiny/34", "tiny/39"
    if kind == "stream":  # it takes them as they come, and 18 is not asked for
        expected[0][3], expected[0][7] = "tiny/16", "tiny/17"
        expected[1][2], expected[1][7] = "tiny/32", "tiny/33"
    assert [batch.sample_id for batch in batches] == expected
    kept = [i for i in range(16) if i not in bad]
    assert torch.equal(batches[0].image[kept], clean[0].image[kept])
    assert torch.equal(batches[0].position, clean[0].position)
    assert [number for number, _ in read] == [19 if kind == "rows" else 18, 18, 16, 16]
    assert {sample.sample_id for _, found in read for sample in found} == {f"tiny/{n}" for n in bad}
    assert all(sample.reason for _, found in read for sample in found)


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_what_replaces_a_bad_sample_follows_from_its_place(batches):
    """With any number of ranks, and whatever else is bad: prototypes are those of places.

    Also in few batches, of which one has no good row at the same place of any other.
    """
    episode = EpisodeSampler(96, 16 * batches, seed=0, replacement=False).episode(0)
    rows = episode.rows.tolist()
    bad = {rows[3], rows[5], *rows[12::16]}
    found = []
    for ranks in (1, 2, 4):
        parts = [
            [
                *loader(0, with_bad(bad), batch_size=16 // ranks, rank=r, world_size=ranks).batches(
                    Pass(episode)
                )
            ]
            for r in range(ranks)
        ]
        found.append(
            [[n for b in batches for n in b.sample_id] for batches in zip(*parts, strict=True)]
        )
    assert found[0] == found[1] == found[2]
    (alone,) = [next(iter(loader(0, with_bad({rows[5]})).batches(Pass(episode))))]
    assert alone.sample_id[5] == found[0][0][5]


def test_a_batch_of_bad_samples_ends_the_run():
    with pytest.raises(ValueError, match="tiny: a batch found only bad samples"):
        list(loader(0, with_bad(set(range(96)))).batches(Pass(episode_of(64))))


def test_a_visit_brings_several_captions_of_an_image():
    """They follow each other and come again in turn where they are too few; the image comes once.
    All share its key, and equal ones theirs."""
    texts = [["a", "b", "c"], ["d"]] * 48
    pairs = ImageTextPairs(tiny_pairs().set_column(1, "caption", [texts]), name="tiny")
    words = open_clip_tokenizer({}, context_length=8)(list("abcd"))
    source = loader(0, pairs, captions=CaptionDraw(number=2), features_of={"row": row_numbers})
    settings = {"with_features": True, "group_by": ("caption", "image")}
    batch = list(source.batches(Pass(episode_of(64), **settings)))[1]
    assert batch.image.shape[0] == 16
    assert batch.position.tolist() == list(range(32, 64))
    assert batch.sample_id == [f"tiny/{row}" for row in range(16, 32) for _ in range(2)]
    assert batch.features["row"].tolist() == [[row] for row in range(16, 32) for _ in range(2)]
    shown = (batch.text[:, None] == words).all(2).int().argmax(1).view(16, 2)
    assert {tuple(pair) for pair in shown[::2].tolist()} == {(0, 1), (1, 2), (2, 0)}
    assert {tuple(pair) for pair in shown[1::2].tolist()} == {(3, 3)}
    captions, images = batch.groups.T
    same_text = batch.text[:, None].eq(batch.text).all(2)
    assert torch.equal(captions[:, None] == captions, same_text)
    assert torch.equal(images[::2], images[1::2])
    again = list(source.batches(Pass(episode_of(64), **settings)))
    assert_same([again[1]], [batch])


def row_numbers(sample_ids: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[float(name.partition("/")[2])] for name in sample_ids])


@pytest.mark.parametrize(
    ("asked", "most", "number", "said"),
    [
        (5, 3, 3, "3 of each image"),
        ("all", 3, 3, "3 of each image"),
        ("all", 10, 10, "10 of each image"),
        ("all", 11, 5, "5 of each image, which makes 1,280 captions in a batch of 256 images; "),
        (5, 1, 1, "one of each image, since none has several"),
    ],
)
def test_a_visit_brings_no_more_captions_than_an_image_has(asked, most, number, said):
    """And to `all` an image that has far more than 99 of 100 do, 5, counts for nothing."""
    of_share = lambda share=1.0: most if share == 1 else min(5, most)  # noqa: E731
    source = SimpleNamespace(name="p", most_captions=of_share)
    draw, (note,) = caption_draw(Config(data=DataConfig(captions=asked)), source)
    assert draw.number == number
    assert said in note


def kill(texts: list[str]) -> torch.Tensor:
    """Stands in for a tokenizer; it runs in the workers."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_killed_worker_is_an_error_and_no_hang():
    """As the system kills a process when memory runs out."""
    with pytest.raises(ValueError, match=r"data\.workers: a worker process was killed"):
        list(replace(loader(2), tokenizer=kill).batches(Pass(episode_of(64))))


def test_remembered_tokens_are_those_of_the_tokenizer():
    """No caption is tokenized twice while it is remembered, in a batch and across batches."""
    calls: list[str] = []

    def lengths(texts: list[str]) -> torch.Tensor:
        calls.extend(texts)
        return torch.tensor([[len(text), ord(text[0])] for text in texts])

    tokenizer = RememberingTokenizer(lengths, capacity=3)
    for texts in (["a", "bb", "a"], ["bb", "ccc"], ["dddd", "a"], ["dddd"]):
        assert tokenizer(texts).tolist() == [[len(text), ord(text[0])] for text in texts]
    assert calls == ["a", "bb", "ccc", "dddd", "dddd"]


def bad(name: str) -> BadSample:
    return BadSample(name, f"{name}.jpg", "truncated")


def test_skips_are_written_once_a_sample(tmp_path):
    """However often a sample is met; a new log continues the file."""
    path = tmp_path / "run" / "skipped.jsonl"
    log = SkipLog(path, max_share=1.0, at_least=1)
    log.add(10, [])
    assert not path.exists()
    log.add(10, [bad("a"), bad("ü")])
    log.add(10, [bad("a")])
    assert (log.read, log.skipped, len(log.known)) == (30, 3, 2)
    again = SkipLog(path, max_share=1.0, at_least=1)
    again.add(10, [bad("a"), bad("c")])
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["sample_id"] for line in written] == ["a", "ü", "c"]
    assert written[1] == {"sample_id": "ü", "where": "ü.jpg", "reason": "truncated"}


def test_the_most_captions_are_those_of_the_fullest_pair_or_of_a_share():
    """Over list columns and single ones, of the rows in use, of all sources of a view."""
    columns = {
        "caption": [["a", "b"], ["a"], None, ["a", "b", "c"]],
        "title": ["t", None, "t", "t"],
    }
    table = tiny_pairs(4).drop_columns("caption")
    table = pa.table({"image": table["image"], **columns})
    pairs = ImageTextPairs(table, name="p", caption_columns=("caption", "title"))
    assert (pairs.most_captions(), pairs.most_captions(0.99)) == (4, 3)
    few = pairs.subset(np.array([0, 1, 2]))
    view = join_sources([few, ImageTextPairs(tiny_pairs(), name="q")])
    assert few.most_captions() == view.most_captions() == 3
    assert few.most_captions(0.99) == view.most_captions(0.99) == 1
