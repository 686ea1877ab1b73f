"""Fine-tuning: `train` with other defaults, then WiSE-FT. What `protoclip finetune` does."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from protoclip.config import NO_START, Config, check, shown
from protoclip.data import sources
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.distributed import collectives
from protoclip.evaluation.validation import judged
from protoclip.models import loading
from protoclip.models.start import resolve_start
from protoclip.training import optim, sizes
from protoclip.training.run import train_together
from protoclip.training.wise_ft import WiseFT

PASSES = 5  # over the data
LARGEST_EPISODE, LARGEST_BATCH, SMALLEST_BATCH = 200_000, 512, 16
LEAST_STEPS = 32  # in a pass over the data, if batches can be small enough


def finetune(
    settings: Mapping[str, Any],
    *,
    alpha: float | None = None,
    resume: Literal["never", "auto"] = "never",
) -> dict[str, Any]:
    """Adapt a model to pairs, and choose weights between it and the end by WiSE-FT.

    Args:
        settings: Those of `Config` as a recipe holds them, such as `{"model": {"start":
            "runs/small"}, "data": {"train": "pairs.tsv"}}`. `finetune_settings` decides the rest.
        alpha: The weights to choose, from 0 (the start) to 1 (the end); unset, the best ones by the
            rule of `wise_ft.RULE`.
        resume: As for `train`. On a finished run another `alpha` costs no training.

    Returns:
        The content of `results.json`: as `train` returns, with metrics of the chosen weights,
        `alpha`, `best_alpha` and `start_metrics`.

    Raises:
        ValueError: As for `train`; or there is no start, or nothing to judge the weights by.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} is not between 0, the start, and 1, the end")
    device = collectives.device(Config.from_dict(settings).run.device)
    with collectives.process_group(device):
        config, notes = collectives.raise_on_all_ranks(lambda: finetune_settings(settings))
        notes += check(config)
        config, decided = optim.resolved(config)
        return train_together(
            config, device, resume=resume == "auto", notes=notes + decided, ending=WiseFT(alpha)
        )


class Defaults:
    """The settings of a run that are left out, with the values that fine-tuning gives them.

    `given` are settings as a recipe holds them; `config` holds the same, checked.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, self.config = given, Config.from_dict(given)
        self.decided: dict[str, dict[str, Any]] = {}

    def has(self, name: str) -> bool:
        """Whether a setting is given."""
        section, key = name.split(".")
        return key in self.given.get(section, {})

    def decide(self, name: str, value: Any) -> Any:
        """The value of a setting: what is given, else this one."""
        section, key = name.split(".")
        if self.has(name):
            return getattr(getattr(self.config, section), key)
        self.decided.setdefault(section, {})[key] = value
        return value

    def filled(self) -> Config:
        own = {
            name: {**values, **self.given.get(name, {})} for name, values in self.decided.items()
        }
        return Config.from_dict({**self.given, **own})

    def notes(self) -> list[str]:
        return [
            "for fine-tuning: "
            + ", ".join(f"{section}.{key} = {shown(value)}" for key, value in values.items())
            for section, values in self.decided.items()
        ]


def finetune_settings(given: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The settings of a fine-tuning run, and a note on each section with those that were left out.

    Learning rate, decay, warm-up and the largest batch are those of FLYP (arXiv 2212.00638), which
    fine-tunes CLIP by its own loss too. LoRA moves few weights, and learns at ten times the rate.
    The rate falls by 0.7 from layer to layer, as is usual for pretrained transformers and ConvNeXt
    (arXiv 2201.03545, 2212.06138). A pass over the data is an episode, if it is not too large.

    Args:
        given: Settings as a recipe holds them.

    Raises:
        ValueError: There is no start, it cannot be trained, or the data are wrong.
    """
    settings = Defaults(given)
    config, decide = settings.config, settings.decide
    if config.model.start is None:
        raise ValueError(NO_START)
    start = resolve_start(config.model)
    loading.check_parallel(config)
    decide("run.name", "finetuned")
    evaluate_every = decide("run.evaluate_every", 1)
    decide("model.frozen_batch_norm", True)
    samples = training_samples(config, evaluate_every)
    rows = len(samples) if isinstance(samples, Pairs) else None
    batch, size, count = episodes(settings, rows)
    decide("episodes.locked_image", 0)
    if config.model.lora is None:
        decide("optim.learning_rate", 1e-5)
        decide("optim.layer_decay", 0.7)
    else:
        decide("optim.learning_rate", 1e-4)
    decide("optim.warm_up_steps", min(500, max(1, count * (size // batch) // 20)))
    decide("optim.weight_decay", 0.1)
    number = sizes.number_of_prototypes(samples, size)
    if config.loss.prototypical > 0:
        decide("prototypes.number", number)
    features = None
    if config.loss.teacher > 0 and not config.teachers:
        # A stream has no end, so its captions cannot all be embedded before the run.
        features = decide("teacher.features", "start" if rows is not None else None)
        if features is not None:
            decide("teacher.number", number)
    if config.loss.prototypical > 0 or features is not None or config.external_teachers:
        # With these the gains of docs/LOG.md were measured.
        decide("loss.strengths", "constant")
        decide("loss.teacher", 1.0)
        if features == "start":
            decide("teacher.whiten", 0)
            decide("episodes.warm_up", 0)  # its features are good from the beginning
        decide("optim.heads_lr_scale", optim.SLOW_HEADS if start.has_heads else 1.0)
    config = settings.filled()
    return sizes.filled(config, sizes.sizes_of(config, size, number)), settings.notes()


def episodes(settings: Defaults, rows: int | None) -> tuple[int, int, int]:
    """Pairs in a batch and in an episode, and episodes: some passes over so many rows."""
    decide, given = settings.decide, settings.config.episodes
    if rows is None and not (given.size and settings.has("episodes.count")):
        raise ValueError(
            "episodes.size: a stream has no length; give episodes.size and episodes.count"
        )
    wanted = given.size or min(LARGEST_EPISODE, rows or 0)
    batch = SMALLEST_BATCH
    while batch < LARGEST_BATCH and wanted // (2 * batch) >= LEAST_STEPS:
        batch *= 2
    batch = min(batch, wanted)
    while given.size and wanted % batch and batch > 2:
        batch //= 2
    batch = decide("episodes.batch_size", max(2, batch))
    size = decide("episodes.size", max(batch, wanted // batch * batch))
    if rows is not None and size <= rows:
        decide("episodes.replacement", False)
    passes = 1 if rows is None else round(PASSES * rows / size)
    return batch, size, decide("episodes.count", max(1, passes))


def training_samples(config: Config, evaluate_every: int) -> Pairs | SampleStream:
    """The samples that are not held out."""
    config = replace(config, run=replace(config.run, evaluate_every=evaluate_every))
    return judged(config, sources.pairs(config)).training
