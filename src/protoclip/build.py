"""From the configuration to objects; the only place, besides the command line, that reads it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from protoclip.clustering import KMeans, kmeans
from protoclip.config import Config, HeadConfig, ImageTowerConfig, ModelConfig, TextTowerConfig
from protoclip.data.bundled import emoji_table, emoji_teacher_path
from protoclip.data.episodes import EpisodeSampler
from protoclip.data.loader import EpisodeLoader
from protoclip.data.pairs import ImageTextPairs, read_parquet
from protoclip.data.transforms import EvaluationView, TrainingView, clip_view, light_view
from protoclip.features import ExtractedFeatures
from protoclip.losses import LossWeights
from protoclip.models.heads import projection_head
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import (
    Tokenizer,
    build_tokenizer,
    image_normalisation,
    image_size,
    named_towers,
    small_towers,
)
from protoclip.teachers import TeacherFeatures, read_teacher
from protoclip.train.checkpoint import find_checkpoint, load_weights, read_description
from protoclip.train.optim import adamw
from protoclip.train.precision import Precision, autocast, grad_scaler
from protoclip.train.schedule import Schedule
from protoclip.train.stages import Plan, Stage
from protoclip.train.state import TrainState
from protoclip.train.trainer import Trainer


def device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one.

    Raises:
        ValueError: No such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"run.device: '{name}' cannot be used here ({reason})") from error
    return chosen


def model(config: ModelConfig, *, seed: int) -> ProtoCLIP:
    """The model with new weights, or with those of `config.checkpoint`.

    The weights are a function of the seed; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.name is not None:
            towers = named_towers(config.name, pretrained=config.pretrained)
        else:
            towers = small_towers(
                embed_dim=config.embed_dim,
                image_model=config.image.name,
                image_size=config.image.size,
                context_length=config.text.context_length,
                text_width=config.text.width,
                text_heads=config.text.heads,
                text_layers=config.text.layers,
            )
        head = projection_head(
            embed_dim=joint_width(towers, config),
            hidden_dim=config.heads.hidden_dim,
            hidden_layers=config.heads.hidden_layers,
            projection_dim=config.heads.projection_dim,
        )
        built = ProtoCLIP(towers, head)
    if config.checkpoint is not None:
        load_weights(built, find_checkpoint(config.checkpoint))
    return built


def place(built: ProtoCLIP, on: torch.device) -> ProtoCLIP:
    """Move a model to a device, with filters in channels-last order, where convolutions are faster.

    The order of filters in memory changes speed and last digits, nothing else.
    """
    return built.to(on, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def joint_width(towers: nn.Module, config: ModelConfig) -> int:
    """Width of the joint space, which only a forward pass tells for every open_clip model."""
    if config.name is None:
        return config.embed_dim
    tokens = tokenizer(config)(["a"])
    towers.eval()
    with torch.inference_mode():
        width = towers.encode_text(tokens).shape[-1]  # type: ignore[operator]
    towers.train()
    return int(width)


def tokenizer(config: ModelConfig) -> Tokenizer:
    return build_tokenizer(config.name, context_length=config.text.context_length)


def evaluation_view(built: ProtoCLIP) -> EvaluationView:
    mean, std = image_normalisation(built.towers)
    return EvaluationView(size=image_size(built.towers), mean=mean, std=std)


def training_view(built: ProtoCLIP, augmentation: Literal["light", "clip"]) -> TrainingView:
    mean, std = image_normalisation(built.towers)
    view = light_view if augmentation == "light" else clip_view
    return view(size=image_size(built.towers), mean=mean, std=std)


def pairs(config: Config) -> ImageTextPairs:
    """The training pairs.

    Raises:
        ValueError: The file is missing or not of the right form.
    """
    if config.data.train == "emoji":
        found = ImageTextPairs(
            emoji_table("train"), name="emoji", cache_images=config.data.cache_images
        )
    else:
        found = read_parquet(config.data.train, cache_images=config.data.cache_images)
    if config.data.shuffle_captions:
        order = np.random.default_rng(config.run.seed).permutation(len(found))
        found = found.with_captions([found.caption(int(row)) for row in order])
    return found


def teachers(config: Config, samples: ImageTextPairs) -> dict[str, TeacherFeatures]:
    """The external teachers by name, checked to know every training sample."""
    if not config.uses_teacher:
        return {}
    assert config.teacher.features is not None
    bundled = config.teacher.features == "emoji"
    features = read_teacher(emoji_teacher_path() if bundled else config.teacher.features)
    features.require(samples.sample_ids.tolist())
    return {"teacher": features}


def cluster(config: Config) -> Callable[[str, Tensor], KMeans]:
    """K-means with the settings of each space."""

    def run(space: str, rows: Tensor) -> KMeans:
        number = config.teacher.number if space == "teacher" else config.prototypes.number
        return kmeans(
            rows,
            number,
            iterations=config.prototypes.iterations,
            restarts=config.prototypes.restarts,
            seed=config.run.seed,
        )

    return run


def schedule(config: Config) -> Schedule:
    steps = config.episodes.size // config.episodes.batch_size
    locked = config.episodes.locked_image * steps
    return Schedule(
        peak=config.optim.learning_rate,
        warm_up=config.optim.warm_up_steps,
        main_steps=config.episodes.count * steps - locked,
        locked_peak=config.optim.locked_learning_rate,
        locked_warm_up=config.optim.locked_warm_up_steps,
        locked_steps=locked,
    )


def trainer(
    config: Config,
    *,
    model: ProtoCLIP,
    samples: ImageTextPairs,
    precision: Precision,
    log: Callable[[TrainState, Mapping[str, float]], None],
    save: Callable[[TrainState], None],
    evaluate: Callable[[TrainState], Mapping[str, float]],
    on_step: Callable[[TrainState, Stage], None],
) -> Trainer:
    """The training run of a checked configuration, with what is to happen along the way.

    Raises:
        ValueError: The episodes do not fit the data, or teacher features are missing.
    """
    place = next(model.parameters()).device
    sampler = EpisodeSampler(
        len(samples),
        config.episodes.size,
        seed=config.run.seed,
        replacement=config.episodes.replacement,
    )
    context = autocast(precision, place)
    loader = EpisodeLoader(
        pairs=samples,
        tokenizer=tokenizer(config.model),
        view=training_view(model, config.data.augmentation),
        batch_size=config.episodes.batch_size,
        seed=config.run.seed,
        device=place,
        workers=config.data.workers,
    )
    external = teachers(config, samples)
    source = ExtractedFeatures(
        model=model,
        batches=dataclasses.replace(loader, view=evaluation_view(model)).batches,
        teachers=external,
        autocast=context,
    )
    return Trainer(
        model=model,
        plan=Plan(
            num_episodes=config.episodes.count,
            warm_up=config.episodes.warm_up,
            locked_image=config.episodes.locked_image,
            prototypical=config.uses_prototypes,
        ),
        episode=sampler.episode,
        batches=loader.batches,
        source=source,
        cluster=cluster(config),
        weights=LossWeights(
            info_nce=config.loss.info_nce,
            prototypical=config.loss.prototypical,
            teachers=dict.fromkeys(external, config.loss.teacher),
        ),
        target_temperatures=target_temperatures(config),
        mask_empty=config.prototypes.mask_empty,
        back_translation=config.prototypes.back_translation,
        optimizer=adamw(
            model,
            learning_rate=config.optim.learning_rate,
            betas=config.optim.betas,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
        ),
        schedule=schedule(config),
        scaler=grad_scaler(precision, place),
        autocast=context,
        clip_norm=config.optim.clip_norm,
        log=log,
        log_every=config.run.log_every,
        save=save,
        evaluate=evaluate,
        on_step=on_step,
    )


def target_temperatures(config: Config) -> dict[str, float]:
    """Target temperature by teacher space; 0 stands for hard targets."""
    own = 0.0 if config.prototypes.hard_targets else config.prototypes.target_temperature
    external = 0.0 if config.teacher.hard_targets else config.teacher.target_temperature
    return {"image": own, "text": own, "teacher": external}


def load(path: str | Path) -> tuple[ProtoCLIP, EvaluationView, Tokenizer]:
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
    config = model_config(read_description(folder), folder)
    built = model(config, seed=0)
    load_weights(built, folder)
    return built.eval(), evaluation_view(built), tokenizer(config)


def model_config(description: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The architecture a checkpoint was saved with; weights come from the checkpoint alone."""
    try:
        sections = dict(description["model"])
        sections["image"] = ImageTowerConfig(**sections["image"])
        sections["text"] = TextTowerConfig(**sections["text"])
        sections["heads"] = HeadConfig(**sections["heads"])
        return ModelConfig(**{**sections, "pretrained": None, "checkpoint": None})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: model.json was written by another version of protoclip ({error})"
        ) from error
