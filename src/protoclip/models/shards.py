"""Tensors of a sharded model in a folder: safetensors files, a part of each tensor in each.

Every rank writes one, by `torch.distributed.checkpoint` in its Hugging Face format: the header says
where in the whole each part belongs. Any number of ranks, and one process without a group, reads
what any number wrote. As with other safetensors, no code of a file runs.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from protoclip.distributed import collectives
from protoclip.files import file_checksum, require_regular

# What damaged or foreign files can raise in torch's reader, which does not expect any.
UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, SafetensorError),
)


class Writer(HuggingFaceStorageWriter):
    """Torch's writer, which remembers the checksums of the files that this rank has written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.per_thread_copy_ahead = 0  # or its thread would take memory of the first card
        self.folder, self.checksums = folder, dict[str, str]()

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        names = {result.storage_data.relative_path for result in written.value()}
        self.checksums = {name: file_checksum(self.folder / name) for name in sorted(names)}
        return written


def write(folder: Path, parts: Mapping[str, Tensor]) -> dict[str, str]:
    """Write this rank's parts of all tensors, on the CPU, to a folder that may exist.

    What is no DTensor is the same on all ranks, and rank 0 writes it. Collective, in the background
    if the caller is. If one rank cannot write, all raise what that one met.

    Returns:
        The checksums of this rank's files, by name.
    """
    writer = Writer(folder)
    once = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with collectives.in_background() as group, raise_first_cause():
        save(dict(parts), storage_writer=writer, planner=once, process_group=group)
    return writer.checksums


def meta_tensors(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of a folder on the meta device: their names, shapes and types.

    Raises:
        ValueError: A file is damaged, or a part of a tensor is in none.
    """
    with open_reader(folder) as reader:
        for path in files(folder):
            require_regular(path)
        stored: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        for name, tensor in stored.items():
            if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
                raise ValueError(f"not all of {name} is there")
        return {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
            for name, tensor in stored.items()
        }


def read(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors of a folder whose names begin so, on the CPU; raises as `meta_tensors`."""
    whole = {
        name: torch.empty_like(like, device="cpu")
        for name, like in meta_tensors(folder).items()
        if name.startswith(prefix)
    }
    fill(folder, whole)
    return whole


def fill(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors in place: whole ones, or this rank's parts of DTensors. No rank waits.

    Raises:
        ValueError: A file is damaged, or holds no such tensor, or one of another shape.
    """
    with open_reader(folder) as reader, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it reads without a group
        load(dict(tensors), storage_reader=reader, no_dist=True)


def files(folder: Path) -> list[Path]:
    """The shards in a folder, as the reader finds them."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(".safetensors"))


@contextmanager
def open_reader(folder: Path) -> Iterator[HuggingFaceStorageReader]:
    """A reader of a folder; what it raises is one line."""
    try:
        with raise_first_cause():
            yield HuggingFaceStorageReader(str(folder))
    except UNREADABLE as error:
        raise ValueError(
            f"{folder}: damaged ({' '.join(str(error).split()) or error!r})"
        ) from error


@contextmanager
def raise_first_cause() -> Iterator[None]:
    """Raise what the first rank met that failed, in place of torch's collection of tracebacks."""
    try:
        yield
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None
