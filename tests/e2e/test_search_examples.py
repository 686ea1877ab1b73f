"""The searches of `examples/search` find what is nearest; each where its library is installed."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import protoclip

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "search"


LIBRARIES = {"qdrant": "qdrant_client"}  # whose modules have other names


@pytest.mark.parametrize("library", ["faiss", "lancedb", "duckdb", "qdrant", "fiftyone"])
def test_an_example_prints_the_nearest_images(
    library, tiny_run, tiny_parquet, tmp_path, monkeypatch, capfd
):
    """Each with its path; an image within a table has none, and its sample id takes the place."""
    pytest.importorskip(LIBRARIES.get(library, library))
    out, query = tmp_path / "vectors.parquet", "a red square"
    protoclip.embed(tiny_run, tiny_parquet, out)
    table = pq.read_table(out)
    assert table["image"].null_count == len(table)
    paths = pa.array([f"{row}.png" if row % 2 else None for row in range(len(table))])
    pq.write_table(table.set_column(table.column_names.index("image"), "image", paths), out)
    model, _, tokenizer = protoclip.load(tiny_run)
    with torch.inference_mode():
        text = model.encode_text(tokenizer([query]), normalize=True)[0].numpy()
    rows = {row["image"] or row["sample_id"]: row for row in pq.read_table(out).to_pylist()}
    cosines = {own: float(np.dot(row["image_vector"], text)) for own, row in rows.items()}
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["search", str(out), str(tiny_run), query])
    runpy.run_path(str(EXAMPLES / f"{library}_search.py"), run_name="__main__")
    lines = [line.split(maxsplit=2) for line in capfd.readouterr().out.splitlines()]
    nearest = sorted(cosines.values(), reverse=True)[:5]
    np.testing.assert_allclose([float(score) for score, *_ in lines], nearest, atol=2e-3)
    for score, own, captions in lines:
        assert float(score) == pytest.approx(cosines[own], abs=2e-3)
        assert captions == str(rows[own]["captions"])
