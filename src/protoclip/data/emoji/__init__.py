"""The bundled emoji data: about 1,900 concepts, drawn in seven styles, with captions.

`scripts/build_emoji.py` makes the files, and `scripts/build_emoji_captions.py` the captions in
other languages. `evaluation/datasets.py` turns them into a data set to evaluate models on.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FOLDER = Path(str(files("protoclip.data") / "emoji"))
#: The splits. They share no concept and no variant of one.
EMOJI_SPLITS = ("train", "validation", "test")


def emoji_path() -> Path:
    """The Parquet file of the emoji data; see `emoji_table` for its columns."""
    return FOLDER / "emoji.parquet"


def emoji_teacher_path() -> Path:
    """The Parquet file of the captions' teacher features.

    Columns: `sample_id`, as in `emoji_table`, and `features`, 64 half-precision numbers: the
    all-MiniLM-L6-v2 embedding of the caption, scaled to unit norm and reduced by a PCA fitted on
    the train split.
    """
    return FOLDER / "emoji_teacher.parquet"


@cache
def emoji_table(split: Literal["train", "validation", "test"] | None = None) -> pa.Table:
    """The emoji data: 7,077 samples in train, 1,048 in validation, 2,087 in test.

    Columns: `sample_id` (`style/concept`); `image`, 64 x 64 on white as the bytes of a WebP file;
    `caption`, the label and up to three tags; `label`, the CLDR short name; `tags`, all keywords;
    `style`, the icon set, such as `noto`; `concept`, the code points, such as `1f600`; Unicode's
    `group` and `subgroup`; `split`. Each icon set keeps its own licence, see `emoji/LICENSES`.
    """
    if split is None:
        return pq.read_table(emoji_path())
    if split not in EMOJI_SPLITS:
        raise ValueError(f"no split {split!r} in the emoji data; it has {', '.join(EMOJI_SPLITS)}")
    table = emoji_table()
    return table.filter(pc.equal(table["split"], split))


@cache
def emoji_captions() -> pa.Table:
    """Captions in ten languages: a row for each `concept` of `emoji_table`.

    Columns: `concept`; and for Arabic, Czech, German, Spanish, French, Hebrew, Hindi, Japanese,
    Thai and Chinese `caption_ar` to `caption_zh`, the CLDR name and keywords with commas between
    them, or null for the few concepts that CLDR names in no language.
    """
    return pq.read_table(FOLDER / "emoji_captions.parquet")
