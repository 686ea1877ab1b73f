"""benchmarks/messages.py counts what ranks send; docs/scaling.md has its table."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts_as_modules import script
from testing import tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def messages() -> Iterator[Any]:
    with script("benchmarks/messages.py") as module:
        yield module


def test_the_page_has_the_table_that_was_computed(messages):
    counts = json.loads((ROOT / "benchmarks" / "results" / "messages.json").read_text())
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert counts.keys() == {str(ranks) for ranks in messages.RANKS}
    assert messages.written(page, counts) == page


@pytest.mark.parametrize("ranks", [8, 512])
def test_bytes_are_those_of_the_sizes(ranks, messages):
    """Of gradients, and of features and their gradients, by hand."""
    sizes = messages.Sizes(
        model=tiny_model(), width=16, teacher=4, episode=16 * ranks, prototypes=20, iterations=3
    )
    counts = messages.count(ranks, 8, sizes)
    parameters = sum(p.numel() for p in messages.loading.model(tiny_model(), seed=0).parameters())
    ring = (ranks - 1) / ranks
    step = counts["step"]
    assert step["bytes/gradients"] == pytest.approx(8 * parameters * ring, rel=1e-6)
    assert step["bytes/features"] == pytest.approx(16 * 16 * 8 * ranks * ring, rel=1e-6)
    # The queue: two projections of 8, by 4 bytes, and their positions and ids.
    assert counts["checkpoint"]["bytes"] > 2 * 8 * 4 * 16 * ranks * ring
    # Sums over 20 clusters in 3 iterations, of two spaces of 8 and one of 4.
    assert counts["kmeans"]["bytes"] > 2 * 3 * 20 * (8 + 8 + 4) * 4 * ring
    assert step["messages"] > step["collectives"]
