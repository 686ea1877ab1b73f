"""As fast as open_clip_train, and as good? One model, one table of photographs, one command.

Trains the same towers from the same new weights with `open_clip_train` and with `protoclip train
--loss.prototypical 0`, in turn: same pairs, batch, passes, rates, crops, precision and threads.
Prints pairs a second of the first pass and of later ones, and the recall of held-out pairs, whose
differences have paired 95% intervals.

    python benchmarks/peer_training.py --data pairs.tsv [--model EXPORT] [--repeats 3] > FILE

The table has the columns `filepath`, relative to its folder, and `title`. EXPORT is a folder with
`open_clip_config.json`, whose weights are not read; unset, the demonstration's towers are trained.
Needs `pip install 'open_clip_torch[training]'`. Images are read once before.
"""

import argparse
import csv
import datetime
import importlib
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_model

from protoclip.config import ModelConfig
from protoclip.distributed.collectives import choose_device
from protoclip.files import to_json
from protoclip.models.opening import OPEN_CLIP_CONFIG
from protoclip.models.protoclip import resolve_precision
from protoclip.models.start import resolve_start
from protoclip.training.watch import describe_environment

WEIGHTS = "open_clip_model.safetensors"
RATE, WARM_UP = 1e-3, 10  # peak, and steps until it
ARMS = ("open_clip_train", "protoclip")
# Pairs a second by the seconds since the command's start of the first batch and of the passes'
# ends; and how many times those of open_clip_train are wanted.
RATES: dict[str, tuple[Any, float]] = {
    "first pass, from the start of the command": (lambda ends: 1 / ends[1], 1.0),
    "first pass, from its first batch": (lambda ends: 1 / (ends[1] - ends[0]), 1.0),
    "later passes": (lambda ends: (len(ends) - 2) / (ends[-1] - ends[1]), 1.5),
}


def split_table(options: argparse.Namespace, folder: Path) -> int:
    """Write `train.tsv` and `held_out.tsv`, which share no image; returns the pairs to train on."""
    with options.data.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="," if options.data.suffix == ".csv" else "\t")
        parent = options.data.parent.absolute()
        rows = [(parent / row["filepath"], row["title"]) for row in table]
    random.Random(0).shuffle(rows)
    held_out = {*list(dict.fromkeys(path for path, _ in rows))[: options.held_out]}
    train = [row for row in rows if row[0] not in held_out]
    train = train[: min(len(train), options.pairs) // options.batch * options.batch]
    for name, part in (("train", train), ("held_out", [row for row in rows if row[0] in held_out])):
        with (folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *part])
        for path, _ in part:
            path.read_bytes()
    return len(train)


def write_start(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """Write the configuration of the model and new weights, from which both train."""
    if options.model is not None:
        shutil.copytree(options.model, folder)
    else:
        towers = resolve_start(ModelConfig()).open_clip_config or {}
        towers["vision_cfg"]["image_size"] = options.size
        towers["text_cfg"]["context_length"] = 32
        folder.mkdir()
        text = to_json({"model_cfg": towers, "preprocess_cfg": {}})
        (folder / OPEN_CLIP_CONFIG).write_text(text, encoding="utf-8")
    torch.manual_seed(seed)
    logging.disable(logging.WARNING)  # it warns that the model is untrained
    built = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_model(built, str(folder / WEIGHTS))


def command_line(arm: str, options: argparse.Namespace, folder: Path, seed: int) -> list[str]:
    """The words of a training command; temporary paths have no spaces."""
    bf16, device = options.precision == "bf16", choose_device("auto").type
    start, train = folder / "start", folder.parent / "train.tsv"
    if arm == "open_clip_train":
        line = f"""--model local-dir:{start} --train-data {train} --dataset-type csv --seed {seed}
            --batch-size {options.batch} --epochs {options.passes} --workers {options.workers}
            --lr {RATE} --warmup {WARM_UP} --wd 0.2 --beta1 0.9 --beta2 0.98 --eps 1e-6
            --grad-clip-norm 10 --precision {"amp_bf16" if bf16 else "fp32"} --save-frequency 0
            --device {device} --logs {folder} --name {arm}"""
    else:
        line = f"""train --model.start {start} --data.train {train} --data.root / --run.seed {seed}
            --episodes.batch_size {options.batch} --episodes.size {options.pairs}
            --episodes.count {options.passes} --episodes.replacement false --episodes.warm_up 0
            --episodes.locked_image 0 --loss.prototypical 0 --data.augmentation clip
            --optim.learning_rate {RATE} --optim.warm_up_steps {WARM_UP} --optim.weight_decay 0.2
            --optim.betas [0.9,0.98] --optim.eps 1e-6 --optim.clip_norm 10
            --run.precision {options.precision} --data.validation 0 --run.evaluate false
            --run.device {device} --run.out {folder / arm}"""
    return line.split()


def train_timed(arm: str, file: Path, words: list[str]) -> None:
    """Run a command in this process; write when its first pass began, and when each pass ended."""
    spans = list[tuple[float, float]]()

    def time_calls(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def timed(*arguments: Any, **settings: Any) -> Any:
            begins = time.time()
            result = call(*arguments, **settings)
            spans.append((begins, time.time()))
            return result

        setattr(owner, name, timed)

    if arm == "open_clip_train":
        module = importlib.import_module("open_clip_train.main")
        time_calls(module, "train_one_epoch")
        module.main(words)
        passes = spans
    else:
        trainer = importlib.import_module("protoclip.training.trainer").Trainer
        time_calls(trainer, "start_episode")
        time_calls(trainer, "end_episode")
        importlib.import_module("protoclip.cli").main(words)
        passes = spans[1::2]
    file.write_text(json.dumps([spans[0][0], *(end for _, end in passes)]), encoding="utf-8")


def run(arm: str, options: argparse.Namespace, folder: Path, seed: int) -> list[float]:
    """Seconds since the start of a training command: of its first batch, and of each pass's end."""
    times, log = folder / f"{arm}.json", folder / f"{arm}.log"
    own = {"OMP_NUM_THREADS": str(options.threads), "PROTOCLIP_CACHE": str(folder / "cache")}
    words = [sys.executable, __file__, "--timed", arm, str(times)]
    words += command_line(arm, options, folder, seed)
    with log.open("w") as file:
        started = time.time()
        done = subprocess.run(words, env={**os.environ, **own}, stdout=file, stderr=file)
    if done.returncode or not times.is_file():
        sys.exit(f"{arm} failed:\n{log.read_text()[-2000:]}")
    return [moment - started for moment in json.loads(times.read_text(encoding="utf-8"))]


def compare_recall(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """By recall: that of both, and how much higher ours is, with a paired interval."""
    peer = shutil.copytree(folder / "start", folder / "peer")
    saved = folder / ARMS[0] / "checkpoints" / f"epoch_{options.passes}.pt"
    built = open_clip.create_model(f"local-dir:{peer}", load_weights=False)
    built.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True)["state_dict"])
    save_model(built, str(peer / WEIGHTS))
    line = f"""-m protoclip evaluate {folder / ARMS[1]} --compare-to {peer} --tasks retrieval
        --data {folder.parent / "held_out.tsv"} --root / --cache false --json"""
    done = subprocess.run([sys.executable, *line.split()], stdout=subprocess.PIPE, check=True)
    first, second = json.loads(done.stdout)
    return {
        name: {"both": [first["metrics"][name], second["metrics"][name]], **difference}
        for name, difference in second["differences"].items()
        if "recall@" in name
    }


def span(values: list[float], form: str = ",.0f") -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def report(options: argparse.Namespace, times: dict[str, list[list[float]]], recalls: Any) -> str:
    """The tables in Markdown."""
    device = describe_environment(choose_device("auto"))["device"]
    command = " ".join(["python benchmarks/peer_training.py", *sys.argv[1:]])
    text = f"""# Training beside open_clip_train

`{command}`, {datetime.date.today().isoformat()}; {device}, torch {version("torch")}, \
open_clip_torch {version("open_clip_torch")}. {options.pairs:,} pairs, {options.passes} passes, \
batch {options.batch}, {options.precision}; {options.workers} processes read for open_clip_train. \
Median [least, most] of {options.repeats} runs, in turn; ratios are of the two runs of a turn.

| pairs a second | open_clip_train | protoclip | ratio | wanted |
|---|---|---|---|---|
"""
    for name, (passes, wanted) in RATES.items():
        peer, ours = ([options.pairs * passes(ends) for ends in times[arm]] for arm in ARMS)
        ratios = [mine / other for mine, other in zip(ours, peer, strict=True)]
        verdict = "met" if statistics.median(ratios) >= wanted else "**missed**"
        text += f"| {name} | {span(peer)} | {span(ours)} | {span(ratios, '.2f')} "
        text += f"| {wanted}: {verdict} |\n"
    text += f"""
Percent of held-out pairs, a column a run: open_clip_train, protoclip, difference [paired 95% \
interval]. `image_retrieval` is text to image.

| recall |{" |" * (options.repeats + 1)}
{"|---" * (options.repeats + 2)}|
"""
    for name in recalls[0]:
        text, verdict = text + f"| {name} ", "within the interval, or better"
        for found in [by_name[name] for by_name in recalls]:
            first, second, gain = (100 * value for value in (*found["both"], found["mean"]))
            text += f"| {first:.1f}, {second:.1f}, {gain:+.1f} "
            if found["interval"] is None:
                text += "[too few are found] "
                continue
            low, high = (100 * value for value in found["interval"])
            text += f"[{low:+.1f}, {high:+.1f}] "
            verdict = "**worse**" if high < 0 else verdict
        text += f"| {verdict} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="table of photographs, captions")
    parser.add_argument("--model", type=Path, help="folder with an open_clip_config.json")
    cores = os.cpu_count()
    numbers = {"size": 112, "pairs": 2048, "held-out": 1000, "batch": 128, "passes": 3}
    numbers |= {"repeats": 3, "threads": cores, "workers": cores}  # workers of open_clip_train
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"default: {number}")
    usual = resolve_precision("auto", choose_device("auto"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=usual)
    options, times, recalls = parser.parse_args(), dict[str, list[list[float]]](), []
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        options.pairs = split_table(options, Path(temporary))
        for seed in range(options.repeats):
            folder = Path(temporary) / str(seed)
            folder.mkdir()
            write_start(options, folder / "start", seed)
            for arm in ARMS[:: -1 if seed % 2 else 1]:
                times.setdefault(arm, []).append(run(arm, options, folder, seed))
            recalls.append(compare_recall(options, folder))
    print(report(options, times, recalls))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        train_timed(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        main()
