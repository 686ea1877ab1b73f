"""Checkpoints: folders that appear whole or not at all, with a checksum of every file.

Weights and other tensors are safetensors and everything else is JSON, so loading one runs no code
from it. `model.safetensors` and `model.json` are what using the model takes; `resume.safetensors`
and `state.json` are what going on with the run takes besides.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from protoclip import strict_json
from protoclip.train.parallel import like

WEIGHTS, MODEL, RESUME, STATE = (
    "model.safetensors",
    "model.json",
    "resume.safetensors",
    "state.json",
)
CHECKSUMS = "checksums.json"


def write_checkpoint(
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Write a checkpoint beside its final place, to the disk, and give it its name.

    Args:
        folder: The checkpoint's folder; replaced when it exists.
        weights: The model's state dict.
        description: What builds the same architecture again; JSON.
        tensors, facts: What going on with the run takes besides.

    Raises:
        OSError: The disk is full or cannot be written. What was there before stays whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    contents = {
        WEIGHTS: save({name: tensor.contiguous() for name, tensor in weights.items()}),
        MODEL: to_json(description),
        RESUME: save({name: tensor.contiguous() for name, tensor in tensors.items()}),
        STATE: to_json(facts),
    }
    contents[CHECKSUMS] = to_json({name: checksum(data) for name, data in contents.items()})
    try:
        temporary.mkdir()
        for name, data in contents.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def to_json(facts: Mapping[str, Any]) -> bytes:
    return (strict_json.dumps(facts, indent=2) + "\n").encode()


def checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected: dict[str, str] = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, value in expected.items():
            if checksum((folder / name).read_bytes()) != value:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError) as error:
        return str(error) or type(error).__name__
    return None if {WEIGHTS, MODEL, RESUME, STATE} <= expected.keys() else "files are missing"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted((run / "checkpoints").glob("step-*"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest) or a checkpoint folder.

    Raises:
        ValueError: There is none.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such run or checkpoint folder")
    for candidate in (path, *reversed(checkpoints(path))):
        if (candidate / MODEL).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    raise ValueError(
        f"{path}: no checkpoint here; expected {MODEL} and {WEIGHTS}, or checkpoints/ with them"
    )


def read_description(folder: Path) -> dict[str, Any]:
    """What builds the checkpoint's architecture.

    Raises:
        ValueError: The file is damaged.
    """
    return read_json(folder / MODEL)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; raises `ValueError` if it is damaged."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    return facts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises `ValueError` if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into a model of the same architecture, entirely or not at all.

    Raises:
        ValueError: The file is damaged, or belongs to another architecture.
    """
    weights = read_tensors(folder / WEIGHTS)
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
    model.load_state_dict({name: like(value, own[name]) for name, value in weights.items()})
