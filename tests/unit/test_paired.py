"""Results of samples, intervals against slow restatements, and what `compare` makes of them."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from protoclip.evaluation import compare, paired
from protoclip.evaluation.samples import SampleResults
from protoclip.files import to_json

METRICS = (
    *("zero_shot/acc1", "zero_shot/acc5", "zero_shot_subgroup/acc1"),
    *("retrieval/image_to_text@5", "retrieval/text_to_image@1"),
    *("linear_probe/acc1", "knn/acc1", "clustering/ami", "clustering/ari"),
)


def results(seed: int, *, images: int = 60, texts: int = 40, skill: float = 0.0) -> SampleResults:
    """Made up; ranks are lower and answers better with more skill."""
    generator = np.random.default_rng(seed)

    def ranks(number: int):
        return (generator.integers(12, size=number) * (1 - skill)).astype(np.int32)

    classes = np.arange(images, dtype=np.int32) % 5
    return SampleResults(
        image_ids=[f"image {row}" for row in range(images)],
        text_ids=[f"c{row}: text" for row in range(texts)],
        columns={
            "zero_shot_rank": ranks(images),
            "zero_shot_subgroup_rank": ranks(images),
            "image_to_text_rank": ranks(images),
            "text_to_image_rank": ranks(texts),
            "linear_probe_correct": generator.random(images) < 0.4 + skill / 2,
            "knn_correct": generator.random(images) < 0.4,
            "cluster": np.where(generator.random(images) < skill, classes, 7).astype(np.int32),
            "class": classes,
        },
    )


def value(found: SampleResults, metric: str, rows) -> float:
    """A metric over some rows, worked out one by one."""
    task, _, name = metric.partition("/")
    if task == "clustering":
        score = {"ami": adjusted_mutual_info_score, "ari": adjusted_rand_score}[name]
        return score(
            [found.columns["class"][r] for r in rows], [found.columns["cluster"][r] for r in rows]
        )
    if task in ("linear_probe", "knn"):
        return sum(bool(found.columns[f"{task}_correct"][row]) for row in rows) / len(rows)
    way, k = (task, int(name[3:])) if task != "retrieval" else (name[:-2], int(name[-1]))
    return sum(int(found.columns[f"{way}_rank"][row] < k) for row in rows) / len(rows)


@pytest.mark.parametrize("number", [2, 3, 6])
def test_the_interval_over_seeds_is_students(number: int) -> None:
    """As SciPy gives it for the mean of paired differences."""
    found = np.random.default_rng(number).normal(1.0, 2.0, number)
    expected = scipy.stats.ttest_1samp(found, 0.0).confidence_interval(0.95)
    assert paired.t_interval(found.tolist()) == pytest.approx(tuple(expected))


def test_the_bootstrap_is_paired_draw_by_draw() -> None:
    """Against a loop over draws that works each metric out row by row, for every kind of metric;
    the order in which a model has its samples changes nothing."""
    one, two = results(0), results(1, skill=0.5)
    backwards = SampleResults(
        image_ids=one.image_ids[::-1],
        text_ids=one.text_ids[::-1],
        columns={name: column[::-1] for name, column in one.columns.items()},
    )
    draws = [paired.resampled(of, METRICS, draws=30, seed=4) for of in (one, two, backwards)]
    for metric in METRICS:
        on_texts = "text_to_image" in metric
        ids = one.text_ids if on_texts else one.image_ids
        order = sorted(range(len(ids)), key=ids.__getitem__)
        generator = np.random.default_rng([4, int(on_texts)])
        differences = []
        for draw in range(30):
            rows = [order[row] for row in generator.integers(len(ids), size=len(ids))]
            values = value(one, metric, rows), value(two, metric, rows)
            assert draws[0][metric][draw] == pytest.approx(values[0])
            differences.append(values[1] - values[0])
        np.testing.assert_allclose(draws[2][metric], draws[0][metric])
        expected = np.percentile(differences, 2.5), np.percentile(differences, 97.5)
        assert paired.bootstrap_interval(*(of[metric] for of in draws[:2])) == pytest.approx(
            expected
        )
    assert paired.resampled(one, ["modality_gap/gap", "knn/acc", "zero_shot/acc"], draws=3) == {}


def test_results_of_samples_are_kept_whole(tmp_path) -> None:
    """What is read is what was written; anything else is refused in one line."""
    written = results(0)
    path = tmp_path / "results" / "emoji-test.parquet"
    written.write(path)
    read = SampleResults.read(path)
    assert (read.image_ids, read.text_ids) == (written.image_ids, written.text_ids)
    assert read.columns.keys() == written.columns.keys()
    for name, column in written.columns.items():
        np.testing.assert_array_equal(read.columns[name], column)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"emoji-test.parquet: not the results") as error:
        SampleResults.read(path)
    assert "\n" not in str(error.value)


def made(folder, name: str, seed: int, accuracy: object, samples: SampleResults | None = None):
    """A finished run's folder, as `train` leaves it."""
    folder.mkdir()
    facts = {"name": name, "seed": seed, "samples_seen": 64, "train_seconds": 2.0}
    facts["metrics"] = {"eval/emoji/knn/acc1": accuracy, "eval/emoji/modality_gap/gap": 0.5}
    (folder / "results.json").write_text(json.dumps(facts))
    if samples is not None:
        samples.write(folder / "results" / "emoji-test.parquet")
    return folder


def compared(*folders) -> list[dict]:
    return compare.compare([compare.read_results(folder) for folder in folders])


def test_runs_of_several_seeds_are_paired_by_seed(tmp_path) -> None:
    """Only seeds that both have count, in whatever order; the mark follows the interval."""
    values = {"a": {0: 0.30, 1: 0.50, 2: 0.40, 7: 0.9}, "b": {2: 0.43, 0: 0.32, 1: 0.53}}
    folders = [
        made(tmp_path / f"{name}{seed}", name, seed, accuracy)
        for name, of in values.items()
        for seed, accuracy in of.items()
    ]
    _, second = compared(*folders)
    found = second["metrics"]["eval/emoji/knn/acc1"]["difference"]
    gains = [0.02, 0.03, 0.03]
    expected = scipy.stats.ttest_1samp(gains, 0.0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(gains))
    assert found["interval"] == pytest.approx(tuple(expected))
    assert (found["n"], found["kind"], found["beyond"]) == (3, "seeds", True)
    same = second["metrics"]["eval/emoji/modality_gap/gap"]["difference"]
    assert (same["mean"], same["beyond"]) == (0.0, False)
    text = compare.cell(second["metrics"]["eval/emoji/knn/acc1"], scale=100.0, digits=1)
    assert text == "42.7 ± 10.5\n+2.7 [+1.2, +4.1]*"


def test_one_seed_is_compared_over_its_samples(tmp_path) -> None:
    """By bootstrap where both runs kept their samples; by the difference alone where not, where
    samples differ, or where the metric has none."""
    one, two = results(0), results(1, skill=0.5)
    files = {"a": one, "b": two, "c": None, "d": results(2, images=50)}
    folders = [made(tmp_path / name, name, 3, 0.4, of) for name, of in files.items()]
    first, second, third, fourth = compared(*folders)
    found = second["metrics"]["eval/emoji/knn/acc1"]["difference"]
    draws = [paired.resampled(of, ["knn/acc1"], draws=1000)["knn/acc1"] for of in (one, two)]
    assert found["interval"] == pytest.approx(
        tuple(np.quantile(draws[1] - draws[0], [0.025, 0.975]))
    )
    assert (found["n"], found["kind"]) == (60, "bootstrap")
    for entry, key in ((second, "modality_gap/gap"), (third, "knn/acc1"), (fourth, "knn/acc1")):
        found = entry["metrics"][f"eval/emoji/{key}"]["difference"]
        assert (found["interval"], found["kind"], found["beyond"]) == (None, None, False)
    assert "difference" not in first["metrics"]["eval/emoji/knn/acc1"]


def test_a_run_counts_once(tmp_path) -> None:
    """However it is named; runs of equal name and seed elsewhere stay apart."""
    one, two = (made(tmp_path / folder, "x", 0, 0.4) for folder in ("one", "two"))
    (entry,) = compared(one, one, tmp_path / "two" / ".." / "one")
    assert (entry["name"], entry["seeds"]) == ("x", [0])
    names = [entry["name"] for entry in compared(one, two)]
    assert names == [f"x ({one})", f"x ({two})"]


@pytest.mark.parametrize("odd", [math.nan, math.inf, None, 1e308, -1e308])
def test_odd_numbers_in_results_are_shown_or_left_out(tmp_path, odd, capsys) -> None:
    """None of them is a traceback, in the table or as JSON, with one seed or several."""
    folders = [made(tmp_path / f"a{seed}", "a[b]\x1b", seed, 1e308) for seed in (0, 1)]
    folders += [made(tmp_path / f"b{seed}", "b", seed, odd) for seed in (0, 1)]
    for entries in (compared(*folders), compared(folders[0], folders[2])):
        compare.show(entries)
        shown = capsys.readouterr().out
        assert "a[b]?" in shown
        assert "\x1b]" not in shown
        assert json.loads(to_json(entries))[1]["name"] == "b"


@pytest.mark.parametrize("odd", ["'many'", "true", "[1]", "1" + "0" * 400])
def test_what_is_no_number_in_results_is_refused(tmp_path, odd) -> None:
    folder = made(tmp_path / "a", "a", 0, 0.5)
    text = (folder / "results.json").read_text().replace("0.5", odd.replace("'", '"'))
    (folder / "results.json").write_text(text)
    with pytest.raises(ValueError, match="not the results of a run") as error:
        compare.read_results(folder)
    assert "\n" not in str(error.value)
