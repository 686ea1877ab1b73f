"""How fast and how good is K-means? Against faiss, between schedules, and back-translation.

Three tables: this package and faiss, if installed, from the same start; starts and numbers of
iterations against the best of three random starts of 20 iterations; and means over assignments
against a loop over clusters. Times are CPU seconds of one thread, the least of the repeats.

    python benchmarks/kmeans.py [--quick] [--run FOLDER] [--out FILE]

`--run` is a trained run, such as the demonstration's, whose projections are clustered too.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before a library with threads of its own is loaded

import argparse
import datetime
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import protoclip
from protoclip import back_translate, kmeans
from protoclip.data.emoji import emoji_table
from protoclip.progress import Progress
from protoclip.prototypes import kmeans as clustering
from protoclip.prototypes.kmeans import nearest

try:
    import faiss
except ImportError:
    faiss = None

EPISODE, PROTOTYPES = 4096, 400  # of the demonstration
SCHEDULES: dict[str, dict[str, Any]] = {
    "random, 20 iterations, best of 3": {"init": "random", "restarts": 3, "iterations": 20},
    "random, 20 iterations": {"init": "random", "iterations": 20},
    **{
        f"k-means++, {n} iterations": {"init": "k-means++", "iterations": n} for n in (5, 6, 10, 20)
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


def trained_projections(folder: str) -> dict[str, Tensor]:
    """Image and text projections of the bundled training pairs."""
    model, transform, tokenizer = protoclip.load(folder)
    table = emoji_table("train")
    images, texts = [], []
    with torch.inference_mode():
        for first in range(0, len(table), 256):
            part = table.slice(first, 256)
            files = [io.BytesIO(content) for content in part["image"].to_pylist()]
            pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
            embeddings = model(pixels, tokenizer(part["caption"].to_pylist()))
            images.append(embeddings.image_projections.float())
            texts.append(embeddings.text_projections.float())
    return {"image projections": torch.cat(images), "text projections": torch.cat(texts)}


def cluster(engine: str, features: Tensor, start: Tensor, iterations: int) -> float:
    """Inertia after iterations from a given start."""
    if engine == "faiss":
        trained = faiss.Kmeans(features.shape[1], len(start), niter=iterations, seed=0)
        trained.cp.min_points_per_centroid = 1
        trained.cp.max_points_per_centroid = len(features)
        trained.train(features.numpy(), init_centroids=start.numpy())
        return float(nearest(features, torch.from_numpy(trained.centroids))[1].double().sum())
    pays = clustering.bfloat16_pays
    if engine == "float32 only":
        clustering.bfloat16_pays = lambda *given: False
    try:
        return kmeans(features, len(start), init=start, iterations=iterations, seed=0).inertia
    finally:
        clustering.bfloat16_pays = pays


def engines_table(sizes: list[tuple[int, int, int, int]]) -> list[str]:
    """Equal iterations from the same rows, and what one iteration more costs.

    Sizes are rows, clusters, iterations and repeats.
    """
    engines = ["protoclip", "float32 only", *(["faiss"] if faiss else [])]
    lines = [
        "| rows x 128, clusters | iterations | engine | seconds | seconds an iteration more "
        "| inertia |",
        "|---|---|---|---|---|---|",
    ]
    for engine in engines:  # load and set up what is needed once
        cluster(engine, mixture(2000, clusters=100), mixture(100, clusters=2), 1)
    progress = Progress("engines", len(sizes))
    for done, (rows, clusters, most, repeats) in enumerate(sizes, 1):
        features = mixture(rows, clusters=clusters)
        start = features[
            torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:clusters]
        ]
        times: dict[tuple[str, int], list[float]] = {}
        inertia: dict[str, float] = {}
        for _ in range(repeats):
            for engine in engines:
                for n in (1, most):
                    spent, inertia[engine] = timed(lambda: cluster(engine, features, start, n))  # noqa: B023
                    times.setdefault((engine, n), []).append(spent)
        for engine in engines:
            one, all_ = min(times[engine, 1]), min(times[engine, most])
            lines.append(
                f"| {rows:,}, {clusters:,} | {most} | {engine} | {all_:.3f} "
                f"| {(all_ - one) / (most - 1):.3f} | {inertia[engine]:.6g} |"
            )
        progress.update(done, f"{rows} rows")
    return lines


def schedules_table(data: dict[str, tuple[list[Tensor], int]]) -> list[str]:
    """Cost and inertia of starts and numbers of iterations, as means over samples and seeds."""
    lines = [
        "| data | clusters | schedule | cost to best of 3 | seconds | iterations done "
        "| inertia to best of 3 | clusters of one row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    progress = Progress("schedules", len(data) * len(SCHEDULES))
    for name, (samples, clusters) in data.items():
        reference: list[float] = []
        for schedule, settings in SCHEDULES.items():
            runs = [  # times and results
                timed(lambda: kmeans(features, clusters, seed=seed, **settings))  # noqa: B023
                for seed, features in enumerate(samples)
            ]
            spent, found = sum(seconds for seconds, _ in runs), [result for _, result in runs]
            if not reference:
                whole, reference = spent, [result.inertia for result in found]
            excess = [
                100 * (result.inertia / other - 1)
                for result, other in zip(found, reference, strict=True)
            ]
            single = [int((result.assignments.bincount() == 1).sum()) for result in found]
            lines.append(
                f"| {name} | {clusters:,} | {schedule} | {spent / whole:.2f} "
                f"| {spent / len(runs):.3f} "
                f"| {statistics.mean(len(r.history) - 1 for r in found):.1f} "
                f"| {statistics.mean(excess):+.2f}% ± "
                f"{statistics.stdev(excess) / len(excess) ** 0.5:.2f} "
                f"| {statistics.mean(single):.0f} |"
            )
            progress.update(len(lines) - 2, f"{name}, {schedule}")
    return lines


def translation_table(rows: int, clusters: int) -> list[str]:
    """Means over assignments against one pass over all rows for each cluster."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, 128, generator=generator)
    assignments = torch.randint(0, clusters, (rows,), generator=generator)
    ours, means = min(
        (timed(lambda: back_translate(assignments, features, clusters)) for _ in range(5)),
        key=lambda found: found[0],
    )
    loop, slow = timed(lambda: [features[assignments == j].mean(0) for j in range(clusters)])
    difference = (torch.stack(slow).nan_to_num() - means).abs().max()
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
    parser.add_argument("--run", help="run folder with a trained model")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    sizes = [(5_000, 500, 4, 2)] if quick else [(20_000, 2_000, 10, 5), (200_000, 20_000, 3, 2)]
    seeds = range(2 if quick else 5)
    data = {
        f"mixture, {rows:,}": ([mixture(rows, clusters=k, seed=seed) for seed in seeds], k)
        for rows, k in (sizes[0][:2], (EPISODE, PROTOTYPES))
    }
    projections = trained_projections(arguments.run) if arguments.run else {}
    for name, features in projections.items():
        draws = [
            torch.randint(len(features), (EPISODE,), generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        data[f"{name}, {EPISODE:,}"] = ([features[rows] for rows in draws], PROTOTYPES)
    facts = describe_environment(torch.device("cpu"))
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    options = " --quick" * quick + " --run FOLDER" * bool(arguments.run)
    lines = [
        "# K-means: speed, schedules, back-translation",
        "",
        f"`python benchmarks/kmeans.py{options}`, {datetime.date.today().isoformat()}; "
        f"{facts['device']}, bfloat16 {'in' if native else 'not in'} hardware, torch "
        f"{facts['torch']}, {f'faiss {faiss.__version__}' if faiss else 'no faiss'}. CPU seconds "
        "of one thread.",
        *["", "## From the same start", "", *engines_table(sizes)],
        *["", f"## Schedules, mean of {len(seeds)} seeds", "", *schedules_table(data)],
        *["", "## Back-translation", "", *translation_table(*sizes[-1][:2]), ""],
    ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
