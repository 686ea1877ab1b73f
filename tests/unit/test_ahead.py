"""Clustering beside training: the same result, whether it was expected or not."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from protoclip import run
from protoclip.build import training
from protoclip.clustering import KMeans, kmeans
from protoclip.clustering.ahead import Ahead
from protoclip.testing import tiny_config

CPU = torch.device("cpu")


class Counting:
    """K-means that counts its calls, and notes in which threads they were."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __call__(self, space: str, rows: Tensor) -> KMeans:
        self.threads.append(threading.get_ident())
        return kmeans(rows, 4, iterations=5, seed=0)


def points(seed: int) -> Tensor:
    return torch.randn(60, 3, generator=torch.Generator().manual_seed(seed))


def same(found: KMeans, expected: KMeans) -> bool:
    return torch.equal(found.centroids, expected.centroids) and torch.equal(
        found.assignments, expected.assignments
    )


def test_what_is_expected_is_clustered_once_and_elsewhere() -> None:
    cluster = Counting()
    ahead = Ahead(cluster, CPU)
    ahead.expect("bert", lambda: points(0))
    ahead.expect("dino", lambda: points(1))
    assert same(ahead("dino", points(1)), kmeans(points(1), 4, iterations=5, seed=0))
    assert same(ahead("bert", points(0)), kmeans(points(0), 4, iterations=5, seed=0))
    assert len(cluster.threads) == 2
    assert threading.get_ident() not in cluster.threads


@pytest.mark.parametrize("expected", [None, points(1), points(0)[:30]])
def test_what_is_not_expected_is_clustered_when_asked_for(expected: Tensor | None) -> None:
    ahead = Ahead(Counting(), CPU)
    if expected is not None:
        ahead.expect("bert", lambda: expected)
    assert same(ahead("bert", points(0)), kmeans(points(0), 4, iterations=5, seed=0))
    # A result is given once.
    assert same(ahead("bert", points(2)), kmeans(points(2), 4, iterations=5, seed=0))


def test_the_thread_leaves_the_others_their_cores() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []

        def cluster(space: str, rows: Tensor) -> KMeans:
            seen.append(torch.get_num_threads())
            return kmeans(rows, 4, iterations=1, seed=0)

        Ahead(cluster, CPU)("bert", points(0))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("source", ["queue", "extract"])
def test_a_run_clusters_its_teacher_beside_training(
    source: Literal["queue", "extract"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each space of both prototypical episodes once, so that what was expected is what came."""
    calls: list[tuple[int, int]] = []

    def recorded(rows: Tensor, *arguments: Any, **settings: Any) -> KMeans:
        calls.append((rows.shape[1], threading.get_ident()))
        return kmeans(rows, *arguments, **settings)

    monkeypatch.setattr(training, "kmeans", recorded)
    config = tiny_config(out=str(tmp_path / "run"), teacher="emoji")
    config = replace(
        config,
        run=replace(config.run, evaluate=False),
        prototypes=replace(config.prototypes, source=source),
    )
    run.train(config)
    here = threading.get_ident()
    teacher_width = 64
    assert [width == teacher_width for width, thread in calls if thread != here] == [True, True]
    assert [width == teacher_width for width, thread in calls if thread == here] == [False] * 4
