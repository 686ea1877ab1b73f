"""The stages of a run: what each one trains, and whether it uses prototypes."""

import re
from dataclasses import dataclass

from torch import nn

from protoclip.config import Config
from protoclip.distributed import parallel


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training: regular expressions for names of parameters and modules.

    `frozen` parameters get no gradient. `locked` modules stay in evaluation mode, so that their
    BatchNorm statistics do not move. The warm-up `projects`, that is runs the heads, without a
    loss, so that their BatchNorm statistics fit the features of the first clustering.
    """

    name: str
    frozen: tuple[str, ...] = ()
    locked: tuple[str, ...] = ()
    needs_prototypes: bool = False
    projects: bool = False


HEADS = r"image_head\.|text_head\.|prototype_logit_scale"
CONTRASTIVE = Stage(name="contrastive", frozen=(HEADS,))
WARM_UP = Stage(name="warm-up", frozen=(HEADS,), projects=True)
PROTOTYPICAL = Stage(name="prototypical", needs_prototypes=True, projects=True)
LOCKED_IMAGE = Stage(
    name="locked image",
    frozen=(r"towers\.visual\.", HEADS),
    locked=(r"towers\.visual$", r"image_head$|text_head$"),
)


def stage_of(config: Config, episode: int) -> Stage:
    """Warm-up, prototypical, then with a locked image tower (LiT, Zhai et al. 2022); or CLIP."""
    if episode >= config.episodes.count - config.episodes.locked_image:
        return LOCKED_IMAGE
    if not config.uses_prototypes:
        return CONTRASTIVE
    return WARM_UP if episode < config.episodes.warm_up else PROTOTYPICAL


def enter_stage(model: nn.Module, stage: Stage) -> None:
    """Freeze parameters by name, and set the mode of every module.

    Every pattern must match something, so that a renamed tower cannot train by mistake.
    """
    parallel.reshard(model)
    matched: set[str] = set()
    for name, parameter in model.named_parameters():
        hits = {pattern for pattern in stage.frozen if re.match(pattern, name)}
        parameter.requires_grad_(not hits)
        matched |= hits
    assert matched == set(stage.frozen), f"no parameter matches {set(stage.frozen) - matched}"
    model.train()
    for pattern in stage.locked:
        modules = [module for name, module in model.named_modules() if re.match(pattern, name)]
        assert modules, f"no module matches {pattern}"
        for module in modules:
            module.eval()
