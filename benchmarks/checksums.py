"""What do checksums cost? Writes and reads files with their checksums, and without, in alternation.

A checkpoint of an RN50 is written whole, and read as a run does that goes on. Captions of an index
are drawn at random, once each from every part of it, so that all of it is compared; and again, when
all has been. Rows of a teacher are drawn for an episode. Kept features are mapped and summed.

    python benchmarks/checksums.py [--repeats 5] [--out FILE]
"""

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch

from protoclip.config import ModelConfig
from protoclip.data import index
from protoclip.encode import store, teachers
from protoclip.evaluation.kept import VERIFIED, Kept
from protoclip.files import checksum, file_checksum
from protoclip.models import loading, saved
from protoclip.progress import Progress
from protoclip.training import run_folder

ROWS, WIDTH, DRAWN = 200_000, 512, 20_000
Work = Callable[[], object]


def captions() -> Iterator[tuple[str, list[bytes], str]]:
    """Rows of about 100 bytes."""
    for row in range(ROWS):
        yield f"images/{row:09d}.jpg", [b"a caption of some usual words, number %d" % row], f"{row}"


def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    return index.batches(captions(), index.ROWS)


def read_rows(found: index.ArrowIndex, rows: list[int], *, compared: bool) -> int:
    """Captions by row, as training reads them, after their checksums if `compared`."""
    letters = 0
    column = found.table["caption"]
    for row in rows:
        if compared:
            found.check(row)
        letters += len(column[row].as_py()[0])
    return letters


def without() -> ExitStack:
    """Lets no checksum be computed or compared."""
    stack = ExitStack()
    for module, name, value in (
        (saved, "checksum", lambda data: ""),
        (saved, "damage", lambda folder, names=None: None),
        (store.StoredFeatures, "whole", lambda self: self.features),
    ):
        stack.enter_context(patch.object(module, name, value))
    return stack


def tasks(folder: Path) -> Iterator[tuple[str, Work, Work]]:
    """What is done, with checksums and without."""
    model = loading.model(ModelConfig(name="RN50"), seed=0)
    weights = dict(model.state_dict())
    moments = {
        f"{name}/{kind}": torch.zeros_like(value)
        for name, value in model.named_parameters()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    parts = {saved.WEIGHTS: weights, "optimizer.safetensors": moments}
    facts = {saved.MODEL: {}, saved.STATE: {}}
    written = folder / "saved"
    size = sum(value.nbytes for part in parts.values() for value in part.values()) / 1e6

    def write() -> None:
        saved.write_checkpoint(written, parts, facts)

    def read() -> None:
        names = [*parts, *facts]
        assert saved.damage(written, names) is None
        for name in parts:
            for tensor in saved.read_tensors(written / name).values():
                tensor.clone()  # into a model's own memory

    def plainly(work: Work) -> Work:
        def do() -> None:
            with without():
                work()

        return do

    yield f"write a checkpoint of {size:,.0f} MB", write, plainly(write)
    write()  # with checksums
    yield f"read a checkpoint of {size:,.0f} MB", read, plainly(read)

    rows = np.random.default_rng(0).integers(0, ROWS, DRAWN).tolist()
    found = index.build_index("key", build, folder=folder, label="there", way_out="wait")
    path = found.path
    name = f"{DRAWN:,} of {ROWS:,} captions of an index"
    yield (
        f"{name}, at first",
        lambda: read_rows(index.ArrowIndex(path), rows, compared=True),
        lambda: read_rows(index.ArrowIndex(path), rows, compared=False),
    )
    found.check()
    yield (
        f"{name}, later",
        lambda: read_rows(found, rows, compared=True),
        lambda: read_rows(found, rows, compared=False),
    )

    ids = [str(row) for row in range(ROWS)]
    blocks = np.random.default_rng(0).normal(size=(10, ROWS // 10, WIDTH)).astype(np.float16)
    (folder / "teacher").mkdir()
    store.write_folder(folder / "teacher", ids, blocks, {"teacher": "benchmark"})
    checked, plain = (teachers.read_teacher(folder / "teacher") for _ in range(2))
    plain.checksums = None
    wanted = [str(row) for row in rows]
    yield (
        f"{DRAWN:,} of {ROWS:,} rows of a teacher, {WIDTH} wide",
        lambda: checked.lookup(wanted),
        lambda: plain.lookup(wanted),
    )

    kept = folder / "kept"
    encoded = torch.from_numpy(blocks.reshape(-1, WIDTH)[:50_000].astype(np.float32))
    of_kept = store.hash_ids(ids[:50_000])
    Kept(kept).add(ids[:50_000], encoded)

    def use() -> None:
        VERIFIED.clear()
        again = Kept(kept)
        assert again.has(of_kept).all()
        again.features(of_kept).sum()

    yield f"read 50,000 kept features, {WIDTH} wide", use, plainly(use)


def seconds(work: Work) -> float:
    """Processor time, of which other processes take nothing."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = run_folder.environment(torch.device("cpu"))
    lines = [
        "# Checksums: what they cost",
        "",
        f"`python benchmarks/checksums.py --repeats {arguments.repeats}`, "
        f"{datetime.date.today().isoformat()}; {facts['device']}, Python {facts['python']}, torch "
        f"{facts['torch']}. Milliseconds of one processor, without waiting for the disk: median "
        f"[least, most] of {arguments.repeats}, in alternation, with files in the system's cache. "
        "The ratio is that of the medians.",
        "",
        "| what | with | without | ratio |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        progress = Progress("benchmark: checksums", 6)
        for done, (name, checked, plain) in enumerate(tasks(Path(folder)), 1):
            for work in (checked, plain):
                work()  # fills caches
            spent = [(seconds(checked), seconds(plain)) for _ in range(arguments.repeats)]
            both = [[1000 * value for value in values] for values in zip(*spent, strict=True)]
            middle = [statistics.median(values) for values in both]
            cells = [
                f"{statistics.median(values):,.1f} [{min(values):,.1f}, {max(values):,.1f}]"
                for values in both
            ]
            lines.append(f"| {name} | {' | '.join(cells)} | {middle[0] / middle[1]:.2f} |")
            progress.update(done)
        data = np.random.default_rng(0).bytes(200_000_000)
        (Path(folder) / "data").write_bytes(data)
        rate = len(data) / 1e6 / min(seconds(lambda: checksum(data)) for _ in range(3))
        of_file = min(seconds(lambda: file_checksum(Path(folder) / "data")) for _ in range(3))
    lines += [
        "",
        f"BLAKE2b reads {rate:,.0f} MB a second from memory, and "
        f"{len(data) / 1e6 / of_file:,.0f} from a file.",
    ]
    text = "\n".join([*lines, ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
