"""Images that are not 8-bit RGB: of other bands, of 16 bits, or of floating-point numbers.

Values of more than 8 bits are scaled to 8 by a range for each band, which is measured once over the
data and saved with the model. What follows is the same as for other images.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from protoclip.data import decode
from protoclip.data.decode import Decoded, Pixels

Values = Shaped[np.ndarray, "h w c"]  # whole or floating-point numbers
AnyImage = bytes | Image.Image | Shaped[np.ndarray, "..."]  # as stored, opened by PIL, or an array
Ranges = Sequence[Sequence[float]]  # by band, the values that become 0 and 255
PNG, NPY, TIFF = b"\x89PNG", b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PERCENTILES = (1, 99)  # of a band's values, the ends of its range
LOOKED_AT, MEASURED, PIXELS = 16, 256, 4096  # images to look at, to measure, and pixels of each
USUAL = (None, 1, 3)  # channels that an image of PIL can have: it is grey, or RGB
BITS_PER_SAMPLE = 258  # tag of a TIFF


@dataclass(frozen=True)
class Bands:
    """How many channels images have, and their ranges; without these all values are of 8 bits."""

    channels: int
    ranges: Ranges = ()


def read_bands(image: AnyImage, bands: Bands) -> Decoded:
    """All pixels of an image, as 8 bits; raises `ValueError` for other bands or a faulty image."""
    values, orientation = read_values(image, bands.channels)
    if values.dtype != np.uint8:
        if not bands.ranges:
            raise ValueError("has more than 8 bits, unlike the images that the model learned from")
        values = scale(values, bands.ranges)
    return Decoded(pixels=np.ascontiguousarray(values), orientation=orientation)


def read_values(image: AnyImage, channels: int | None = None) -> tuple[Values, int]:
    """The values of an image, as so many channels or as many as it has; its EXIF orientation."""
    opened, orientation = open_any(image, channels) if isinstance(image, bytes) else image, 1
    if isinstance(opened, Image.Image):
        orientation = decode.find_orientation(opened)
        try:
            opened = np.asarray(opened) if opened.mode[0] in "IF" else decode.to_rgb(opened)
        except Exception as error:  # hostile bytes make decoders raise anything
            raise decode.decode_error(error) from error
    values = opened[..., None] if opened.ndim == 2 else opened
    if values.ndim != 3 or not values.size or values.dtype.kind not in "uif":
        raise ValueError(f"an array of {values.dtype} {values.shape}, not of (height, width, band)")
    if values.shape[0] < min(values.shape[1:]):  # bands come first
        values = values.transpose(1, 2, 0)
    if values.shape[2] == 1 and channels == 3:
        values = np.repeat(values, 3, axis=2)
    if values.shape[2] == 3 and channels == 1 and values.dtype == np.uint8:
        values = np.asarray(Image.fromarray(values).convert("L"))[..., None]
    if values.shape[2] != (channels or values.shape[2]):
        raise ValueError(f"has {values.shape[2]} bands, and model.image.channels is {channels}")
    return values, orientation


def open_any(encoded: bytes, channels: int | None = None) -> Image.Image | np.ndarray:
    """What PIL opens, or an array: of NumPy, or of a TIFF that PIL would not read as it is."""
    if not encoded.startswith((NPY, *TIFF)):
        return decode.open_image(encoded)
    with suppress(ValueError):
        image: Any = decode.open_image(encoded)
        is_shallow = max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) <= 8
        if channels in USUAL and (is_shallow or image.mode[0] in "IF"):
            return image  # type: ignore[no-any-return]
    try:
        return read_npy(encoded) if encoded.startswith(NPY) else read_tiff(encoded)
    except Exception as error:
        raise decode.decode_error(error) from error


def read_npy(encoded: bytes) -> np.ndarray:
    """What `numpy.save` wrote; no array is made that is larger than the file."""
    file = io.BytesIO(encoded)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version than numpy.save writes")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    values: np.ndarray = np.frombuffer(encoded, dtype, math.prod(shape), offset=file.tell())
    return values.reshape(shape, order="F" if by_column else "C")


def read_tiff(encoded: bytes) -> np.ndarray:
    """The first series of a TIFF, which may be of pages."""
    try:
        import tifffile
    except ImportError:
        raise ValueError("this TIFF needs tifffile: pip install 'protoclip[bands]'") from None
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        if file.series[0].size > decode.MAX_IMAGE_PIXELS:
            raise ValueError(f"more than {decode.MAX_IMAGE_PIXELS} values")
        return np.asarray(file.series[0].asarray())


def scale(values: Values, ranges: Ranges) -> UInt8[np.ndarray, "h w c"]:
    """To 8 bits; what is beyond a range is cut, and what is no number becomes 0."""
    low, high = np.array(ranges).T
    shares: Any = np.nan_to_num((values - low) / (high - low)).clip(0, 1)
    return np.rint(255 * shares).astype(np.uint8)  # type: ignore[no-any-return]


def find_ranges(values: Shaped[np.ndarray, "*_ c"]) -> Ranges:
    """By band, the percentiles of its finite values."""
    bands = [band[np.isfinite(band)] for band in values.reshape(-1, values.shape[-1]).T]
    ends = [np.percentile(band, PERCENTILES).tolist() if len(band) else (0, 1) for band in bands]
    return tuple((low, max(high, math.nextafter(low, math.inf))) for low, high in ends)


def measure_ranges(read: Callable[[int], Iterable[Any]], channels: int) -> Ranges:
    """The ranges of images, of which `read` gives some samples; none if all have 8 bits.

    Raises `ValueError` if none of them has so many channels.
    """
    if channels in USUAL and all(is_plain(sample.image) for sample in read(LOOKED_AT)):
        return ()
    parts, fault = list[np.ndarray](), ""
    for sample in read(MEASURED):
        try:
            values = read_values(sample.image, channels)[0].reshape(-1, channels)
            parts.append(values[:: -(-len(values) // PIXELS)])
        except ValueError as error:
            fault = str(error)
    if fault and not parts:
        raise ValueError(f"model.image.channels: {channels}: no image fits; one {fault}")
    deep = [values for values in parts if values.dtype != np.uint8]
    return find_ranges(np.concatenate(deep)) if deep else ()


def is_plain(encoded: bytes) -> bool:
    """Whether an image is one of PIL's with 8 bits a value, or broken, as its reader will say."""
    if not encoded.startswith((PNG, NPY, *TIFF)):
        return True
    with suppress(ValueError):
        image = open_any(encoded)
        return isinstance(image, Image.Image) and image.mode[0] not in "IF"
    return True


def show(encoded: bytes, *, at_least: int | None = None) -> Pixels:
    """A whole upright image to look at, as `decode`; of others the first three bands, or the first
    one, by their own ranges."""
    if is_plain(encoded):
        return decode.decode(encoded, at_least=at_least)
    values, orientation = read_values(encoded)
    values = values[..., : 3 if values.shape[2] > 2 else 1]
    pixels = np.repeat(scale(values, find_ranges(values)), 3 // values.shape[2], axis=2)
    return decode.turn_upright(pixels, orientation)


def find_size(encoded: bytes) -> tuple[int, int]:
    """Width and height of an upright image, mostly from its header; raises as `read_values`."""
    image = open_any(encoded)
    if isinstance(image, np.ndarray):
        height, width, _ = read_values(image)[0].shape
        return width, height
    return image.size[::-1] if decode.find_orientation(image) >= 5 else image.size
