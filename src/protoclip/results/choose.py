"""`protoclip choose`: published, aligned and fine-tuned models on the same held-out pairs.

The pairs that runs hold out are held out first. Nothing trains or chooses on them: `match` ranks
encoders on the others, and `finetune` takes the end of its way, since they would choose between its
ends. What published models were trained on is not known. A run that was trained on some of these
pairs is shown, not recommended. A second call finds features in the store, and runs that are done.
"""

import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from huggingface_hub import HfApi, constants

from protoclip.config import SEVERAL, Config, DataConfig, EngineName
from protoclip.data.access import cache_folder, digest, hub_answer
from protoclip.data.pairs import Pairs, fingerprint_sources
from protoclip.data.split import SHARE
from protoclip.encode.encoder import prepare_image
from protoclip.encode.engine import accelerate
from protoclip.encode.features import Encoder, load_encoder
from protoclip.evaluation import validation
from protoclip.evaluation.match import match
from protoclip.evaluation.suite import Result, compute_results
from protoclip.models.timm import PUBLISHED as OF_HUB
from protoclip.models.timm import timm_settings
from protoclip.models.transformers import MINILM
from protoclip.results.compare import add_differences
from protoclip.results.table import Cell, Row, Table, table_of_records
from protoclip.terminal import say
from protoclip.training import run
from protoclip.training.folder import slugify
from protoclip.training.presets import FINETUNE_PASSES

PUBLISHED = {  # and where the hub has them
    "open_clip:ViT-B-32/openai": "timm/vit_base_patch32_clip_224.openai",
    "open_clip:ViT-B-16-SigLIP2/webli": "timm/ViT-B-16-SigLIP2",
    "open_clip:MobileCLIP-S1/datacompdr": "apple/MobileCLIP-S1-OpenCLIP",
}
MEASURED, LARGEST = 500, 0.2  # pairs to measure on, but no more than this share of all
EQUAL = 0.01  # of recall@10: among rivals this close to the best, the quickest to make
TIMED, MANY = 16, 10_000  # images that are timed, as if so many were to come
TRAINING = 15.0  # how much longer it takes to train on an image than to encode it
UNKNOWN = "unknown"  # a licence
RECALLS = AT_1, AT_10 = "image_retrieval_recall@1", "image_retrieval_recall@10"


@dataclass(kw_only=True)
class Contest:
    """Rivals that are measured one after the other: results of `retrieval` with what each costs."""

    pairs: Pairs
    data: Mapping[str, Any]  # the settings that open them
    out: Path  # of the runs
    minutes: float  # within which fine-tuning has to end
    device: torch.device
    engine: EngineName
    rivals: list[Result] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Hold pairs out; raises `ValueError` if too few can be."""
        share = max(SHARE, min(LARGEST, MEASURED / len(self.pairs)))
        self.data = {**self.data, "validation": share}
        self.words = spell(self.data, "data.")  # as options of a command
        divided = validation.split_validation(Config.from_dict({"data": self.data}), self.pairs)
        assert isinstance(divided.training, Pairs)
        self.rest, (self.measured, *_) = divided.training, divided.data
        # Runs on other pairs, or with others held out, are other rivals.
        facts = {"data": self.data, "sources": fingerprint_sources(self.pairs)}
        self.out = self.out / digest(facts)[:8]

    def run(self, models: Sequence[str], images: Sequence[str], texts: Sequence[str]) -> None:
        """Measure models, the best two of all pairs of encoders aligned, and one fine-tuned."""
        data = spell({**self.data, "validation": None}, "data.")
        for model in models:
            words = ["embed", model, *data, "--out", "vectors.parquet"]
            command = shlex.join(words).replace("--data.train", "--data", 1)
            try:
                self.measure(model, model, command, find_licence(model))
            except ValueError as error:
                if model not in PUBLISHED:
                    raise
                say(f"note: left out: {error}")
        pairs = [(image, text) for image in images for text in texts]
        if len(pairs) > 1:
            cache, engine = cache_folder() / "features", self.engine
            ranked = match(images, texts, self.rest, cache=cache, device=self.device, engine=engine)
            pairs = [(record["image"], record["text"]) for record in ranked[:2]]
        self.finetune(max([self.align(*pair) for pair in pairs], key=recall))

    def align(self, image: str, text: str) -> Result:
        parts = image.split(SEVERAL)
        files = [name.partition("/")[2] if name.startswith("timm:") else "" for name in parts]
        names = [name.removesuffix(f"/{file}") for name, file in zip(parts, files, strict=True)]
        model: dict[str, Any] = {"image": {"name": SEVERAL.join(names)}, "text": {"name": text}}
        if any(files):
            model["image"]["weights"] = SEVERAL.join(file or OF_HUB for file in files)
        shown = re.sub(r"/\S*/", "/", f"{image} + {text}")  # files without their folders
        folder = self.out / f"aligned-{slugify(shown)}"
        seconds = self.train(run.align, folder, model)
        words = [*self.words, *spell(model, "model."), "--run.name", "mine"]
        command, names = shlex.join(["align", *words]), [*parts, *text.split(SEVERAL)]
        licence = ", ".join(dict.fromkeys(map(find_licence, names)))
        rival = self.measure(f"aligned: {shown}", folder, command, licence, seconds)
        # Both sides were encoded once, in this call or in another one.
        rival.record["minutes"] += len(self.rest) / rival.record["images_per_second"] / 60
        return rival

    def finetune(self, start: Result) -> None:
        """Fine-tune an aligned rival, if there is time."""
        aligned, rate = Path(start.record["reference"]), start.record["images_per_second"]
        folder = self.out / aligned.name.replace("aligned", "finetuned", 1)
        end = self.spent() + TRAINING * FINETUNE_PASSES * len(self.rest) / rate / 60
        if end > self.minutes and not (folder / "results.json").is_file():
            say(
                f"note: left out: fine-tuning would end about {end:.0f} minutes after the start; "
                f"--minutes {math.ceil(end)} allows it"
            )
            return
        seconds = self.train(partial(run.finetune, alpha=1.0), folder, {"start": str(aligned)})
        words = ["finetune", "runs/mine-0", *self.words, "--run.name", "tuned", "--alpha", "1"]
        command = f"{start.record['command']} && protoclip {shlex.join(words)}"
        name = start.record["model"].replace("aligned", "fine-tuned", 1)
        seconds += 60 * start.record["minutes"]
        self.measure(name, folder, command, start.record["licence"], seconds)

    def train(self, train: Callable[..., Any], folder: Path, model: Mapping[str, Any]) -> float:
        """Train a rival, or go on with it; returns the seconds of training of all calls."""
        where, engine = {"out": str(folder), "device": str(self.device)}, {"engine": self.engine}
        settings = {"model": model, "data": self.data, "run": where, "encode": engine}
        results = train(settings, resume="auto")
        if "stopped" in results:
            sys.exit(128 + signal.Signals[results["stopped"]])
        return float(results["train_seconds"])

    def measure(
        self, name: str, model: str | Path, command: str, licence: str, seconds: float = 0.0
    ) -> Result:
        """Measure a model, and say what came out."""
        encoder = load_encoder(model, self.device, engine=self.engine)
        data, split, allowed = self.measured, validation.NAME, DataConfig(**self.data)
        (result,) = compute_results(encoder, [data], [["retrieval"]], split=split, model_name=name)
        record, weights = result.record, encoder.model.state_dict().values()
        for part in ("metrics", "intervals"):
            record[part] = {k: value for k, value in record[part].items() if k in RECALLS}
        trained = validation.count_trained(str(model), allowed.train, data, split, allowed)
        record |= {"trained_on": trained} if trained.get("images") else {}
        record |= {"reference": str(model), "command": command, "minutes": seconds / 60}
        record["megabytes"] = sum(value.nbytes for value in weights) / 1e6
        record["images_per_second"] = time_images(encoder, data.splits[split].images, result.ids)
        record["licence"] = licence
        self.rivals.append(result)
        shown = " and ".join(f"{100 * value:.1f}%" for value in record["metrics"].values())
        left = f"{self.minutes - self.spent():.1f} of {self.minutes:g} minutes left"
        say(f"note: {name}: recall@1 and @10 {shown}; {left}")
        return result

    def recommend(self) -> tuple[list[dict[str, Any]], Table, list[str]]:
        """All records, the recommended one first; a table of them; and the last lines."""
        unseen = [one for one in self.rivals if "trained_on" not in one.record]
        if not unseen:
            raise ValueError("--models: each was trained on some of these pairs; name others")
        close = [one for one in unseen if recall(one) >= max(map(recall, unseen)) - EQUAL]
        first = min(close, key=lambda one: (one.record["minutes"], one.record["megabytes"]))
        others = sorted((one for one in self.rivals if one is not first), key=recall)[::-1]
        results = [[first], *add_differences([[one] for one in others], [first])]
        records, table = [result.record for (result,) in results], table_of_records(results)
        rows = list[Row]()
        for number, record in enumerate(records):
            minutes, *numbers = record["minutes"], record["megabytes"], record["images_per_second"]
            texts = [f"{minutes:.1f}", *(f"{value:,.0f}" for value in numbers), record["licence"]]
            cells = [row.cells[number] for row in table.rows] + [Cell(value=text) for text in texts]
            rows.append(Row(heading=[record["model"]], cells=cells))
        names = ("recall@1", "recall@10", "minutes", "MB", "images/s", "licence")
        said = f"How often a caption finds its image among {records[0]['samples']:,}."
        notes, columns = [said, *table.notes], [[name] for name in names]
        table = replace(table, heading=["model"], columns=columns, rows=rows, notes=notes)
        unclear = sum(not one["differences"][AT_10]["beyond"] for one in records[1:])
        against = f", not clearly above {unclear} of the others" if unclear else ""
        is_made = Path(records[0]["reference"]).parent == self.out
        way = "to train it on your pairs" if is_made else "to embed your pairs with it"
        said = "recommended" if len(records) > 1 else "the only one measured"
        said += f": {records[0]['reference']}{against}; {way}:"
        return records, table, [said, f"protoclip {records[0]['command']}"]

    def spent(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.started) / 60


def recall(result: Result) -> float:
    """Among the first ten images, from 0 to 1."""
    return float(result.record["metrics"][AT_10])


def find_published() -> list[str]:
    """The usual published models that can be had; a note names the others."""
    folders = {name: f"models--{place.replace('/', '--')}" for name, place in PUBLISHED.items()}
    cache = Path(constants.HF_HUB_CACHE)
    missing = [name for name, folder in folders.items() if not (cache / folder).is_dir()]
    # One question for all, since an answer may take seconds.
    if missing and ask_hub(missing[0]) is None:
        say(f"note: left out: {', '.join(missing)}, since the hub does not answer")
        return [model for model in PUBLISHED if model not in missing]
    return [*PUBLISHED]


def find_licence(name: str) -> str:
    """The licence of weights, as timm or the hub says; that of a file is unknown."""
    kind, _, model = name.partition(":")
    if kind == "timm":
        return (None if "/" in model else timm_settings(model).license) or UNKNOWN
    answer = ask_hub(name) if name in PUBLISHED or kind == "hf" else None
    own = "apache-2.0" if name == MINILM else UNKNOWN  # as its package's card says
    return getattr(getattr(answer, "card_data", None), "license", None) or own


def ask_hub(name: str) -> Any:
    """What the hub says of a model, None if it does not answer."""
    repository = PUBLISHED.get(name, name.removeprefix("hf:"))
    return hub_answer(partial(HfApi().model_info, repository))


def time_images(encoder: Encoder, images: Any, ids: Sequence[str]) -> float:
    """How many of these are read and encoded in a second, with the engine that many would have."""
    tower = accelerate(encoder.towers["image"], MANY)
    rows = [row for row in range(len(images)) if images.sample_id(row) in ids[:TIMED]]

    def encode() -> None:
        encoded = map(images.read_encoded, rows)
        tower.encode([prepare_image(image, encoder.transform) for image in encoded])

    encode()  # the engine starts
    return 2 * len(rows) / timeit(encode, number=2)


def spell(settings: Mapping[str, Any], prefix: str) -> list[str]:
    """Settings as options of a command; a list is one option for each value."""
    words = list[str]()
    for name, value in settings.items():
        if isinstance(value, Mapping):
            words += spell(value, f"{prefix}{name}.")
        for one in (
            value if isinstance(value, list) else [value] * isinstance(value, str | bool | float)
        ):
            words += [f"--{prefix}{name}", str(one)]
    return words
