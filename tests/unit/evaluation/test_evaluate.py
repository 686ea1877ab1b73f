"""The records of `protoclip.evaluate`, on images that are one colour."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import t
from solid import CLASSES as NUMBER
from solid import Guessing, Knowing, Solid, part, read_records, solid_data, tokenizer, transform

import protoclip
from protoclip.encode.features import Encoded, Encoder
from protoclip.evaluation import datasets, suite
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.evaluation.features import make_part
from protoclip.evaluation.metrics import METRICS, TASKS, is_share
from protoclip.evaluation.readers import LazySplits
from testing import save_to_bytes

ACCURACIES = [metric.key for name, metric in METRICS.items() if is_share(name)]


def test_perfect_features_score_one_in_every_task():
    """With intervals that end there, in records as CLIP_benchmark writes them."""
    records = read_records(Knowing(), solid_data(), TASKS)
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
            assert all(interval == pytest.approx(ends) for interval in record["intervals"].values())
            seen |= record["metrics"].keys()
    others = {"mean_average_precision", "subgroup_acc1", "subgroup_acc5"}
    assert seen == {*ACCURACIES} - others
    assert records["zeroshot_classification"]["templates"] == ["a class {c}", "some class {c}"]


def test_the_best_five_of_fewer_classes_are_left_out():
    numbers = [number for number in range(40) if number % 10 > 4]
    splits = {name: part(name, numbers) for name in ("train", "test")}
    few = EvaluationData(name="x", splits=splits, class_names=["0", "1", "2", "3"])
    records = read_records(Knowing(), few, ["zero_shot", "linear_probe"])
    assert [*records["zeroshot_classification"]["metrics"]] == ["acc1", "mean_per_class_recall"]
    assert [*records["linear_probe"]["metrics"]] == ["lp_acc1", "lp_mean_per_class_recall"]
    encoder = Encoder(model=Knowing(), transform=transform, tokenizer=tokenizer)
    of_run = suite.evaluate_run(encoder, split="test", data=few)
    assert [*of_run] == suite.list_metrics(few, "test")
    names = [name.removeprefix("eval/x/") for name in of_run]
    assert [name for name in names if "shot" in name] == ["zero_shot/acc1"]
    # A probe tells apart what it learned, however many classes have a name.
    named = replace(few, class_names=solid_data().class_names)
    records = read_records(Knowing(), named, ["zero_shot", "linear_probe"])
    assert "acc5" in records["zeroshot_classification"]["metrics"]
    assert "lp_acc5" not in records["linear_probe"]["metrics"]


def test_the_train_split_is_opened_for_tasks_that_learn_alone():
    """It may be large, and behind a URL."""
    splits, opened = solid_data().splits, []

    def read(split):
        opened.append(split)
        return splits[split]

    data = EvaluationData(
        name="x",
        splits=LazySplits(read, splits, first="test", source="x"),
        class_names=solid_data().class_names,
    )
    assert list(read_records(Knowing(), data)) == [
        "zeroshot_classification",
        "zeroshot_retrieval",
        "geometry",
    ]
    read_records(Knowing(), data, ["clustering"])
    assert opened == ["test"]
    read_records(Knowing(), data, ["knn"])
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
    records = read_records(Knowing(), shuffled, ["zero_shot", "linear_probe", "knn", "clustering"])
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
    (record,) = read_records(Knowing(), multilabel).values()
    assert record["metrics"] == {"mean_average_precision": pytest.approx(1.0)}
    (record,) = read_records(Guessing(), multilabel).values()
    low, high = record["intervals"]["mean_average_precision"]
    assert low < record["metrics"]["mean_average_precision"] < high < 0.9
    # Random classes are found as often as they are there.
    many = numbers * 30
    random = torch.rand(len(many), NUMBER, generator=torch.Generator().manual_seed(0)) < 0.3
    test = Split(images=Solid("x", many), labels=random)
    shuffled = EvaluationData(name="x", splits={"test": test}, class_names=data.class_names)
    (record,) = read_records(Knowing(), shuffled).values()
    assert record["metrics"]["mean_average_precision"] == pytest.approx(0.3, abs=0.04)


def test_what_hangs_together_has_one_group():
    """Images of a concept, copies, equal captions if they are few, and an image with its own."""
    captions = [("a", "b"), ("c",), ("b",), ("d", "photo"), ("e",), ("f",), ("g",)]
    captions += [("photo", f"own {row}") for row in range(13)]
    concepts = [0, 1, 2, 3, 4, 4, 5, *range(6, 19)]
    split = Split(images=Solid("x", list(range(20))), captions=captions, groups=concepts)
    data = EvaluationData(name="x", splits={"test": split})
    content = torch.tensor([*range(18), 17, 1])  # 18 is a copy of 17, 19 of 1
    part = make_part(data, "test", Encoded(features=torch.zeros(20, 2), content=content))
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
        image = save_to_bytes(Image.new("RGB", (8, 8), (number, 0, 0)))
        texts = [f"{view} of {number}" for view in range(4)] + [f"both of {max(number, 1)}"]
        captions.append(tuple(texts))
        rows += [(f"of-{number}.png", image, text) for text in texts]
    once = Split(images=Solid("pairs", range(20)), captions=captions)
    once = EvaluationData(name="pairs", splits={"test": once})
    found = datasets.open_data(str(write(tmp_path, rows)))
    for model in (Knowing(), Guessing()):
        (record,), (expected,) = (
            read_records(model, data, ["retrieval"]).values() for data in (found, once)
        )
        assert record["samples"] == 20
        assert record["metrics"] == expected["metrics"]
    path = tmp_path / f"pairs.{'parquet' if write is in_parquet else 'tsv'}"
    for given in (path, [path]):
        assert read_records(Guessing(), given, ["retrieval"])["zeroshot_retrieval"] == record
    perfect = read_records(Knowing(), found, ["retrieval"])["zeroshot_retrieval"]["metrics"]
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
    metrics = read_records(model, data, ["retrieval"])["zeroshot_retrieval"]["metrics"]
    texts = [
        (group, text) for group, several in zip(groups, captions, strict=True) for text in several
    ]
    texts = list(dict.fromkeys(texts)) if grouped else texts
    images = model.table.detach()[numbers]
    rows = tokenizer([text for _, text in texts])[:, 0]
    texts_rows, text_groups = model.text_table.detach()[rows], [group for group, _ in texts]
    for k in (1, 5, 10):
        expected = slow_recall(images, texts_rows, groups, text_groups, k)
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(expected)
        expected = slow_recall(texts_rows, images, text_groups, groups, k)
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(expected)


def test_bad_images_are_left_out_named_and_counted(capsys):
    """The metrics are those of the others, with their labels and captions."""
    bad, data = (0, 5, 17), solid_data()
    record = read_records(Guessing(), solid_data(bad=bad), TASKS)
    assert {of_task["bad_share"] for of_task in record.values()} == {3 / 18}
    shown = capsys.readouterr().err.splitlines()
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
    expected = read_records(Guessing(), good, TASKS)
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


def test_what_is_no_model_or_data_set_is_refused_by_its_type():
    """The name of a model is what `embed` and `export` take."""
    with pytest.raises(ValueError, match=r"^model: .*evaluate\(\*protoclip.load\('runs/b'\), data"):
        protoclip.evaluate(Path("runs/b"), transform, tokenizer, "shop.parquet")
    given = Guessing(), transform, tokenizer, pd.DataFrame({"image": ["a.jpg"]})
    with pytest.raises(ValueError, match=r"^data: DataFrame is no data set; give a file, or a"):
        inspect.unwrap(protoclip.evaluate)(*given)  # past the type checks of tests


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({}, {"split": "validation"}, "x: no split 'validation'; it has test"),
        ({}, {"tasks": ["knn"]}, "x: knn needs a labelled train split"),
        ({"class_names": ()}, {"tasks": ["zero_shot"]}, "x: zero_shot needs class names"),
        (
            {"labels": None, "captions": None},
            {},
            "x: zero_shot needs labels; retrieval",
        ),
        ({"labels": torch.arange(18)}, {}, "x: sample 'test/27' has class 6, but there are names"),
        ({"labels": torch.ones(18).long()}, {"tasks": ["clustering"]}, "images of two classes"),
        ({"captions": [("a",)] * 17 + [()]}, {}, "x: sample 'test/59' has no caption"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(data, options, message):
    model = Guessing()
    with pytest.raises(ValueError, match=re.escape(message)):
        read_records(model, faulty(**data), **options)
    assert not any(model.calls.values())  # told before anything is encoded
