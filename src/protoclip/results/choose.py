"""`protoclip choose`: published, aligned and fine-tuned models on the same held-out pairs.

The pairs are split three ways. Some are held out first, with all that share an image or a caption
with them. Every rival is measured on these, and nothing else reads them: they are in `data.without`
of the rest. `match` ranks encoders on the others, and `align` and `finetune` train on them, except
those that a run holds out itself, by which `finetune` chooses weights. What a published model was
trained on is not known. A run that was trained on pairs held out here is shown, not recommended.

`choose.json` in the folder has what was measured, so the same call goes on from there.
"""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name

from protoclip.config import SEVERAL, DataConfig, EngineName
from protoclip.data.access import cache_folder, hub_answer, index_folder
from protoclip.data.pairs import BadSample, Pairs, split_by_source
from protoclip.data.sources import drop_rows
from protoclip.data.split import SHARE, hold_out_rows, read_ids
from protoclip.encode.encoder import prepare_image
from protoclip.encode.engine import accelerate
from protoclip.encode.features import Encoder, load_encoder
from protoclip.evaluation import validation
from protoclip.evaluation.match import match
from protoclip.evaluation.suite import Result, compute_results
from protoclip.files import checksum, read_sealed, seal, to_json, write_atomically
from protoclip.models.loading import pin_newest
from protoclip.models.timm import PUBLISHED as OF_HUB
from protoclip.models.timm import timm_settings
from protoclip.models.transformers import MINILM
from protoclip.results.compare import add_differences
from protoclip.results.table import Cell, Row, Table, table_of_records
from protoclip.terminal import say
from protoclip.training import run
from protoclip.training.presets import FINETUNE_PASSES

PUBLISHED = {  # and where the hub has them
    "open_clip:ViT-B-32/openai": "timm/vit_base_patch32_clip_224.openai",
    "open_clip:ViT-B-16-SigLIP2/webli": "timm/ViT-B-16-SigLIP2",
    "open_clip:MobileCLIP-S1/datacompdr": "apple/MobileCLIP-S1-OpenCLIP",
}
MEASURED, LARGEST = 500, 0.2  # pairs to measure on, but no more than this share of all
EQUAL = 0.01  # of recall@10: among rivals this close to the best, the quickest to make
TIMED, MANY = 16, 10_000  # images that are timed, as if so many were to come
MINILM_OF_HUB = "sentence-transformers/all-MiniLM-L6-v2"
TRAINING = 4.0  # how much longer it takes to train on an image than to encode it
RECALLS = AT_1, AT_10 = "image_retrieval_recall@1", "image_retrieval_recall@10"
Rival = dict[str, Any]


class Contest:
    """Rivals that are measured one after the other, in a folder that keeps the results.

    Args:
        pairs: All pairs, as `data`, a section of settings, opens them.
        out: The folder, which is there when it runs.
        minutes: Within which fine-tuning has to end, from now on.

    Raises:
        ValueError: Too few pairs can be held out, or the folder is of other pairs.
    """

    def __init__(
        self,
        pairs: Pairs,
        data: Mapping[str, Any],
        *,
        out: Path,
        minutes: float,
        device: torch.device,
        engine: EngineName,
    ) -> None:
        self.given, self.out, self.device, self.engine = data, out, device, engine
        self.minutes, self.started = minutes, time.monotonic()
        sources, share = validation.list_sources(pairs), min(LARGEST, MEASURED / len(pairs))
        share = max(SHARE, share)
        rows = hold_out_rows(sources, share=share, folder=index_folder())
        if len(rows) < validation.LEAST:
            raise ValueError(
                f"{pairs.name}: only {len(rows)} of {len(pairs):,} pairs can be held out, not "
                f"{validation.LEAST}: they are few, or many share an image or a caption"
            )
        held_out = split_by_source(sources, rows)
        self.measured = validation.make_data_sets(held_out, [], {})[0]
        self.rest, self.rivals = drop_rows(pairs, rows), list[Rival]()
        split, file = self.measured.splits[validation.NAME], out / "choose.json"
        key = checksum(repr((split.images.key, split.captions)).encode())
        self.state: dict[str, Any] = {"pairs": key, "rivals": {}, "seconds": {}, "aligned": []}
        if file.is_file():
            self.state = read_sealed(file)
        if self.state["pairs"] != key:
            raise ValueError(f"--out: {out}: is of other pairs; name another folder")
        self.ids = {pairs.sample_id(row) for row in rows.tolist()}
        self.ids |= read_ids("without", data["without"]) if "without" in data else set()
        self.data = {**data, "without": str(out / "without.json"), "validation": share / 2}

    def run(self, models: Sequence[str], images: Sequence[str], texts: Sequence[str]) -> None:
        """Measure published models and runs, the best two pairs of encoders, and a fine-tuned one.

        Encoders are named as `match` takes them.
        """
        write_atomically(self.out / "without.json", to_json(sorted(self.ids)))
        for model in models:
            words = ["embed", model, *spell(self.given, "data.")]
            command = shlex.join([*words, "--out", "vectors.parquet"])
            self.measure(model, model, command, find_licence(model))
        pairs = [(image, text) for image in images for text in texts]
        if len(pairs) > 1:
            cache, engine = cache_folder() / "features", self.engine
            ranked = match(images, texts, self.rest, cache=cache, device=self.device, engine=engine)
            pairs = [(record["image"], record["text"]) for record in ranked[:2]]
        self.finetune(max([self.align(*pair) for pair in pairs], key=recall))

    def align(self, image: str, text: str) -> Rival:
        """Align two encoders, as `match` names them."""
        parts = image.split(SEVERAL), text.split(SEVERAL)
        files = [name.partition("/")[2] if name.startswith("timm:") else "" for name in parts[0]]
        images = [name.removesuffix(f"/{file}") for name, file in zip(parts[0], files, strict=True)]
        model: dict[str, Any] = {"image": {"name": SEVERAL.join(images)}, "text": {"name": text}}
        if any(files):
            model["image"]["weights"] = SEVERAL.join(file or OF_HUB for file in files)
        if model not in self.state["aligned"]:
            self.state["aligned"].append(model)
        name = f"aligned-{self.state['aligned'].index(model) + 1}"
        self.train(run.align, name, model)
        words = [
            "align",
            *spell(self.given, "data."),
            "--run.name",
            "mine",
            *spell(model, "model."),
        ]
        licence = ", ".join(dict.fromkeys(map(find_licence, [*parts[0], *parts[1]])))
        shown = f"{name}: {SEVERAL.join(images)} + {text}"
        return self.measure(shown, str(self.out / name), shlex.join(words), licence)

    def finetune(self, start: Rival) -> None:
        """Fine-tune an aligned rival, if there is time."""
        name = Path(start["model"]).name.replace("aligned", "finetuned")
        images = TRAINING * FINETUNE_PASSES * len(self.rest)
        end = self.spent() + images / start["images_per_second"] / 60
        if end > self.minutes and not self.is_measured(self.out / name):
            say(
                f"note: left out: fine-tuning would end about {end:.0f} minutes after the start; "
                f"--minutes {end:.0f} allows it"
            )
            return
        self.train(run.finetune, name, {"start": start["model"]})
        words = ["finetune", "runs/mine-0", *spell(self.given, "data."), "--run.name", "tuned"]
        command = f"{start['command']} && protoclip {shlex.join(words)}"
        shown = f"{name}: {start['name'].partition(': ')[2]}"
        self.measure(shown, str(self.out / name), command, start["licence"])

    def train(self, command: Callable[..., Any], name: str, model: Mapping[str, Any]) -> None:
        """Train a rival, or go on with it; the seconds of all calls count."""
        folder, started = str(self.out / name), time.monotonic()
        if self.is_measured(folder):
            return
        where, engine = {"out": folder, "device": str(self.device)}, {"engine": self.engine}
        settings = {"model": model, "data": self.data, "run": where, "encode": engine}
        seconds = self.state["seconds"].get(name, 0.0)
        try:
            results = command(settings, resume="auto")
        finally:
            self.state["seconds"][name] = seconds + time.monotonic() - started
            self.save()
        if "stopped" in results:
            sys.exit(128 + signal.Signals[results["stopped"]])

    def measure(self, name: str, model: str, command: str, licence: str) -> Rival:
        """Measure a rival, unless that was done before, and say what came out."""
        if not self.is_measured(model):
            encoder = load_encoder(model, self.device, keep=True, engine=self.engine)
            data, split, tasks = self.measured, validation.NAME, [["retrieval"]]
            (result,) = compute_results(encoder, [data], tasks, split=split, model_name=name)
            for part in ("metrics", "intervals"):
                values = result.record[part].items()
                result.record[part] = {k: value for k, value in values if k in RECALLS}
            allowed = DataConfig(**self.given)
            trained = validation.count_trained(model, allowed.train, data, split, allowed)
            result.record.update({"trained_on": trained} if trained.get("images") else {})
            influences = {k: v.tolist() for k, v in result.influences.items() if k in RECALLS}
            weights = encoder.model.state_dict().values()
            self.state["rivals"][pin_newest(model)] = {
                "record": result.record,
                "influences": influences,
                "ids": [*result.ids],
                "without": [*result.without],
                "megabytes": sum(value.nbytes for value in weights) / 1e6,
                "images_per_second": time_images(encoder, data.splits[split].images),
            }
            self.save()
        rival = {"name": name, "model": model, "command": command, "licence": licence}
        rival["minutes"] = self.state["seconds"].get(Path(model).name, 0.0) / 60
        self.rivals.append(rival | self.state["rivals"][pin_newest(model)])
        shown = (f"{100 * value:.1f}%" for value in self.rivals[-1]["record"]["metrics"].values())
        left = f"{self.minutes - self.spent():.1f} of {self.minutes:g} minutes left"
        say(f"note: {name}: recall@1 and @10 {' and '.join(shown)}; {left}")
        return self.rivals[-1]

    def recommend(self) -> tuple[list[Rival], Table, list[str]]:
        """All rivals as records, the recommended one first; a table; and the last lines."""
        unseen = [one for one in self.rivals if "trained_on" not in one["record"]]
        close = [one for one in unseen if recall(one) >= max(map(recall, unseen)) - EQUAL]
        first = min(close, key=lambda one: (one["minutes"], -one["images_per_second"]))
        rivals = [first, *sorted((o for o in self.rivals if o is not first), key=recall)[::-1]]
        own, *others = ([make_result(rival)] for rival in rivals)
        compared = [own, *add_differences(others, own)]
        table, costs = table_of_records(compared), ("minutes", "megabytes", "images_per_second")
        rows, records, unclear = list[Row](), list[Rival](), list[str]()
        for number, (rival, (result,)) in enumerate(zip(rivals, compared, strict=True)):
            facts = {k: rival[k] for k in ("name", "model", "command", *costs, "licence")}
            records.append(facts | result.record)
            if number and not result.record["differences"][AT_10]["beyond"]:
                unclear.append(rival["name"].partition(":")[0])
            cells = [row.cells[number] for row in table.rows]
            cells += [Cell(value=f"{rival[cost]:,.{int(cost == 'minutes')}f}") for cost in costs]
            cells.append(Cell(value=rival["licence"]))
            rows.append(Row(heading=[rival["name"]], cells=cells))
        names = ("recall@1", "recall@10", "minutes", "MB", "images/s", "licence")
        number = len(self.measured.splits[validation.NAME].images)
        notes = [f"How often a caption finds its image among {number:,}.", *table.notes]
        heading, columns = ["model"], [[name] for name in names]
        table = replace(table, heading=heading, columns=columns, rows=rows, notes=notes)
        against = f", not clearly above {', '.join(unclear)}" if unclear else ", clearly the best"
        where = f" (in {first['model']})" * (first["model"] != first["name"])
        said = (
            f"recommended: {first['name']}{where}{against * bool(others)}; to make it of all pairs:"
        )
        return records, table, [said, f"protoclip {first['command']}"]

    def is_measured(self, model: str | Path) -> bool:
        return pin_newest(str(model)) in self.state["rivals"]

    def spent(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.started) / 60

    def save(self) -> None:
        write_atomically(self.out / "choose.json", to_json(seal(self.state)))


def recall(rival: Rival) -> float:
    """Among the first ten images, from 0 to 1."""
    return float(rival["record"]["metrics"][AT_10])


def make_result(rival: Rival) -> Result:
    """What was measured, as `evaluate` has it."""
    names = [entry.name for entry in fields(Result)]
    influences = {metric: np.array(values) for metric, values in rival["influences"].items()}
    return Result(**{**{name: rival[name] for name in names}, "influences": influences})


def find_published() -> list[str]:
    """The usual published models that can be had; a note names the others."""
    cache, kind = Path(constants.HF_HUB_CACHE), "model"
    missing = [
        model
        for model, repository in PUBLISHED.items()
        if not (cache / repo_folder_name(repo_id=repository, repo_type=kind)).is_dir()
    ]
    # One question for all, since an answer may take seconds.
    if missing and hub_answer(partial(HfApi().model_info, PUBLISHED[missing[0]])) is None:
        say(f"note: left out: {', '.join(missing)}, since the hub does not answer")
        return [model for model in PUBLISHED if model not in missing]
    return [*PUBLISHED]


def find_licence(name: str) -> str:
    """The licence of weights, as timm or the hub says; "-" where that is not known."""
    kind, _, model = name.partition(":")
    if kind == "timm":
        return "-" if "/" in model else timm_settings(model).license or "-"
    repository = MINILM_OF_HUB if name == MINILM else PUBLISHED.get(name, model * (kind == "hf"))
    answer = hub_answer(partial(HfApi().model_info, repository)) if repository else None
    return getattr(getattr(answer, "card_data", None), "license", None) or "-"


def time_images(encoder: Encoder, images: Any) -> float:
    """How many images are read and encoded in a second, with the engine that many would have."""
    tower, some = accelerate(encoder.towers["image"], MANY), list[bytes]()
    for row in range(len(images)):
        with suppress(BadSample):
            images.image(row)  # or it cannot be decoded
            some.append(images.read_encoded(row))
        if len(some) == TIMED:
            break

    def encode() -> None:
        tower.encode([prepare_image(image, encoder.transform) for image in some])

    encode()  # the engine starts
    return 2 * len(some) / timeit(encode, number=2)


def spell(settings: Mapping[str, Any], prefix: str) -> list[str]:
    """Settings as options of a command; a list is one option for each value."""
    words = list[str]()
    for name, value in settings.items():
        if isinstance(value, Mapping):
            words += spell(value, f"{prefix}{name}.")
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{prefix}{name}", str(one)]
    return words
