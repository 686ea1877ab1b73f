"""What examples show: retrieval, confusions and maps of made-up features."""

import pytest
import torch
import torch.nn.functional as F

from protoclip.results.looks import count_confusions, make_map, retrieve


def clumps(sizes, *, spread=0.0, seed=0):
    """Unit-norm rows around one direction each: the first clump has `sizes[0]` rows, and so on."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = torch.eye(8)[which] + spread * torch.randn(len(which), 8, generator=generator)
    return F.normalize(rows, dim=1), which


def test_retrieval_examples_are_right_or_wrong_by_group():
    """Rows 0 and 1 are one group, and each other's right answers; row 3's text is misplaced."""
    images = torch.eye(8)[:5]
    texts = images[[1, 0, 2, 4, 3]]
    found = retrieve(
        images, texts, captions=["a", "b", "c", "d", "e"], concepts=[0, 0, 1, 2, 3], seed=0
    )
    to_text, share = found["image to text"]
    assert share == pytest.approx(0.6)
    assert sorted(shown.row for shown in to_text[:3]) == [0, 1, 2]
    assert sorted(shown.row for shown in to_text[3:]) == [3, 4]
    by_row = {shown.row: shown for shown in to_text}
    assert by_row[0].answers[0] == ("b", True)
    assert by_row[3].answers[0] == ("e", False)
    assert by_row[3].rank == 5  # equal similarities count against the model
    to_image = {shown.caption: shown for shown in found["text to image"][0][:3]}
    assert sorted(to_image) == ["a", "b", "c"]
    assert to_image["a"].answers[0] == (1, True)


def test_an_image_of_several_rows_is_one_query_and_one_answer():
    """As `evaluate` counts: each of its captions is right."""
    images, texts = torch.eye(8)[[0, 0, 1, 1, 3]], torch.eye(8)[[0, 0, 1, 2, 3]]
    found = retrieve(images, texts, captions=[*"abcde"], content=[*"ppqqr"], seed=0)
    shares = {way: share for way, (_, share) in found.items()}
    assert shares == {"image to text": 1.0, "text to image": pytest.approx(0.8)}
    queries = [shown.row for shown in found["image to text"][0]]
    assert sorted(queries) == [0, 2, 4]
    wrong = found["text to image"][0][-1]
    assert (wrong.caption, len(wrong.answers)) == ("d", 3)


def test_confusions_are_the_most_frequent_ones_with_the_shares_of_their_classes():
    classes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    taken_for = torch.tensor([0, 1, 1, 1, 1, 1, 1, 3, 2, 2])
    found = count_confusions(classes, taken_for, ["a", "b", "c", "d"])
    assert found["pairs"] == [("a", "b", 3, 4), ("b", "d", 1, 4)]
    assert found["rows"] == [
        ("a", 4, [0.25, 0.75, 0, 0]),
        ("b", 4, [0, 0.75, 0.25, 0]),
        ("d", 0, [0, 0, 0, 0]),
    ]
    assert found["accuracy"] == pytest.approx(0.6)
    assert count_confusions(classes, classes, ["a", "b", "c", "d"])["pairs"] == []


def test_the_map_shows_images_on_the_left_and_the_gap():
    images, _ = clumps([20], spread=0.02)
    texts = F.normalize(images.roll(3, dims=1), dim=1)
    for features in ({"images": images, "texts": texts}, {"images": texts, "texts": images}):
        found = make_map(features, rows=torch.arange(20), title="")
        assert (found.images[:, 0] < 0).all()
        assert (found.texts[:, 0] > 0).all()
        assert found.gap == pytest.approx(2**0.5, abs=0.02)
        assert found.explained > 0.9
