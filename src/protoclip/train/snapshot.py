"""All that a run needs to go on as if it had not stopped, as tensors and JSON-able facts."""

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from protoclip.features import QueuedFeatures
from protoclip.losses import PreparedTarget
from protoclip.prototypes import Prototypes
from protoclip.train.state import TrainState
from protoclip.train.trainer import Grouping, Trainer


def take(
    trainer: Trainer, state: TrainState, grouping: Grouping | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of what `restore` needs besides the model's weights.

    Args:
        trainer: Of which optimizer, scaler and feature queue are kept.
        state: Where the run stands, between two steps.
        grouping: The prototypes of the episode that is under way; None between episodes.
    """
    optimizer = trainer.optimizer.state_dict()
    tensors = {
        f"optimizer/{number}/{name}": value
        for number, values in optimizer["state"].items()
        for name, value in values.items()
    }
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer["param_groups"]
    ]
    facts: dict[str, Any] = {
        "state": asdict(state),
        "optimizer": groups,
        "scaler": trainer.scaler.state_dict(),
    }
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    if isinstance(trainer.source, QueuedFeatures):
        queue = trainer.source.queue
        facts["queue"] = {"pushed": queue.pushed, "sample_ids": queue.sample_ids}
        if queue.image is not None and queue.text is not None:
            tensors |= {"queue/image": queue.image, "queue/text": queue.text}
    if grouping is not None:
        # A file of tensors has an order of its own, and sums of losses depend on theirs.
        facts["order"] = [*grouping.prototypes, *grouping.targets]
        for space, found in grouping.prototypes.items():
            tensors |= fields(f"prototypes/{space}", found)
        for name, target in grouping.targets.items():
            tensors |= fields(f"targets/{name}", target)
    kept = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
    return kept, copy.deepcopy(facts)


def fields(prefix: str, parts: Prototypes | PreparedTarget) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in vars(parts).items()}


def restore(
    trainer: Trainer, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> tuple[TrainState, Grouping | None]:
    """Put a trainer, whose model has its weights already, where `take` found it."""
    device = next(trainer.model.parameters()).device
    optimizer = trainer.optimizer.state_dict()
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in under(tensors, "optimizer").items():
        number, _, name = key.partition("/")
        like = parameters[int(number)]
        # Fused AdamW walks through memory, so moments need the order of their parameter there.
        moment = torch.empty_like(like, dtype=value.dtype).copy_(value) if value.ndim else value
        moments.setdefault(int(number), {})[name] = moment
    groups = [
        {**own, **kept}
        for own, kept in zip(optimizer["param_groups"], facts["optimizer"], strict=True)
    ]
    for group in groups:  # JSON has no tuples
        group["betas"] = tuple(group["betas"])
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if facts["scaler"]:
        trainer.scaler.load_state_dict(facts["scaler"])
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    if isinstance(trainer.source, QueuedFeatures) and "queue" in facts:
        queue = trainer.source.queue
        queue.pushed = facts["queue"]["pushed"]
        queue.sample_ids = list(facts["queue"]["sample_ids"])
        if "queue/image" in tensors:
            queue.image = tensors["queue/image"].to(device)
            queue.text = tensors["queue/text"].to(device)
    order: list[str] = facts.get("order", [])
    stored = gathered(tensors, "prototypes", device)
    prototypes = {name: Prototypes(**stored[name]) for name in order if name in stored}
    stored = gathered(tensors, "targets", device)
    targets = {name: PreparedTarget(**stored[name]) for name in order if name in stored}
    grouping = Grouping(prototypes=prototypes, targets=targets) if prototypes else None
    return TrainState(**facts["state"]), grouping


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def gathered(
    tensors: dict[str, Tensor], prefix: str, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """The parts of each object that was stored below a prefix."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in under(tensors, prefix).items():
        name, _, part = key.rpartition("/")
        found.setdefault(name, {})[part] = value.to(device)
    return found
