"""The bundled emoji data: about 1,900 concepts, drawn in seven styles, with captions."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["EMOJI_SPLITS", "EMOJI_STYLES", "emoji_path", "emoji_table", "emoji_teacher_path"]

#: The icon sets that the pictures come from; a sample's `style` is one of them.
EMOJI_STYLES = (
    "noto",
    "noto-v1",
    "twemoji",
    "fluent-emoji-flat",
    "fluent-emoji",
    "emojione",
    "fxemoji",
)

#: The splits; they share no concept, and no variant of one.
EMOJI_SPLITS = ("train", "validation", "test")


def emoji_path() -> Path:
    """The Parquet file of the emoji data (see `emoji_table` for its columns)."""
    return Path(str(files("protoclip.data") / "emoji" / "emoji.parquet"))


def emoji_teacher_path() -> Path:
    """The Parquet file of the captions' teacher features.

    Columns: `sample_id`, as in `emoji_table`, and `features`, 64 half-precision numbers: the
    caption as all-MiniLM-L6-v2 reads it, averaged over its tokens, scaled to unit norm and
    reduced by a PCA fitted on the train split. The schema's metadata names the model, the
    pooling and the variance kept.
    """
    return Path(str(files("protoclip.data") / "emoji" / "emoji_teacher.parquet"))


def emoji_table(split: Literal["train", "validation", "test"] | None = None) -> pa.Table:
    """The emoji data, or one split of it: 10,212 samples of 1,905 concepts.

    train has 7,077 samples of 1,334 concepts, validation 1,048 of 188, and test 2,087 of 383.

    Columns:

    * `sample_id`: `style/concept`, unique;
    * `image`: a 64 x 64 picture on white, as the bytes of a WebP file;
    * `caption`: the label, then zero to three of the tags, separated by commas;
    * `label`: the emoji's CLDR short name, one per concept;
    * `tags`: all the concept's keywords, a list;
    * `style`: the icon set that the picture comes from, one of `EMOJI_STYLES`;
    * `concept`: the emoji's code points, such as `1f600`, without variation selectors;
    * `group`, `subgroup`: Unicode's 9 groups and 98 subgroups (no components, no skin tones);
    * `split`: one of `EMOJI_SPLITS`.

    Each set keeps its own licence (Apache 2.0, MIT or CC BY 4.0); `emoji/LICENSES`, beside
    the data, names them with their authors.

    Args:
        split: The split to keep; None keeps all three.

    Raises:
        ValueError: If there is no such split.
    """
    if split is not None and split not in EMOJI_SPLITS:
        raise ValueError(f"no split {split!r} in the emoji data; it has {', '.join(EMOJI_SPLITS)}")
    return _read(split)


@cache
def _read(split: str | None) -> pa.Table:
    if split is None:
        return pq.read_table(emoji_path())
    table = _read(None)
    return table.filter(pc.equal(table["split"], split))
