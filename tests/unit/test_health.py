"""Training that goes wrong is noticed, named and given up in time; training that is well is not."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from protoclip.training.health import (
    MOST_SKIPPED,
    QUIET_STEPS,
    Average,
    Diverged,
    Health,
    Outcome,
    Watch,
    out_of_memory,
)

NAN, INF = math.nan, math.inf


def outcome(step: int, loss: float = 1.0, gradient_norm: float = 1.0) -> Outcome:
    ids = [f"{step}/a", f"{step}/b"]
    return Outcome(step=step, loss=loss, gradient_norm=gradient_norm, sample_ids=ids)


@pytest.mark.parametrize(
    ("loss", "gradient_norm", "taken"),
    [(1.0, 1.0, True), (NAN, 1.0, False), (INF, 1.0, False), (1.0, NAN, False), (1.0, INF, False)],
)
def test_a_step_is_taken_if_loss_and_gradient_are_finite(
    loss: float, gradient_norm: float, taken: bool, tmp_path: Path
) -> None:
    """And skipped and counted otherwise."""
    health = Health(tmp_path / "diverged.json")
    found = health.check_step(step=1, loss=loss, gradient_norm=gradient_norm, sample_ids=["a"])
    assert found == taken
    assert health.skipped == health.in_a_row == int(not taken)
    assert not (tmp_path / "diverged.json").exists()


def test_ten_in_a_row_end_the_run(tmp_path: Path) -> None:
    """Nine and a step that is taken do not; ten do, in one line that says what, when and what to
    do, with the losses and the last batch's samples in a file that any reader of JSON reads."""
    report = tmp_path / "diverged.json"
    health = Health(report)
    assert MOST_SKIPPED == 10
    assert health.check([outcome(step, loss=NAN) for step in range(1, 10)]) == 9
    assert health.check([outcome(10)]) == 0
    assert (health.skipped, health.in_a_row) == (9, 0)
    for step in range(11, 20):
        assert not health.check_step(step=step, loss=1.5, gradient_norm=INF, sample_ids=["a"])
    with pytest.raises(Diverged) as error:
        health.check_step(step=20, loss=NAN, gradient_norm=NAN, sample_ids=["x/1", "x/2"])
    assert (health.skipped, health.in_a_row) == (19, 10)
    assert isinstance(error.value, ValueError)
    assert str(error.value) == (
        "training has diverged: loss or gradient not finite in 10 steps in a row, up to step 20; "
        "lower optim.learning_rate or train in fp32 "
        f"(the samples of the last batch are in {report})"
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(report.read_text(), parse_constant=refuse) == {
        "step": 20,
        "losses": ["1.5"] * 9 + ["nan"],
        "gradient_norms": ["inf"] * 9 + ["nan"],
        "sample_ids": ["x/1", "x/2"],
    }


def test_late_checks_count_as_prompt_ones(tmp_path: Path) -> None:
    """Handed in a step at a time or many together, the counts are the same, and so is the step at
    which the run is given up."""
    generator = random.Random(0)
    outcomes = [outcome(step, loss=generator.choice([1.0, NAN])) for step in range(1, 41)]
    outcomes += [outcome(step, gradient_norm=INF) for step in range(41, 60)]
    prompt, late = Health(tmp_path / "prompt.json"), Health(tmp_path / "late.json")
    skipped = [prompt.check([found]) != 0 for found in outcomes[:45]]
    assert late.check(outcomes[:17]) + late.check(outcomes[17:45]) == sum(skipped)
    assert (prompt.skipped, prompt.in_a_row) == (late.skipped, late.in_a_row)
    for found in outcomes[45:49]:
        prompt.check([found])
    with pytest.raises(Diverged, match="up to step 50;"):
        prompt.check([outcomes[49]])
    with pytest.raises(Diverged, match="up to step 50;"):
        late.check(outcomes[45:])
    assert (tmp_path / "prompt.json").read_text() == (tmp_path / "late.json").read_text()


def test_a_run_that_goes_on_counts_on(tmp_path: Path) -> None:
    """From two plain numbers."""
    before = Health(tmp_path / "diverged.json")
    before.check([outcome(step, loss=NAN) for step in range(1, 8)])
    health = Health(tmp_path / "diverged.json", skipped=before.skipped, in_a_row=before.in_a_row)
    health.check([outcome(8, loss=NAN), outcome(9, loss=NAN)])
    assert (health.skipped, health.in_a_row) == (9, 9)
    with pytest.raises(Diverged, match="10 steps in a row, up to step 10"):
        health.check([outcome(10, loss=NAN)])


def test_a_report_that_cannot_be_written_is_part_of_the_line(tmp_path: Path) -> None:
    """The run ends for the reason it ends for."""
    health = Health(tmp_path / "nowhere" / "diverged.json", in_a_row=9)
    with pytest.raises(Diverged, match=r"up to step 3; .* could not be written: .*No such file"):
        health.check([outcome(3, loss=NAN)])


def noisy(count: int, *, level: float = 2.0, noise: float = 0.2) -> list[float]:
    generator = random.Random(0)
    return [generator.gauss(level, noise) for _ in range(count)]


def told(losses: list[float], **others: float) -> list[str]:
    """All warnings about a course of losses, logged every ten steps."""
    watch = Watch()
    return [
        line
        for number, loss in enumerate(losses)
        for line in watch.warnings(10 * number, {"train/loss/total": loss, **others})
    ]


def test_a_loss_spike_is_named() -> None:
    """With its step, value and mean, and what to do."""
    (line,) = told([*noisy(60), 6.0, *noisy(5)])
    assert line.startswith("step 600: train/loss/total is 6, where its recent mean is 2")
    assert "lower optim.learning_rate" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "losses",
    [
        [*noisy(40), 6.0],  # too early to tell
        [*noisy(500), 3.9],  # far above the noise, but not twice the mean
        [*noisy(500, level=0.1, noise=0.1), 0.4],  # four times the mean, but within the noise
        [5 * 0.99**number for number in range(1000)],  # a loss that falls
        [*noisy(60), NAN, *noisy(60)],  # not finite: for `Health` to count
    ],
    ids=["early", "below twice", "noise", "falling", "nan"],
)
def test_a_loss_as_usual_is_no_spike(losses: list[float]) -> None:
    """Noise, a falling loss and few observations say nothing."""
    assert told(losses) == []


def test_a_stage_that_adds_a_loss_is_no_spike() -> None:
    """The total then is a sum of more; it is compared with its like alone, also later again."""
    watch = Watch()

    def look(step: int, total: float, *terms: str) -> list[str]:
        losses = {f"train/loss/{term}": 1.0 for term in terms}
        return watch.warnings(step, {"train/loss/total": total, **losses})

    lines = []
    for step in range(100):
        lines += look(step, 5.0, "info_nce")
    for step in range(100, 200):
        lines += look(step, 20.0, "info_nce", "prototypical")
    for step in range(200, 300):
        lines += look(step, 5.0, "info_nce")
    assert lines == []
    assert len(look(300, 20.0, "info_nce")) == 1


def test_an_average_is_exact_at_first_and_forgets_later() -> None:
    """Of fifty values it is their mean and deviation; after some hundreds more, that of these."""
    values = noisy(50)
    average = Average()
    for value in values:
        average.add(value)
    assert average.mean == pytest.approx(np.mean(values))
    assert average.deviation == pytest.approx(np.std(values))
    for value in noisy(500, level=7.0):
        average.add(value)
    assert average.mean == pytest.approx(7.0, abs=0.1)
    assert average.deviation == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize(
    ("name", "bad", "good", "what"),
    [
        ("train/spread/image", 0.009, 0.01, "raise optim.warm_up_steps"),
        ("train/spread/text", -1e-7, 0.5, "collapse"),
        ("train/prototypes/empty/teacher", 0.51, 0.5, "prototypes.number"),
        ("train/prototypes/dead/text", 0.76, 0.75, "prototypes.source"),
    ],
)
def test_what_is_wrong_is_named_and_what_to_do(
    name: str, bad: float, good: float, what: str
) -> None:
    """One line with step, metric and value, on the wrong side of the limit alone."""
    (line,) = Watch().warnings(500, {name: bad, "train/modality_gap": 0.0})
    assert line.startswith(f"step 500: {name} is {bad:.2g}")
    assert what in line
    assert "\n" not in line
    assert Watch().warnings(500, {name: good}) == []


def test_fresh_towers_have_not_collapsed() -> None:
    """Random weights give nearly equal features to all inputs, until they have learnt a little."""
    watch = Watch()
    assert watch.warnings(10, {"train/spread/image": 0.001}) == []
    assert len(watch.warnings(200, {"train/spread/image": 0.001})) == 1


def test_a_warning_is_not_repeated_for_a_thousand_steps() -> None:
    """Each metric has a time of its own."""
    watch = Watch()
    assert QUIET_STEPS == 1000
    lines = []
    for step in range(300, 3300, 10):
        spread = {"train/spread/image": 0.0, "train/spread/text": 0.0 if step >= 800 else 1.0}
        lines += watch.warnings(step, spread)
    assert [line.split(" is ")[0] for line in lines] == [
        "step 300: train/spread/image",
        "step 800: train/spread/text",
        "step 1300: train/spread/image",
        "step 1800: train/spread/text",
        "step 2300: train/spread/image",
        "step 2800: train/spread/text",
    ]


def allocation_error() -> RuntimeError:
    """What PyTorch raises on a CPU."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**14)
    return error.value


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "on the device"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "on the device"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "on the device"),
        (allocation_error(), "data.cache_gb"),
        (MemoryError(), "data.workers"),
    ],
)
def test_memory_that_ran_out_is_told_with_the_settings_to_lower(
    error: BaseException, names: str
) -> None:
    """On the device or in main memory, in one line."""
    line = out_of_memory(error)
    assert line is not None
    assert line.startswith("out of memory")
    assert names in line
    assert "episodes.micro_batch_size" in line
    assert "episodes.batch_size" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_about_memory(error: BaseException) -> None:
    """They stay what they are."""
    assert out_of_memory(error) is None
