"""Results of samples, intervals against slow restatements, and what `compare` shows of them."""

import json
import math
import re

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from protoclip.evaluation import compare
from protoclip.evaluation.samples import IMAGE_COLUMNS, MEANS, SampleResults, resampled
from protoclip.files import to_json

SCORES = {"clustering/ami": adjusted_mutual_info_score, "clustering/ari": adjusted_rand_score}


def results(seed: int, *, images: int = 60, texts: int = 40, skill: float = 0.0) -> SampleResults:
    """Made up; ranks are lower and answers better with more skill."""
    generator = np.random.default_rng(seed)

    def column(name: str, number: int):
        if name.endswith("class"):
            return generator.integers(12, size=number)
        if name.endswith("correct"):
            return generator.random(number) < 0.4 + skill / 2
        return (generator.integers(12, size=number) * (1 - skill)).astype(np.int64)

    ids = (np.array([f"{kind} {row}" for row in range(60)], object) for kind in ("image", "text"))
    return SampleResults(
        images={"sample_id": next(ids)[:images]} | {n: column(n, images) for n in IMAGE_COLUMNS},
        texts={"sample_id": next(ids)[:texts], "text_to_image_rank": column("rank", texts)},
    )


def test_the_bootstrap_draws_the_same_samples_for_every_model():
    """Against a loop over draws and rows; the order of a model's samples changes nothing."""
    one = results(0)
    backwards = SampleResults(
        images={name: column[::-1] for name, column in one.images.items()},
        texts={name: column[::-1] for name, column in one.texts.items()},
    )
    drawn, other = (resampled(of, draws=30, seed=4) for of in (one, backwards))
    assert drawn.keys() == {*MEANS, *SCORES}
    order = np.argsort(one.images["sample_id"])
    for name, score in SCORES.items():
        generator = np.random.default_rng([4, 0])
        for value in drawn[name]:
            rows = order[generator.integers(len(order), size=len(order))]
            expected = score(one.images["class"][rows], one.images["cluster"][rows])
            assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(other[name], drawn[name])
    for metric, mean in MEANS.items():
        rows = one.texts if "text_to_image" in metric else one.images
        order = np.argsort(rows["sample_id"])
        generator = np.random.default_rng([4, int(rows is one.texts)])
        for value in drawn[metric]:
            picked = order[generator.integers(len(order), size=len(order))]
            column = rows[mean.column][picked]
            right = column if mean.k is None else column < mean.k
            classes = rows[mean.by][picked] if mean.by else np.zeros(len(order))
            shares = [right[classes == name].mean() for name in np.unique(classes)]
            assert value == pytest.approx(np.mean(shares))
        np.testing.assert_allclose(other[metric], drawn[metric])


def test_results_of_any_tasks_are_kept(tmp_path):
    """Without texts, or with some columns; what is there can be resampled."""
    whole, path = results(0), tmp_path / "own-test.parquet"
    names = ("sample_id", "knn_correct", "image_to_text_rank")
    SampleResults(images={name: whole.images[name] for name in names}).write(path)
    read = SampleResults.read(path)
    assert (*read.images,) == ("sample_id", "image_to_text_rank", "knn_correct")
    assert read.means() == [*(f"retrieval/image_to_text@{k}" for k in (1, 5, 10)), "knn/acc1"]
    found = resampled(read, draws=5)
    assert [*found] == read.means()
    np.testing.assert_array_equal(found["knn/acc1"], resampled(whole, draws=5)["knn/acc1"])


def test_damaged_results_of_samples_are_refused(tmp_path):
    path = tmp_path / "results" / "emoji-test.parquet"
    results(0).write(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"emoji-test.parquet: not the results[^\n]*$"):
        SampleResults.read(path)


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


def test_runs_of_several_seeds_are_paired_by_seed(tmp_path, capsys):
    """Only common seeds count, in any order; the mark follows the interval, which is SciPy's."""
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
    compare.show(compared(*folders))
    assert "differences are of the seeds that both have" in " ".join(
        capsys.readouterr().out.split()
    )


def test_one_seed_is_compared_over_its_samples(tmp_path, capsys):
    """By bootstrap if both runs have results of the same samples, for metrics that have such."""
    one, two = results(0), results(1, skill=0.5)
    files = {"a": one, "b": two, "c": None, "d": results(2, images=50)}
    folders = [made(tmp_path / name, name, 3, 0.4, of) for name, of in files.items()]
    first, second, third, fourth = compared(*folders)
    found = second["metrics"]["eval/emoji/knn/acc1"]["difference"]
    draws = [resampled(of, draws=1000)["knn/acc1"] for of in (one, two)]
    expected = np.quantile(draws[1] - draws[0], [0.025, 0.975])
    assert found["interval"] == pytest.approx(tuple(expected))
    assert (found["n"], found["kind"]) == (60, "bootstrap")
    for entry, key in ((second, "modality_gap/gap"), (third, "knn/acc1"), (fourth, "knn/acc1")):
        found = entry["metrics"][f"eval/emoji/{key}"]["difference"]
        assert (found["interval"], found["kind"], found["beyond"]) == (None, None, False)
    assert "difference" not in first["metrics"]["eval/emoji/knn/acc1"]
    compare.show([first, second])
    assert "bootstrap over 60 test samples" in " ".join(capsys.readouterr().out.split())


def test_a_run_counts_once(tmp_path):
    """However it is named; runs of equal name and seed elsewhere stay apart."""
    one, two = (made(tmp_path / folder, "x", 0, 0.4) for folder in ("one", "two"))
    (entry,) = compared(one, one, tmp_path / "two" / ".." / "one")
    assert (entry["name"], entry["seeds"]) == ("x", [0])
    names = [entry["name"] for entry in compared(one, two)]
    assert names == [f"x ({one})", f"x ({two})"]


@pytest.mark.parametrize("odd", [math.nan, math.inf, None, 1e308, -1e308])
def test_odd_numbers_in_results_are_shown_or_left_out(tmp_path, odd, capsys):
    """None of them is a traceback, in the table or as JSON, with one seed or several."""
    folders = [made(tmp_path / f"a{seed}", "a[b]\x1b", seed, 1e308) for seed in (0, 1)]
    folders += [made(tmp_path / f"b{seed}", "b", seed, odd) for seed in (0, 1)]
    for entries in (compared(*folders), compared(folders[0], folders[2])):
        compare.show(entries)
        shown = capsys.readouterr().out
        assert "a[b]?" in shown
        assert "\x1b]" not in shown
        assert json.loads(to_json(entries))[1]["name"] == "b"


def test_data_sets_are_told_apart(tmp_path, capsys):
    """By name, as soon as there are two."""
    path = made(tmp_path / "a", "a", 0, 0.5) / "results.json"
    compare.show(compared(path.parent))
    assert "emoji: " not in capsys.readouterr().out
    more = '"eval/own/knn/acc1": 0.25, "eval/emoji/knn'
    path.write_text(path.read_text().replace('"eval/emoji/knn', more))
    compare.show(compared(path.parent))
    assert re.search(r"own: kNN .*25.0 [^\0]*emoji: kNN .*50.0", capsys.readouterr().out)


@pytest.mark.parametrize("odd", ['"many"', "[1]", "1" + "0" * 400])
def test_what_is_no_number_in_results_is_refused(tmp_path, odd):
    path = made(tmp_path / "a", "a", 0, 0.5) / "results.json"
    path.write_text(path.read_text().replace("0.5", odd))
    with pytest.raises(ValueError, match="not the results of a run"):
        compare.read_results(path.parent)


def test_held_out_pairs_are_those_that_the_run_was_judged_by(tmp_path):
    """Not other data that `evaluate` called the same, in earlier versions."""
    folder = made(tmp_path / "run", "a", 0, 0.5)
    (folder / "results").mkdir()
    for name in ("emoji-test", "emoji-validation", "validation-test", "validation-validation"):
        (folder / "results" / f"{name}.parquet").touch()
    samples = compare.read_results(folder)["samples"]
    chosen = {name: file.name for name, file in samples.items()}
    assert chosen == {
        "emoji": "emoji-test.parquet",
        "validation": "validation-validation.parquet",
    }
