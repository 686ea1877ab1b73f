"""The benchmark for GPUs, in its small form on a CPU."""

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


def test_a_cpu_is_no_card(gpu, capsys, monkeypatch, tmp_path):
    """It agrees with itself, whatever is wrong on a card."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "gpu.md")])
    assert "PyTorch sees no CUDA card here" in capsys.readouterr().err
    assert not (tmp_path / "gpu.md").exists()
