"""Decoding: right in every mode, as PIL where a crop is scaled, strict with bad bytes, cached."""

import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from protoclip.data import decode as module
from protoclip.data.bands import find_size
from protoclip.data.decode import Box, MemoryCache, crop_image, decode, decode_crop
from protoclip.data.transforms import light_transform
from testing import save_to_bytes


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some detail, as photographs have."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    blobs = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    fine = np.random.default_rng(seed + 1).normal(0, 12, (height, width, 3))
    mixed = (np.asarray(blobs) + fine).clip(0, 255).astype(np.uint8)
    return Image.fromarray(mixed).filter(ImageFilter.GaussianBlur(1))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def fixed(box: Box) -> Callable[[int, int], Box]:
    return lambda width, height: box


def pil_crop(data: bytes, box: Box, size: int) -> np.ndarray:
    """As PIL does it: all pixels, upright, cropped, then one bicubic resize."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("side", "box", "size"),
    [
        (320, (10, 20, 300, 290), 96),  # all pixels
        (320, (40, 40, 90, 120), 112),  # enlarged
        (640, (16, 32, 624, 600), 140),  # half
        (640, (8, 16, 632, 640), 70),  # a quarter
        (896, (0, 8, 896, 888), 48),  # an eighth
        (640, (15, 33, 624, 601), 140),  # too odd for scaling
    ],
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_crop_is_pils_to_40_db(side, box, size, options):
    """Whether all pixels are decoded or fewer."""
    data = save_to_bytes(photo(side, side), "JPEG", quality=90, **options)
    ours = decode_crop(data, fixed(box), size)
    assert psnr(ours, pil_crop(data, box, size)) > 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_obeyed(orientation, form):
    """In whole images, in crops, in sizes, and where a JPEG is scaled: as PIL does it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = save_to_bytes(photo(320, 208), form, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert find_size(data) == upright.size
    assert psnr(decode(data), np.asarray(upright)) > 50
    for box, size in (((3, 5, 187, 190), 90), ((8, 16, 200, 200), 40)):
        ours = decode_crop(data, fixed(box), size)
        assert psnr(ours, pil_crop(data, box, size)) > 40
    opened = crop_image(Image.open(io.BytesIO(data)), fixed((3, 5, 187, 190)), 120)
    ours = decode_crop(data, fixed((3, 5, 187, 190)), 120)
    assert np.abs(opened.astype(int) - ours).max() <= (4 if form == "JPEG" else 0)


def odd_images() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Files of one colour in odd modes, and the colour that they show on white."""
    size, colour, white = (16, 16), (200, 40, 90), (255, 255, 255)
    half = (227, 147, 172)  # of the colour at an opacity of 128
    palette = Image.new("P", size, 1)
    palette.putpalette([1, 2, 3, *colour])
    deep = Image.fromarray(np.full(size, 200 * 256 + 77, dtype=np.uint16))
    red = Image.new("RGB", size, colour)
    frames = {"save_all": True, "append_images": [Image.new("RGB", size, (0, 255, 0))]}
    return {
        "palette": (save_to_bytes(palette, "PNG"), colour),
        "colour key": (save_to_bytes(red, "PNG", transparency=colour), white),
        "RGBA": (save_to_bytes(Image.new("RGBA", size, (*colour, 128)), "PNG"), half),
        "RGBA WebP": (save_to_bytes(Image.new("RGBA", size), "WEBP", lossless=True), white),
        "LA": (save_to_bytes(Image.new("LA", size, (60, 0)), "PNG"), white),
        "grey JPEG": (save_to_bytes(Image.new("L", size, 60), "JPEG"), (60, 60, 60)),
        "one bit": (save_to_bytes(Image.new("1", size, 1), "PNG"), white),
        "16 bit": (save_to_bytes(deep, "PNG"), (200, 200, 200)),
        "CMYK JPEG": (save_to_bytes(red.convert("CMYK"), "JPEG", quality=95), colour),
        "BMP": (save_to_bytes(red, "BMP"), colour),
        "TIFF": (save_to_bytes(red, "TIFF", compression="tiff_lzw"), colour),
        "GIF": (save_to_bytes(red, "GIF", **frames), colour),
        "animated PNG": (save_to_bytes(red, "PNG", **frames), colour),
        "animated WebP": (save_to_bytes(red, "WEBP", lossless=True, **frames), colour),
    }


@pytest.mark.parametrize("name", list(odd_images()))
def test_odd_modes_show_their_colour(name):
    data, colour = odd_images()[name]
    whole = decode(data)
    crop = decode_crop(data, fixed((2, 2, 14, 14)), 8)
    assert max(np.abs(pixels.astype(int) - colour).max() for pixels in (whole, crop)) <= 3


def test_sixteen_bits_keep_their_shades():
    ramp = np.arange(256, dtype=np.uint16)[None] * 256
    pixels = decode(save_to_bytes(Image.fromarray(ramp), "PNG"))
    assert pixels[0].tolist() == [[shade] * 3 for shade in range(256)]


def test_at_least_keeps_the_shorter_side():
    """A JPEG comes at the smallest fraction that is large enough, other files in full."""
    wide = photo(832, 640)
    for at_least, height in ((None, 640), (321, 640), (320, 320), (100, 160), (1, 80)):
        pixels = decode(save_to_bytes(wide, "JPEG"), at_least=at_least)
        assert pixels.shape == (height, 832 * height // 640, 3)
    assert decode(save_to_bytes(wide, "PNG"), at_least=100).shape == (640, 832, 3)


def with_thumbnail(jpeg: bytes) -> bytes:
    """A JPEG with another, whole one in a segment before its own data."""
    small = save_to_bytes(photo(16, 16), "JPEG")
    return jpeg[:2] + b"\xff\xe5" + (len(small) + 2).to_bytes(2, "big") + small + jpeg[2:]


FILES = {
    **{
        kind: save_to_bytes(photo(96, 64), kind)
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    },
    "JPEG with a thumbnail": with_thumbnail(save_to_bytes(photo(96, 64), "JPEG")),
    "CMYK JPEG": save_to_bytes(photo(96, 64).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.filterwarnings("ignore")  # PIL's, of metadata cut off
def test_a_truncated_file_is_refused(name, size):
    """Wherever it is cut: it is refused, or every pixel was there already."""
    data, box, refused = FILES[name], fixed((0, 0, 96, 64)), 0
    expected = decode_crop(data, box, size)
    cuts = {*range(1, len(data), max(1, len(data) // 60)), *range(len(data) - 20, len(data))}
    for cut in sorted(cuts):
        try:
            pixels = decode_crop(data[:cut], box, size)
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, expected)
    assert refused > 0.9 * len(cuts) - 20
    assert "JPEG" not in name or refused == len(cuts)


@pytest.mark.usefixtures("capfd")  # libjpeg prints what it finds
def test_no_crop_makes_a_damaged_image_good_or_bad():
    """Or one sample would stand for another in one pass over an episode, and not in the next."""
    data, outcomes = save_to_bytes(photo(290, 290), "JPEG", quality=90), set[bool]()
    for at in range(2000, len(data) - 2000, max(1, len(data) // 40)):
        damaged, of_crops = data[:at] + b"\xff\xfe" + data[at + 2 :], set[bool]()
        for side, size in ((290, 64), (60, 64), (200, 64), (290, 20)):  # all pixels, or a fraction
            with suppress(ValueError):
                decode_crop(damaged, fixed((0, 0, side, side)), size)
                of_crops.add(True)
                continue
            of_crops.add(False)
        assert len(of_crops) == 1
        outcomes |= of_crops
    assert any(outcomes)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_video_behind_a_photo_is_no_part_of_it(options):
    """Phones append one, whose bytes look like any marker; a photo that is cut stays refused."""
    photo_alone = with_thumbnail(save_to_bytes(photo(96, 64), "JPEG", **options))
    video = b"ftypmp42 \xff\xda \xff\xd9 \xff\xda\0"
    box = fixed((0, 0, 96, 64))
    for size in (16, 64):
        expected = decode_crop(photo_alone, box, size)
        found = decode_crop(photo_alone + video, box, size)
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(ValueError, match=r"^truncated$"):
            decode_crop(photo_alone[:-2], box, size)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_too_many_pixels_are_refused_from_the_header(form, monkeypatch):
    """Before anything is decoded, by our limit and, but for two formats, not by PIL's."""
    data = save_to_bytes(Image.new("RGB", (300, 200)), form)
    if form not in ("WEBP", "TIFF"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torchvision 0.29 announces the end of its decoders.
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
        monkeypatch.setattr(module, "MAX_IMAGE_PIXELS", 60_000)
        assert decode(data).shape == (200, 300, 3)
        decode_crop(data, fixed((0, 0, 100, 100)), 16)
    monkeypatch.setattr(module, "_read", None)
    monkeypatch.setattr(module, "MAX_IMAGE_PIXELS", 59_999)
    with pytest.raises(ValueError, match=r"300 x 200 pixels are more than .* \(59999\)"):
        decode(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_short_memory_is_not_the_images_fault(form, monkeypatch):
    """Or training would go on with other images."""

    def fail(*given: Any, **more: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7")

    monkeypatch.setattr(module, "decode_jpeg", fail)
    monkeypatch.setattr(module, "to_rgb", fail)
    data = save_to_bytes(photo(64, 64), form)
    with pytest.raises(MemoryError):
        decode(data)


FORMS = [
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB")),
]


def blobs(width: int, height: int, seed: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    """Blobs of colour; every image lies on another side, by its EXIF orientation."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8
    )
    exif = Image.Exif()
    exif[0x0112] = seed % 8 + 1
    image = Image.fromarray(noise).resize((width, height)).convert(mode)
    quick = {"compress_level": 1} if form == "PNG" else {}
    return save_to_bytes(image, form, exif=exif, **quick)


def everything(width: int, height: int) -> Box:
    return (0, 0, width, height)


@pytest.mark.parametrize(("form", "mode"), FORMS)
def test_crops_are_the_same_with_any_cache(form, mode):
    """Bit for bit, of images and results of many sizes, with the cache cold, warm and full."""
    draw = np.random.default_rng(0)
    cache = MemoryCache(max_bytes=10**8)
    reduced = served = 0
    for seed in range(16):
        width, height = (int(side) for side in np.exp(draw.uniform(2.5, 6.0, 2)))
        size = int(np.exp(draw.uniform(1.5, 4.0)))
        transform = light_transform(size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
        data = blobs(width, height, seed, form, mode)
        boxes = [partial(transform.box, draws=draw.random(13, np.float32)) for _ in range(2)]
        for box in [*boxes, everything, lambda w, h: (w // 3, h // 5, w // 3 + 1, h)]:
            expected = decode_crop(data, box, size)
            for tried in (cache, cache, MemoryCache(max_bytes=0)):
                found = tried.crop(data, box, size)
                np.testing.assert_array_equal(found, expected)
        reduced += min(width, height) >= 4 * size
        served += min(width, height) < 4 * size
    assert min(reduced, served) > 2


def test_what_is_kept_is_not_decoded_again(monkeypatch):
    """Except for another size. A reduced JPEG is not kept, since each crop may be reduced
    by another factor."""
    cache, small, large = MemoryCache(max_bytes=10**7), blobs(80, 64, 0), blobs(800, 800, 0)
    for data in (small, large):
        cache.crop(data, everything, 32)

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("protoclip.data.decode.decode_all", refuse)
    cache.crop(small, everything, 32)
    for data, size in ((large, 32), (small, 31)):
        with pytest.raises(AssertionError, match="decoded"):
            cache.crop(data, everything, size)


def test_the_cache_is_bounded():
    """It keeps what came first."""
    cache = MemoryCache(max_bytes=5 * 64 * 80 * 3)
    for seed in range(30):
        cache.crop(blobs(80, 64, seed), everything, 64)
        assert cache.used == min(seed + 1, 5) * 64 * 80 * 3
