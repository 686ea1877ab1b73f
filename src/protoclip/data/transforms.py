"""Transforms: how an image becomes the image tower's input, for training and for evaluation.

A transform has two steps. `box` chooses the crop of an upright image that becomes `size` x `size`;
it runs where the image is decoded. `finish` runs once a batch on the device of the images: it
flips, jitters, blurs and normalises, each image by its own row of `num_draws` uniform draws. Keep
the draws on the CPU: what to do to which image is then known without waiting.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from protoclip.data.decode import Box, crop_image, reduction, resize

Channels = tuple[float, float, float]
Bytes = UInt8[Tensor, "b h w 3"]
Images = Float[Tensor, "b 3 h w"]
Draws = Float[Tensor, "b r"]

CPU_CHUNK = 4  # images that a CPU finishes at a time, so that they stay in its cache


@dataclass(frozen=True, kw_only=True)
class EvaluationTransform:
    """Shorter side to `size`, centre crop, normalise: what CLIP evaluates with."""

    size: int
    mean: Channels
    std: Channels
    num_draws: int = 0

    def box(self, width: int, height: int, draws: npt.NDArray[np.float32]) -> Box:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return (left, top, left + side, top + side)

    def finish(self, images: Bytes, draws: Draws) -> Images:
        """The image tower's input, channels last in memory."""
        return _in_chunks(
            images, lambda part: normalise(_to_float(images[part]), self.mean, self.std)
        )

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """One image as the image tower's input, upright by its EXIF orientation."""
        draws = torch.zeros(1, 0)
        pixels = crop_image(image, lambda w, h: self.box(w, h, draws[0].numpy()), self.size)
        pixels = np.require(pixels, requirements="W")  # of this very size, it is the image's own
        return self.finish(torch.from_numpy(pixels)[None], draws)[0]


@dataclass(frozen=True, kw_only=True)
class PillowTransform:
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
        if not self.fast:
            resized = functional.resize(image, [self.size], InterpolationMode.BICUBIC)
            return torch.from_numpy(np.array(functional.center_crop(resized, [self.size])))
        # Of the same sizes and at the same place as torchvision's.
        height, width = (self.size * side // min(image.size) for side in image.size[::-1])
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        centre = resize(np.asarray(image), height, width)[top:, left:][: self.size, : self.size]
        return torch.from_numpy(np.array(centre))

    def finish(self, images: Bytes, draws: Draws) -> Images:
        """The image tower's input, channels last in memory."""
        return _in_chunks(images, lambda part: self._finish(images[part]))

    def _finish(self, images: Bytes) -> Images:
        """In the order of torchvision's operations, on rows long enough for vector instructions."""
        batch, height, width, _ = images.shape
        mean = torch.tensor(self.mean, device=images.device).repeat(width)
        std = torch.tensor(self.std, device=images.device).repeat(width)
        rows = images.reshape(batch * height, width * 3).float()
        rows.div_(255).sub_(mean).div_(std)
        return rows.view(batch, height, width, 3).permute(0, 3, 1, 2)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """One image as the image tower's input, upright by its EXIF orientation."""
        pixels = self.pixels(ImageOps.exif_transpose(image).convert("RGB"))
        return self.finish(pixels[None], torch.zeros(1, 0))[0]


@dataclass(frozen=True, kw_only=True)
class TrainingTransform:
    """Random resized crop, then flip, colour jitter, grayscale and blur with given probabilities.

    Attributes:
        scale: Range of the share of the image's area that a crop covers.
        jitter: Brightness, contrast and saturation by factors in [0.2, 1.8], then hue by up to 0.2
            of the circle.
        blur: Its standard deviation is in [0.1, 2] pixels for 224-pixel images, and in proportion
            at other sizes.
    """

    size: int
    mean: Channels
    std: Channels
    scale: tuple[float, float]
    flip: float = 0.0
    jitter: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
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
        stride = reduction(int(min(exact)), self.size)
        edges = []
        for length, side, draw in zip(exact, (width, height), draws[2:4], strict=True):
            strides = max(1, min(round(length / stride), side // stride))
            first = int(float(draw) * (side // stride - strides + 1))
            edges.append((first * stride, (first + strides) * stride))
        (left, right), (top, bottom) = edges
        return (left, top, right, bottom)

    def finish(self, images: Bytes, draws: Draws) -> Images:
        draws = draws.cpu()
        return _in_chunks(images, lambda part: self._finish(images[part], draws[part]))

    def _finish(self, images: Bytes, draws: Draws) -> Images:
        steps: tuple[tuple[float, Callable[[Images, Draws], Tensor]], ...] = (
            (self.flip, lambda pixels, draws: pixels.flip(3)),
            (self.jitter, self._jittered),
            (self.grayscale, lambda pixels, draws: luminance(pixels).expand(-1, 3, -1, -1)),
            (self.blur, self._blurred),
        )
        pixels = _to_float(images)
        for column, (probability, step) in enumerate(steps, 4):
            chosen = (draws[:, column] < probability).nonzero()[:, 0]
            if len(chosen):
                rows = chosen.to(images.device)
                changed = step(pixels[rows], draws[chosen])
                # Writing across memory orders takes twice as long.
                pixels[rows] = changed.contiguous(memory_format=torch.channels_last)
        return normalise(pixels, self.mean, self.std)

    def _jittered(self, pixels: Images, draws: Draws) -> Images:
        return colour_jitter(pixels.contiguous(), draws[:, 8:12].to(pixels.device))

    def _blurred(self, pixels: Images, draws: Draws) -> Images:
        return gaussian_blur(pixels, (0.1 + 1.9 * draws[:, 12]) * self.size / 224)


@dataclass(frozen=True, kw_only=True)
class LibraryTransform:
    """What the model's own library does to an image; `settings` say what that is."""

    settings: str
    apply: Callable[[Image.Image], Tensor] = field(repr=False, compare=False)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """One image as the image tower's input, upright by its EXIF orientation."""
        return self.apply(ImageOps.exif_transpose(image).convert("RGB"))


Transform = EvaluationTransform | TrainingTransform


def clip_transform(*, size: int, mean: Channels, std: Channels) -> TrainingTransform:
    """CLIP's training transform: a crop of 90 to 100% of the area and nothing else."""
    return TrainingTransform(size=size, mean=mean, std=std, scale=(0.9, 1.0))


def light_transform(*, size: int, mean: Channels, std: Channels) -> TrainingTransform:
    """ProtoCLIP's light augmentation (arXiv 2206.10996, and its reference implementation)."""
    plain = TrainingTransform(size=size, mean=mean, std=std, scale=(0.5, 1.0))
    return replace(plain, flip=0.5, jitter=0.2, grayscale=0.2, blur=0.2)


def _in_chunks(images: Bytes, finish: Callable[[slice], Tensor]) -> Images:
    if images.device.type != "cpu":
        return finish(slice(None))
    out = torch.empty(images.shape).permute(0, 3, 1, 2)
    for first in range(0, len(images), CPU_CHUNK):
        chunk = slice(first, first + CPU_CHUNK)
        out[chunk] = finish(chunk)
    return out


def _to_float(images: Bytes) -> Images:
    """To [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().mul_(1 / 255)


def normalise(images: Images, mean: Channels, std: Channels) -> Images:
    """From [0, 1] to the scale the image tower expects; channels last in memory."""
    batch, _, height, width = images.shape
    # Rows of pixels are long enough for vector instructions.
    rows = images.permute(0, 2, 3, 1).reshape(batch * height, width * 3)
    scale = torch.tensor([1 / s for s in std], device=images.device).repeat(width)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    rows = torch.addcmul(shift.repeat(width), rows, scale)
    return rows.view(batch, height, width, 3).permute(0, 3, 1, 2)


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


def gaussian_blur(images: Images, sigma: Float[Tensor, " b"]) -> Images:
    """Gaussian blur of each image by its own standard deviation, in pixels; mirrors the borders."""
    blurred = torch.empty_like(images)
    radii = (3 * sigma).ceil().clamp(min=1).long()
    # Images of one radius together. On a CPU a sum of shifted images costs a quarter of a grouped
    # convolution.
    for radius in sorted(set(radii.tolist())):
        rows = (radii == radius).nonzero()[:, 0]
        kernel = torch.exp(-0.5 * (torch.arange(radius + 1) / sigma[rows, None]) ** 2)
        kernel = kernel / (2 * kernel[:, 1:].sum(1, keepdim=True) + kernel[:, :1])
        weights = kernel.T.to(images.device)[:, :, None, None, None]
        rows = rows.to(images.device)
        planes = F.pad(images[rows], (radius, radius, radius, radius), mode="reflect")
        for axis in (2, 3):
            length = images.shape[axis]
            total = planes.narrow(axis, radius, length) * weights[0]
            for offset in range(1, radius + 1):
                total.addcmul_(planes.narrow(axis, radius - offset, length), weights[offset])
                total.addcmul_(planes.narrow(axis, radius + offset, length), weights[offset])
            planes = total
        blurred[rows] = planes
    return blurred
