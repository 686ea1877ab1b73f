"""The map, prototypes, agreement, neighbours and names, against what they mean."""

from dataclasses import replace
from itertools import groupby, islice, permutations
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protoclip.explore import atlas as atlases
from protoclip.explore.atlas import (
    Features,
    find_movements,
    find_repeats,
    find_similar_rows,
    group_map,
    make_atlas,
    name_groups,
)
from protoclip.explore.explorer import Neighbours
from protoclip.explore.pairs import ExploredPairs

CLUSTERS, EACH, WIDTH = 4, 15, 16


def clustered(seed: int = 0, *, swapped: tuple[int, ...] = ()) -> Features:
    """Pairs in four tight groups of both modalities; swapped pairs have the text of another."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(CLUSTERS, WIDTH, generator=generator), dim=1)
    groups = torch.arange(CLUSTERS).repeat(EACH)
    noise = torch.randn(2, len(groups), WIDTH, generator=generator) / 40
    texts = groups.clone()
    for row in swapped:
        texts[row] = (groups[row] + 1) % CLUSTERS
    return Features(
        captioned=torch.arange(len(groups)),
        rows=torch.arange(len(groups)),
        image=3 * (centres[groups] + noise[0]),
        text=centres[texts] + noise[1],
    )


def gap_apart() -> Features:
    """The same pairs with images and texts in two clouds far from each other."""
    found, away = clustered(), 5 * torch.eye(WIDTH)[0]
    return replace(found, image=found.image / 3 + away, text=found.text - away)


def partners_nearer(atlas: atlases.Atlas) -> float:
    """The share of texts that lie nearer to an image than its own, on average; 0.5 by chance."""
    image, text = (atlas.map_position[modality] for modality in atlases.MODALITIES)
    apart = np.linalg.norm(image[:, None] - text[None], axis=2)
    return float((apart < np.diag(apart)[:, None]).mean())


@pytest.fixture(scope="module")
def atlas() -> atlases.Atlas:
    return make_atlas(clustered(swapped=(5, 30)), number=CLUSTERS)


def test_prototypes_are_the_groups_and_agree(atlas: atlases.Atlas) -> None:
    groups = np.arange(CLUSTERS * EACH) % CLUSTERS
    for modality in atlases.MODALITIES:
        found = atlas.list_prototypes(modality)
        assert sum(one.size for one in found) == CLUSTERS * EACH
        assert all(one.tightness > 0.95 for one in found)
        assert sum(round(one.agreement * one.size) for one in found) == CLUSTERS * EACH - 2
    for number in range(CLUSTERS):
        inside = groups[atlas.prototype["image"] == number]
        assert len(set(inside)) == 1


def test_swapped_captions_are_the_odd_ones(atlas: atlases.Atlas) -> None:
    for measure in (atlas.distance, atlas.loss):
        assert set(np.argsort(-measure)[:2]) == {5, 30}


def test_distance_and_loss_by_their_definition(atlas: atlases.Atlas) -> None:
    found = clustered(swapped=(5, 30))
    image, text = F.normalize(found.image.double(), dim=1), F.normalize(found.text.double(), dim=1)
    logits = image @ text.T / 0.07
    own = torch.arange(len(image))
    loss = (
        F.cross_entropy(logits, own, reduction="none")
        + F.cross_entropy(logits.T, own, reduction="none")
    ) / 2
    assert np.allclose(atlas.loss, loss.numpy(), atol=1e-4)
    assert np.allclose(atlas.distance, 1 - (image * text).sum(1).numpy(), atol=1e-5)
    assert atlas.chance == pytest.approx(np.log(len(atlas)))


def test_what_a_model_has_learned_wrongly_is_odd_to_heads_that_have_not_seen_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has learned every pair by heart. A third of the images has two captions."""
    draws = torch.Generator().manual_seed(0)
    shown = torch.randn(180, 6, generator=draws)
    image = shown @ torch.randn(6, 24, generator=draws) + torch.randn(180, 24, generator=draws) / 4
    rows, of_pair = torch.arange(240), torch.arange(180).repeat(2)[:240]
    text = shown[of_pair]
    wrong = rows[2::16]  # also copies of images
    text[wrong] = text[wrong.roll(1)]
    text = text @ torch.randn(6, 12, generator=draws)
    learned = torch.randn(240, WIDTH, generator=draws)
    model = Features(captioned=rows, rows=rows, image=learned, text=learned)
    of_encoders = replace(model, image=image[of_pair].half(), text=text.half())
    pairs = Mock(spec=ExploredPairs, number_images=lambda *_: of_pair.numpy())
    pairs.correlate_images.return_value = 0.0
    given = {"number": CLUSTERS, "encoder_features": of_encoders, "aligned": True}
    atlas = make_atlas(model, pairs, **given)
    assert atlas.unseen
    assert "agreement of pairs: 100%" in capsys.readouterr().err
    for measure in (atlas.distance, atlas.loss):
        assert {*np.argsort(-measure)[: len(wrong)]} == {*wrong.tolist()}
    monkeypatch.setattr(atlases, "LEAST_IMAGES", 181)
    own = make_atlas(model, pairs, **given)
    assert not own.unseen
    assert own.distance.max() < 1e-6


def test_partners_are_near_on_the_map_whatever_lies_between_the_modalities() -> None:
    found = gap_apart()
    assert F.cosine_similarity(found.image, found.text).max() < -0.8
    assert partners_nearer(make_atlas(found, number=CLUSTERS)) < 0.3


@pytest.mark.slow
def test_umap_places_groups_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is fitted to all pairs, or to some, with the others placed among these."""
    numba = pytest.importorskip("numba")
    # Compiling takes half a minute, and so few pairs and epochs need none.
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    pytest.importorskip("umap")
    monkeypatch.setattr(atlases, "EPOCHS", 30)
    groups = np.arange(CLUSTERS * EACH) % CLUSTERS
    for most in (atlases.FITTED_PAIRS, 40):
        monkeypatch.setattr(atlases, "FITTED_PAIRS", most)
        atlas = make_atlas(gap_apart(), number=CLUSTERS, layout="umap")
        assert partners_nearer(atlas) < 0.3  # those of the same group are as near
        position = atlas.map_position["image"]
        assert position.shape == (CLUSTERS * EACH, 2)
        means = np.stack([position[groups == group].mean(0) for group in range(CLUSTERS)])
        nearest = np.linalg.norm(position[:, None] - means, axis=2).argmin(1)
        assert (nearest == groups).mean() > 0.9


def test_heads_are_clustered_and_dead_prototypes_counted() -> None:
    weight = torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(0))
    heads = dict.fromkeys(atlases.MODALITIES, lambda rows: rows @ weight)
    found = clustered()
    own = F.normalize(
        torch.cat([found.image[:CLUSTERS] @ weight, -found.image[:1] @ weight]), dim=1
    )
    atlas = make_atlas(found, heads=heads, number=CLUSTERS, run_prototypes={"image": own})
    assert atlas.space == "projections"
    assert atlas.run_prototypes == {"image": [5, 1]}


def test_moved_pairs_are_those_of_other_groups() -> None:
    """Another numbering of the groups moves nothing; swapped captions move."""
    first = make_atlas(clustered(), number=CLUSTERS)
    second = make_atlas(clustered(swapped=(5, 30)), number=CLUSTERS, seed=7)
    assert len(find_movements(first, second, "image").pairs) == 0
    found = find_movements(first, second, "text")
    assert sorted(found.pairs[:, 0].tolist()) == [5, 30]
    assert found.common == CLUSTERS * EACH


def test_the_largest_movements_come_first(atlas: atlases.Atlas) -> None:
    """Pairs of one movement follow each other."""
    before, after = np.random.default_rng(0).integers(0, CLUSTERS, (2, len(atlas)), dtype=np.int32)
    found = find_movements(
        replace(atlas, prototype={"text": before}),
        replace(atlas, prototype={"text": after}),
        "text",
    )
    assert np.array_equal(found.groups[:, 0], before[found.pairs[:, 0]])
    assert np.array_equal(found.groups[:, 1], after[found.pairs[:, 1]])
    flows = [[len(list(same)), *way] for way, same in groupby(found.groups.tolist())]
    assert found.flows.tolist() == flows
    counts = [count for count, *_ in flows]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def exact(rows: torch.Tensor, queries: torch.Tensor, number: int) -> torch.Tensor:
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(rows.double(), dim=1).T
    return similarity.topk(number, dim=1).indices


@pytest.mark.parametrize("chunk", [20, 10**6])
def test_search_is_exact_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protoclip.explore.explorer.ROWS", chunk)
    generator = torch.Generator().manual_seed(0)
    rows, query = torch.randn(97, 8, generator=generator), torch.randn(8, generator=generator)
    found = Neighbours(rows, np.arange(97) + 3).search(query, 7)
    positions, cosines = zip(*found, strict=True)
    assert [position - 3 for position in positions] == exact(rows, query[None], 7)[0].tolist()
    assert list(cosines) == sorted(cosines, reverse=True)
    assert len(Neighbours(rows, np.arange(97)).search(query, 500)) == 97
    assert [position for position, _ in Neighbours(rows[:1], np.array([3])).search(query, 2)] == [3]


def test_near_duplicates_are_pairs_of_the_most_similar() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 16, generator=generator)
    rows[40] = 2 * rows[3]
    rows[41] = rows[5] + 0.01 * torch.randn(16, generator=generator)
    pairs, values = find_similar_rows(rows, batch=7)
    assert pairs.tolist() == [[3, 40], [5, 41]]
    assert values[0] >= values[1] > 0.99
    same = torch.ones(5, 4)
    pairs, _ = find_similar_rows(same)
    assert len(pairs) >= 3
    assert (pairs[:, 0] < pairs[:, 1]).all()


def test_of_a_chain_of_near_duplicates_the_first_is_left() -> None:
    """However the pairs are ordered, and whichever of the chain the others are nearest to."""
    chains = [(0, 4), (2, 4), (4, 9), (3, 5), (5, 7), (6, 7), (8, 11)]
    for order in islice(permutations(chains), 0, None, 61):
        again = find_repeats(order)
        assert again == {2, 4, 9, 5, 7, 6, 11}


def test_an_image_of_several_pairs_is_no_near_duplicate_of_itself() -> None:
    """But of its copy in another file."""
    found = clustered()
    image = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    shown = np.tile(np.arange(20), 3)
    shown[23] = 23  # the copy of an image in another file
    pairs = Mock(spec=ExploredPairs, number_images=lambda *_: shown)
    pairs.correlate_images.return_value = 1.0
    atlas = make_atlas(replace(found, image=image), pairs)
    assert atlas.duplicates.tolist() == [[3, 23]]
    assert atlas.compared == 21


# Names

CAPTIONS = ["a small icon of a red heart", "a small icon of a moon", "a small icon of a pale moon"]


def test_names_are_the_words_that_set_a_group_apart() -> None:
    """Not those that all have, and the plural is no second word."""
    captions = [*CAPTIONS, "a small icon of red hearts, or of a heart"] * 5
    found = name_groups(captions, np.array([0, 1, 1, 0] * 5), 2)
    heart, moon = (name.split(", ") for name in found)
    assert {"red", "heart"} <= set(heart)
    assert moon[0] == "moon"
    assert not {"hearts", "of", "or"} & {*heart, *moon}


def test_words_of_one_caption_name_no_group_that_shares_words() -> None:
    """They are rare, so they would come before those that the captions share."""
    captions = ["adhd dog", "blanket dog", "zebra dog", "tree", "leaf tree", "oak"]
    found = name_groups(captions, np.repeat([0, 1], 3), 2)
    assert found == ["dog", "tree"]
    assert name_groups(["a red fox", "blue"], np.array([0, 1]), 2) == ["fox, red", "blue"]


def test_names_apart_repeat_a_word_of_a_larger_group_only_where_most_captions_have_it() -> None:
    """Or where there is no other."""
    captions = ["tree"] * 57 + ["red tree"] * 3 + ["animal", "cat"] * 4 + ["big animal"] * 9
    captions += ["animal", "", ""] * 2 + ["red animal"] * 3
    groups = np.repeat([0, 1, 2, 3, 4], [60, 8, 9, 6, 3])
    found = ["tree", "cat, animal", "big, animal", "animal", "red, animal"]
    assert name_groups(captions, groups, 5) == found
    assert name_groups(captions, groups, 5, distinct=True) == ["tree", "cat", *found[2:]]


def test_groups_of_the_map_are_where_their_points_are_the_coarse_and_large_first() -> None:
    draw = np.random.default_rng(0)
    kinds = draw.choice(3, 300, p=[0.5, 0.3, 0.2])
    corners = np.array([[0, 0], [50, 0], [0, 50]])
    positions = corners[kinds][:, None] + draw.normal(size=(300, 2, 2))
    groups, coarse = group_map(positions, [CAPTIONS[kind] for kind in kinds], np.zeros(300))
    assert [group.level for group in groups] == sorted(group.level for group in groups)
    for level in {group.level for group in groups}:
        sizes = [group.size for group in groups if group.level == level]
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) == 300
    for group in groups:
        kind = np.linalg.norm(corners - (group.x, group.y), axis=1).argmin()
        assert np.linalg.norm(corners[kind] - (group.x, group.y)) < 4
        assert kinds[group.example] == kind
        assert ("heart" in group.coarse) == (kind == 0)
        assert group.level or group.coarse == group.name
    assert len(coarse) == 300
    assert all("heart" in name for name, kind in zip(coarse, kinds, strict=True) if kind == 0)


def test_words_keep_their_marks() -> None:
    """Hindi writes vowels as marks; `re` alone would tear its words apart."""
    found = name_groups(["कुत्ता घास", "बिल्ली घर"] * 3, np.array([0, 1] * 3), 2)
    assert set(found[0].split(", ")) == {"कुत्ता", "घास"}
