"""Ranks among candidates, and zero-shot classification by them."""

import pytest
import torch
import torch.nn.functional as F

from protoclip.evaluation import retrieval
from protoclip.evaluation.retrieval import best_relevant_rank, zero_shot_ranks


def unit_rows(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


def slow_ranks(queries, candidates, query_groups, candidate_groups):
    """Sort the candidates, irrelevant ones first among equals; the first relevant one's place."""
    ranks = []
    for query, group in zip(queries.tolist(), query_groups.tolist(), strict=True):
        scored = sorted(
            (-sum(a * b for a, b in zip(query, candidate, strict=True)), other == group)
            for candidate, other in zip(candidates.tolist(), candidate_groups.tolist(), strict=True)
        )
        ranks.append([relevant for _, relevant in scored].index(True))
    return ranks


@pytest.mark.parametrize("chunk", [1, 70, 4_000_000])
def test_ranks_equal_a_slow_restatement(chunk, monkeypatch):
    """With several images a text and several texts an image, in chunks of any size."""
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    images, texts = unit_rows(40, 5, 0), unit_rows(23, 5, 1)
    image_groups = torch.randint(7, (40,), generator=torch.Generator().manual_seed(2))
    image_groups[:7], text_groups = torch.arange(7), torch.arange(23) % 7
    for given in (
        (images, texts, image_groups, text_groups),
        (texts, images, text_groups, image_groups),
    ):
        assert best_relevant_rank(*given).tolist() == slow_ranks(*given)
    classes = torch.arange(7)
    ranks = zero_shot_ranks(images, texts[:7], image_groups)
    assert ranks.tolist() == slow_ranks(images, texts[:7], image_groups, classes)


def test_ties_and_nan_count_against_the_query():
    """Neither a collapsed nor a diverged model scores."""
    groups, constant = torch.arange(8), torch.ones(8, 4) / 2
    assert best_relevant_rank(constant, constant, groups, groups).tolist() == [7] * 8
    fine, broken = unit_rows(8, 4, 0).float(), unit_rows(8, 4, 0).float()
    assert best_relevant_rank(fine, broken, groups, groups).tolist() == [0] * 8
    broken[0] = torch.nan
    assert int(best_relevant_rank(fine, broken, groups, groups).min()) == 1
    assert best_relevant_rank(broken, fine, groups, groups)[0] == 7


def test_a_query_without_a_relevant_candidate_is_refused():
    images, texts = unit_rows(3, 4, 0), unit_rows(2, 4, 1)
    with pytest.raises(ValueError, match="1 of 3 queries"):
        best_relevant_rank(images, texts, torch.arange(3), torch.arange(2))
