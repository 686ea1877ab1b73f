"""The sentences and the table say what `compare` has found."""

import re

import numpy as np
import pytest

from protoclip.evaluation.metrics import (
    SampleResults,
    compute_influences,
    interval,
    interval_of_difference,
)
from protoclip.evaluation.paired import RunResults
from protoclip.results.compare import compare_runs
from protoclip.results.table import compare_headlines, shorten, table_of_runs, write_minus

KNN, GAP = "eval/emoji/knn/acc1", "eval/emoji/modality_gap/gap"


def run(tmp_path, name: str, share: float, *, seed: int = 0, gap: float = 0.5, prefix: str = ""):
    """Results of a run that classifies this share of 400 images right, from a place of its own."""
    file = tmp_path / f"{name}-{seed}.parquet"
    ids = np.array([f"{prefix}{row}" for row in range(400)], object)
    right = np.roll(np.arange(400) < 400 * share, 130 * "ABC".index(name))
    SampleResults(images={"sample_id": ids, "knn_correct": right}).write(file)
    return RunResults(
        name=name,
        seed=seed,
        folder=str(tmp_path / f"{name}-{seed}"),
        samples={"emoji": file},
        metrics={KNN: share, GAP: gap},
    )


@pytest.mark.parametrize(
    ("shares", "verdict", "sentence"),
    [
        ({"A": 0.5, "B": 0.75}, "better", "B is better than A on .*: 75.0 against 50.0 percent, "),
        ({"A": 0.75, "B": 0.5}, "better", "A is better than B on .*: 75.0 against 50.0 percent, "),
        ({"A": 0.5, "B": 0.51}, "open", "B and A cannot be told apart on .*: 51.0 against 50.0 "),
        ({"A": 0.51, "B": 0.5}, "open", "A and B cannot be told apart on .*: 51.0 against 50.0 "),
        ({"A": 0.9, "B": 0.3, "C": 0.6}, "better", "A is better than C on .*: 90.0 against 60.0 "),
        ({"A": 0.3, "B": 0.9, "C": 0.6}, "better", "B is better than A on .*: 90.0 against 30.0 "),
    ],
)
def test_the_best_model_is_held_against_the_first_or_the_next(shares, verdict, sentence, tmp_path):
    """With the interval of the difference in this direction."""
    runs = {name: run(tmp_path, name, share) for name, share in shares.items()}
    (found,) = compare_headlines(compare_runs(list(runs.values())))
    said = f"{found.model} {found.rest}"
    assert found.verdict == verdict
    assert re.match(sentence, said)
    best, other = said[0], re.findall(r"\b[ABC]\b", said)[1]
    files = [runs[n].samples["emoji"] for n in (best, other)]
    moved = [compute_influences(SampleResults.read(file))[0] for file in files]
    gain = 100 * (shares[best] - shares[other])
    low, high = interval_of_difference([gain], 100 * (moved[0]["knn/acc1"] - moved[1]["knn/acc1"]))
    numbers = f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}], paired over 400 test samples."
    assert said.endswith(write_minus(numbers))


def test_without_a_paired_interval_nothing_is_better(tmp_path):
    entries = compare_runs([run(tmp_path, "A", 0.5), run(tmp_path, "B", 0.9, seed=1)])
    (found,) = compare_headlines(entries)
    assert found.verdict == "open"
    assert "(no interval: the runs share no seed" in found.rest


@pytest.mark.parametrize("seed", [0, 1])
def test_what_other_samples_evaluated_is_said_and_not_ranked(seed, tmp_path):
    """The easier samples may be the others' only merit; whether the runs share a seed or not."""
    runs = {"A": run(tmp_path, "A", 0.5), "B": run(tmp_path, "B", 0.9, seed=seed, prefix="other ")}
    entries = compare_runs([*runs.values()])
    (found,) = compare_headlines(entries)
    assert found.verdict == "open"
    assert found.rest.endswith(
        "+40.0 points (no interval: they were evaluated on different samples)."
    )
    knn, _ = table_of_runs(entries).rows
    assert [(cell.value, cell.is_best) for cell in knn.cells] == [("50.0", False), ("90.0", False)]


@pytest.mark.parametrize(("number", "shown"), [(100, " among 100"), (200, "")])
def test_a_recall_names_its_candidates_where_all_runs_have_as_many(number, shown):
    recall = "eval/validation/retrieval/text_to_image"
    runs = [
        RunResults(
            name=name,
            seed=0,
            folder=name,
            metrics={f"{recall}@1": 0.5},
            facts={"candidates": {recall: among}},
        )
        for name, among in (("A", 100), ("B", number))
    ]
    (row,) = table_of_runs(compare_runs(runs)).rows
    assert row.heading[-1].partition("@1")[2] == shown


def test_the_table_has_values_intervals_and_differences(tmp_path):
    """Of one seed the interval over test samples, as `evaluate` shows it; of several over both."""
    one = run(tmp_path, "A", 0.5)
    two = [run(tmp_path, "B", 0.75, seed=seed, gap=0.25) for seed in (0, 1)]
    knn, gap = table_of_runs(compare_runs([one, *two])).rows
    samples = SampleResults.read(one.samples["emoji"])
    low, high = (100 * end for end in interval(0.5, compute_influences(samples)[0]["knn/acc1"]))
    first, second = knn.cells
    assert (knn.heading, gap.heading) == (["kNN"], ["gap"])
    assert (first.value, first.interval) == ("50.0", f"[{low:.1f}, {high:.1f}]")
    assert (first.difference, first.is_best, second.is_best) == ("", False, True)
    assert (second.value, second.interval, second.is_clear) == ("75.0", "[70.5, 79.0] ± 0.0", True)
    assert second.difference.startswith("+25.0† [")
    assert [cell.value for cell in gap.cells] == ["0.500", "0.250"]
    assert (gap.cells[1].difference, gap.cells[1].is_best) == ("-0.250†", False)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a  b\n c", "a b c"),
        ("x" * 10**6, "x" * 299 + "…"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
        ("a" * 300, "a" * 300),
    ],
)
def test_texts_are_shown_on_one_line_and_cut(text, result):
    assert shorten(text) == result
