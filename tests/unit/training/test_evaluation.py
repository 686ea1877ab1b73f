"""Evaluation of a run: WiSE-FT, weights between two ends and which is best; and early stopping."""

import json
import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from protoclip.cli.train import show_metrics, show_results, show_sweep
from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.evaluation.metrics import RECALLS
from protoclip.files import seal
from protoclip.training import evaluate
from protoclip.training.evaluate import (
    ALPHAS,
    FILE,
    EarlyStop,
    RunEvaluator,
    find_best,
    interpolate,
    read_points,
    score_data,
)
from testing import tiny_pairs


@pytest.fixture
def ends(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    def drawn() -> dict[str, Tensor]:
        found = {name: torch.randn(3, 4, generator=generator) for name in ("weight", "w.lora_A.x")}
        found |= {"running_mean": torch.randn(4, generator=generator), "scale": torch.tensor(2.0)}
        return found

    start, end = drawn(), drawn()
    end["frozen"] = start["frozen"] = torch.randn(5, generator=generator)
    start["batches"], end["batches"] = torch.tensor(3), torch.tensor(9)
    return start, end


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_and_statistics_are_interpolate(alpha, ends):
    """As in float64. What did not change is the same at every alpha, and both ends are exact."""
    start, end = ends
    found = interpolate(start, end, alpha)
    for name in ("weight", "running_mean", "scale"):
        expected = (1 - alpha) * start[name].double() + alpha * end[name].double()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
        if alpha in (0, 1):
            assert torch.equal(found[name], (start, end)[int(alpha)][name])
    assert torch.equal(found["frozen"], start["frozen"])
    assert found["batches"] == (9 if alpha else 3)


def test_the_update_of_lora_is_interpolate(generator):
    """The base and the first matrix stay; the second one starts at 0."""
    first = torch.randn(2, 6, generator=generator)
    second = torch.randn(4, 2, generator=generator)
    start = {"w.lora_A.x": first, "w.lora_B.x": torch.zeros(4, 2)}
    end = {"w.lora_A.x": first + 1, "w.lora_B.x": second}
    found = interpolate(start, end, 0.3)
    torch.testing.assert_close(
        found["w.lora_B.x"] @ found["w.lora_A.x"], 0.3 * (second @ (first + 1))
    )


def test_each_data_set_has_one_score():
    """Zero-shot where there are classes, else the mean of the six recalls."""
    recalls = {f"eval/pairs/{name}": 0.1 * place for place, name in enumerate(RECALLS)}
    metrics = {
        **recalls,
        "eval/classes/zero_shot/acc1": 0.7,
        "eval/classes/retrieval/image_to_text@1": 0.2,
        "eval/tags/zero_shot/mean_average_precision": 0.4,
    }
    assert score_data(metrics) == {"pairs": pytest.approx(0.25), "classes": 0.7, "tags": 0.4}


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({0.0: 0.5, 0.5: 0.7, 1.0: 0.6}, 0.5),
        ({0.0: 0.5, 0.3: 0.7, 0.4: 0.7, 1.0: 0.7}, 0.3),  # of equal ones the smallest
        ({0.0: 0.5, 1.0: 0.4}, 0.0),
        ({0.0: 0.5, 0.25: 0.9, 1.0: 0.4}, 0.0),  # asked for, and not of the sweep
        ({}, None),
    ],
)
def test_the_best_alpha(means, expected):
    assert find_best([{"alpha": alpha, "mean": mean} for alpha, mean in means.items()]) == expected


def test_a_sweep_that_ends_at_the_start_says_so(capsys):
    """Not where the user asked for it."""
    points = [{"alpha": alpha, "scores": {"a": 0.5}, "mean": 0.5} for alpha in ALPHAS]
    record = {"rule": "a rule", "points": points}
    for chosen, rule, is_told in ((0.0, 0.0, True), (0.0, 0.5, False), (0.5, 0.5, False)):
        show_sweep({**record, "alpha": chosen, "best_alpha": rule})
        said = capsys.readouterr().out
        assert ("no weights but the start's were best: the model is the start" in said) == is_told


@pytest.mark.parametrize(
    ("alpha", "mean", "clear", "is_told"),
    [
        (1.0, 0.003, False, True),
        (1.0, -0.1, True, True),
        (1.0, 0.1, True, False),
        (0.0, 0.0, False, False),
    ],
)
def test_a_gain_that_is_not_clear_is_told(alpha, mean, clear, is_told, capsys):
    gain = {"mean": mean, "interval": [mean - 0.01, mean + 0.01], "beyond": clear}
    metrics = {"eval/a/knn/acc1": 0.5 + mean}
    results = {"metrics": metrics, "start_metrics": dict.fromkeys(metrics, 0.5), "alpha": alpha}
    show_metrics({**results, "differences": dict.fromkeys(metrics, gain)})
    said = capsys.readouterr().out
    assert ("no gain over the start is clear, so it may be chance" in said) == is_told


def test_known_points_are_those_of_the_data_sets_that_evaluate_now(tmp_path):
    """Of a mixture all sources together; guards may change, also behind the same name.

    Points of cropped images say nothing of squashed ones.
    """
    before = {"alpha": 0.5, "scores": {"validation": 0.5, "old": 0.7}, "mean": 0.6}

    def data(name: str, seed: int = 0, **more: Any) -> EvaluationData:
        split = Split(images=ImageTextPairs(tiny_pairs(4, seed=seed), name="images"))
        return EvaluationData(name=name, splits={"validation": split}, **more)

    def evaluator(*guards: EvaluationData, squashes: bool = False) -> RunEvaluator:
        made = RunEvaluator.__new__(RunEvaluator)
        made.plan = Mock(held_out=[*map(data, ("validation", "validation-a"))], guards=guards)
        made.model = Mock(squashes=squashes)
        return made

    def points(*guards: EvaluationData, step: int = 4, squashes: bool = False) -> Any:
        return read_points(evaluator(*guards, squashes=squashes), tmp_path, step)

    record = {"steps": 4, "points": [before]}
    of_old = {"data": evaluator(data("old")).digest_data()}
    (tmp_path / FILE).write_text(json.dumps(seal(record | of_old)))
    assert points(data("old")) == {0.5: before}
    for guards in ([], ["new"], ["old", "new"]):
        assert points(*map(data, guards)) == {}
    assert points(data("old"), step=5) == {}
    for other in ({"seed": 1}, {"class_names": ["x"]}, {"templates": ["a {c}"]}):
        assert points(data("old", **other)) == {}
    assert points(data("old"), squashes=True) == {}


@pytest.mark.parametrize(
    ("values", "patience", "stops_at", "best"),
    [
        ([0.5, 0.4, 0.3], 2, 2, (0.5, 0)),
        ([0.5, 0.4, 0.6, 0.5, 0.6], 2, 4, (0.6, 2)),  # an equal value is no better one
        ([0.1, 0.2, 0.3, 0.4], 1, None, (0.4, 3)),
        ([0.5, math.nan, 0.6, math.inf], 1, 1, (0.5, 0)),
        ([math.nan, math.nan, math.nan], 2, 2, (None, 0)),
        ([math.nan, 0.5, 0.4], 1, 2, (0.5, 1)),  # the start alone does not end a run
    ],
)
def test_it_stops_after_some_evaluations_without_a_better_value(
    values, patience, stops_at, best, monkeypatch
):
    monkeypatch.setattr(evaluate, "PATIENCE", patience)
    stop = EarlyStop(metric="eval/a/knn/acc1")
    stopped_at = None
    for step, value in enumerate(values):
        stop.observe(step, value)
        if stop.is_due:
            stopped_at = step
            break
        stop = EarlyStop(**vars(stop))
    assert (stopped_at, stop.best, stop.best_step) == (stops_at, *best)


def test_the_ending_of_align_leads_with_how_many_captions_find_their_image(capsys):
    """And leaves out the geometry, which `train` prints."""
    names = ("retrieval/text_to_image@10", "modality_gap/gap")
    search = "eval/validation/retrieval"
    results = {
        "metrics": dict(zip([f"eval/validation/{n}" for n in names], (0.9, 0.3), strict=True)),
        "candidates": {f"{search}/text_to_image": 40, f"{search}/image_to_text": 120},
        "folder": "run",
    }
    show_results(results, as_json=False, in_brief=True)
    first, *others = capsys.readouterr().out.splitlines()
    found = "108 of 120 captions find their image among the first ten of 40 different ones"
    assert first == f"{found}; by chance 30 would"
    assert [line.split()[0] for line in others] == [f"{search}/text_to_image@10", "written"]
    show_results(results, as_json=False)
    assert "modality_gap/gap" in capsys.readouterr().out
