"""What does it cost to hold pairs out of ten million, and how much of the images is read for it?

The pairs are simulated: captions and ids are real, sizes are drawn as those of JPEG files of 256
pixels are spread, and images are made as they are read, which is counted. What opening a file and
reading a page of it costs is measured on real files, so that both together say what a disk of this
machine would take.

    python benchmarks/hold_out.py [--rows 10000000] [--out FILE]
"""

import argparse
import datetime
import os
import platform
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from protoclip.data import split
from protoclip.data.pairs import ImageTextPairs, fingerprint_sources
from protoclip.data.split import PAGE, SHARE, hold_out_rows
from protoclip.evaluation.validation import probe_rows

MEDIAN, SPREAD = 21_000, 0.5  # bytes of an image, and the deviation of their logarithm
COPIES = 0.001  # share of images that are copies of others, under another caption
CHUNK_ROWS = 8192  # as in an index
FILES = 20_000  # real ones


class Simulated(ImageTextPairs):
    """Pairs whose images are made of their number; counts what is read of them."""

    def __init__(self, table: pa.Table, copies: dict[int, int]) -> None:
        super().__init__(table, name="web", table_key=f"simulated {len(table)}")
        self.copies, self.read = copies, Counter[str]()

    def image_sizes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        sizes: np.ndarray[Any, np.dtype[np.int32]] = self.table.column("stored").to_numpy()
        return sizes

    def read_encoded(self, row: int, part: slice | None = None) -> bytes:
        size = PAGE if part is None else part.stop - part.start  # all of it would only take longer
        self.read["pages" if part else "images"] += 1
        return self.copies.get(row, row).to_bytes(8, "little") * (size // 8)


def simulated(rows: int) -> tuple[Simulated, np.ndarray[Any, np.dtype[np.int64]]]:
    """The pairs, and the size of each image."""
    generator = np.random.default_rng(0)
    sizes = np.exp(np.log(MEDIAN) + SPREAD * generator.standard_normal(rows)).astype(np.int64)
    copies, sources = generator.integers(0, rows, (2, int(COPIES * rows)))
    sizes[copies] = sizes[sources]
    batches = []
    for first in range(0, rows, CHUNK_ROWS):
        numbers = range(first, min(rows, first + CHUNK_ROWS))
        columns = {
            "sample_id": [f"web/{number:09d}" for number in numbers],
            "image": [f"images/{number // 1000:05d}/{number:09d}.jpg" for number in numbers],
            "caption": [f"a photo of the {number}th thing on a table" for number in numbers],
            "stored": sizes[first : first + len(numbers)].astype(np.int32),
        }
        batches.append(pa.RecordBatch.from_pydict(columns))
    originals = dict(zip(copies.tolist(), sources.tolist(), strict=True))
    return Simulated(pa.Table.from_batches(batches), originals), sizes


def resident() -> int:
    """Bytes of this process's own memory."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """Appends the memory that the process has, ten times a second."""
    seen, ended = [resident()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            seen.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    ended.set()
    thread.join()


def of_classes(rows: int) -> tuple[float, float]:
    """Microseconds and bytes a row that a further rank takes to look at a column of classes."""
    numbers = [f"https://example.org/{number}" for number in range(1000)]
    columns = {
        "image": pa.array(numbers).take(pa.array(np.arange(rows) % 1000)),
        "caption": pa.array(numbers).take(pa.array(np.arange(rows) % 1000)),
        "label": pa.array([f"class {n}" for n in range(1000)]).take(
            pa.array(np.arange(rows) % 1000)
        ),
    }
    pairs = ImageTextPairs(pa.table(columns), name="classes", class_column="label")
    with watched() as seen:
        start = time.process_time()
        probe_rows([pairs], np.arange(0, 5000))
        seconds = time.process_time() - start
    return 1e6 * seconds / rows, (max(seen) - seen[0]) / rows


def of_files(folder: Path) -> dict[str, float]:
    """Microseconds of processor time a real file: for its size, a page, and all of it."""
    draw = np.random.default_rng(0)
    names = [f"{number}.jpg" for number in range(FILES)]
    for name in names:
        size = int(np.exp(np.log(MEDIAN) + SPREAD * draw.standard_normal()))
        (folder / name).write_bytes(draw.bytes(size))
    table = pa.table({"image": names, "caption": names})
    pairs = ImageTextPairs(table, name="files", root=str(folder))
    taken, start = {}, time.process_time()
    copies = split._Copies([pairs], ())
    assert copies.sizes.min() > 0
    taken["size"], start = time.process_time() - start, time.process_time()
    for page in (True, False):
        copies._hash_images(np.arange(FILES), page=page)
        name = "page" if page else "whole"
        taken[name], start = time.process_time() - start, time.process_time()
    return {name: 1e6 * seconds / FILES for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cost = of_files(Path(temporary))
        pairs, sizes = simulated(arguments.rows)
        start = time.process_time()
        fingerprint_sources(pairs)
        fingerprint = time.process_time() - start
        pairs.read.clear()
        with watched() as seen:
            start = time.process_time()
            rows = hold_out_rows([pairs], share=SHARE, folder=Path(temporary) / "kept")
            seconds = time.process_time() - start
        with patch.object(split._Copies, "_hash_images", lambda self, rows, page: -1 - rows):
            start = time.process_time()
            hold_out_rows([pairs], share=SHARE, folder=Path(temporary) / "unread")
            choosing = time.process_time() - start
    taken, held = of_classes(arguments.rows)
    pages, images, mean = pairs.read["pages"], pairs.read["images"], sizes.mean()
    disk = (arguments.rows * cost["size"] + pages * cost["page"] + images * cost["whole"]) / 1e6
    before = (arguments.rows * cost["size"] + pages * cost["whole"]) / 1e6
    table = {
        "held out": f"{len(rows):,}",
        "images with the size of a chosen one, of which a page is read": f"{pages:,} "
        f"({pages / arguments.rows:.1%}), {pages * PAGE / 1e9:.1f} GB",
        "images that are read whole": f"{images:,}, {images * mean / 1e9:.2f} GB",
        "earlier: images of equal size, all read whole": f"{pages:,}, {pages * mean / 1e9:.1f} GB",
        "processor time, without the disk": f"{seconds / 60:.1f} min",
        "of it without reading pages": f"{1e6 * choosing / arguments.rows:.2f} µs a row",
        "memory above the table": f"{(max(seen) - seen[0]) / arguments.rows:.1f} bytes a row",
        "classes, each rank": f"{taken:.2f} µs and {held:.1f} bytes a row",
        "processor time a file: size, page, whole": ", ".join(
            f"{cost[name]:.0f} µs" for name in ("size", "page", "whole")
        ),
        "so for all files, in the system's cache": f"{disk / 60:.1f} min (earlier: "
        f"{before / 60:.1f} min)",
        "what a run compares when it goes on": f"{fingerprint:.1f} s",
    }
    text = f"""# Holding pairs out of {arguments.rows:,}

`python benchmarks/hold_out.py --rows {arguments.rows}`, {datetime.date.today().isoformat()}; \
{platform.machine()} CPU, {os.cpu_count()} cores, Linux {platform.release()}, Python \
{platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}. Simulated pairs; \
images of {mean / 1000:.0f} kB in the mean, {COPIES:.1%} of them copies; real files for the cost \
of a read. Processor time, one run, beside other work. A disk adds its own time for each file \
that is not in the system's cache: 32 threads wait for it at a time.

| what | result |
|---|---|
""" + "".join(f"| {what} | {result} |\n" for what, result in table.items())
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
