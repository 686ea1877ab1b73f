"""Split a table of pairs into training, validation and test pairs for a study.

Pairs that share a caption or the bytes of an image stay on one side, so no title of the test is
one that a model was trained on. The choice follows from the ids alone: it is the same on every
machine. A validation or test split may turn out smaller than asked, where many share a caption.

    python benchmarks/studies/split.py PAIRS OUT [--root FOLDER] [--held-out 2000]

Writes OUT/train.parquet, OUT/validation.parquet and OUT/test.parquet with all columns of PAIRS.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from protoclip.config import DataConfig, SourceConfig
from protoclip.data.sources import open_entry
from protoclip.data.split import hold_out_rows


def taken(table: pa.Table, root: str, number: int) -> tuple[pa.Table, pa.Table]:
    """The held-out pairs, and the others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        pq.write_table(table, path)
        pairs = open_entry(DataConfig(root=root), SourceConfig(path=str(path)))
        rows = hold_out_rows(
            [pairs], share=number / table.num_rows, most=number, folder=Path(folder)
        )
    left = np.setdiff1d(np.arange(table.num_rows), rows)
    return table.take(rows), table.take(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("pairs", type=Path, help="a .jsonl, .csv or .parquet table")
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path, help="what paths of images start from")
    parser.add_argument(
        "--held-out", type=int, default=2000, help="pairs of validation, and of test"
    )
    given = parser.parse_args()
    root = str(given.root or given.pairs.parent)
    form = {".jsonl": "json"}.get(given.pairs.suffix, given.pairs.suffix[1:])
    left = pa.dataset.dataset(given.pairs, format=form).to_table()
    if "sample_id" not in left.column_names:
        ids = pa.array([f"{row:07}" for row in range(left.num_rows)])
        left = left.append_column("sample_id", ids)
    given.out.mkdir(parents=True, exist_ok=True)
    for split in ("test", "validation"):
        part, left = taken(left, root, given.held_out)
        pq.write_table(part, given.out / f"{split}.parquet")
        print(f"{split}: {part.num_rows:,} pairs")
    pq.write_table(left, given.out / "train.parquet")
    print(f"train: {left.num_rows:,} pairs")


if __name__ == "__main__":
    main()
