"""`protoclip classify`: a class and its probability for each image.

Classes are told apart by their names, or by labelled images in one of four ways, of which
cross-validation takes the best.
"""

from collections import Counter
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
from protoclip.encode.features import Encoder
from protoclip.encode.linear_maps import deal
from protoclip.evaluation.datasets import EvaluationData, name_classes
from protoclip.evaluation.features import Part
from protoclip.evaluation.metrics import SampleResults, compute_influences, interval
from protoclip.evaluation.probes import best_linear_probe, count_votes
from protoclip.evaluation.readers import class_folders, read_text
from protoclip.evaluation.suite import encode_data
from protoclip.evaluation.validation import open_data
from protoclip.evaluation.zero_shot import encode_classes
from protoclip.terminal import say, visible

METHODS = ("names", "means", "knn", "linear_probe")  # of equally good ones the first is taken
LEAST_VOTE = 0.01  # is divided among all classes, so that none has probability 0
TEMPERATURES = torch.logspace(-3, 3, 121).tolist()


def open_images(reference: str, split: str) -> EvaluationData:
    """Images as `evaluate` takes them, as one split of this name."""
    folders = class_folders(Path(reference))  # which may have another split alone
    there = split if split in folders else next(iter(folders), split)
    data = open_data(reference, split=there, config=ImagesConfig())
    if (labels := data.splits[there].labels) is not None and labels.ndim == 2:
        raise ValueError(f"{reference}: has several classes per image; name others, or evaluate it")
    return replace(data, splits={split: data.splits[there]})


def open_classes(reference: str) -> EvaluationData:
    """The names of classes in a `.txt`, or labelled images as the split `train`."""
    if reference.lower().endswith(".txt"):
        lines = map(str.strip, read_text(reference).removeprefix("\ufeff").splitlines())
        names, templates = name_classes([*filter(None, lines)])
        known = EvaluationData(name="", splits={}, class_names=names, templates=templates)
        way_out = "write one a line"
    else:
        known = open_images(reference, "train")
        way_out = "name its column of them behind it, as in labelled.csv,class_column=kind"
    if len(known.class_names) < 2:
        raise ValueError(f"{reference}: has fewer than two classes; {way_out}")
    name, number = Counter(known.class_names).most_common(1)[0]
    if number > 1:
        raise ValueError(f"{reference}: '{name}' is there twice; leave one out")
    return known


def classify(encoder: Encoder, data: str, classes: str) -> tuple[pa.Table, dict[str, Any]]:
    """Classify images.

    Args:
        data: Images as `evaluate` takes them, with classes or without.
        classes: A `.txt` with the name of a class a line; or labelled images.

    Returns:
        A row an image that can be used; and as JSON values the method, the accuracy of each in
        cross-validation, and that on images of these classes that are not among the labelled ones.

    Raises:
        ValueError: A class is named twice, fewer than two can be learned, or data are faulty.
    """
    known, images = open_classes(classes), open_images(data, "test")
    for note in (*known.notes, *images.notes):
        say(f"note: {note}")
    labelled = encode_data(encoder, known, [], split="train").part if known.splits else None
    if labelled is not None:
        kept = find_learnable(labelled, known.class_names, classes)
        known = replace(known, class_names=[known.class_names[number] for number in kept])
    part = encode_data(encoder, images, [], split="test").part
    texts = encode_classes(encoder, known, part, None)["classes"]
    method, validated, accuracy = "names", dict[str, Any](), None
    seen, content = np.zeros(len(part.ids), dtype=bool), np.array(part.content)
    if labelled is not None:
        logits, method, validated = learn(labelled, kept, texts, part)
        seen = np.isin(content, labelled.content)
    else:
        scale = getattr(getattr(encoder.model, "towers", None), "logit_scale", None)
        logits = part.features @ texts.T * (100 if scale is None else float(scale.detach().exp()))
    chances, best = logits.softmax(1).max(1)
    predicted = [known.class_names[number] for number in best.tolist()]
    columns = {"sample_id": part.ids, "prediction": predicted, "probability": chances.numpy()}
    if part.labels is not None:
        columns["class"] = [images.class_names[number] for number in part.labels.tolist()]
        own = np.array(columns["class"])
        counts = np.isin(own, known.class_names)
        if len(others := own[~counts]):
            what = f"{len(others):,} images of other classes, such as '{visible(others[0])}'"
            say(f"note: {data}: accuracy leaves out {what}")
        counts &= ~seen
        right = own[counts] == np.array(predicted)[counts]
        accuracy = measure(right, content[counts]) if len(right) else None
    return pa.table(columns), {
        "images": len(part.ids),
        "unusable": len(part.bad),
        "labelled_too": int(seen.sum()),
        "method": method,
        "mean_probability": float(chances.mean()),
        "validated": validated,
        "accuracy": accuracy,
    }


def find_learnable(labelled: Part, names: Sequence[str], reference: str) -> Int[Tensor, " k"]:
    """The numbers of the classes of two different images or more, of which one can be held out."""
    assert labelled.labels is not None
    different = {*zip(labelled.labels.tolist(), labelled.content, strict=True)}
    counts = Counter(label for label, _ in different)
    kept = [number for number in range(len(names)) if counts[number] > 1]
    if len(kept) < 2:
        what = "fewer than two classes have two different images that can be used"
        raise ValueError(f"{reference}: {what}; add some")
    if few := [visible(name) for number, name in enumerate(names) if counts[number] < 2]:
        what = f"{len(few):,} classes with fewer than two different images are left out"
        say(f"note: {reference}: {what}, such as {', '.join(few[:3])}")
    return torch.tensor(kept)


def learn(
    known: Part, kept: Int[Tensor, " k"], texts: Float[Tensor, "k d"], part: Part
) -> tuple[Float[Tensor, "m k"], str, dict[str, Any]]:
    """Calibrated logits by the method that is best in cross-validation, its name, and the accuracy
    of each. The images of a class are dealt into five folds, equal ones into the same. An image
    that is learned from would find itself, so it keeps the logits of the fold that held it out."""
    assert known.labels is not None
    rows = torch.isin(known.labels, kept)
    features, labels = known.features[rows], torch.searchsorted(kept, known.labels[rows])
    content = torch.tensor(known.content)[rows]
    own = [(labels == number).nonzero()[:, 0] for number in range(len(texts))]
    dealt = [[rows[some] for some in deal(content[rows], seed=0)] for rows in own]
    held_out = {name: torch.zeros(len(labels), len(texts)) for name in METHODS}
    for fold in filter(len, map(torch.cat, zip(*dealt, strict=True))):
        others = torch.ones(len(labels), dtype=torch.bool).index_fill(0, fold, False)
        train = features[others], labels[others]
        for name, logits in held_out.items():
            logits[fold] = compare(name, *train, features[fold], texts)
    right = {name: (logits.argmax(1) == labels).numpy() for name, logits in held_out.items()}
    best = max(right, key=lambda name: int(right[name].sum()))
    logits = compare(best, features, labels, part.features, texts)
    row_of = {key: row for row, key in enumerate(content.tolist())}
    for row, key in enumerate(part.content):
        if key in row_of:
            logits[row] = held_out[best][row_of[key]]
    records = {name: measure(one, content.numpy()) for name, one in right.items()}
    return logits / find_temperature(held_out[best], labels), best, records


def compare(
    method: str,
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    rows: Float[Tensor, "m d"],
    texts: Float[Tensor, "k d"],
) -> Float[Tensor, "m k"]:
    """Logits by a method, where each class has labelled rows.

    `means` is CL2N of SimpleShot (Wang et al. 2019, arXiv 1911.04623): the nearest mean of a class,
    of centred features of unit norm.
    """
    if method == "names":
        return rows @ texts.T
    if method == "means":
        centre = train.mean(0)
        train, rows = F.normalize(train - centre, dim=1), F.normalize(rows - centre, dim=1)
        means = torch.zeros_like(texts).index_add_(0, labels, train)
        return -torch.cdist(rows, means / torch.bincount(labels).unsqueeze(1)).square()
    if method == "knn":
        votes = count_votes(train, labels, rows)
        return (votes / votes.sum(1, keepdim=True) + LEAST_VOTE / len(texts)).log()
    return best_linear_probe(train, labels).logits(rows).float()


def measure(right: Bool[np.ndarray, " n"], content: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """The share of images that are right, and its 95% interval over different images."""
    results = SampleResults(images={"knn_correct": right, "sample_id": content})
    accuracy, (parts, _) = results.means["knn/acc1"], compute_influences(results)
    ends = interval(accuracy, parts["knn/acc1"]) if parts else None
    return {"accuracy": accuracy, "interval": ends, "images": len(right)}


def find_temperature(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> float:
    """The temperature at which held-out logits are least surprised by the labels (Guo et al. 2017,
    arXiv 1706.04599). As if one image more were wrong, or few images would make all certain."""
    smoothing, scores = 1 / (len(labels) + 2), logits.double()
    losses = [F.cross_entropy(scores / t, labels, label_smoothing=smoothing) for t in TEMPERATURES]
    return float(TEMPERATURES[int(torch.stack(losses).argmin())])
