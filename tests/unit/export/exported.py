"""Runs to export, and the examples in the cards of exported folders."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from protoclip.config import ModelConfig
from protoclip.models.checkpoint import write_checkpoint
from testing import build_model


def save_run(folder: Path, config: ModelConfig, *, alpha: float | None = None) -> Path:
    """A run with one checkpoint, with `alpha` one of chosen weights; returns its folder."""
    described = {"model": asdict(config)} | ({} if alpha is None else {"alpha": alpha})
    facts = {"model.json": described, "state.json": {}}
    weights = build_model(config, seed=1).state_dict()
    tensors = {"model.safetensors": weights, "resume.safetensors": {}}
    write_checkpoint(folder / "checkpoints" / "step-000000004", tensors, facts)
    return folder


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = wanted.norm(dim=1).mean()
    torch.testing.assert_close(found / scale, wanted / scale, atol=tolerance, rtol=0)


def run_examples(folder: Path) -> dict[str, dict[str, Any]]:
    """The names that the code for each reader in a card leaves behind, by format."""
    card = (folder / "README.md").read_text()
    formats = re.findall(r"^\| (\w+) \| .* \| [-\d].* \| [-\d].* \|$", card, re.MULTILINE)
    left = [run_code(folder, block) for block in blocks_of(card)]
    return dict(zip(formats, left, strict=True))


def blocks_of(card: str) -> list[str]:
    """The code in a card, a reader each."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_code(folder: Path, block: str) -> dict[str, Any]:
    """The names that one of these blocks leaves behind."""
    lines = [line for line in block.splitlines() if line]
    assert len(lines) <= (15 if "onnx" in block else 10)
    left: dict[str, Any] = {}
    with torch.inference_mode():
        exec(block.replace(f'folder = "{folder.name}"', f"folder = {str(folder)!r}"), left)
    return left
