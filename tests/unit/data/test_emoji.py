"""The bundled emoji data is what its docstrings say."""

import re
import unicodedata
from collections import defaultdict
from typing import Any

import pytest

from protoclip.data.captions import legible
from protoclip.data.emoji import EMOJI_SPLITS, emoji_captions, emoji_path, emoji_table

STYLES = {"noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji", "emojione", "fxemoji"}


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = emoji_table().to_pylist()
    return rows


def splits_of(samples: list[dict[str, Any]], key: Any) -> dict[Any, set[str]]:
    found = defaultdict(set)
    for sample in samples:
        found[key(sample)].add(sample["split"])
    return found


def test_counts(samples):
    """As documented."""
    counted = {}
    for split in EMOJI_SPLITS:
        rows = [sample for sample in samples if sample["split"] == split]
        counted[split] = (len(rows), len({row["concept"] for row in rows}))
        assert emoji_table(split).num_rows == len(rows)
        assert {row["style"] for row in rows} == STYLES
        assert len({row["group"] for row in rows}) == 9
    assert counted == {"train": (7077, 1334), "validation": (1048, 188), "test": (2087, 383)}
    with pytest.raises(ValueError, match=r"^no split 'dev' in the emoji data; .*$"):
        emoji_table.__wrapped__.__wrapped__("dev")


def test_variants_of_an_emoji_stay_in_one_split(samples):
    """Those of one first code point, and those whose names differ by a word of gender alone."""
    gender = re.compile(r"\b(men|man|women|woman|person|people|boy|girl|child)\b|\W")
    for key in (lambda row: row["concept"].split("-")[0], lambda e: gender.sub("", e["label"])):
        assert all(len(found) == 1 for found in splits_of(samples, key).values())
    splits = splits_of(samples, lambda sample: sample["concept"])
    for royals_and_hands in (("1f934", "1f478", "1fac5"), ("1f448", "1f449")):
        assert len(set.union(*(splits[concept] for concept in royals_and_hands))) == 1


# The script of each language, as the names of its letters in Unicode have it.
SCRIPTS = {
    **{"ar": "ARABIC", "cs": "LATIN", "de": "LATIN", "es": "LATIN", "fr": "LATIN"},
    **{"he": "HEBREW", "hi": "DEVANAGARI", "ja": "CJK", "th": "THAI", "zh": "CJK"},
}


@pytest.mark.parametrize(("language", "script"), SCRIPTS.items())
def test_captions_in_ten_languages(samples, language, script):
    """Nearly every concept has one, in the signs of the language, which are read as they are."""
    table = emoji_captions()
    assert table.column_names == ["concept", *(f"caption_{language}" for language in SCRIPTS)]
    assert table["concept"].to_pylist() == [*dict.fromkeys(row["concept"] for row in samples)]
    captions = [text for text in table[f"caption_{language}"].to_pylist() if text]
    assert len(captions) > 0.99 * len(table)
    assert [*map(legible, captions)] == captions
    signs = "".join(captions)
    letters = [sign for sign in signs if sign.isalpha()]
    written = [script in unicodedata.name(sign, "") for sign in letters]
    assert sum(written) > (0.3 if language == "ja" else 0.9) * len(letters)


def test_licences_name_every_set():
    """The licence file beside the data names each set and where the words come from."""
    text = (emoji_path().parent / "LICENSES").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in (*STYLES, "emojibase-data"))
    assert "Unicode CLDR" in text
    assert "`emoji_captions.parquet`" in text
