"""Learning a few pairs by heart, to see whether data, model and settings can learn at all.

Why a usual run does not learn is said by `symptoms.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.config import Config
from protoclip.data.loader import Batch
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.data.view import without
from protoclip.distributed.collectives import rank, world_size
from protoclip.files import checksum
from protoclip.models.protoclip import Embeddings
from protoclip.terminal import say

STEPS = 500  # after which the pairs are given up


def settings(config: Config) -> dict[str, dict[str, Any]]:
    """What `run.overfit` decides: one batch of all pairs a step, by the instance loss alone, and
    nothing that keeps a model from learning by heart. The rate and the model stay."""
    number, given = config.run.overfit, config.data.validation
    if given is not None and given != 0 and rank() == 0:
        say("note: data.validation: no effect, since run.overfit holds no pairs out")
    return {
        "run": {
            **{"log_every": 1, "evaluate": False, "evaluate_every": 0, "guard": []},
            **{"keep_best": None, "stop_by": None},
        },
        "data": {"validation": None if config.data.is_emoji else 0.0},
        "episodes": {
            **{"size": number, "batch_size": number, "count": STEPS, "replacement": False},
            **{"warm_up": 0, "locked_image": 0},
        },
        "loss": {"info_nce": 1.0, "prototypical": 0.0, "teacher": 0.0, "keep": 0.0},
        "optim": {"warm_up_steps": 10},
    }


def few_pairs_alone(config: Config) -> Config:
    """The settings of a run, which may be to learn few pairs by heart."""
    if config.run.overfit is not None:
        for section, values in settings(config).items():
            config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def given_for_few(given: Mapping[str, Any], *, aligns: bool = False) -> Mapping[str, Any]:
    """As `few_pairs_alone`, for the settings that are given, of a run that may be to align."""
    config = Config.from_dict(given)
    if config.run.overfit is None:
        return given
    decided = settings(config)
    if aligns:
        decided["align"] = {"dropout": 0.0, "geometry": 0.0}
    return {**given, **{name: {**given.get(name, {}), **of} for name, of in decided.items()}}


def few_of(samples: Pairs | SampleStream, config: Config) -> Pairs:
    """The pairs to learn by heart, drawn evenly.

    Raises:
        ValueError: They cannot be drawn, or are to be shared by several ranks.
    """
    number = config.run.overfit
    assert number is not None
    if not isinstance(samples, Pairs):
        raise ValueError(
            "run.overfit: a stream cannot be read again; name local shards, and leave data.read out"
        )
    if number > len(samples):
        raise ValueError(f"run.overfit: {number} of {len(samples)} pairs; choose fewer")
    if world_size() > 1:
        raise ValueError("run.overfit: is for one process; start it without torchrun")
    chosen = evenly_spaced(len(samples), number, config.run.seed)
    few: Pairs = without(samples, np.setdiff1d(np.arange(len(samples)), chosen))
    return few


def names_of_images(batch: Batch, known: dict[str, str]) -> list[str]:
    """What tells the images of a batch's pairs apart, by content: each is transformed alike.

    `known` has the names by sample id, and gets those that are new.
    """
    each = len(batch.sample_id) // len(batch.image)
    for image, sample_id in zip(batch.image, batch.sample_id[::each], strict=True):
        if sample_id not in known:
            known[sample_id] = checksum(image.contiguous().cpu().numpy().tobytes())
    return [known[sample_id] for sample_id in batch.sample_id]


def recall(embeddings: Embeddings, images: list[str], captions: list[bytes]) -> Float[Tensor, ""]:
    """The share of images and texts whose nearest text or image is of their pair, or of a pair with
    an equal image or caption."""
    image, text = embeddings.image_features.detach(), embeddings.text_features.detach()
    same = torch.zeros(len(image), len(text), dtype=torch.bool, device=image.device)
    for names in (images, captions):
        numbers = {name: number for number, name in enumerate(names)}
        keys = torch.tensor([numbers[name] for name in names], device=image.device)
        same |= keys[:, None] == keys
    similarity = image.float() @ text.float().T
    nearest = similarity.argmax(1)[:, None], similarity.argmax(0)[:, None]
    return torch.cat([same.gather(1, each) for each in nearest]).float().mean()


def verdict(pairs: int, steps: int, known: float) -> dict[str, Any]:
    """Say in one line whether the pipeline can learn; the same as JSON values."""
    if known == 1:
        say(f"run.overfit: all {pairs} pairs are known after {steps} steps: this can learn")
    else:
        say(
            f"run.overfit: {known:.0%} of {pairs} pairs are known after {steps} steps: this does "
            "not learn; change optim.learning_rate, and look at images and captions (protoclip "
            "data inspect)"
        )
    return {"pairs": pairs, "steps": steps, "recall": known}
