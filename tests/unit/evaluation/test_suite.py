"""The suite end to end on a tiny data set."""

import copy
import io
import json
import math
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import protoclip
from interrupting import with_changes
from protoclip.data.pairs import ImageTextPairs
from protoclip.distributed import collectives
from protoclip.distributed.parallel import shard, spread
from protoclip.evaluation import datasets, suite
from protoclip.evaluation.datasets import distinct_captions, of_pairs
from protoclip.evaluation.samples import IMAGE_COLUMNS, MEANS, TEXT_COLUMNS, SampleResults
from protoclip.models.protoclip import ProtoCLIP
from protoclip.testing import run_distributed, tiny_config
from protoclip.training.run import train

CLASSES = ("sea-animal", "hand", "red-fruit", "sign")
CONCEPTS = {"train": range(24), "validation": range(24, 32), "test": range(32, 48)}
STYLES = 3


def image_file(concept, style):
    """Solid colour: red tells the concept, green the style."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (5 * concept, 100 * style, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(split):
    """Three styles a concept, the last two with one caption between them."""
    rows = [
        {
            "image": image_file(concept, style),
            "caption": f"name {concept}" + (" plain" if style == 0 else " rich"),
            "label": f"name {concept}",
            "concept": f"c{concept}",
            "subgroup": CLASSES[concept % 4],
        }
        for concept in CONCEPTS[split]
        for style in range(STYLES)
    ]
    return ImageTextPairs(pa.Table.from_pylist(rows), name=f"tiny/{split}")


TINY = of_pairs("tiny", {split: pairs(split) for split in CONCEPTS})


def image_transform(image):
    channels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return channels.view(4, 4, 3).permute(2, 0, 1) // torch.tensor([5, 100, 1]).view(3, 1, 1)


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


class Oracle(ProtoCLIP):
    """Features that say which concept and class, and nothing else."""

    def __init__(self):
        nn.Module.__init__(self)
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


class Guesser(ProtoCLIP):
    """Random features, a function of the input."""

    def __init__(self):
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(2, 100, 50, 8, generator=generator))

    def encode_image(self, images, normalize=True):
        return F.normalize(self.table[0, images[:, 0, 0, 0].long(), images[:, 1, 0, 0].long()])

    def encode_text(self, tokens, normalize=True):
        return F.normalize(self.table[1, tokens[:, 0], tokens[:, 1]])


def measure(model, data, split="test", batch_size=256):
    given = model, image_transform, tokenizer, data
    features = suite.extract(*given, split=split, batch_size=batch_size)
    return suite.measure(features, data, split=split)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_model_that_knows_everything_has_full_marks(split):
    """Under exactly the promised keys, as plain floats."""
    metrics, _ = measure(Oracle(), TINY, split, batch_size=10)
    assert list(metrics) == suite.metric_names("tiny")
    assert len(metrics) == 18
    assert {type(value) for value in metrics.values()} == {float}
    assert {metrics[f"eval/tiny/{metric}"] for metric in MEANS} == {1.0}
    # Captions say what images say, so the modalities coincide.
    assert metrics["eval/tiny/modality_gap/gap"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval/tiny/modality_gap/alignment"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval/tiny/modality_gap/uniformity_image"] < 0


def test_metrics_follow_from_the_results_of_samples():
    metrics, samples = measure(Guesser(), TINY)
    assert list(samples.images["sample_id"]) == list(TINY.split("test").sample_ids())
    assert len(set(samples.texts["sample_id"])) == 32
    assert samples.texts["sample_id"][0] == "c32: name 32 plain"
    assert samples.images.keys() == {"sample_id", *IMAGE_COLUMNS}
    assert samples.texts.keys() == {"sample_id", *TEXT_COLUMNS}
    for metric in MEANS:
        assert samples.values(metric).mean() == metrics[f"eval/tiny/{metric}"], metric


def test_every_module_gets_its_mode_back():
    """A locked tower in a training model stays in evaluation mode, also after an error."""
    model = Oracle().train()
    model.image_tower[1].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    measure(model, TINY, batch_size=50)
    assert [module.training for module in model.modules()] == modes
    assert max(model.batch_sizes) == 50
    model.known = lambda concept, of_class: torch.full((len(concept), 52), math.nan)
    with pytest.raises(ValueError, match=r"^tiny images: train: .* not finite; it has diverged$"):
        measure(model, TINY)
    assert [module.training for module in model.modules()] == modes


def test_retrieval_is_among_distinct_captions():
    """Images of a concept share candidates; equal captions of two concepts are two candidates."""
    captions, concepts, of_row = distinct_captions(TINY.split("test"))
    assert captions[:3] == ["name 32 plain", "name 32 rich", "name 33 plain"]
    assert concepts[:3] == ["c32", "c32", "c33"]
    assert of_row[:6] == [0, 1, 1, 2, 3, 3]
    assert len(captions) == 32
    rows = [{"image": b"", "caption": "a", "concept": concept} for concept in ("x", "y", "x")]
    table = ImageTextPairs(pa.Table.from_pylist(rows), name="two")
    assert distinct_captions(table) == (["a", "a"], ["x", "y"], [0, 1, 0])


def test_concepts_of_equal_name_are_one_class():
    """Merged, the oracle's twin names cost one concept; two equal classes would tie and score 0."""
    table = TINY.split("test").table
    same = pa.array(["name 32"] * (2 * STYLES) + table["label"].to_pylist()[2 * STYLES :])
    renamed = table.set_column(table.column_names.index("label"), "label", same)
    test = ImageTextPairs(renamed, name="twins/test")
    twins = of_pairs("twins", {split: TINY.split(split) for split in CONCEPTS} | {"test": test})
    metrics, _ = measure(Oracle(), twins)
    # Concept 33 shares the name of 32, and the name speaks of 32 and of another class.
    assert metrics["eval/twins/zero_shot/acc1"] == pytest.approx(15 / 16)


class TinyTowers(nn.Module):
    """The least that can be sharded."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))

    def encode_image(self, images):
        return self.visual(images.flatten(1))


def encode(model, number, broken=None):
    """Features of the first items, of which one cannot be read."""

    def read(rows):
        if broken in rows:
            raise OSError(f"image {broken}: gone")
        return torch.tensor(rows).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 2)

    items, settings = range(number), {"stage": "items", "batch_size": 2, "device": "cpu"}
    return suite.encode(model.encode_image, read, items, **settings)


def sharded_features(numbers):
    """Features by a model of which each rank has a shard, and the error for an unreadable image."""
    torch.manual_seed(0)
    model = whole = ProtoCLIP(TinyTowers(), nn.Linear(4, 4))
    if collectives.world_size() > 1:
        model = copy.deepcopy(whole)
        shard(model, torch.device("cpu"))
        spread(model, whole if collectives.rank() == 0 else None)
    found = [encode(model, number) for number in numbers]
    with pytest.raises((OSError, ValueError)) as error:
        encode(model, 8, broken=3)
    return found, str(error.value)


def test_every_rank_enters_every_forward_of_a_sharded_model():
    """Without rows, with fewer batches than ranks, and with a last round that only one rank has.
    An image that one rank cannot read ends all ranks before the forward."""
    numbers = [0, 1, 3, 9, 10]
    ((expected, _),) = run_distributed(sharded_features, 1, numbers)
    assert [len(rows) for rows in expected] == numbers
    for found, error in run_distributed(sharded_features, 2, numbers):
        for rows, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(rows, wanted)
        assert error == "image 3: gone"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_probe_never_chooses_on_test(split, monkeypatch):
    """The strength is chosen on validation for both splits."""
    best = Mock()
    best.return_value.predict = Mock(side_effect=lambda rows: torch.zeros(len(rows)).long())
    monkeypatch.setattr(suite, "best_linear_probe", best)
    metrics, _ = measure(Oracle(), TINY, split)
    assert metrics["eval/tiny/linear_probe/acc1"] == 0.25
    sizes = {part: STYLES * len(concepts) for part, concepts in CONCEPTS.items()}
    parts = ("train", "train", "validation", "validation", split)
    given = [*best.call_args.args, *best.return_value.predict.call_args.args]
    assert [len(rows) for rows in given] == [sizes[part] for part in parts]


def test_evaluate_writes_the_results_of_samples(tmp_path, monkeypatch, capsys):
    """On the bundled data; a folder that cannot be written costs a warning."""
    monkeypatch.setattr(datasets, "emoji", lambda: TINY)
    given = (Guesser(), image_transform, tokenizer)
    metrics = suite.evaluate(*given, split="validation", samples_to=tmp_path / "results")
    expected, samples = measure(Guesser(), TINY, "validation")
    assert metrics == expected
    assert "evaluate: tiny metrics: 100%" in capsys.readouterr().err
    read = SampleResults.read(tmp_path / "results" / "tiny-validation.parquet")
    assert list(read.texts["sample_id"]) == list(samples.texts["sample_id"])
    (tmp_path / "file").write_text("")
    again = suite.evaluate(*given, split="validation", show=False, samples_to=tmp_path / "file")
    assert again == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiny-validation.parquet: not written" in line


def shared(broken):
    """Features, metrics and the error of a rank, and whether the ranks are still in step."""
    model, found = Guesser(), ()
    if broken:  # a sample of the last batch of training images, which one rank alone sees
        model.table.data[0, 23, 2] = math.nan
    given = model, image_transform, tokenizer, TINY
    try:
        features = suite.extract(*given, split="test", batch_size=8)
        found = features, suite.measure(features, TINY, split="test")[0]
        message = ""
    except ValueError as error:
        message = str(error)
    assert collectives.all_gather_object(collectives.rank()) == [*range(collectives.world_size())]
    return message, *found


def test_every_rank_has_the_features_and_metrics_of_one_process():
    """To the last bit and in the same order."""
    _, alone, metrics = shared(False)
    for message, features, found in run_distributed(shared, 2, False):
        assert message == ""
        assert features.keys() == alone.keys()
        assert all(torch.equal(features[name], rows) for name, rows in alone.items())
        assert list(found.items()) == list(metrics.items())


def test_features_that_are_not_finite_are_refused_on_every_rank():
    """Though only one rank has met them; none is left waiting."""
    expected = "tiny images: train: the model's features are not finite; it has diverged"
    assert run_distributed(shared, 2, True) == [(expected,)] * 2


def trained(strategy, out):
    config = with_changes(
        tiny_config(out=out),
        {
            "run": {"evaluate_every": 1},
            "parallel": {"strategy": strategy},
            "episodes": {"count": 2, "size": 16, "locked_image": 0},
            "prototypes": {"number": 4},
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "emoji", lambda: TINY)
        return train(config)["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_two_ranks_evaluates_as_one_process_does(strategy, tmp_path, monkeypatch):
    """During training, which goes on after it, and at the end, as its checkpoint scores alone."""
    first, second = run_distributed(trained, 2, strategy, str(tmp_path / "run"))
    monkeypatch.setattr(datasets, "emoji", lambda: TINY)
    alone = suite.evaluate(*protoclip.load(tmp_path / "run"), split="test", show=False)
    assert len(alone) == 18
    assert first == second
    # Filters in another order in memory change the last digits.
    assert first == pytest.approx(alone, abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sum(any(name.startswith("eval/") for name in line) for line in lines) == 2
