"""What a recipe costs: FLOPs of its towers, hours on a card, processor cores that decode.

    python scripts/recipe_cost.py recipes/cc3m_rn50.toml --cards 8 --pairs 2905954

Any setting of `protoclip train` may follow, such as `--model.name ViT-B-32`. This is a model of
cost, not a measurement; docs/scaling.md, "What a recipe takes", has its hours for each recipe.

FLOPs are counted on the towers at full size, and equal those of open_clip's docs/model_profile.csv.
Training takes three forward passes a pair, GradCache and activation checkpointing one more each;
extraction is a forward pass of each pair of a prototypical episode. K-means takes 2 m K d FLOPs an
iteration and space, 0.1% of most runs, and a teacher 2 a parameter and token, once.

Published runs reach 11% and 13% of an A100 (open_clip's ViT-B/32 and ViT-B/16 on LAION-400M, its
docs/PRETRAINED.md) and 23% of an RTX 2080 Ti (the reference's CLIP). Cores decode 1,000 images of
512 pixels a second each. Left out are losses, validation, saving, and waiting for data or ranks.
"""

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from protoclip.cli.spec import Recipes, parse
from protoclip.config import ABOVE_0, Config, Count, ModelConfig, Positive
from protoclip.models.start import resolve_start
from protoclip.models.transformers import NAMED_CONTEXT_LENGTH
from protoclip.training import plan, presets, watch
from protoclip.training.optim import find_stage
from protoclip.training.watch import PEAK, Forward


@dataclass(frozen=True, kw_only=True)
class Cost(Config, Recipes):
    """A recipe, and what it runs on."""

    card: Literal["A100", "H100", "RTX-4090", "RTX-2080-Ti"] = "A100"  # The kind of card.
    cards: Count = 1  # Cards that share the work.
    share: Annotated[float, ABOVE_0, 1] = 0.12  # Share of the card's peak that is reached.
    pairs: Count | None = None  # Pairs of the data, which a teacher reads once.
    teacher_parameters: Positive = 303e6  # Of the teacher without its embeddings; RoBERTa-large.
    teacher_flops: Positive | None = None  # Of all teachers a pair, in place of these parameters.
    images_per_core: Positive = 1000.0  # Images that a core decodes in a second.


def forward_flops(config: ModelConfig) -> Forward:
    """Count the towers' FLOPs at the recipe's sizes. Needs no weights."""
    return watch.count_forward_flops(resolve_start(config))


def run_flops(cost: Cost, forward: Forward) -> dict[str, float]:
    """FLOPs of a whole run by what they are spent on.

    Training takes three forward passes: one, and a backward pass of twice its FLOPs. GradCache and
    activation checkpointing each repeat the forward pass. The locked-image stage makes no backward
    pass through the image tower.
    """
    episodes, parallel, prototypes = cost.episodes, cost.parallel, cost.prototypes
    batch, part = episodes.batch_size // cost.cards, episodes.micro_batch_size
    forwards = 1 + parallel.activation_checkpointing + (part is not None and part < batch)
    stages = [find_stage(cost, index) for index in range(episodes.count)]
    training = extraction = clustering = 0.0
    spaces = [prototypes.number] * (2 if cost.groups_modalities else 0)
    spaces += [teacher.number for teacher in cost.grouping_teachers.values()]
    for stage in stages:
        backward_image = 0 if stage.locks_image else 2 * forward.image
        training += forwards * (forward.image + forward.text) + backward_image + 2 * forward.text
        training += 3 * forward.heads if stage.projects else 0
        if stage.needs_prototypes:
            if cost.prototype_source == "extract":
                extraction += forward.image + forward.text + forward.heads
            rounds = prototypes.iterations * prototypes.restarts
            clustering += 2 * sum(spaces) * cost.model.heads.projection_dim * rounds
    teacher = 0.0
    if cost.external_teachers and cost.pairs:
        of_text = 2 * cost.teacher_parameters * context_length(cost.model)
        teacher = cost.pairs * (cost.teacher_flops or of_text)
    return {
        "training": training * episodes.size,
        "extraction": extraction * episodes.size,
        "K-means": clustering * episodes.size,
        "teacher": teacher,
    }


def context_length(config: ModelConfig) -> int:
    """Tokens of a caption, at most."""
    return config.text.context_length or NAMED_CONTEXT_LENGTH


def hours(cost: Cost, flops: float) -> float:
    return flops / (PEAK[cost.card] * cost.share * cost.cards) / 3600


def images_decoded(cost: Cost) -> int:
    """Images that the run decodes: of each batch, and of each extraction pass."""
    episodes = cost.episodes
    passes = episodes.count
    if cost.prototype_source == "extract":
        passes += sum(find_stage(cost, i).needs_prototypes for i in range(episodes.count))
    return passes * episodes.size


def read(words: Sequence[str]) -> Cost:
    """The recipe and options of a command line, with the defaults that depend on the model."""
    if not words or words[0].startswith("-"):
        raise ValueError("name a recipe, such as recipes/cc3m_rn50.toml")
    cost = parse(Cost, ["--config", *words])
    given = Config(**{entry.name: getattr(cost, entry.name) for entry in fields(Config)})
    outlined = plan.resolve_settings(given)
    config, start = outlined.config, outlined.start
    if not config.episodes.size and not cost.pairs:
        raise ValueError("--pairs: the recipe leaves episodes.size to the data; give their number")
    config, _ = presets.fill_episodes(config, cost.pairs)
    if start.is_small:
        pixels, length = start.sizes["image_size"], start.sizes["context_length"]
        image, text = config.model.image, config.model.text
        model = replace(
            config.model,
            image=replace(image, size=pixels),
            text=replace(text, context_length=length),
        )
        config = replace(config, model=model)
    prototypes = presets.fill(config.prototypes, {"source": config.prototype_source})
    config = replace(config, prototypes=prototypes)
    values = presets.choose_optimizer(config, start.tower_kind)
    return replace(cost, **vars(replace(config, optim=presets.fill(config.optim, values))))


def report(words: Sequence[str]) -> list[str]:
    """The lines that the command prints."""
    cost = read(words)
    forward, episodes = forward_flops(cost.model), cost.episodes
    flops = run_flops(cost, forward)
    total = sum(flops.values())
    seen = episodes.count * episodes.size
    taken = hours(cost, total)
    rate = images_decoded(cost) / (hours(cost, total - flops["teacher"]) * 3600)
    rows = {
        "parameters": f"{forward.parameters / 1e6:.1f} million in the towers",
        "forward pass": f"{forward.image / 1e9:.1f} GFLOP an image, {forward.text / 1e9:.1f} a "
        f"caption, {forward.heads / 1e9:.3f} in the heads",
        "pairs": f"{seen:,} in {episodes.count:,} episodes"
        + (f", {seen / cost.pairs:.1f} passes over {cost.pairs:,}" if cost.pairs else ""),
        "FLOPs a pair": f"{total / seen / 1e9:.1f} G, all included",
        **{name: f"{part / total:.1%} of {total:.2e} FLOPs" for name, part in flops.items()},
        "hours": f"{taken:.1f} on {cost.cards} {cost.card} at {cost.share:.0%} of "
        f"{PEAK[cost.card] / 1e12:.0f} TFLOP/s",
        "cores": f"{math.ceil(rate / cost.images_per_core)} to decode {rate:,.0f} images/s, at "
        f"{cost.images_per_core:,.0f} a core",
    }
    return [f"{name:<13} {text}" for name, text in rows.items()]


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # open_clip warns that there are no weights
    try:
        print("\n".join(report(sys.argv[1:])))
    except ValueError as error:
        sys.exit(f"recipe_cost.py: error: {error}")
