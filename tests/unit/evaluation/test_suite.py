"""What evaluates a run, on data like the emoji: metrics, results of samples, ranks."""

import math
from dataclasses import replace
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch
from PIL import Image
from solid import CLASSES as NUMBER
from solid import PER_CLASS, Guessing, Knowing, read_records, solid_data, tokenizer, transform
from torch import nn

import protoclip
from interrupting import read_metrics, with_changes
from protoclip.data.pairs import ImageTextPairs
from protoclip.distributed import collectives
from protoclip.encode.features import Encoder
from protoclip.evaluation import datasets, probes, suite
from protoclip.evaluation.datasets import make_concept_data, match_captions
from protoclip.evaluation.metrics import METRICS, TASKS, SampleResults, list_columns
from protoclip.evaluation.suite import encode_data
from protoclip.training.run import train
from testing import run_distributed, save_to_bytes, tiny_config

RUN_METRICS = [name for name, metric in METRICS.items() if metric.in_runs]
CONCEPTS = {split: split_data.images.numbers for split, split_data in solid_data().splits.items()}
STYLES = 3


def pairs(split):
    """Three styles a concept, told by their green, the last two with one caption between them."""
    rows = []
    for concept in CONCEPTS[split]:
        for style in range(STYLES):
            image = Image.new("RGB", (8, 8), (concept, 100 * style, 0))
            rows.append(
                {
                    "image": save_to_bytes(image),
                    "caption": f"{'rich' if style else 'plain'} {concept}",
                    "label": f"name {concept}",
                    "concept": f"c{concept}",
                    "subgroup": f"class-{concept // PER_CLASS}",
                }
            )
    return ImageTextPairs(pa.Table.from_pylist(rows), name=f"tiny/{split}")


PAIRS = {split: pairs(split) for split in CONCEPTS}
TINY = make_concept_data("tiny", PAIRS)


class Watched(Knowing):
    """Says in which mode it encodes, and how much at once."""

    def __init__(self):
        super().__init__()
        self.image_tower = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(48))
        self.batch_sizes = []

    def encode_image(self, images, normalize=False):
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        self.batch_sizes.append(len(images))
        return super().encode_image(images)


def extract(model, data, split, batch_size=256):
    encoder = Encoder(
        model=model,
        transform=transform,
        tokenizer=tokenizer,
        batch_size=batch_size,
        workers=0,
    )
    return encode_data(encoder, data, TASKS, split=split)


def measure(model, data, split="test", batch_size=256):
    """The metrics of a run's evaluation, and the results of samples."""
    features = extract(model, data, split, batch_size)
    found = suite.measure(features)
    names = [name for name in RUN_METRICS if name in found.metrics]
    return {f"eval/{data.name}/{name}": found.metrics[name] for name in names}, found


def test_a_model_that_knows_everything_has_full_marks():
    """Under exactly the promised keys, as plain floats."""
    metrics, _ = measure(Watched(), TINY, "validation", batch_size=10)
    assert list(metrics) == suite.list_metrics(TINY, "validation")
    assert len(metrics) == 18
    assert {type(value) for value in metrics.values()} == {float}
    assert [*metrics.values()][:14] == pytest.approx([1.0] * 14)
    # Captions say what images say, so the modalities coincide.
    assert metrics["eval/tiny/modality_gap/gap"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval/tiny/modality_gap/alignment"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval/tiny/modality_gap/uniformity_image"] < 0


def test_metrics_follow_from_the_results_of_samples():
    metrics, samples = measure(Guessing(), TINY)
    assert list(samples.images["sample_id"]) == list(PAIRS["test"].sample_ids())
    assert len(set(samples.texts["sample_id"])) == 36
    assert samples.texts["sample_id"][0] == "tiny/test/0: plain 7"
    assert samples.images.keys() == {"sample_id", *list_columns(texts=False)}
    assert samples.texts.keys() == {"sample_id", *list_columns(texts=True)}
    for name in {*RUN_METRICS} & {*samples.means}:
        assert samples.values(name).mean() == metrics[f"eval/tiny/{name}"], name


def test_every_module_gets_its_mode_back():
    """A locked tower in a training model stays in evaluation mode, also after an error."""
    model = Watched().train()
    model.image_tower[1].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    measure(model, TINY, batch_size=50)
    assert [module.training for module in model.modules()] == modes
    assert max(model.batch_sizes) == 50
    model.table.data.fill_(math.nan)
    with pytest.raises(
        ValueError,
        match=r"^tiny images: train: .* not finite .* has diverged.*$",
    ):
        measure(model, TINY)
    assert [module.training for module in model.modules()] == modes


def test_retrieval_is_among_distinct_captions():
    """Images of a group share candidates; equal captions of two groups are two candidates, and
    right for both."""
    found = match_captions([["a"], ["a"], ["a", "b"]], ["x", "y", "z"], [5, 7, 5])
    assert found.texts == ["a", "a", "b"]
    assert found.ids == ["x: a", "y: a", "z: b"]
    assert found.groups.tolist() == [5, 7, 5]
    pairs = zip(found.image_of_pair.tolist(), found.text_of_pair.tolist(), strict=True)
    assert [*pairs] == [(0, 0), (1, 1), (2, 0), (2, 2)]
    assert found.numbers.tolist() == [0, 0, 1]
    assert {*zip(*found.matches.tolist(), strict=True)} == {(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)}
    alone = match_captions([["a", "a"], ["a"], ["b", "a"]], ["x", "y", "z"], None, "pqp")
    assert (alone.rows, alone.texts, alone.groups.tolist()) == ([0, 1], [*"aaab"], [0, 0, 1, 0])


def test_concepts_of_equal_name_are_one_class():
    """Merged, the oracle's twin names cost one concept; two equal classes would tie and score 0."""
    table = PAIRS["test"].table
    same = pa.array(["name 7"] * (2 * STYLES) + table["label"].to_pylist()[2 * STYLES :])
    renamed = table.set_column(table.column_names.index("label"), "label", same)
    test = ImageTextPairs(renamed, name="twins/test")
    twins = make_concept_data("twins", {**PAIRS, "test": test})
    metrics, _ = measure(Knowing(), twins)
    # Concept 8 shares the name of 7, which does not speak of it.
    assert metrics["eval/twins/zero_shot/acc1"] == pytest.approx(17 / 18)


@pytest.mark.parametrize(
    ("split", "left_out", "given"),
    [
        ("test", "", ["train", "train", "validation", "validation"]),
        ("validation", "", ["train", "train"]),
        ("test", "validation", ["train", "train"]),
    ],
)
def test_the_probe_never_chooses_on_what_is_measured(split, left_out, given, monkeypatch):
    """Without other images to choose on, `train` alone is given."""
    best = Mock()
    best.return_value.predict = Mock(side_effect=lambda rows: torch.zeros(len(rows)).long())
    best.return_value.ranks = Mock(side_effect=lambda rows, labels: torch.zeros(len(rows)).long())
    monkeypatch.setattr(probes, "best_linear_probe", best)
    splits = {name: split_data for name, split_data in TINY.splits.items() if name != left_out}
    metrics, _ = measure(Knowing(), replace(TINY, splits=splits), split)
    assert metrics["eval/tiny/linear_probe/acc1"] == pytest.approx(1 / NUMBER)
    sizes = {part: STYLES * len(concepts) for part, concepts in CONCEPTS.items()}
    rows = [*best.call_args.args, *best.return_value.predict.call_args.args]
    assert [len(some) for some in rows] == [sizes[part] for part in (*given, split)]


def test_evaluate_writes_the_results_of_samples(tmp_path, monkeypatch, capsys):
    """On the bundled data; a folder that cannot be written costs a warning."""
    monkeypatch.setattr(datasets, "emoji", lambda: TINY)
    encoder = Encoder(model=Guessing(), transform=transform, tokenizer=tokenizer, show=True)
    metrics = suite.evaluate_run(encoder, split="validation", samples_to=tmp_path / "results")
    expected, samples = measure(Guessing(), TINY, "validation")
    assert metrics == expected
    assert "evaluate: tiny metrics: 100%" in capsys.readouterr().err
    read = SampleResults.read(tmp_path / "results" / "tiny-validation.parquet")
    assert list(read.texts["sample_id"]) == list(samples.texts["sample_id"])
    (tmp_path / "file").write_text("")
    again = suite.evaluate_run(
        replace(encoder, show=False), split="validation", samples_to=tmp_path / "file"
    )
    assert again == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiny-validation.parquet: not written" in line


def on_a_rank():
    """Features, metrics, records and an error; then the ranks must still be in step."""
    model = Guessing()
    features = extract(model, TINY, "test", batch_size=9)
    metrics = suite.measure(features).metrics
    rows = {name: part.features for name, part in features.parts.items()}
    records = read_records(Guessing(), solid_data(bad=(0, 1, 2, 3)), TASKS, batch_size=4)
    # The last batch of training images, which one rank alone sees.
    model.table.data[CONCEPTS["train"][-1]] = math.nan
    with pytest.raises(ValueError, match=r".*") as error:
        extract(model, TINY, "test", batch_size=9)
    assert collectives.all_gather_object(collectives.rank()) == [*range(collectives.world_size())]
    return rows | dict(features.texts), list(metrics.items()), records, str(error.value)


def test_every_rank_has_what_one_process_has():
    """To the last bit and in the same order; and its error, so that none is left waiting."""
    features, *expected = on_a_rank()
    start = "tiny images: train: features are not finite"
    assert expected[-1].startswith(start)
    for of_rank, *others in run_distributed(on_a_rank, 2):
        assert of_rank.keys() == features.keys()
        assert all(torch.equal(of_rank[name], rows) for name, rows in features.items())
        assert others == expected


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
def test_a_run_of_two_ranks_evaluates_as_one_process_does(tmp_path, monkeypatch):
    """During training, which goes on after it, and at the end, as its checkpoint scores alone."""
    first, second = run_distributed(trained, 2, "fsdp", str(tmp_path / "run"))
    monkeypatch.setattr(datasets, "emoji", lambda: TINY)
    opened = zip(("model", "transform", "tokenizer"), protoclip.load(tmp_path / "run"), strict=True)
    alone = suite.evaluate_run(Encoder(**dict(opened)), split="test")
    assert len(alone) == 18
    assert first == second
    # Filters in another order in memory change the last digits.
    assert first == pytest.approx(alone, abs=1e-6)
    assert len(read_metrics(tmp_path / "run", "eval/")) == 2
