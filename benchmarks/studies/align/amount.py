"""How many pairs does which way take? Held-out recall by the number of training pairs.

    python benchmarks/studies/align/amount.py --train TABLE --validation TABLE --image-weights FILE
        [--root FOLDER] [--sizes 1000 3000 10000 0] [--ways scratch aligned] [--start RUN]
        [--seeds 0 1 2] [--folder runs/amount] [--out JSON]

A way is what a user types who sets nothing but the halves and their image size:

    scratch         protoclip train
    aligned         protoclip align, EfficientNet-Lite0 with MiniLM
    unfrozen        protoclip finetune of what was aligned
    fine-tuned      protoclip finetune of --start, a run on another kind of pairs

The first so many pairs of an order drawn by the seed are trained on; size 0 is all of them. Each
run is judged on the same validation pairs by the mean of the six recalls, image to text and text to
image at 1, 5 and 10. What is trained stays in --folder, and a study that was interrupted goes on.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import RECALLS, mean_recall, of_halves, write_ids

from protoclip.cli.parsing import merged
from protoclip.config import Config, DataConfig, SourceConfig, build
from protoclip.data.sources import open_source
from protoclip.evaluation.paired import RunResults, read_results
from protoclip.training.align import align
from protoclip.training.finetune import finetune
from protoclip.training.run import train

WAYS = ("scratch", "aligned", "unfrozen", "fine-tuned")


def trained(way: str, settings: dict[str, Any], start: Path | None, folder: Path) -> dict[str, Any]:
    """The results of a run, with the seconds that the whole command took."""
    clock = folder.with_suffix(".seconds")
    if not clock.exists():
        began, resume = time.monotonic(), "auto" if folder.exists() else "never"
        given = merged(settings, {"run": {"out": str(folder)}})
        if start is not None:
            given = merged(given, {"model": {"start": str(start)}})
        if way == "scratch":
            results = train(build(Config, given), resume=resume)
        elif way == "aligned":
            results = align(given, resume=resume)
        else:
            results = finetune(given, alpha=1.0, resume=resume)
        if "stopped" in results:
            raise SystemExit("interrupted; the same command goes on")
        clock.write_text(f"{time.monotonic() - began:.0f}")
    return read_results(folder), float(clock.read_text())


def main() -> None:
    parser = of_halves(str(__doc__))
    parser.add_argument("--image-size", type=int, default=224, help="of the image half")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10_000, 0])
    parser.add_argument("--ways", nargs="+", default=["scratch", "aligned"], choices=WAYS)
    parser.add_argument("--start", type=Path, help="the run that `fine-tuned` begins from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/amount"))
    parser.add_argument("--out", type=Path, help="JSON of the table")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    data = {"train": given.train, "validation": given.validation}
    data |= {} if given.root is None else {"root": given.root}
    source = SourceConfig(path=given.train)
    ids = [*open_source(DataConfig(root=given.root), source).sample_ids()]
    given.folder.mkdir(parents=True, exist_ok=True)
    table: dict[tuple[int, str], list[tuple[RunResults, float]]] = {}
    for seed in given.seeds:
        for size in given.sizes:
            only = given.folder / f"{size}-{seed}.csv"
            write_ids(only, ids, size or len(ids), seed)
            for way in given.ways:
                settings: dict[str, Any] = {
                    "data": {**data, "only": str(only)},
                    "run": {"seed": seed, "device": "cpu", "precision": "fp32"},
                }
                if way == "aligned":
                    image = {"name": "tf_efficientnet_lite0", "weights": given.image_weights}
                    image |= {"size": given.image_size}
                    settings["model"] = {"image": image, "text": {"name": "minilm"}}
                starts = {"unfrozen": given.folder / f"aligned-{size}-{seed}"}
                start = {**starts, "fine-tuned": given.start}.get(way)
                folder = given.folder / f"{way}-{size}-{seed}"
                table.setdefault((size, way), []).append(trained(way, settings, start, folder))
    ways = "image to text @1 / 5 / 10 | text to image @1 / 5 / 10"
    print(f"| pairs | way | mean recall | by seed | {ways} | s |\n|---|---|---|---|---|---|---|")
    rows = []
    for (size, way), members in table.items():
        runs, all_seconds = zip(*members, strict=True)
        recalls = [
            float(np.mean([100 * run.metrics[f"eval/validation/{name}"] for run in runs]))
            for name in RECALLS
        ]
        each, seconds = [mean_recall(run) for run in runs], np.mean(all_seconds)
        one, other = (" / ".join(f"{r:.1f}" for r in part) for part in (recalls[:3], recalls[3:]))
        shown = ", ".join(f"{value:.1f}" for value in each)
        pairs = size or len(ids)
        mean = float(np.mean(each))
        print(f"| {pairs:,} | {way} | {mean:.1f} | {shown} | {one} | {other} | {seconds:.0f} |")
        rows.append({"pairs": pairs, "way": way, "by_seed": each, "recalls": recalls})
        rows[-1] |= {"seeds": given.seeds, "seconds": float(seconds)}
    if given.out is not None:
        facts = {name: value for name, value in vars(given).items() if not isinstance(value, Path)}
        content = {"question": str(__doc__).partition("\n")[0], "command": facts, "rows": rows}
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
