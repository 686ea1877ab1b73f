"""The stages of a run: what each one trains, and whether it uses prototypes."""

import re
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoclip.config import Config, ModelConfig
from protoclip.distributed import parallel


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training: regular expressions for names of parameters and modules.

    `frozen` parameters get no gradient. `locked` modules stay in evaluation mode, so that their
    BatchNorm statistics do not move; with `frozen_batch_norm` so do all BatchNorms of the towers,
    whose gains and biases train. The warm-up `projects`, that is runs the heads, without a
    loss, so that their BatchNorm statistics fit the features of the first clustering.
    """

    name: str
    frozen: tuple[str, ...] = ()
    locked: tuple[str, ...] = ()
    needs_prototypes: bool = False
    projects: bool = False
    frozen_batch_norm: bool = False


HEADS = r"image_head\.|text_head\.|prototype_logit_scale"
LORA = r".*\.lora_"
CONTRASTIVE = Stage(name="contrastive", frozen=(HEADS,))
WARM_UP = Stage(name="warm-up", frozen=(HEADS,), projects=True)
PROTOTYPICAL = Stage(name="prototypical", needs_prototypes=True, projects=True)
LOCKED_IMAGE = Stage(
    name="locked image",
    frozen=(r"towers\.visual\.", HEADS),
    locked=(r"towers\.visual$", r"image_head$|text_head$"),
)


def stage_of(config: Config, episode: int) -> Stage:
    """Warm-up, prototypical, then with a locked image tower (LiT, Zhai et al. 2022); or CLIP.

    What `[model]` keeps from training, it keeps in every stage.
    """
    return limited(plain_stage(config, episode), config.model)


def plain_stage(config: Config, episode: int) -> Stage:
    if episode >= config.episodes.count - config.locked_episodes:
        return LOCKED_IMAGE
    if not config.uses_prototypes:
        return CONTRASTIVE
    return WARM_UP if episode < config.episodes.warm_up else PROTOTYPICAL


def limited(stage: Stage, model: ModelConfig) -> Stage:
    """The stage without the parts that `model.locked` and `model.lora` keep as they are.

    Logit scales train nevertheless, and so do projections into the joint space that are new.
    """
    new = model.projections_are_new
    # By tower: how its parameters begin, which of these train, and its modules.
    towers = {
        "image": (r"towers\.visual\.", [r"head\."] if new else [], r"towers\.visual$"),
        "text": (
            r"towers\.",
            [r"visual\.", "logit_", *([r"text\.proj\."] if new else [])],
            r"towers\.(?!visual(\.|$))",
        ),
    }
    frozen, locked = [*stage.frozen], [*stage.locked]
    for tower, (begins, but, modules) in towers.items():
        if tower in model.locked:
            frozen.append(f"{begins}(?!{'|'.join([*but, '$'])})")
            locked.append(modules)
        elif model.lora is not None:
            frozen.append(f"{begins}(?!{'|'.join([*but, LORA])})")
    return replace(
        stage,
        frozen=tuple(frozen),
        locked=tuple(locked),
        frozen_batch_norm=model.frozen_batch_norm,
    )


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
    for name, module in model.named_modules() if stage.frozen_batch_norm else ():
        if name.startswith("towers.") and isinstance(module, _BatchNorm):
            module.eval()
