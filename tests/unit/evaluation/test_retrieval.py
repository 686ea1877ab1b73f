"""Ranks among candidates, clustering agreement, modality gap, alignment and uniformity."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protoclip.evaluation import retrieval
from protoclip.evaluation.geometry import clustering, effective_rank, modality_gap
from protoclip.evaluation.retrieval import best_relevant_rank
from protoclip.evaluation.zero_shot import zero_shot_ranks


def unit_rows(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


def slow_ranks(queries, candidates, query_groups, candidate_groups, matches=None):
    """Sort the candidates, irrelevant ones first among equals; the first relevant one's place."""
    pairs = {(group, group) for group in query_groups.tolist()}
    if matches is not None:
        pairs = {*zip(*matches.tolist(), strict=True)}
    ranks = []
    for query, group in zip(queries.tolist(), query_groups.tolist(), strict=True):
        scored = sorted(
            (-sum(a * b for a, b in zip(query, candidate, strict=True)), (group, other) in pairs)
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
    # Image groups 0 to 6, text groups 0 to 4; each of either has one of the other.
    matches = torch.tensor([[*range(7), 0, 0, 3], [g % 5 for g in range(7)] + [1, 4, 0]])
    for given in (
        (images, texts, image_groups, text_groups % 5, matches),
        (texts, images, text_groups % 5, image_groups, matches.flip(0)),
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


def test_what_candidates_take_equals_leaving_them_out():
    """Of queries of other clusters; shrunk by the noise of the pairs, and alike in a cluster."""
    generator = torch.Generator().manual_seed(2)
    candidates, noise = (torch.randn(n, 8, generator=generator) for n in (60, 80))
    groups, of_groups = torch.arange(80) % 60, torch.arange(60)
    of_candidates = torch.arange(60) % 20
    clusters = of_candidates[groups]
    queries = candidates[groups] + noise
    queries[:, 0] += 2.0
    candidates[7, 0] += 3.0  # it is near to many queries
    ranks = best_relevant_rank(queries, candidates, groups, of_groups)
    found = retrieval.crowding(queries, candidates, ranks, clusters, of_candidates)
    for k, taken in found.items():
        pairs = np.zeros((20, 20))
        for cluster in range(20):
            left, others = of_candidates != cluster, clusters != cluster
            fewer = queries[others], candidates[left], groups[others], of_groups[left]
            right = (best_relevant_rank(*fewer) < k) & (ranks[others] >= k)
            np.add.at(pairs[:, cluster], clusters[others][right], 1 / 80)
        share = pairs.sum(0)
        variance = np.square(share - share.mean()).sum()
        kept = 1 - np.square(pairs).sum() / variance
        expected = (share.mean() - share) * max(kept, 0.0)
        sums = np.bincount(of_candidates, taken.numpy())
        np.testing.assert_allclose(sums, expected, atol=1e-12)
        np.testing.assert_allclose(taken[7], expected[7] / 3, atol=1e-12)
    assert found[1][7] == found[1].min() < 0


def slow_uniformity(rows):
    return float((-2 * torch.pdist(rows).square()).exp().mean().log())


@pytest.mark.parametrize("chunk", [1, 100, 4_000_000])
def test_the_modality_gap_equals_a_slow_restatement(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    images, texts = unit_rows(30, 5, 0), unit_rows(30, 5, 1)
    found = modality_gap(images, texts)
    means, squares = images.mean(0) - texts.mean(0), (images - texts).square().sum(1)
    assert found == {
        "gap": pytest.approx(float(means.norm())),
        "alignment": pytest.approx(float(squares.mean())),
        "uniformity_image": pytest.approx(slow_uniformity(images), abs=1e-6),
        "uniformity_text": pytest.approx(slow_uniformity(texts), abs=1e-6),
    }


def test_several_captions_an_image_are_several_pairs():
    """Texts are compared with their own image, and images count once."""
    images, texts, own = unit_rows(4, 5, 0), unit_rows(7, 5, 1), torch.tensor([0, 0, 1, 2, 3, 3, 3])
    found = modality_gap(images, texts, own)
    squares = [float((images[i] - text).square().sum()) for i, text in zip(own, texts, strict=True)]
    assert found["alignment"] == pytest.approx(sum(squares) / 7)
    assert found["gap"] == pytest.approx(float((images.mean(0) - texts.mean(0)).norm()))
    assert found["uniformity_image"] == pytest.approx(slow_uniformity(images), abs=1e-6)


def test_the_effective_rank_counts_directions():
    """Of equal ones all, of one alone 1; else by the entropy of NumPy's singular values."""
    assert effective_rank(torch.eye(5).repeat(3, 1)) == pytest.approx(5.0)
    assert effective_rank(torch.ones(4, 6)) == pytest.approx(1.0, abs=1e-5)
    rows = unit_rows(30, 6, 0) * torch.tensor([5.0, 3.0, 1.0, 1.0, 0.1, 0.1])
    shares = np.linalg.svd(rows.numpy(), compute_uv=False)
    shares /= shares.sum()
    assert effective_rank(rows) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_clusters_of_constant_features_agree_with_nothing():
    assert clustering(torch.ones(12, 4), torch.arange(12) % 3)["ari"] == pytest.approx(0.0)
