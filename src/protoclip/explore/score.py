"""`protoclip data score`: how well each image and caption agree, as a table.

Two frozen encoders encode the pairs, as for `align` and into its store. Heads in closed form, which
were fitted to pairs of other images, then lead both into one space.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.data.pairs import BadSample, Pairs, evenly_spaced
from protoclip.data.sources import require_usable
from protoclip.data.split import connect_rows
from protoclip.encode.linear_maps import FOLDS
from protoclip.encode.rows import PairRows
from protoclip.encode.store import hash_ids
from protoclip.explore import atlas
from protoclip.explore.pairs import explore_pairs
from protoclip.models import loading
from protoclip.models.joined import read_columns
from protoclip.terminal import say, without_secrets
from protoclip.training.plan import choose_layers, encode_all, resolve_settings
from protoclip.training.presets import choose_before_data

CAPTIONS = 10_000  # among which the one that fits an image best is looked for, drawn evenly


def score(
    samples: Pairs, given: Mapping[str, Any], device: torch.device
) -> tuple[pa.Table, dict[str, Any]]:
    """Score all pairs of an image and a caption.

    Args:
        given: The sections `data` and `model` of settings, as `align` takes them.

    Returns:
        A row a pair, those that agree least first, and what is known of all as JSON values.
        docs/tasks/clean.md has the columns.

    Raises:
        ValueError: An encoder cannot be opened, or fewer than 100 images can be used.
    """
    encoded, images, texts = encode_to_score(samples, given, device)
    listing, good = encoded.listing, encoded.good.at(np.arange(len(encoded)))
    if len(good) < atlas.LEAST_IMAGES:
        raise ValueError(
            f"{samples.name}: {len(good)} images can be scored; heads are fitted to the others, so "
            f"at least {atlas.LEAST_IMAGES} are needed"
        )
    say("computing: near-duplicates")
    every, first_rows = np.arange(len(good)), torch.from_numpy(listing.rows[good])
    shown = atlas.Features(captioned=first_rows, rows=first_rows, image=images, text=images)
    near, _, looked_at = atlas.find_duplicates(shown, explore_pairs(samples), every, seed=0)
    groups = connect_rows(every, near.numpy().T)
    say("computing: agreement of pairs")
    of_listed = np.full(len(listing.rows), -1)
    of_listed[good] = every
    image_of_row, rows, captions = of_listed[listing.shown], list[int](), list[str]()
    for row in np.argsort(image_of_row, kind="stable")[(image_of_row < 0).sum() :].tolist():
        with suppress(BadSample):
            captions += (several := samples.sample_captions(row))
            rows += [row] * len(several)
    pairs = image_of_row[rows], np.searchsorted(listing.texts, hash_ids(captions))
    used = np.unique(pairs[1])
    compared = torch.from_numpy(used[evenly_spaced(len(used), CAPTIONS, seed=0)])
    numbers = [torch.from_numpy(array) for array in (*pairs, groups)]
    _, loss, best = atlas.cross_fit_disagreement(images, texts, *numbers, compared=compared, seed=0)
    agreement = ((atlas.compute_chance(len(rows) // FOLDS) - loss) / math.log(2)).numpy()
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    source: Any = samples
    columns = {
        "sample_id": [*map(samples.sample_id, rows)],
        "caption": captions,
        # The data may name images by URLs with passwords.
        "image": [without_secrets(source.image_name(row) or "") for row in rows],
        "agreement": agreement,
        "best_caption": [*map(encoded.texts, best.tolist())],
        "duplicate_of": [
            samples.sample_id(int(first_rows[first[group]])) if sizes[group] > 1 else ""
            for group in groups[pairs[0]].tolist()
        ],
    }
    table = pa.table(columns).take(np.argsort(agreement, kind="stable"))
    table = table.add_column(0, "rank", [np.arange(1, len(rows) + 1)])
    return table, {
        **{"source": samples.name, "pairs": len(rows), "images": len(good)},
        "unusable_images": len(listing.rows) - len(good),
        "agreement": {f"{p}%": round(float(np.percentile(agreement, p)), 2) for p in (5, 50, 95)},
        "below_chance": int((agreement < 0).sum()),
        "near_duplicates": int(sizes[sizes > 1].sum()),
        "images_compared": looked_at,
    }


def encode_to_score(
    samples: Pairs, given: Mapping[str, Any], device: torch.device
) -> tuple[PairRows, Float[Tensor, "i q"], Float[Tensor, "t r"]]:
    """Pairs as `align` encodes them; the features of images that can be used, and of all texts."""
    choices = choose_before_data("align", given)
    outline = resolve_settings(choices.config, choices)
    require_usable(outline.config.data, samples)
    model = loading.to_device(loading.build_model(outline.start, seed=0), device)
    encoded, towers = encode_all(outline, samples, model), model.towers
    for note in choose_layers(outline.config.model, towers, encoded)[1]:
        say(f"note: {note}")
    images = encoded.image_rows(np.arange(len(encoded)))
    texts = torch.from_numpy(encoded.text[np.arange(len(encoded.listing.texts))])
    images = images[:, read_columns(towers.visual, images.shape[1])]
    return encoded, images, texts[:, read_columns(towers.text, texts.shape[1])]


def keep_samples(table: pa.Table, share: float) -> pa.Table:
    """The rows of this share of the samples: those whose caption that agrees least agrees best."""
    worst_first = [*dict.fromkeys(table["sample_id"].to_pylist())]
    dropped = {*worst_first[: len(worst_first) - math.ceil(share * len(worst_first))]}
    return table.filter(pa.array([name not in dropped for name in table["sample_id"].to_pylist()]))
