"""The bundled emoji data: about 1,900 concepts, drawn in seven styles, with captions."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FOLDER = Path(str(files("protoclip.data") / "emoji"))
#: The icon sets, the values of `style`.
EMOJI_STYLES = (
    *("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji", "emojione", "fxemoji"),
)
#: The splits. They share no concept and no variant of one.
EMOJI_SPLITS = ("train", "validation", "test")


def emoji_path() -> Path:
    """The Parquet file of the emoji data; see `emoji_table` for its columns."""
    return FOLDER / "emoji.parquet"


def emoji_teacher_path() -> Path:
    """The Parquet file of the captions' teacher features.

    Columns: `sample_id`, as in `emoji_table`, and `features`, 64 half-precision numbers: the
    all-MiniLM-L6-v2 embedding of the caption, averaged over its tokens, scaled to unit norm, and
    reduced by a PCA fitted on the train split. The schema's metadata name the model, the pooling
    and the variance kept.
    """
    return FOLDER / "emoji_teacher.parquet"


@cache
def emoji_table(split: Literal["train", "validation", "test"] | None = None) -> pa.Table:
    """The emoji data or one split of it: 10,212 samples of 1,905 concepts.

    train has 7,077 samples of 1,334 concepts, validation 1,048 of 188, and test 2,087 of 383.

    Columns:

    * `sample_id`: `style/concept`, unique;
    * `image`: a 64 x 64 image on white, as the bytes of a WebP file;
    * `caption`: the label, then zero to three of the tags, separated by commas;
    * `label`: the emoji's CLDR short name, one for each concept;
    * `tags`: all the concept's keywords, a list;
    * `style`: the icon set that drew it, one of `EMOJI_STYLES`;
    * `concept`: the emoji's code points, such as `1f600`, without variation selectors;
    * `group`, `subgroup`: Unicode's 9 groups and 98 subgroups (no components, no skin tones);
    * `split`: one of `EMOJI_SPLITS`.

    Each set keeps its own licence (Apache 2.0, MIT or CC BY 4.0); see `emoji/LICENSES`.

    Raises:
        ValueError: There is no such split.
    """
    if split is None:
        return pq.read_table(emoji_path())
    if split not in EMOJI_SPLITS:
        raise ValueError(f"no split {split!r} in the emoji data; it has {', '.join(EMOJI_SPLITS)}")
    table = emoji_table()
    return table.filter(pc.equal(table["split"], split))
