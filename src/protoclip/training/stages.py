"""The stages of a run: what each one trains, and whether it uses prototypes.

Learning rates by step are in `optim.py`, and the loop over episodes is in `run.py`.
"""

from dataclasses import dataclass, replace

from torch.nn.modules.batchnorm import _BatchNorm

from protoclip.config import Config, ModelConfig
from protoclip.distributed import parallel
from protoclip.models.protoclip import PROJECTIONS, ProtoCLIP

HEADS = ("image_head.", "text_head.", "prototype_logit_scale")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training. The function `trains` says which parameters train in it.

    Attributes:
        needs_prototypes: The heads train, by the prototypical losses.
        projects: The heads run. In the warm-up they do so without a loss, so that their BatchNorm
            statistics fit the features of the first clustering.
        locks_image: The image tower and the heads stay as they are.
        locked: Towers (`image`, `text`) that stay as they are, BatchNorm statistics included.
        lora: Of the other towers only adapters train.
        new_projections: Projections into the joint space are new, and train in spite of that.
        frozen_batch_norm: BatchNorms of the towers keep their statistics; gains and biases train.
    """

    name: str
    needs_prototypes: bool = False
    projects: bool = False
    locks_image: bool = False
    locked: tuple[str, ...] = ()
    lora: bool = False
    new_projections: bool = False
    frozen_batch_norm: bool = False


CONTRASTIVE = Stage(name="contrastive")
WARM_UP = Stage(name="warm-up", projects=True)
PROTOTYPICAL = Stage(name="prototypical", needs_prototypes=True, projects=True)
LOCKED_IMAGE = Stage(name="locked image", locks_image=True)


def stage_of(config: Config, episode: int) -> Stage:
    """The stage of an episode, counted from 0: warm-up, prototypical, and last with a locked image
    tower (LiT, Zhai et al. 2022). Without prototypes the first two are one, as in CLIP."""
    if episode >= config.episodes.count - config.locked_episodes:
        stage = LOCKED_IMAGE
    elif not config.uses_prototypes:
        stage = CONTRASTIVE
    else:
        stage = WARM_UP if episode < config.episodes.warm_up else PROTOTYPICAL
    return limited(stage, config.model)


def limited(stage: Stage, model: ModelConfig) -> Stage:
    """The stage with the limits that `[model]` sets in every stage: what is locked or frozen."""
    return replace(
        stage,
        locked=tuple(model.locked),
        lora=model.lora is not None,
        new_projections=model.projections_are_new,
        frozen_batch_norm=model.frozen_batch_norm,
    )


def trains(name: str, stage: Stage) -> bool:
    """Whether a parameter of `ProtoCLIP`, by its name, trains in a stage.

    The towers' logit scale and bias always do.
    """
    if name.startswith(HEADS):
        return stage.needs_prototypes
    assert name.startswith("towers."), f"{name} is of no tower"
    if name.startswith("towers.logit_"):
        return True
    tower = "image" if name.startswith("towers.visual.") else "text"
    if tower == "image" and stage.locks_image:
        return False
    if stage.new_projections and name.removeprefix("towers.").startswith(PROJECTIONS):
        return True
    return tower not in stage.locked and (not stage.lora or ".lora_" in name)


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
        if tower in stage.locked or (tower == "image" and stage.locks_image):
            part.eval()
    if stage.frozen_batch_norm:
        for module in model.towers.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
