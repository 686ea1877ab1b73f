"""Small images of pairs, as pages show them."""

import io
from threading import BoundedSemaphore

from PIL import Image

from protoclip.data.decode import decode
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample
from protoclip.explore.pairs import ExploredPairs

THUMBNAIL_SIDE, LARGE_SIDE = 160, 512
DECODING = BoundedSemaphore(4)  # images at a time, since each may be large


def thumbnail(pairs: ExploredPairs, row: int, side: int) -> bytes:
    """A small image as WebP, without whatever else the file held; grey if it cannot be read."""
    try:
        with DECODING:
            pixels = decode(pairs.encoded(row), max_pixels=MAX_IMAGE_PIXELS, at_least=side)
            image = Image.fromarray(pixels)
            shrink = side / max(image.size)
            # A very long, thin image keeps a pixel, where `ImageOps.contain` leaves none.
            width, height = (max(1, round(shrink * length)) for length in image.size)
            image = image.resize((width, height))
    except (BadSample, ValueError, OSError):
        image = Image.new("RGB", (side, side), "#868e96")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
