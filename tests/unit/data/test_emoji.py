"""The bundled emoji data is what its docstrings say."""

import io
import re
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protoclip.data.emoji import (
    EMOJI_SPLITS,
    EMOJI_STYLES,
    emoji_path,
    emoji_table,
    emoji_teacher_path,
)


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
        assert {row["style"] for row in rows} == set(EMOJI_STYLES)
        assert len({row["group"] for row in rows}) == 9
    assert counted == {"train": (7077, 1334), "validation": (1048, 188), "test": (2087, 383)}
    with pytest.raises(ValueError, match=r"^no split 'dev' in the emoji data; .*$"):
        emoji_table.__wrapped__.__wrapped__("dev")


def test_variants_of_an_emoji_stay_in_one_split(samples):
    """Those of one first code point, and those whose names differ by a word of gender alone."""
    gender = re.compile(r"\b(men|man|women|woman|person|people|boy|girl|child)\b|\W")
    for key in (lambda each: each["concept"].split("-")[0], lambda e: gender.sub("", e["label"])):
        assert all(len(found) == 1 for found in splits_of(samples, key).values())
    splits = splits_of(samples, lambda sample: sample["concept"])
    for royals_and_hands in (("1f934", "1f478", "1fac5"), ("1f448", "1f449")):
        assert len(set.union(*(splits[concept] for concept in royals_and_hands))) == 1


def test_images(samples):
    """Each is 64 x 64 RGB and shows something, and no two splits have the same image: one encoder
    wrote all, so equal pixels are equal bytes."""
    for number, sample in enumerate(samples):
        image = Image.open(io.BytesIO(sample["image"]))
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64))
        if number % 10 == 0:
            assert np.asarray(image).min() < 245, f"{sample['sample_id']} is blank"
    assert all(len(s) == 1 for s in splits_of(samples, lambda each: each["image"]).values())
    assert 7e6 < emoji_path().stat().st_size < 9e6


def test_ids_labels_and_captions(samples):
    """An id is its style and concept, and unique; concepts and labels correspond one to one."""
    ids = [sample["sample_id"] for sample in samples]
    assert ids == [f"{sample['style']}/{sample['concept']}" for sample in samples]
    assert len(set(ids)) == len(ids)
    pairs = {(sample["concept"], sample["label"]) for sample in samples}
    assert len(pairs) == len({concept for concept, _ in pairs}) == len({lb for _, lb in pairs})
    for sample in samples:
        tags = sample["caption"].removeprefix(sample["label"]).split(", ")[1:]
        assert len(set(tags)) == len(tags) <= 3
        assert set(tags) <= set(sample["tags"])


def test_teacher_features(samples):
    """Every sample has 64 finite teacher features, no longer than the unit vector they reduce."""
    teacher = pq.read_table(emoji_teacher_path())
    assert teacher["sample_id"].to_pylist() == [sample["sample_id"] for sample in samples]
    features = np.asarray(teacher["features"].combine_chunks().flatten()).reshape(-1, 64)
    assert features.dtype == np.float16
    norms = np.linalg.norm(features.astype(np.float64), axis=1)
    assert np.isfinite(norms).all()
    assert 0.25 < norms.min() < norms.max() < 1.25
    assert {b"model", b"pooling", b"variance_kept"} <= set(teacher.schema.metadata)


def test_licences_name_every_set():
    """The licence file beside the data names each set and where the words come from."""
    text = (emoji_path().parent / "LICENSES").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in (*EMOJI_STYLES, "emojibase-data"))
    assert "Unicode CLDR" in text
