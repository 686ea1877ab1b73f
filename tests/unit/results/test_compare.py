"""Results of samples, intervals against slow restatements, and what `compare` shows of them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from protoclip.evaluation import paired
from protoclip.evaluation.metrics import (
    METRICS,
    SHOWN,
    SampleResults,
    compute_influences,
    difference,
    interval,
    interval_of_difference,
    list_columns,
    mark_clear,
    rests_on_few,
)
from protoclip.results import table
from protoclip.results.compare import compare_runs
from protoclip.results.table import format_cell, print_table, table_of_runs


def results(seed: int, *, images: int = 60, texts: int = 40, skill: float = 0.0) -> SampleResults:
    """Made up; ranks are lower and answers better with more skill."""
    generator = np.random.default_rng(seed)

    def column(name: str, number: int):
        if name == "group":
            return np.array([f"group {row % 17}" for row in range(number)], object)
        if name in SHOWN:
            return np.arange(number) // 2
        if "crowding" in name:
            return generator.normal(size=number) / 1000
        if name.endswith("class"):
            return generator.integers(12, size=number)
        if name.endswith("correct"):
            return generator.random(number) < 0.4 + skill / 2
        return (generator.integers(12, size=number) * (1 - skill)).astype(np.int64)

    ids = (np.array([f"{kind} {row}" for row in range(60)], object) for kind in ("image", "text"))
    of_images, of_texts = list_columns(texts=False), list_columns(texts=True)
    return SampleResults(
        images={"sample_id": next(ids)[:images]} | {n: column(n, images) for n in of_images},
        texts={"sample_id": next(ids)[:texts]} | {n: column(n, texts) for n in of_texts},
    )


@pytest.mark.parametrize("backwards", [False, True])
def test_influences_are_sums_over_groups(backwards):
    """Against loops over groups and classes; the order of a model's samples changes nothing."""
    one = results(0)
    step = -1 if backwards else 1
    given = SampleResults(
        images={name: column[::step] for name, column in one.images.items()},
        texts={name: column[::step] for name, column in one.texts.items()},
    )
    found, _ = compute_influences(given)
    means = {name: metric for name, metric in METRICS.items() if metric.column is not None}
    assert found.keys() == means.keys()
    names = sorted({*one.images["group"], *one.texts["group"]})
    for metric, mean in means.items():
        rows = one.texts if "text_to_image" in metric else one.images
        right = rows[mean.column] if mean.k is None else rows[mean.column] < mean.k
        classes = rows[mean.by] if mean.by else np.zeros(len(right))
        of_class = {name: right[classes == name].mean() for name in np.unique(classes)}
        expected = dict.fromkeys(names, 0.0)
        for name, mean_of_class in of_class.items():
            own = classes == name
            number = len({*rows["group"][own]})
            factor = math.sqrt(number / (number - 1)) if mean.by and number > 1 else 1.0
            for value, group in zip(right[own], rows["group"][own], strict=True):
                gap = (value - mean_of_class) * factor
                if number == 1:
                    gap = mean_of_class - np.mean([*of_class.values()])
                expected[group] += gap / own.sum() / len(of_class)
        if mean.crowding is not None:
            others = one.images if rows is one.texts else one.texts
            for taken, group in zip(others[mean.crowding], others["group"], strict=True):
                expected[group] += taken
        correction = math.sqrt(len(names) / (len(names) - 1))
        np.testing.assert_allclose(found[metric], np.array([*expected.values()]) * correction)


@pytest.mark.parametrize("taken", [0.01, 0.1])
def test_a_recall_that_candidates_decide_has_no_interval(taken):
    """An image that stands before the matches of most captions may be missing in the next set."""
    group = np.arange(40)
    columns = {"sample_id": group, "group": group}
    crowding = taken * np.where(group % 8 == 0, -1.0, 1 / 7)
    images = {**columns, "text_to_image_crowding_1": crowding}
    texts = {**columns, "text_to_image_rank": group % 2}
    results, name = SampleResults(images=images, texts=texts), "retrieval/text_to_image@1"
    found, decided = compute_influences(results)
    assert decided == ({name} if taken == 0.1 else set())
    assert interval_of_difference([0.1], found[name]) is not None


def test_a_class_of_one_group_is_held_against_the_others():
    """As of emoji, whose images of a concept are one group and one class."""
    columns = {"sample_id": np.arange(8), "zero_shot_class": np.arange(8) // 2}
    columns |= {"group": np.arange(8) // 2, "zero_shot_rank": np.array([0, 0, 0, 1, 1, 1, 0, 1])}
    found = compute_influences(SampleResults(images=columns))[0]["zero_shot/mean_per_class_recall"]
    np.testing.assert_allclose(found, np.array([0.5, 0, -0.5, 0]) / 4 * math.sqrt(4 / 3))


def test_a_difference_rests_on_five_groups_or_more():
    """Else it has no interval, nor has a model against itself: a width of 0 would claim certainty.
    Of few groups it counts which differ, and not which are off the mean. NaN is not clear."""
    moved = np.array([0.1, -0.1] * 10)
    low, high = interval_of_difference([0.2], moved)
    half = scipy.stats.t.ppf(0.975, 19) * math.sqrt(0.2)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half))
    assert interval_of_difference([0.2], np.where(np.arange(20) < 5, moved, 0.0)) is not None
    assert interval_of_difference([0.2], np.where(np.arange(20) < 4, moved, 0.0)) is None
    assert interval_of_difference([0.0], np.zeros(20)) is None
    rows = np.arange(20)
    none, *others = (
        compute_influences(SampleResults(images={"sample_id": rows, "knn_correct": correct}))[0]
        for correct in (rows < right for right in range(21))
    )
    ends = [
        interval_of_difference([right / 20], results["knn/acc1"] - none["knn/acc1"])
        for right, results in enumerate(others, 1)
    ]
    assert [right for right, ends_of in enumerate(ends, 1) if ends_of is not None] == [
        *range(5, 17)
    ]
    assert difference([math.nan], moved)["p"] == 1.0


@pytest.mark.parametrize(
    ("gain", "others", "clear"), [(1.1, 0, True), (1.1, 5, False), (2, 5, True)]
)
def test_what_is_clear_depends_on_how_much_is_compared(gain, others, clear):
    """A star is Holm's test of all differences; their intervals stay those of one each."""
    moved = np.array([0.1, -0.1] * 10)
    half = scipy.stats.t.ppf(0.975, 19) * math.sqrt(0.2)
    found = [difference([at], moved) for at in (gain * half, *[0.01] * others)]
    expected = 2 * scipy.stats.t.sf(gain * half / math.sqrt(0.2), 19)
    assert found[0]["p"] == pytest.approx(expected, rel=3e-3)
    assert found[0]["interval"][0] > 0
    mark_clear(found)
    assert [entry["beyond"] for entry in found] == [clear] + [False] * others


def test_clear_differences_leave_the_level_to_those_that_follow():
    """Holm's: the second of two is tested at 5%, and not at 2.5% as by Bonferroni's."""
    found = [{"p": p, "beyond": False} for p in (0.04, 0.02, None)]
    mark_clear(found)
    assert [entry["beyond"] for entry in found] == [True, True, False]


def test_the_interval_of_a_metric_is_wilsons():
    """Of as many samples as would leave the same variance; at 0 and 1, of as many as groups."""
    right = np.arange(200) < 150
    found = interval(0.75, (right - 0.75) / 200)
    expected = scipy.stats.binomtest(150, 200).proportion_ci(method="wilson")
    assert found == pytest.approx([expected.low, expected.high], rel=2e-3)
    low, high = interval(1.0, np.zeros(200))
    expected = scipy.stats.binomtest(200, 200).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, 1.0), rel=2e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_few_that_are_wrong_have_a_wide_interval(size):
    """Of single samples it is Wilson's; of groups that of no more samples than there are groups."""
    for wrong in (0, 1, 4, 6):
        right = np.arange(200) >= wrong
        moved = ((right - right.mean()) / 200).reshape(-1, size).sum(1)
        low, high = interval(right.mean(), moved)
        groups = 200 // size
        expected = scipy.stats.binomtest(200 - wrong, 200).proportion_ci(method="wilson")
        if wrong < 5:
            assert rests_on_few(moved)
        if size == 1:
            assert (low, high) == pytest.approx((expected.low, expected.high), rel=3e-3)
        elif wrong < 5:
            assert low < expected.low
            assert high - low >= 2 * math.sqrt(right.mean() * (1 - right.mean()) / groups)


def test_seeds_that_agree_leave_the_interval_over_samples(tmp_path):
    """As those of two frozen encoders do. Seeds that differ widen it; other samples leave none."""
    right, key = np.arange(120) < 112, "eval/emoji/knn/acc1"
    rows = {"sample_id": np.arange(120), "group": np.arange(120)}
    same = SampleResults(images={**rows, "knn_correct": right})
    folders = [made(tmp_path / f"a{seed}", "a", seed, 112 / 120, same) for seed in (0, 1)]
    value = compared(*folders)[0]["metrics"][key]
    assert value["spread"] == 0
    alone = interval(112 / 120, compute_influences(same)[0]["knn/acc1"])
    assert value["interval"] == pytest.approx(alone)
    assert not value["wide"]
    assert format_cell(value, scale=100.0, digits=1).text == "93.3 [87.3, 96.6] ± 0.0"
    other = made(
        tmp_path / "a2",
        "a",
        2,
        106 / 120,
        SampleResults(images={**rows, "knn_correct": np.arange(120) < 106}),
    )
    low, high = compared(*folders, other)[0]["metrics"][key]["interval"]
    assert (low < alone[0], high > alone[1]) == (True, True)
    elsewhere = SampleResults(images={**rows, "sample_id": -np.arange(120), "knn_correct": right})
    last = made(tmp_path / "a3", "a", 3, 112 / 120, elsewhere)
    assert "interval" not in compared(*folders, last)[0]["metrics"][key]


def correlated(seed: int) -> tuple[SampleResults, SampleResults]:
    """Two models on 60 concepts of two images with five captions: what hangs together is alike."""
    draw = np.random.default_rng(seed)
    concept = draw.normal(size=60).repeat(2)
    image = concept + 0.7 * draw.normal(size=120)
    text = image.repeat(5) + draw.normal(size=600)
    classes = draw.integers(6, size=60).repeat(2)
    found = []
    for _ in range(2):
        own = 0.5 * draw.normal(size=60).repeat(2)
        ranks = {"image_to_text_rank": image + own > 0.5, "zero_shot_rank": image + own > 0}
        images = {name: values.astype(int) for name, values in ranks.items()}
        images |= {"group": np.arange(60).repeat(2), "zero_shot_class": classes}
        images |= {"knn_correct": image + own > 0.2}
        rank = (text + own.repeat(5) > 0).astype(int)
        texts = {"sample_id": np.arange(600), "group": np.arange(60).repeat(10)}
        texts |= {"text_to_image_rank": rank}
        found.append(SampleResults(images={"sample_id": np.arange(120), **images}, texts=texts))
    return found[0], found[1]


def test_intervals_are_as_wide_as_new_test_sets_differ():
    """Of one model and of two, where concepts, images and captions are drawn anew each time."""
    metrics = ("text_to_image@1", "image_to_text@1", "knn/acc1", "mean_per_class_recall")
    values: dict[str, list[float]] = {}
    variances: dict[str, list[float]] = {}
    for seed in range(300):
        one, two = correlated(seed)
        moved, other = (compute_influences(samples)[0] for samples in (one, two))
        for metric in [name for name in moved if name.endswith(metrics)]:
            gain = two.means[metric] - one.means[metric]
            both = {"one": (one.means[metric], moved[metric])}
            both["pair"] = gain, other[metric] - moved[metric]
            for kind, (value, of_groups) in both.items():
                values.setdefault(f"{kind} {metric}", []).append(value)
                variances.setdefault(f"{kind} {metric}", []).append(np.square(of_groups).sum())
    assert len(values) == 8
    for name, of_repeats in values.items():
        width = math.sqrt(np.mean(variances[name]))
        assert width == pytest.approx(np.std(of_repeats, ddof=1), rel=0.12), name


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
    return compare_runs([paired.read_results(folder) for folder in folders])


def test_a_folder_of_runs_is_no_unfinished_run(tmp_path):
    run = tmp_path / "runs" / "quick" / "model"
    run.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"model: not a run folder; a run has a config.toml$"):
        paired.read_results(run)
    (run / "config.toml").touch()
    for folder in (tmp_path / "runs", tmp_path / "runs" / "quick"):
        with pytest.raises(ValueError, match=rf"it holds runs: name them, as {run}$"):
            paired.read_results(folder)
    with pytest.raises(ValueError, match=r"model: no results.json; the run has not finished$"):
        paired.read_results(run)


def test_runs_of_several_seeds_are_paired_by_seed(tmp_path, capsys):
    """Only common seeds count, in any order; the mark follows the interval, which is SciPy's."""
    values = {"a": {0: 0.30, 1: 0.50, 2: 0.40, 7: 0.9}, "b": {2: 0.43, 0: 0.32, 1: 0.53}}
    folders = [
        made(tmp_path / f"{name}{seed}", name, seed, accuracy)
        for name, right_ones in values.items()
        for seed, accuracy in right_ones.items()
    ]
    _, second = compared(*folders)
    found = second["metrics"]["eval/emoji/knn/acc1"]["difference"]
    gains = [0.02, 0.03, 0.03]
    expected = scipy.stats.ttest_1samp(gains, 0.0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(gains))
    assert found["interval"] == pytest.approx(tuple(expected))
    assert (found["n"], found["kind"], found["beyond"]) == (3, "seeds", True)
    same = second["metrics"]["eval/emoji/modality_gap/gap"]["difference"]
    assert (same["mean"], same["interval"], same["kind"]) == (0.0, None, None)
    value = second["metrics"]["eval/emoji/knn/acc1"]
    assert format_cell(value, scale=100.0, digits=1).text == "42.7 ± 10.5\n+2.7† [+1.2, +4.1]*"
    print_table(table_of_runs(compared(*folders)))
    said = " ".join(capsys.readouterr().out.split())
    assert "†: of the seeds that both have, and not the difference of the means shown." in said
    assert table.SPREAD in said


def test_one_seed_is_compared_over_its_samples(tmp_path, capsys):
    """By groups if both runs have results of the same samples, for metrics that have such."""
    one, two = results(0), results(1, skill=0.5)
    files = {"a": one, "b": two, "c": None, "d": results(2, images=50), "e": results(4, texts=30)}
    folders = [made(tmp_path / name, name, 3, 0.4, file) for name, file in files.items()]
    for folder in folders:  # a search whose queries are the images
        path = folder / "results.json"
        search = '"eval/emoji/retrieval/image_to_text@1": 0.3, "eval/emoji/knn'
        path.write_text(path.read_text().replace('"eval/emoji/knn', search))
    first, second, third, fourth, fifth = entries = compared(*folders)
    found = second["metrics"]["eval/emoji/knn/acc1"]["difference"]
    first_moved, second_moved = (
        compute_influences(results)[0]["knn/acc1"] for results in (one, two)
    )
    half = scipy.stats.t.ppf(0.975, 16) * np.linalg.norm(second_moved - first_moved)
    assert found["interval"] == pytest.approx([found["mean"] - half, found["mean"] + half])
    assert (found["n"], found["seeds"], found["samples"]) == (60, 1, 60)
    search = "retrieval/image_to_text@1"
    assert second["metrics"][f"eval/emoji/{search}"]["difference"]["samples"] == 60
    for entry, key, others in (
        (second, "modality_gap/gap", False),
        (third, "knn/acc1", False),
        (fourth, "knn/acc1", True),
        (fifth, search, True),  # among fewer texts
    ):
        found = entry["metrics"][f"eval/emoji/{key}"]["difference"]
        assert (found["interval"], found["kind"], found["beyond"]) == (None, None, False)
        assert found["other_samples"] is others
    assert not fifth["metrics"]["eval/emoji/knn/acc1"]["difference"]["other_samples"]
    assert "difference" not in first["metrics"]["eval/emoji/knn/acc1"]
    for shown, has_others in (([first, second, third], False), (entries, True)):
        print_table(table_of_runs(shown))
        assert (table.OTHERS in " ".join(capsys.readouterr().out.split())) == has_others


def test_equal_ids_of_other_images_or_classes_are_other_samples(tmp_path):
    """As the rows of two tables of one name. Classes decide no search; earlier versions wrote
    neither, and are believed."""
    one, two, metric = results(0), results(1, skill=0.5), "knn/acc1"
    search = "retrieval/image_to_text@1"

    def changed(**columns) -> SampleResults:
        images = {name: column for name, column in two.images.items() if name not in columns}
        return replace(
            two, images=images | {k: column for k, column in columns.items() if column is not None}
        )

    other_class = changed(class_name=two.images["class_name"][::-1])
    assert paired.have_same_samples(one, two, metric)
    assert not paired.have_same_samples(one, changed(content=two.images["content"] + 1), metric)
    assert not paired.have_same_samples(one, changed(content=two.images["content"] + 1), search)
    assert not paired.have_same_samples(one, other_class, metric)
    assert paired.have_same_samples(one, other_class, search)
    assert paired.have_same_samples(one, changed(content=None, class_name=None), metric)
    path = tmp_path / "a.parquet"
    other_class.write(path)
    assert not paired.have_same_samples(one, SampleResults.read(path), metric)


def test_several_seeds_are_compared_over_their_samples_too(tmp_path, capsys):
    """Seeds that agree say nothing of other samples. Over seeds alone where nothing is known of
    samples; no interval where other ones evaluated, as those of other data: the models alone do not
    make that difference."""
    ones = [results(seed) for seed in (0, 1)]
    twos = [results(seed, skill=0.5) for seed in (2, 3)]
    folders = [
        made(tmp_path / f"{name}{seed}", name, seed, accuracy + seed / 100, results)
        for name, accuracy, several in (("a", 0.4, ones), ("b", 0.6, twos))
        for seed, results in enumerate(several)
    ]
    _, second = compared(*folders)
    found = second["metrics"]["eval/emoji/knn/acc1"]["difference"]
    moved = [compute_influences(results)[0]["knn/acc1"] for results in (*ones, *twos)]
    # What two seeds share: what is left of the variance is the product of their influences.
    shared = (moved[2] - moved[0]) @ (moved[3] - moved[1])
    half = scipy.stats.t.ppf(0.975, 16) * math.sqrt(shared)
    assert found["interval"] == pytest.approx([0.2 - half, 0.2 + half])
    assert (found["n"], found["samples"], found["kind"]) == (2, 60, "seeds and samples")
    file = folders[3] / "results" / "emoji-test.parquet"
    results(3, images=50).write(file)
    found = compared(*folders)[1]["metrics"]["eval/emoji/knn/acc1"]["difference"]
    assert found["mean"] == pytest.approx(0.2)
    assert (found["interval"], found["kind"], found["beyond"]) == (None, None, False)
    file.write_bytes(b"cut")
    found = compared(*folders)[1]["metrics"]["eval/emoji/knn/acc1"]["difference"]
    assert found["interval"] == pytest.approx([0.2, 0.2])
    assert (found["n"], found["samples"], found["kind"]) == (2, None, "seeds")
    assert capsys.readouterr().err.count("emoji-test.parquet: not the results") == 1
