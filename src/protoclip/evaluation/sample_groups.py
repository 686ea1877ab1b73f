"""Which images and texts hang together, so that a test set has all of them or none.

Intervals count them as one group: images of a concept, an image and its captions, equal images.
"""

from collections.abc import Sequence
from typing import NamedTuple

from protoclip.evaluation.retrieval import Captions

LARGEST = 10  # images that equal captions join


class SampleGroups(NamedTuple):
    """The group of each image and of each text that is to be retrieved, by the id of an image."""

    images: list[str]
    texts: list[str]


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
