"""How fast is an evaluation? Images a second against CLIP_benchmark, and the memory of retrieval.

Zero-shot classification of photographs, read and encoded anew each time, in turn by CLIP_benchmark
(its webdataset loader with its default of 4 workers and batches of 64, and its `evaluate`, without
mixed precision) and by `protoclip.evaluate` with its defaults and no cache. On the same folders,
with the same models, which give equal features: a very small image tower, so that reading decides,
and an untrained ViT-B-32. The folders: photographs that were given, copied into four tars, and
photo-like JPEG files of 512 pixels (for the small tower). Measurements include the start of the
workers. A third arm resizes as with `--fast-resize`; a fourth has `EvaluationTransform`, which runs
of our own are evaluated with.

Then retrieval of 25,000 images by 5,000 captions with random features, in a process of its own.

    python benchmarks/evaluation.py FOLDER [--repeats 5] [--images 1000] > FILE

It needs `clip-benchmark` with a NumPy before 2.4: an environment of its own, and PYTHONPATH=src.
"""

import argparse
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification
from loading import write_photo
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import protoclip
from protoclip.data.transforms import EvaluationTransform
from protoclip.evaluation.retrieval import best_relevant_rank, recall_at
from protoclip.training.watch import describe_environment

SHARDS = 4  # CLIP_benchmark's workers must have one each
THEIR_WORKERS, THEIR_BATCH = 4, 64
IMAGES, CAPTIONS, WIDTH = 25_000, 5_000, 512
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "width": 64, "heads": 2, "layers": 1},
}
MODELS = {"tiny": TINY, "ViT-B-32": open_clip.get_model_config("ViT-B-32")}
Rates = dict[str, list[tuple[float, float]]]  # a second, and a second of processor time
Sample = tuple[str, bytes, bytes]  # the image's suffix, the image, its class


def save_model(folder: Path, config: dict[str, Any]) -> Path:
    """An untrained model in open_clip's format."""
    folder.mkdir()
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(text)
    torch.manual_seed(0)
    weights = open_clip.create_model(f"local-dir:{folder}").state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def photographs(place: Path) -> Iterator[Sample]:
    """All splits of a folder in CLIP_benchmark's layout."""
    for shard in sorted(place.glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            found: dict[str, bytes] = {}
            for member in tar:
                suffix = member.name.rpartition(".")[2]
                found[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
                if {"webp", "cls"} <= found.keys():
                    yield "webp", found.pop("webp"), found.pop("cls")


def photo_like(scratch: Path, classes: int, count: int) -> Iterator[Sample]:
    files = []
    for number in range(min(count, 64)):
        write_photo(scratch / "photo.jpg", number, 512)
        files.append((scratch / "photo.jpg").read_bytes())
    for number in range(count):
        yield "jpg", files[number % len(files)], str(number % classes).encode()


def write_data(folder: Path, place: Path, samples: Iterator[Sample]) -> int:
    """A data set in several tars with the class names of another; returns how many images."""
    (folder / "test").mkdir(parents=True)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(place / name, folder / name)
    (folder / "test/nshards.txt").write_text(str(SHARDS))
    count = 0
    with contextlib.ExitStack() as stack:
        tars = [
            stack.enter_context(tarfile.open(folder / f"test/{shard}.tar", "w"))
            for shard in range(SHARDS)
        ]
        for suffix, image, label in samples:
            for ending, content in ((suffix, image), ("cls", label)):
                member = tarfile.TarInfo(f"{count:06d}.{ending}")
                member.size = len(content)
                tars[count % SHARDS].addfile(member, io.BytesIO(content))
            count += 1
    return count


def theirs(model: Any, transform: Any, tokenizer: Any, data: Path) -> dict[str, float]:
    """As CLIP_benchmark's command calls it."""
    dataset = build_wds_dataset("data", transform, split="test", data_dir=str(data))
    loader = DataLoader(
        dataset.batched(THEIR_BATCH), batch_size=None, shuffle=False, num_workers=THEIR_WORKERS
    )
    texts = dataset.classes, dataset.templates
    with contextlib.redirect_stderr(io.StringIO()):
        found = zeroshot_classification.evaluate(
            model, loader, tokenizer, *texts, device="cpu", amp=False
        )
    return dict(found)


def ours(loaded: Any, data: Path) -> dict[str, float]:
    (record,) = protoclip.evaluate(*loaded, f"wds:{data}", ["zero_shot"])
    return dict(record["metrics"])


def retrieval(pipe: Any) -> None:
    """Ranks both ways; sends seconds, the process's peak memory in bytes, and before it."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(IMAGES, WIDTH, generator=generator), dim=1)
    captions = F.normalize(torch.randn(CAPTIONS, WIDTH, generator=generator), dim=1)
    # Five images share a caption, so that both ways have something to find.
    groups, own = torch.arange(IMAGES) // (IMAGES // CAPTIONS), torch.arange(CAPTIONS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    recalls = []
    for ranks in (
        best_relevant_rank(images, captions, groups, own),
        best_relevant_rank(captions, images, own, groups),
    ):
        recalls += [recall_at(ranks, k) for k in (1, 5, 10)]
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((seconds, 1024 * peak, 1024 * before))


def processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def table_rows(name: str, rates: Rates, found: dict[str, dict[str, float]]) -> list[str]:
    """A row for each arm, with ratios of medians to the first."""

    def columns(arm: str) -> list[list[float]]:
        return [[rate[which] for rate in rates[arm]] for which in range(2)]

    arms, rows = list(rates), []
    for arm in arms:
        cells = []
        for values, base in zip(columns(arm), columns(arms[0]), strict=True):
            ratio = statistics.median(values) / statistics.median(base)
            cells += [spread(values), f"{ratio:.2f}"]
        expected = found[arms[0]]
        apart = max(abs(found[arm][metric] - expected[metric]) for metric in expected)
        rows.append(f"| {name} | {arm} | {' | '.join(cells)} | {apart:.0e} |")
    return rows


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--images", type=int, default=1000, help="for the tiny tower; ViT-B-32 gets an eighth"
    )
    given = parser.parse_args()
    receive, send = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=retrieval, args=(send,))
    process.start()
    seconds, peak, before = receive.recv()
    process.join()
    print(f"retrieval: {seconds:.1f} s, {peak / 1e9:.2f} GB", file=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        classes = len((given.folder / "classnames.txt").read_text().splitlines())
        for model_name, config in MODELS.items():
            folder = save_model(scratch / model_name, config)
            loaded = protoclip.load(folder)
            library, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
            cropping = EvaluationTransform(
                size=loaded[1].size, mean=loaded[1].mean, std=loaded[1].std
            )
            count = given.images if model_name == "tiny" else given.images // 8
            kinds = {"photographs, WebP, side 80": islice(photographs(given.folder), count)}
            if model_name == "tiny":
                kinds["photo-like JPEG, side 512"] = photo_like(scratch, classes, count)
            for kind, samples in kinds.items():
                data = scratch / f"{model_name}-{kind}"
                number = write_data(data, given.folder, samples)
                arms: dict[str, Callable[[], dict[str, float]]] = {
                    "CLIP_benchmark": partial(theirs, library.eval(), transform, tokenizer, data),
                    "`protoclip.evaluate`": partial(ours, loaded, data),
                    "with `--fast-resize`": partial(
                        ours, (loaded[0], replace(loaded[1], fast=True), loaded[2]), data
                    ),
                    "with `EvaluationTransform`": partial(
                        ours, (loaded[0], cropping, loaded[2]), data
                    ),
                }
                rates: Rates = {arm: [] for arm in arms}
                found: dict[str, dict[str, float]] = {}
                for repeat in range(1 + given.repeats):
                    for arm, measure in arms.items():
                        began, used = time.perf_counter(), processor_seconds()
                        found[arm] = measure()
                        if repeat:  # the first round warms up
                            wall = time.perf_counter() - began
                            rates[arm].append(
                                (number / wall, number / (processor_seconds() - used))
                            )
                rows += table_rows(f"{model_name} | {kind}, {number}", rates, found)
                print(*rows[-len(arms) :], sep="\n", file=sys.stderr)
    facts = describe_environment(torch.device("cpu"))
    versions = ", ".join(
        f"{package} {version(package)}"
        for package in ("clip-benchmark", "webdataset", "open_clip_torch", "numpy", "pillow")
    )
    lines = [
        "# Evaluation: images a second, and the memory of retrieval",
        "",
        f"`python benchmarks/evaluation.py {given.folder} --repeats {given.repeats} --images "
        f"{given.images}`, {datetime.date.today().isoformat()}; {facts['device']}, "
        f"{os.cpu_count()} cores, torch {facts['torch']}, {versions}. Images a second of a whole "
        f"zero-shot evaluation: median [least, most] of {given.repeats} rounds, in turn. Processor "
        "time is that of the process and its workers; others lengthen it less than wall time.",
        "",
        "| image tower | images | by | a second | ratio | a second of processor time | ratio "
        "| metrics apart |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Retrieval, {IMAGES:,} images by {CAPTIONS:,} captions, random features of width {WIDTH}, "
        f"both ways: {seconds:.1f} s, peak memory of the process {peak / 1e9:.2f} GB, of which "
        f"{before / 1e9:.2f} GB were there before (Python, PyTorch and the features).",
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
