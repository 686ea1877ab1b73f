"""What is worth what between two frozen halves? Recalls of `protoclip align` by setting.

    python benchmarks/studies/align/study.py benchmarks/studies/align/arms.toml --train TABLE \\
        --validation TABLE --root FOLDER --image-weights FILE [--seeds 0 1 2] [--arms NAME ...]

An arm is a table of settings. All arms share halves, pairs and number of steps, and are judged on
the validation pairs by the mean of the six recalls, image to text and text to image at 1, 5 and 10.
The interval of a difference joins two things: the images (with their captions, one draw for all six
recalls and all seeds), and the seeds. What is trained stays in --folder, so that a study that was
interrupted goes on.
"""

import argparse
import csv
import json
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from protoclip.cli.parsing import merged
from protoclip.config import DataConfig, SourceConfig
from protoclip.data.sources import open_source
from protoclip.evaluation.metrics import interval_of_difference
from protoclip.evaluation.paired import RunResults, read_results
from protoclip.evaluation.samples import SampleResults, influences
from protoclip.training.align import align

RECALLS = [f"retrieval/{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def of_halves(words: str) -> argparse.ArgumentParser:
    """A parser with the options that every study of two halves has, described by the first line."""
    parser = argparse.ArgumentParser(description=words.partition("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--root")
    parser.add_argument("--image-weights", required=True)
    return parser


def write_ids(path: Path, ids: list[str], size: int, seed: int) -> None:
    """The ids of the first pairs of an order; larger sizes hold the smaller ones."""
    order = np.random.default_rng(seed).permutation(len(ids))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["sample_id"], *([ids[row]] for row in order[:size])])


def trained(settings: dict[str, Any], folder: Path) -> RunResults:
    """The results of a run, which is trained unless it was already."""
    if not (folder / "results.json").is_file():
        given = merged(deepcopy(settings), {"run": {"out": str(folder)}})
        align(given, resume="auto" if folder.exists() else "never")
    return read_results(folder)


def mean_recall(results: RunResults) -> float:
    return float(np.mean([100 * results.metrics[f"eval/validation/{name}"] for name in RECALLS]))


def mean_influence(results: RunResults) -> npt.NDArray[np.float64]:
    """What each image, with its captions, adds to the mean recall."""
    by_metric = influences(SampleResults.read(results.samples["validation"]))
    mean: npt.NDArray[np.float64] = np.mean([100 * by_metric[name] for name in RECALLS], axis=0)
    return mean


def difference(
    runs: list[RunResults], reference: list[RunResults]
) -> tuple[float, list[float] | None]:
    """The mean difference over seeds, and its 95% interval if it has one."""
    gains = [
        mean_recall(run) - mean_recall(other) for run, other in zip(runs, reference, strict=True)
    ]
    both = zip(runs, reference, strict=True)
    of_images = np.stack([mean_influence(run) - mean_influence(other) for run, other in both])
    return float(np.mean(gains)), interval_of_difference(gains, of_images)


def without_none(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given."""
    return {
        name: without_none(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None
    }


def main() -> None:
    parser = of_halves(str(__doc__))
    parser.add_argument("study", type=Path)
    parser.add_argument("--image-size", type=int, help="of the image half, if not the study's")
    parser.add_argument("--caption-column")
    parser.add_argument("--pairs", type=int, help="train on so many, drawn once for all seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("runs/study_align"))
    parser.add_argument("--out", type=Path, help="JSON of the table")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    study = tomllib.loads(given.study.read_text(encoding="utf-8"))
    data = {"train": given.train, "validation": given.validation, "root": given.root}
    data["caption_column"] = given.caption_column
    image = {"weights": given.image_weights, "size": given.image_size}
    base = study["base"]
    for more in ({"data": data}, {"model": {"image": image}}):
        base = merged(base, without_none(more))
    if given.pairs is not None:
        source = open_source(DataConfig(root=given.root), SourceConfig(path=given.train))
        only = given.folder / f"{given.pairs}.csv"
        only.parent.mkdir(parents=True, exist_ok=True)
        write_ids(only, [*source.sample_ids()], given.pairs, seed=0)
        base = merged(base, {"data": {"only": str(only)}})
    arms = {arm["name"]: {k: v for k, v in arm.items() if k != "name"} for arm in study["arms"]}
    if unknown := {*(given.arms or ())} - arms.keys():
        raise ValueError(f"--arms: the study has no {sorted(unknown)[0]}")
    table: dict[str, list[RunResults]] = {}
    for seed in given.seeds:  # each seed of all arms, so that an interrupted study compares them
        for name in given.arms or arms:
            run = {"run": {"seed": seed, "name": name, "save_minutes": 0.0}}
            folder = given.folder / f"{name}-{seed}"
            table.setdefault(name, []).append(
                trained(merged(merged(base, arms[name]), run), folder)
            )
    reference = next(iter(table))
    print(f"\n{study['question']}\nSeeds {given.seeds}; reference: {reference}\n")
    ways = "image to text @1 / 5 / 10 | text to image @1 / 5 / 10"
    print(f"| arm | mean recall | {ways} | difference | s |")
    print("|---|---|---|---|---|---|")
    facts = []
    for name, runs in table.items():
        recalls = [
            float(np.mean([100 * run.metrics[f"eval/validation/{metric}"] for run in runs]))
            for metric in RECALLS
        ]
        gain, ends = difference(runs, table[reference])
        seconds = float(np.mean([run.train_seconds or 0.0 for run in runs]))
        each = [mean_recall(run) for run in runs]
        said = "-" if name == reference else f"{gain:+.1f}"
        said += f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends and name != reference else ""
        one, other = (" / ".join(f"{r:.1f}" for r in part) for part in (recalls[:3], recalls[3:]))
        print(f"| {name} | {np.mean(each):.1f} | {one} | {other} | {said} | {seconds:.0f} |")
        facts.append(
            {
                **{"arm": name, "settings": arms[name], "seeds": given.seeds, "by_seed": each},
                **{"recalls": recalls, "difference": gain, "interval": ends, "seconds": seconds},
            }
        )
    if given.out is not None:
        content = {"question": study["question"], "reference": reference, "arms": facts}
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
