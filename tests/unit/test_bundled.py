"""The bundled emoji data is what its docstrings say."""

import inspect
import io
import re
from collections import defaultdict
from itertools import groupby
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

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = emoji_table().to_pylist()
    return rows


@pytest.fixture(scope="module")
def pictures(samples: list[dict[str, Any]]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(sample["image"])) for sample in samples]


def splits_of(samples: list[dict[str, Any]], key: Any) -> dict[Any, set[str]]:
    found = defaultdict(set)
    for sample in samples:
        found[key(sample)].add(sample["split"])
    return found


def test_counts(samples: list[dict[str, Any]]) -> None:
    """The documented counts hold: 10,212 samples of 1,905 concepts in 9 groups, 98 subgroups."""
    counted = {
        split: (len(rows), len({row["concept"] for row in rows}))
        for split in EMOJI_SPLITS
        if (rows := [sample for sample in samples if sample["split"] == split])
    }
    assert counted == {"train": (7077, 1334), "validation": (1048, 188), "test": (2087, 383)}
    assert len(samples) == 10212
    assert len({sample["group"] for sample in samples}) == 9
    assert len({sample["subgroup"] for sample in samples}) == 98


@pytest.mark.parametrize("split", EMOJI_SPLITS)
def test_shares(samples: list[dict[str, Any]], split: Any) -> None:
    """About 70% of concepts and samples are for training, 10% for validation, 20% for test."""
    concepts = splits_of(samples, lambda sample: sample["concept"])
    share = sum(splits == {split} for splits in concepts.values()) / len(concepts)
    assert share == pytest.approx(SHARES[split], abs=0.01)
    assert emoji_table(split).num_rows / len(samples) == pytest.approx(SHARES[split], abs=0.01)


def test_every_group_and_style_is_in_every_split(samples: list[dict[str, Any]]) -> None:
    """No split lacks a group or a style."""
    for column in ("group", "style"):
        splits = splits_of(samples, lambda sample, column=column: sample[column])
        assert all(found == set(EMOJI_SPLITS) for found in splits.values())


def test_first_code_point_stays_in_one_split(samples: list[dict[str, Any]]) -> None:
    """Emoji with the same first code point (gender, hair, direction variants) share a split."""
    splits = splits_of(samples, lambda sample: sample["concept"].split("-")[0])
    assert all(len(found) == 1 for found in splits.values())


def test_gender_variants_stay_in_one_split(samples: list[dict[str, Any]]) -> None:
    """Emoji whose names differ by a word of gender alone (man cook, cook) share a split."""
    gender = re.compile(r"\b(men|man|women|woman|person|people|boy|girl|child)\b|\W")
    splits = splits_of(samples, lambda sample: gender.sub("", sample["label"]))
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize(
    "concepts",
    [
        ("1f468-200d-1f373", "1f469-200d-1f373", "1f9d1-200d-1f373"),
        ("1f385", "1f936", "1f9d1-200d-1f384"),
        ("1f934", "1f478", "1fac5"),
        ("1f474", "1f475", "1f9d3"),
        ("1f448", "1f449"),
    ],
    ids=["cooks", "Clauses", "royals", "old people", "pointing hands"],
)
def test_known_variants_stay_in_one_split(
    samples: list[dict[str, Any]], concepts: tuple[str, ...]
) -> None:
    """Variants under different first code points and names are kept together."""
    splits = splits_of(samples, lambda sample: sample["concept"])
    assert len(set.union(*(splits[concept] for concept in concepts))) == 1


def test_same_picture_stays_in_one_split(
    samples: list[dict[str, Any]], pictures: list[Image.Image]
) -> None:
    """No picture of one split is, pixel for pixel, a picture of another split."""
    splits = defaultdict(set)
    for sample, picture in zip(samples, pictures, strict=True):
        splits[picture.convert("RGB").tobytes()].add(sample["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_styles(samples: list[dict[str, Any]]) -> None:
    """The pictures come from exactly the seven icon sets."""
    assert len(EMOJI_STYLES) == 7
    assert {sample["style"] for sample in samples} == set(EMOJI_STYLES)


def test_no_component_and_no_skin_tone(samples: list[dict[str, Any]]) -> None:
    """Components and skin tones are left out, and code points carry no variation selector."""
    assert "component" not in {sample["group"] for sample in samples}
    points = {point for sample in samples for point in sample["concept"].split("-")}
    assert points.isdisjoint({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "fe0f"})


def test_sample_ids(samples: list[dict[str, Any]]) -> None:
    """A sample id is its style and concept, and unique."""
    ids = [sample["sample_id"] for sample in samples]
    assert ids == [f"{sample['style']}/{sample['concept']}" for sample in samples]
    assert len(set(ids)) == len(ids)


def test_one_label_per_concept(samples: list[dict[str, Any]]) -> None:
    """Concepts and labels correspond one to one."""
    pairs = {(sample["concept"], sample["label"]) for sample in samples}
    assert len(pairs) == len({concept for concept, _ in pairs}) == len({lb for _, lb in pairs})


def test_captions(samples: list[dict[str, Any]]) -> None:
    """A caption is the label and zero to three different tags of the concept."""
    lengths = set()
    for sample in samples:
        assert sample["caption"].startswith(sample["label"])
        tags = sample["caption"].removeprefix(sample["label"]).split(", ")[1:]
        assert len(set(tags)) == len(tags)
        assert set(tags) <= set(sample["tags"])
        lengths.add(len(tags))
    assert lengths == {0, 1, 2, 3}


def test_captions_vary_within_a_concept(samples: list[dict[str, Any]]) -> None:
    """Most concepts that several sets draw have several captions."""
    drawn = [list(rows) for _, rows in groupby(samples, key=lambda sample: sample["concept"])]
    captions = [{row["caption"] for row in rows} for rows in drawn if len(rows) > 1]
    assert sum(len(found) > 1 for found in captions) > 0.9 * len(captions)


def test_pictures(samples: list[dict[str, Any]], pictures: list[Image.Image]) -> None:
    """Every picture decodes to 64 x 64 RGB and shows something."""
    for sample, picture in zip(samples, pictures, strict=True):
        assert (picture.format, picture.mode, picture.size) == ("WEBP", "RGB", (64, 64))
        darkest = np.asarray(picture).min()
        assert darkest < 245, f"{sample['sample_id']} is blank"


def test_teacher_features(samples: list[dict[str, Any]]) -> None:
    """Every sample has 64 finite teacher features, no longer than the unit vector they reduce."""
    teacher = pq.read_table(emoji_teacher_path())
    assert teacher["sample_id"].to_pylist() == [sample["sample_id"] for sample in samples]
    features = np.asarray(teacher["features"].combine_chunks().flatten()).reshape(-1, 64)
    assert features.dtype == np.float16
    norms = np.linalg.norm(features.astype(np.float64), axis=1)
    assert np.isfinite(norms).all()
    assert norms.min() > 0.25
    assert norms.max() < 1.25
    train = np.array([sample["split"] == "train" for sample in samples])
    np.testing.assert_allclose(features[train].astype(np.float64).mean(axis=0), 0, atol=1e-4)
    assert {b"model", b"pooling", b"variance_kept"} <= set(teacher.schema.metadata)


def test_small_enough_to_ship() -> None:
    """The pictures and captions take about 8 MB."""
    assert 7e6 < emoji_path().stat().st_size < 9e6


def test_licences_name_every_set() -> None:
    """The licence file beside the data names each set and where the words come from."""
    text = (emoji_path().parent / "LICENSES").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in (*EMOJI_STYLES, "emojibase-data"))
    assert "Unicode CLDR" in text


def test_table_is_read_once() -> None:
    """Reading a split again gives the same table."""
    assert emoji_table("test") is emoji_table("test")


def test_unknown_split_is_one_line() -> None:
    """A split that does not exist is named in a one-line error."""
    # As callers have it: the suite's own type checks would refuse the split first.
    table = inspect.unwrap(emoji_table)
    with pytest.raises(ValueError, match=r"^no split 'dev' in the emoji data; .*$"):
        table("dev")
