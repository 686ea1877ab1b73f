"""How fast is K-means, and how good? Engines, schedules, and back-translation, on one thread.

Three tables: all installed engines from the same start for equal iterations; starts and numbers of
iterations against three restarts of 20 iterations from rows drawn uniformly; and means over
assignments against a loop over clusters. Times are CPU seconds of one thread, the least of the
repeats.

    python benchmarks/kmeans.py [--quick] [--run FOLDER] [--out FILE]

Projections are those of a trained run, for example of the demonstration; without `--run` the
ProtoCLIP arm of the demonstration is trained for some episodes first.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before a library with threads of its own is loaded

import argparse
import datetime
import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from threadpoolctl import threadpool_info
from torch import Tensor

import protoclip
from protoclip import back_translate, kmeans
from protoclip.cli import demo
from protoclip.data.emoji import emoji_table
from protoclip.progress import Progress
from protoclip.prototypes import kmeans as clustering
from protoclip.training import run

EPISODE, PROTOTYPES = 4096, 400  # of the demonstration
OPTIONAL = {"faiss": "faiss-cpu", "superkmeans": "superkmeans"}
REFERENCE = {"init": "random", "restarts": 3, "iterations": 20}
SCHEDULES: dict[str, dict[str, Any]] = {
    "random, 20 iterations, best of 3": REFERENCE,
    "random, 20 iterations": {"init": "random", "iterations": 20},
    **{
        f"spread, {iterations} iterations": {"init": "k-means++", "iterations": iterations}
        for iterations in (5, 6, 10, 20)
    },
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def mixture(rows: int, *, clusters: int, seed: int = 0) -> Tensor:
    """Unit vectors of 128 dimensions around as many centres as there are to be clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, 128, generator=generator)
    member = torch.randint(0, len(centres), (rows,), generator=generator)
    noise = torch.randn(rows, 128, generator=generator)
    return torch.nn.functional.normalize(centres[member] + noise, dim=1)


def trained_projections(folder: str | None, episodes: int) -> dict[str, Tensor]:
    """Image and text projections of the bundled training pairs."""
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = f"{scratch}/run"
            config = demo.arms()["ProtoCLIP"]
            config = replace(
                config,
                run=replace(config.run, out=folder, evaluate=False, device="cpu"),
                episodes=replace(config.episodes, count=episodes),
            )
            run.train(config)
        model, transform, tokenizer = protoclip.load(folder)
    table = emoji_table("train")
    images, texts = [], []
    progress = Progress("projections", len(table))
    with torch.inference_mode():
        for first in range(0, len(table), 256):
            part = table.slice(first, 256)
            pictures = [
                transform(Image.open(io.BytesIO(picture)).convert("RGB"))
                for picture in part["image"].to_pylist()
            ]
            embeddings = model(torch.stack(pictures), tokenizer(part["caption"].to_pylist()))
            images.append(embeddings.image_projections.float())
            texts.append(embeddings.text_projections.float())
            progress.update(first + len(part))
    return {"image projections": torch.cat(images), "text projections": torch.cat(texts)}


@contextmanager
def without_bfloat16() -> Iterator[None]:
    is_fast = clustering.is_fast
    clustering.is_fast = lambda features, num_clusters: False
    try:
        yield
    finally:
        clustering.is_fast = is_fast


def cluster(engine: str, features: Tensor, start: Tensor, iterations: int) -> clustering.KMeans:
    """An engine by its name in the table; SuperKMeans chooses a start of its own."""
    settings: dict[str, Any] = {"iterations": iterations, "seed": 0, "backend": engine}
    if engine == "superkmeans":
        return kmeans(features, len(start), init="random", **settings)
    if engine == "torch, float32 only":
        with without_bfloat16():
            return kmeans(features, len(start), init=start, **settings | {"backend": "torch"})
    return kmeans(features, len(start), init=start, **settings)


def engines_table(sizes: list[tuple[int, int, int, int]]) -> list[str]:
    """Each installed engine: equal iterations from the same rows, and what one more costs.

    Args:
        sizes: Rows, clusters, iterations and repeats.
    """
    engines = ["torch", "torch, float32 only"]
    engines += [engine for engine in OPTIONAL if importlib.util.find_spec(engine)]
    lines = [
        "| rows x 128, clusters | iterations | engine | seconds | seconds an iteration more "
        "| speed to faiss | speed to faiss, an iteration | inertia to faiss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine in engines:  # what is loaded or set up once takes no part
        cluster(engine, mixture(2000, clusters=100), mixture(100, clusters=2), 1)
    progress = Progress("engines", sum(rows * times for rows, _, _, times in sizes) * len(engines))
    done = 0
    for rows, clusters, most, repeats in sizes:
        features = mixture(rows, clusters=clusters)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        start = features[order[:clusters]]
        times: dict[tuple[str, int], list[float]] = {}
        inertia: dict[str, float] = {}
        for _ in range(repeats):
            for engine in engines:
                for iterations in (1, most):
                    spent, result = timed(lambda: cluster(engine, features, start, iterations))  # noqa: B023
                    times.setdefault((engine, iterations), []).append(spent)
                    inertia[engine] = result.inertia
                done += rows
                progress.update(done, f"{rows} rows, {engine}")
        least = {key: min(values) for key, values in times.items()}
        more = {e: (least[e, most] - least[e, 1]) / (most - 1) for e in engines}
        for engine in engines:
            against = ["-", "-", "-"]
            if "faiss" in engines:
                against = [
                    f"{least['faiss', most] / least[engine, most]:.2f}",
                    f"{more['faiss'] / more[engine]:.2f}",
                    f"{100 * (inertia[engine] / inertia['faiss'] - 1):+.2f}%",
                ]
            lines.append(
                f"| {rows:,}, {clusters:,} | {most} | {engine} | {least[engine, most]:.3f} "
                f"| {more[engine]:.3f} | {' | '.join(against)} |"
            )
    return lines


def schedules_table(data: dict[str, tuple[list[Tensor], int]]) -> list[str]:
    """Cost and inertia of starts and numbers of iterations, as means over samples and seeds."""
    lines = [
        "| data | clusters | schedule | cost to best of 3 | seconds | iterations done "
        "| inertia to best of 3 | clusters of one row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    progress = Progress("schedules", len(data) * len(SCHEDULES))
    done = 0
    for name, (samples, clusters) in data.items():
        spent: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
        found: dict[str, list[clustering.KMeans]] = {schedule: [] for schedule in SCHEDULES}
        for schedule, settings in SCHEDULES.items():
            for seed, features in enumerate(samples):
                took, result = timed(lambda: kmeans(features, clusters, seed=seed, **settings))  # noqa: B023
                spent[schedule].append(took)
                found[schedule].append(result)
            done += 1
            progress.update(done, f"{name}, {schedule}")
        first = next(iter(SCHEDULES))
        for schedule, results in found.items():
            excess = [
                100 * (result.inertia / reference.inertia - 1)
                for result, reference in zip(results, found[first], strict=True)
            ]
            error = statistics.stdev(excess) / len(excess) ** 0.5 if len(excess) > 1 else 0.0
            single = [int((r.assignments.bincount() == 1).sum()) for r in results]
            lines.append(
                f"| {name} | {clusters:,} | {schedule} "
                f"| {sum(spent[schedule]) / sum(spent[first]):.2f} "
                f"| {statistics.mean(spent[schedule]):.3f} "
                f"| {statistics.mean(len(r.history) - 1 for r in results):.1f} "
                f"| {statistics.mean(excess):+.2f}% ± {error:.2f} "
                f"| {statistics.mean(single):.0f} |"
            )
    return lines


def translation_table(rows: int, clusters: int) -> list[str]:
    """Means over assignments against one pass over all rows for each cluster."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, 128, generator=generator)
    assignments = torch.randint(0, clusters, (rows,), generator=generator)
    ours = min(timed(lambda: back_translate(assignments, features, clusters))[0] for _ in range(5))
    progress = Progress("loop over clusters", clusters)
    loop = 0.0
    means = []
    for first in range(0, clusters, 500):
        part = range(first, min(first + 500, clusters))
        took, some = timed(lambda: [features[assignments == j].mean(0) for j in part])  # noqa: B023
        loop += took
        means += some
        progress.update(part.stop)
    difference = (
        (torch.stack(means).nan_to_num() - back_translate(assignments, features, clusters))
        .abs()
        .max()
    )
    return [
        "| rows x 128, clusters | loop, seconds | segmented sum, seconds | loop / sum "
        "| largest difference |",
        "|---|---|---|---|---|",
        f"| {rows:,}, {clusters:,} | {loop:.2f} | {ours:.4f} | {loop / ours:.0f} "
        f"| {float(difference):.1e} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--run", help="run folder with a trained model; else one is trained")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    sizes = [(20_000, 2_000, 10, 5), (200_000, 20_000, 3, 2)]
    if quick:
        sizes = [(5_000, 500, 4, 2)]
    seeds = range(2 if quick else 5)

    projections = trained_projections(arguments.run, episodes=2 if quick else 8)
    data = {
        f"mixture, {sizes[0][0]:,}": (
            [mixture(sizes[0][0], clusters=sizes[0][1], seed=seed) for seed in seeds],
            sizes[0][1],
        ),
        f"mixture, {EPISODE:,}": (
            [mixture(EPISODE, clusters=PROTOTYPES, seed=seed) for seed in seeds],
            PROTOTYPES,
        ),
    }
    for name, features in projections.items():
        draws = [
            torch.randint(
                0, len(features), (EPISODE,), generator=torch.Generator().manual_seed(seed)
            )
            for seed in seeds
        ]
        data[f"{name}, {EPISODE:,}"] = ([features[rows] for rows in draws], PROTOTYPES)

    engines = engines_table(sizes)
    schedules = schedules_table(data)
    translation = translation_table(*sizes[-1][:2])

    facts = run.environment(torch.device("cpu"))
    installed = [
        f"{package} {version(package)}"
        for module, package in OPTIONAL.items()
        if importlib.util.find_spec(module)
    ]
    kernels = [
        f"{Path(library['filepath']).parent.name} {library['architecture']}"
        for library in threadpool_info()
        if library["internal_api"] == "openblas"
    ]
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    options = " --quick" * quick + " --run FOLDER" * bool(arguments.run)
    text = "\n".join(
        [
            "# K-means: engines, schedules, back-translation",
            "",
            f"`python benchmarks/kmeans.py{options}`, {datetime.date.today().isoformat()}; "
            f"{facts['device']}, bfloat16 {'in' if native else 'not in'} hardware, "
            f"torch {facts['torch']}, {', '.join(installed) or 'no other engine'}; "
            f"OpenBLAS kernels: {', '.join(kernels) or 'none'}. CPU seconds of one thread.",
            "",
            "## Engines, from the same rows",
            "",
            *engines,
            "",
            f"## Schedules, mean of {len(seeds)} seeds",
            "",
            *schedules,
            "",
            "## Back-translation",
            "",
            *translation,
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
