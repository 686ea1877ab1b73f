"""Which captions of an image a visit brings, and keys that are equal for pairs that show the same.

`losses/tiles.py` says what is made of pairs that share a caption or an image.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Int

from protoclip.config import Config
from protoclip.data.pairs import Sample

BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")
USUAL = 0.99  # share of the images whose number of captions `all` is, if others have far more
# Beyond what any tower reads. CLIP's tokenizer takes hours for a word of some megabytes.
LONGEST_TEXT = 20_000
LONG_WORD = re.compile(r"(\w{500})\w+|([^\w\s]{500})[^\w\s]+")

Key = Literal["caption", "image"]
# By which keys pairs are positives, for each value of `loss.positives`.
KEYS: dict[str, tuple[Key, ...]] = {"pair": (), "shared": ("caption", "image")}


def legible(text: str) -> str:
    """A caption as tokenizers get it: 20,000 characters at most, and 500 of a word or of signs."""
    return LONG_WORD.sub(r"\1\2", text[:LONGEST_TEXT])


@dataclass(frozen=True, kw_only=True)
class CaptionDraw:
    """How many captions of an image a visit brings, or whether it brings a sentence of one."""

    number: int = 1
    sentences: bool = False

    def choose(self, captions: Sequence[str], draw: float) -> list[str]:
        """The captions of one visit, by a draw in [0, 1).

        They follow each other from a drawn one on, so each comes equally often; where there are too
        few, they come again in turn.

            >>> CaptionDraw(number=3).choose(["a cat", "a pet"], draw=0.7)
            ['a pet', 'a cat', 'a pet']
            >>> CaptionDraw(sentences=True).choose(["It rains. A dog runs!"], draw=0.7)
            ['A dog runs!']
        """
        position = draw * len(captions)
        first = int(position)
        if self.sentences:
            parts = BETWEEN_SENTENCES.split(captions[first])
            return [parts[int((position - first) * len(parts))]]
        return [captions[(first + more) % len(captions)] for more in range(self.number)]


ONE = CaptionDraw()


def caption_draw(config: Config, source: Any) -> tuple[CaptionDraw, list[str]]:
    """What `data.captions` names, and a note; raises `ValueError` for `all` captions of a stream.

    `all` is the largest number that an image of the source has. If that is more than twice what 99
    of 100 images have at most, it is the latter: few images would make all others repeat theirs.
    """
    asked, batch = config.data.captions, config.episodes.batch_size
    number, beyond = asked if isinstance(asked, int) else 1, ""
    if asked == "all" or number > 1:
        most = source.most_captions()
        if asked == "all" and most is None:
            raise ValueError(
                f"data.captions: all is not known of {source.name}, a stream; give how many "
                "captions an image has at most, such as 5"
            )
        if most == 1:
            return ONE, [f"data.captions = {asked}: one of each image, since none has several"]
        number = min(number, most) if most and asked != "all" else most or number
        if asked == "all" and number > 2 * (usual := source.most_captions(USUAL)):
            number, beyond = usual, f"; images with more, up to {most:,}, bring as many of theirs"
    note = (
        f"data.captions = {asked}: {number} of each image, which makes {batch * number:,} captions "
        f"in a batch of {batch:,} images{beyond}"
    )
    draw = CaptionDraw(number=number, sentences=asked == "sentences")
    return draw, [note] if number > 1 or beyond else []


def trim_padding(tokens: Int[torch.Tensor, "b c"]) -> Int[torch.Tensor, "b l"]:
    """Tokens without their last columns, but one, if every row repeats its last token there.

    Padding costs as much as words. For towers that ignore it (`TowerPair.ignores_padding`).

    >>> trim_padding(torch.tensor([[7, 5, 9, 0, 0, 0], [7, 9, 0, 0, 0, 0]])).tolist()
    [[7, 5, 9, 0], [7, 9, 0, 0]]
    """
    changes = (tokens[:, 1:] != tokens[:, :-1]).any(0).nonzero()
    return tokens[:, : int(changes.max()) + 2 if len(changes) else 1]


def hash_content(content: bytes | str) -> int:
    """64 bits of BLAKE2b, as a signed integer."""
    data = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def normalise(caption: str) -> str:
    """A caption without differences of case, spacing, and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def normalise_texts(captions: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """The same of many captions, as bytes; of plain ASCII ten times as fast."""
    texts = pc.ascii_lower(captions.view(pa.large_string())).view(pa.large_binary())
    needs_more = pc.match_substring_regex(captions, "[^ -~]|  |^ | $").fill_null(False)
    others = [
        normalise(t.decode("utf-8", "replace")).encode()
        for t in captions.filter(needs_more).to_pylist()
    ]
    return pc.replace_with_mask(texts, needs_more, pa.array(others, pa.large_binary()))


def hash_keys(by: tuple[Key, ...], sample: Sample, captions: list[str]) -> list[list[int]]:
    """The keys of a sample with each of its captions on this visit."""
    image = hash_content(sample.image) if "image" in by else 0  # a microsecond a kilobyte
    return [
        [hash_content(normalise(caption)) if key == "caption" else image for key in by]
        for caption in captions
    ]
