"""Where what is clustered comes from, and which prototype a sample belongs to."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from protoclip.data import sources
from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.models import loading
from protoclip.models.protoclip import Embeddings
from protoclip.prototypes.features import (
    EpisodeFeatures,
    ExtractedFeatures,
    FeatureQueue,
    QueuedFeatures,
    extract_features,
    teacher_assignments,
)
from protoclip.prototypes.targets import Prototypes, build_targets, group
from protoclip.teachers.store import TeacherFeatures
from protoclip.testing import tiny_config, tiny_model, tiny_pairs
from protoclip.training import run

SCALE = torch.tensor(10.0)


def rows(count: int, width: int, seed: int) -> Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1)


def batch(names: list[str], first: int = 0) -> Batch:
    return Batch(
        position=torch.arange(first, first + len(names)),
        sample_id=names,
        image=torch.zeros(len(names), 3, 1, 1),
        text=torch.zeros(len(names), 1, dtype=torch.long),
    )


def embeddings(count: int, seed: int, *, project: bool = True) -> Embeddings:
    return Embeddings(
        image_features=rows(count, 6, seed),
        text_features=rows(count, 6, seed + 1),
        image_projections=rows(count, 4, seed + 2) if project else None,
        text_projections=rows(count, 4, seed + 3) if project else None,
        logit_scale=SCALE,
        prototype_logit_scale=SCALE,
    )


def teacher(names: list[str]) -> TeacherFeatures:
    features = np.random.default_rng(0).normal(size=(len(names), 3)).astype(np.float32)
    return TeacherFeatures.in_memory(name="bert", sample_ids=names, features=features)


def prototypes(k: int, width: int, seed: int) -> Prototypes:
    return Prototypes(centroids=rows(k, width, seed), assignments=torch.zeros(8, dtype=torch.long))


def farthest_left(points: Tensor, centroids: Tensor) -> list[int]:
    """Nearest centroid of each row, by all distances in float64."""
    differences = points.double()[:, None] - centroids.double()[None]
    return differences.square().sum(2).argmin(1).tolist()


class NoPass:
    """Batches that must not be asked for."""

    def __call__(self, episode: Episode) -> Iterator[Batch]:
        raise AssertionError("an extraction pass")


def queued(
    size: int, teachers: Mapping[str, TeacherFeatures] | None = None
) -> tuple[QueuedFeatures, FeatureQueue]:
    extracted = ExtractedFeatures(
        model=loading.model(tiny_model(), seed=0),
        batches=NoPass(),
        teachers={},
        autocast=nullcontext,
    )
    queue = FeatureQueue(size)
    source = QueuedFeatures(queue=queue, teachers=teachers or {}, fallback=extracted)
    return source, queue


def test_a_queue_keeps_the_last_samples() -> None:
    """After batches of any size it holds exactly the newest rows, each beside its id."""
    queue = FeatureQueue(7)
    image, text = rows(20, 4, 0), rows(20, 4, 1)
    names = [f"s{i}" for i in range(20)]
    cuts = [0, 3, 7, 8, 13, 20]
    for start, end in pairwise(cuts):
        queue.push(names[start:end], image[start:end], text[start:end])
        assert queue.full == (end >= 7)
        held = {
            name: (queue.image[slot].tolist(), queue.text[slot].tolist())
            for slot, name in enumerate(queue.sample_ids)
            if name
        }
        newest = range(max(0, end - 7), end)
        assert held == {names[i]: (image[i].tolist(), text[i].tolist()) for i in newest}


class Writes(TorchDispatchMode):
    """Remembers the indices that tensors are written at."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[list[int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.index_put_.default:
            self.places.append(args[1][0].tolist())
        return function(*args, **(kwargs or {}))


def test_of_a_batch_larger_than_the_queue_the_last_samples_are_kept() -> None:
    """No slot is written twice at once, of which a GPU would keep either sample."""
    queue = FeatureQueue(3)
    image, text = rows(5, 4, 1), rows(5, 4, 2)
    with Writes() as writes:
        queue.push(["x"], image[:1], text[:1])
        queue.push(list("abcde"), image, text)
    assert [len(place) for place in writes.places] == [1, 1, 3, 3]
    assert all(len(place) == len(set(place)) for place in writes.places)
    held = queue.contents()
    order = [held.sample_ids.index(name) for name in "cde"]
    assert torch.equal(held.image[order], image[2:])
    assert torch.equal(held.text[order], text[2:])
    assert queue.pushed == 6


def test_a_queue_holds_no_graph() -> None:
    """What training computed is kept without its history, in float32."""
    queue = FeatureQueue(4)
    image = rows(4, 4, 0).requires_grad_()
    queue.push(list("abcd"), (2 * image).bfloat16(), (2 * image).bfloat16())
    assert not queue.image.requires_grad
    assert queue.image.dtype == torch.float32


def test_a_full_queue_needs_no_pass() -> None:
    """Its rows, and the teacher's of the same samples, are what is clustered."""
    names = [f"s{i}" for i in range(8)]
    bert = teacher(names)
    source, _ = queued(8, {"bert": bert})
    for first in (0, 4):
        source.observe(batch(names[first : first + 4]), embeddings(4, first))
    found = source.features(Episode(index=1, rows=torch.arange(8)))
    assert isinstance(found, EpisodeFeatures)
    expected = torch.cat([embeddings(4, 0).image_projections, embeddings(4, 4).image_projections])
    assert torch.equal(found.image, expected)
    assert torch.equal(found.teachers["bert"], bert.lookup(names))


def test_a_queue_that_is_not_full_extracts() -> None:
    """At the start of a run without warm-up there is nothing to cluster yet."""
    source, _ = queued(8)
    source.observe(batch(list("abcd")), embeddings(4, 0))
    with pytest.raises(AssertionError, match="an extraction pass"):
        source.features(Episode(index=0, rows=torch.arange(8)))


def test_stages_without_projections_leave_the_queue_alone() -> None:
    """A step that computed none adds nothing."""
    source, queue = queued(8)
    source.observe(batch(list("abcd")), embeddings(4, 0, project=False))
    assert queue.pushed == 0


def test_a_queued_sample_belongs_to_the_nearest_prototype_of_the_moment() -> None:
    """Of its current projection in its own modality, and of its teacher features."""
    names = list("abcdefgh")
    bert = teacher(names)
    source, _ = queued(8, {"bert": bert})
    spaces = {
        "image": prototypes(5, 4, 1),
        "text": prototypes(5, 4, 2),
        "bert": prototypes(5, 3, 3),
    }
    now = embeddings(8, 7)
    found = source.assign(batch(names), now, spaces)
    for space, points in (
        ("image", now.image_projections),
        ("text", now.text_projections),
        ("bert", bert.lookup(names)),
    ):
        assert found[space].tolist() == farthest_left(points, spaces[space].centroids)


def test_a_pair_that_comes_again_is_extracted_once() -> None:
    """The same picture with another caption is another pair."""
    model = loading.model(tiny_model(), seed=0)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(2, 3, 32, 32, generator=generator)
    captions = torch.randint(1, 50, (3, 8), generator=generator)
    pairs = [(0, 0), (1, 1), (0, 0), (0, 2), (1, 1), (0, 2), (0, 2), (0, 0)]

    def batches(size: int) -> list[Batch]:
        return [
            Batch(
                position=torch.arange(first, min(first + size, len(pairs))),
                sample_id=[f"picture {picture}" for picture, _ in pairs[first : first + size]],
                image=pictures[[picture for picture, _ in pairs[first : first + size]]],
                text=captions[[caption for _, caption in pairs[first : first + size]]],
            )
            for first in range(0, len(pairs), size)
        ]

    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    found = extract_features(model, batches(3), teachers={}, autocast=nullcontext)
    # The last batch holds nothing new: one row keeps the processes of a sharded model together.
    assert passes == [2, 1, 1]
    alone = [
        extract_features(model, [one], teachers={}, autocast=nullcontext) for one in batches(1)
    ]
    torch.testing.assert_close(found.image, torch.cat([one.image for one in alone]))
    torch.testing.assert_close(found.text, torch.cat([one.text for one in alone]))


def test_an_extracted_sample_belongs_where_clustering_put_it() -> None:
    """By position, whatever the projection is now."""
    source = ExtractedFeatures(
        model=loading.model(tiny_model(), seed=0),
        batches=NoPass(),
        teachers={},
        autocast=nullcontext,
    )
    put = Prototypes(centroids=rows(3, 4, 0), assignments=torch.tensor([2, 0, 1, 1, 0, 2]))
    found = source.assign(batch(list("abc"), first=2), embeddings(3, 0), {"image": put})
    assert found["image"].tolist() == [1, 1, 0]


def test_samples_without_teacher_features_belong_nowhere() -> None:
    """-1, and the others are not disturbed."""
    bert = teacher(list("abc"))
    spaces = {"bert": prototypes(4, 3, 1)}
    found = teacher_assignments({"bert": bert}, batch(["a", "x", "c"]), spaces)["bert"]
    assert found[1] == -1
    assert found[[0, 2]].tolist() == farthest_left(
        bert.lookup(["a", "c"]), spaces["bert"].centroids
    )


def test_grouping_leaves_out_samples_a_teacher_does_not_know() -> None:
    """They have no prototype and no part in its translation; a space of none has no prototypes."""
    points = rows(6, 3, 0)
    points[[1, 4]] = float("nan")
    nothing = torch.full((6, 3), float("nan"))

    def two(space: str, given: Tensor, positions: Tensor | None):
        from protoclip.prototypes.kmeans import kmeans

        assert positions is None
        assert torch.isfinite(given).all()
        return kmeans(given, 2, iterations=3, seed=0)

    found = group({"bert": points, "other": nothing}, two)
    assert set(found) == {"bert"}
    assert (found["bert"].assignments == -1).tolist() == [False, True, False, False, True, False]
    image, text = rows(6, 4, 1), rows(6, 4, 2)
    targets = build_targets(found, image_projections=image, text_projections=text)
    known = found["bert"].assignments >= 0
    for cluster in range(2):
        members = known & (found["bert"].assignments == cluster)
        torch.testing.assert_close(
            targets["text_from_bert"].student_centroids[cluster], text[members].mean(0)
        )


def test_extraction_through_the_training_transform(tmp_path: Path) -> None:
    """Each place of an episode has draws of its own, which are not training's and the same
    whenever they are asked for; the default sees every pair once and as evaluation does."""
    pq.write_table(tiny_pairs(), tmp_path / "tiny.parquet")
    found = {}
    for transform in ("evaluation", "training"):
        config = tiny_config(str(tmp_path / "tiny.parquet"), out=str(tmp_path / "run"))
        prototypes = replace(config.prototypes, extract_transform=transform)
        config = replace(config, prototypes=prototypes)
        model, samples = loading.model(config.model, seed=0), sources.pairs(config)
        parts = run.Run(config, model, samples, folder=tmp_path / "run")
        source, episode = parts.trainer.source, parts.episode(0)
        first, again = (source.features(episode) for _ in range(2))
        assert torch.equal(first.image, again.image)
        extracted = next(iter(source.batches(episode))).image
        trained = next(iter(parts.loader.batches(episode))).image
        assert not torch.equal(extracted, trained)
        found[transform] = first
    rows = episode.rows.tolist()
    earlier = [rows.index(row) for row in rows]
    repeats = [place for place, row in enumerate(rows) if rows.index(row) < place]
    assert len(repeats) > 5
    assert torch.equal(found["evaluation"].image[earlier], found["evaluation"].image)
    augmented = found["training"].image
    assert all(not torch.equal(augmented[place], augmented[earlier[place]]) for place in repeats)
    torch.testing.assert_close(found["training"].text, found["evaluation"].text)
