"""Records: means over data sets, paired differences, files and the table."""

import json

import numpy as np
import pytest
from solid import Guessing, solid_data, tokenizer, transform

from protoclip.encode.features import Encoder
from protoclip.evaluation.metrics import interval, interval_of_difference
from protoclip.evaluation.paired import read_results
from protoclip.evaluation.suite import Result, choose_tasks, compute_results
from protoclip.results.compare import add_differences, add_means, write_records


def compute_named(name: str, model, data=None, tasks=None, **options) -> list[Result]:
    encoder = Encoder(model=model, transform=transform, tokenizer=tokenizer, workers=0)
    data = data or [solid_data("a")]
    return compute_results(
        encoder, data, choose_tasks(data, "test", tasks), model_name=name, **options
    )


def made(dataset: str, metrics: dict[str, float], seed: int, task: str = "knn") -> Result:
    """A result with influences of thirty groups."""
    generator = np.random.default_rng(seed)
    record = {"dataset": dataset, "model": "m", "pretrained": "none", "task": task}
    record |= {"metrics": metrics, "language": "en", "split": "test", "intervals": {}}
    influences = {metric: 0.01 * generator.normal(size=30) for metric in metrics}
    return Result(record=record, influences=influences, ids=[dataset])


def test_the_mean_over_data_sets_is_by_metric():
    """Of those that have it; a metric of one data set has no mean. Groups differ by data set."""
    one, two = made("a", {"x": 0.2, "y": 0.5}, 0), made("b", {"x": 0.4, "y": 0.7}, 1)
    three = made("c", {"x": 0.9, "z": 1.0}, 2)
    found = add_means([one, two, three, made("c", {"x": 0.0}, 3, task="other")])
    means = [result.record for result in found[4:]]
    assert [record["dataset"] for record in means] == ["mean of 3", "mean of 2"]
    assert [record["datasets"] for record in means] == [["a", "b", "c"], ["a", "b"]]
    assert means[0]["metrics"] == {"x": pytest.approx(0.5)}
    assert means[1]["metrics"] == {"y": pytest.approx(0.6)}
    moved = np.concatenate([one.influences["y"], two.influences["y"]]) / 2
    assert means[1]["intervals"]["y"] == pytest.approx(interval(0.6, moved))


def test_differences_are_paired_by_sample():
    """In each data set and in the mean; other samples give no interval."""
    data = [solid_data("a"), solid_data("b", bad=(3,))]
    first, second = (
        add_means(compute_named(str(seed), Guessing(seed), data, tasks=["knn", "zero_shot"]))
        for seed in (0, 1)
    )
    (found,) = add_differences([second], first)
    assert len(found) == 6
    for result, other in zip(found, first, strict=True):
        record = result.record
        assert record["compared_to"] == "0"
        assert record["differences"].keys() == record["metrics"].keys()
        for metric, of_metric in record["differences"].items():
            gain = record["metrics"][metric] - other.record["metrics"][metric]
            moved = result.influences[metric] - other.influences[metric]
            ends = interval_of_difference([gain], moved)
            assert of_metric["mean"] == pytest.approx(gain)
            assert of_metric["interval"] == (None if ends is None else pytest.approx(ends))
    ((same, *_),) = add_differences([first], first)
    same = same.record["differences"]["acc1"]
    assert same == {"mean": 0.0, "interval": None, "p": None, "beyond": False}
    (alone,) = compute_named("2", Guessing(), [solid_data("a", bad=(1,))], tasks=["knn"])
    ((apart,),) = add_differences([[alone]], first)
    apart = apart.record["differences"]["acc1"]
    assert (apart["interval"], apart["beyond"]) == (None, False)


def test_files_are_those_of_clip_benchmark(tmp_path):
    """One a record, with its names of tasks and metrics; none writes over another."""
    found = compute_named("runs/x", Guessing(), tasks=["zero_shot", "retrieval"])
    written = [result.record for result in found]
    write_records([*written, written[0]], tmp_path / "new" / "out")
    files = sorted((tmp_path / "new" / "out").iterdir())
    assert [file.name for file in files] == [
        "a_none_runs_x_en_zeroshot_classification-2.json",
        "a_none_runs_x_en_zeroshot_classification.json",
        "a_none_runs_x_en_zeroshot_retrieval.json",
    ]
    assert [json.loads(file.read_text()) for file in files[1:]] == written
    for path in (files[0].parent, files[0]):  # they have no results by sample
        with pytest.raises(ValueError, match=r": was written by protoclip evaluate.* --compare-to"):
            read_results(path)
    names = {name for record in written for name in record["metrics"]}
    assert {"acc1", "acc5", "mean_per_class_recall", "image_retrieval_recall@5"} <= names
