"""The suite end to end: on data like the emoji, and on images that are one colour."""

import io
import json
import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import binom, t
from solid import CLASSES as NUMBER
from solid import PER_CLASS, Guessing, Knowing, Solid, part, solid_data, tokenizer, transform
from torch import nn

import protoclip
from interrupting import with_changes
from protoclip.data.pairs import ImageTextPairs
from protoclip.distributed import collectives
from protoclip.evaluation import datasets, measured, suite
from protoclip.evaluation.datasets import EvaluationData, Split, of_pairs
from protoclip.evaluation.encoders import encoder_of
from protoclip.evaluation.features import Encoded, Encoder
from protoclip.evaluation.metrics import METRICS, TASKS, columns_of
from protoclip.evaluation.readers import LazySplits
from protoclip.evaluation.retrieval import captions_of
from protoclip.evaluation.samples import SampleResults
from protoclip.evaluation.task_features import part_of, task_features
from protoclip.models import loading
from protoclip.testing import run_distributed, tiny_config, tiny_model
from protoclip.training.run import train

RUN_METRICS = [name for name, metric in METRICS.items() if metric.in_runs]
ACCURACIES = [metric.key for metric in METRICS.values() if metric.is_share]
CONCEPTS = {split: of.images.numbers for split, of in solid_data().splits.items()}
STYLES = 3


def pairs(split):
    """Three styles a concept, told by their green, the last two with one caption between them."""
    rows = []
    for concept in CONCEPTS[split]:
        for style in range(STYLES):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (concept, 100 * style, 0)).save(buffer, "PNG")
            rows.append(
                {
                    "image": buffer.getvalue(),
                    "caption": f"{'rich' if style else 'plain'} {concept}",
                    "label": f"name {concept}",
                    "concept": f"c{concept}",
                    "subgroup": f"class-{concept // PER_CLASS}",
                }
            )
    return ImageTextPairs(pa.Table.from_pylist(rows), name=f"tiny/{split}")


PAIRS = {split: pairs(split) for split in CONCEPTS}
TINY = of_pairs("tiny", PAIRS)


class Watched(Knowing):
    """Says in which mode it encodes, and how much at once."""

    def __init__(self):
        super().__init__()
        self.image_tower = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(48))
        self.batch_sizes = []

    def encode_image(self, images, normalize=False):
        assert not any(module.training for module in self.modules())
        assert torch.is_inference_mode_enabled()
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
    return task_features(encoder, data, TASKS, split=split)


def measure(model, data, split="test", batch_size=256):
    """The metrics of a run's evaluation, and the results of samples."""
    features = extract(model, data, split, batch_size)
    found = measured.measure(features, data, TASKS, split=split)
    names = [name for name in RUN_METRICS if name in found.metrics]
    return {f"eval/{data.name}/{name}": found.metrics[name] for name in names}, found.samples


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_model_that_knows_everything_has_full_marks(split):
    """Under exactly the promised keys, as plain floats."""
    metrics, _ = measure(Watched(), TINY, split, batch_size=10)
    assert list(metrics) == suite.metric_names(TINY, split)
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
    assert samples.images.keys() == {"sample_id", *columns_of(texts=False)}
    assert samples.texts.keys() == {"sample_id", *columns_of(texts=True)}
    for name in {*RUN_METRICS} & {*samples.means()}:
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
    with pytest.raises(ValueError, match=r"^tiny images: train: .* not finite; it has diverged$"):
        measure(model, TINY)
    assert [module.training for module in model.modules()] == modes


def test_retrieval_is_among_distinct_captions():
    """Images of a group share candidates; equal captions of two groups are two candidates, and
    right for both."""
    found = captions_of([["a"], ["a"], ["a", "b"]], ["x", "y", "z"], [5, 7, 5])
    assert found.texts == ["a", "a", "b"]
    assert found.ids == ["x: a", "y: a", "z: b"]
    assert found.groups.tolist() == [5, 7, 5]
    pairs = zip(found.image_of_pair.tolist(), found.text_of_pair.tolist(), strict=True)
    assert [*pairs] == [(0, 0), (1, 1), (2, 0), (2, 2)]
    assert found.numbers.tolist() == [0, 0, 1]
    assert {*zip(*found.matches.tolist(), strict=True)} == {(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)}
    alone = captions_of([["a", "a"], ["a"], ["b", "a"]], ["x", "y", "z"], None, "pqp")
    assert (alone.rows, alone.texts, alone.groups.tolist()) == ([0, 1], [*"aaab"], [0, 0, 1, 0])


def test_concepts_of_equal_name_are_one_class():
    """Merged, the oracle's twin names cost one concept; two equal classes would tie and score 0."""
    table = PAIRS["test"].table
    same = pa.array(["name 7"] * (2 * STYLES) + table["label"].to_pylist()[2 * STYLES :])
    renamed = table.set_column(table.column_names.index("label"), "label", same)
    test = ImageTextPairs(renamed, name="twins/test")
    twins = of_pairs("twins", {**PAIRS, "test": test})
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
    monkeypatch.setattr(measured, "best_linear_probe", best)
    splits = {name: of for name, of in TINY.splits.items() if name != left_out}
    metrics, _ = measure(Knowing(), replace(TINY, splits=splits), split)
    assert metrics["eval/tiny/linear_probe/acc1"] == pytest.approx(1 / NUMBER)
    sizes = {part: STYLES * len(concepts) for part, concepts in CONCEPTS.items()}
    rows = [*best.call_args.args, *best.return_value.predict.call_args.args]
    assert [len(of) for of in rows] == [sizes[part] for part in (*given, split)]


def test_evaluate_writes_the_results_of_samples(tmp_path, monkeypatch, capsys):
    """On the bundled data; a folder that cannot be written costs a warning."""
    monkeypatch.setattr(datasets, "emoji", lambda: TINY)
    encoder = encoder_of(Guessing(), transform, tokenizer, show=True)
    metrics = suite.evaluate_run(encoder, split="validation", samples_to=tmp_path / "results")
    expected, samples = measure(Guessing(), TINY, "validation")
    assert metrics == expected
    assert "evaluate: tiny metrics: 100%" in capsys.readouterr().err
    read = SampleResults.read(tmp_path / "results" / "tiny-validation.parquet")
    assert list(read.texts["sample_id"]) == list(samples.texts["sample_id"])
    (tmp_path / "file").write_text("")
    again = suite.evaluate_run(
        encoder, split="validation", show=False, samples_to=tmp_path / "file"
    )
    assert again == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiny-validation.parquet: not written" in line


def on_a_rank():
    """Features, metrics, records and an error; then the ranks must still be in step."""
    model = Guessing()
    features = extract(model, TINY, "test", batch_size=9)
    metrics = measured.measure(features, TINY, TASKS, split="test").metrics
    rows = {name: part.features for name, part in features.parts.items()}
    records = judge(Guessing(), solid_data(bad=(0, 1, 2, 3)), TASKS, batch_size=4)
    # The last batch of training images, which one rank alone sees.
    model.table.data[CONCEPTS["train"][-1]] = math.nan
    with pytest.raises(ValueError, match=r".*") as error:
        extract(model, TINY, "test", batch_size=9)
    assert collectives.all_gather_object(collectives.rank()) == [*range(collectives.world_size())]
    return rows | dict(features.texts), list(metrics.items()), records, str(error.value)


def test_every_rank_has_what_one_process_has():
    """To the last bit and in the same order; and its error, so that none is left waiting."""
    features, *expected = on_a_rank()
    assert expected[-1] == (
        "tiny images: train: the model's features are not finite; it has diverged"
    )
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
    alone = suite.evaluate_run(
        encoder_of(*protoclip.load(tmp_path / "run")), split="test", show=False
    )
    assert len(alone) == 18
    assert first == second
    # Filters in another order in memory change the last digits.
    assert first == pytest.approx(alone, abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sum(any(name.startswith("eval/") for name in line) for line in lines) == 2


def judge(model, data, tasks=None, **more):
    given = model, transform, tokenizer, data
    found = protoclip.evaluate(*given, tasks, **{"workers": 0, "model_name": "m", **more})
    return {record["task"]: record for record in found}


def test_perfect_features_score_one_in_every_task():
    """With intervals that end there, in records as CLIP_benchmark writes them."""
    records = judge(Knowing(), solid_data(), TASKS)
    assert list(records) == [suite.RECORD_TASKS.get(task, task) for task in TASKS]
    seen = set()
    for task, record in records.items():
        assert [*record][:6] == ["dataset", "model", "pretrained", "task", "metrics", "language"]
        assert (record["dataset"], record["model"], record["pretrained"]) == ("solid", "m", "none")
        assert (record["samples"], record["bad_share"], record["split"]) == (18, 0.0, "test")
        json.dumps(record)
        if task != "geometry":
            assert [*record["metrics"].values()] == pytest.approx([1.0] * len(record["metrics"]))
            # How K-means divides other samples does not follow from one division.
            having = set() if task == "clustering" else record["metrics"].keys()
            assert record["intervals"].keys() == having
            # Of 18 samples: Wilson's interval of a share of 1.
            ends = [18 / (18 + t.ppf(0.975, 17) ** 2), 1.0]
            assert all(of == pytest.approx(ends) for of in record["intervals"].values())
            seen |= record["metrics"].keys()
    others = {"mean_average_precision", "subgroup_acc1", "subgroup_acc5"}
    assert seen == {*ACCURACIES} - others
    assert records["zeroshot_classification"]["templates"] == ["a class {c}", "some class {c}"]


def test_the_best_five_of_fewer_classes_are_left_out():
    numbers = [number for number in range(40) if number % 10 > 4]
    splits = {name: part(name, numbers) for name in ("train", "test")}
    few = EvaluationData(name="x", splits=splits, class_names=["0", "1", "2", "3"])
    records = judge(Knowing(), few, ["zero_shot", "linear_probe"])
    assert [*records["zeroshot_classification"]["metrics"]] == ["acc1", "mean_per_class_recall"]
    assert [*records["linear_probe"]["metrics"]] == ["lp_acc1", "lp_mean_per_class_recall"]
    encoder = encoder_of(Knowing(), transform, tokenizer)
    of_run = suite.evaluate_run(encoder, split="test", data=few, show=False)
    assert [*of_run] == suite.metric_names(few, "test")
    names = [name.removeprefix("eval/x/") for name in of_run]
    assert [name for name in names if "shot" in name] == ["zero_shot/acc1"]
    # A probe tells apart what it learned, however many classes have a name.
    named = replace(few, class_names=solid_data().class_names)
    records = judge(Knowing(), named, ["zero_shot", "linear_probe"])
    assert "acc5" in records["zeroshot_classification"]["metrics"]
    assert "lp_acc5" not in records["linear_probe"]["metrics"]


def at_chance(metrics, chances, number):
    """Within what 99.8% of guesses of so many samples reach; a metric is a share of them."""
    for name, chance in chances.items():
        low, high = binom.interval(0.998, number, chance)
        assert low <= metrics[name] * number <= high, (name, metrics[name])


RECALL_NAMES = [f"{of}_retrieval_recall@{k}" for of in ("image", "text") for k in (1, 5, 10)]


def test_an_untrained_model_is_at_chance():
    """A real one, of images that are drawn with no regard to their classes and captions."""
    draw = np.random.default_rng(0)
    buffers = [io.BytesIO() for _ in range(200)]
    for buffer in buffers:
        small = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((24, 24)).save(buffer, "PNG")
    names = ["dog", "cat", "tree", "car", "house", "sea", "hand", "apple", "road", "sign"]
    captions = [f"{names[row % 10]} of {names[row // 10 % 10]} {row}" for row in range(200)]
    table = {"image": [buffer.getvalue() for buffer in buffers], "caption": captions}
    images = ImageTextPairs(pa.table(table), name="drawn")
    split = Split(
        images=images,
        labels=torch.arange(200) % 10,
        captions=[(caption,) for caption in captions],
    )
    data = EvaluationData(
        name="drawn", splits={"test": split}, class_names=names, templates=("a photo of a {c}.",)
    )
    settings = tiny_model()
    model = loading.model(settings, seed=0)
    given = model.eval(), loading.evaluation_transform(model), loading.tokenizer(settings), data
    found = protoclip.evaluate(*given, ["zero_shot", "retrieval"], workers=0)
    zero_shot, retrieval = (record["metrics"] for record in found)
    at_chance(zero_shot, {"acc1": 0.1, "mean_per_class_recall": 0.1, "acc5": 0.5}, 200)
    at_chance(retrieval, {name: int(name.split("@")[1]) / 200 for name in RECALL_NAMES}, 200)


def test_the_train_split_is_opened_for_tasks_that_learn_alone():
    """It may be large, and behind a URL."""
    splits, opened = solid_data().splits, []

    def read(split):
        opened.append(split)
        return splits[split]

    data = EvaluationData(
        name="x",
        splits=LazySplits(read, splits, first="test", of="x"),
        class_names=solid_data().class_names,
    )
    assert list(judge(Knowing(), data)) == [
        "zeroshot_classification",
        "zeroshot_retrieval",
        "geometry",
    ]
    judge(Knowing(), data, ["clustering"])
    assert opened == ["test"]
    judge(Knowing(), data, ["knn"])
    assert opened == ["test", "train"]


def test_shuffled_labels_give_chance():
    """In every task that learns from labels or is scored by them."""
    data = solid_data()
    generator = torch.Generator().manual_seed(0)
    many = list(range(NUMBER * 10)) * 8
    splits = {
        split: Split(
            images=Solid(split, many),
            labels=torch.randint(NUMBER, (len(many),), generator=generator),
        )
        for split in data.splits
    }
    shuffled = EvaluationData(name="x", splits=splits, class_names=data.class_names)
    records = judge(Knowing(), shuffled, ["zero_shot", "linear_probe", "knn", "clustering"])
    assert list(records) == ["zeroshot_classification", "linear_probe", "knn", "clustering"]
    chance = pytest.approx(1 / NUMBER, abs=0.07)
    metrics = {k: v for of_task in records.values() for k, v in of_task["metrics"].items()}
    for name in ("acc1", "mean_per_class_recall", "lp_acc1", "lp_mean_per_class_recall"):
        assert metrics[name] == chance, name
    assert metrics["ami"] == pytest.approx(0.0, abs=0.03)
    assert metrics["ari"] == pytest.approx(0.0, abs=0.03)


def test_multilabel_data_are_scored_by_mean_average_precision():
    """And by nothing that needs one class an image."""
    data = solid_data()
    numbers = data.splits["test"].images.numbers
    present = F.one_hot(torch.tensor(numbers) // 10, NUMBER).bool()
    test = Split(images=Solid("x", numbers), labels=present)
    multilabel = EvaluationData(name="x", splits={"test": test}, class_names=data.class_names)
    (record,) = judge(Knowing(), multilabel).values()
    assert record["metrics"] == {"mean_average_precision": pytest.approx(1.0)}
    (record,) = judge(Guessing(), multilabel).values()
    low, high = record["intervals"]["mean_average_precision"]
    assert low < record["metrics"]["mean_average_precision"] < high < 0.9
    # Random classes are found as often as they are there.
    many = numbers * 30
    random = torch.rand(len(many), NUMBER, generator=torch.Generator().manual_seed(0)) < 0.3
    test = Split(images=Solid("x", many), labels=random)
    shuffled = EvaluationData(name="x", splits={"test": test}, class_names=data.class_names)
    (record,) = judge(Knowing(), shuffled).values()
    assert record["metrics"]["mean_average_precision"] == pytest.approx(0.3, abs=0.04)


def test_what_hangs_together_has_one_group():
    """Images of a concept, copies, equal captions if they are few, and an image with its own."""
    captions = [("a", "b"), ("c",), ("b",), ("d", "photo"), ("e",), ("f",), ("g",)]
    captions += [("photo", f"own {row}") for row in range(13)]
    concepts = [0, 1, 2, 3, 4, 4, 5, *range(6, 19)]
    split = Split(images=Solid("x", list(range(20))), captions=captions, groups=concepts)
    data = EvaluationData(name="x", splits={"test": split})
    content = torch.tensor([*range(18), 17, 1])  # 18 is a copy of 17, 19 of 1
    part = part_of(data, "test", Encoded(features=torch.zeros(20, 2), content=content))
    images, texts = part.sample_groups
    groups = [0, 1, 0, 3, 4, 4, 6, *range(7, 18), 17, 1]
    assert images == [part.ids[group] for group in groups]
    of_texts = dict(zip(part.captions.ids, texts, strict=True))
    for row, own in enumerate(captions):
        assert of_texts[f"{part.ids[row]}: {own[-1]}"] == images[row]


def slow_recall(queries, candidates, query_groups, candidate_groups, k):
    """Whether each query finds one of its group among its k nearest, in the mean."""
    found = []
    for query, group in zip(F.normalize(queries, dim=1), query_groups, strict=True):
        order = (F.normalize(candidates, dim=1) @ query).argsort(descending=True)[:k]
        found.append(any(candidate_groups[row] == group for row in order.tolist()))
    return np.mean(found)


def in_files(folder, rows):
    """A row a caption, and one file an image."""
    for name, content, _ in rows:
        (folder / name).write_bytes(content)
    (folder / "pairs.tsv").write_text(
        "image\tcaption\n" + "".join(f"{name}\t{text}\n" for name, _, text in rows)
    )
    return folder / "pairs.tsv"


def in_copies(folder, rows):
    """A row a caption, and a file for each."""
    return in_files(folder, [(f"{row}.png", *rest) for row, (_, *rest) in enumerate(rows)])


def in_parquet(folder, rows):
    _, images, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"image": images, "caption": texts}), folder / "pairs.parquet")
    return folder / "pairs.parquet"


@pytest.mark.parametrize("write", [in_files, in_copies, in_parquet])
def test_an_image_is_one_image_in_any_container(write, tmp_path):
    """Twenty images with five captions each; the first two have one in common."""
    rows, captions = [], []
    for number in range(20):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
        texts = [f"{view} of {number}" for view in range(4)] + [f"both of {max(number, 1)}"]
        captions.append(tuple(texts))
        rows += [(f"of-{number}.png", buffer.getvalue(), text) for text in texts]
    once = Split(images=Solid("pairs", range(20)), captions=captions)
    once = EvaluationData(name="pairs", splits={"test": once})
    found = datasets.open_data(str(write(tmp_path, rows)))
    for model in (Knowing(), Guessing()):
        (record,), (expected,) = (judge(model, of, ["retrieval"]).values() for of in (found, once))
        assert record["samples"] == 20
        assert record["metrics"] == expected["metrics"]
    path = tmp_path / f"pairs.{'parquet' if write is in_parquet else 'tsv'}"
    for given in (path, [path]):
        assert judge(Guessing(), given, ["retrieval"])["zeroshot_retrieval"] == record
    perfect = judge(Knowing(), found, ["retrieval"])["zeroshot_retrieval"]["metrics"]
    assert set(perfect.values()) == {1.0}


@pytest.mark.parametrize("grouped", [False, True])
def test_recall_with_several_captions_an_image(grouped):
    """Against a loop; images of one group share their captions, of which equal ones count once."""
    numbers = [*range(15), *range(15)] if grouped else [*range(30)]
    groups = [number // 2 for number in numbers] if grouped else numbers
    captions = [
        (f"number {g + 30}", f"a {n}", f"a {g + 60}")[: n % 3 + 1]
        for n, g in zip(numbers, groups, strict=True)
    ]
    split = Split(images=Solid("x", numbers), captions=captions, groups=groups if grouped else None)
    model, data = Guessing(), EvaluationData(name="x", splits={"test": split})
    metrics = judge(model, data, ["retrieval"])["zeroshot_retrieval"]["metrics"]
    texts = [(group, text) for group, of in zip(groups, captions, strict=True) for text in of]
    texts = list(dict.fromkeys(texts)) if grouped else texts
    images = model.table.detach()[numbers]
    rows = tokenizer([text for _, text in texts])[:, 0]
    texts_rows, text_groups = model.text_table.detach()[rows], [group for group, _ in texts]
    for k in (1, 5, 10):
        expected = slow_recall(images, texts_rows, groups, text_groups, k)
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(expected)
        expected = slow_recall(texts_rows, images, text_groups, groups, k)
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(expected)


def test_the_share_of_bad_images_is_of_all_rows():
    """Copies of an image are judged as one, and are as many images that could be used."""
    images = Solid("test", [1, 1, 1, 2, 2, 3], bad=(5,))
    split = Split(images=images, captions=[(f"number {n}",) for n in images.numbers])
    record = judge(Guessing(), EvaluationData(name="x", splits={"test": split}), ["retrieval"])
    assert record["zeroshot_retrieval"]["bad_share"] == 1 / 6


def test_bad_images_are_left_out_named_and_counted(capsys):
    """The metrics are those of the others, with their labels and captions."""
    bad, data = (0, 5, 17), solid_data()
    record = judge(Guessing(), solid_data(bad=bad), TASKS)
    assert {of_task["bad_share"] for of_task in record.values()} == {3 / 18}
    shown = capsys.readouterr().err.splitlines()[1:]
    assert shown[0].endswith("images: test: 3 of 18 images cannot be used and are left out:")
    assert shown[1] == "  sample 'test/7' (test): broken"
    whole = data.splits["test"]
    rows = [row for row in range(18) if row not in bad]
    numbers = [whole.images.numbers[row] for row in rows]
    rest = Split(
        images=Solid("test", numbers),
        labels=whole.labels[rows],
        captions=[whole.captions[row] for row in rows],
    )
    good = EvaluationData(
        name="solid",
        splits={**data.splits, "test": rest},
        class_names=data.class_names,
        templates=data.templates,
    )
    expected = judge(Guessing(), good, TASKS)
    for task, of_task in record.items():
        assert of_task["metrics"] == expected[task]["metrics"]
        assert of_task["intervals"] == expected[task]["intervals"]


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (None, ["zeroshot_classification"]),
        (["clustering"], ["clustering"]),
        (["zero_shot", "clustering"], ["zeroshot_classification", "clustering"]),
    ],
)
def test_tasks_that_data_cannot_serve_are_left_out(tasks, expected):
    """Of two data sets, one has captions and one has labels; neither has a train split."""
    whole = solid_data().splits["test"]
    labelled = EvaluationData(
        name="a",
        splits={"test": Split(images=whole.images, labels=whole.labels)},
        class_names=solid_data().class_names,
    )
    captioned = EvaluationData(
        name="b", splits={"test": Split(images=whole.images, captions=whole.captions)}
    )
    given = Guessing(), transform, tokenizer, [labelled, captioned], tasks
    records = protoclip.evaluate(*given, workers=0)
    assert [r["task"] for r in records if r["dataset"] == "a"] == expected
    of_captions = [] if tasks else ["zeroshot_retrieval", "geometry"]
    assert [r["task"] for r in records if r["dataset"] == "b"] == of_captions


def faulty(**changes):
    """Data of one split, with some fields changed."""
    whole = solid_data().splits["test"]
    of_split = {"images": whole.images, "labels": whole.labels, "captions": whole.captions}
    names = changes.pop("class_names", solid_data().class_names)
    return EvaluationData(
        name="x", splits={"test": Split(**{**of_split, **changes})}, class_names=names
    )


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({}, {"tasks": ["zero_shots"]}, "tasks: no task 'zero_shots'; did you mean zero_shot?"),
        ({}, {"tasks": ["x"]}, "tasks: no task 'x'; choose of zero_shot, retrieval"),
        ({}, {"split": "validation"}, "x: no split 'validation'; it has test"),
        ({}, {"templates": ["a photo"]}, "templates: 'a photo' has no place for the class"),
        ({}, {"tasks": ["knn"]}, "x: knn needs a labelled train split"),
        ({"captions": None}, {"tasks": ["retrieval"]}, "x: retrieval needs captions"),
        ({"labels": None}, {"tasks": ["clustering"]}, "x: clustering needs labels"),
        ({"class_names": ()}, {"tasks": ["zero_shot"]}, "x: zero_shot needs class names"),
        ({"labels": None, "captions": None}, {}, "x: can serve no task (zero_shot needs labels"),
        ({"labels": torch.arange(18)}, {}, "x: sample 'test/27' has class 6, but there are names"),
        ({"labels": torch.ones(18).long()}, {"tasks": ["clustering"]}, "images of two classes"),
        ({"labels": torch.ones(18, 2).bool()}, {}, "x: 6 class names for 2 columns of labels"),
        ({"captions": [("a",)] * 17 + [()]}, {}, "x: sample 'test/59' has no caption"),
        ({"images": Solid("none", [])}, {}, "x: its split 'test' holds no image"),
    ],
)
def test_what_cannot_be_judged_is_one_line(data, options, message):
    model = Guessing()
    with pytest.raises(ValueError, match=r".*") as error:
        judge(model, faulty(**data), **options)
    assert not any(model.calls.values())  # told before anything is encoded
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "\n" not in str(error.value)
