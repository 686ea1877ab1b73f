"""Views: how a picture becomes the image tower's input, for training and for evaluation.

A view works in two steps. `crop` runs once a picture, where it is decoded (a worker process, say),
and returns bytes of the final size. `finish` runs once a batch on the training device: it flips,
jitters, blurs and normalises with parameters of each picture's own.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

Channels = tuple[float, float, float]


@runtime_checkable
class View(Protocol):
    """The two steps, and how many uniform draws a picture needs for them."""

    @property
    def num_draws(self) -> int: ...

    def crop(self, image: Image.Image, draws: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]: ...

    def finish(
        self, images: UInt8[Tensor, "b h w 3"], draws: Float[Tensor, "b r"]
    ) -> Float[Tensor, "b 3 h w"]: ...


def normalise(images: Float[Tensor, "b 3 h w"], mean: Channels, std: Channels) -> Tensor:
    """From [0, 1] to the scale the image tower expects, channels last in memory."""
    centre = images.new_tensor(mean)[:, None, None]
    spread = images.new_tensor(std)[:, None, None]
    return ((images - centre) / spread).contiguous(memory_format=torch.channels_last)


def to_float(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    return images.permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True, kw_only=True)
class EvaluationView:
    """Shorter side to `size`, centre crop, normalise: what CLIP evaluates with."""

    size: int
    mean: Channels
    std: Channels
    num_draws: int = 0

    def crop(self, image: Image.Image, draws: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(
            image.convert("RGB").resize(
                (self.size, self.size), Image.Resampling.BICUBIC, box, reducing_gap=3.0
            )
        )

    def finish(
        self, images: UInt8[Tensor, "b h w 3"], draws: Float[Tensor, "b r"]
    ) -> Float[Tensor, "b 3 h w"]:
        return normalise(to_float(images), self.mean, self.std)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """One picture as the image tower's input."""
        pixels = torch.from_numpy(self.crop(image, np.zeros(0, dtype=np.float32)).copy())
        return self.finish(pixels[None], torch.zeros(1, 0))[0]


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """Random resized crop, and what the paper calls light augmentation where it is asked for.

    Attributes:
        size: Height and width of the output, in pixels.
        mean, std: Channel statistics for values in [0, 1].
        scale: Range of the share of the picture's area that a crop covers.
        flip: Probability of a horizontal flip.
        jitter: Probability of colour jitter: brightness, contrast, saturation by factors in
            [0.2, 1.8], hue by up to 0.2 of a turn, in this order.
        grayscale: Probability of grayscale.
        blur: Probability of a Gaussian blur, with a standard deviation in [0.1, 2] pixels of a
            224-pixel picture and in proportion at other sizes.
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

    def crop(self, image: Image.Image, draws: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """A crop of random area and aspect ratio (3/4 to 4/3) of an RGB picture, at `size`."""
        low, high = self.scale
        area = image.width * image.height * (low + float(draws[0]) * (high - low))
        ratio = math.exp((2 * float(draws[1]) - 1) * math.log(4 / 3))
        # A crop too long for one side keeps its place inside the picture and gives up the ratio.
        width = min(math.sqrt(area * ratio), image.width)
        height = min(math.sqrt(area / ratio), image.height)
        left = float(draws[2]) * (image.width - width)
        top = float(draws[3]) * (image.height - height)
        return np.asarray(
            image.resize(
                (self.size, self.size),
                Image.Resampling.BICUBIC,
                (left, top, left + width, top + height),
                reducing_gap=3.0,
            )
        )

    def finish(
        self, images: UInt8[Tensor, "b h w 3"], draws: Float[Tensor, "b r"]
    ) -> Float[Tensor, "b 3 h w"]:
        pixels = to_float(images)
        flip, jitter, grayscale, blur = (draws[:, 4:8] < draws.new_tensor(self._chances())).T
        pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
        # Only the chosen pictures pay for what is costly.
        if self.jitter:
            pixels[jitter] = colour_jitter(pixels[jitter], draws[jitter, 8:12])
        if self.grayscale:
            pixels[grayscale] = luminance(pixels[grayscale]).expand(-1, 3, -1, -1)
        if self.blur:
            sigma = (0.1 + 1.9 * draws[blur, 12]) * self.size / 224
            pixels[blur] = gaussian_blur(pixels[blur], sigma)
        return normalise(pixels, self.mean, self.std)

    def _chances(self) -> tuple[float, float, float, float]:
        return (self.flip, self.jitter, self.grayscale, self.blur)


def clip_view(*, size: int, mean: Channels, std: Channels) -> TrainingView:
    """CLIP's training view: a crop of 90 to 100% of the area and nothing else."""
    return TrainingView(size=size, mean=mean, std=std, scale=(0.9, 1.0))


def light_view(*, size: int, mean: Channels, std: Channels) -> TrainingView:
    """ProtoCLIP's light augmentation (arXiv 2206.10996, and its reference implementation)."""
    return TrainingView(
        size=size,
        mean=mean,
        std=std,
        scale=(0.5, 1.0),
        flip=0.5,
        jitter=0.2,
        grayscale=0.2,
        blur=0.2,
    )


def luminance(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Rec. 601 luma, as PIL's mode `L`."""
    weights = images.new_tensor((0.299, 0.587, 0.114))[:, None, None]
    return (images * weights).sum(1, keepdim=True)


def colour_jitter(
    images: Float[Tensor, "b 3 h w"], draws: Float[Tensor, "b 4"]
) -> Float[Tensor, "b 3 h w"]:
    """Brightness, contrast, saturation and hue, each picture by its own amount; in [0, 1]."""
    brightness, contrast, saturation = (0.2 + 1.6 * draws[:, :3].T)[:, :, None, None, None]
    images = (images * brightness).clamp(0, 1)
    grey = luminance(images).mean((2, 3), keepdim=True)
    images = torch.lerp(grey, images, contrast).clamp(0, 1)
    images = torch.lerp(luminance(images), images, saturation).clamp(0, 1)
    return rotate_hue(images, 0.4 * draws[:, 3] - 0.2)


def rotate_hue(
    images: Float[Tensor, "b 3 h w"], turns: Float[Tensor, " b"]
) -> Float[Tensor, "b 3 h w"]:
    """Turn the hue by a share of the circle, keeping HSV's saturation and value."""
    value, smallest = images.amax(1), images.amin(1)
    chroma = value - smallest
    red, green, blue = images.unbind(1)
    safe = chroma.clamp(min=1e-8)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * turns[:, None, None]
    # Each channel falls from value to value - chroma with its distance along the hue circle.
    offsets = images.new_tensor((5.0, 3.0, 1.0))[:, None, None]
    k = (offsets + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(
    images: Float[Tensor, "b 3 h w"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b 3 h w"]:
    """Separable Gaussian blur, each picture with a standard deviation of its own, in pixels."""
    if len(images) == 0:
        return images
    radius = max(1, math.ceil(3 * float(sigma.max())))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    batch, _, height, width = images.shape
    planes = images.reshape(1, batch * 3, height, width)
    planes = F.pad(planes, (radius, radius, radius, radius), mode="reflect")
    planes = F.conv2d(planes, kernel[:, :, None, :], groups=batch * 3)
    planes = F.conv2d(planes, kernel[:, :, :, None], groups=batch * 3)
    return planes.reshape(batch, 3, height, width)
