"""The features that are clustered, and the prototype that each sample of a batch belongs to."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from interrupting import with_changes
from protoclip import KMeans
from protoclip.data.loader import Batch, Pass
from protoclip.data.sampler import Episode
from protoclip.encode.store import hash_ids
from protoclip.encode.teachers import TeacherFeatures
from protoclip.models.protoclip import Embeddings
from protoclip.prototypes.features import ExtractedFeatures, QueuedFeatures
from protoclip.training import run
from protoclip.training.plan import make_plan
from testing import build_model, tiny_config, tiny_model, tiny_pairs

SCALE = torch.tensor(10.0)
EPISODE = Episode(index=1, rows=torch.arange(8))


def rows(count: int, width: int, seed: int) -> Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1)


def batch(names: list[str], first: int = 0, **teachers: TeacherFeatures) -> Batch:
    return Batch(
        position=torch.arange(first, first + len(names)),
        sample_id=names,
        image=torch.zeros(len(names), 3, 1, 1),
        text=torch.zeros(len(names), 1, dtype=torch.long),
        captions=[b""] * len(names),
        features={name: teacher.rows(names) for name, teacher in teachers.items()},
    )


def embeddings(count: int, seed: int, *, project: bool = True) -> Embeddings:
    return Embeddings(
        image_features=rows(count, 6, seed),
        text_features=rows(count, 6, seed + 1),
        image_projections=rows(count, 4, seed + 2).requires_grad_() if project else None,
        text_projections=rows(count, 4, seed + 3).requires_grad_() if project else None,
        logit_scale=SCALE,
        prototype_logit_scale=SCALE,
    )


def teacher(names: list[str]) -> TeacherFeatures:
    features = np.random.default_rng(0).normal(size=(len(names), 3)).astype(np.float32)
    return TeacherFeatures.of_array(name="bert", sample_ids=names, features=features)


def clusters(k: int, width: int, seed: int, assignments: list[int] | None = None) -> KMeans:
    given = torch.tensor(assignments or [0])
    return KMeans(centroids=rows(k, width, seed), assignments=given, inertia=0.0, history=())


def settings(batches: Callable[[Episode], list[Batch]], **teachers: TeacherFeatures) -> dict:
    model = build_model(tiny_model(), seed=0)
    return {"model": model, "batches": batches, "teachers": teachers, "autocast": nullcontext}


def no_pass(episode: Episode) -> list[Batch]:
    raise AssertionError("an extraction pass")


def queued(**teachers: TeacherFeatures) -> QueuedFeatures:
    return QueuedFeatures(**settings(no_pass, **teachers), size=8)


def test_the_queue_keeps_the_last_samples():
    """Its rows and the teacher's of the same samples are clustered, without a pass or a graph."""
    names = [f"s{i}" for i in range(20)]
    bert = teacher(names)
    source = queued(bert=bert)
    seen = []
    for first in range(0, 20, 4):
        seen.append(embeddings(4, first))
        source.observe(batch(names[first : first + 4]), seen[-1], torch.tensor(True))
        # These add nothing.
        source.observe(batch(["x"] * 4), embeddings(4, 99, project=False), torch.tensor(True))
        source.observe(batch(["x"] * 4), embeddings(4, 99), torch.tensor(False))
        if first == 0:
            with pytest.raises(AssertionError, match="an extraction pass"):
                source.features(EPISODE)
            continue
        found = source.features(EPISODE)
        assert found.positions is None
        assert not found.image.requires_grad
        assert set(source.sample_ids) == set(names[first - 4 : first + 4])
        places = [source.sample_ids.index(name) for name in names[first - 4 : first + 4]]
        for space in ("image", "text"):
            expected = torch.cat([getattr(step, f"{space}_projections") for step in seen[-2:]])
            assert torch.equal(getattr(found, space)[places], expected)
        assert torch.equal(found.teachers["bert"], bert.lookup(source.sample_ids))


def test_a_queued_sample_belongs_to_the_nearest_prototype_of_the_moment():
    """By its current projection in its own modality, and by its teacher features if there are."""
    names = list("abcdefgh")
    bert = teacher(names[:5])
    spaces = {"image": clusters(5, 4, 1), "text": clusters(5, 4, 2), "bert": clusters(5, 3, 3)}
    now = embeddings(8, 7)
    found = queued(bert=bert).assign(batch(names, bert=bert), now, spaces)
    for space, points in (
        ("image", now.image_projections),
        ("text", now.text_projections),
        ("bert", bert.lookup(names[:5])),
    ):
        expected = torch.cdist(points, spaces[space].centroids).argmin(1).tolist()
        assert found[space].tolist() == expected + [-1] * (8 - len(expected))


def test_an_extracted_sample_belongs_where_clustering_put_it():
    """By its id and caption, whatever its projection is now and where a stream has it now. One
    that was not extracted has no prototype. Checkpoints of 1.0.0 have positions alone."""
    source = ExtractedFeatures(**settings(no_pass))
    spaces = {"image": clusters(3, 4, 0, [2, 0, 1, 1, 0, 2])}
    found = source.assign(batch(list("abc"), first=2), embeddings(3, 0), spaces)
    assert found["image"].tolist() == [1, 1, 0]
    source.load_state_dict({"keys": torch.from_numpy(hash_ids("xyabbc").view(np.int64))})
    found = source.assign(batch(list("abczbb"), first=0), embeddings(6, 0), spaces)
    assert found["image"].tolist() == [1, 1, 2, -1, 0, 1]
    assert source.unknown == 1


def test_a_repeated_pair_is_extracted_once():
    """The same image with another caption is another pair."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    captions = torch.randint(1, 50, (3, 8), generator=generator)
    pairs = [(0, 0), (1, 1), (0, 0), (0, 2), (1, 1), (0, 2), (0, 2), (0, 0)]

    def batches(size: int) -> list[Batch]:
        made = []
        for first in range(0, len(pairs), size):
            seen, read = zip(*pairs[first : first + size], strict=True)
            plain = batch([f"image {number}" for number in seen], first)
            texts = {"text": captions[[*read]], "captions": [bytes([number]) for number in read]}
            made.append(replace(plain, image=images[[*seen]], **texts))
        return made

    source = ExtractedFeatures(**settings(lambda episode: batches(3)))
    source.model.train()
    passes: list[int] = []
    source.model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    found = source.features(EPISODE)
    # The last batch holds nothing new: one row keeps the ranks of a sharded model together.
    assert passes == [2, 1, 1]
    assert source.model.training
    alone = [replace(source, batches=lambda _, one=one: [one]) for one in batches(1)]
    for name in ("image", "text"):
        expected = torch.cat([getattr(source.features(EPISODE), name) for source in alone])
        torch.testing.assert_close(getattr(found, name), expected)


def test_extraction_passes_micro_batches_through_the_model():
    """As training does, or a large batch would run out of memory there. Repeated pairs are fewer
    than the parts, each of which has one for a sharded model."""
    names = [*"abcdefg", *"aaaaaaa"]
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor(["abcdefg".index(name) for name in names])

    def batches(episode: Episode) -> list[Batch]:
        return [
            replace(
                batch(names[first : first + 7], first),
                image=images[numbers[first : first + 7]],
                text=numbers[first : first + 7, None].expand(7, 8) + 1,
            )
            for first in (0, 7)
        ]

    whole = ExtractedFeatures(**settings(batches))
    passes: list[int] = []
    whole.model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    parts = replace(whole, micro_batch_size=3)
    expected, found = whole.features(EPISODE), parts.features(EPISODE)
    assert passes == [7, 1, 3, 2, 2, 1, 1, 1]
    for name in ("image", "text"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_extraction_through_the_training_transform(tmp_path):
    """Each place of an episode has random draws of its own, equal every time."""
    pq.write_table(tiny_pairs(), tmp_path / "tiny.parquet")
    found = {}
    for transform in ("evaluation", "training"):
        config = tiny_config(str(tmp_path / "tiny.parquet"), out=str(tmp_path / "run"))
        config = with_changes(config, {"prototypes": {"extract_transform": transform}})
        model = build_model(config.model, seed=0)
        made = run.Run(make_plan(config), model, folder=tmp_path / "run")
        episode, source = made.episode(0), made.trainer.prototypes.source
        found[transform] = source.features(episode)
        assert torch.equal(source.features(episode).image, found[transform].image)
        trained = next(iter(made.loader.batches(Pass(episode, 0))))
        assert not torch.equal(next(iter(source.batches(episode))).image, trained.image)
    rows = episode.rows.tolist()
    earlier = [rows.index(row) for row in rows]
    repeats = [place for place, row in enumerate(rows) if rows.index(row) < place]
    assert len(repeats) > 5
    assert torch.equal(found["evaluation"].image[earlier], found["evaluation"].image)
    augmented = found["training"].image
    assert all(not torch.equal(augmented[place], augmented[earlier[place]]) for place in repeats)
    torch.testing.assert_close(found["training"].text, found["evaluation"].text)
