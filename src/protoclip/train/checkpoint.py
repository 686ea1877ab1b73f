"""Checkpoints: a folder with the weights and what is needed to build the model again.

Weights are safetensors and everything else is JSON, so loading one runs no code from it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from protoclip.train.state import TrainState

WEIGHTS, MODEL, STATE = "model.safetensors", "model.json", "state.json"


def save_checkpoint(
    folder: Path, *, model: nn.Module, description: Mapping[str, Any], state: TrainState
) -> None:
    """Write a checkpoint next to its final place and move it there whole.

    Args:
        folder: The checkpoint's folder; replaced when it exists.
        model: Its state dict is saved.
        description: What builds the same architecture again; JSON.
        state: Where the run stands.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, temporary / WEIGHTS)
    (temporary / MODEL).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (temporary / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder or a checkpoint folder.

    Raises:
        ValueError: There is none.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such run or checkpoint folder")
    for candidate in (path, path / "checkpoints" / "last"):
        if (candidate / MODEL).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    raise ValueError(
        f"{path}: no checkpoint here; expected {MODEL} and {WEIGHTS}, or checkpoints/last with them"
    )


def read_description(folder: Path) -> dict[str, Any]:
    """What builds the checkpoint's architecture.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        description: dict[str, Any] = json.loads((folder / MODEL).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MODEL}: damaged ({error})") from error
    return description


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into a model of the same architecture, entirely or not at all.

    Raises:
        ValueError: The file is damaged, or belongs to another architecture.
    """
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: damaged ({error})") from error
    own = model.state_dict()
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    reshaped = [
        name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
    ]
    if missing or unknown or reshaped:
        example = sorted(missing | unknown | set(reshaped))[0]
        raise ValueError(
            f"{folder}: checkpoint of another architecture: {len(missing)} tensors missing, "
            f"{len(unknown)} unknown, {len(reshaped)} of another shape, such as {example}; "
            "make the [model] section match"
        )
    model.load_state_dict(weights)
