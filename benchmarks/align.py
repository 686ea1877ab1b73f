"""What does aligning two frozen halves cost? Encoding, a step on rows, and a store of millions.

    python benchmarks/align.py [--parts encode step store] [--rows 10000000] [--out FILE]

- `encode`: images a second through the image half into the store, decoded images given, over those
  of the forward pass alone, in turn.
- `step`: one step that trains the whole towers on images, over one that trains what lies between
  the halves on rows, at equal batch; and steps on rows in large batches, of which the last needs
  tiles: all its logits would take 4.3 GB.
- `store`: memory of a process that draws batches from a store of `--rows` rows, of 64 values each.

The halves are EfficientNet-Lite0 and a BERT of the size of MiniLM, with random weights, which are
as fast as pretrained ones.
"""

import argparse
import datetime
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from protoclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from protoclip.data.pairs import ImageTextPairs
from protoclip.features import store
from protoclip.features.half_rows import HalfRows
from protoclip.features.halves import HalfEncoder, ImagesOnce, completed
from protoclip.features.store import hash_ids
from protoclip.losses.info_nce import info_nce
from protoclip.models import loading
from protoclip.models.aligned import AlignedModel, FrozenHalves
from protoclip.models.protoclip import ProtoCLIP
from protoclip.testing import resident, tiny_pairs
from protoclip.training.run_folder import environment

REPEATS = 3
IMAGES, ENCODED_AT_ONCE = 512, 16
BATCH, LARGE_BATCHES = 64, (1024, 32_768)  # of a step of the whole towers; of others on rows
STORED_WIDTH, CAPTIONS_A_PAIR, DRAWN, DRAWS = 64, 2, 4096, 50


def model_of(folder: Path) -> ProtoCLIP:
    """EfficientNet-Lite0 and a BERT of six layers, as two halves with hidden layers between."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    config = transformers.BertConfig(**sizes, num_attention_heads=12)
    transformers.BertModel(config).save_pretrained(folder)
    halves = ModelConfig(
        embed_dim=512,
        projection="mlp",
        image=ImageTowerConfig(name="tf_efficientnet_lite0", size=224),
        text=TextTowerConfig(name=str(folder), context_length=20),
    )
    return loading.to_device(loading.model(halves, seed=0), torch.device("cpu"))


def median_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def encode(model: ProtoCLIP, folder: Path) -> dict[str, float]:
    halves = FrozenHalves(model.towers).eval().requires_grad_(False)
    encoder = HalfEncoder(
        halves,
        transform=loading.evaluation_transform(model),
        max_pixels=2**30,
        autocast=nullcontext,
    )
    pairs = ImageTextPairs(tiny_pairs(IMAGES, side=64), name="pairs", table_key="benchmark")
    images = ImagesOnce(pairs, np.arange(IMAGES))
    decoded = [encoder.read_image(images.sample(row)) for row in range(IMAGES)]
    by_id = dict(zip(images.sample_ids(), decoded, strict=True))
    encoder.read_image = lambda sample: by_id[sample.sample_id]  # type: ignore[method-assign]
    hashes, number = hash_ids(images.sample_ids()), iter(range(100))

    def forward() -> None:
        for first in range(0, IMAGES, ENCODED_AT_ONCE):
            encoder.encode(decoded[first : first + ENCODED_AT_ONCE])

    def whole() -> None:
        out = folder / f"store{next(number)}"
        completed(encoder, images, hashes, out, ENCODED_AT_ONCE, None)

    forward()
    alone, stored = [], []
    for _ in range(REPEATS):  # in turn
        start = time.perf_counter()
        forward()
        between = time.perf_counter()
        whole()
        alone.append(between - start)
        stored.append(time.perf_counter() - between)
    forward_rate, store_rate = (IMAGES / statistics.median(each) for each in (alone, stored))
    return {
        "images_per_second_of_the_forward_pass": forward_rate,
        "images_per_second_into_the_store": store_rate,
        "ratio": store_rate / forward_rate,
    }


def step(model: ProtoCLIP) -> dict[str, float]:
    on_rows = AlignedModel(model)
    optimizers: dict[int, torch.optim.Optimizer] = {
        id(each): torch.optim.AdamW(each.parameters(), lr=1e-4, fused=True)
        for each in (model, on_rows)
    }

    def train(of: ProtoCLIP, image: Tensor, text: Tensor) -> None:
        made = of.train()(image, text)
        loss = info_nce(made.image_features, made.text_features, made.logit_scale)
        optimizers[id(of)].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[id(of)].step()

    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    tokens = torch.randint(5, 8, (BATCH, 20))
    seconds, gigabytes = {}, {}
    for size in (BATCH, *LARGE_BATCHES):  # in this order: the peak is that of the process
        rows = torch.randn(size, 1280), torch.randn(size, 384)
        before, repeats = resident(), 1 if size > 10_000 else REPEATS  # it takes minutes
        seconds[size] = median_seconds(lambda rows=rows: train(on_rows, *rows), repeats)  # type: ignore[misc]
        gigabytes[size] = (peak() - before) / 1e9
    # After the others, whose peaks are lower.
    whole = median_seconds(lambda: train(model, images, tokens))
    return {
        f"seconds_of_the_whole_towers_at_{BATCH}": whole,
        **{f"seconds_on_rows_at_{size}": found for size, found in seconds.items()},
        f"gigabytes_more_on_rows_at_{LARGE_BATCHES[-1]}": gigabytes[LARGE_BATCHES[-1]],
        "ratio": whole / seconds[BATCH],
    }


def peak() -> int:
    """The most bytes of memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def simulated(folder: Path, ids: Iterator[str], rows: int) -> None:
    """A segment with random features."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def blocks() -> Iterator[np.ndarray[Any, np.dtype[np.floating]]]:
        for first in range(0, rows, 2**18):
            shape = (min(2**18, rows - first), STORED_WIDTH)
            yield generator.random(shape, dtype=np.float32)

    store.write_folder(folder, list(ids), blocks(), {"teacher": "simulated"})


def memory(folder: Path, rows: int) -> dict[str, float]:
    for half in ("image", "text"):
        if not (folder / half).is_dir():
            simulated(folder / half, (f"{half} {row}" for row in range(rows)), rows)
    before = resident()
    of = {
        half: store.Segments([store.open_folder(folder / half)], STORED_WIDTH)
        for half in ("image", "text")
    }
    generator = np.random.default_rng(0)
    captions = np.repeat(np.arange(rows), CAPTIONS_A_PAIR)
    halves = HalfRows(
        image=[of["image"]],
        text=of["text"],
        images=np.arange(rows)[:, None],
        captions=captions,
        first=np.arange(0, len(captions) + 1, CAPTIONS_A_PAIR),
        repeated=np.zeros(0, np.int64),
    )
    opened = resident()
    seconds, most = 0.0, opened
    for _ in range(DRAWS):
        chosen = generator.integers(0, rows, DRAWN)
        start = time.perf_counter()
        halves.image_rows(chosen)
        draws = generator.random(DRAWN, dtype=np.float32)
        halves.text_rows(halves.drawn_captions(chosen, draws))
        seconds += time.perf_counter() - start
        most = max(most, resident())
    return {
        "rows": rows,
        "bytes_a_row_once_opened": (opened - before) / rows,
        "megabytes_more_while_drawing": (most - opened) / 1e6,
        f"milliseconds_a_batch_of_{DRAWN}": 1000 * seconds / DRAWS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["encode", "step", "store"])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = model_of(folder / "text")
        if "encode" in given.parts:
            found["encode"] = encode(model, folder)
        if "step" in given.parts:
            found["step"] = step(model)
        if "store" in given.parts:
            found["store"] = memory(folder / "rows", given.rows)
    facts = environment(torch.device("cpu"))
    lines = ["# Aligning two frozen halves", ""]
    lines.append(f"`python benchmarks/align.py`, {datetime.date.today()}; {json.dumps(facts)}")
    for part, numbers in found.items():
        lines += ["", f"## {part}", "", "| what | value |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:,.4g} |" for name, value in numbers.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
