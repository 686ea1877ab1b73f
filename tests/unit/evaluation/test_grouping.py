"""Measures of grouping against slow restatements."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_mutual_info_score

from protoclip.evaluation import geometry, retrieval

BOTH = ("image", "text")


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def blocks(groups: torch.Tensor, seed: int) -> torch.Tensor:
    """Unit-norm rows that lie together if they are in one group."""
    centres = unit(int(groups.max()) + 1, 32, seed)
    return F.normalize(centres[groups] + 0.01 * unit(len(groups), 32, seed + 1))


def test_spread_is_0_for_one_point_and_1_for_opposite_ones():
    assert geometry.spread(unit(1, 8).repeat(5, 1)) == pytest.approx(0, abs=1e-6)
    assert geometry.spread(torch.cat([unit(4, 8), -unit(4, 8)])) == pytest.approx(1)


@pytest.mark.parametrize("chunk", [1, 200, 4_000_000])
def test_neighbours_in_group_against_a_loop(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    rows, groups = unit(40, 6), torch.arange(40) % 3
    shares = []
    for row in range(40):
        order = sorted(range(40), key=lambda other: -float(rows[row] @ rows[other]))
        nearest = [other for other in order if other != row][:4]
        shares.append(np.mean([groups[other] == groups[row] for other in nearest]))
    found = geometry.neighbours_in_group(geometry.nearest_others(rows, 4), groups)
    assert found == pytest.approx(np.mean(shares))


def test_chance_is_the_share_of_pairs_in_one_group():
    groups = torch.tensor([0, 0, 0, 1, 1, 3])
    same = [groups[i] == groups[j] for i in range(6) for j in range(6) if i != j]
    assert geometry.same_group_by_chance(groups) == pytest.approx(np.mean(same))
    # Neighbours in a space that knows nothing of the groups do no better.
    groups = torch.arange(900) % 3
    found = geometry.neighbours_in_group(geometry.nearest_others(unit(900, 16)), groups)
    assert found == pytest.approx(geometry.same_group_by_chance(groups), abs=0.03)


def test_group_sizes_count_dead_groups():
    found = geometry.group_sizes(torch.tensor([0, 0, 0, 2]), 4)
    assert found == {"number": 4, "dead": 2, "smallest": 0, "median": 0.5, "largest": 3}


@pytest.mark.parametrize("together", [True, False])
def test_modalities_agree_if_they_group_alike(together):
    """Both modalities are in six clear groups: the same ones, or others that know nothing of them.

    Six far groups in each of two unrelated spaces are no alignment, so recall stays at chance.
    """
    generator = torch.Generator().manual_seed(0)
    image_groups = torch.arange(300) % 6
    shuffled = image_groups[torch.randperm(300, generator=generator)]
    text_groups = image_groups if together else shuffled
    found, groups = geometry.measure(
        blocks(image_groups, 1),
        blocks(text_groups, 5),
        num_groups=6,
        captions=[str(row) for row in range(300)],
        classes=image_groups,
    )
    assert found["classes/image"] == pytest.approx(1)
    expected = adjusted_mutual_info_score(image_groups.numpy(), text_groups.numpy())
    assert found["agreement"] == pytest.approx(expected, abs=1e-9)
    assert found["classes/text"] == pytest.approx(expected, abs=1e-9)
    for modality in BOTH:
        share, chance = (
            found[f"{name}/{modality}"] for name in ("neighbours", "neighbours_by_chance")
        )
        assert share == pytest.approx(1 if together else chance, abs=0.05)
        assert found[f"groups/smallest/{modality}"] == 50
        assert groups[modality].shape == (geometry.CLUSTERINGS, 300)
    assert found["recall@10/image_to_text"] < 0.2
    assert "stability/image" not in found


def test_equal_captions_match_each_other():
    texts = unit(6, 8).repeat_interleave(20, dim=0)
    images = F.normalize(texts + 0.1 * unit(120, 8, seed=1))
    settings = {"num_groups": 4, "seed": 0}
    found, _ = geometry.measure(
        images, texts, captions=[str(row // 20) for row in range(120)], **settings
    )
    assert found["recall@10/image_to_text"] == 1


def test_a_copy_of_an_image_is_that_image():
    """It takes no place among the best ten."""
    images, texts, names = unit(120, 8, seed=1), unit(120, 8), [str(row // 2) for row in range(120)]
    settings = {"num_groups": 4, "seed": 0}
    found, _ = geometry.measure(images, texts, captions=names, **settings)
    twice = [rows.repeat(2, 1) for rows in (images, texts)]
    content = [*range(120)] * 2
    copied, _ = geometry.measure(*twice, captions=names * 2, content=content, **settings)
    for way in ("image_to_text", "text_to_image"):
        assert 0 < copied[f"recall@10/{way}"] == found[f"recall@10/{way}"] < 1
