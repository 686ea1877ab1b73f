"""`protoclip classify`: a class and its probability for each image.

Classes are told apart by their names, or by labelled images in one of four ways, of which
cross-validation takes the best.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.config import ImagesConfig
from protoclip.data.access import cache_folder
from protoclip.encode.features import Encoder
from protoclip.encode.linear_maps import deal
from protoclip.evaluation.datasets import EvaluationData, name_classes, open_data
from protoclip.evaluation.features import Part
from protoclip.evaluation.metrics import SampleResults, compute_influences, interval
from protoclip.evaluation.probes import best_linear_probe, count_votes
from protoclip.evaluation.readers import class_folders
from protoclip.evaluation.suite import encode_data
from protoclip.files import read_local
from protoclip.models import loading

LEAST_VOTE = 0.01  # is divided among all classes, so that none has probability 0
TEMPERATURES = torch.logspace(-3, 3, 121).tolist()


def open_classifier(reference: str, device: torch.device, **settings: Any) -> Encoder:
    """A model that encodes images and names into the cache, which `evaluate` shares."""
    model, transform, tokenizer = loading.load(loading.pin_newest(reference))
    model, cache = loading.to_device(model, device), cache_folder() / "features"
    given: dict[str, Any] = {"cache": cache, "show": True, **settings}
    return Encoder(model=model, transform=transform, tokenizer=tokenizer, **given)


def open_images(reference: str, split: str) -> EvaluationData:
    """Images as `evaluate` takes them, as one split; or the names of classes in a `.txt`."""
    if reference.lower().endswith(".txt"):
        lines = map(str.strip, read_local(reference, encoding="utf-8-sig").splitlines())
        names, templates = name_classes([*dict.fromkeys(filter(None, lines))])
        return EvaluationData(name="", splits={}, class_names=names, templates=templates)
    folders = class_folders(Path(reference))  # which may have another split alone
    there = split if split in folders else next(iter(folders), split)
    data = open_data(reference, split=there, config=ImagesConfig())
    return replace(data, splits={split: data.splits[there]})


def classify(encoder: Encoder, data: str, classes: str) -> tuple[pa.Table, dict[str, Any]]:
    """Classify images.

    Args:
        data: Images as `evaluate` takes them, with classes or without.
        classes: A `.txt` with the name of a class a line; or labelled images.

    Returns:
        A row an image that can be used; and as JSON values the method, and accuracies: of each in
        cross-validation, and on `data` if that has classes.
    """
    images, known = open_images(data, "test"), open_images(classes, "train")
    if len(names := known.class_names) < 2:
        raise ValueError(
            f"--classes: {classes}: has fewer than two classes; name a table's column of them "
            "behind it, as in labelled.csv,class_column=kind"
        )
    both = replace(known, name=images.name, splits={**known.splits, **images.splits})
    tasks = ["zero_shot", *["knn"] * len(known.splits)]
    features = encode_data(encoder, both, tasks, split="test")
    part, texts = features.part, features.texts["classes"]
    method, accuracies = "names", dict[str, Any]()
    if labelled := features.parts.get("train"):
        logits, method, accuracies = learn(labelled, texts, part.features)
    else:
        scale = getattr(getattr(encoder.model, "towers", None), "logit_scale", None)
        logits = part.features @ texts.T * (100 if scale is None else float(scale.detach().exp()))
    chances, best = logits.softmax(1).max(1)
    predicted = [names[number] for number in best.tolist()]
    columns = {"sample_id": part.ids, "prediction": predicted, "probability": chances.numpy()}
    if part.labels is not None:
        columns["class"] = [images.class_names[number] for number in part.labels.tolist()]
        right = torch.tensor([a == b for a, b in zip(columns["class"], predicted, strict=True)])
        accuracies[data] = measure(right, part.content)
    facts = {"images": len(part.ids), "unusable": len(part.bad), "method": method}
    facts |= {"mean_probability": float(chances.mean()), "accuracies": accuracies}
    return pa.table(columns), facts


def learn(
    known: Part, texts: Float[Tensor, "k d"], features: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "m k"], str, dict[str, Any]]:
    """Calibrated logits by the method that is best in cross-validation, its name, and the accuracy
    of each. Equal images are in one of the five folds."""
    assert known.labels is not None
    labels = known.labels
    held_out = {
        name: torch.zeros(len(labels), len(texts))
        for name in ("names", "means", "knn", "linear_probe")
    }
    for fold in filter(len, deal(torch.tensor(known.content), seed=0)):
        others = torch.ones(len(labels), dtype=torch.bool).index_fill(0, fold, False)
        train = known.features[others], labels[others]
        for name, logits in held_out.items():
            logits[fold] = compare(name, *train, known.features[fold], texts)
    right = {name: logits.argmax(1) == labels for name, logits in held_out.items()}
    best = max(right, key=lambda name: int(right[name].sum()))
    logits = compare(best, known.features, labels, features, texts)
    records = {name: measure(one, known.content) for name, one in right.items()}
    return logits / find_temperature(held_out[best], labels), best, records


def compare(
    method: str,
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    rows: Float[Tensor, "m d"],
    texts: Float[Tensor, "k d"],
) -> Float[Tensor, "m k"]:
    """Logits by a method; -inf for a class without images.

    `means` is CL2N of SimpleShot (Wang et al. 2019, arXiv 1911.04623): the nearest mean of a class,
    of centred features of unit norm.
    """
    if method == "names":
        return rows @ texts.T
    if method == "means":
        centre = train.mean(0)
        train, rows = F.normalize(train - centre, dim=1), F.normalize(rows - centre, dim=1)
        counts = torch.bincount(labels, minlength=len(texts)).unsqueeze(1)
        means = torch.zeros_like(texts).index_add_(0, labels, train) / counts
        return (-torch.cdist(rows, means).square()).nan_to_num(-torch.inf)
    if method == "knn":
        votes = count_votes(train, labels, rows, len(texts))
        return (votes / votes.sum(1, keepdim=True) + LEAST_VOTE / len(texts)).log()
    logits = torch.full((len(rows), len(texts)), -torch.inf)
    if len(torch.unique(labels)) < 2:  # in a fold of few
        return logits.index_fill(1, labels[:1], 0)
    probe = best_linear_probe(train, labels)
    return logits.index_copy(1, probe.classes, probe.logits(rows).float())


def measure(right: Bool[Tensor, " n"], content: Sequence[int]) -> dict[str, Any]:
    """The share of images that are right, and its 95% interval over different images."""
    images = {"knn_correct": right.numpy(), "sample_id": np.array(content)}
    results = SampleResults(images=images)
    accuracy, (parts, _) = results.means["knn/acc1"], compute_influences(results)
    ends = interval(accuracy, parts["knn/acc1"]) if parts else None
    return {"accuracy": accuracy, "interval": ends, "images": len(right)}


def find_temperature(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> float:
    """The temperature at which held-out logits are least surprised by the labels (Guo et al. 2017,
    arXiv 1706.04599). As if one image more were wrong, or few images would make all certain."""
    is_known = logits.isfinite()
    logits = logits.double().masked_fill(~is_known, float(logits[is_known].min()))
    smoothing = 1 / (len(labels) + 2)
    losses = [F.cross_entropy(logits / t, labels, label_smoothing=smoothing) for t in TEMPERATURES]
    return float(TEMPERATURES[int(torch.stack(losses).argmin())])
