"""From the configuration to devices, models and views, and from a run folder back to a model."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from protoclip.config import (
    SMALL_CONTEXT_LENGTH,
    SMALL_IMAGE_SIZE,
    Config,
    HeadConfig,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)
from protoclip.data.transforms import (
    EvaluationTransform,
    TrainingTransform,
    clip_transform,
    light_transform,
)
from protoclip.distributed.collectives import (
    raise_on_all_ranks,
    rank,
    world_size,
)
from protoclip.distributed.parallel import shard, spread
from protoclip.models import batch_norm
from protoclip.models.heads import projection_head
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import (
    TokenCounter,
    Tokenizer,
    build_tokenizer,
    embedding_width,
    image_normalisation,
    image_size,
    named_towers,
    small_towers,
)
from protoclip.training.checkpoint import (
    MODEL,
    find_checkpoint,
    read_json,
    read_weights,
    require_intact,
    verified,
)


def model(config: ModelConfig, *, seed: int) -> ProtoCLIP:
    """The model with new weights, or with those of `config.checkpoint`.

    The weights are a function of the seed; the global random state is left as it was.

    Raises:
        ValueError: There is no such model, or the checkpoint is damaged or another model's.
    """
    folder = None if config.checkpoint is None else find_checkpoint(config.checkpoint)
    with (
        torch.random.fork_rng(devices=[]),
        nullcontext() if folder is None else verified(folder),
    ):
        # The CPU's generator alone, as `torch.manual_seed` would seed every GPU's too.
        torch.default_generator.manual_seed(seed)
        built = architecture(config, weights="published" if folder is None else "new")
    if folder is not None:
        built.load_state_dict(read_weights(folder, built))
    return built


def architecture(config: ModelConfig, *, weights: Literal["published", "new", "none"]) -> ProtoCLIP:
    """The model, drawn from torch's global generator; on the meta device if without weights."""
    with torch.device("meta") if weights == "none" else nullcontext():
        if config.name is not None:
            towers = named_towers(
                config.name,
                pretrained=config.pretrained,
                image_size=config.image.size,
                context_length=config.text.context_length,
                weights=weights,
            )
        else:
            towers = small_towers(
                embed_dim=config.embed_dim,
                image_model=config.image.name,
                image_size=config.image.size or SMALL_IMAGE_SIZE,
                context_length=config.text.context_length or SMALL_CONTEXT_LENGTH,
                text_width=config.text.width,
                text_heads=config.text.heads,
                text_layers=config.text.layers,
            )
        head = projection_head(
            embed_dim=embedding_width(config.name) if config.name else config.embed_dim,
            hidden_dim=config.heads.hidden_dim,
            hidden_layers=config.heads.hidden_layers,
            projection_dim=config.heads.projection_dim,
        )
        return ProtoCLIP(towers, head)


def training_model(config: Config, on: torch.device) -> tuple[ProtoCLIP, list[str]]:
    """The model that a run trains, on its device, as `[parallel]` asks for. All processes call it.

    Returns:
        The model, and what to say about it at the start.

    With FSDP the first process alone holds the whole model, on its CPU, until the others have their
    shards of it.

    Raises:
        ValueError: As `model` does, or the towers cannot do what is asked.
    """
    sharded = config.parallel.strategy == "fsdp" and world_size() > 1

    def build_own() -> tuple[ProtoCLIP, ProtoCLIP | None, list[str]]:
        if not sharded:
            built, whole = place(model(config.model, seed=config.run.seed), on), None
        else:
            whole = model(config.model, seed=config.run.seed) if rank() == 0 else None
            with torch.random.fork_rng(devices=[]):
                built = architecture(config.model, weights="none")
        return built, whole, parallelise(config, built)

    built, whole, notes = raise_on_all_ranks(build_own)
    if sharded:
        shard(built, on)
        spread(built, whole)
    return built, notes


def place(built: ProtoCLIP, on: torch.device) -> ProtoCLIP:
    """Move a model to a device, with filters in channels-last order, where convolutions are faster.

    The order of filters in memory changes speed and last digits, nothing else.
    """
    return built.to(on, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def parallelise(config: Config, built: ProtoCLIP) -> list[str]:
    """What `[parallel]` asks for in one process, in place; names of weights stay.

    Returns:
        What to say about it at the start.

    Raises:
        ValueError: The towers cannot do what is asked.
    """
    parallel, notes = config.parallel, []
    if world_size() > 1:
        for head in (built.image_head, built.text_head):
            batch_norm.synchronise(head)
        # Statistics of one process's own would be lost where its weights are part of a whole.
        if parallel.sync_batch_norm or parallel.strategy == "fsdp":
            number = batch_norm.synchronise(built.towers)
            setting = "sync_batch_norm" if parallel.sync_batch_norm else "strategy = fsdp"
            notes = [f"parallel.{setting}: {number or 'no'} BatchNorm layers synchronised"]
    if parallel.activation_checkpointing:
        try:
            built.towers.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                "parallel.activation_checkpointing: these towers cannot do it"
            ) from error
    if parallel.compile:
        for name, part in built.towers.named_children():
            if name in ("visual", "text", "transformer"):
                part.compile()
    return notes


def tokenizer(config: ModelConfig) -> Tokenizer:
    length = config.text.context_length
    if config.name is None and length is None:
        length = SMALL_CONTEXT_LENGTH
    return build_tokenizer(config.name, context_length=length)


def token_counter(config: ModelConfig) -> TokenCounter:
    return TokenCounter(config.name)


def context_length(config: ModelConfig) -> int:
    """Tokens that the model's captions are cut to."""
    return int(tokenizer(config)(["a"]).shape[1])


def evaluation_transform(built: ProtoCLIP) -> EvaluationTransform:
    mean, std = image_normalisation(built.towers)
    return EvaluationTransform(size=image_size(built.towers), mean=mean, std=std)


def training_transform(
    built: ProtoCLIP, augmentation: Literal["light", "clip"]
) -> TrainingTransform:
    mean, std = image_normalisation(built.towers)
    transform = light_transform if augmentation == "light" else clip_transform
    return transform(size=image_size(built.towers), mean=mean, std=std)


def load(path: str | Path) -> tuple[ProtoCLIP, EvaluationTransform, Tokenizer]:
    """A trained model, ready to use.

    Args:
        path: A run folder or a checkpoint folder.

    Returns:
        The model in evaluation mode on the CPU, the image transform (a PIL picture to
        `Float[3 h w]`) and the tokenizer (`list[str]` to `Int[b c]`).

    Raises:
        ValueError: No checkpoint there, or a damaged one.
    """
    folder = find_checkpoint(path)
    require_intact(folder, MODEL)
    config = model_config(read_json(folder / MODEL), folder)
    built = model(config, seed=0)
    return built.eval(), evaluation_transform(built), tokenizer(config)


def model_config(description: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The architecture a checkpoint was saved with, and the checkpoint for its weights."""
    try:
        sections = dict(description["model"])
        sections["image"] = ImageTowerConfig(**sections["image"])
        sections["text"] = TextTowerConfig(**sections["text"])
        sections["heads"] = HeadConfig(**sections["heads"])
        return ModelConfig(**{**sections, "checkpoint": str(folder)})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: model.json was written by another version of protoclip ({error})"
        ) from error
