"""A sheet of random pairs: pictures with their captions below.

Captions may be in any script. PIL's own font has Latin letters only, so each run of characters is
set in the first font of the system that has them.
"""

import math
from collections.abc import Iterator
from functools import cache
from itertools import groupby, islice

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from protoclip.data.decode import decode
from protoclip.data.pairs import (
    MAX_IMAGE_PIXELS,
    BadSample,
    Pairs,
    Sample,
    SampleStream,
)

SIDE, GAP, MARGIN = 192, 20, 28
FONT_SIZE, LINE, LINES = 14, 19, 3
TITLE_SIZE, TITLE_ROOM = 20, 44
PAPER, FRAME, INK = "white", "#f1f1f3", "#1c1c1f"
# A smaller picture is not enlarged further than this.
ENLARGED = 3
# Samples that are tried for each that is wanted.
TRIES = 10
# Characters of a caption that could fit at all.
MOST_CHARACTERS = 400

# Fonts that PIL finds by name where a system has them: the first is for most captions, the others
# for scripts that those before have not.
FONTS = (
    *("NotoSans-Regular.ttf", "NotoSans[wght].ttf", "DejaVuSans.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJK-VF.ttf.ttc", "NotoSansCJKsc-Regular.otf"),
    *("wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc"),
    *("msyh.ttc", "malgun.ttf", "AppleSDGothicNeo.ttc", "YuGothM.ttc", "Arial Unicode.ttf"),
    *("NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansThai-Regular.ttf"),
    *("NotoSansDevanagari-Regular.ttf", "NotoSansBengali-Regular.ttf", "NotoSansTamil-Regular.ttf"),
    *("Nirmala.ttf", "leelawui.ttf", "seguisym.ttf", "Apple Symbols.ttf", "NotoEmoji-Regular.ttf"),
    *("NotoSansSymbols2-Regular.ttf", "Symbola.ttf", "FreeSans.ttf", "unifont.otf", "unifont.ttf"),
)
# No font has this character, so it shows what a font draws for one it has not.
ABSENT = "\U0010fffe"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def montage(
    source: Pairs | SampleStream,
    *,
    columns: int = 6,
    rows: int = 4,
    seed: int = 0,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Draw random pairs of a source, in a grid; samples that cannot be read are passed over.

    Args:
        source: Where the samples are. Of a stream the first ones are shown.
        columns, rows: Of the grid, which has fewer cells used where there are fewer pairs.
        seed: Determines which pairs.
        max_pixels: Larger pictures count as unreadable.

    Raises:
        ValueError: Not one sample can be read.
    """
    wanted = columns * rows
    pairs = list(islice(readable(source, wanted, seed, max_pixels), wanted))
    if not pairs:
        raise ValueError(f"{source.name}: none of its samples that were tried can be read")
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    cell = SIDE + 8 + LINES * LINE
    width = 2 * MARGIN + columns * (SIDE + GAP) - GAP
    height = 2 * MARGIN + TITLE_ROOM + rows * (cell + GAP) - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    count = f" - {len(pairs)} of {len(source):,} pairs" if isinstance(source, Pairs) else ""
    title = wrapped(f"{source.name}{count}", width - 2 * MARGIN, TITLE_SIZE, lines=1)
    write(draw, (MARGIN, MARGIN), title[0], TITLE_SIZE, INK)
    for number, (sample, picture) in enumerate(pairs):
        row, column = divmod(number, columns)
        left = MARGIN + column * (SIDE + GAP)
        top = MARGIN + TITLE_ROOM + row * (cell + GAP)
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=FRAME)
        small = fitted(picture)
        sheet.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
        more = f" (+{len(sample.captions) - 1})" if len(sample.captions) > 1 else ""
        lines = wrapped(sample.captions[0], SIDE, FONT_SIZE, lines=LINES, suffix=more)
        for place, text in enumerate(lines):
            write(draw, (left, top + SIDE + 8 + place * LINE), text, FONT_SIZE, INK)
    return sheet


def readable(
    source: Pairs | SampleStream, wanted: int, seed: int, max_pixels: int
) -> Iterator[tuple[Sample, Image.Image]]:
    """Random samples that can be read, each with its picture."""
    for sample in islice(chosen(source, TRIES * wanted, seed), TRIES * wanted):
        if isinstance(sample, Sample):
            try:
                pixels = decode(sample.image, max_pixels=max_pixels, at_least=SIDE)
            except ValueError:
                continue
            yield sample, Image.fromarray(pixels)


def chosen(source: Pairs | SampleStream, number: int, seed: int) -> Iterator[Sample | BadSample]:
    if not isinstance(source, Pairs):
        yield from source.samples()
        return
    number = min(number, len(source))
    for row in np.random.default_rng(seed).choice(len(source), number, replace=False).tolist():
        try:
            yield source.sample(row)
        except BadSample as error:
            yield error


def fitted(picture: Image.Image) -> Image.Image:
    """The whole picture, as large as a cell allows."""
    factor = min(SIDE / picture.width, SIDE / picture.height, ENLARGED)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


@cache
def fonts(size: int) -> tuple[Font, ...]:
    """The fonts of this system, and PIL's own."""
    found: list[Font] = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not there, or not in this size
            continue
    return (*found, ImageFont.load_default(size))


@cache
def font_of(character: str, size: int) -> Font:
    """The first font that has a character; the first of all if none has."""
    return next((font for font in fonts(size) if has(font, character)), fonts(size)[0])


def has(font: Font, character: str) -> bool:
    if character.isspace():
        return True
    shape, absent = font.getmask(character), font.getmask(ABSENT)
    return shape.size != absent.size or bytes(shape) != bytes(absent)


def runs(text: str, size: int) -> list[tuple[str, Font]]:
    """A text in pieces of one font each, so that letters that join stay together."""
    found = [(font_of(character, size), character) for character in text]
    for place in range(1, len(found)):
        if found[place][1].isspace():  # blanks go with what is before them
            found[place] = (found[place - 1][0], found[place][1])
    pieces = groupby(found, key=lambda each: each[0])
    return [("".join(character for _, character in piece), font) for font, piece in pieces]


def width_of(text: str, size: int) -> float:
    return sum((font.getlength(piece) for piece, font in runs(text, size)), start=0.0)


def write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str
) -> None:
    """Write one line; fonts of different heights share a base line."""
    left = float(place[0])
    for piece, font in runs(text, size):
        anchor = "ls" if isinstance(font, ImageFont.FreeTypeFont) else None
        draw.text((left, place[1] + size), piece, fill=colour, font=font, anchor=anchor)
        left += font.getlength(piece)


def wrapped(text: str, width: int, size: int, *, lines: int, suffix: str = "") -> list[str]:
    """A text in at most so many lines, between words where it can be; what is left out shows as
    dots.

    Args:
        text: Blanks of any kind and number stand for one.
        width: Pixels of a line.
        size: Of the font.
        lines: How many there may be.
        suffix: Ends the text even where it is cut.
    """
    left = " ".join(text.split())[:MOST_CHARACTERS]
    found: list[str] = []
    while left and len(found) < lines - 1 and width_of(left + suffix, size) > width:
        fits = fitting(left, width, size)
        space = left.rfind(" ", 0, fits + 1)
        cut = space if space > 0 and fits < len(left) else fits
        found.append(left[:cut].rstrip())
        left = left[cut:].lstrip()
    if width_of(left + suffix, size) > width:
        suffix = f"...{suffix}"
        left = left[: fitting(left, width - math.ceil(width_of(suffix, size)), size)].rstrip()
    return [*found, left + suffix]


def fitting(text: str, width: int, size: int) -> int:
    """How many characters fit into a width, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if width_of(text[:middle], size) <= width:
            low = middle
        else:
            high = middle - 1
    return low
