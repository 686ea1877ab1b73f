"""The guard ends training that diverged; the watch warns, and only when it should."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from protoclip.training.guard import QUIET_STEPS, Guard, Watch, out_of_memory

NAN, INF = math.nan, math.inf


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Guard(optimizer, scaler, tmp_path / "diverged.json")


def take(guard: Guard, losses: list[float], norm: float = 1.0, first: int = 1) -> None:
    for number, loss in enumerate(losses, start=first):
        guard.step(number, torch.tensor(loss), torch.tensor(norm), [f"x/{number}"])


@pytest.mark.parametrize(
    ("loss", "norm", "taken"),
    [(1.0, 1.0, True), (NAN, 1.0, False), (INF, 1.0, False), (1.0, NAN, False), (1.0, INF, False)],
)
def test_a_step_is_taken_if_loss_and_gradient_are_finite(
    loss: float, norm: float, taken: bool, guard: Guard
) -> None:
    """Otherwise parameters stay as they are and the step is counted."""
    (parameter,) = guard.optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(2)
    take(guard, [loss], norm)
    assert bool((parameter != 0).all()) == taken
    assert guard.skipped == guard.in_a_row == int(not taken)
    assert not guard.report.exists()


def test_ten_steps_in_a_row_end_the_run(guard: Guard) -> None:
    """Not nine and a finite one. A run that goes on counts on. The error is one line; a file has
    the samples of the last batch."""
    take(guard, [NAN] * 9 + [1.0])
    assert guard.state_dict() == {"skipped": 9, "in_a_row": 0}
    guard.load_state_dict({"skipped": 9, "in_a_row": 7})
    take(guard, [NAN] * 2, first=18)
    with pytest.raises(ValueError, match=r"diverged: .* 10 steps in a row, up to step 20") as error:
        take(guard, [1.5], INF, first=20)
    assert "\n" not in str(error.value)
    assert json.loads(guard.report.read_text()) == {"step": 20, "sample_ids": ["x/20"]}
    guard.report = guard.report / "nowhere"
    with pytest.raises(ValueError, match=r"diverged: .* could not be written"):
        take(guard, [NAN], first=21)


def test_steps_that_wait_count_like_prompt_ones(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host looks at many steps at once; counts and the last step are the same."""
    generator = random.Random(0)
    losses = [generator.choice([1.0, NAN]) for _ in range(40)] + [NAN] * 20
    look, ends = Guard.look, []
    for late in (False, True):
        monkeypatch.setattr(Guard, "look", (lambda guard: None) if late else look)
        guard.load_state_dict({"skipped": 0, "in_a_row": 0})
        with pytest.raises(ValueError, match="diverged") as error:  # noqa: PT012
            take(guard, losses)
            look(guard)
        ends.append((str(error.value), guard.state_dict(), guard.report.read_text()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("name", "bad", "good", "advice"),
    [
        ("train/spread/image", 0.009, 0.01, "raise optim.warm_up_steps"),
        ("train/spread/text", -1e-7, 0.5, "collapse"),
        ("train/prototypes/empty/teacher", 0.51, 0.5, "prototypes.number"),
        ("train/prototypes/dead/text", 0.76, 0.75, "optim.heads_lr_scale"),
    ],
)
def test_a_bad_metric_gets_a_warning(name: str, bad: float, good: float, advice: str) -> None:
    """One line with step, metric, value and advice, on the wrong side of the limit only."""
    (line,) = Watch().warnings(500, {name: bad, "train/modality_gap": 0.0})
    assert line.startswith(f"step 500: {name} is {bad:.2g}")
    assert advice in line
    assert "\n" not in line
    assert Watch().warnings(500, {name: good}) == []


def test_a_warning_is_not_repeated_for_a_thousand_steps() -> None:
    """For each metric on its own. Fresh towers, whose features are nearly equal, get none."""
    watch = Watch()
    assert QUIET_STEPS == 1000
    assert watch.warnings(10, {"train/spread/image": 0.0}) == []
    lines = []
    for step in range(300, 1500, 10):
        spread = {"train/spread/image": 0.0, "train/spread/text": 0.0 if step >= 800 else 1.0}
        lines += watch.warnings(step, spread)
    assert [line.split(" is ")[0] for line in lines] == [
        "step 300: train/spread/image",
        "step 800: train/spread/text",
        "step 1300: train/spread/image",
    ]


def allocation_error() -> RuntimeError:
    """What PyTorch raises on a CPU."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**14)
    return error.value


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (allocation_error(), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_out_of_memory_names_the_settings_to_lower(error: BaseException, is_memory: bool) -> None:
    line = out_of_memory(error)
    assert (line is not None) == is_memory
    for name in ("episodes.micro_batch_size", "episodes.batch_size", "data.workers"):
        assert line is None or (name in line and "\n" not in line)
