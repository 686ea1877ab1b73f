"""The benchmark for GPUs, in its small form on a CPU."""

import time
from dataclasses import replace

import pytest
import torch

from scripts_as_modules import script
from testing import tiny_config


@pytest.fixture(scope="module")
def gpu():
    with script("benchmarks/gpu.py") as module:
        yield module


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("resume", "rn50")]
FAST = [
    "losses",
    "kmeans",
    "translation",
    "gradcache",
    "loading",
    "clustering",
    "decode",
    "precision",
]


# Not `compile`: the shape checks of the tests would be compiled too.
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_every_part_passes_on_a_cpu(gpu, name, monkeypatch):
    def shorter(**given):
        """Episodes of two steps."""
        config = tiny_config(**given)
        return replace(config, episodes=replace(config.episodes, size=32))

    monkeypatch.setattr(gpu, "tiny_config", shorter)
    rows = list(gpu.PARTS[name].rows(gpu.Machine(device=torch.device("cpu"))))
    assert rows
    failed = [row for row in rows if isinstance(row, gpu.Check) and not row.passed]
    assert not failed
    assert torch.backends.cuda.flash_sdp_enabled()  # or later tests would round otherwise


def test_parts_that_fail_hang_or_raise_leave_the_others_alone(gpu, monkeypatch, tmp_path):
    """Each keeps the rows it had, and says how it ended; the status tells."""
    fine = gpu.Check(what="fine", difference=0.0, bound=0.0)

    def wrong(machine):
        yield fine
        yield gpu.Check(what="wrong", difference=float("nan"), bound=1.0)

    def hangs(machine):
        yield gpu.Figure(what="before it hangs", value="1")
        time.sleep(60)

    def raises(machine):
        yield fine
        raise RuntimeError("one line\nand another")

    def good(machine):
        yield gpu.Figure(what="the last one", value="2")

    parts = {"wrong": wrong, "hangs": hangs, "raises": raises, "good": good}
    budgets = {"hangs": 3.0}
    monkeypatch.setattr(
        gpu,
        "PARTS",
        {
            name: gpu.Part(title=name, budget=budgets.get(name, 30), rows=rows)
            for name, rows in parts.items()
        },
    )
    out = tmp_path / "gpu.md"
    assert gpu.main(["--cpu", "--out", str(out)]) == 1
    text = out.read_text()
    assert "3 checks: 2 pass, 1 fail." in text
    assert "| wrong | nan | 1 | **FAIL** |" in text
    assert "before it hangs" in text
    assert "hangs (cut after 3 s); raises (failed: RuntimeError: one line)." in text
    assert "| the last one | 2 |" in text
    assert gpu.main(["--cpu", "--only", "good", "--out", str(out)]) == 0
    assert gpu.main(["--cpu", "--only", "good", "--minutes", "0", "--out", str(out)]) == 0


def test_a_cpu_is_no_card(gpu, capsys, monkeypatch, tmp_path):
    """It agrees with itself, whatever is wrong on a card."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "gpu.md")])
    assert "PyTorch sees no CUDA card here" in capsys.readouterr().err
    assert not (tmp_path / "gpu.md").exists()


def test_an_unknown_part_is_refused(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "loses"])
    assert "no part 'loses'" in capsys.readouterr().err


def test_a_file_in_no_folder_is_refused_at_once(gpu, capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "missing" / "gpu.md")])
    assert "no folder" in capsys.readouterr().err
