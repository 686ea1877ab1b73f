"""What the tasks need of a data set: whether it has that, and the features of images and captions.

`features` encodes; here it is decided what is encoded, and what is known of each image goes along.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.distributed.collectives import rank
from protoclip.evaluation.datasets import EvaluationData, find_positions
from protoclip.evaluation.features import Bad, Encoded, Encoder
from protoclip.evaluation.retrieval import Captions, captions_of
from protoclip.evaluation.zero_shot import prompts, zero_shot_classifier
from protoclip.terminal import say

# Tasks that are cheap enough to be done often: they encode no training images and fit nothing.
QUICK = ("zero_shot", "retrieval")
LARGEST = 10  # images that equal captions join


def quick_tasks(data: EvaluationData, split: str) -> list[str]:
    """The tasks of `QUICK` that the data can serve; raises `ValueError` if they can serve none."""
    reasons = {task: lacks(data, split, task) for task in QUICK}
    if all(reasons.values()):
        why = "; ".join(f"{task} needs {reason}" for task, reason in reasons.items())
        raise ValueError(f"{data.name}: can serve no quick task ({why})")
    return [task for task in QUICK if not reasons[task]]


def lacks(data: EvaluationData, split: str, task: str) -> str:
    """What a task needs and the data do not have; empty if they have everything.

    Raises:
        ValueError: A label is not the number of a class.
    """
    part = data.splits[split]
    labels = part.labels
    if task in ("retrieval", "geometry"):
        for row, captions in enumerate(part.captions or ()):
            if not captions:
                raise ValueError(
                    f"{data.name}: sample '{part.images.sample_id(row)}' has no caption"
                )
        return "" if part.captions is not None else "captions"
    if task == "zero_shot" and split in data.image_names:
        return ""
    if labels is None:
        return "labels"
    if task == "zero_shot":
        check_labels(data, split)
        return "" if data.class_names else "class names"
    if labels.ndim == 2:
        return "one class an image, and these are multilabel data"
    if task == "clustering":
        return "" if len(set(labels.tolist())) > 1 else "images of two classes or more"
    train = data.splits.get("train")  # opens it, which may take long
    if train is None or train.labels is None or split == "train":
        return "a labelled train split beside the one that is measured"
    return "" if len(set(train.labels.tolist())) > 1 else "a train split of two classes or more"


def check_labels(data: EvaluationData, split: str) -> None:
    labels, count = data.splits[split].labels, len(data.class_names)
    if labels is None or not count:
        return
    if labels.ndim == 2 and labels.shape[1] != count:
        raise ValueError(
            f"{data.name}: {count} class names for {labels.shape[1]} columns of labels"
        )
    if labels.ndim == 1 and bool((wrong := (labels < 0) | (labels >= count)).any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{data.name}: sample '{data.splits[split].images.sample_id(row)}' has class "
            f"{int(labels[row])}, but there are names for classes 0 to {count - 1}"
        )


class SampleGroups(NamedTuple):
    """The group of each image and of each text that is to be retrieved, by the id of an image."""

    images: list[str]
    texts: list[str]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of a split that can be used: features of any norm, and what is known of each."""

    features: Float[Tensor, "n d"]
    ids: Sequence[str]
    bad: Sequence[Bad]
    labels: Tensor | None
    groups: Int[Tensor, " n"]
    content: Sequence[int]  # equal for equal images
    captions: Captions | None
    names: Sequence[str] | None

    @cached_property
    def unit(self) -> Float[Tensor, "n d"]:
        return F.normalize(self.features, dim=1)

    @cached_property
    def sample_groups(self) -> SampleGroups:
        return sample_groups(self.ids, self.groups.tolist(), self.content, self.captions)


@dataclass(frozen=True, kw_only=True)
class TaskFeatures:
    """Images by split; unit-norm features of `captions`, and classifiers of `names`, `classes`.

    They lie on the CPU. What learns from them does it on `device`.
    """

    parts: Mapping[str, Part]
    texts: Mapping[str, Float[Tensor, "_ d"]]
    device: torch.device | str = "cpu"


def task_features(
    encoder: Encoder,
    data: EvaluationData,
    tasks: Sequence[str],
    *,
    split: str,
    templates: Sequence[str] | None = None,
) -> TaskFeatures:
    """Encode what the tasks need, and no other images and texts."""
    parts = {}
    for name in splits_of(data, tasks, split):
        stage = stage_of(data, tasks, name, split)
        encoded = encoder.images(data.splits[name].images, stage=stage)
        parts[name] = part_of(data, name, encoded)
        if rank() == 0 and encoded.bad and name not in data.warned_splits:
            data.warned_splits.add(name)
            say_bad(stage, encoded.bad, len(data.splits[name].images))
    texts = {}
    part = parts[split]
    if part.captions is not None and {"retrieval", "geometry"} & {*tasks}:
        captions = encoder.texts(part.captions.texts, stage=f"{data.name} captions")
        texts["captions"] = F.normalize(captions, dim=1)

    def classifier(names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "k d"]:
        encoded = encoder.texts(prompts(names, templates), stage=f"{data.name} class names")
        return zero_shot_classifier(encoded.view(len(names), len(templates), -1))

    if "zero_shot" in tasks:
        if part.names is not None:
            texts["names"] = classifier(sorted(set(part.names)), templates or ["{c}"])
        if part.labels is not None and data.class_names:
            distinct = [*dict.fromkeys(data.class_names)]
            of_distinct = classifier(distinct, templates or data.templates)
            texts["classes"] = of_distinct[find_positions(data.class_names, distinct)]
    return TaskFeatures(parts=parts, texts=texts, device=encoder.device)


def stage_of(data: EvaluationData, tasks: Sequence[str], name: str, split: str) -> str:
    """What progress calls the images of a split: those that judge, or why others are encoded."""
    if name == split:
        return f"{data.name} images: {name}"
    if name == "validation":
        return f"{data.name}: images that set the probe's strength ({name})"
    learn = " and ".join(task for task in ("knn", "linear_probe") if task in tasks)
    return f"{data.name}: images that {learn} learn from ({name})"


def splits_of(data: EvaluationData, tasks: Sequence[str], split: str) -> list[str]:
    """The splits whose images the tasks need; opens no other."""
    needed = ["train"] * bool({"linear_probe", "knn"} & {*tasks})
    if "linear_probe" in tasks and split != "validation":
        validation = data.splits.get("validation")
        needed += ["validation"] * (validation is not None and validation.labels is not None)
    return [*needed, split]


def part_of(data: EvaluationData, split: str, encoded: Encoded) -> Part:
    """A split without its bad rows; of images with captions, those of equal content are one.

    Where the data say which images belong together, as the emoji do, each stays as it is.
    """
    whole, left_out = data.splits[split], {row for row, _ in encoded.bad}
    rows = [row for row in range(len(whole.images)) if row not in left_out]
    ids, features = [whole.images.sample_id(row) for row in rows], encoded.features
    groups = None if whole.groups is None else [whole.groups[row] for row in rows]
    names, captions = data.image_names.get(split), None
    content = encoded.content.tolist()
    if whole.captions is not None:
        captions = captions_of([whole.captions[row] for row in rows], ids, groups, content)
        if len(kept := captions.rows) < len(rows):
            rows, ids = [rows[i] for i in kept], [ids[i] for i in kept]
            content, features = [content[i] for i in kept], features[kept]
    return Part(
        features=features,
        ids=ids,
        bad=encoded.bad,
        labels=None if whole.labels is None else whole.labels[torch.tensor(rows)],
        groups=torch.tensor(range(len(rows)) if groups is None else groups),
        content=content,
        captions=captions,
        names=None if names is None else [names[row] for row in rows],
    )


def say_bad(stage: str, bad: Sequence[Bad], number: int) -> None:
    """Name the first ten images that cannot be used."""
    share = f"{len(bad)} of {number} images cannot be used and are left out"
    say(f"warning: {stage}: {share}:")
    for _, why in bad[:10]:
        say(f"  {why}")


def sample_groups(
    ids: Sequence[str],
    groups: Sequence[int],
    content: Sequence[int],
    captions: Captions | None,
) -> SampleGroups:
    """The groups of images, given what the data say of them, and of their texts.

    Images of a concept hang together, an image and its captions, equal images, and images with an
    equal caption: rarest first, while no group grows beyond `LARGEST` images and a fiftieth of all.

    Args:
        ids, groups, content: Of each image: its id, a number that images of a concept share, and
            one that equal images share.
    """
    group, members = [*groups], dict[int, list[int]]()
    for image, number in enumerate(group):
        members.setdefault(number, []).append(image)
    images_of: dict[str | int, list[int]] = {}
    for image, key in enumerate(content):
        images_of.setdefault(key, []).append(image)
    first_image: dict[int, int] = {}
    if captions is not None:
        pairs = zip(captions.image_of_pair.tolist(), captions.text_of_pair.tolist(), strict=True)
        for image, text in pairs:
            images_of.setdefault(captions.texts[text], []).append(image)
            first_image.setdefault(text, image)
    for images in sorted(images_of.values(), key=len):
        joined = {group[image] for image in images}
        together = [image for number in joined for image in members[number]]
        if len(joined) > 1 and len(together) <= max(LARGEST, len(group) // 50):
            number = min(joined)
            members[number] = together
            for image in together:
                group[image] = number
    of_images = [ids[min(members[number])] for number in group]
    of_texts = [of_images[first_image[text]] for text in range(len(first_image))]
    return SampleGroups(of_images, of_texts)
