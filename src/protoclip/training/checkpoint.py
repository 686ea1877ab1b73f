"""Checkpoints: folders that appear whole or not at all, with a checksum of every file.

Weights and other tensors are safetensors and everything else is JSON, so loading one runs no code
from it. `model.safetensors` and `model.json` are what using the model takes, with `checksums.json`
to check them; going on with the run takes `optimizer.safetensors`, which the first process alone
reads, `resume.safetensors` and `state.json` besides.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from protoclip import strict_json

WEIGHTS, MODEL = "model.safetensors", "model.json"
OPTIMIZER, RESUME, STATE = "optimizer.safetensors", "resume.safetensors", "state.json"
CHECKSUMS = "checksums.json"
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
        write(MODEL, to_json(description))
        write(STATE, to_json(contents.facts))
        write(CHECKSUMS, to_json(checksums))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of writing a file name it, which those of `write` and `fsync` do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


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


def file_checksum(path: Path) -> str:
    """The checksum of a file that may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with a checkpoint's files, or with some of them, or None."""
    expected: dict[str, str] = {}
    try:
        expected = dict(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")))
        if names is None:
            # A checkpoint of an earlier format may be whole too; what goes on from it refuses it.
            names = sorted({WEIGHTS, MODEL, RESUME, STATE} | expected.keys())
        with ThreadPoolExecutor() as pool:  # hashing frees the interpreter
            found = list(pool.map(file_checksum, [folder / name for name in names]))
    except OSError as error:
        return f"{Path(error.filename or CHECKSUMS).name} cannot be read: {error.strerror}"
    except (ValueError, TypeError):
        return f"{CHECKSUMS} is damaged"
    for name, value in zip(names, found, strict=True):
        if expected.get(name) != value:
            return f"{name} is not what was written, by its checksum"
    return None


def require_intact(folder: Path, *names: str) -> None:
    """Check files of a checkpoint.

    Raises:
        ValueError: One is not as it was written; names it.
    """
    if (wrong := damage(folder, names)) is not None:
        raise ValueError(
            f"{folder}: damaged ({wrong}); copy the folder again from where it is whole, or take "
            "another checkpoint"
        )


@contextmanager
def verified(folder: Path) -> Iterator[None]:
    """Check a model's weights in a thread while the block does something else, then wait for it.

    Raises:
        ValueError: They are not as they were written.
    """
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(require_intact, folder, WEIGHTS)
        yield
        checked.result()


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


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; raises `ValueError` if it is damaged."""
    try:
        facts: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    return facts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises `ValueError` if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's weights, which are to be those of a model's architecture.

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
    return weights
