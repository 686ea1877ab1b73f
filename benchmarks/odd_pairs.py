"""Does an aligned model find the wrong captions that it was aligned on, and what finds more?

Swaps the captions of a known share of pairs, aligns two halves on all pairs by the package's
defaults, and ranks the pairs as `protoclip explore` does, the oddest first:

    model           by the aligned model, which was trained on these pairs
    out of fold     by heads in closed form that were fitted to the other four fifths of the images
    both            by the mean of both ranks

Each by distance (one minus the cosine) and by loss (InfoNCE among 1,024 other pairs). It reports
average precision, and the share of swapped pairs among the first N, where N pairs are swapped.

    python benchmarks/odd_pairs.py --train TABLE --root FOLDER --image-weights FILE
        [--image-size 224] [--caption-column captions] [--pairs 10000] [--share 0.05]
        [--seeds 0 1 2] [--out JSON]

Of several captions of an image all are swapped, and the first is looked at.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.index import cache_folder
from protoclip.evaluation.encoders import encoder_of
from protoclip.explore.atlas import disagreement, unseen_disagreement
from protoclip.explore.explorer import encoded, run_config, with_all_captions
from protoclip.explore.pairs import explored
from protoclip.models import loading
from protoclip.training.align import align


def swapped_table(given: argparse.Namespace, seed: int, path: Path) -> npt.NDArray[np.bool_]:
    """Write the table with some captions swapped; returns which pairs they are of."""
    table = pq.read_table(given.train)
    draw = np.random.default_rng(seed)
    table = table.take(np.sort(draw.permutation(len(table))[: given.pairs or len(table)]))
    column = given.caption_column
    captions = table.column(column).to_pylist()
    chosen = draw.permutation(len(table))[: round(given.share * len(table))]
    swapped, wrong = [*captions], np.zeros(len(table), bool)
    for row, other in zip(chosen, np.roll(chosen, 1), strict=True):
        swapped[row] = captions[other]
        wrong[row] = captions[other] != captions[row]
    values = pa.array(swapped, table.schema.field(column).type)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, values), path)
    return wrong


def measured(given: argparse.Namespace, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Average precision and precision among the first, of each way."""
    path, run = folder / "pairs.parquet", folder / "run"
    wrong = swapped_table(given, seed, path)
    data = {"train": str(path), "root": given.root, "caption_column": given.caption_column}
    image = {"name": "tf_efficientnet_lite0", "weights": given.image_weights}
    began = time.monotonic()
    align(
        {
            "data": {**data, "validation": 0.0},
            "model": {
                "image": {**image, "size": given.image_size},
                "text": {"name": "minilm"},
            },
            "run": {"seed": seed, "device": "cpu", "precision": "fp32", "out": str(run)},
        }
    )
    seconds = {"model": time.monotonic() - began}
    model, transform, tokenizer = loading.load(str(run))
    encoder: Any = encoder_of(
        model,
        transform,
        tokenizer,
        aligned_by=run_config(str(run)),
        cache=cache_folder() / "features",
    )
    pairs = explored(sources.pairs(Config(data=DataConfig(**data))))
    rows = pairs.with_captions()
    features, halves = (encoded(each, pairs, rows) for each in (encoder, encoder.frozen))
    halves = with_all_captions(encoder.frozen, pairs, halves)
    scale = min(100.0, float(model.towers.logit_scale.detach().exp()))
    scores: dict[str, torch.Tensor] = {}
    scores["model, distance"], scores["model, loss"] = disagreement(features, scale=scale, seed=0)
    began = time.monotonic()
    unseen = unseen_disagreement(halves, seed=0)
    assert unseen is not None, "too few pairs"
    scores["out of fold, distance"], scores["out of fold, loss"] = unseen
    seconds["out of fold"] = time.monotonic() - began
    for by in ("distance", "loss"):
        ranks = [rankdata(scores[f"{way}, {by}"].numpy()) for way in ("model", "out of fold")]
        scores[f"both, {by}"] = torch.from_numpy(sum(ranks) / 2)
    is_wrong = wrong[halves.rows.numpy()]
    table = {}
    for way, score in scores.items():
        first = np.argsort(-score.numpy(), kind="stable")[: is_wrong.sum()]
        table[way] = {
            "average_precision": float(average_precision_score(is_wrong, score.numpy())),
            "among_the_first": float(is_wrong[first].mean()),
            "seconds": seconds.get(way.partition(",")[0], 0.0),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--image-weights", required=True)
    parser.add_argument("--image-size", type=int, default=224, help="of the image half")
    parser.add_argument("--caption-column", default="caption")
    parser.add_argument("--pairs", type=int, help="drawn by the seed; unset, all")
    parser.add_argument("--share", type=float, default=0.05, help="of pairs that are swapped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="JSON of the table")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    by_seed = []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            by_seed.append(measured(given, seed, Path(folder)))
    print("| ranked by | average precision (by seed) | among the first N (by seed) | s |")
    print("|---|---|---|---|")
    for way in by_seed[0]:
        cells = []
        for name in ("average_precision", "among_the_first"):
            values = [100 * of_seed[way][name] for of_seed in by_seed]
            shown = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{np.mean(values):.1f} ({shown})")
        seconds = np.mean([of_seed[way]["seconds"] for of_seed in by_seed])
        print(f"| {way} | {cells[0]} | {cells[1]} | {seconds:.1f} |")
    if given.out is not None:
        places = ("train", "root", "image_weights", "out")
        facts = {name: value for name, value in vars(given).items() if name not in places}
        content = {"question": str(__doc__).partition("\n")[0], "command": facts, "seeds": by_seed}
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
