"""How many images and captions a second do frozen encoders take on a CPU, in which engine?

    python benchmarks/encoding.py [--models conv vit minilm] [--cores 1 2] [--repeats 3] [--out F]

Three encoders with random weights, which are as fast as pretrained ones: EfficientNet-Lite0 and
ViT-S/16 at 224 pixels, and a BERT of the size of MiniLM on captions of 20 tokens. Each takes the
same batch of 16 (of captions 64) in PyTorch as it comes (`eager`), in PyTorch in channels-last
order, which is what `encode.engine = torch` does, compiled by `torch.compile`, in ONNX Runtime and
in OpenVINO, as `encode.engine` opens both, and in bfloat16 by PyTorch, which alone computes in less
than float32. `pipeline` is all that a command does, with the fastest of torch, onnx and openvino:
JPEGs of 500 x 375 pixels are decoded, resized and encoded into a store on the disk. Half of the
captions are repeated, and they differ in length.

Engines take turns, several times. A rate is the median of these, with the lowest and highest; the
share of the pipeline in its engine's rate is the median of ratios of neighbours. With several
numbers of cores, each has a process of its own that may use as many.
"""

import argparse
import datetime
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from protoclip.data.pairs import Sample
from protoclip.data.transforms import EvaluationTransform
from protoclip.encode.encoder import Encoder, freeze, image_encoder, text_encoder
from protoclip.encode.engine import OPENERS, PACKAGES, pass_through, write_graph
from protoclip.encode.run import encode_missing
from protoclip.encode.store import Store, hash_ids
from protoclip.models.protoclip import autocast
from protoclip.training.watch import describe_environment

MODELS = {"conv": "tf_efficientnet_lite0", "vit": "vit_small_patch16_224", "minilm": ""}
TITLES = {"conv": "EfficientNet-Lite0, 224", "vit": "ViT-S/16, 224", "minilm": "MiniLM, 20 tokens"}
SIZE, IMAGES_AT_ONCE, TEXTS_AT_ONCE = 224, 16, 64
JPEG_SIZE, JPEGS = (500, 375), 64
TOKENS, WORDS = 20, 30_000
SECONDS = 2.0  # of a turn
PASSED = {"conv": 2048, "vit": 192, "minilm": 4096}  # items of a pass of the pipeline
CPU = torch.device("cpu")
BF16 = ", bfloat16"
Rates = dict[str, list[float]]


class SentenceEncoder(nn.Module):
    """A BERT of six layers, and the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
        config = transformers.BertConfig(**sizes, num_attention_heads=12)
        self.bert = transformers.BertModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens > 0).long()
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def tokenize(captions: list[str]) -> Tensor:
    rows = [[1 + hash(word) % (WORDS - 1) for word in text.split()][:TOKENS] for text in captions]
    return torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])


def build(kind: str, engine: Any = "torch", *, is_reduced: bool = False) -> Encoder:
    torch.manual_seed(0)
    settings = {"autocast": autocast("bf16" if is_reduced else "fp32", CPU), "engine": engine}
    if kind == "minilm":
        module = freeze(SentenceEncoder(), CPU)
        return text_encoder(module, CPU, tokenize, module, ignores_padding=True, **settings)
    module = freeze(timm.create_model(MODELS[kind], num_classes=0), CPU)
    transform = EvaluationTransform(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return image_encoder(module, CPU, module, transform, name=kind, **settings)


def make_samples(kind: str) -> list[Sample]:
    """Photographs as JPEGs, or captions of 5 to 20 words of which half are repeated."""
    generator = np.random.default_rng(0)
    if kind == "minilm":
        lengths = generator.integers(5, 21, PASSED[kind] // 2)
        texts = [" ".join(map(str, generator.integers(0, WORDS, n))) for n in lengths] * 2
        return [Sample(sample_id=text, image=b"", captions=(text,), where="") for text in texts]
    encoded = []
    for _ in range(JPEGS):
        noise = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG")
        encoded.append(file.getvalue())
    return [
        Sample(sample_id=str(row), image=encoded[row % JPEGS], captions=(), where="")
        for row in range(PASSED[kind])
    ]


def open_forwards(kind: str, folder: Path, threads: int) -> dict[str, Callable[[], Any]]:
    """What passes a batch through the model, by engine; those are left out that are not there."""
    plain, last = build(kind).module, build(kind).module
    plain = plain.to(memory_format=torch.contiguous_format)
    batch = torch.randn(IMAGES_AT_ONCE, 3, SIZE, SIZE)
    batch_last = batch.contiguous(memory_format=torch.channels_last)
    if kind == "minilm":
        batch = batch_last = torch.randint(1, WORDS, (TEXTS_AT_ONCE, TOKENS))
    compiled = torch.compile(build(kind).module)

    def reduced() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return last(batch_last)

    forwards: dict[str, Callable[[], Any]] = {
        "eager": lambda: plain(batch),
        "channels-last": lambda: last(batch_last),
        "compiled": lambda: compiled(batch_last),
        f"channels-last{BF16}": reduced,
    }
    graph = folder / f"{kind}.onnx"
    write_graph(plain, {"inputs": batch[:2]}, "features", graph, is_traced=True)
    for name, packages in PACKAGES.items():
        if all(map(find_spec, packages)):
            run = OPENERS[name](str(graph), threads)
            forwards[name] = partial(pass_through, run, batch_last)
    expected = nn.functional.normalize(plain(batch), dim=-1)
    for name, forward in forwards.items():
        difference = (nn.functional.normalize(forward().float(), dim=-1) - expected).abs().max()
        assert difference < (3e-2 if BF16 in name else 1e-4), (kind, name, difference)
    return forwards


def measure(kind: str, cores: Sequence[int], repeats: int) -> dict[str, Any]:
    """Images or captions a second, by engine and turn; and of the pipeline, at both precisions."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    at_once = TEXTS_AT_ONCE if kind == "minilm" else IMAGES_AT_ONCE
    samples, rates, numbers = make_samples(kind), Rates(), count()
    shares, best = Rates(), dict[str, str]()
    hashes = hash_ids(sample.sample_id for sample in samples)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        os.environ["PROTOCLIP_CACHE"] = str(folder / "cache")
        forwards = open_forwards(kind, folder, len(cores))

        def turn(engine: str) -> float:
            passes, start = 0, time.perf_counter()
            while time.perf_counter() - start < SECONDS:
                forwards[engine]()
                passes += 1
            return at_once * passes / (time.perf_counter() - start)

        def pipeline(engine: str, suffix: str) -> float:
            engine = engine.removesuffix(suffix)
            engine = engine if engine in PACKAGES else "torch"
            encoder = build(kind, engine, is_reduced=bool(suffix))
            store = Store(folder / f"store{next(numbers)}")
            start = time.perf_counter()
            encode_missing(store, encoder, hashes, samples.__getitem__, batch_size=at_once)
            return len(samples) / (time.perf_counter() - start)

        for repeat in range(repeats):
            for engine in forwards:
                rates.setdefault(engine, []).append(turn(engine))
            for suffix in ("", BF16):
                usable = [f"{way}{suffix}" for way in ("channels-last", *PACKAGES)]
                if repeat == 0:
                    found = [way for way in usable if way in rates]
                    best[suffix] = max(found, key=lambda way: rates[way][0])
                    pipeline(best[suffix], suffix)  # exports
                before, engine = turn(best[suffix]), best[suffix]
                whole = pipeline(engine, suffix)
                rates.setdefault(f"pipeline{suffix}", []).append(whole)
                # Before and after it, since others may use the processor too.
                shares.setdefault(suffix, []).append(2 * whole / (before + turn(engine)))
    return {"model": kind, "cores": cores, "rates": rates, "best": best, "shares": shares}


def show(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def write_tables(results: list[dict[str, Any]], ceiling: float) -> str:
    versions = [f"{p} {version(p)}" for p in ("torch", "onnxruntime", "openvino") if find_spec(p)]
    facts = describe_environment(CPU)
    lines = [
        "# Frozen encoders on a CPU, by engine\n",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}; {os.cpu_count()} cores, "
        f"{facts['device'].partition(',')[0]}, Python {facts['python']}, {', '.join(versions)}. "
        "Random weights; float32 unless a column says otherwise. Images or captions a second: "
        "the median of turns, and the lowest and highest.\n",
    ]
    plain = ["eager", "channels-last", "compiled", *PACKAGES]
    names = [*plain, "pipeline", f"channels-last{BF16}", f"pipeline{BF16}"]
    lines += [f"| | cores | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for one in results:
        cells = {name: show(one["rates"][name]) for name in names if name in one["rates"]}
        for suffix, engine in one["best"].items():
            share = statistics.median(one["shares"][suffix])
            cells[f"pipeline{suffix}"] += f", {share:.2f} of {engine}"
        values = " | ".join(cells.get(name, "") for name in names)
        lines.append(f"| {TITLES[one['model']]} | {len(one['cores'])} | {values} |")
    for kind in dict.fromkeys(one["model"] for one in results):
        of_kind = {len(one["cores"]): one["rates"] for one in results if one["model"] == kind}
        if {1, 2} <= of_kind.keys():
            ratios = {
                name: statistics.median(of_kind[2][name]) / statistics.median(of_kind[1][name])
                for name in ("pipeline", f"pipeline{BF16}")
            }
            shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            lines.append(f"\n{TITLES[kind]}, two cores against one: {shown}.")
    lines.append(
        f"\nTwo processes of one core each, which share nothing, multiply matrices {ceiling:.2f} "
        "times as fast as one."
    )
    return "\n".join(lines) + "\n"


def multiply(core: int, seconds: float) -> float:
    """Products of matrices a second on one core."""
    os.sched_setaffinity(0, [core])
    torch.set_num_threads(1)
    matrix, number = torch.ones(512, 512), 0
    matrix @ matrix
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        matrix @ matrix
        number += 1
    return number / (time.perf_counter() - start)


def measure_ceiling(cores: Sequence[int]) -> float:
    """How much faster two cores are than one, where nothing is shared."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        ratios = []
        for _ in range(5):
            alone = pool.submit(multiply, cores[0], SECONDS).result()
            both = [pool.submit(multiply, core, SECONDS) for core in cores[:2]]
            ratios.append(sum(one.result() for one in both) / alone)
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results, cores = [], sorted(os.sched_getaffinity(0))
    ceiling = measure_ceiling(cores) if len(cores) > 1 else 1.0
    for kind in arguments.models:
        for number in arguments.cores:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                passed = pool.submit(measure, kind, cores[:number], arguments.repeats)
                results.append(passed.result())
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    text = write_tables(results, ceiling)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
