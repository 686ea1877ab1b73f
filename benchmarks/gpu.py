"""Is everything right on a CUDA card, and how fast is it? One command, under nine minutes.

Compares every path that differs on a GPU with the CPU, then measures what a step, a clustering and
the decoding of images cost, beside open_clip_train and faiss where they are installed.

    python benchmarks/gpu.py [--only losses,kmeans] [--minutes 8.8] [--out gpu.md]

Each part runs in a process of its own, for at most its budget of seconds: then it is cut, and says
so. A part that raises is reported as failed, and the others go on. Ends with status 1 if a check
or a part failed. Without a CUDA card it is refused; `--cpu` tries the script.
"""

import argparse
import datetime
import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from protoclip.config import (
    Config,
    EpisodeConfig,
    ImageTowerConfig,
    LossConfig,
    ModelConfig,
    PrototypeConfig,
    RunConfig,
)
from protoclip.data import loader as data_loader
from protoclip.data import sampler, sources
from protoclip.data.loader import Batch, EpisodeLoader, Pass
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sampler import Episode
from protoclip.data.transforms import light_transform
from protoclip.distributed import collectives
from protoclip.losses.grad_cache import forward_in_chunks
from protoclip.losses.info_nce import info_nce
from protoclip.losses.objective import LossWeights, objective
from protoclip.losses.prototypical import make_targets, prototypical_loss
from protoclip.losses.sigmoid import sigmoid_loss
from protoclip.models import checkpoint as saved
from protoclip.models import loading
from protoclip.models.checkpoint import OPTIMIZER, WEIGHTS
from protoclip.models.protoclip import Precision, autocast, grad_scaler, image_input, image_size
from protoclip.models.start import resolve_start
from protoclip.progress import Progress
from protoclip.prototypes.features import EpisodeFeatures
from protoclip.prototypes.kmeans import Bfloat16Search, KMeans, bfloat16_pays, kmeans, nearest
from protoclip.prototypes.targets import back_translate
from protoclip.training import run
from protoclip.training.plan import make_plan
from protoclip.training.watch import NonFiniteGuard, describe_environment, find_peak

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from testing import tiny_config, tiny_model

# In float32 the losses lose up to five digits, since logits go up to 100. TF32 would lose seven.
FLOAT32 = 1e-4
# Shares of a card's peak that a step of a ViT should reach, and what open_clip's reached.
PASSES, GOOD = 0.12, 0.2
PUBLISHED = {
    "ViT-B-32": "open_clip 11% (773 pairs/s), A100",
    "ViT-B-16": "open_clip 13% (332 pairs/s), A100",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The largest difference between two ways to compute the same, and what it may be."""

    what: str
    difference: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound  # NaN is above every bound


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Something measured, which is neither right nor wrong."""

    what: str
    value: str


Row = Check | Figure
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a part runs. Without a CUDA card it is `small`."""

    device: torch.device

    @property
    def small(self) -> bool:
        return self.device.type != "cuda"

    def wait(self) -> None:
        """Until the device has done all its work."""
        if not self.small:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds that a piece of work takes, and its result."""
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - started, result

    def random(self, *shape: int, seed: int) -> Tensor:
        """Rows of unit norm, made on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return F.normalize(torch.randn(*shape, generator=generator, device=self.device), dim=1)

    def reset_peak(self) -> None:
        gc.collect()  # the parts of a run refer to each other
        if not self.small:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        if self.small:
            return "peak memory not known"
        return f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"

    def matrix_rate(self) -> float:
        """Operations a second of a large product of bfloat16 matrices: the best of 20."""
        side = 256 if self.small else 8192
        left, right = (self.random(side, side, seed=seed).bfloat16() for seed in (0, 1))
        torch.mm(left, right)
        return 2 * side**3 / min(self.timed(lambda: torch.mm(left, right))[0] for _ in range(20))


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value."""
    found, wanted = (values.detach().double().cpu() for values in (found, wanted))
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def apart_in_norm(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference of two gradients, relative to the norm of one."""
    return float((found - wanted).norm() / wanted.norm())


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(difference(*pair) for pair in zip(found, wanted, strict=True))


def unit(*shape: int, seed: int) -> Tensor:
    """Rows of unit norm, on the CPU."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def span(seconds: list[float]) -> str:
    middle = statistics.median(seconds)
    return f"{1e3 * middle:,.1f} ms [{1e3 * min(seconds):,.1f}, {1e3 * max(seconds):,.1f}]"


# Are the results those of a CPU?


def losses(machine: Machine) -> Iterator[Row]:
    """Values and gradients of the losses in float32, against float64 on the CPU."""
    b, d, k = (64, 32, 16) if machine.small else (2048, 512, 2000)
    few = b // 8
    features = [unit(b, d, seed=1), unit(b, d, seed=2), torch.tensor(20.0)]
    classes, teachers = unit(k, d, seed=3), unit(k, d, seed=4)
    assignments = torch.arange(b) % k

    def prototypical(temperature: float | None, rows: Tensor, scale: Tensor) -> Tensor:
        own, theirs = classes.to(rows), teachers.to(rows)
        given = assignments.to(rows.device)
        return prototypical_loss(rows, own, theirs, given, scale, temperature)

    def gradients(
        loss: Callable[..., Tensor], leaves: list[Tensor], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        own = [leaf.to(device, dtype, copy=True).requires_grad_() for leaf in leaves]
        value = loss(*own)
        value.backward()
        return [value, *(leaf.grad for leaf in own if leaf.grad is not None)]

    def rounded(*leaves: Tensor) -> Tensor:
        with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
            return info_nce(*leaves)

    scaled = [features[0], features[2]]
    cases: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        f"InfoNCE, {few:,} pairs": (info_nce, [features[0][:few], features[1][:few], features[2]]),
        f"InfoNCE in tiles, {b:,} pairs": (info_nce, features),
        "InfoNCE under autocast": (rounded, features),
        "sigmoid loss": (sigmoid_loss, [*features, torch.tensor(-10.0)]),
        "prototypical, soft targets": (partial(prototypical, 0.01), scaled),
        "prototypical, hard targets": (partial(prototypical, None), scaled),
    }
    for name, (loss, leaves) in cases.items():
        exact = loss if loss is not rounded else info_nce
        wanted = gradients(exact, leaves, torch.device("cpu"), torch.float64)
        found = gradients(loss, leaves, machine.device, torch.float32)
        yield Check(what=name, difference=worst(found, wanted), bound=FLOAT32)


def clusters(machine: Machine) -> Iterator[Row]:
    """K-means against the CPU, and against itself."""
    n, d, k = (600, 32, 20) if machine.small else (20_000, 128, 500)
    centres = unit(k, d, seed=0)
    rows = F.normalize(centres.repeat(n // k, 1) + 0.7 * unit(n // k * k, d, seed=1), dim=1)
    own, own_centres = rows.to(machine.device), centres.to(machine.device)
    exact = torch.cdist(rows.double(), centres.double()).square()
    searches = {"in float32": partial(nearest, own)}
    if bfloat16_pays(own, k, n):
        search = Bfloat16Search(own, own.mean(0))
        searches |= {"by way of bfloat16": search.nearest}
    for name, search_of in searches.items():
        index, distance = (values.cpu() for values in search_of(own_centres))
        chosen = exact.gather(1, index[:, None])[:, 0]
        yield Check(
            what=f"nearest centroid {name}: distance beyond the least",
            difference=difference(chosen, exact.amin(1)),
            bound=1e-5,
        )
        yield Check(
            what=f"nearest centroid {name}: the distance it returns",
            difference=difference(distance, chosen),
            bound=1e-5,
        )

    def cluster(values: Tensor, **settings: Any) -> KMeans:
        return kmeans(values, k, iterations=6, seed=0, **settings)

    for name, settings in {"from given centroids": {"init": centres}, "spherical": {}}.items():
        given = {"spherical": name == "spherical", **settings}
        found, wanted = cluster(own, **given), cluster(rows, **given)
        # Ties, and draws that rounding moves, lead the two apart.
        yield Check(
            what=f"inertia, {name}",
            difference=abs(found.inertia / wanted.inertia - 1),
            bound=1e-4 if settings else 0.02,
        )
    found, wanted = cluster(own), cluster(rows)
    yield Check(
        what="inertia, k-means++",
        difference=abs(found.inertia / wanted.inertia - 1),
        bound=0.02,
    )
    again = cluster(own)
    yield Check(
        what="the same clustering twice: centroids and assignments",
        difference=max(
            float((found.centroids - again.centroids).abs().max()),
            float((found.assignments != again.assignments).sum()),
        ),
        bound=0.0,
    )


def translation(machine: Machine) -> Iterator[Row]:
    """Back-translation and the targets of an episode, against float64 on the CPU."""
    n, d, k = (600, 16, 40) if machine.small else (50_000, 128, 5000)
    rows, texts = unit(n, d, seed=0), unit(n, d, seed=1)
    assignments = torch.randint(0, k - 1, (n,), generator=torch.Generator().manual_seed(2))
    own = (assignments.to(machine.device), rows.to(machine.device))
    found = back_translate(*own, k)
    wanted = back_translate(assignments, rows.double(), k)
    what = "back-translated prototypes"
    yield Check(what=what, difference=difference(found, wanted), bound=1e-5)
    empty = float(found[-1].abs().max())
    yield Check(what=f"{what}: an empty one is zero", difference=empty, bound=0.0)
    again = float((back_translate(*own, k) - found).abs().max())
    yield Check(what=f"{what}: twice the same bits", difference=again, bound=0.0)

    def targets(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        given = KMeans(
            centroids=unit(k, d, seed=3).to(device, dtype),
            assignments=assignments.to(device),
            inertia=0.0,
            history=(),
        )
        made = make_targets(
            {"text": given},
            image_projections=rows.to(device, dtype),
            text_projections=texts.to(device, dtype),
            target_temperatures={"text": 0.01},
        )["image", "text"]
        return [made.classes, made.lookup, made.class_index.double()]

    pair = targets(machine.device, torch.float32), targets(torch.device("cpu"), torch.float64)
    yield Check(what="soft targets of an episode", difference=worst(*pair), bound=FLOAT32)


def grad_cache(machine: Machine) -> Iterator[Row]:
    """Gradients of a batch in chunks, with dropout in the second check."""
    size = 32 if machine.small else 224
    name = "test_vit.r160_in1k" if machine.small else "vit_small_patch16_224"
    tower = ImageTowerConfig(name=name.partition(".")[0], size=size)
    built = loading.build_model(resolve_start(replace(tiny_model(), image=tower)), seed=0)
    batch, chunk = (8, 3) if machine.small else (32, 12)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(1, 400, (batch, 8), generator=torch.Generator().manual_seed(1))

    def gradient(device: torch.device, chunks: int | None, seen: list[Tensor]) -> Tensor:
        """Of all parameters; also keeps the features of each pass."""
        own = loading.to_device(built, device).train()
        own.zero_grad(set_to_none=True)

        def encode(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            outputs = own.encode_image(image.to(device)), own.encode_text(text.to(device))
            seen.append(outputs[0].detach())
            return outputs

        outputs: tuple[Tensor, ...]
        if chunks is None:
            outputs, finish = encode(images, tokens), None
        else:
            parts = zip(images.split(chunks), tokens.split(chunks), strict=True)
            outputs, finish = forward_in_chunks(
                [partial(encode, *part) for part in parts],
                trains=(True, True),
                buffers=own.towers.buffers(),
            )
        embeddings = own.embeddings(*outputs, project=False)
        loss = info_nce(embeddings.image_features, embeddings.text_features, embeddings.logit_scale)
        loss.backward()
        if finish is not None:
            finish()
        found = [p.grad.flatten() for p in own.parameters() if p.grad is not None]
        return torch.cat(found).double().cpu()

    whole = gradient(torch.device("cpu"), None, [])
    own = gradient(machine.device, None, [])
    chunked = gradient(machine.device, chunk, [])
    yield Check(what="gradient of a batch, CPU", difference=apart_in_norm(own, whole), bound=1e-3)
    what = "gradient of a batch in chunks, and whole"
    yield Check(what=what, difference=apart_in_norm(chunked, own), bound=1e-3)
    trunk: Any = built.towers.visual.trunk  # type: ignore[union-attr]
    trunk.pos_drop = nn.Dropout(0.5)
    seen: list[Tensor] = []
    gradient(machine.device, chunk, seen)
    first, second = (torch.cat(rows) for rows in (seen[: len(seen) // 2], seen[len(seen) // 2 :]))
    what = "with dropout, both passes of a chunk"
    yield Check(what=what, difference=difference(second, first), bound=1e-6)


def tiny(folder: str, machine: Machine, *, device: str = "", **settings: Any) -> Config:
    """A run of seconds on the emoji with a teacher: warm-up, prototypes, locked image tower."""
    config = tiny_config(out=f"{folder}/run", teacher="emoji")
    own = {"evaluate": False, "device": device or str(machine.device)}
    if not machine.small:
        config = replace(config, episodes=replace(config.episodes, size=512, batch_size=128))
    for section, values in {"run": {}, **settings}.items():
        values = {**values, **(own if section == "run" else {})}
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def train(config: Config, **more: Any) -> list[float]:
    """Train without a word; the losses of all steps."""
    with redirect_stderr(io.StringIO()):
        run.train(config, **more)
    text = Path(str(config.run.out), "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["train/loss/total"] for line in lines if "train/loss/total" in line]


def losses_of(machine: Machine, **settings: Any) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        return train(tiny(folder, machine, **settings))


def apart_in(found: list[float], wanted: list[float], steps: int) -> float:
    """The largest relative difference of the losses of the first steps."""
    pairs = list(zip(found, wanted, strict=True))[:steps]
    return max(abs(one / other - 1) for one, other in pairs)


def first_step(
    device: torch.device, machine: Machine, name: Precision, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a step with prototypes, from equal weights, batch and targets.

    More steps would not compare: a sample that rounding moves to another prototype changes what
    comes after.
    """
    tower = "test_vit" if machine.small else "vit_small_patch16_224"
    side, batch, prototypes = (32, 32, 8) if machine.small else (224, 64, 16)
    config = replace(tiny_model(), image=ImageTowerConfig(name=tower, size=side))
    built = loading.to_device(loading.build_model(resolve_start(config), seed=0), device).train()
    if compiled:
        for part in (built.towers.visual, built.towers.transformer):
            part.compile()  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator).to(device)
    tokens = torch.randint(1, 400, (batch, 8), generator=generator).to(device)
    spaces = [unit(batch, 8, seed=seed).to(device) for seed in (1, 2)]
    groups = torch.arange(batch, device=device) % prototypes
    clusters = {
        space: KMeans(
            centroids=back_translate(groups, rows, prototypes),
            assignments=groups,
            inertia=0.0,
            history=(),
        )
        for space, rows in zip(("image", "text"), spaces, strict=True)
    }
    targets = make_targets(
        clusters,
        image_projections=spaces[0],
        text_projections=spaces[1],
        target_temperatures={"image": 0.1, "text": 0.1},
    )
    scale = 256.0 if name == "fp16" else 1.0  # what a run finds after some steps
    with autocast(name, device)():
        embeddings = built(images, tokens)
    assignments = {"image": groups, "text": groups}
    losses, _ = objective(embeddings, targets, assignments, weights=LossWeights())
    loss = torch.stack(list(losses.values())).sum()
    (scale * loss).backward()
    gradients = [p.grad.double().flatten() for p in built.parameters() if p.grad is not None]
    return loss.detach().cpu(), torch.cat(gradients).cpu() / scale


def precision(machine: Machine) -> Iterator[Row]:
    """A step in every precision against fp32 on the CPU, and steps that are not finite."""
    loss, gradient = first_step(torch.device("cpu"), machine, "fp32")
    for name, loss_bound, bound in (
        ("fp32", 1e-4, 1e-3),
        ("bf16", 0.02, 0.1),
        ("fp16", 0.01, 0.05),
    ):
        found, own = first_step(machine.device, machine, name)
        yield Check(what=f"{name}, loss", difference=difference(found, loss), bound=loss_bound)
        what = f"{name}, gradient"
        yield Check(what=what, difference=apart_in_norm(own, gradient), bound=bound)
    for name in ("bf16", "fp16"):
        what = f"{name}: how far a step that is not finite moves the weights"
        yield Check(what=what, difference=moved_by_infinity(machine, name), bound=0.0)


def moved_by_infinity(machine: Machine, name: Precision) -> float:
    """How far a fused optimizer moves by a step whose loss is infinite; infinite if not counted."""
    layer = nn.Linear(8, 8).to(machine.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    scaler = grad_scaler(name, machine.device)
    guard = NonFiniteGuard(optimizer, scaler, Path("diverged.json"))
    rows, before = torch.ones(4, 8, device=machine.device), torch.zeros(())
    for number, factor in enumerate((1.0, float("inf")), 1):
        before = layer.weight.detach().clone()
        with autocast(name, machine.device)():
            loss = layer(rows).float().square().mean() * factor
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 10.0)
        guard.step(number, loss, norm, ["a"])
    guard.count_skipped()
    moved = float((layer.weight.detach() - before).abs().max())
    return moved if guard.skipped == 1 else float("inf")


def compiled(machine: Machine) -> Iterator[Row]:
    """Compiled towers against plain ones: an episode of InfoNCE, and a step with prototypes."""
    episodes = {"count": 2, "locked_image": 0, "size": 32 if machine.small else 512}
    wanted = losses_of(machine, episodes=episodes)
    found = losses_of(machine, episodes=episodes, parallel={"compile": True})
    number = len(wanted) // 2
    what = f"losses of the first {number} of {len(wanted)} steps, compiled and plain"
    yield Check(what=what, difference=apart_in(found, wanted, number), bound=1e-3)
    (_, plain), (_, own) = (
        first_step(machine.device, machine, "fp32", compiled=is_compiled)
        for is_compiled in (False, True)
    )
    what = "gradient of a step with prototypes, compiled and plain"
    yield Check(what=what, difference=apart_in_norm(own, plain), bound=1e-3)


def pinned(machine: Machine) -> Iterator[Row]:
    """Batches by way of pinned memory, which are all under way at once, against the CPU's."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny(folder, machine)
    samples = sources.open_samples(config)
    built = loading.build_model(resolve_start(config.model), seed=0)
    episode = sampler.episodes(config, samples)(0)

    def batches(device: torch.device, workers: int) -> list[Batch]:
        own = data_loader.loader(
            replace(config, data=replace(config.data, workers=workers)),
            samples,
            tokenizer=resolve_start(config.model).tokenizer(),
            transform=light_transform(**image_input(built.towers)),
            device=device,
            on_read=lambda number, bad: None,
        )
        return list(own.batches(Pass(episode)))

    wanted = batches(torch.device("cpu"), 0)
    for workers in (0,) if machine.small else (0, 2):
        found = batches(machine.device, workers)
        pairs = list(zip(found, wanted, strict=True))
        what = f"{workers} worker processes: "
        yield Check(
            what=what + "augmented images",
            difference=max(difference(one.image, other.image) for one, other in pairs),
            bound=1e-3,
        )
        wrong = sum(
            int((one.text.cpu() != other.text).sum())
            + int((one.position.cpu() != other.position).sum())
            + (one.sample_id != other.sample_id)
            for one, other in pairs
        )
        yield Check(what=what + "tokens, positions and ids", difference=float(wrong), bound=0.0)


def resume(machine: Machine) -> Iterator[Row]:
    """A run that goes on from a checkpoint ends with the bits of the run that was not stopped.

    With torch's deterministic algorithms, and towers that have such: others may differ between two
    equal runs too.
    """
    vit = {"image": ImageTowerConfig(name="test_vit", size=32)}
    # A CPU may have to compute in half precision without instructions for it, a minute a run.
    bf16, fp16 = ("fp32", "fp32") if machine.small else ("bf16", "fp16")
    ways: dict[str, dict[str, Any]] = {
        "extraction, fp32": {"prototypes": {"source": "extract"}},
        f"queue, {bf16}": {"run": {"precision": bf16}, "prototypes": {"source": "queue"}},
        f"queue, {fp16}, micro-batches": {
            "run": {"precision": fp16},
            "prototypes": {"source": "queue"},
            "episodes": {"micro_batch_size": 8 if machine.small else 64},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        yield twice("as shipped", [tiny(f"{folder}/{place}", machine) for place in "ab"])
    with deterministic():
        with tempfile.TemporaryDirectory() as folder:
            configs = [tiny(f"{folder}/{place}", machine, model=vit) for place in "ab"]
            yield twice("deterministic", configs)
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                saving = {**way.get("run", {}), "save_steps": 6, "keep_checkpoints": 10}
                config = tiny(folder, machine, **{**way, "run": saving, "model": vit})
                wanted = ends(config)
                own = Path(str(config.run.out))
                for checkpoint in saved.checkpoints(own)[1:]:
                    shutil.rmtree(checkpoint)
                (own / "results.json").unlink()
                number = differing(ends(config, resume="auto"), wanted)
                what = f"{name}: tensors that differ after going on from step 6"
                yield Check(what=what, difference=float(number), bound=0.0)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms alone; attention on a CPU heeds these switches too."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before


def twice(name: str, configs: list[Config]) -> Figure:
    """How far two runs of equal settings agree."""
    one, two = map(ends, configs)
    what = f"tensors that differ between two equal runs, {name}"
    return Figure(what=what, value=f"{differing(one, two)} of {len(one)}")


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> int:
    return sum(not torch.equal(found[key], wanted[key]) for key in wanted)


def ends(config: Config, **more: Any) -> dict[str, Tensor]:
    """Weights and moments of the last checkpoint of a run."""
    Path(str(config.run.out)).parent.mkdir(parents=True, exist_ok=True)
    train(config, **more)
    last = saved.find_checkpoint(str(config.run.out))
    parts = [saved.read_tensors(last / name) for name in (WEIGHTS, OPTIMIZER)]
    return {
        f"{number}/{key}": value for number, part in enumerate(parts) for key, value in part.items()
    }


# What does it cost?


def steps(name: str, machine: Machine) -> Iterator[Row]:
    """Steps of CLIP and ProtoCLIP in bf16, on images that are made on the device."""
    rate = machine.matrix_rate()
    yield Figure(what="bf16 matrix product", value=f"{rate / 1e12:,.3g} TFLOP/s")
    large, chunk = (64, 32) if machine.small else (4096, 512)
    # A CPU may have no instructions for half precision.
    precision = "fp32" if machine.small else "bf16"
    for batch, micro in ((chunk, None), (large, chunk)):
        middles = []
        for arm, weight in (("CLIP", 0.0), ("ProtoCLIP", 1.0)):
            config = Config(
                run=RunConfig(device=str(machine.device), precision=precision),
                model=tiny_model() if machine.small else ModelConfig(name=name),
                episodes=EpisodeConfig(
                    size=256 if machine.small else 48 * 4096,
                    batch_size=batch,
                    micro_batch_size=micro,
                    warm_up=0,
                    locked_image=0,
                ),
                prototypes=PrototypeConfig(
                    number=16 if machine.small else 20_000, source="extract"
                ),
                loss=LossConfig(prototypical=weight),
            )
            what = f"{arm}, batch {batch:,}" + (f" in chunks of {micro:,}" if micro else "")
            try:
                seconds, flops, about = timed_steps(config, machine)
            except torch.OutOfMemoryError:
                yield Figure(what=what, value="does not fit into the card's memory")
                continue
            finally:
                machine.reset_peak()
            middle = statistics.median(seconds)
            middles.append(middle)
            share = flops * batch / middle / rate
            value = f"{span(seconds)}, {batch / middle:,.0f} pairs/s, "
            yield Figure(what=what, value=f"{value}{share:.0%} of the matrix rate, {about}")
            if arm == "CLIP" and micro is None:
                yield from beside_peer(config, batch / middle, flops, machine)
        if len(middles) == 2:
            what = f"ProtoCLIP over CLIP, batch {batch:,}"
            yield Figure(what=what, value=f"{middles[1] / middles[0]:.3f} times the step")


def beside_peer(config: Config, pairs: float, flops: float, machine: Machine) -> Iterator[Row]:
    """Ours, in pairs a second, beside open_clip_train's and beside published shares of a peak."""
    size = config.episodes.batch_size
    try:
        seconds = peer_seconds(config, machine)
    except ImportError:
        yield Figure(what="open_clip_train", value="needs pip install 'open_clip_torch[training]'")
    else:
        theirs = size / statistics.median(seconds)
        value = f"{span(seconds)}, {theirs:,.0f} pairs/s; ours are {pairs / theirs:.2f} times that"
        yield Figure(what=f"open_clip_train, batch {size:,}", value=value)
    peak = None if machine.small else find_peak(torch.cuda.get_device_name(), "bf16")
    if peak is not None and config.model.name in PUBLISHED:
        share = pairs * flops / peak
        verdict = "good" if share >= GOOD else "passes" if share >= PASSES else "**too little**"
        value = f"{share:.1%}: {verdict} ({PASSES:.0%} pass, {GOOD:.0%} are good); published: "
        value += f"{PUBLISHED[config.model.name]}; NeMo 20.6%, ViT-g/14, H100"
        yield Figure(what="share of the card's bf16 peak", value=value)


def peer_seconds(config: Config, machine: Machine) -> list[float]:
    """Seconds of a step by open_clip_train's own loop, on the same towers."""
    from open_clip import ClipLoss
    from open_clip_train.train import train_one_epoch

    machine.reset_peak()
    start = resolve_start(config.model)
    towers: Any = loading.build_model(start, seed=0).towers.to(machine.device)
    towers.output_dict = True
    number, size = 2 if machine.small else 8, config.episodes.batch_size
    side, length = image_size(towers), start.context_length
    image = torch.randn(size, 3, side, side, device=machine.device)
    text = torch.randint(1, 49_000, (size, length), device=machine.device)
    text[:, -1] = 49_407
    loader: Any = BatchList([(image, text)] * number)
    loader.num_batches, loader.num_samples = number, number * size
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    settings = SimpleNamespace(
        device=str(machine.device),
        precision="fp32" if machine.small else "amp_bf16",
        batch_size=size,
        grad_clip_norm=10.0,
        accum_freq=1,
        distill=False,
        skip_scheduler=True,
        world_size=1,
        rank=0,
        log_every_n_steps=1000,
        wandb=False,
    )
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
    loss = ClipLoss(cache_labels=True)
    epoch = partial(train_one_epoch, towers, data, loss, 0, optimizer, None, None, None, settings)
    epoch()  # the first steps are slower
    return [machine.timed(epoch)[0] / number for _ in range(3)]


class BatchList(list[Any]):
    """Batches in memory, which take the attributes that open_clip_train reads of a loader."""


def timed_steps(config: Config, machine: Machine) -> tuple[list[float], float, str]:
    """Seconds of each step, operations of a pair (forward and backward), and what else there is."""
    machine.reset_peak()
    model = loading.to_device(
        loading.build_model(resolve_start(config.model), seed=0), machine.device
    )
    with tempfile.TemporaryDirectory() as folder:
        built = run.Run(make_plan(config), model, folder=Path(folder))
    trainer, size = built.trainer, config.episodes.batch_size
    side, length = image_size(model.towers), resolve_start(config.model).context_length
    device = machine.device
    image = torch.randn(size, 3, side, side, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    text = torch.randint(1, 49_000, (size, length), device=device)
    text[:, -1] = 49_407
    names = [str(number) for number in range(size)]
    batch = Batch(
        position=torch.arange(size, device=device), sample_id=names, image=image, text=text
    )
    about = ""
    shape = (config.episodes.size, config.model.heads.projection_dim)
    rows = [machine.random(*shape, seed=seed) for seed in (0, 1)]
    keys = torch.arange(shape[0], device=device)
    features = EpisodeFeatures(image=rows[0], text=rows[1], teachers={}, keys=keys)
    trainer.prototypes.source.features = lambda episode: features  # type: ignore[method-assign]
    spent = trainer.start_episode(Episode(index=0, rows=torch.arange(config.episodes.size)))
    if spent:
        grouping = sum(spent[f"train/seconds/{part}"] for part in ("cluster", "back_translate"))
        about = f", {grouping:.2f} s of K-means and PBT an episode of {shape[0]:,}"
    with FlopCounterMode(display=False) as counter:
        few = 4
        with built.trainer.autocast():
            found = model(image[:few], text[:few], project=config.uses_prototypes)
        parts = [
            value
            for value in vars(found).values()
            if isinstance(value, torch.Tensor) and value.ndim
        ]
        torch.stack([value.sum() for value in parts]).sum().backward()
    flops = counter.get_total_flops() / few
    for _ in range(1 if config.episodes.micro_batch_size else 3):
        trainer.train_step(batch, detailed=False)
    number = 2 if machine.small else 3 if config.episodes.micro_batch_size else 12
    step = partial(trainer.train_step, batch, detailed=False)
    seconds = [machine.timed(step)[0] for _ in range(number)]
    return seconds, flops, machine.peak() + about


def kmeans_speed(machine: Machine) -> Iterator[Row]:
    """Six iterations of K-means from k-means++, and faiss where it is installed."""
    rate = machine.matrix_rate()
    yield Figure(what="bf16 matrix product", value=f"{rate / 1e12:,.3g} TFLOP/s")
    sizes = [(2000, 50)] if machine.small else [(200_000, 20_000), (1_000_000, 100_000)]
    for n, k in sizes:
        centres = machine.random(max(2, k // 4), 128, seed=0)
        rows = centres.repeat_interleave(n // len(centres), dim=0)
        rows = F.normalize(rows + 0.7 * machine.random(len(rows), 128, seed=1), dim=1)
        kmeans(rows[: 4 * k // 10], k // 10, iterations=1, seed=0)  # the first call is slower
        machine.reset_peak()
        work = partial(kmeans, rows, k, iterations=6, seed=0)
        timed = [machine.timed(work) for _ in range(3 if n < 500_000 else 1)]
        seconds, found = [time_taken for time_taken, _ in timed], timed[0][1]
        # k-means++ searches all centroids once, and each iteration does.
        operations = 2 * len(rows) * k * 128 * len(found.history)
        share = operations / statistics.median(seconds) / rate
        what = f"{len(rows):,} x 128, K = {k:,}"
        value = f"{span(seconds)}, inertia {found.inertia:,.0f}, {share:.0%} of the matrix rate"
        yield Figure(what=f"ours, {what}", value=f"{value}, {machine.peak()}")
        yield Figure(what=f"faiss, {what}", value=faiss_speed(rows, k, machine))


def faiss_speed(rows: Tensor, k: int, machine: Machine) -> str:
    try:
        import faiss
    except ImportError:
        return "not installed"
    on_gpu = hasattr(faiss, "StandardGpuResources")
    if not machine.small and not on_gpu:
        return "installed without GPU support"
    given = rows.cpu().numpy()
    made = faiss.Kmeans(
        rows.shape[1],
        k,
        niter=6,
        seed=1,
        gpu=on_gpu and not machine.small,
        min_points_per_centroid=1,
        max_points_per_centroid=10**6,
    )
    seconds, _ = machine.timed(lambda: made.train(given))
    return f"{1e3 * seconds:,.1f} ms, inertia {made.obj[-1]:,.0f}"


def decode(machine: Machine) -> Iterator[Row]:
    """JPEG files of 500 x 375 pixels to crops of 224, by worker processes on all cores."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers, number, batch = (0, 64, 32) if machine.small else (cores, 512 * cores, 256)
    files = []
    for seed in range(16):
        draw = np.random.default_rng(seed)
        # A smooth field with some noise, which takes the bytes of a photograph.
        field = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(field).resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(pixels + draw.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    table = pa.table({"image": pa.array(files, pa.binary()), "caption": ["a caption"] * len(files)})
    mean_std = (0.5, 0.5, 0.5)
    own = EpisodeLoader(
        pairs=ImageTextPairs(table, name="decode"),
        tokenizer=lambda texts: torch.zeros(len(texts), 8, dtype=torch.long),
        transform=light_transform(size=224, mean=mean_std, std=mean_std),
        batch_size=batch,
        seed=0,
        device=machine.device,
        workers=workers,
    )
    episode = Episode(index=0, rows=torch.arange(number) % len(files))
    list(own.batches(Pass(Episode(index=1, rows=episode.rows[: batch * max(1, workers)]))))
    seconds, _ = machine.timed(
        lambda: sum(len(batch.sample_id) for batch in own.batches(Pass(episode)))
    )
    size = statistics.mean(map(len, files)) / 1000
    yield Figure(
        what=f"{cores} cores, {max(1, workers)} processes, files of {size:.0f} KB",
        value=f"{number / seconds:,.0f} images/s, augmented on the device",
    )


# How is it run, and written down?


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part by name: what it is about, its most seconds, and its rows."""

    title: str
    budget: float
    rows: Callable[[Machine], Iterator[Row]]


PARTS: dict[str, Part] = {
    "losses": Part(title="Losses", budget=30, rows=losses),
    "kmeans": Part(title="K-means", budget=30, rows=clusters),
    "translation": Part(title="Back-translation and targets", budget=25, rows=translation),
    "gradcache": Part(title="GradCache", budget=30, rows=grad_cache),
    "precision": Part(title="Precision", budget=60, rows=precision),
    "loading": Part(title="Pinned loading", budget=30, rows=pinned),
    "resume": Part(title="Checkpoint and resume", budget=60, rows=resume),
    "compile": Part(title="torch.compile", budget=90, rows=compiled),
    "rn50": Part(title="Steps of RN50 at 224", budget=70, rows=partial(steps, "RN50")),
    "vit32": Part(title="Steps of ViT-B/32 at 224", budget=60, rows=partial(steps, "ViT-B-32")),
    "vit": Part(title="Steps of ViT-B/16 at 224", budget=70, rows=partial(steps, "ViT-B-16")),
    "clustering": Part(title="K-means, time", budget=60, rows=kmeans_speed),
    "decode": Part(title="Decoding", budget=25, rows=decode),
}


@dataclass(frozen=True, kw_only=True)
class Done:
    """What came of a part; `ended` says why it is not whole, and is empty if it is."""

    rows: list[Row]
    seconds: float
    ended: str = ""


def in_child(part: Part, pipe: Connection) -> None:
    """Send the rows of a part, then "", or what went wrong in one line."""
    os.setsid()  # so that its own processes end with it
    # cuBLAS reads this once, and the deterministic algorithms of `resume` need it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    try:
        torch.set_flush_denormal(True)
        torch.backends.cudnn.allow_tf32 = False  # or convolutions would lose half of their digits
        for row in part.rows(Machine(device=collectives.choose_device("auto"))):
            pipe.send(row)
        pipe.send("")
    except BaseException as error:
        text = next(iter(str(error).splitlines()), "")
        pipe.send(f"failed: {type(error).__name__}: {text}")


def measure(part: Part, budget: float) -> Done:
    """Run a part in a process of its own, which is killed after `budget` seconds.

    An error of the card spoils the process where it arises. So this process never uses the card.
    """
    started, rows = time.monotonic(), list[Row]()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(part, theirs))
    process.start()
    theirs.close()
    ended = f"cut after {budget:.0f} s"
    while ours.poll(max(0.0, started + budget - time.monotonic())):
        try:
            found = ours.recv()
        except EOFError:
            process.join()
            ended = f"failed: its process ended with status {process.exitcode}"
            break
        if isinstance(found, str):
            ended = found
            break
        rows.append(found)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return Done(rows=rows, seconds=time.monotonic() - started, ended=ended)


def environment(machine: Machine) -> Iterator[Row]:
    """What the numbers depend on."""
    facts = describe_environment(machine.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = [facts["device"], f"{cores} cores", f"protoclip {facts['protoclip']}"]
    if not machine.small:
        properties = torch.cuda.get_device_properties(machine.device)
        about.insert(1, f"{properties.total_memory / 2**30:.0f} GiB")
        about.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    about += [f"torch {facts['torch']}", f"Python {facts['python']}"]
    yield Figure(what="machine", value=", ".join(about))


def table(name: str, done: Done) -> list[str]:
    """The rows of a part in Markdown."""
    lines = [f"## {PARTS[name].title} (`{name}`, {done.seconds:.0f} s)", ""]
    checks = [row for row in done.rows if isinstance(row, Check)]
    if checks:
        lines += ["| check | largest difference | bound | |", "|---" * 4 + "|"]
        for row in checks:
            result = "pass" if row.passed else "**FAIL**"
            lines.append(f"| {row.what} | {row.difference:.2g} | {row.bound:g} | {result} |")
        lines.append("")
    figures = [row for row in done.rows if isinstance(row, Figure)]
    if figures:
        lines += ["| measured | |", "|---" * 2 + "|"]
        lines += [f"| {row.what} | {row.value} |" for row in figures]
        lines.append("")
    if done.ended:
        lines += [f"**{done.ended}**", ""]
    return lines


def report(command: str, about: Done, done: dict[str, Done]) -> list[str]:
    """The whole file."""
    checks = [row for section in done.values() for row in section.rows if isinstance(row, Check)]
    failed = sum(not row.passed for row in checks)
    ended = [f"{name} ({section.ended})" for name, section in done.items() if section.ended]
    machine = about.rows[0].value if about.rows else about.ended  # type: ignore[union-attr]
    lines = [
        "# On a GPU: right, and how fast",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}; {machine}; "
        f"{sum(section.seconds for section in done.values()):.0f} s.",
        "",
        f"{len(checks)} checks: {len(checks) - failed} pass, {failed} fail. "
        f"Parts that are not whole: {'; '.join(ended) or 'none'}.",
        "",
        "Differences are relative to the largest value, unless a row says otherwise. Times are "
        "medians [least, most]. The share of the matrix rate counts the operations of one forward "
        "and one backward pass, so not those that GradCache repeats. Convolutions in "
        "fp32 are without TF32.",
        "",
    ]
    return lines + [line for name, section in done.items() for line in table(name, section)]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of the parts: {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8.8, help="most of all parts together")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the Markdown file")
    parser.add_argument("--cpu", action="store_true", help="try the script where there is no card")
    arguments = parser.parse_args(words)
    names = arguments.only.split(",") if arguments.only else [*PARTS]
    for name in names:
        if name not in PARTS:
            parser.error(f"--only: no part '{name}'; the parts are {', '.join(PARTS)}")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out: no folder {arguments.out.parent}; make it first")
    if not (arguments.cpu or torch.cuda.is_available()):
        parser.error(
            "PyTorch sees no CUDA card here (nvidia-smi says whether the driver does), and a CPU "
            "that is compared with itself shows nothing; --cpu tries the script all the same"
        )
    deadline = time.monotonic() + 60 * arguments.minutes
    given = sys.argv[1:] if words is None else words
    command = " ".join(["python benchmarks/gpu.py", *given])
    about = measure(Part(title="", budget=60, rows=environment), 60)
    progress, done = Progress("benchmark: gpu", len(names)), dict[str, Done]()
    for number, name in enumerate(names):
        progress.update(number, name)
        left = deadline - time.monotonic()
        if left < 1:
            done[name] = Done(rows=[], seconds=0.0, ended="not begun: no time was left")
        else:
            done[name] = measure(PARTS[name], min(PARTS[name].budget, left))
        text = "\n".join(report(command, about, done))
        # After each part, so that nothing is lost.
        arguments.out.write_text(text, encoding="utf-8")
    progress.update(len(names))
    print(f"written to {arguments.out}")
    checks = [row for section in done.values() for row in section.rows if isinstance(row, Check)]
    bad = [section for section in done.values() if section.ended.startswith("failed")]
    return int(bool(bad) or not all(row.passed for row in checks))


if __name__ == "__main__":
    sys.exit(main())
