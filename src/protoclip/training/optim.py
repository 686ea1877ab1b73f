"""The optimizer, its learning rate by step, and the defaults of `[optim]` for a model.

Which parameters train is decided in `stages.py`; steps are taken in `trainer.py`.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from protoclip.config import SMALL_IMAGE_SIZES, Config, locked_rate
from protoclip.models.transformers import HuggingFaceTowers

LOCKED_WARM_UP = 2  # steps
SLOW_HEADS = 0.01  # of the towers' learning rate
# The layers of open_clip's own towers and of Hugging Face's: embeddings (or the stem), then the
# numbered blocks (or stages). What matches neither is behind the last block.
LAYERS = {
    "stem": r"conv\d|bn\d|class_embedding|positional_embedding|ln_pre|token_embedding|cls_emb|"
    r"(?:transformer|model)\.(?:embed|pre_layrnorm|encoder\.rel)",
    "blocks": r"(?:transformer\.resblocks|"
    r"(?:transformer|model)(?:\.encoder|\.transformer)?\.(?:layers?|blocks?|stages)|layer)\.?(\d+)",
}


def defaults(config: Config, kind: str | None) -> dict[str, Any]:
    """The settings of `[optim]` that depend on the model.

    Small towers that start untrained, of no `kind`, get values that suit the bundled emoji, and
    half of their rate above 40 pixels, which suits photographs (docs/LOG.md). Other models,
    transformers or convolutional, get values between the recipes known for such models.
    With extraction their heads learn as fast as the towers, as in the paper, and with a queue
    slowly. As batch, peak rate, warm-up of all steps, decay:

    - CLIP's ViT-B/32: 32,768, 5e-4, 2,000 of 390,000, 0.2; betas .9/.98, eps 1e-6;
    - open_clip's RN50 on CC3M: 1,024, 1e-3, 1,000 to 2,000 of 82,000, 0.1;
    - open_clip's RN50 on CC12M: 1,024, 5e-4, 10,000 of 330,000, 0.1;
    - the reference ProtoCLIP, RN50: 512, 5e-4, 15,625 of 156,250, 0.5 (on one GPU 64, 5e-5, 2,000
      of 312,500), none for the heads; betas .9/.999, eps 1e-8 unless the model is a ViT.
    """
    episodes, given = config.episodes, config.optim
    if kind is None:
        rate = 2e-3 if (config.model.image.size or 0) <= SMALL_IMAGE_SIZES[0] else 1e-3
        return {
            "learning_rate": rate,
            "warm_up_steps": 50,
            "locked_learning_rate": locked_rate(given.learning_rate or rate),
            "betas": (0.9, 0.98),
            "eps": 1e-6,
            "weight_decay": 0.2,
            "heads_weight_decay": 0.2 if given.weight_decay is None else given.weight_decay,
            "heads_lr_scale": SLOW_HEADS,
        }
    is_transformer, batch = kind == "transformer", episodes.batch_size
    steps = episodes.count * (episodes.size // batch)
    rate = 5e-4 * min(1.0, batch / 512)
    return {
        "learning_rate": rate,
        "warm_up_steps": min(max(steps // 50, 500_000 // batch), max(steps // 10, 1)),
        "locked_learning_rate": locked_rate(given.learning_rate or rate),
        "betas": (0.9, 0.98) if is_transformer else (0.9, 0.999),
        "eps": 1e-6 if is_transformer else 1e-8,
        "weight_decay": 0.2 if is_transformer else 0.1,
        "heads_weight_decay": 0.0,
        # Fast heads leave behind the projections that wait in a queue (docs/LOG.md).
        "heads_lr_scale": 1.0 if config.prototypes.source == "extract" else SLOW_HEADS,
    }


def rise(warm_up: int, total: int) -> int:
    """Steps until the peak: at most half of all, so that short runs reach it too."""
    return min(warm_up, total // 2)


def warm_up_cosine(step: int, *, peak: float, warm_up: int, total: int) -> float:
    """Rise linearly from peak / warm_up to peak, then follow half a cosine that is 0 at `total`."""
    warm_up = rise(warm_up, total)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2


def schedule(config: Config) -> Callable[[int], float]:
    """The learning rate by step: one cosine, and a second one for the locked-image stage.

    The reference cools the text tower's rate to nearly zero before the locked-image stage starts.
    A second cosine lets it move there. `locked_learning_rate = 0` gives the reference's one cosine.
    """
    peak, warm_up = config.optim.learning_rate, config.optim.warm_up_steps
    locked_peak = config.optim.locked_learning_rate
    main, locked = steps_of_cosines(config)

    def learning_rate(step: int) -> float:
        if step < main:
            return warm_up_cosine(step, peak=peak, warm_up=warm_up, total=main)
        return warm_up_cosine(step - main, peak=locked_peak, warm_up=LOCKED_WARM_UP, total=locked)

    return learning_rate


def steps_of_cosines(config: Config) -> tuple[int, int]:
    """Steps of the first cosine and of that of the locked-image stage, which may have none."""
    steps = config.episodes.size // config.episodes.batch_size
    locked = config.locked_episodes * steps if config.optim.locked_learning_rate else 0
    return config.episodes.count * steps - locked, locked


def steps_to_peak(config: Config) -> int:
    """Steps until the full rate, of which a short run has fewer than `warm_up_steps`."""
    return rise(config.optim.warm_up_steps, steps_of_cosines(config)[0])


def optimizer(config: Config, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW. Weight decay applies to matrices and filters, not to gains, biases, scales.

    Towers and heads have parameter groups of their own where the configuration gives them a
    learning-rate scale or a weight decay, and layers with `layer_decay` (see `layer_distances`):
    the further from the output, the lower the rate, as in fine-tuning by ELECTRA (arXiv 2003.10555)
    and BEiT (arXiv 2106.08254).
    """
    settings = config.optim
    # Learning-rate scale and weight decay by prefix of names; the first prefix that matches counts.
    common = (1.0, settings.weight_decay)
    heads = (settings.heads_lr_scale, settings.heads_weight_decay)
    by_prefix: dict[str, tuple[float, float]] = {}
    if settings.image_lr_scale != 1.0:
        # open_clip's image tower is `visual`. The parts before it keep their order in the groups.
        scales = {"towers.visual.": settings.image_lr_scale, "towers.logit_": 1.0, "towers.": 1.0}
        by_prefix = {prefix: (scale, common[1]) for prefix, scale in scales.items()}
    if heads != common:
        by_prefix |= {"image_head.": heads, "text_head.": heads}
    layer_decay = settings.layer_decay
    distance = layer_distances(model) if layer_decay < 1 else {}
    groups, remaining = [], dict(model.named_parameters())
    for prefix, (scale, weight_decay) in {**by_prefix, "": common}.items():
        named = {name: remaining.pop(name) for name in [*remaining] if name.startswith(prefix)}
        # FSDP2 does not shard scalars, so they get their own group.
        for dimensions, decay in ((2, weight_decay), (1, 0.0), (0, 0.0)):
            layers: dict[int, list[nn.Parameter]] = {}
            for name, parameter in named.items():
                if min(parameter.ndim, 2) == dimensions:
                    layers.setdefault(distance.get(name, 0), []).append(parameter)
            for layer, parameters in sorted(layers.items()):
                factor = scale * layer_decay**layer
                groups.append({"params": parameters, "weight_decay": decay, "scale": factor})
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


def layer_distances(model: Any) -> dict[str, int]:
    """How many layers each parameter of the towers is away from its tower's output, by name.

    A layer is a block of a transformer or a stage of a convolutional tower, as timm groups them;
    embeddings are one more. What is behind the last block, such as the projection, is at 0.

    Raises:
        ValueError: It is not known which layers a tower has.
    """
    towers = model.towers
    trunk, prefix_of_trunk = getattr(towers.visual, "trunk", None), "visual.trunk."
    behind = [*getattr(towers.visual, "head", nn.Identity()).parameters()]
    if isinstance(towers, HuggingFaceTowers):
        trunk = getattr(towers.visual.model, "timm_model", None)
        prefix_of_trunk = "visual.model.timm_model."
        behind = [*towers.visual.projection.parameters()]
    parts: list[tuple[str, nn.Module, Any, int]] = [("", towers, LAYERS, 0)]
    if hasattr(towers, "text"):
        parts = [("text.", towers.text, LAYERS, 0)]
    if trunk is None:
        parts.append(("visual.", towers.visual, LAYERS, 0))
    else:
        matcher = stages_of(trunk)
        # What no group has, as the norm behind the last stage of a ConvNeXt, is behind it already.
        beyond = (
            1 if behind and all(is_in(matcher, name) for name, _ in trunk.named_parameters()) else 0
        )
        parts.append((prefix_of_trunk, trunk, matcher, beyond))
    distances: dict[str, int] = {}
    for prefix, part, matcher, beyond in parts:
        numbers = group_parameters(part, matcher, reverse=True)
        if max(numbers.values()) == 0:
            tower = "image" if prefix.startswith("visual.") else "text"
            raise ValueError(
                f"optim.layer_decay: the layers of the {tower} tower are not known; set it to 1"
            )
        last = max(numbers.values()) + beyond
        for name, number in numbers.items():
            number = 0 if "shared_rel_pos" in name else number  # of all blocks, as embeddings
            if prefix or not name.startswith(("visual.", "logit_")):
                distances[f"towers.{prefix}{name}"] = last - number
    return distances


def stages_of(trunk: Any) -> Any:
    """How timm groups the parameters of a trunk by stages; raises `ValueError` if it does not."""
    try:
        return trunk.group_matcher(coarse=True)
    except (AttributeError, AssertionError) as error:  # it has no groups, or, as RDNet, no stages
        raise ValueError(
            f"optim.layer_decay: timm knows no layers of {type(trunk).__name__}; set it to 1"
        ) from error


def is_in(matcher: Any, name: str) -> bool:
    """Whether a group of timm's has a parameter; a matcher that is a function has them all."""
    if not isinstance(matcher, Mapping):
        return True
    groups = [each if isinstance(each, list | tuple) else [each] for each in matcher.values()]
    patterns = [part[0] if isinstance(part, list | tuple) else part for of in groups for part in of]
    return any(re.match(pattern, name) for pattern in patterns)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; each parameter group multiplies it by its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
