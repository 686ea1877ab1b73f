"""Zero-shot classification and retrieval."""

import math

import pytest
import torch
import torch.nn.functional as F

from protoclip.evaluation.retrieval import best_relevant_rank, retrieval_recall
from protoclip.evaluation.zero_shot import class_features, zero_shot_accuracy


def unit_rows(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


def slow_recall(queries, candidates, query_groups, candidate_groups, k):
    """Sort candidates with irrelevant ones first among equals; look for a hit in the first k."""
    hits = 0
    for query, group in zip(queries.tolist(), query_groups.tolist(), strict=True):
        scored = []
        for candidate, other in zip(candidates.tolist(), candidate_groups.tolist(), strict=True):
            score = sum(a * b for a, b in zip(query, candidate, strict=True))
            scored.append((-score, other == group))
        hits += any(relevant for _, relevant in sorted(scored)[:k])
    return hits / len(queries)


def test_retrieval_matches_a_table_worked_by_hand():
    """Three images, three texts: ranks read off the similarity matrix give the recalls."""
    # Similarities are the image rows, texts being the axes. Image 0 ranks text 0 first; image 1
    # ranks text 1 second; image 2 ranks text 2 third.
    images = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.5, 0.1], [0.7, 0.6, 0.2]])
    groups = torch.arange(3)
    recall = retrieval_recall(images, torch.eye(3), groups, groups, ks=(1, 2, 3))
    assert recall["image_to_text@1"] == pytest.approx(1 / 3)
    assert recall["image_to_text@2"] == pytest.approx(2 / 3)
    assert recall["image_to_text@3"] == 1.0
    # Columns: text 0 ranks image 0 first; text 1 ranks image 1 second; text 2 image 2 first.
    assert recall["text_to_image@1"] == pytest.approx(2 / 3)
    assert recall["text_to_image@2"] == 1.0


@pytest.mark.parametrize("chunk_elements", [1, 70, 4_000_000])
def test_retrieval_equals_a_slow_restatement(chunk_elements):
    """Several images a text and texts an image, in any chunking, agree with sorting in a loop."""
    images, texts = unit_rows(40, 5, 0), unit_rows(23, 5, 1)
    image_groups = torch.randint(7, (40,), generator=torch.Generator().manual_seed(2))
    image_groups[:7] = torch.arange(7)
    text_groups = torch.arange(23) % 7
    recall = retrieval_recall(
        images, texts, image_groups, text_groups, (1, 3, 10), chunk_elements=chunk_elements
    )
    for k in (1, 3, 10):
        assert recall[f"image_to_text@{k}"] == slow_recall(
            images, texts, image_groups, text_groups, k
        )
        assert recall[f"text_to_image@{k}"] == slow_recall(
            texts, images, text_groups, image_groups, k
        )
    assert 0 < recall["image_to_text@1"] < recall["image_to_text@3"] < 1


def test_one_of_several_relevant_captions_is_enough():
    """A query is recalled by its best relevant candidate, however bad the others are."""
    image, texts = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    ranks = best_relevant_rank(image, texts, torch.tensor([4]), torch.tensor([4, 9, 4]))
    assert ranks.tolist() == [0]


def test_ties_count_against_the_query():
    """Constant features are recalled only where k exceeds the number of irrelevant candidates."""
    features, groups = torch.ones(8, 4) / 2, torch.arange(8)
    recall = retrieval_recall(features, features, groups, groups, ks=(1, 7, 8))
    assert recall["image_to_text@1"] == recall["text_to_image@7"] == 0.0
    assert recall["image_to_text@8"] == 1.0
    accuracy = zero_shot_accuracy(features, features, groups, ks=(1, 7, 8))
    assert accuracy == {"acc1": 0.0, "acc7": 0.0, "acc8": 1.0}


def test_scores_that_are_not_numbers_count_against_the_query():
    """A diverged model does not score: NaN, on either side, ranks last."""
    groups = torch.arange(6)
    broken = unit_rows(6, 3, 0).float()
    assert zero_shot_accuracy(broken, broken, groups)["acc1"] == 1.0
    assert zero_shot_accuracy(broken * math.nan, broken, groups)["acc5"] == 0.0
    broken[0] = math.nan
    assert zero_shot_accuracy(unit_rows(6, 3, 0).float(), broken, groups)["acc1"] == 0.0


def test_a_query_without_a_relevant_candidate_is_refused():
    """No silent exclusion: the number of such queries is named."""
    images, texts = unit_rows(3, 4, 0), unit_rows(2, 4, 1)
    with pytest.raises(ValueError, match="1 of 3 queries"):
        retrieval_recall(images, texts, torch.tensor([0, 1, 2]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="1 of 3 queries"):
        zero_shot_accuracy(images, texts, torch.tensor([0, 1, 2]))


def test_one_pair_and_large_k():
    """With one candidate, or k above their number, every query is recalled."""
    one, group = unit_rows(1, 4, 0), torch.tensor([3])
    assert set(retrieval_recall(one, one, group, group).values()) == {1.0}
    images, groups = unit_rows(4, 4, 1), torch.arange(4)
    assert retrieval_recall(images, -images, groups, groups, ks=(9,))["image_to_text@9"] == 1.0


def test_empty_input_and_k_below_one_are_refused():
    """There is no recall of nothing."""
    rows, groups = unit_rows(2, 4, 0), torch.arange(2)
    with pytest.raises(ValueError, match="retrieval needs"):
        retrieval_recall(rows, rows, groups, groups, ks=(0,))
    with pytest.raises(ValueError, match="zero-shot classification needs"):
        zero_shot_accuracy(rows[:0], rows, groups[:0])
    with pytest.raises(ValueError, match="zero-shot classification needs"):
        zero_shot_accuracy(rows, rows, groups, ks=(0,))


def test_random_features_retrieve_at_chance():
    """Independent features recall at k/n, within four standard deviations of the binomial."""
    count = 2000
    groups = torch.arange(count)
    recall = retrieval_recall(unit_rows(count, 16, 0), unit_rows(count, 16, 1), groups, groups)
    for k in (1, 5, 10):
        chance = k / count
        bound = 4 * math.sqrt(chance * (1 - chance) / count)
        assert abs(recall[f"image_to_text@{k}"] - chance) <= bound
    assert recall["image_to_text@10"] > 0


@pytest.mark.parametrize("chunk_elements", [1, 50, 4_000_000])
def test_zero_shot_equals_a_slow_restatement(chunk_elements):
    """Counting the classes at or above the true one, in a loop, gives the same accuracies."""
    images, classes = unit_rows(60, 4, 0), unit_rows(9, 4, 1)
    labels = torch.randint(9, (60,), generator=torch.Generator().manual_seed(2))
    accuracy = zero_shot_accuracy(images, classes, labels, chunk_elements=chunk_elements)
    for k in (1, 5):
        assert accuracy[f"acc{k}"] == slow_recall(images, classes, labels, torch.arange(9), k)
    assert 0 < accuracy["acc1"] < accuracy["acc5"] < 1


def test_class_features_average_prompts_then_renormalise():
    """Two prompts at right angles give the bisector; one prompt gives itself."""
    table = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8]}
    seen = []

    def encode(texts):
        seen.extend(texts)
        return torch.tensor([table[text] for text in texts])

    features = class_features(encode, [["a", "b"], ["c"]])
    assert torch.allclose(features, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))
    assert seen == ["a", "b", "c"]
    with pytest.raises(ValueError, match="a prompt for every class"):
        class_features(encode, [["a"], []])


def test_random_class_features_classify_at_chance():
    """Features that say nothing are right one time in the number of classes."""
    count, num_classes = 4000, 50
    labels = torch.arange(count) % num_classes
    accuracy = zero_shot_accuracy(unit_rows(count, 64, 0), unit_rows(num_classes, 64, 1), labels)
    for k in (1, 5):
        chance = k / num_classes
        assert abs(accuracy[f"acc{k}"] - chance) < 4 * math.sqrt(chance * (1 - chance) / count)
