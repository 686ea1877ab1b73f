"""The stages of a run: what is trained in each, and which losses count."""

import re
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Attributes:
        name: As shown on the console.
        frozen: Regular expressions over parameter names that get no gradient.
        locked: Regular expressions over module names that stay in evaluation mode, so that their
            BatchNorm statistics are fixed too.
        needs_prototypes: Whether the stage's loss uses prototypes.
        projects: Whether the forward pass runs the heads. The warm-up runs them without a loss:
            their BatchNorm statistics then describe the features that the first clustering meets.
    """

    name: str
    frozen: tuple[str, ...] = ()
    locked: tuple[str, ...] = ()
    needs_prototypes: bool = False
    projects: bool = False


HEADS = r"image_head\.|text_head\.|prototype_logit_scale"
CONTRASTIVE = Stage(name="InfoNCE", frozen=(HEADS,))
WARM_UP = Stage(name="warm-up", frozen=(HEADS,), projects=True)
PROTOTYPICAL = Stage(name="prototypical", needs_prototypes=True, projects=True)
LOCKED_IMAGE = Stage(
    name="locked image",
    frozen=(r"towers\.visual\.", HEADS),
    locked=(r"towers\.visual$", r"image_head$|text_head$"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which stage each episode belongs to.

    Attributes:
        num_episodes: Episodes in all.
        warm_up: Episodes at the start with InfoNCE alone.
        locked_image: Episodes at the end with the image tower locked (LiT, Zhai et al. 2022).
        prototypical: Whether episodes between use prototypes; if not, the run is CLIP.
    """

    num_episodes: int
    warm_up: int
    locked_image: int
    prototypical: bool

    def stage(self, episode: int) -> Stage:
        if episode >= self.num_episodes - self.locked_image:
            return LOCKED_IMAGE
        if not self.prototypical:
            return CONTRASTIVE
        return WARM_UP if episode < self.warm_up else PROTOTYPICAL


def enter_stage(model: nn.Module, stage: Stage) -> None:
    """Freeze by name pattern, and set each module's mode.

    Every pattern has to match something: a renamed tower must not train on unnoticed.
    """
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
