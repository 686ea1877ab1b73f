"""Small images of pairs, as pages show them, and how alike two are."""

import io
from threading import BoundedSemaphore

import numpy as np
from PIL import Image

from protoclip.data.decode import decode
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample
from protoclip.explore.pairs import ExploredPairs

THUMBNAIL_SIDE, LARGE_SIDE = 160, 512
COMPARED_SIDE, MOST_ALIKE = 16, 0.999
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


def likeness(pairs: ExploredPairs, one: int, other: int) -> float:
    """The correlation of two images' pixels, all shrunk to a square: 1 for equal pixels alone,
    and 0 if an image cannot be read."""
    try:
        pixels = [
            decode(pairs.encoded(row), max_pixels=MAX_IMAGE_PIXELS, at_least=COMPARED_SIDE)
            for row in (one, other)
        ]
    except (BadSample, ValueError, OSError):
        return 0.0
    if np.array_equal(pixels[0], pixels[1]):
        return 1.0
    side = (COMPARED_SIDE, COMPARED_SIDE)
    small = [np.asarray(Image.fromarray(each).resize(side)) for each in pixels]
    rows = np.stack(small).reshape(2, -1) / 255
    rows -= rows.mean(1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1).prod()
    return min(MOST_ALIKE, float(rows[0] @ rows[1] / max(norms, 1e-6)))
