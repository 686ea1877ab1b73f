"""What a run is trained with where its configuration leaves it open; depends on the model."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from protoclip.config import SMALL_CONTEXT_LENGTH, SMALL_IMAGE_SIZE, Config
from protoclip.models.towers import refuse_sigmoid, tower_kind


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """The settings of `[optim]` that have no default of their own, decided."""

    learning_rate: float
    warm_up_steps: int
    locked_learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    heads_weight_decay: float


def optimisation(config: Config) -> tuple[Optimisation, list[str]]:
    """Settings of the optimizer, and a line for each that a named model decides.

    What is set counts. What is left open is, for the small towers that the configuration describes,
    what suits the bundled emoji. For a model of open_clip it is between the recipes known for such
    models, which are, as batch, peak rate, warm-up steps of all steps, weight decay:

    - ViT-B/32 of CLIP (arXiv 2103.00020): 32,768, 5e-4, 2,000 of 390,000, 0.2;
      betas .9/.98, eps 1e-6;
    - open_clip's RN50 on CC3M: 1,024, 1e-3, 1,000 to 2,000 of 82,000, 0.1;
    - open_clip's RN50 on CC12M: 1,024, 5e-4, 10,000 of 330,000, 0.1;
    - the reference implementation of ProtoCLIP, RN50: 512, 5e-4, 15,625 of 156,250, 0.5, and on one
      GPU 64, 5e-5, 2,000 of 312,500, 0.5; betas .9/.999 and eps 1e-8 unless the model is a ViT, as
      in open_clip; no decay on the projection heads.

    Raises:
        ValueError: open_clip knows no model of that name.
    """
    name, episodes = config.model.name, config.episodes
    given: dict[str, Any] = {
        setting: value
        for setting in Optimisation.__dataclass_fields__
        if (value := getattr(config.optim, setting)) is not None
    }
    if name is None:
        decay = given.get("weight_decay", 0.2)
        small = Optimisation(
            learning_rate=2e-3,
            warm_up_steps=50,
            locked_learning_rate=2e-4,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=decay,
            heads_weight_decay=decay,
        )
        return replace(small, **given), []
    kind = tower_kind(name)
    steps = episodes.count * (episodes.size // episodes.batch_size)
    at_least = 500_000 // episodes.batch_size
    rate = 5e-4 * min(1.0, episodes.batch_size / 512)
    decided = Optimisation(
        learning_rate=rate,
        warm_up_steps=min(max(steps // 50, at_least), max(steps // 10, 1)),
        locked_learning_rate=given.get("learning_rate", rate) / 10,
        betas=(0.9, 0.98) if kind == "transformer" else (0.9, 0.999),
        eps=1e-6 if kind == "transformer" else 1e-8,
        weight_decay=0.2 if kind == "transformer" else 0.1,
        heads_weight_decay=0.0,
    )
    origins = {
        "learning_rate": f"from {name} at batch {episodes.batch_size}",
        "warm_up_steps": f"of {steps} steps at batch {episodes.batch_size}",
        **({"locked_learning_rate": "a tenth of the rate"} if episodes.locked_image else {}),
        **dict.fromkeys(("betas", "eps", "weight_decay"), f"from {name}, a {kind} image tower"),
        **({"heads_weight_decay": f"from {name}"} if config.uses_prototypes else {}),
    }
    lines = [
        f"optim.{setting} = {shown(getattr(decided, setting))}, {origin}"
        for setting, origin in origins.items()
        if setting not in given
    ]
    return replace(decided, **given), lines


def resolved(config: Config) -> tuple[Config, list[str]]:
    """The configuration with what it leaves open to the model decided, and lines that say so.

    Raises:
        ValueError: There is no such model, or it cannot be trained here.
    """
    if config.model.name is not None:
        refuse_sigmoid(config.model.name)
    decided, lines = optimisation(config)
    model = config.model
    if model.name is None:
        size = model.image.size or SMALL_IMAGE_SIZE
        length = model.text.context_length or SMALL_CONTEXT_LENGTH
        model = replace(
            model,
            image=replace(model.image, size=size),
            text=replace(model.text, context_length=length),
        )
    return replace(config, model=model, optim=replace(config.optim, **asdict(decided))), lines


def shown(value: object) -> str:
    """A value as one would write it in a recipe: 0.0005 is 5e-4."""
    if not isinstance(value, float) or value == 0 or value >= 0.01:
        return str(value)
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
