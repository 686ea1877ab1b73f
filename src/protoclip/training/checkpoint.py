"""Checkpoints: folders that appear whole or not at all, with a checksum of every file.

Weights and other tensors are safetensors and everything else is JSON, so loading one runs no code
from it. `model.safetensors` and `model.json` are what using the model takes, with `checksums.json`
to check them; going on with the run takes `optimizer.safetensors`, which the first process alone
reads, `resume.safetensors` and `state.json` besides.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from protoclip.files import checksum, naming, sync_folder, to_json
from protoclip.models.loading import CHECKSUMS, MODEL, OPTIMIZER, RESUME, STATE, WEIGHTS

# Of what going on takes; 2 keys the optimizer's tensors by parameter name, in a file of their own.
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint holds besides the model's description.

    Attributes:
        weights: The model's state dict.
        optimizer: `name/moment` for each parameter that has moments.
        tensors, facts: What else going on with the run takes; facts are JSON.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Room that its tensors take."""
        parts = (self.weights, self.optimizer, self.tensors)
        return sum(tensor.nbytes for part in parts for tensor in part.values())


def write_checkpoint(folder: Path, contents: Contents, description: Mapping[str, Any]) -> None:
    """Write a checkpoint beside its final place, to the disk, and give it its name.

    Args:
        folder: The checkpoint's folder; replaced when it exists.
        contents: What it is to hold.
        description: What builds the same architecture again; JSON.

    Raises:
        OSError: The disk is full or cannot be written; names the file. What was there before stays
            whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    checksums: dict[str, str] = {}

    def write(name: str, data: bytes) -> None:
        checksums[name] = checksum(data)
        with naming(temporary / name), (temporary / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    try:
        temporary.mkdir()
        # One after another, so that one file's bytes at a time are in memory besides the tensors.
        for name, tensors in (
            (WEIGHTS, contents.weights),
            (OPTIMIZER, contents.optimizer),
            (RESUME, contents.tensors),
        ):
            write(name, save({key: tensor.contiguous() for key, tensor in tensors.items()}))
        write(MODEL, encoded(description))
        write(STATE, encoded(contents.facts))
        write(CHECKSUMS, encoded(checksums))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def encoded(facts: Mapping[str, Any]) -> bytes:
    return (to_json(facts, indent=2) + "\n").encode()
