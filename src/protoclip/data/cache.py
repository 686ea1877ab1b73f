"""Crops of images, and decoded images that are kept in memory for the next pass.

A crop is the same to the bit with a cache and without one. An image is known by its bytes, so a
file that changes is another image.
"""

import hashlib

from protoclip.config import DataConfig
from protoclip.data import decode
from protoclip.data.decode import ChooseBox, Decoded, Square


class MemoryCache:
    """Images in the memory of this process, three bytes a pixel; when full it keeps what it has."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self._images: dict[bytes, Decoded] = {}

    def get(self, key: bytes) -> Decoded | None:
        return self._images.get(key)

    def put(self, key: bytes, image: Decoded) -> None:
        if key not in self._images and self.used + image.pixels.nbytes <= self.max_bytes:
            self._images[key] = image
            self.used += image.pixels.nbytes


def crop(
    encoded: bytes,
    box: ChooseBox,
    size: int,
    *,
    max_pixels: int,
    cache: MemoryCache | None = None,
) -> Square:
    """`decode_crop` with a cache. JPEGs so large that their crops are decoded at a fraction of
    their size are not kept."""
    if cache is None:
        return decode.decode_crop(encoded, box, size, max_pixels=max_pixels)
    # The settings decide what is kept, and whether the image is refused.
    key = hashlib.sha256(f"{size} {max_pixels} ".encode() + encoded).digest()
    image = cache.get(key)
    if image is None:
        image = decode.decode_all(encoded, size, max_pixels=max_pixels)
        if image is None:
            return decode.decode_crop(encoded, box, size, max_pixels=max_pixels)
        cache.put(key, image)
    return decode.crop_decoded(image, box, size)


def image_cache(data: DataConfig, *, workers: int) -> MemoryCache | None:
    """The cache that `data.cache` names; none with workers, which share no memory: what one of
    them keeps, the others decode again."""
    if data.cache == "none" or workers:
        return None
    return MemoryCache(max_bytes=int(data.cache_gb * 1e9))
