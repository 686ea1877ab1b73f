"""Fine-tuning: `train` with other defaults, then WiSE-FT. What `protoclip finetune` does.

The defaults are set here; the loop over episodes is in `run.py`, and WiSE-FT in `wise_ft.py`.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from protoclip.config import START, Config, Settings
from protoclip.data.pairs import Pairs
from protoclip.distributed import collectives
from protoclip.evaluation.validation import Judged
from protoclip.models.start import Start
from protoclip.rules import require_named_pairs, require_start
from protoclip.training import optim, sizes, wise_ft
from protoclip.training.choices import Choices, choices_of, given_settings
from protoclip.training.overfit import given_for_few
from protoclip.training.run import train_together

PASSES = 5  # over the images
LARGEST_EPISODE, LARGEST_BATCH, SMALLEST_BATCH = 200_000, 512, 16
NEARLY_ALL = 0.99  # share of pairs with an image of their own, below which a note says so
LEAST_STEPS = 32  # in a pass over the data, if batches can be small enough
# What fine-tuning chooses where it is not given.
CHOSEN = {
    *("run.name", "run.evaluate_every", "model.frozen_batch_norm", "teacher.features"),
    *("episodes.batch_size", "episodes.size", "episodes.count", "episodes.replacement"),
    *("episodes.locked_image", "episodes.warm_up", "optim.learning_rate", "optim.layer_decay"),
    *("optim.warm_up_steps", "optim.weight_decay", "optim.heads_lr_scale", "loss.strengths"),
    *("loss.prototypical", "loss.teacher", "teacher.whiten"),
}


def finetune(
    settings: Settings,
    *,
    alpha: float | None = None,
    resume: Literal["never", "auto"] = "never",
) -> dict[str, Any]:
    """Adapt a model to pairs, and choose weights between it and the end by WiSE-FT.

    Args:
        settings: Those of `Config` as a recipe holds them, such as `{"model": {"start":
            "runs/small"}, "data": {"train": "pairs.tsv"}}`. Others get the values that suit
            fine-tuning: see `before_data` and `with_data`. Those of a `Config` that are at their
            default count as not given.
        alpha: The weights to choose, from 0 (the start) to 1 (the end); unset, the best ones by the
            rule of `wise_ft.RULE`.
        resume: As for `train`. On a finished run another `alpha` costs no training.

    Returns:
        The content of `results.json`: as `train` returns, with metrics of the chosen weights,
        `alpha`, `best_alpha` and `start_metrics`.

    Raises:
        ValueError: As for `train`; or there is no start, no pairs are named, or nothing judges
            the weights.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} is not between 0, the start, and 1, the end")
    given = given_settings(settings)
    require_start(Config.from_dict(given))
    require_named_pairs(given, "fine-tuning")
    few = given_for_few(given)
    config = Config.from_dict(few)
    device, overfits = collectives.device(config.run.device), config.run.overfit is not None
    if overfits:
        alpha = 1.0  # there is nothing to judge others by

    with collectives.process_group(device):
        choices = choices_of(before_data, few, resume=resume == "auto", chosen=CHOSEN)
        return train_together(
            choices.config,
            device,
            resume=resume == "auto",
            defaults=partial(with_data, choices, alpha=alpha),
            ending=None if overfits else partial(wise_ft.choose_weights, alpha=alpha),
            is_done=None
            if overfits
            else partial(wise_ft.is_done, alpha=alpha, guards=choices.config.run.guard),
        )


def before_data(given: Mapping[str, Any]) -> Choices:
    """What is chosen before the data are opened.

    Decay, warm-up and the largest batch are those of FLYP (arXiv 2212.00638), which fine-tunes CLIP
    by its own loss too. The rate falls by 0.7 from layer to layer, as is usual for pretrained
    transformers and ConvNeXt (arXiv 2201.03545, 2212.06138).

    Raises:
        ValueError: A setting is wrong.
    """
    choices = Choices(given, "fine-tuning")
    choices.require_sizes()
    choices.choose("run.name", "finetuned")
    judges = choices.config.data.validation != 0 or bool(choices.config.run.guard)
    choices.choose("run.evaluate_every", int(judges))  # with nothing held out alpha is given
    choices.choose("model.frozen_batch_norm", True)
    choices.choose("episodes.locked_image", 0)
    if choices.config.model.lora is None:
        choices.choose("optim.layer_decay", 0.7)
    return choices


def rate(start: Start, *, is_lora: bool) -> float:
    """The peak learning rate: FLYP's (arXiv 2212.00638), or ten times as much for LoRA, which moves
    few weights.

    Small towers that were trained from scratch learn on at the rate at which they learned. At
    FLYP's they learn nothing in a few passes (docs/LOG.md).
    """
    if start.tower_kind is None:
        return 1e-3
    return 1e-4 if is_lora else 1e-5


def with_data(
    choices: Choices, config: Config, start: Start, data: Judged, *, alpha: float | None
) -> tuple[Config, list[str]]:
    """The defaults of fine-tuning for `plan.complete`: a pass over the images is an episode.

    Raises:
        ValueError: A stream has no number of episodes, or nothing judges the weights.
    """
    if alpha is None and not data.data and not config.run.guard:
        raise ValueError(
            "alpha: nothing judges the models between start and end; hold out pairs "
            "(data.validation), name a guard, or give an alpha"
        )
    choices.config, choose = config, choices.choose
    rows, images = None, None
    if isinstance(data.training, Pairs):
        rows = len(data.training)
        if not (choices.is_given("episodes.size") and choices.is_given("episodes.count")):
            images = images_in(data.training)
    batch, size, count = episodes(choices, rows, images)
    choose("optim.learning_rate", rate(start, is_lora=config.model.lora is not None))
    choose("optim.warm_up_steps", min(500, max(1, count * (size // batch) // 20)))
    choose("optim.weight_decay", 0.1)
    features = None
    if config.loss.teacher > 0 and not config.teachers:
        # A stream has no end, so its captions cannot all be embedded before the run.
        features = choose("teacher.features", START if rows is not None else None)
    if config.loss.prototypical > 0 or features is not None or config.grouping_teachers:
        # With these the gains of docs/LOG.md were measured.
        choose("loss.strengths", "constant")
        choose("loss.prototypical", 1.0)
        choose("loss.teacher", 1.0)
        if features == START:
            choose("teacher.whiten", 0)
            choose("episodes.warm_up", 0)  # its features are good from the beginning
        choose("optim.heads_lr_scale", 1.0 if start.heads_are_new else optim.SLOW_HEADS)
    notes = choices.notes
    if rows and images and images < NEARLY_ALL * rows:
        notes.append(f"{rows:,} pairs show fewer images, so a pass over these is {images:,} pairs")
    return choices.config, notes


def images_in(pairs: Pairs) -> int:
    """How many images a pass counts: so many that all passes together see each pair, and that there
    are enough steps, where these pairs show fewer."""
    rows = len(pairs)
    enough = min(rows, SMALLEST_BATCH * LEAST_STEPS)
    return max(sizes.number_of_images(pairs), math.ceil(rows / PASSES), enough)


def episodes(choices: Choices, rows: int | None, images: int | None) -> tuple[int, int, int]:
    """Pairs in a batch and in an episode, and episodes: some passes over so many images.

    So a table with a row a caption takes as long as one with a row an image.
    """
    choose, given = choices.choose, choices.config.episodes
    if rows is None and not (given.size and choices.is_given("episodes.count")):
        raise ValueError(
            "episodes.size: a stream has no length; give episodes.size and episodes.count"
        )
    wanted = given.size or min(LARGEST_EPISODE, images or 0)
    batch = SMALLEST_BATCH
    while batch < LARGEST_BATCH and wanted // (2 * batch) >= LEAST_STEPS:
        batch *= 2
    usual = sizes.batch_near(min(batch, wanted), dividing=given.size)
    batch = choose("episodes.batch_size", usual)
    size = choose("episodes.size", max(batch, wanted // batch * batch))
    if rows is not None and size <= rows:
        choose("episodes.replacement", False)
    count = 1 if images is None else sizes.episodes_with(PASSES * images, size, batch)
    return batch, size, choose("episodes.count", count)
