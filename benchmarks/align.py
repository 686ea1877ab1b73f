"""What does aligning two frozen encoders cost? Encoding, a step on rows, and a store of millions.

    python benchmarks/align.py [--parts encode step store] [--rows 10000000] [--out FILE]

- `encode`: images a second through the image encoder into the store, decoded images given, over
  those of the forward pass alone, in turn.
- `step`: one step that trains the whole towers on images, over one that trains what lies between
  the encoders on rows, at equal batch; and steps on rows in large batches, of which the last needs
  tiles: all its logits would take 4.3 GB.
- `store`: what the first rank does once for `--rows` pairs with two captions each; and what each
  rank holds and does at each start, and while it draws batches from a store of 64 values a row.

The encoders are EfficientNet-Lite0 and a BERT of the size of MiniLM, with random weights, which are
as fast as pretrained ones.
"""

import argparse
import ctypes
import datetime
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from protoclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sampler import EpisodeSampler
from protoclip.data.sources import AllBut
from protoclip.encode.encoder import image_side
from protoclip.encode.rows import PairRows, find_mapped, open_listing, write_listing
from protoclip.encode.run import encode_missing, read_image
from protoclip.encode.store import BLOCK_ROWS, Hashes, Store, StoredRows, hash_ids
from protoclip.losses.info_nce import info_nce
from protoclip.models import loading
from protoclip.models.projections import AlignedModel, FrozenEncoders
from protoclip.models.protoclip import ProtoCLIP, evaluation_transform
from protoclip.models.start import resolve_start
from protoclip.training.watch import describe_environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from testing import resident, tiny_pairs

REPEATS = 3
IMAGES, ENCODED_AT_ONCE = 512, 16
BATCH, LARGE_BATCHES = 64, (1024, 32_768)  # of a step of the whole towers; of others on rows
STORED_WIDTH, DRAWN, DRAWS = 64, 4096, 50


def model_of(folder: Path) -> ProtoCLIP:
    """EfficientNet-Lite0 and a BERT of six layers, as two encoders with projections between."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    config = transformers.BertConfig(**sizes, num_attention_heads=12)
    transformers.BertModel(config).save_pretrained(folder)
    section = ModelConfig(
        embed_dim=512,
        image=ImageTowerConfig(name="tf_efficientnet_lite0", size=224),
        text=TextTowerConfig(name=str(folder), context_length=20),
    )
    return loading.to_device(
        loading.build_model(resolve_start(section), seed=0), torch.device("cpu")
    )


def median_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def encode(model: ProtoCLIP, folder: Path) -> dict[str, float]:
    encoders = FrozenEncoders(model.towers).eval().requires_grad_(False)
    transform = evaluation_transform(model)
    encoder = image_side(encoders, transform, autocast=nullcontext)
    pairs = ImageTextPairs(tiny_pairs(IMAGES, side=64), name="pairs", table_key="benchmark")
    samples = [read_image(pairs, row) for row in range(IMAGES)]
    decoded = [encoder.prepare(sample) for sample in samples]
    by_id = {sample.sample_id: made for sample, made in zip(samples, decoded, strict=True)}
    encoder.prepare = lambda sample: by_id[sample.sample_id]
    hashes, number = hash_ids(by_id), iter(range(100))

    def forward() -> None:
        for first in range(0, IMAGES, ENCODED_AT_ONCE):
            encoder.encode(decoded[first : first + ENCODED_AT_ONCE])

    def whole() -> None:
        store = Store(folder / f"store{next(number)}")
        encode_missing(store, encoder, hashes, samples.__getitem__, batch_size=ENCODED_AT_ONCE)

    forward()
    alone, stored = [], []
    for _ in range(REPEATS):  # in turn
        start = time.perf_counter()
        forward()
        between = time.perf_counter()
        whole()
        alone.append(between - start)
        stored.append(time.perf_counter() - between)
    forward_rate, store_rate = (IMAGES / statistics.median(seconds) for seconds in (alone, stored))
    return {
        "images_per_second_of_the_forward_pass": forward_rate,
        "images_per_second_into_the_store": store_rate,
        "ratio": store_rate / forward_rate,
    }


def step(model: ProtoCLIP) -> dict[str, float]:
    on_rows = AlignedModel(model)
    optimizers: dict[int, torch.optim.Optimizer] = {
        id(trained): torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)
        for trained in (model, on_rows)
    }

    def train(trained: ProtoCLIP, image: Tensor, text: Tensor) -> None:
        made = trained.train()(image, text)
        loss = info_nce(made.image_features, made.text_features, made.logit_scale)
        optimizers[id(trained)].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[id(trained)].step()

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


class MadeUp:
    """Pairs with two captions each, whose images are bytes in a table."""

    name = key = "made up"

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def image_key(self, row: int) -> str:
        return f"image {row}"

    def sample_captions(self, row: int) -> tuple[str, ...]:
        return (f"caption {2 * row}", f"caption {2 * row + 1}")


def simulated(folder: Path, hashes: Hashes) -> None:
    """A store with random features."""
    generator, store = np.random.default_rng(0), Store(folder)
    for first in range(0, len(hashes), BLOCK_ROWS):
        some = np.asarray(hashes[first : first + BLOCK_ROWS])
        store.add(some, generator.random((len(some), STORED_WIDTH), dtype=np.float32))


def anonymous() -> int:
    """Bytes of memory that this process holds, without mapped files and what it freed."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def prepare(folder: Path, rows: int) -> dict[str, float]:
    """What the first rank does once: list the pairs, and write the store of both encoders."""
    pairs: Any = MadeUp(rows)
    start = time.process_time()
    path = write_listing(pairs, folder)
    seconds = time.process_time() - start
    listing = open_listing(path)
    simulated(folder / "image", listing.images)
    simulated(folder / "text", listing.texts)
    return {"microseconds_a_row_to_list_pairs": seconds / rows * 1e6}


def memory(folder: Path, rows: int) -> dict[str, float]:
    """What each rank does at each start, and while it draws batches."""
    pairs: Any = MadeUp(rows)
    before, start = anonymous(), time.process_time()
    listing = open_listing(write_listing(pairs, folder))
    image, text = Store(folder / "image"), Store(folder / "text")
    sides = [
        StoredRows(image, find_mapped(image, listing.images)),
        StoredRows(text, find_mapped(text, listing.texts)),
    ]
    assert min(side.numbers.min() for side in sides) >= 0
    encoded = PairRows(
        listing=listing,
        image=sides[0],
        text=sides[1],
        texts=str,
        good=AllBut(rows),
    )
    opened = anonymous()
    seconds_to_open = time.process_time() - start
    seconds, most = 0.0, opened
    generator = np.random.default_rng(0)
    for _ in range(DRAWS):
        chosen = generator.integers(0, rows, DRAWN)
        start = time.perf_counter()
        encoded.image_rows(chosen)
        draws = generator.random(DRAWN, dtype=np.float32)
        encoded.text_rows(encoded.draw_captions(chosen, draws))
        seconds += time.perf_counter() - start
        most = max(most, anonymous())
    start, before_episode = time.process_time(), anonymous()
    episode = EpisodeSampler(rows, rows, seed=0, replacement=False).episode(1)
    assert len(episode.rows) == rows
    return {
        "rows": rows,
        "bytes_a_row_once_opened": (opened - before) / rows,
        "microseconds_a_row_to_open": seconds_to_open / rows * 1e6,
        "megabytes_more_while_drawing": (most - opened) / 1e6,
        f"milliseconds_a_batch_of_{DRAWN}": 1000 * seconds / DRAWS,
        "bytes_a_row_of_an_episode": (anonymous() - before_episode) / rows,
        "microseconds_a_row_of_an_episode": (time.process_time() - start) / rows * 1e6,
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
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
                found["first start"] = other.submit(prepare, folder / "rows", given.rows).result()
            found["store"] = memory(folder / "rows", given.rows)
    facts = describe_environment(torch.device("cpu"))
    lines = ["# Aligning two frozen encoders", ""]
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
