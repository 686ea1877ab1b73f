"""Keys of a pair, equal for pairs that show the same: its caption, its image and its class.

`losses/positives.py` says what is made of pairs that share one.
"""

import hashlib
import unicodedata
from typing import Literal, cast

import pyarrow as pa
import pyarrow.compute as pc

from protoclip.data.pairs import Pairs, Sample, SampleStream

Key = Literal["caption", "image", "class"]
# By which keys pairs are positives, for each value of `loss.positives`.
KEYS: dict[str, tuple[Key, ...]] = {
    "pair": (),
    "masked": ("caption", "image"),
    "shared": ("caption", "image"),
    "class": ("caption", "image", "class"),
}


def number_of(content: bytes | str) -> int:
    """64 bits of BLAKE2b, as a signed integer."""
    data = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def normalised(caption: str) -> str:
    """A caption without what makes no other text of it: case, spacing, and its Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def normalise_texts(captions: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """The same of many captions, as bytes; of plain ASCII ten times as fast."""
    texts = pc.ascii_lower(captions.view(pa.large_string())).view(pa.large_binary())
    needs_more = pc.match_substring_regex(captions, "[^ -~]|  |^ | $").fill_null(False)
    others = [
        normalised(t.decode("utf-8", "replace")).encode()
        for t in captions.filter(needs_more).to_pylist()
    ]
    return pc.replace_with_mask(texts, needs_more, pa.array(others, pa.large_binary()))


def class_number(pairs: Pairs, row: int) -> int:
    """The key of a row's class. A row without one is alone, but for further visits to it."""
    name = pairs.class_of(row)  # type: ignore[attr-defined]
    return number_of(f"class {name}" if name else f"sample {pairs.sample_id(row)}")


def keys_of(
    by: tuple[Key, ...],
    pairs: Pairs | SampleStream,
    row: int | None,
    sample: Sample,
    captions: list[str],
) -> list[list[int]]:
    """The keys of a sample with each of its captions on this visit. An image is known by its bytes,
    which costs a microsecond a kilobyte; `row` is that of pairs with classes."""
    columns: list[list[int]] = []
    for key in by:
        if key == "caption":
            columns.append([number_of(normalised(caption)) for caption in captions])
        elif key == "image":
            columns.append([number_of(sample.image)] * len(captions))
        else:
            assert row is not None, "sources.pairs refuses classes of streams"
            columns.append([class_number(cast("Pairs", pairs), row)] * len(captions))
    return [list(keys) for keys in zip(*columns, strict=True)]
