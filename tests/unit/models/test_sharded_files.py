"""Folders of shards that others made, or that are damaged: one line, and nothing of them runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from protoclip.models import shards
from protoclip.models.saved import read_tensors, tensor_names


def write(folder: Path, *offsets: Any, info: str | None = None) -> None:
    """Shards with two rows of a tensor each, that say they are at these offsets."""
    folder.mkdir()
    for number, offset in enumerate(offsets):
        header = json.dumps({"a": {"saved_offsets": offset}}) if info is None else info
        rows = torch.arange(6.0).view(2, 3) + 6 * number
        file = folder / f"shard-{number}.safetensors"
        save_file({"a": rows}, file, {"DCP_SHARDING_INFO": header})


def test_shards_make_up_the_whole(tmp_path):
    write(tmp_path / "model", [0, 0], [2, 0])
    whole = read_tensors(tmp_path / "model.safetensors")
    assert torch.equal(whole["a"], torch.arange(12.0).view(4, 3))
    assert tensor_names(tmp_path / "model.safetensors") == {"a"}
    assert not read_tensors(tmp_path / "model.safetensors", "b")
    part = torch.zeros(4, 3)
    shards.fill(tmp_path / "model", {"a": part})
    assert torch.equal(part, whole["a"])
    with pytest.raises(ValueError, match=r"model: damaged .*Missing key.*: b"):
        shards.fill(tmp_path / "model", {"b": part})


SPOILED: dict[str, Callable[[Path], object]] = {
    "a part is missing": lambda folder: write(folder, [2, 0]),
    "far away": lambda folder: write(folder, [0, 0], [10**15, 0]),
    "before the first": lambda folder: write(folder, [-2, 0]),
    "of other dimensions": lambda folder: write(folder, [0, 0, 0], [5]),
    "a text": lambda folder: write(folder, "ab"),
    "an object": lambda folder: write(folder, {"x": 1}),
    "no JSON": lambda folder: write(folder, None, info="{"),
    "of other tensors": lambda folder: write(folder, None, info="{}"),
    "a list": lambda folder: write(folder, None, info="[1]"),
    "no safetensors": lambda folder: (folder.mkdir(), (folder / "a.safetensors").write_text("x")),
    "a pipe": lambda folder: (folder.mkdir(), os.mkfifo(folder / "a.safetensors")),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_shards_are_refused_in_a_line(name, tmp_path):
    SPOILED[name](tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: damaged \([^\n]+\)$"):
        read_tensors(tmp_path / "model.safetensors")
