"""Names of groups, on captions whose words are known."""

import numpy as np
import pytest

from protoclip.explore.names import group_map, name_groups

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
    assert [each.level for each in groups] == sorted(each.level for each in groups)
    for level in {each.level for each in groups}:
        sizes = [each.size for each in groups if each.level == level]
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) == 300
    for each in groups:
        kind = np.linalg.norm(corners - (each.x, each.y), axis=1).argmin()
        assert np.linalg.norm(corners[kind] - (each.x, each.y)) < 4
        assert kinds[each.example] == kind
        assert ("heart" in each.coarse) == (kind == 0)
        assert each.level or each.coarse == each.name
    assert len(coarse) == 300
    assert all("heart" in name for name, kind in zip(coarse, kinds, strict=True) if kind == 0)


def test_a_group_is_shown_by_a_pair_near_its_middle_that_fits_its_caption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by one without the word, or one far from the middle, however well they fit."""
    positions = np.repeat(np.linspace(0, 1, 12)[:, None, None], 2, axis=1).repeat(2, axis=2)
    captions = ["a moon"] * 12
    captions[5] = "a heart"
    distance = np.linspace(0.2, 0.9, 12)
    distance[[0, 5, 7]] = 0.0, 0.0, 0.1
    monkeypatch.setattr("protoclip.explore.names.PAIRS_PER_GROUP", 12)
    (group,), _ = group_map(positions, captions, distance)
    assert (group.name, group.example) == ("moon", 7)


def test_pairs_in_one_place_are_one_group() -> None:
    groups, coarse = group_map(np.zeros((40, 2, 2)), ["a moon"] * 40, np.zeros(40))
    assert [each.size for each in groups] == [40]
    assert coarse == ["moon"] * 40


def test_copies_that_differ_in_rounding_are_no_groups() -> None:
    """K-means counts in fewer digits than they differ in, so some of its groups are empty."""
    draw = np.random.default_rng(0)
    positions = np.repeat(draw.normal(size=(30, 2, 2)), 20, axis=0).astype(np.float32)
    moved = np.nextafter(positions, np.float32(9))
    apart = np.where(draw.random(positions.shape) < 0.3, moved, positions)
    groups, _ = group_map(apart, ["a moon", "a heart"] * 300, np.zeros(600))
    assert groups
    assert all(each.size for each in groups)


def test_words_keep_their_marks() -> None:
    """Hindi writes vowels as marks; `re` alone would tear its words apart."""
    found = name_groups(["कुत्ता घास", "बिल्ली घर"] * 3, np.array([0, 1] * 3), 2)
    assert set(found[0].split(", ")) == {"कुत्ता", "घास"}
