"""The suite end to end on a tiny data set, and chance levels."""

import io
import math
from collections import Counter

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation import suite
from protoclip.evaluation.clustering import agreement
from protoclip.evaluation.datasets import EvaluationData, emoji
from protoclip.evaluation.retrieval import retrieval_recall
from protoclip.evaluation.samples import IMAGE_COLUMNS, TEXT_COLUMNS
from protoclip.evaluation.suite import chance_levels, evaluate
from protoclip.evaluation.zero_shot import zero_shot_accuracy

KEYS = {
    *(f"zero_shot{of}/acc{k}" for of in ("", "_subgroup") for k in (1, 5)),
    *(f"retrieval/{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    *("linear_probe/acc1", "knn/acc1", "clustering/ami", "clustering/ari"),
    *("modality_gap/gap", "modality_gap/alignment"),
    *("modality_gap/uniformity_image", "modality_gap/uniformity_text"),
}
CLASSES = ("sea-animal", "hand", "red-fruit", "sign")
CONCEPTS = {"train": range(24), "validation": range(24, 32), "test": range(32, 48)}
STYLES = 3


def picture(concept, style):
    """Solid colour: red tells the concept, green the style."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (concept, style, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(split):
    """Three styles a concept, the last two with one caption between them."""
    rows = [
        {
            "image": picture(concept, style),
            "caption": f"name {concept}" + (" plain" if style == 0 else " rich"),
            "label": f"name {concept}",
            "concept": f"c{concept}",
            "subgroup": CLASSES[concept % 4],
        }
        for concept in CONCEPTS[split]
        for style in range(STYLES)
    ]
    return ImageTextPairs(pa.Table.from_pylist(rows), name=f"tiny/{split}")


@pytest.fixture(scope="module")
def tiny():
    return EvaluationData(name="tiny", **{split: pairs(split) for split in CONCEPTS})


def image_transform(image):
    channels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return channels.view(4, 4, 3).permute(2, 0, 1).float()


def tokenizer(texts):
    """[concept, class]: what a name, a caption or a class name speaks of; -1 for nothing."""
    tokens = []
    for text in texts:
        if text.startswith("name "):
            concept = int(text.split()[1])
            tokens.append([concept, concept % 4])
        else:
            tokens.append([-1, [name.replace("-", " ") for name in CLASSES].index(text)])
    return torch.tensor(tokens)


class Oracle(nn.Module):
    """Features that say which concept and class, and nothing else; noise while in training."""

    def __init__(self):
        super().__init__()
        self.image_tower = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(48))
        self.batch_sizes = []

    def known(self, concept, of_class):
        assert not self.training
        assert not self.image_tower[0].training
        assert torch.is_inference_mode_enabled()
        self.batch_sizes.append(len(concept))
        table = torch.cat([torch.eye(48), torch.zeros(1, 48)])
        return torch.cat([table[concept], torch.eye(4)[of_class]], dim=1)

    def encode_image(self, images, normalize=True):
        concept = images[:, 0, 0, 0].long()
        return F.normalize(self.known(concept, concept % 4), dim=1)

    def encode_text(self, tokens, normalize=True):
        return F.normalize(self.known(tokens[:, 0], tokens[:, 1]), dim=1)


class Guesser(nn.Module):
    """Random features, fixed by what is seen."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(2, 100, 50, 8, generator=generator)

    def encode_image(self, images, normalize=True):
        return F.normalize(self.table[0, images[:, 0, 0, 0].long(), images[:, 1, 0, 0].long()])

    def encode_text(self, tokens, normalize=True):
        return F.normalize(self.table[1, tokens[:, 0], tokens[:, 1]])


def run(model, data, **settings):
    return evaluate(model, image_transform, tokenizer, data, device="cpu", **settings)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_model_that_knows_everything(tiny, split):
    """The oracle gets full marks under exactly the promised keys, as plain floats."""
    metrics = run(Oracle(), tiny, split=split, batch_size=10)
    assert set(metrics) == {f"eval/tiny/{key}" for key in KEYS}
    assert list(metrics) == suite.metric_names("tiny")
    assert {type(value) for value in metrics.values()} == {float}
    for key in KEYS - {key for key in KEYS if key.startswith(("modality_gap", "clustering"))}:
        assert metrics[f"eval/tiny/{key}"] == 1.0, key
    # Captions say what pictures say, so the modalities coincide.
    assert metrics["eval/tiny/modality_gap/gap"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval/tiny/modality_gap/alignment"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval/tiny/modality_gap/uniformity_image"] < 0


def test_samples_are_returned_beside_the_metrics(tiny):
    """Every metric that is a mean over samples is the mean of theirs, and nothing is missing."""
    metrics, samples = suite.evaluate_samples(
        Guesser(), image_transform, tokenizer, tiny, device="cpu"
    )
    assert metrics == run(Guesser(), tiny)
    assert samples.image_ids == list(tiny.test.sample_ids())
    assert len(set(samples.text_ids)) == 32
    assert samples.text_ids[0] == "c32: name 32 plain"
    assert samples.columns.keys() == {*IMAGE_COLUMNS, *TEXT_COLUMNS}
    means = KEYS - {key for key in KEYS if key.startswith(("clustering", "modality_gap"))}
    for key in means:
        _, values = samples.values(key)
        assert values.mean() == metrics[f"eval/tiny/{key}"], key
    found = agreement(samples.columns["class"], samples.columns["cluster"])
    assert found == {name: metrics[f"eval/tiny/clustering/{name}"] for name in ("ami", "ari")}


def test_equal_runs_give_equal_numbers(tiny):
    """Twice, with another global seed and other batches, nothing moves; the model's luck does."""
    torch.manual_seed(0)
    first = run(Guesser(), tiny, batch_size=7)
    torch.manual_seed(1)
    assert run(Guesser(), tiny, batch_size=64) == first
    assert run(Oracle(), tiny) != first


def test_every_module_gets_its_mode_back(tiny):
    """A locked tower in a training model stays in evaluation mode, also after an error."""
    model = Oracle().train()
    model.image_tower[1].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    run(model, tiny, batch_size=50)
    assert [module.training for module in model.modules()] == modes
    assert max(model.batch_sizes) == 50
    model.known = lambda concept, of_class: torch.full((len(concept), 52), math.nan)
    with pytest.raises(ValueError, match="not finite"):
        run(model, tiny)
    assert [module.training for module in model.modules()] == modes


def test_features_that_are_not_finite_are_refused(tiny):
    """A diverged model is an error of one line that names the stage, not a score."""
    model = Guesser()
    model.table[0, 40, 1, 3] = math.nan  # one picture of the test split
    with pytest.raises(ValueError, match=r"tiny images: test: .* not finite") as error:
        run(model, tiny)
    assert "\n" not in str(error.value)


def test_retrieval_is_among_distinct_captions(tiny):
    """Two styles share a caption: it is one candidate, and chance follows from the counts."""
    captions, groups, of_row = suite.distinct_captions(tiny.test, "concept")
    assert captions[:3] == ["name 32 plain", "name 32 rich", "name 33 plain"]
    assert groups[:3] == ["c32", "c32", "c33"]
    assert of_row[:6] == [0, 1, 1, 2, 3, 3]
    assert len(captions) == 32


def test_equal_captions_of_two_concepts_are_two_candidates():
    """They are relevant to different pictures, so neither may stand for the other."""
    rows = [{"image": b"", "caption": "a", "concept": concept} for concept in ("x", "y", "x")]
    table = ImageTextPairs(pa.Table.from_pylist(rows), name="two")
    assert suite.distinct_captions(table, "concept") == (["a", "a"], ["x", "y"], [0, 1, 0])


def test_concepts_of_equal_name_are_one_class(tiny):
    """Merged, the oracle's twin names cost nothing; two equal classes would tie and score 0."""
    table = tiny.test.table
    same = pa.array(["name 32"] * (2 * STYLES) + table["label"].to_pylist()[2 * STYLES :])
    renamed = table.set_column(table.column_names.index("label"), "label", same)
    data = EvaluationData(
        name="twins",
        train=tiny.train,
        validation=tiny.validation,
        test=ImageTextPairs(renamed, name="twins/test"),
    )
    assert chance_levels(data)["eval/twins/zero_shot/acc1"] == pytest.approx(1 / 15)
    # Concept 33 shares the name of 32, and the name speaks of 32 and of another class.
    assert run(Oracle(), data)["eval/twins/zero_shot/acc1"] == pytest.approx(15 / 16)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_probe_never_chooses_on_test(tiny, split, monkeypatch):
    """What chooses the strength is validation in either case; what is measured is the split."""
    given = []

    class Probe:
        def predict(self, features):
            given.append(features)
            return torch.zeros(len(features), dtype=torch.int64)

    def record(*args):
        given.extend(args)
        return Probe()

    monkeypatch.setattr(suite, "best_linear_probe", record)
    metrics = run(Oracle(), tiny, split=split)
    assert metrics["eval/tiny/linear_probe/acc1"] == 0.25
    sizes = {part: STYLES * len(concepts) for part, concepts in CONCEPTS.items()}
    assert [len(rows) for rows in given] == [
        *([sizes["train"]] * 2),
        *([sizes["validation"]] * 2),
        sizes[split],
    ]


def test_progress_counts_every_stage_to_its_end(tiny):
    """Each stage's count rises to its total."""
    calls = []
    run(Oracle(), tiny, batch_size=20, progress=lambda *call: calls.append(call))
    images = [call[1:] for call in calls if call[0] == "tiny images: train"]
    assert images == [(20, 72), (40, 72), (60, 72), (72, 72)]
    assert ("tiny texts", 32, 32) in calls  # the test split's distinct captions
    metrics = [call for call in calls if call[0].startswith("tiny metrics")]
    assert [done for _, done, _ in metrics] == list(range(1, 8))
    assert {total for _, _, total in metrics} == {7}


def test_settings_out_of_range_are_refused(tiny):
    """The training split is nothing to be measured on, and a batch holds something."""
    with pytest.raises(ValueError, match="split='train'"):
        run(Oracle(), tiny, split="train")
    with pytest.raises(ValueError, match="batch_size=0"):
        run(Oracle(), tiny, batch_size=0)
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        tiny.split("tset")


def test_data_without_a_column_or_a_value_is_refused(tiny):
    """Both faults are found when the data set is put together."""
    splits = {split: tiny.split(split) for split in CONCEPTS}
    with pytest.raises(ValueError, match="tiny/train: no column 'kind'"):
        EvaluationData(name="bad", class_column="kind", **splits)
    table = tiny.test.table
    holes = pa.array([None] * 2 + table["label"].to_pylist()[2:])
    table = table.set_column(table.column_names.index("label"), "label", holes)
    splits["test"] = ImageTextPairs(table, name="bad/test")
    with pytest.raises(ValueError, match="bad/test: column 'label' is empty for 2 samples"):
        EvaluationData(name="bad", **splits)


def test_chance_levels_of_a_table_worked_by_hand(tiny):
    """16 names, 4 classes, and 2 captions of 32 or 3 pictures of 48 relevant to a query."""
    levels = chance_levels(tiny, "test")
    metrics = {f"eval/tiny/{key}" for key in KEYS if not key.startswith("modality_gap")}
    assert set(levels) == metrics
    assert levels["eval/tiny/zero_shot/acc1"] == 1 / 16
    assert levels["eval/tiny/zero_shot/acc5"] == 5 / 16
    assert levels["eval/tiny/zero_shot_subgroup/acc1"] == 1 / 4
    assert levels["eval/tiny/zero_shot_subgroup/acc5"] == 1.0
    assert levels["eval/tiny/retrieval/image_to_text@1"] == pytest.approx(2 / 32)
    assert levels["eval/tiny/retrieval/text_to_image@1"] == pytest.approx(3 / 48)
    # No hit in 5 draws without replacement, factor by factor.
    missed = (30 / 32) * (29 / 31) * (28 / 30) * (27 / 29) * (26 / 28)
    assert levels["eval/tiny/retrieval/image_to_text@5"] == pytest.approx(1 - missed)
    assert levels["eval/tiny/linear_probe/acc1"] == levels["eval/tiny/knn/acc1"] == 1 / 4
    assert levels["eval/tiny/clustering/ami"] == 0.0


def test_random_features_score_the_chance_levels(tiny):
    """Over 200 draws of features the mean recall is the expected one, within four deviations."""
    levels = chance_levels(tiny, "validation")
    image_groups = torch.arange(8).repeat_interleave(3)
    text_groups = torch.arange(8).repeat_interleave(2)
    generator = torch.Generator().manual_seed(0)
    draws = [
        retrieval_recall(
            torch.randn(24, 16, generator=generator),
            torch.randn(16, 16, generator=generator),
            image_groups,
            text_groups,
        )
        for _ in range(200)
    ]
    for key in draws[0]:
        values = torch.tensor([draw[key] for draw in draws], dtype=torch.float64)
        expected = levels[f"eval/tiny/retrieval/{key}"]
        assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / 200**0.5
        assert 0 < expected < 1


class Largest(TorchDispatchMode):
    """Remembers the most elements of a tensor that an operation gave."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_similarities_are_never_held_as_a_whole(generator):
    """COCO in small, five captions a picture: of 1,250,000 similarities 25,000 at once. With the
    default of 4,000,000 a tensor has 16 MB, of which a few live together, at any size of data."""
    captions, pictures = torch.randn(3000, 8, generator=generator).split([2500, 500])
    groups = torch.arange(500)
    with Largest() as largest:
        chunked = retrieval_recall(
            pictures, captions, groups, groups.repeat(5), chunk_elements=25_000
        )
    assert largest.elements <= 25_000
    assert chunked == retrieval_recall(pictures, captions, groups, groups.repeat(5))
    labels = torch.arange(2500) % 500
    with Largest() as largest:
        chunked = zero_shot_accuracy(captions, pictures, labels, chunk_elements=25_000)
    assert largest.elements <= 25_000
    assert chunked == zero_shot_accuracy(captions, pictures, labels)


def test_chance_recall_with_fewer_candidates_than_k():
    """All candidates are retrieved, so every query is recalled."""
    assert suite.chance_recall(Counter(a=2, b=1), Counter(a=1, b=2), 5) == 1.0


def test_the_emoji_data_set():
    """Loaded once; concepts are unseen in training, classes are shared."""
    data = emoji()
    assert emoji() is data
    concepts = [set(data.split(split).column("concept")) for split in CONCEPTS]
    assert len(set.union(*concepts)) == sum(map(len, concepts))
    assert set(data.test.column("subgroup")) <= set(data.classes())
    levels = chance_levels(data)
    assert levels["eval/emoji/zero_shot/acc1"] == 1 / len(set(data.test.column("label")))
    assert 0 < levels["eval/emoji/retrieval/image_to_text@1"] < 0.01
