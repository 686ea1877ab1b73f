"""What do the losses cost? Time and memory of each against its plain form, and of chunked batches.

Forward and backward in float32. Times are medians over repeats in alternation. Extra memory is how
far a step raises the resident memory of a fresh process (Linux only). With `--processes`, InfoNCE
of a batch on several ranks is measured instead.

    python benchmarks/losses.py [--repeats 7] [--threads 1] [--cases info-nce-4096 ...]
        [--processes 2] [--out FILE]
"""

import argparse
import ctypes
import datetime
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protoclip import KMeans, Target, info_nce, sigmoid_loss
from protoclip.distributed.collectives import rank, world_size
from protoclip.losses import info_nce as instance
from protoclip.losses import tiles
from protoclip.losses.grad_cache import forward_in_chunks
from protoclip.losses.prototypical import make_targets
from protoclip.models.protoclip import ProtoCLIP
from protoclip.progress import Progress
from protoclip.training import watch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from testing import run_distributed

NUM_PROTOTYPES, WIDTH, TEMPERATURE = 20_000, 128, 0.01
Step = Callable[[], None]


def unit(*shape: int, seed: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1)


def prototypes() -> tuple[Tensor, Tensor, Tensor]:
    """As in an episode: broad groups, the student's space like its teacher's, and assignments."""
    groups = unit(100, WIDTH, seed=1).repeat_interleave(NUM_PROTOTYPES // 100, 0)
    teacher = F.normalize(groups + unit(NUM_PROTOTYPES, WIDTH, seed=2), dim=1)
    student = F.normalize(teacher + 0.3 * unit(NUM_PROTOTYPES, WIDTH, seed=3), dim=1)
    return student, teacher, torch.randperm(NUM_PROTOTYPES)


def prototypical(form: str, b: int, scale: float) -> Step:
    """A step of the prototypical loss with soft targets."""
    student, teacher, assignments = prototypes()
    assignments = assignments[:b]
    h = F.normalize(student[assignments] + unit(b, WIDTH, seed=4), dim=1).requires_grad_()
    s = torch.tensor(scale, requires_grad=True)
    # Random rows for the look-up: their values do not change what a step costs.
    lookup = unit(NUM_PROTOTYPES, WIDTH, seed=5)
    target = Target(classes=student, class_index=torch.arange(NUM_PROTOTYPES), lookup=lookup)

    def loss() -> Tensor:
        if form != "plain":
            return target.loss(h, assignments, s)
        similarities = teacher[assignments] @ teacher.T
        return F.cross_entropy(s * h @ student.T, (similarities / TEMPERATURE).softmax(1))

    return lambda: loss().backward()


def look_up(form: str) -> Step:
    """The look-up of the prototypical loss, computed once per episode."""
    student, teacher, assignments = prototypes()
    found = KMeans(centroids=teacher, assignments=assignments, inertia=0.0, history=())

    def step() -> None:
        make_targets(
            {"text": found},
            image_projections=student[assignments],
            text_projections=student[assignments],
            target_temperatures={"text": TEMPERATURE},
        )

    return step


def pairs(form: str, b: int, d: int, *, sigmoid: bool = False) -> Step:
    """A step of InfoNCE, or of the sigmoid loss; two of five pairs match another by a key."""
    text = unit(b, d, seed=1)
    image = F.normalize(text + unit(b, d, seed=2), dim=1)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(20.0, requires_grad=True)]

    groups = torch.randint(0, 4 * b, (b, 2), generator=torch.Generator().manual_seed(3))
    positives: Any = form if form in MATCHING else "pair"
    loss = partial(sigmoid_loss, *leaves, -10.0) if sigmoid else partial(info_nce, *leaves)

    def step() -> None:
        instance.TILED_ABOVE = b * b if form == "plain" else 0
        by_rows = form == "checkpoint"
        value = checkpointed(*leaves) if by_rows else loss(groups, positives=positives)
        value.backward()

    return step


def checkpointed(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE as torch's checkpoints would have it: the backward pass computes rows again."""
    scaled = scale * images

    def sums(rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = rows @ texts.T
        return logits.logsumexp(1), logits.logsumexp(0)

    parts = [checkpoint(sums, rows, use_reentrant=False) for rows in scaled.split(tiles.ROWS)]
    of_rows, of_columns = zip(*parts, strict=True)
    total = torch.cat(of_rows) + torch.stack(of_columns).logsumexp(0)
    return (total - 2 * (scaled * texts).sum(1)).mean() / 2


class Towers(nn.Module):
    """A small vision transformer, and the same transformer over the patches of text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = partial(timm.create_model, "vit_tiny_patch16_224", num_classes=WIDTH, img_size=64)
        self.visual, self.texts = make(), make()
        self.logit_scale = nn.Parameter(torch.tensor(2.7))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        return self.visual(images)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self.texts(tokens.float().view(-1, 1, 64, 64).expand(-1, 3, -1, -1) / 100)


def batch(form: str, b: int, chunk: int) -> Step:
    """A step of a model with InfoNCE, the batch in one pass or in chunks."""
    model = ProtoCLIP(Towers(), nn.Linear(WIDTH, WIDTH))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(b, 3, 64, 64, generator=generator)
    tokens = torch.randint(0, 100, (b, 64 * 64), generator=generator)

    def step() -> None:
        model.zero_grad()
        if form == "plain":
            embeddings, finish = model(images, tokens), lambda: None
        else:
            parts = zip(images.split(chunk), tokens.split(chunk), strict=True)
            calls = [partial(model, *part) for part in parts]
            embeddings, finish = forward_in_chunks(calls, buffers=model.buffers())
        info_nce(
            embeddings.image_features, embeddings.text_features, embeddings.logit_scale
        ).backward()
        finish()

    return step


MATCHING = {
    "masked": "tiled, those that match masked",
    "shared": "tiled, those that match shared",
}
TILED = {"plain": "plain", "tiled": "tiled", "torch": "tiled, without oneDNN"}
CHECKPOINT = {"checkpoint": "plain, 512 rows a checkpoint"}
# Name, forms of a step (the first is the measure of the others), the step, and a small step first.
Case = tuple[str, dict[str, str], Callable[[str], Step], Callable[[str], Step]]
SMALL = partial(prototypical, b=8, scale=14.3)
CASES: dict[str, Case] = {
    **{
        f"prototypical-{b}-{scale}": (
            f"prototypical, b = {b:,}, logit scale {scale}",
            TILED,
            partial(prototypical, b=b, scale=scale),
            SMALL,
        )
        for b, scale in ((512, 14.3), (512, 100.0), (4096, 14.3))
    },
    "lookup": ("look-up, once per episode", {"tiled": "tiled"}, look_up, SMALL),
    **{
        f"info-nce-{b}": (
            f"InfoNCE, b = {b:,}, d = 512",
            TILED | CHECKPOINT | MATCHING,
            partial(pairs, b=b, d=512),
            partial(pairs, b=8, d=512),
        )
        for b in (1024, 4096)
    },
    "sigmoid-4096": (
        "sigmoid, b = 4,096, d = 512",
        {"tiled": "tiled", **MATCHING},
        partial(pairs, b=4096, d=512, sigmoid=True),
        partial(pairs, b=8, d=512, sigmoid=True),
    ),
    "chunks": (
        "whole step, b = 512",
        {"plain": "one pass", "chunks": "chunks of 64"},
        partial(batch, b=512, chunk=64),
        partial(batch, b=2, chunk=2),
    ),
}


ONEDNN = tiles.onednn_linear


def choose_products(form: str) -> None:
    """Take oneDNN's products, or torch's own for the form that goes without."""
    tiles.onednn_linear = (lambda: None) if form == "torch" else ONEDNN  # type: ignore[assignment]


def resident(field: str) -> int:
    """Bytes of this process's resident memory now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def rise(step: Step) -> int:
    """Bytes by which resident memory rises during a step."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def measure_here(case: Case, form: str) -> int:
    """Rise of resident memory during one step, in a process that took a small step before."""
    choose_products(form)
    _, _, make, small = case
    small(form)()
    return rise(make(form))


def sharded_pairs(whole: int, d: int, repeats: int) -> dict[str, tuple[list[float], int]]:
    """Milliseconds of steps of sharded InfoNCE, forms in turn, and the rise of memory of one."""
    b = whole // world_size()
    text = unit(b, d, seed=2 * rank())
    image = F.normalize(text + unit(b, d, seed=2 * rank() + 1), dim=1)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(20.0, requires_grad=True)]

    def step(form: str) -> None:
        instance.TILED_ABOVE = b * whole if form == "plain" else 0
        for leaf in leaves:
            leaf.grad = None
        info_nce(*leaves, across_ranks=True).backward()

    times: dict[str, list[float]] = {"plain": [], "tiled": []}
    for repeat in range(-1, repeats):
        for form in times:
            started = time.perf_counter()
            step(form)
            if repeat >= 0:
                times[form].append(1000 * (time.perf_counter() - started))
    linux = sys.platform == "linux"
    return {form: (v, rise(partial(step, form)) if linux else 0) for form, v in times.items()}


def sharded_table(processes: int, repeats: int) -> list[str]:
    """Sharded InfoNCE, plain and tiled: the slower rank's times, and the larger rise of memory."""
    lines = [
        "# InfoNCE of a batch on several ranks: plain against tiled",
        "",
        f"`python benchmarks/losses.py --processes {processes} --repeats {repeats}`, {facts()}, "
        "one thread per process, gloo, d = 512, with exchanges. The floor of extra memory is the "
        "gathered features and their gradients, 16 bytes per number.",
        "",
        "| batch, of all ranks | form | ms | speed-up | extra MB | share | floor, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for whole in (1024, 4096, 8192):
        found = run_distributed(sharded_pairs, processes, whole, 512, repeats)
        times = {form: max((f[form][0] for f in found), key=statistics.median) for form in found[0]}
        memory = {form: max(f[form][1] for f in found) / 1e6 for form in times}
        for form, v in times.items():
            speed = statistics.median(times["plain"]) / statistics.median(v)
            lines.append(
                f"| {whole:,} | {form} | {statistics.median(v):.0f} [{min(v):.0f}, {max(v):.0f}] | "
                f"{speed:.2f} | {memory[form]:.0f} | {memory[form] / memory['plain']:.0%} | "
                f"{16 * 512 * whole / 1e6:.0f} |"
            )
    return lines


def extra_memory(key: str, form: str, threads: int) -> float | None:
    """Megabytes by which a step raises the resident memory of a fresh process."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, __file__, "--threads", str(threads), "--peak", key, form]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout) / 1e6


def table(repeats: int, threads: int, cases: dict[str, Case]) -> list[str]:
    """The cases, all in one process."""
    chosen = "" if cases == CASES else f" --cases {' '.join(cases)}"
    lines = [
        "# Losses: time and memory against the plain forms",
        "",
        f"`python benchmarks/losses.py --repeats {repeats} --threads {threads}{chosen}`, "
        f"{facts()}. "
        f"Prototypical: {NUM_PROTOTYPES:,} prototypes of width {WIDTH}, soft targets at "
        f"temperature {TEMPERATURE}; its plain form computes the target scores in each step. Whole "
        "step: two ViT-Ti/16 at 64 px with InfoNCE.",
        "",
        "| what | form | ms | speed-up | extra MB | share |",
        "|---|---|---|---|---|---|",
    ]
    progress = Progress("benchmark: losses", len(cases) * repeats)
    for number, (key, (name, forms, make, _)) in enumerate(cases.items()):
        steps = {form: make(form) for form in forms}
        times: dict[str, list[float]] = {form: [] for form in forms}
        for repeat in range(-1, repeats):
            for form, step in steps.items():
                choose_products(form)
                started = time.perf_counter()
                step()
                if repeat >= 0:
                    times[form].append(1000 * (time.perf_counter() - started))
            progress.update(number * repeats + repeat + 1, name)
        memory = {form: extra_memory(key, form, threads) for form in forms}
        first = next(iter(forms))
        for form, label in forms.items():
            v, m = times[form], memory[form]
            median = statistics.median(v)
            share = f"{m / memory[first]:.1%}" if m is not None and memory[first] else "-"
            lines.append(
                f"| {name} | {label} | {median:.1f} [{min(v):.1f}, {max(v):.1f}] | "
                f"{statistics.median(times[first]) / median:.2f} | "
                f"{'-' if m is None else f'{m:.1f}'} | {share} |"
            )
    return lines


def facts() -> str:
    found = watch.describe_environment(torch.device("cpu"))
    return (
        f"{datetime.date.today().isoformat()}; {found['device']}, torch {found['torch']}, float32, "
        "forward and backward. Median [least, most] milliseconds, forms in turn; extra memory is "
        "the rise of resident memory during a step of a fresh process"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--processes", type=int, help="measure sharded InfoNCE in so many")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "FORM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.peak:
        key, form = arguments.peak
        print(measure_here(CASES[key], form))
        return
    if arguments.processes is None:
        lines = table(
            arguments.repeats, arguments.threads, {key: CASES[key] for key in arguments.cases}
        )
    else:
        lines = sharded_table(arguments.processes, arguments.repeats)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
