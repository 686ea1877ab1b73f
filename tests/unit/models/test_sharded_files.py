"""Tensors in folders of shards, as a sharded model writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from protoclip.models.checkpoint import fill_shards, read_tensors, tensor_names


def write(folder: Path, *offsets: Any) -> None:
    """Shards with two rows of a tensor each, that say they are at these offsets."""
    folder.mkdir()
    for number, offset in enumerate(offsets):
        header = json.dumps({"a": {"saved_offsets": offset}})
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
    fill_shards(tmp_path / "model.safetensors", {"a": part})
    assert torch.equal(part, whole["a"])
