"""What does grouping cost? Wall clock of ProtoCLIP over CLIP at equal samples, and where it goes.

CLIP, also with positives shared, and ProtoCLIP with the bundled teacher and prototypes
from extraction or from the queue, there also without the teacher's relations, in alternation, each
for one episode of warm-up (not counted) and two counted ones.

    python benchmarks/step_cost.py [--repeats 3] [--case demo vit] [--workers N] [--out FILE]

Cases: `demo`, the demonstration's towers; `vit`, a ViT-S/16 at 112 pixels on the same images;
`rn50`, an RN50 at 224 pixels with batch 512, 20,000 prototypes and images made on the device, for
GPUs. Without `--case`, `demo` and `vit` on a CPU, all of them on a GPU.

`waits` is the share of an episode in which nothing is computed, since the next batch is not read
yet; it should be at most 2% with workers on cores of their own. The first batch of a pass should
be waited for no longer than others.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from protoclip.cli import demo
from protoclip.config import Config, ImageTowerConfig, ModelConfig
from protoclip.data import loader, sources
from protoclip.data.loader import Batch
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.sampler import Episode
from protoclip.distributed import collectives
from protoclip.losses.objective import objective
from protoclip.models import loading
from protoclip.models.protoclip import Embeddings, resolve_precision
from protoclip.models.start import resolve_start
from protoclip.progress import Progress
from protoclip.training import run, watch
from protoclip.training.plan import Plan, make_plan
from protoclip.training.trainer import Trainer

COUNTED = 2
PARTS = ("extract", "cluster", "back_translate", "data", "loss")


def base(case: str) -> Config:
    """The CLIP arm of a case."""
    config = make_plan(demo.arms()["CLIP"]).config
    if case == "vit":
        tower = ImageTowerConfig(name="vit_small_patch16_224", size=112)
        return replace(
            config,
            model=replace(config.model, image=tower, embed_dim=384),
            episodes=replace(config.episodes, size=1024),
            prototypes=replace(config.prototypes, number=100),
        )
    if case == "rn50":
        return replace(
            config,
            model=ModelConfig(name="RN50"),
            episodes=replace(config.episodes, size=199_680, batch_size=512),
            prototypes=replace(config.prototypes, number=20_000),
        )
    return config


def arms(case: str) -> dict[str, Config]:
    """CLIP, also with pairs that match, and ProtoCLIP with its teacher and either source of
    prototypes; from the queue also with the teacher's groups alone."""
    clip = base(case)
    # The bundled teacher knows 7,077 samples; the synthetic ones have none.
    arm = demo.arms()["CLIP" if case == "rn50" else "ProtoCLIP + teacher"]
    with_teacher = make_plan(arm).config
    grouped = replace(
        clip,
        loss=replace(with_teacher.loss, prototypical=1.0),
        teacher=replace(with_teacher.teacher, number=clip.prototypes.number),
    )
    sharing = replace(clip, loss=replace(clip.loss, positives="shared"))
    queue = replace(grouped, prototypes=replace(grouped.prototypes, source="queue"))
    return {
        "CLIP": clip,
        "CLIP, positives shared": sharing,
        "ProtoCLIP, extract": replace(
            grouped, prototypes=replace(grouped.prototypes, source="extract")
        ),
        "ProtoCLIP, queue": queue,
        "ProtoCLIP, queue, groups alone": replace(
            queue, teacher=replace(queue.teacher, distil=0.0)
        ),
    }


def synthetic(config: Config, device: torch.device) -> Callable[..., Iterator[Batch]]:
    """Batches of images that are made on the device, without a loader."""
    size = config.episodes.batch_size

    def batches(episode: Episode, start: int = 0) -> Iterator[Batch]:
        image = torch.randn(size, 3, 224, 224, device=device)
        image = image.contiguous(memory_format=torch.channels_last)
        text = torch.randint(1, 49_000, (size, 77), device=device)
        text[:, -1] = 49_407
        for first in range(0, len(episode.rows), size):
            position = torch.arange(first, first + size, device=device)
            # The same images each time, but pairs that are new.
            names = [str(place) for place in range(first, first + size)]
            keys = torch.stack([position, position // 2], dim=1)
            yield Batch(position=position, sample_id=names, image=image, text=text, groups=keys)

    return batches


@contextmanager
def timed_batches() -> Iterator[list[float]]:
    """How long each batch is waited for, which this process reads or its workers do."""
    seconds: list[float] = []
    items_of = loader.iterate_items

    def timed(batches: Any) -> Iterator[Any]:
        items = items_of(batches)
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            seconds.append(time.perf_counter() - started)
            yield item

    loader.iterate_items = timed  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        loader.iterate_items = items_of


def episode_seconds(
    case: str, config: Config, samples: Pairs | SampleStream
) -> dict[str, list[float]]:
    """Seconds of each counted episode, and of its parts."""
    config = replace(
        config, episodes=replace(config.episodes, count=1 + COUNTED, warm_up=1, locked_image=0)
    )
    device = collectives.choose_device(config.run.device)
    model = loading.to_device(loading.build_model(resolve_start(config.model), seed=0), device)
    parts: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, timed_batches() as waits:
        opened = open_teachers(config, samples, print)
        start = resolve_start(config.model)
        plan = Plan(config=config, start=start, samples=samples, teachers=opened)
        built = run.Run(plan, model, folder=Path(folder))
        trainer = built.trainer

        def batches(episode: Episode) -> Iterator[Batch]:
            return built.loader.batches(built.training_pass(episode.index))

        if case == "rn50":
            batches = synthetic(config, device)
            prototypes = trainer.prototypes
            prototypes.source = replace(prototypes.source, batches=batches)
        ends = [0.0]
        for index in range(1 + COUNTED):
            episode, before = built.episode(index), len(waits)
            metrics = trainer.start_episode(episode)
            for batch in batches(episode):
                logged = (trainer.step + 1) % config.run.log_every == 0
                trainer.train_step(batch, detailed=logged)
            if device.type == "cuda":
                torch.cuda.synchronize()
            metrics |= trainer.end_episode()
            ends.append(trainer.throughput.seconds)
            for name in ("extract", "cluster", "back_translate", "data"):
                if index and f"train/seconds/{name}" in metrics:
                    parts[name].append(metrics[f"train/seconds/{name}"])
            if index and (waited := waits[before:]):
                a_pass = config.episodes.size // config.episodes.batch_size
                parts["waits"].append(sum(waited))
                parts["first"] += waited[::a_pass]
                parts["others"] += [w for n, w in enumerate(waited) if n % a_pass]
        parts["episode"] = [end - start for start, end in pairwise(ends[1:])]
        parts["loss"] = [loss_seconds(trainer, config, built.episode(COUNTED), device)]
    return parts


def loss_seconds(trainer: Trainer, config: Config, episode: Episode, device: torch.device) -> float:
    """Seconds that an episode's losses take, forward and backward, down to the embeddings."""
    size, width = config.episodes.batch_size, 256
    targets, assignments = None, {}
    if config.uses_prototypes:
        trainer.start_episode(episode)
        targets = trainer.prototypes.targets
        assignments = {
            space: found.assignments[:size] for space, found in trainer.prototypes.clusters.items()
        }
        width = next(iter(targets.values())).lookup.shape[1]
    rows = [
        torch.nn.functional.normalize(torch.randn(size, width, device=device), dim=1)
        for _ in range(4)
    ]
    times = []
    for _ in range(5):
        leaves = [row.clone().requires_grad_() for row in rows]
        scale = torch.tensor(14.0, device=device, requires_grad=True)
        started = time.perf_counter()
        embeddings = Embeddings(
            image_features=leaves[0],
            text_features=leaves[1],
            image_projections=leaves[2],
            text_projections=leaves[3],
            logit_scale=scale,
            prototype_logit_scale=scale,
        )
        losses, _ = objective(
            embeddings,
            targets,
            assignments,
            weights=trainer.weights,
            groups=torch.arange(2 * size, device=device).view(size, 2) // 4,
            detailed=False,
        )
        torch.stack(list(losses.values())).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * (config.episodes.size // size)


def measure(case: str, repeats: int, workers: int | None) -> list[str]:
    """The table of one case."""
    configs, given = arms(case), ""
    if workers is not None:
        given = f" --workers {workers}"
        configs = {
            name: replace(config, data=replace(config.data, workers=workers))
            for name, config in configs.items()
        }
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in configs}
    samples = sources.open_samples(configs["CLIP"])
    progress = Progress(f"benchmark: step cost, {case}", repeats * len(configs))
    for repeat in range(repeats):
        for number, (name, config) in enumerate(configs.items()):
            for part, values in episode_seconds(case, config, samples).items():
                seconds[name][part] += values
            progress.update(repeat * len(configs) + number + 1, name)
    config = configs["CLIP"]
    device = collectives.choose_device(config.run.device)
    facts = watch.describe_environment(device)
    lines = [
        f"## {case}",
        "",
        f"`python benchmarks/step_cost.py --repeats {repeats} --case {case}{given}`, "
        f"{datetime.date.today().isoformat()}; {facts['device']}, torch {facts['torch']}, "
        f"{resolve_precision(config.run.precision, device)}; "
        f"episodes of {config.episodes.size} pairs, "
        f"batch {config.episodes.batch_size}, {config.model.name or config.model.image.name}, "
        f"{config.prototypes.number} prototypes a space. Seconds an episode: median "
        f"[least, most] of {repeats * COUNTED}, arms in turn; parts are medians, and so are the "
        "milliseconds that the first batch of a pass and another one are waited for.",
        "",
        "| arm | episode | ratio to CLIP | "
        + " | ".join(PARTS).replace("_", "-")
        + " | waits | first | another |",
        "|---" * (6 + len(PARTS)) + "|",
    ]
    baseline = statistics.median(seconds["CLIP"]["episode"])
    for name, parts in seconds.items():
        whole = parts["episode"]
        span = f"{statistics.median(whole):.2f} [{min(whole):.2f}, {max(whole):.2f}]"
        shown = [f"{statistics.median(parts[p]):.3f}" if parts[p] else "-" for p in PARTS]
        shown += ["-"] * 3
        if parts["waits"]:
            shares = [waited / all_of for waited, all_of in zip(parts["waits"], whole, strict=True)]
            batches = [1000 * statistics.median(parts[name]) for name in ("first", "others")]
            shown[-3:] = [f"{statistics.median(shares):.1%}", *(f"{ms:.1f}" for ms in batches)]
        ratio = statistics.median(whole) / baseline
        lines.append(f"| {name} | {span} | {ratio:.2f} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", nargs="+", choices=["demo", "vit", "rn50"])
    parser.add_argument("--workers", type=int, help="processes that read; as data.workers")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    default = ["demo", "vit"]
    if collectives.choose_device("auto").type == "cuda":
        default.append("rn50")
    lines = ["# Step cost: ProtoCLIP over CLIP at equal samples", ""]
    for case in arguments.case or default:
        lines += measure(case, arguments.repeats, arguments.workers)
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
