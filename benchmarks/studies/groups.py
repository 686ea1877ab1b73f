"""How large are groups of pairs, do both modalities have the same, and what does ProtoCLIP gain?

    python benchmarks/studies/groups.py RUNS/kinds-validation.json ... [--held-out]
        [--class-column class]

Each file is a study's result, beside the `runs` that it kept; nothing is trained. One row a seed of
each data set: pairs for each different caption (whatever its case and spaces) and for each class
that `--class-column` has, over all pairs of the table; the agreement of the two modalities' groups
that the run of ProtoCLIP logged at its end; and the gain over CLIP, in points of the mean without
AMI. With `--held-out` the validation half of the held-out pairs is grouped by K-means, one group
for ten pairs, in the space of each run: does InfoNCE alone make the same groups of images and of
texts? That is adjusted mutual information, the mean of five clusterings.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from judge import WITH_INTERVALS, held_out

from protoclip.config import Config
from protoclip.data import sources
from protoclip.data.pairs import Pairs
from protoclip.evaluation import grouping
from protoclip.evaluation.features import Encoder
from protoclip.models import loading
from protoclip.models.saved import read_config

ARM, REFERENCE = "ProtoCLIP", "CLIP"
LOGGED = [f"train/prototypes/agreement/{w}" for w in ("text_from_image", "image_from_text")]
PAIRS_A_GROUP = 10


def runs_of(study: Path) -> dict[tuple[str, int], Path]:
    """The finished runs of both arms by name and seed."""
    found = {}
    for results in sorted(study.parent.glob("runs/*/results.json")):
        config = read_config(results.parent)
        if config.run.name in (ARM, REFERENCE):
            found[config.run.name, config.run.seed] = results.parent
    return found


def sizes(config: Config, class_column: str | None) -> tuple[int, float, float | None]:
    """How many pairs, and how many for each different caption and for each class."""
    pairs = sources.pairs(replace(config, data=replace(config.data, class_column=class_column)))
    assert isinstance(pairs, Pairs)
    captions = [caption for row in range(len(pairs)) for caption in pairs.sample_captions(row)]
    different = {" ".join(caption.casefold().split()) for caption in captions}
    classes = {pairs.class_of(row) for row in range(len(pairs))} - {""}
    by_class = len(pairs) / len(classes) if classes else None
    return len(pairs), len(captions) / len(different), by_class


def logged_agreement(run: Path) -> float:
    """The last that was logged, of both ways."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [line for line in map(json.loads, lines) if LOGGED[0] in line]
    return sum(float(logged[-1][name]) for name in LOGGED) / len(LOGGED)


def held_out_agreement(run: Path) -> float:
    """Of the groups that K-means finds among held-out images and among their first captions."""
    split = held_out(read_config(run), "validation").splits["validation"]
    assert split.captions is not None
    model, transform, tokenizer = loading.load(run)
    encoder = Encoder(model=model, transform=transform, tokenizer=tokenizer)
    encoded = encoder.images(split.images, stage="held-out images")
    bad = {row for row, _ in encoded.bad}
    captions = [own[0] for row, own in enumerate(split.captions) if row not in bad]
    texts = encoder.texts(captions, stage="held-out texts")
    measures, _ = grouping.measure(
        F.normalize(encoded.features, dim=1),
        F.normalize(texts, dim=1),
        num_groups=len(captions) // PAIRS_A_GROUP,
        captions=captions,
    )
    return measures["agreement"]


def gains(study: Path) -> dict[int, float]:
    """By seed, in points."""
    data: dict[str, Any] = json.loads(study.read_text(encoding="utf-8"))["pretraining"]
    (arm,) = [entry for entries in data.values() for entry in entries if entry["name"] == ARM]
    by_seed = arm["metrics"][WITH_INTERVALS]["difference"]["by_seed"]
    return {int(seed): 100 * gain for seed, gain in by_seed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("studies", type=Path, nargs="+", metavar="RESULT")
    parser.add_argument("--class-column", help="as data.class_column")
    parser.add_argument("--held-out", action="store_true", help="group held-out pairs, too")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    columns = ["data", "seed", "pairs", "a caption", "a class", "agreement", "gain"]
    columns += [f"held-out agreement, {arm}" for arm in (REFERENCE, ARM) if given.held_out]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for study in given.studies:
        runs = runs_of(study)
        for seed, gain in gains(study).items():
            config = read_config(runs[ARM, seed])
            pairs, by_caption, by_class = sizes(config, given.class_column)
            cells = [study.parent.name, str(seed), f"{pairs:,}", f"{by_caption:.2f}"]
            cells += ["-" if by_class is None else f"{by_class:.0f}"]
            cells += [f"{logged_agreement(runs[ARM, seed]):.3f}", f"{gain:+.1f}"]
            for arm in (REFERENCE, ARM) if given.held_out else ():
                cells.append(f"{held_out_agreement(runs[arm, seed]):.3f}")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
