"""Tiny models, tiny data and a pool of processes, for tests and benchmarks."""

import atexit
import ctypes
import gc
import io
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from PIL import Image

from protoclip.config import (
    Config,
    DataConfig,
    EpisodeConfig,
    HeadConfig,
    ImageTowerConfig,
    ModelConfig,
    PrototypeConfig,
    RunConfig,
    TeacherConfig,
    TextTowerConfig,
)
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.start import Start, resolve_start

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220)}
SHAPES = ("square", "stripe", "corner")
TIMEOUT = 300  # seconds for one call of `run_distributed`, on a busy machine
_pools: dict[int, "_Pool"] = {}
_resident = 500_000_000  # bytes after the last `return_memory`; importing torch takes about this


def tiny_pairs(num_samples: int = 96, *, side: int = 24, seed: int = 0) -> pa.Table:
    """A table of PNG images of coloured shapes, captions such as "a red square", and sample ids."""
    generator = np.random.default_rng(seed)
    images, captions = [], []
    for _ in range(num_samples):
        colour, shape = generator.choice(list(COLOURS)), generator.choice(SHAPES)
        pixels = np.full((side, side, 3), 255, dtype=np.uint8)
        top, left = generator.integers(1, side // 3, 2)
        size = side // 2
        region = {
            "square": (slice(top, top + size), slice(left, left + size)),
            "stripe": (slice(top, top + size // 3), slice(None)),
            "corner": (slice(0, size), slice(0, size)),
        }[str(shape)]
        pixels[region] = COLOURS[str(colour)]
        images.append(save_to_bytes(Image.fromarray(pixels)))
        captions.append(f"a {colour} {shape}")
    return pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "caption": captions,
            "sample_id": [f"tiny/{row}" for row in range(num_samples)],
        }
    )


def noisy_pairs(number: int, *, seed: int = 0, more: str = "") -> pa.Table:
    """Noise around three colours, each with a caption of its own, and the colour as `kind`."""
    draw = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {"image": [], "caption": [], "kind": []}
    for row in range(number):
        pixels = draw.integers(0, 90, (32, 32, 3), dtype=np.uint8)
        pixels[..., row % 3] += 150
        columns["image"].append(save_to_bytes(Image.fromarray(pixels)))
        columns["kind"].append([*COLOURS][row % 3])
        columns["caption"].append(f"{columns['kind'][row]} {row}{more}")
    return pa.table(columns)


def save_to_bytes(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    """The bytes of an image file."""
    image.save(buffer := io.BytesIO(), kind, **settings)
    return buffer.getvalue()


def tiny_model() -> ModelConfig:
    """Two towers that train a step in a few milliseconds."""
    return ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(name="test_resnet", size=32),
        text=TextTowerConfig(context_length=8, width=16, heads=2, layers=1),
        heads=HeadConfig(hidden_dim=32, projection_dim=8),
    )


def build_model(
    section: ModelConfig | Start, *, seed: int, notes: list[str] | None = None
) -> ProtoCLIP:
    """The model of a start, or of a section of settings."""
    start = section if isinstance(section, Start) else resolve_start(section)
    return loading.build_model(start, seed=seed, notes=notes)


def tiny_config(train: str = "emoji", *, out: str, teacher: str | None = None) -> Config:
    """A run of seconds in fp32: four episodes (warm-up, two prototypical, locked image)."""
    return Config(
        run=RunConfig(name="tiny", out=out, device="cpu", precision="fp32", log_every=1),
        data=DataConfig(train=train),
        model=tiny_model(),
        episodes=EpisodeConfig(size=64, count=4, batch_size=16),
        prototypes=PrototypeConfig(number=8, iterations=5),
        teacher=TeacherConfig(features=teacher, number=8) if teacher else TeacherConfig(),
    )


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call a function on every rank of a gloo group of processes on this machine.

    Returns what it returned, by rank. The processes wait for the next call afterwards. With
    `world_size=1` the function runs in this process, without a group. It must be importable.
    """
    if world_size == 1:
        return [function(*arguments)]
    if world_size in _pools and not _pools[world_size].is_alive:
        _pools.pop(world_size).close()
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    try:
        return _pools[world_size].call(function, arguments)
    except BaseException:
        _pools.pop(world_size).close()
        raise


def return_memory() -> None:
    """Free the memory of finished runs if this process has grown by more than half a gigabyte.

    The parts of a run refer to each other, so only Python's cyclic collector frees them, and the C
    library keeps the freed pages. Without this, runs in one process pile up gigabytes.
    """
    global _resident
    if resident() > _resident + 500_000_000:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)
        _resident = resident()


def resident() -> int:
    """Bytes of memory of this process; 0 if the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


class _Pool:
    """The ranks of one group, waiting for functions to call."""

    def __init__(self, world_size: int) -> None:
        # Ranks are forks of one process that has imported what they need, which takes it seconds.
        way = "forkserver" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(way)
        needed = ["protoclip.training.run", "open_clip", "transformers", "torch.utils.tensorboard"]
        needed += ["datasets", "sklearn.linear_model"]  # which read tables, and evaluate
        context.set_forkserver_preload(needed)
        self.owner = os.getpid()
        self.store = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, self.store.name, theirs)
            )
            process.start()
            theirs.close()  # the process ends when this one does
            self.pipes.append(ours)
            self.processes.append(process)
        # Daemons could have no data workers. Others are joined at exit, so they are killed first.
        atexit.register(self.close)

    @property
    def is_alive(self) -> bool:
        """Whether all ranks run; a test that kills processes may have met them."""
        return all(process.is_alive() for process in self.processes)

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT), f"rank {rank} has not answered in {TIMEOUT} s"
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def close(self) -> None:
        if os.getpid() != self.owner:  # a forked process exits, and did not start these
            return
        for process in self.processes:
            process.kill()
        self.store.cleanup()
        atexit.unregister(self.close)


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    gc.freeze()  # what is imported stays, and ranks share its memory while nobody looks at it
    torch.set_num_threads(1)
    # Fork data workers, as under torchrun: spawning one takes seconds.
    multiprocessing.set_start_method("fork", force=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=world_size
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # the caller has ended
            return
        try:
            answer = ("", function(*arguments))
        except BaseException:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
        del function, arguments, answer
        return_memory()
