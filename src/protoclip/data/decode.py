"""Encoded bytes to upright RGB pixels; decodes no more than a crop needs.

Reads the first frame of JPEG, PNG, WebP, GIF, BMP and TIFF files, on white where transparent. A
large JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop stays large enough. Whatever is
wrong with the bytes raises `ValueError` with a short reason.
"""

import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torchvision.io import ImageReadMode, decode_jpeg

# Left, top, right, bottom in whole pixels of the upright image.
Box = tuple[int, int, int, int]
# Width and height of the upright image -> box.
ChooseBox = Callable[[int, int], Box]
Pixels = UInt8[np.ndarray, "h w c"]  # of three channels, unless `bands.py` read them
Square = UInt8[np.ndarray, "s s c"]

# Readers by a file's first bytes. `Image.open` would try forty formats, some of which start other
# programs, and would apply a limit on pixels of its own.
READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8", JpegImageFile),
    (b"\x89PNG", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"GIF8", GifImageFile),
    (b"BM", BmpImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
)
EXIF_ORIENTATION = 0x0112
MAX_IMAGE_PIXELS = 178_956_970  # PIL refuses more than this as an attack
# Scaled decoding differs from resizing all pixels at once. With twice the pixels needed the two
# agree to 44 dB at worst over sizes and fractions; with 1.25 times, to 37 dB.
REDUCED_MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """All pixels of an image as they are stored, and its EXIF orientation, 1 to 8."""

    pixels: Pixels
    orientation: int = 1


def reduction(side: int, size: int | float) -> int:
    """By how much a JPEG may be reduced (1, 2, 4, 8) if `side` pixels become `size` pixels."""
    return next((k for k in (8, 4, 2) if side >= REDUCED_MARGIN * size * k), 1)


def decode_crop(encoded: bytes, box: ChooseBox, size: int) -> Square:
    """Decode the crop that `box` chooses, and resize it to `size` x `size`.

    Raises `ValueError` if the bytes are no image, not all of one, or one of too many pixels.
    """
    image = open_image(encoded)
    orientation = find_orientation(image)
    stored = _stored_box(box, image.size, orientation)
    factor = reduction(min(stored[2] - stored[0], stored[3] - stored[1]), size)
    # Only a factor that divides all four values of the box keeps its place.
    while any(edge % factor for edge in stored):
        factor //= 2
    return turn_upright(resize(_read(encoded, image, stored, factor), size, size), orientation)


def decode_all(encoded: bytes, size: int) -> Decoded | None:
    """All pixels of an image, or None for a JPEG so large that `decode_crop` would reduce some of
    its crops; raises as that."""
    image = open_image(encoded)
    if image.format == "JPEG" and reduction(min(image.size), size) > 1:
        return None
    pixels = _read(encoded, image, (0, 0, *image.size), 1)
    return Decoded(pixels=np.ascontiguousarray(pixels), orientation=find_orientation(image))


def crop_decoded(image: Decoded, box: ChooseBox, size: int) -> Square:
    """The same bits as `decode_crop`, from pixels that are already decoded."""
    height, width = image.pixels.shape[:2]
    left, top, right, bottom = _stored_box(box, (width, height), image.orientation)
    return turn_upright(resize(image.pixels[top:bottom, left:right], size, size), image.orientation)


class MemoryCache:
    """Images in the memory of this process, three bytes a pixel; when full it keeps what it has."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self._images: dict[bytes, Decoded] = {}

    def crop(self, encoded: bytes, box: ChooseBox, size: int) -> Square:
        """As `decode_crop`."""
        # The size decides whether an image is kept.
        key = hashlib.sha256(f"{size} ".encode() + encoded).digest()
        if (image := self._images.get(key)) is None:
            if (image := decode_all(encoded, size)) is None:
                return decode_crop(encoded, box, size)
            if self.used + image.pixels.nbytes <= self.max_bytes:
                self._images[key] = image
                self.used += image.pixels.nbytes
        return crop_decoded(image, box, size)


def crop_image(image: Image.Image, box: ChooseBox, size: int) -> Square:
    """The same as `decode_crop`, from an image that PIL has opened."""
    pixels = to_rgb(image)  # loads the image, after which PIL has turned a TIFF
    return crop_decoded(Decoded(pixels=pixels, orientation=find_orientation(image)), box, size)


def upright(image: Image.Image) -> Image.Image:
    """An image that PIL has opened, as `decode` would give it."""
    pixels = to_rgb(image)  # loads the image, after which PIL has turned a TIFF
    return Image.fromarray(turn_upright(pixels, find_orientation(image)))


def decode(encoded: bytes, *, at_least: int | None = None) -> Pixels:
    """A whole upright image; raises as `decode_crop`. A JPEG may be reduced while its shorter side
    keeps `at_least` pixels."""
    image = open_image(encoded)
    factor = reduction(min(image.size), at_least / REDUCED_MARGIN) if at_least else 1
    pixels = _read(encoded, image, (0, 0, *image.size), factor)
    return turn_upright(pixels, find_orientation(image))


def resize(pixels: Pixels, height: int, width: int) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Bicubic with antialiasing, as PIL does it, in vectorised integer arithmetic."""
    # JPEG decoders return planes; interleaved pixels are resized in a third of the time.
    pixels = np.ascontiguousarray(pixels)
    if pixels.shape[:2] == (height, width):
        return pixels
    if not pixels.flags.writeable:
        pixels = pixels.copy()  # PyTorch warns about read-only memory
    # These strides say "channels last", for which PyTorch is faster by half.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def to_rgb(image: Image.Image) -> Pixels:
    """An image in any of PIL's modes as RGB, on white where it is transparent."""
    image.load()
    if image.mode == "F":
        raise ValueError("pixels of floating-point numbers are not supported")
    if image.mode.startswith("I"):
        # Sixteen bits: PIL's conversion would clip at 255; the upper eight bits are meant.
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return np.asarray(white)
    return np.asarray(image.convert("RGB"))


def open_image(encoded: bytes) -> ImageFile.ImageFile:
    """An image whose size and orientation are known; raises as `decode_crop`."""
    if not encoded:
        raise ValueError("empty file")
    reader = next((kind for start, kind in READERS if encoded.startswith(start)), None)
    if reader is None:
        raise ValueError("not an image (not one of JPEG, PNG, WebP, GIF, BMP, TIFF)")
    try:
        image = reader(io.BytesIO(encoded))
    except Exception as error:  # hostile bytes make readers raise anything
        raise decode_error(error) from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError("an image without pixels")
    if width * height > MAX_IMAGE_PIXELS:
        limit = f"more than the limit ({MAX_IMAGE_PIXELS})"
        raise ValueError(f"{width} x {height} pixels are {limit}")
    return image


def find_orientation(image: Image.Image) -> int:
    if "exif" not in image.info or image.format == "TIFF":  # PIL turns TIFF images itself
        return 1
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF data do not spoil the image
        return 1
    return orientation if orientation in range(1, 9) else 1


def _read(encoded: bytes, image: ImageFile.ImageFile, box: Box, factor: int) -> Pixels:
    """The box of the stored image as RGB, reduced by `factor` if it is a JPEG."""
    left, top, right, bottom = box
    try:
        if image.format == "JPEG":
            # When only the end marker is missing, decoders fill the rest with grey. Compressed
            # data never contain that marker. They begin where PIL stopped, behind the thumbnail,
            # which has an end of its own; a phone's video may follow the image.
            end = b"\xff\xd9"
            assert image.fp is not None
            if not encoded.endswith(end) and encoded.find(end, image.fp.tell()) < 0:
                raise ValueError("truncated")
            if factor == 1 and image.mode in ("RGB", "L"):
                buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
                # PIL has the last word, as with other factors: or a crop would make an image bad.
                with suppress(RuntimeError):
                    planes = decode_jpeg(buffer, mode=ImageReadMode.RGB)
                    pixels: Pixels = planes.permute(1, 2, 0).numpy()
                    return pixels[top:bottom, left:right]
            image.draft(None, (image.width // factor, image.height // factor))
            left, top = left // factor, top // factor
            right, bottom = -(-right // factor), -(-bottom // factor)
        return to_rgb(image)[top:bottom, left:right]
    except Exception as error:  # hostile bytes make decoders raise anything
        raise decode_error(error) from error


def decode_error(error: Exception) -> ValueError:
    """What is wrong with the bytes; raises `MemoryError`, which is not their fault."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        raise MemoryError(str(error)) from error
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    cut = "truncated" in text.lower()
    return ValueError("truncated" if cut else f"not an image that can be decoded ({text[:100]})")


def _stored_box(choose: ChooseBox, stored: tuple[int, int], orientation: int) -> Box:
    """The chosen box in the coordinates of the stored image, whose width and height are given."""
    width, height = stored[::-1] if orientation >= 5 else stored
    left, top, right, bottom = choose(width, height)
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


def turn_upright(pixels: Pixels, orientation: int) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Stored pixels as upright ones: swaps the axes, then mirrors x and y, as `_stored_box`."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
