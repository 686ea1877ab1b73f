"""Transforms: how an image becomes the image tower's input, for training and for evaluation.

A transform has three steps. `box` chooses the crop of an upright image that becomes `size` x
`size`; it runs where the image is decoded. `changes` turns each image's row of `num_draws` uniform
draws into what is to be done to which image; it runs on the CPU, so that nothing waits for another
device. `apply` runs once a batch on the device of the images: it flips, jitters, blurs and
normalises. `finish` is both for a batch at hand.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from protoclip.data import decode
from protoclip.data.bands import AnyImage, Bands, read_bands
from protoclip.data.decode import Box, ChooseBox, Square

Channels = tuple[float, ...]
Bytes = UInt8[Tensor, "b h w c"]
Images = Float[Tensor, "b c h w"]
Draws = Float[Tensor, "b r"]
Changes = Mapping[str, Tensor]  # rows of images to change, and by how much

LONG = 100  # times as long as wide: of such an image only the middle is resized
CPU_CHUNK = 4  # images that a CPU finishes at a time, so that they stay in its cache


class Finishes:
    """What all transforms do with images: to crop one, and to finish a batch of crops."""

    bands: Bands | None = None

    def __str__(self) -> str:
        return f"{self!r}{self.bands or ''}"  # of RGB, what is known by this stays known

    def crop(self, image: AnyImage, box: ChooseBox, size: int) -> Square:
        """As `decode.decode_crop`; also of an image that PIL has opened, or of an array."""
        if self.bands is not None:
            return decode.crop_decoded(read_bands(image, self.bands), box, size)
        cut: Any = decode.decode_crop if isinstance(image, bytes) else decode.crop_image
        return cut(image, box, size)  # type: ignore[no-any-return]

    def changes(self, draws: Draws) -> Changes:
        return {}

    def apply(self, images: Bytes, changes: Changes) -> Images:
        """The image tower's input, channels last in memory; `changes` on the images' device."""
        raise NotImplementedError

    def finish(self, images: Bytes, draws: Draws) -> Images:
        """Apply the transform to a batch, on its device, with draws from the CPU."""
        if images.device.type != "cpu":
            changes = self.changes(draws)
            return self.apply(images, {k: v.to(images.device) for k, v in changes.items()})
        finished = torch.empty(images.shape).permute(0, 3, 1, 2)
        for first in range(0, len(images), CPU_CHUNK):
            chunk = slice(first, first + CPU_CHUNK)
            finished[chunk] = self.apply(images[chunk], self.changes(draws[chunk]))
        return finished


@dataclass(frozen=True, kw_only=True)
class EvaluationTransform(Finishes):
    """Shorter side to `size`, centre crop, normalise: what CLIP evaluates with."""

    size: int
    mean: Channels
    std: Channels
    bands: Bands | None = field(default=None, repr=False)
    num_draws: int = 0

    def box(self, width: int, height: int, draws: npt.NDArray[np.float32]) -> Box:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return (left, top, left + side, top + side)

    def apply(self, images: Bytes, changes: Changes) -> Images:
        return normalise(_to_float(images), self.mean, self.std)

    def __call__(self, image: AnyImage) -> Float[Tensor, "c h w"]:
        """One image as the image tower's input, upright by EXIF and on white where transparent."""
        draws = torch.zeros(1, 0)
        pixels = self.crop(image, lambda w, h: self.box(w, h, draws[0].numpy()), self.size)
        pixels = np.require(pixels, requirements="W")  # of this very size, it is the image's own
        return self.finish(torch.from_numpy(pixels)[None], draws)[0]


@dataclass(frozen=True, kw_only=True)
class SquashTransform(EvaluationTransform):
    """The whole image to a square of `size`, whatever its shape: what SigLIP evaluates with."""

    def box(self, width: int, height: int, draws: npt.NDArray[np.float32]) -> Box:
        return (0, 0, width, height)


@dataclass(frozen=True, kw_only=True)
class PillowTransform(Finishes):
    """What open_clip evaluates with, to the bit: Pillow resizes the whole image before the crop.

    With `fast`, PyTorch resizes it in a third of the time. Of photographs, some values then differ
    by 1 or 2 of 255 levels, so that very close decisions can change.
    """

    size: int
    mean: Channels
    std: Channels
    fast: bool = False

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "s s 3"]:
        """The centre of an upright RGB image."""
        image = middle_of_long(image)
        if not self.fast:
            resized = functional.resize(image, [self.size], InterpolationMode.BICUBIC)
            return torch.from_numpy(np.array(functional.center_crop(resized, [self.size])))
        # Of the same sizes and at the same place as torchvision's.
        height, width = (self.size * side // min(image.size) for side in image.size[::-1])
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        centre = decode.resize(np.asarray(image), height, width)[top:, left:][
            : self.size, : self.size
        ]
        return torch.from_numpy(np.array(centre))

    def apply(self, images: Bytes, changes: Changes) -> Images:
        """In the order of torchvision's operations, on rows long enough for vector instructions."""
        batch, height, width, _ = images.shape
        mean = _row_of(self.mean, width, images.device)
        std = _row_of(self.std, width, images.device)
        rows = images.reshape(batch * height, -1).float()
        rows.div_(255).sub_(mean).div_(std)
        return rows.view(images.shape).permute(0, 3, 1, 2)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """One image as the image tower's input, upright by EXIF and on white where transparent."""
        return self.finish(self.pixels(decode.upright(image))[None], torch.zeros(1, 0))[0]


def middle_of_long(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than `LONG` times as long as wide; others as they are.

    Where its shorter side is resized, all of it would take memory in proportion to its length.
    """
    most = LONG * min(image.size)
    if max(image.size) <= most:
        return image
    # As much from either end, so that the centre stays.
    left, top = (max(0, length - most) // 2 for length in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


@dataclass(frozen=True, kw_only=True)
class TrainingTransform(Finishes):
    """Random resized crop; then flip, colour jitter, grayscale and blur by their probabilities."""

    size: int
    mean: Channels
    std: Channels
    bands: Bands | None = field(default=None, repr=False)
    scale: tuple[float, float]  # range of the share of the image's area that a crop covers
    flip: float = 0.0
    # Brightness, contrast and saturation by factors in [0.2, 1.8], then hue by up to 0.2 of 1.
    jitter: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0  # standard deviation in [0.1, 2] pixels of 224, and in proportion
    num_draws: int = 13

    def box(self, width: int, height: int, draws: npt.NDArray[np.float32]) -> Box:
        """A crop of random area and aspect ratio (3/4 to 4/3)."""
        low, high = self.scale
        area = width * height * (low + float(draws[0]) * (high - low))
        ratio = math.exp((2 * float(draws[1]) - 1) * math.log(4 / 3))
        # A crop longer than the image is cut to the image's side and loses its ratio.
        exact = (min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height))
        # Crops of large images move in strides of several pixels, so that a JPEG can be decoded
        # at a fraction of its size.
        stride = decode.reduction(int(min(exact)), self.size)
        edges = []
        for length, side, draw in zip(exact, (width, height), draws[2:4], strict=True):
            strides = max(1, min(round(length / stride), side // stride))
            first = int(float(draw) * (side // stride - strides + 1))
            edges.append((first * stride, (first + strides) * stride))
        (left, right), (top, bottom) = edges
        return (left, top, right, bottom)

    def changes(self, draws: Draws) -> Changes:
        """Rows of the images that each step changes, and by how much; blurs by their radius."""
        steps = {"flip": self.flip, "jitter": self.jitter, "grayscale": self.grayscale}
        changes = {
            step: (draws[:, column] < probability).nonzero()[:, 0]
            for column, (step, probability) in enumerate(steps.items(), 4)
        }
        changes["jitter_draws"] = draws[changes["jitter"], 8:12]
        blurred = (draws[:, 7] < self.blur).nonzero()[:, 0]
        sigma = (0.1 + 1.9 * draws[blurred, 12]) * self.size / 224
        for radius, (chosen, weights) in blur_weights(sigma).items():
            changes[f"blur/{radius}"] = blurred[chosen]
            changes[f"blur_weights/{radius}"] = weights
        return changes

    def apply(self, images: Bytes, changes: Changes) -> Images:
        pixels = _to_float(images)

        def change(rows: Tensor, step: Callable[[Images], Tensor]) -> None:
            if len(rows):
                # Writing across memory orders takes twice as long.
                changed = step(pixels[rows]).contiguous(memory_format=torch.channels_last)
                pixels[rows] = changed

        def jittered(chosen: Images) -> Images:
            return colour_jitter(chosen.contiguous(), changes["jitter_draws"])

        change(changes["flip"], lambda chosen: chosen.flip(3))
        change(changes["jitter"], jittered)
        change(changes["grayscale"], lambda chosen: luminance(chosen).expand(-1, 3, -1, -1))
        for name, weights in changes.items():
            if name.startswith("blur_weights/"):
                change(changes[name.replace("_weights", "")], partial(blur, weights=weights))
        return normalise(pixels, self.mean, self.std)


@dataclass(frozen=True)
class MiddleTransform:
    """A library's transform that keeps an image's shape, given the middle alone of a long one."""

    apply: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.apply(middle_of_long(image))

    def __repr__(self) -> str:
        return repr(self.apply)  # what is known of other images, by this, stays known


@dataclass(frozen=True, kw_only=True)
class LibraryTransform:
    """What the model's own library does to an image; `settings` say what that is."""

    settings: str
    apply: Callable[[Image.Image], Tensor] = field(repr=False, compare=False)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """One image as the image tower's input, upright by EXIF and on white where transparent."""
        return self.apply(decode.upright(image))


Transform = EvaluationTransform | TrainingTransform


def clip_transform(**images: Any) -> TrainingTransform:
    """CLIP's training transform: a crop of 90 to 100% of the area and nothing else."""
    return TrainingTransform(**images, scale=(0.9, 1.0))


def light_transform(**images: Any) -> TrainingTransform:
    """ProtoCLIP's light augmentation (arXiv 2206.10996, and its reference implementation).

    Colours are those of RGB, so images with other bands keep theirs.
    """
    plain = TrainingTransform(**images, scale=(0.5, 1.0), flip=0.5, blur=0.2)
    return plain if len(plain.mean) != 3 else replace(plain, jitter=0.2, grayscale=0.2)


def _to_float(images: Bytes) -> Images:
    """To [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().mul_(1 / 255)


def normalise(images: Images, mean: Channels, std: Channels) -> Images:
    """From [0, 1] to the scale the image tower expects; channels last in memory."""
    batch, channels, height, width = images.shape
    # Rows of pixels are long enough for vector instructions.
    rows = images.permute(0, 2, 3, 1).reshape(batch * height, width * channels)
    scale = _row_of(tuple(1 / s for s in std), width, images.device)
    shift = _row_of(tuple(-m / s for m, s in zip(mean, std, strict=True)), width, images.device)
    rows = torch.addcmul(shift, rows, scale)
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


@cache
def _row_of(values: tuple[float, ...], width: int, device: torch.device) -> Float[Tensor, " w"]:
    """A value a channel, once for each pixel of a row. Kept, since a copy makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).repeat(width)


def luminance(images: Images) -> Float[Tensor, "b 1 h w"]:
    """Rec. 601 luma, as PIL's mode `L`."""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def colour_jitter(images: Images, draws: Float[Tensor, "b 4"]) -> Images:
    """Brightness, contrast, saturation and hue in [0, 1], each image by amounts of its own."""
    brightness, contrast, saturation = (0.2 + 1.6 * draws[:, :3].T)[:, :, None, None, None]
    images = (images * brightness).clamp_(0, 1)
    grey = luminance(images).mean((2, 3), keepdim=True)
    images = (images * contrast).add_(grey * (1 - contrast)).clamp_(0, 1)
    images = torch.lerp(luminance(images), images, saturation).clamp_(0, 1)
    return rotate_hue(images, 0.4 * draws[:, 3] - 0.2)


def rotate_hue(images: Images, shares: Float[Tensor, " b"]) -> Images:
    """Rotate the hue by a share of the circle; HSV's saturation and value stay."""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    value = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - smallest
    # Hue in sixths of the circle: 0 is red, 2 green, 4 blue. Interpolation with weights 0 and 1 is
    # exact, and on a CPU several times faster than `torch.where`.
    scale = chroma.clamp(min=1e-8).reciprocal_()
    hue = (red - green).mul_(scale).add_(4)
    hue = hue.lerp_((blue - red).mul_(scale).add_(2), (value == green).float())
    hue = hue.lerp_((green - blue).mul_(scale), (value == red).float())
    hue = hue.add_(6 * shares[:, None, None, None])
    # A channel is largest within 1 of its own hue and smallest from 2 on, so it follows the
    # distance from the opposite hue, 3 away.
    rotated = torch.empty_like(images)
    for channel, opposite in enumerate((3, 5, 1)):
        distance = hue - opposite
        distance = distance.sub_((distance / 6).round_(), alpha=6).abs_()
        weight = distance.sub_(1).clamp_(0, 1)
        rotated[:, channel : channel + 1] = torch.addcmul(smallest, chroma, weight)
    return rotated


def blur_weights(
    sigma: Float[Tensor, " b"],
) -> dict[int, tuple[Int[Tensor, " n"], Float[Tensor, "n r"]]]:
    """By radius, the rows with it, and the weights of a blur from its middle outwards: Gaussians of
    standard deviation `sigma`, in pixels."""
    radii = (3 * sigma).ceil().clamp(min=1).long()
    weights = {}
    for radius in sorted(set(radii.tolist())):
        rows = (radii == radius).nonzero()[:, 0]
        kernel = torch.exp(-0.5 * (torch.arange(radius + 1) / sigma[rows, None]) ** 2)
        kernel = kernel / (2 * kernel[:, 1:].sum(1, keepdim=True) + kernel[:, :1])
        weights[radius] = rows, kernel
    return weights


def blur(images: Images, weights: Float[Tensor, "b r"]) -> Images:
    """Blur along both axes by weights from the middle outwards; mirrors the borders.

    On a CPU a sum of shifted images costs a quarter of a grouped convolution.
    """
    radius = weights.shape[1] - 1
    by_offset = weights.T[:, :, None, None, None]
    planes = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    for axis in (2, 3):
        length = images.shape[axis]
        total = planes.narrow(axis, radius, length) * by_offset[0]
        for offset in range(1, radius + 1):
            total.addcmul_(planes.narrow(axis, radius - offset, length), by_offset[offset])
            total.addcmul_(planes.narrow(axis, radius + offset, length), by_offset[offset])
        planes = total
    return planes
