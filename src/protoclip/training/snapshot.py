"""All that a run needs to go on as if it had not stopped, as tensors and JSON-able facts."""

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from protoclip.distributed.collectives import (
    all_gather_object,
    all_reduce,
    rank,
    world_size,
)
from protoclip.distributed.parallel import load_moments, moments, weights
from protoclip.losses.prototypical import Target
from protoclip.prototypes.kmeans import KMeans
from protoclip.training.checkpoint import FORMAT, Contents
from protoclip.training.state import TrainState
from protoclip.training.trainer import Grouping, Trainer


def take(trainer: Trainer, state: TrainState, grouping: Grouping | None) -> Contents:
    """Copies of all that `restore` needs, on the CPU; of the first process, empty in others.

    Args:
        trainer: Of which model, optimizer, scaler and feature queue are kept.
        state: Where the run stands, between two steps.
        grouping: The prototypes of the episode that is under way; None between episodes.
    """
    trainer.guard.look()
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {
        "format": FORMAT,
        "state": asdict(state),
        "scaler": trainer.scaler.state_dict(),
        "health": [trainer.guard.health.skipped, trainer.guard.health.in_a_row],
    }
    for number, states in enumerate(all_gather_object(random_states())):
        tensors |= {f"random/{kind}/{number}": value for kind, value in states.items()}
    source = trainer.source.state_dict()
    facts["source"] = {k: v for k, v in source.items() if not isinstance(v, Tensor)}
    tensors |= {f"source/{k}": v for k, v in source.items() if isinstance(v, Tensor)}
    if grouping is not None:
        for space, marks in grouping.reached.items():
            tensors[f"reached/{space}"] = all_reduce(marks, "max")
    whole, optimizer = weights(trainer.model), moments(trainer.model, trainer.optimizer)
    if rank() > 0:
        return Contents(weights={}, optimizer={}, tensors={}, facts={})
    if grouping is not None:
        # A file of tensors has an order of its own, and sums of losses depend on theirs.
        facts["clusters"] = {
            space: {"inertia": found.inertia, "history": found.history}
            for space, found in grouping.prototypes.items()
        }
        facts["targets"] = list(grouping.targets)
        for space, found in grouping.prototypes.items():
            tensors |= fields(f"prototypes/{space}", found)
        for (student, teacher), target in grouping.targets.items():
            tensors |= fields(f"targets/{student}/{teacher}", target)
    kept = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
    return Contents(weights=whole, optimizer=optimizer, tensors=kept, facts=copy.deepcopy(facts))


def random_states() -> dict[str, Tensor]:
    """Of this process's global generators, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def fields(prefix: str, parts: KMeans | Target) -> dict[str, Tensor]:
    return {
        f"{prefix}/{name}": value
        for name, value in vars(parts).items()
        if isinstance(value, Tensor)
    }


def restore(
    trainer: Trainer,
    optimizer: dict[str, Tensor],
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
) -> tuple[TrainState, Grouping | None]:
    """Put a trainer, whose model has its weights already, where `take` found it.

    All processes call it with the tensors and facts, the first one alone with the optimizer's. With
    another number of processes than before, their random states start from the seed again.
    """
    device = next(trainer.model.parameters()).device
    load_moments(trainer.model, trainer.optimizer, optimizer)
    if facts["scaler"]:
        trainer.scaler.load_state_dict(facts["scaler"])
    health = trainer.guard.health
    health.skipped, health.in_a_row = facts["health"]
    if len(under(tensors, "random/cpu")) == world_size():
        torch.set_rng_state(tensors[f"random/cpu/{rank()}"])
        if torch.cuda.is_available() and f"random/cuda/{rank()}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/cuda/{rank()}"])
    trainer.source.load_state_dict({**facts["source"], **under(tensors, "source")})
    stored = grouped(tensors, "prototypes", device)
    prototypes = {
        name: KMeans(**stored[name], inertia=found["inertia"], history=tuple(found["history"]))
        for name, found in facts.get("clusters", {}).items()
    }
    stored = grouped(tensors, "targets", device)
    targets = {
        (student, teacher): Target(**stored[f"{student}/{teacher}"])
        for student, teacher in facts.get("targets", [])
    }
    reached = {space: marks.to(device) for space, marks in under(tensors, "reached").items()}
    grouping = None
    if prototypes:
        grouping = Grouping(prototypes=prototypes, targets=targets, reached=reached)
    return TrainState(**facts["state"]), grouping


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def grouped(
    tensors: dict[str, Tensor], prefix: str, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """The parts of each object that was stored below a prefix."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in under(tensors, prefix).items():
        name, _, part = key.rpartition("/")
        found.setdefault(name, {})[part] = value.to(device)
    return found
