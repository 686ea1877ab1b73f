"""The phase of `protoclip align` before training: two frozen encoders encode each pair once.

An image half and a text half that have never met encode each image and each caption. Then their
projections into a joint space train on these features, as `train` trains towers on images, with
other defaults (`presets.py`). The halves group the pairs too, each as an external teacher (PBT).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from protoclip.config import Config, EpisodeConfig
from protoclip.data.captions import CaptionDraw, caption_draw
from protoclip.data.decode import decode
from protoclip.data.loader import read_image
from protoclip.data.pairs import BadSample, Pairs, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.data.view import drop_rows
from protoclip.distributed import collectives
from protoclip.distributed.collectives import raise_on_all_ranks
from protoclip.encode.canonical import canonical_projections, second_moments
from protoclip.encode.halves import (
    encode_halves,
    features_folder,
    images_at_once,
    open_image_half,
)
from protoclip.encode.rows import HalfRows
from protoclip.encode.stream import encode_stream
from protoclip.models import loading
from protoclip.models.precision import autocast, resolve
from protoclip.models.projections import FrozenEncoders, Projection, start_projections
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.start import Start
from protoclip.models.tokenizers import Tokenizer
from protoclip.training.presets import Choices


@dataclass(frozen=True, kw_only=True)
class EncodedPairs:
    """The pairs of a run that its halves could encode, and their `rows`, which make its batches.

    Attributes:
        config: The settings, whose episodes shrink to these pairs where they were chosen.
        captions: Those of a visit to an image.
        notes: What the user should know of these pairs.
    """

    samples: Pairs
    rows: HalfRows
    config: Config
    captions: CaptionDraw
    notes: list[str]


def encode(
    config: Config, samples: Pairs, model: ProtoCLIP, tokenizer: Tokenizer, choices: Choices
) -> EncodedPairs:
    """Encode all pairs of a run by the halves of its model. Collective.

    The projections of the model get their start from the features, in closed form.

    Raises:
        ValueError: The store cannot be used, more pairs are bad than `data.max_bad_share` says, or
            a visit cannot bring the captions that `data.captions` names.
    """
    halves = frozen(model)
    rows = encode_halves(
        halves,
        samples,
        tokenizer=tokenizer,
        transform=loading.evaluation_transform(model),
        root=features_folder(config),
        threads=threads_of(config),
        **arithmetic(config, next(halves.parameters()).device),
    )
    shown, notes = rows.listing.shown, list[str]()
    bad = np.flatnonzero(np.isin(shown, rows.good.left_out))
    repeated = np.flatnonzero(rows.listing.rows[shown] != np.arange(len(samples)))
    if len(also := np.setdiff1d(repeated, bad)):
        notes.append(
            f"{len(also):,} of {len(samples):,} pairs have the image of another one, "
            "which has their captions too"
        )
    if len(bad):
        example = why_bad(samples, int(bad[0]), config.data.max_image_pixels)
        said = f"{len(bad):,} of {len(samples):,} pairs cannot be used, such as {example}"
        if len(bad) > config.data.max_bad_share * len(samples):
            raise ValueError(
                f"{said}; that is more than data.max_bad_share ({config.data.max_bad_share:g}) "
                "allows; mend the data or raise it"
            )
        notes.append(f"{said}; they are left out")
    left_out = np.union1d(bad, repeated)
    if len(left_out) == len(samples):
        raise ValueError(f"{samples.name}: no pair can be used; {notes[-1]}")
    left = len(samples) - len(left_out)
    some = np.array(evenly_spaced(left, min(left, 1000), seed=0))
    compared = {"images": rows.image_rows(some), "captions": rows.mean_text_rows(some)}
    equal = [what for what, features in compared.items() if bool((features == features[0]).all())]
    if len(equal) == 2:
        raise ValueError(f"{samples.name}: fewer than two pairs differ; name other pairs, or more")
    notes += [f"all {what} are equal, so no pair can be told from another" for what in equal]
    if config.run.overfit is None:  # there all pairs may be known before the first step
        moments = second_moments(rows, next(halves.parameters()).device)
        start_projections(model, *canonical_projections(moments))
        towers: Any = model.towers
        for tower in (towers.visual, towers.text):
            for parameter in Projection(tower).parameters():  # hosts may compute other last digits
                collectives.broadcast(parameter.data)
    kept: Pairs = drop_rows(samples, left_out) if len(left_out) else samples
    episodes = config.episodes
    if config.run.overfit is not None:  # each pair that is left, in one batch
        episodes = replace(episodes, size=left, batch_size=left)
    elif len(left_out):
        episodes, said_too = fit_episodes(choices, episodes, left)
        notes += said_too
    config = replace(config, episodes=episodes)
    captions, said_too = raise_on_all_ranks(lambda: caption_draw(config, rows))
    return EncodedPairs(
        samples=kept, rows=rows, config=config, captions=captions, notes=notes + said_too
    )


def fit_episodes(
    choices: Choices, episodes: EpisodeConfig, pairs: int
) -> tuple[EpisodeConfig, list[str]]:
    """Episodes of the pairs that are left: what was chosen adapts. And notes on it."""
    notes, batch = list[str](), episodes.batch_size
    if pairs < episodes.size and not choices.is_given("episodes.size"):
        size = max(batch, pairs // batch * batch)
        if size != episodes.size:
            notes.append(f"episodes.size = {size}, so that an episode fits into what is left")
        episodes = replace(episodes, size=size)
    is_chosen = not choices.is_given("episodes.replacement")
    if pairs < episodes.size and is_chosen and not episodes.replacement:
        notes.append("episodes.replacement = true, since an episode is larger than what is left")
        episodes = replace(episodes, replacement=True)
    return episodes, notes


def encode_stream_pairs(config: Config, start: Start, stream: SampleStream) -> Pairs:
    """Encode the images of a stream as they pass, each once, and keep the captions. Collective.

    Raises:
        ValueError: As `encode`.
    """
    device = collectives.device(config.run.device)
    model = loading.to_device(loading.model(start, seed=config.run.seed), device)
    halves, root = frozen(model), features_folder(config)
    transform = loading.evaluation_transform(model)
    return encode_stream(
        stream,
        open_image_half(halves, transform, root, **arithmetic(config, device)),
        root,
        batch_size=images_at_once(halves),
        max_bad_share=config.data.max_bad_share,
        threads=threads_of(config),
    )


def frozen(model: ProtoCLIP) -> FrozenEncoders:
    return FrozenEncoders(model.towers).eval().requires_grad_(False)


def arithmetic(config: Config, device: torch.device) -> dict[str, Any]:
    """What decides about features besides the halves and the transforms."""
    return {
        "max_pixels": config.data.max_image_pixels,
        "autocast": autocast(resolve(config.run.precision, device), device),
    }


def threads_of(config: Config) -> int | None:
    workers = config.data.workers
    return None if workers == "auto" else max(1, workers)


def why_bad(samples: Pairs, row: int, max_pixels: int) -> str:
    """What is wrong with a pair, in words."""
    try:
        read_image(samples, row, partial(decode, max_pixels=max_pixels))
    except BadSample as error:
        return str(error)
    return f"sample '{samples.sample_id(row)}', which can be read by now"
