"""Are the halves that `match` puts first those that `align` makes the most of?

    python benchmarks/studies/align/order.py --train TABLE --validation TABLE --images A B ...
        --texts C D ... [--root FOLDER] [--pairs 2000] [--seed 0] [--folder runs/order] [--out JSON]

Halves are named as for `match`. It measures `--pairs` of the training pairs; `align` trains on as
many of them with its defaults, for every image half and text half, and is judged on the validation
pairs by the mean of the six recalls, image to text and text to image at 1, 5 and 10. For each
measure of `match` there is Kendall's tau with these recalls: 1 if the order is equal, 0 by chance.
What is trained stays in --folder, and a study that was interrupted goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau
from study import mean_recall, write_ids

from protoclip.config import DataConfig, SourceConfig
from protoclip.data.index import cache_folder
from protoclip.data.sources import open_source
from protoclip.evaluation.match import match
from protoclip.evaluation.paired import read_results
from protoclip.files import checksum
from protoclip.training.align import align

MEASURES = ("recall@10", "mutual_neighbours", "cka", "agreement")


def half(name: str) -> dict[str, str]:
    """The settings of `align` for a half as `match` names it."""
    if not name.startswith("timm:") or "/" not in name:
        return {"name": name}
    model, _, file = name.partition("/")
    return {"name": model, "weights": file}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for option in ("--train", "--validation"):
        parser.add_argument(option, required=True)
    for option in ("--images", "--texts"):
        parser.add_argument(option, nargs="+", required=True)
    parser.add_argument("--root")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/order"))
    parser.add_argument("--out", type=Path, help="JSON of the table")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    given.folder.mkdir(parents=True, exist_ok=True)
    source = open_source(DataConfig(root=given.root), SourceConfig(path=given.train))
    measured = match(
        given.images,
        given.texts,
        source,
        pairs=given.pairs,
        seed=given.seed,
        cache=cache_folder() / "features",
        device=torch.device("cpu"),
    )
    only = given.folder / f"{given.pairs}-{given.seed}.csv"
    write_ids(only, [*source.sample_ids()], given.pairs, given.seed)
    data = {"train": given.train, "validation": given.validation, "only": str(only)}
    data |= {} if given.root is None else {"root": given.root}
    rows: list[dict[str, Any]] = []
    for record in measured:
        name = checksum(f"{record['image']} {record['text']} {given.pairs}".encode())[:12]
        folder = given.folder / f"{name}-{given.seed}"
        settings = {
            "data": data,
            "model": {"image": half(record["image"]), "text": half(record["text"])},
            "run": {"seed": given.seed, "out": str(folder), "device": "cpu", "precision": "fp32"},
        }
        results = align(settings, resume="auto" if folder.exists() else "never")
        if "stopped" in results:
            raise SystemExit("interrupted; the same command goes on")
        shown = {key: record[key] for key in ("image", "text", *MEASURES)}
        rows.append({**shown, "aligned": mean_recall(read_results(folder))})
    print(f"| image half | text half | {' | '.join(MEASURES)} | aligned |")
    print("|---" * (3 + len(MEASURES)) + "|")
    for row in rows:
        values = " | ".join(f"{100 * row[name]:.1f}" for name in MEASURES)
        print(f"| {row['image']} | {row['text']} | {values} | {row['aligned']:.1f} |")
    aligned = [row["aligned"] for row in rows]
    taus = {name: float(kendalltau([r[name] for r in rows], aligned)[0]) for name in MEASURES}
    print(f"Kendall's tau: {', '.join(f'{name} {tau:.2f}' for name, tau in taus.items())}")
    if given.out is not None:
        facts = {name: value for name, value in vars(given).items() if not isinstance(value, Path)}
        content = {"question": str(__doc__).partition("\n")[0], "command": facts}
        text = json.dumps({**content, "taus": taus, "rows": rows}, indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
