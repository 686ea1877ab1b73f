"""What is measured of two encoders, against slow restatements in float64 and known values."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation import match, retrieval
from protoclip.evaluation.geometry import nearest_others
from testing import tiny_pairs


def rows(number, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=generator, dtype=torch.float64)


def rotated(features, seed=9):
    return features @ torch.linalg.qr(rows(features.shape[1], features.shape[1], seed))[0]


def slow_neighbours(features, k):
    """The k other rows of the highest cosine."""
    found = []
    for row, one in enumerate(features):
        cosines = [
            (float(one @ other / one.norm() / other.norm()), number)
            for number, other in enumerate(features)
            if number != row
        ]
        found.append({number for _, number in sorted(cosines, reverse=True)[:k]})
    return found


@pytest.mark.parametrize("chunk", [1, 100, 4_000_000])
def test_shared_neighbours_equal_a_slow_restatement(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    one = rows(30, 6, 0)
    other = one[:, :4] + 0.7 * rows(30, 4, 1)
    both = zip(slow_neighbours(one, 5), slow_neighbours(other, 5), strict=True)
    expected = np.mean([len(mine & yours) / 5 for mine, yours in both])
    nearest = nearest_others(one, 5), nearest_others(other, 5)
    assert match.shared_neighbours(*nearest) == pytest.approx(expected, abs=1e-12)
    assert 0.3 < expected < 0.9


def test_shared_neighbours_are_all_in_equal_spaces_and_few_by_chance():
    one, other = rows(400, 8, 0), rows(400, 8, 1)
    nearest = nearest_others(one)
    assert match.shared_neighbours(nearest, nearest_others(3 * rotated(one))) == 1.0
    by_chance = match.shared_neighbours(nearest, nearest_others(other))
    assert by_chance == pytest.approx(10 / 399, abs=0.01)
    few = nearest_others(one[:4])  # fewer others than neighbours
    assert few.shape == (4, 3)


def slow_cka(one, other):
    """From matrices of kernels, by the unbiased HSIC of Song et al. 2012, equation 5."""

    def hsic(k, l):  # noqa: E741
        n, ones = len(k), np.ones(len(k))
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
        terms = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
        return (terms - 2 / (n - 2) * ones @ k @ l @ ones) / (n * (n - 3))

    k, l = ((features @ features.T).numpy() for features in (one, other))  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def test_cka_equals_a_slow_restatement():
    one = rows(40, 12, 0) + 3.0
    other = one[:, :5] @ rows(5, 7, 1) + rows(40, 7, 2)
    assert match.linear_cka(one, other) == pytest.approx(slow_cka(one, other), abs=1e-12)
    assert match.linear_cka(one.float(), other.float()) == pytest.approx(
        slow_cka(one, other), abs=1e-5
    )


def test_cka_knows_neither_rotation_nor_scale_and_is_zero_by_chance():
    """Also in spaces that are wider than there are samples, where a biased one is near 1."""
    one = rows(50, 12, 0)
    assert match.linear_cka(one, 3 * rotated(one) + 5) == pytest.approx(1, abs=1e-12)
    other = one + rows(50, 12, 1)
    expected = match.linear_cka(one, other)
    assert match.linear_cka(rotated(one), 0.1 * rotated(other, 8)) == pytest.approx(expected)
    assert abs(match.linear_cka(rows(100, 400, 2), rows(100, 300, 3))) < 0.02
    assert match.linear_cka(one, torch.ones(50, 3)) == 0.0


def test_canonical_recall_equals_a_slow_restatement():
    """With pairs that share nothing; the evaluated half has no part in the maps."""
    images = rows(120, 9, 0)
    texts = images[:, :4] + 0.5 * rows(120, 4, 1)
    captions = [f"caption {row}" for row in range(120)]
    tested = match.draw_half(torch.arange(120), 0)
    found = match.canonical_recall(images, texts, torch.arange(120), captions)
    fitted = match.moments_of_images(
        images[~tested], texts[~tested], torch.ones(int((~tested).sum()), dtype=torch.long)
    )
    one, other = (
        (features[tested].double() @ projection).numpy()
        for features, projection in zip(
            (images, texts), match.canonical_projections(fitted), strict=True
        )
    )
    cosines = one @ other.T
    cosines /= np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    for way, of_way in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        ranks = [sum(cosine > row[number] for cosine in row) for number, row in enumerate(of_way)]
        value = np.mean(np.array(ranks) < 10)
        assert found[f"recall@10/{way}"] == pytest.approx(value, abs=1e-12)
        assert 0.3 < value < 0.95
    ways = (found["recall@10/image_to_text"], found["recall@10/text_to_image"])
    assert found["recall@10"] == pytest.approx(np.mean(ways))
    assert found["judged"] == 60
    assert found["recall@10/by_chance"] == pytest.approx(10 / 60)


def test_canonical_recall_is_full_of_a_linear_map_and_chance_without_one():
    images, captions = rows(400, 12, 0), [str(row) for row in range(400)]
    linear, other = images @ rows(12, 20, 1) + 4, rows(400, 20, 2)
    assert match.canonical_recall(images, linear, torch.arange(400), captions)["recall@10"] == 1.0
    by_chance = match.canonical_recall(images, other, torch.arange(400), captions)
    assert by_chance["recall@10"] == pytest.approx(by_chance["recall@10/by_chance"], abs=0.03)
    constant = torch.ones(400, 5)  # of an encoder that sees nothing, everything is equally near
    found = match.canonical_recall(images, constant, torch.arange(400), captions)
    assert found["recall@10"] == 0.0


def test_equal_images_and_captions_are_matches():
    """Each image twice, with two captions; a tenth of the captions are of two images."""
    concepts = rows(100, 8, 0)
    image_of_pair = torch.arange(100).repeat_interleave(2)
    captions = [f"{n % 90 if n < 100 else n}" for n in range(200)]
    texts = torch.stack([concepts[int(caption) // 2] for caption in captions])
    found = match.canonical_recall(concepts[image_of_pair], texts, image_of_pair, captions)
    assert found["recall@10/text_to_image"] == 1.0


def test_pairs_that_share_an_image_or_a_caption_are_on_one_side():
    """Also by way of other pairs; the sides are of about one size."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randint(300, (250,), generator=generator) for _ in range(2))
    groups = match.group_pairs(images, texts)
    pairs, slow = [*zip(images.tolist(), texts.tolist(), strict=True)], [*range(250)]
    before: list[int] = []
    while slow != before:  # the least pair that can be reached
        before = [*slow]
        for one, (image, text) in enumerate(pairs):
            linked = [n for n, other in enumerate(pairs) if image == other[0] or text == other[1]]
            slow[one] = min(slow[number] for number in linked)
    same = groups.unsqueeze(1) == groups
    assert same.tolist() == [[one == other for other in slow] for one in slow]
    chosen = match.draw_half(groups, 3)
    for items in (images, texts):
        assert not {*items[chosen].tolist()} & {*items[~chosen].tolist()}
    assert abs(int(chosen.sum()) - 125) <= 1
    assert not torch.equal(chosen, match.draw_half(groups, 4))


def test_equal_images_and_captions_are_read_once():
    """And what cannot be read is counted."""
    table = tiny_pairs(60)
    images, captions = table["image"].to_pylist(), [f"caption {row}" for row in range(60)]
    images[1], captions[3], captions[4] = images[0], captions[2], ""
    images[6], captions[6] = images[5], captions[5]  # the same pair again
    table = pa.table({"image": images, "caption": captions})
    drawn = match.draw(ImageTextPairs(table, name="tiny"), 100, 0)
    assert len(drawn.images) == len({*images[:4], *images[5:]})
    assert drawn.captions == tuple(dict.fromkeys(filter(None, captions)))
    assert (len(drawn.image_of_pair), drawn.skipped) == (58, 1)
    assert drawn.image_of_pair[0] == drawn.image_of_pair[1]
    assert drawn.text_of_pair[2] == drawn.text_of_pair[3]
    fewer = match.draw(ImageTextPairs(table, name="tiny"), 20, 1)
    assert len(fewer.image_of_pair) in (19, 20)
