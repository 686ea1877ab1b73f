"""The stages of a run, its optimizer, and the learning rate by step."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoclip.config import Config, ModelConfig
from protoclip.distributed import parallel
from protoclip.models.joined import place_encoders
from protoclip.models.protoclip import PROJECTIONS, ProtoCLIP
from protoclip.models.transformers import HuggingFaceTowers

HEADS = ("image_head.", "text_head.", "prototype_logit_scale")
LOCKED_WARM_UP = 2  # steps
# The layers of open_clip's own towers and of Hugging Face's: embeddings (or the stem), then the
# numbered blocks (or stages). What matches neither is behind the last block.
LAYERS = {
    "stem": r"conv\d|bn\d|class_embedding|positional_embedding|ln_pre|token_embedding|cls_emb|"
    r"(?:transformer|model)\.(?:embed|pre_layrnorm|encoder\.rel)",
    "blocks": r"(?:transformer\.resblocks|"
    r"(?:transformer|model)(?:\.encoder|\.transformer)?\.(?:layers?|blocks?|stages)|layer)\.?(\d+)",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training. The function `trains` says which parameters train in it."""

    name: str
    needs_prototypes: bool = False  # the heads train, by the prototypical losses
    # The heads run. In the warm-up they do so without a loss, so that their BatchNorm statistics
    # fit the features of the first clustering.
    projects: bool = False
    locks_image: bool = False  # the image tower and the heads stay as they are
    # Its limits in every stage: `locked` towers stay as they are, BatchNorm statistics included;
    # with `lora` only adapters train of the others; new projections into the joint space train in
    # spite of that; and with `frozen_batch_norm` statistics stay.
    model: ModelConfig = field(default_factory=ModelConfig)


CONTRASTIVE = Stage(name="contrastive")
WARM_UP = Stage(name="warm-up", projects=True)
PROTOTYPICAL = Stage(name="prototypical", needs_prototypes=True, projects=True)
LOCKED_IMAGE = Stage(name="locked image", locks_image=True)


def find_stage(config: Config, episode: int) -> Stage:
    """The stage of an episode, counted from 0: warm-up, prototypical, and last with a locked image
    tower (LiT, Zhai et al. 2022). Without prototypes the first two are one, as in CLIP."""
    if episode >= config.episodes.count - config.locked_episodes:
        stage = LOCKED_IMAGE
    elif not config.uses_prototypes:
        stage = CONTRASTIVE
    else:
        stage = WARM_UP if episode < config.episodes.warm_up else PROTOTYPICAL
    return replace(stage, model=config.model)


def trains(name: str, stage: Stage) -> bool:
    """Whether a parameter of `ProtoCLIP` trains in a stage; the logit scale and bias always do."""
    if name.startswith(HEADS):
        return stage.needs_prototypes
    assert name.startswith("towers."), f"{name} is of no tower"
    if name.startswith("towers.logit_"):
        return True
    tower = "image" if name.startswith("towers.visual.") else "text"
    if tower == "image" and stage.locks_image:
        return False
    model = stage.model
    if model.projections_are_new and name.removeprefix("towers.").startswith(PROJECTIONS):
        return True
    return tower not in model.locked and (model.lora is None or ".lora_" in name)


def enter_stage(model: ProtoCLIP, stage: Stage) -> None:
    """Freeze what does not train in a stage, and set the mode of every module."""
    parallel.reshard(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, stage))
    model.train()
    if stage.locks_image:
        model.image_head.eval()
        model.text_head.eval()
    for name, part in model.towers.named_children():
        tower = "image" if name == "visual" else "text"
        if tower in stage.model.locked or (tower == "image" and stage.locks_image):
            part.eval()
    if stage.model.frozen_batch_norm:
        for module in model.towers.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def warm_up_cosine(step: int, *, peak: float, warm_up: int, total: int) -> float:
    """Rise linearly from peak / warm_up to peak, then follow half a cosine that is 0 at `total`."""
    warm_up = min(warm_up, total // 2)  # so that short runs reach the peak too
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2


def make_schedule(config: Config) -> Callable[[int], float]:
    """The learning rate by step: one cosine, and a second one for the locked-image stage.

    With `locked_learning_rate = 0` there is the reference's one cosine, whose rate is nearly zero
    when that stage starts.
    """
    peak, warm_up = config.optim.learning_rate, config.optim.warm_up_steps
    locked_peak = config.optim.locked_learning_rate
    main, locked = count_cosine_steps(config)

    def learning_rate(step: int) -> float:
        if step < main:
            return warm_up_cosine(step, peak=peak, warm_up=warm_up, total=main)
        return warm_up_cosine(step - main, peak=locked_peak, warm_up=LOCKED_WARM_UP, total=locked)

    return learning_rate


def count_cosine_steps(config: Config) -> tuple[int, int]:
    """Steps of the first cosine and of that of the locked-image stage, which may have none."""
    steps = config.episodes.size // config.episodes.batch_size
    locked = config.locked_episodes * steps if config.optim.locked_learning_rate else 0
    return config.episodes.count * steps - locked, locked


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW. Weight decay applies to matrices and filters, not to gains, biases, scales.

    Towers, heads and (with `layer_decay`; see `layer_distances`) layers have parameter groups of
    their own where their learning rate or weight decay differs.
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

    A layer is a block of a transformer or a stage of a convolutional tower; embeddings are one
    more. What is behind the last block is at 0. Raises `ValueError` if layers are not known.
    """
    towers = model.towers
    images = place_encoders(towers.visual).items()
    trunks = {f"visual.{place}trunk.": getattr(image, "trunk", None) for place, image in images}
    behind = [*getattr(towers.visual, "head", nn.Identity()).parameters()]
    if isinstance(towers, HuggingFaceTowers):
        trunks = {"visual.model.timm_model.": getattr(towers.visual.model, "timm_model", None)}
        behind = [*towers.visual.projection.parameters()]
    parts: list[tuple[str, nn.Module, Any, int]] = [("", towers, LAYERS, 0)]
    if hasattr(towers, "text"):
        texts = place_encoders(towers.text)
        parts = [(f"text.{place}", text, LAYERS, 0) for place, text in texts.items()]
    for prefix_of_trunk, trunk in trunks.items():
        if trunk is None:
            parts.append(("visual.", towers.visual, LAYERS, 0))
            continue
        try:
            matcher = trunk.group_matcher(coarse=True)
        except (AttributeError, AssertionError) as error:  # no groups, or, as in RDNet, no stages
            raise ValueError(
                f"optim.layer_decay: timm lists no layers of {type(trunk).__name__}; set it to 1"
            ) from error
        # What no group has, as the norm behind the last stage of a ConvNeXt, is behind it already.
        has_all = all(is_in_group(name, matcher) for name, _ in trunk.named_parameters())
        beyond = int(bool(behind) and has_all)
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


def is_in_group(name: str, matcher: Any) -> bool:
    """Whether a group of timm's has a parameter; a matcher that is a function has them all."""
    if not isinstance(matcher, Mapping):
        return True
    groups = [group if isinstance(group, list | tuple) else [group] for group in matcher.values()]
    parts = [part for group in groups for part in group]
    patterns = [part[0] if isinstance(part, list | tuple) else part for part in parts]
    return any(re.match(pattern, name) for pattern in patterns)
