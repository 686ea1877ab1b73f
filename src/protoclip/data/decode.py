"""From encoded bytes to upright RGB pixels, decoding no more than a crop needs.

JPEG, PNG, WebP, GIF, BMP and TIFF. Of an animation the first frame; what is transparent shows
white; EXIF orientation is obeyed. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the
crop is still large enough for that. Whatever is wrong with the bytes raises `ValueError` with a
short reason. No global setting of PIL is changed; its limit on pixels counts for WebP and TIFF
pictures alone, which PIL refuses beyond twice that limit.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Shaped, UInt8
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torchvision.io import ImageReadMode, decode_jpeg

# Left, top, right, bottom in whole pixels of the upright picture.
Box = tuple[int, int, int, int]
ChooseBox = Callable[[int, int], Box]

# The readers by a file's first bytes. `Image.open` would try forty formats, some of which start
# other programs, and would hold pictures against a limit of its own.
READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
)
ORIENTATION = 0x0112  # EXIF
# What a JPEG decoder reduced differs from all pixels resized at once. Reduced to twice the size
# wanted, the two raise_on_all_ranks to 44 dB at worst over sizes and fractions; to 1.25 times, to 37 dB.
REDUCED_MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """All pixels of a picture, as they lie in its file, and its EXIF orientation, 1 to 8."""

    pixels: UInt8[np.ndarray, "h w 3"]
    orientation: int = 1


def reduction(side: int, size: int) -> int:
    """By how much a JPEG may be reduced while it is decoded: 1, 2, 4 or 8.

    Args:
        side: Pixels of the picture or crop.
        size: Pixels it will be resized to.
    """
    return next((k for k in (8, 4, 2) if side >= REDUCED_MARGIN * size * k), 1)


def decode_crop(
    encoded: bytes, box: ChooseBox, size: int, *, max_pixels: int
) -> UInt8[np.ndarray, "s s 3"]:
    """A crop of a picture, resized.

    Args:
        encoded: The bytes of the file.
        box: The crop, given the upright picture's width and height. A JPEG is reduced while it is
            decoded only by a number that divides all four values.
        size: Height and width of the result.
        max_pixels: Pictures of more pixels are refused before they are decoded.

    Raises:
        ValueError: The bytes are no picture, not all of one, or too large a one.
    """
    image, orientation = _open(encoded, max_pixels)
    stored = _chosen(box, image.size, orientation)
    factor = reduction(min(stored[2] - stored[0], stored[3] - stored[1]), size)
    while any(edge % factor for edge in stored):
        factor //= 2
    return _finished(_pixels(encoded, image, stored, factor), size, orientation)


def decode_all(encoded: bytes, size: int, *, max_pixels: int) -> Decoded | None:
    """All pixels of a picture, if every crop of it that is resized to `size` is taken from them.

    None for a JPEG so large that `decode_crop` reduces it while it decodes some crop.

    Raises:
        ValueError: As `decode_crop`.
    """
    image, orientation = _open(encoded, max_pixels)
    if image.format == "JPEG" and reduction(min(image.size), size) > 1:
        return None
    pixels = _pixels(encoded, image, (0, 0, *image.size), 1)
    return Decoded(pixels=np.ascontiguousarray(pixels), orientation=orientation)


def crop_decoded(picture: Decoded, box: ChooseBox, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """`decode_crop` of a picture that is decoded, to the same bits."""
    height, width = picture.pixels.shape[:2]
    left, top, right, bottom = _chosen(box, (width, height), picture.orientation)
    return _finished(picture.pixels[top:bottom, left:right], size, picture.orientation)


def decode(
    encoded: bytes, *, max_pixels: int, at_least: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """A whole picture.

    Args:
        encoded: The bytes of the file.
        max_pixels: Pictures of more pixels are refused before they are decoded.
        at_least: The result may be reduced while it is decoded, its shorter side not below this.

    Raises:
        ValueError: The bytes are no picture, not all of one, or too large a one.
    """
    image, orientation = _open(encoded, max_pixels)
    factor = 1
    if at_least is not None:
        factor = next((k for k in (8, 4, 2) if min(image.size) >= at_least * k), 1)
    return _turn(_pixels(encoded, image, (0, 0, *image.size), factor), orientation)


def dimensions(encoded: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Width and height of the upright picture, from its header; raises like `decode`."""
    image, orientation = _open(encoded, max_pixels)
    return _upright(image.size, orientation)


def crop_image(image: Image.Image, box: ChooseBox, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """As `decode_crop`, of a picture that PIL has opened."""
    image.load()
    orientation = _orientation(image)
    width, height = _upright(image.size, orientation)
    stored = _stored_box(box(width, height), (width, height), orientation)
    return _turn(crop_resize(rgb(image), stored, size), orientation)


def crop_resize(
    pixels: UInt8[np.ndarray, "h w 3"], box: Box, size: int
) -> UInt8[np.ndarray, "s s 3"]:
    """A crop of decoded pixels, resized."""
    left, top, right, bottom = box
    return resize(pixels[top:bottom, left:right], size, size)


def resize(
    pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Bicubic with antialiasing, as PIL does it, in vectorised integer arithmetic."""
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    if not pixels.flags.writeable:
        pixels = pixels.copy()  # PyTorch warns of what it could not write to
    # In this order the strides say "channels last", which is faster by half.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    small = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in any of PIL's modes as RGB, with white behind what is transparent."""
    image.load()
    if image.mode == "F":
        raise ValueError("pixels of floating-point numbers are not supported")
    if image.mode.startswith("I"):
        # PIL cuts sixteen bits off at 255 where the upper eight are meant.
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return np.asarray(white)
    return np.asarray(image.convert("RGB"))


def _open(encoded: bytes, max_pixels: int) -> tuple[ImageFile.ImageFile, int]:
    """The reader after the header, and the EXIF orientation, 1 to 8."""
    if not encoded:
        raise ValueError("empty file")
    reader = next((found for start, found in READERS if encoded.startswith(start)), None)
    if reader is None:
        raise ValueError("not an image (not one of JPEG, PNG, WebP, GIF, BMP, TIFF)")
    try:
        image = reader(io.BytesIO(encoded))
    except Exception as error:  # whatever hostile bytes provoke in a reader
        raise ValueError(_reason(error)) from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError("an image without pixels")
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels are more than data.max_image_pixels ({max_pixels})"
        )
    return image, _orientation(image)


def _orientation(image: Image.Image) -> int:
    """How EXIF data say that a picture is stored, 1 to 8."""
    if "exif" not in image.info or image.format == "TIFF":  # PIL turns TIFF pictures itself
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF data do not spoil the picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def _pixels(
    encoded: bytes, image: ImageFile.ImageFile, box: Box, factor: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The box of the stored picture as RGB on white, reduced by `factor` if it is a JPEG."""
    left, top, right, bottom = box
    try:
        if image.format == "JPEG":
            # Decoders fill what is missing with grey when only the end marker is cut off, and
            # compressed data never hold that marker.
            scan, end = b"\xff\xda", b"\xff\xd9"
            if not encoded.endswith(end) and encoded.find(end, encoded.rfind(scan)) < 0:
                raise ValueError("truncated")
            if factor == 1 and image.mode in ("RGB", "L"):
                buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
                planes = decode_jpeg(buffer, mode=ImageReadMode.RGB)
                pixels: UInt8[np.ndarray, "h w 3"] = planes.permute(1, 2, 0).numpy()
                return pixels[top:bottom, left:right]
            image.draft(None, (image.width // factor, image.height // factor))
            left, top = left // factor, top // factor
            right, bottom = -(-right // factor), -(-bottom // factor)
        return rgb(image)[top:bottom, left:right]
    except Exception as error:  # whatever hostile bytes provoke in a decoder
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if text == "truncated" or "truncated" in text.lower():
        return "truncated"
    return f"not an image that can be decoded ({text[:100]})"


# EXIF orientation as steps from the stored to the upright picture: swap the axes, then mirror
# each. Resizing treats all of them alike, so they are applied to what is small.


def _axes(orientation: int) -> tuple[bool, bool, bool]:
    """Whether axes are swapped, then x mirrored, then y mirrored."""
    return orientation >= 5, orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if _axes(orientation)[0] else size


def _stored_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Where the box of an upright picture of that width and height is in the stored one."""
    swap, mirror_x, mirror_y = _axes(orientation)
    left, top, right, bottom = box
    if mirror_x:
        left, right = size[0] - right, size[0] - left
    if mirror_y:
        top, bottom = size[1] - bottom, size[1] - top
    return (top, left, bottom, right) if swap else (left, top, right, bottom)


def _chosen(box: ChooseBox, stored: tuple[int, int], orientation: int) -> Box:
    """The box of a stored picture of that width and height; `box` sees it upright."""
    upright = _upright(stored, orientation)
    return _stored_box(box(*upright), upright, orientation)


def _finished(
    crop: UInt8[np.ndarray, "h w 3"], size: int, orientation: int
) -> UInt8[np.ndarray, "s s 3"]:
    # A JPEG decoder gives planes; interleaved, they are resized in a third of the time.
    return _turn(resize(np.ascontiguousarray(crop), size, size), orientation)


def _turn(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> Shaped[np.ndarray, "h2 w2 3"]:
    swap, mirror_x, mirror_y = _axes(orientation)
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    if mirror_x:
        pixels = pixels[:, ::-1]
    if mirror_y:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
