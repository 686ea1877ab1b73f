"""What tasks score: the features of a split, and what is known of its images.

`suite.py` says what is encoded, and `encode/features.py` encodes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.distributed.collectives import rank
from protoclip.encode.features import Bad, Encoded
from protoclip.evaluation.datasets import Captions, EvaluationData, match_captions
from protoclip.terminal import say

LARGEST = 10  # images that equal captions join


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of a split that can be used: unit-norm features, and what is known of each."""

    features: Float[Tensor, "n d"]
    ids: Sequence[str]
    bad: Sequence[Bad]
    total: int  # images of the split
    labels: Tensor | None
    groups: Int[Tensor, " n"]
    content: Sequence[int]  # equal for equal images
    captions: Captions | None
    names: Sequence[str] | None

    @cached_property
    def sample_groups(self) -> tuple[list[str], list[str]]:
        """The groups of images and of texts, each by the id of an image.

        Images of a concept belong together, an image and its captions, equal images, and images
        with an equal caption: rarest first, up to `LARGEST` images a group or a fiftieth of all.
        """
        group, members = self.groups.tolist(), dict[int, list[int]]()
        for image, number in enumerate(group):
            members.setdefault(number, []).append(image)
        images_with: dict[str | int, list[int]] = {}
        for image, key in enumerate(self.content):
            images_with.setdefault(key, []).append(image)
        first_image: dict[int, int] = {}
        if (captions := self.captions) is not None:
            pairs = torch.stack([captions.image_of_pair, captions.text_of_pair], dim=1)
            for image, text in pairs.tolist():
                images_with.setdefault(captions.texts[text], []).append(image)
                first_image.setdefault(text, image)
        for images in sorted(images_with.values(), key=len):
            numbers = {group[image] for image in images}
            together = [image for number in numbers for image in members[number]]
            if len(numbers) > 1 and len(together) <= max(LARGEST, len(group) // 50):
                number = min(numbers)
                members[number] = together
                for image in together:
                    group[image] = number
        image_groups = [self.ids[min(members[number])] for number in group]
        text_groups = [image_groups[first_image[text]] for text in range(len(first_image))]
        return image_groups, text_groups


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the tasks score, on the CPU."""

    data: EvaluationData
    split: str
    tasks: Sequence[str]  # those that what can be used serves
    parts: Mapping[str, Part]  # images by split
    part: Part  # those that are measured
    # Unit-norm features of `captions`, and classifiers of `names` and `classes`.
    texts: Mapping[str, Float[Tensor, "_ d"]]
    device: torch.device  # where what learns from them runs


def make_part(data: EvaluationData, split: str, encoded: Encoded) -> Part:
    """A split without its bad rows, of which rank 0 names the first; of images with captions, those
    of equal content are one.

    Where the data say which images belong together, as the emoji do, each stays as it is.
    """
    whole, left_out = data.splits[split], {row for row, _ in encoded.bad}
    total = len(encoded.features) + len(left_out)
    if encoded.bad and rank() == 0 and split not in data.warned_splits:
        data.warned_splits.add(split)
        counts = f"{len(left_out)} of {total} images"
        say(f"warning: {data.name} images: {split}: {counts} cannot be used and are left out:")
        for _, why in encoded.bad[:10]:
            say(f"  {why}")
    rows = [row for row in range(total) if row not in left_out]
    ids, features = [whole.images.sample_id(row) for row in rows], encoded.features
    groups = None if whole.groups is None else [whole.groups[row] for row in rows]
    names, captions = whole.names, None
    content = encoded.content.tolist()
    if whole.captions is not None:
        captions = match_captions([whole.captions[row] for row in rows], ids, groups, content)
        if len(different := captions.rows) < len(rows):
            rows, ids = [rows[i] for i in different], [ids[i] for i in different]
            content, features = [content[i] for i in different], features[different]
    return Part(
        features=F.normalize(features, dim=1),
        ids=ids,
        bad=encoded.bad,
        total=total,
        labels=None if whole.labels is None else whole.labels[torch.tensor(rows)],
        groups=torch.tensor(range(len(rows)) if groups is None else groups),
        content=content,
        captions=captions,
        names=None if names is None else [names[row] for row in rows],
    )
