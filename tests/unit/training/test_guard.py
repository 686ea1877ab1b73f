"""The guard ends training that diverged; the watch warns, and only when it should."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protoclip.training.guard import MOST_SKIPPED, NonFiniteGuard, out_of_memory
from protoclip.training.symptoms import QUIET_STEPS, Watch

NAN, INF = math.nan, math.inf


def guard_of(folder: Path, *, fp16: bool = False) -> NonFiniteGuard:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    return NonFiniteGuard(optimizer, scaler, folder / "diverged.json")


def step(guard: NonFiniteGuard, number: int, loss: float, norm: float = 1.0) -> Tensor:
    return guard.step(number, torch.tensor(loss), torch.tensor(norm), [f"x/{number}"])


@pytest.mark.parametrize(
    ("loss", "norm", "taken"),
    [
        *[(1.0, 1.0, True), (NAN, 1.0, False), (INF, 1.0, False), (1.0, NAN, False)],
        *[(1.0, INF, False), (1.0, 0.0, False)],
    ],
)
@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_is_taken_if_loss_and_gradient_are_finite(loss, norm, taken, fp16, tmp_path):
    """Otherwise parameters stay as they are and the step is counted. In fp16 too, where the scaler
    of the losses looks at this rank's gradients alone, and finds these finite. A gradient of zero
    is no fault: it is counted apart, and the scale stays.
    """
    at_fault = not taken and norm != 0
    guard = guard_of(tmp_path, fp16=fp16)
    scale = guard.scaler.get_scale()
    assert bool(step(guard, 1, loss, norm)) == taken
    assert (guard.scaler.get_scale() < scale) == (fp16 and at_fault)
    (parameter,) = guard.optimizer.param_groups[0]["params"]
    assert bool((parameter != 0).all()) == taken
    assert guard.skipped == guard.in_a_row == int(at_fault)
    assert guard.without_gradient == int(norm == 0)
    assert not guard.report.exists()


def test_ten_steps_in_a_row_end_the_run(tmp_path):
    """Not nine and a finite one. Those without a gradient between them are as if left out."""
    guard = guard_of(tmp_path)
    assert MOST_SKIPPED == 10
    for number in range(1, 11):
        step(guard, number, NAN if number < 10 else 1.0)
    expected = {"skipped": 9, "without_gradient": 0, "in_a_row": 0, "row": []}
    assert guard.state_dict() == expected
    for number in range(11, 20):
        step(guard, number, 1.5, INF)
        step(guard, number, 0.0, 0.0)
    state, guard = json.loads(json.dumps(guard.state_dict())), guard_of(tmp_path)
    guard.load_state_dict(state)  # as of a run that goes on
    with pytest.raises(ValueError, match=r"^training has diverged: [^\n]* in 10 steps") as error:
        step(guard, 20, NAN, NAN)
    assert (guard.skipped, guard.in_a_row) == (19, 10)
    assert guard.summary(29, None) == (
        "19 of 29 steps were skipped: their loss or gradient was not finite; 9 of 29 steps had no "
        "gradient and changed nothing, as where no teacher knows a sample of the batch"
    )
    assert "up to step 20; go on with --run.precision fp32" in str(error.value)
    assert str(error.value).endswith(f"(the samples of the last batch are in {guard.report})")
    assert json.loads(guard.report.read_text()) == {
        "step": 20,
        "losses": ["1.5"] * 9 + ["nan"],
        "gradient_norms": ["inf"] * 9 + ["nan"],
        "sample_ids": ["x/20"],
    }


def test_steps_that_wait_count_like_prompt_ones(tmp_path, monkeypatch):
    """On a GPU the host looks at many steps at once; counts and the last step are the same."""
    generator = random.Random(0)
    losses = [generator.choice([1.0, NAN]) for _ in range(40)] + [NAN] * 20
    look, found = NonFiniteGuard.look, []
    for late in (False, True):
        monkeypatch.setattr(NonFiniteGuard, "look", (lambda guard: None) if late else look)
        guard = guard_of(tmp_path)
        with pytest.raises(ValueError, match="diverged") as error:  # noqa: PT012
            for number, loss in enumerate(losses, start=1):
                step(guard, number, loss)
            look(guard)
        found.append((str(error.value), guard.state_dict(), guard.report.read_text()))
    assert found[0] == found[1]


def noisy(count: int, *, level: float = 2.0, noise: float = 0.2) -> list[float]:
    generator = random.Random(0)
    return [generator.gauss(level, noise) for _ in range(count)]


def warned(losses: list[float]) -> list[str]:
    """All warnings about a series of losses, logged every ten steps."""
    watch = Watch()
    return [
        line
        for number, loss in enumerate(losses)
        for line in watch.warnings(10 * number, {"train/loss/total": loss})
    ]


@pytest.mark.parametrize(
    "losses",
    [
        [*noisy(40), 6.0],  # too early to tell
        [*noisy(500), 3.9],  # far above the noise, but not twice the mean
        [*noisy(500, level=0.1, noise=0.1), 0.4],  # four times the mean, but within the noise
        [5 * 0.99**number for number in range(1000)],  # a loss that falls
        [*noisy(60), NAN, *noisy(60)],  # not finite: the guard counts it
    ],
    ids=["early", "below twice", "noise", "falling", "nan"],
)
def test_a_loss_spike_gets_a_warning_and_nothing_else(losses):
    """One line with step, value, mean, and what to do."""
    assert warned(losses) == []
    (line,) = warned([*noisy(60), 6.0, *noisy(5)])
    assert line.startswith("step 600: train/loss/total is 6, its recent mean is 2")
    assert "lower optim.learning_rate" in line


def test_a_stage_with_one_more_loss_is_no_spike():
    """A total is only compared with totals of the same losses."""
    watch, lines = Watch(), []
    for number in range(301):
        metrics = {"train/loss/total": 5.0, "train/loss/info_nce": 1.0}
        if 100 <= number < 200:
            metrics |= {"train/loss/total": 20.0, "train/loss/prototypical": 1.0}
        lines += watch.warnings(number, metrics)
    assert lines == []
    assert len(watch.warnings(301, metrics | {"train/loss/total": 20.0})) == 1


@pytest.mark.parametrize(
    ("name", "bad", "good", "advice"),
    [
        ("train/spread/image", 0.009, 0.01, "raise optim.warm_up_steps"),
        ("train/spread/text", -1e-7, 0.5, "collapse"),
        ("train/prototypes/empty/teacher", 0.51, 0.5, "prototypes.number"),
        ("train/prototypes/dead/text", 0.76, 0.75, "prototypes.source"),
    ],
)
def test_a_bad_metric_gets_a_warning(name, bad, good, advice):
    """One line with step, metric, value and advice, on the wrong side of the limit only."""
    (line,) = Watch().warnings(500, {name: bad, "train/modality_gap": 0.0})
    assert line.startswith(f"step 500: {name} is {bad:.2g}")
    assert advice in line
    assert "\n" not in line
    assert Watch().warnings(500, {name: good}) == []


def test_a_warning_is_not_repeated_for_a_thousand_steps():
    """For each metric on its own. Fresh towers, whose features are nearly equal, get none."""
    watch = Watch()
    assert QUIET_STEPS == 1000
    assert watch.warnings(10, {"train/spread/image": 0.0}) == []
    lines = []
    for step in range(300, 3300, 10):
        spread = {"train/spread/image": 0.0, "train/spread/text": 0.0 if step >= 800 else 1.0}
        lines += watch.warnings(step, spread)
    steps = [(int(line.split()[1][:-1]), line.split()[2][-5:]) for line in lines]
    assert steps == [
        (number, "image" if number % 1000 == 300 else "/text") for number in range(300, 3300, 500)
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
        (RuntimeError("unable to mmap 9 bytes from file </x>: Cannot allocate memory (12)"), "_gb"),
        (RuntimeError("could not create a primitive"), "data.cache_gb"),  # oneDNN
        (MemoryError(), "data.workers"),
        (RuntimeError("shapes do not fit"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_out_of_memory_names_the_settings_to_lower(error, names):
    line = out_of_memory(error)
    if names is None:
        assert line is None
    else:
        assert line.startswith("out of memory")
        assert ": set episodes.micro_batch_size" in line
        assert names in line
        assert "\n" not in line
