"""From the configuration to a training run."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from protoclip.config import Config
from protoclip.data import loader as data_loader
from protoclip.data import sampler
from protoclip.data.pairs import BadSample, Pairs, SampleStream
from protoclip.data.sampler import EXTRACTION_STREAM
from protoclip.distributed.collectives import all_reduce
from protoclip.losses.objective import LossWeights
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP
from protoclip.prototypes.features import ExtractedFeatures, QueuedFeatures
from protoclip.prototypes.kmeans import KMeans, kmeans
from protoclip.teachers import store
from protoclip.training.defaults import Optimisation, optimisation
from protoclip.training.guard import Guard
from protoclip.training.health import Health
from protoclip.training.optim import adamw
from protoclip.training.precision import Precision, autocast, grad_scaler
from protoclip.training.schedule import Schedule
from protoclip.training.stages import Plan, Stage
from protoclip.training.state import TrainState
from protoclip.training.trainer import FeatureSource, Grouping, Trainer


def cluster(config: Config) -> Callable[[str, Tensor, Tensor | None], KMeans]:
    """K-means with the settings of each space."""

    def run(space: str, rows: Tensor, positions: Tensor | None) -> KMeans:
        teacher = config.external_teachers.get(space)
        number = config.prototypes.number if teacher is None else teacher.number
        # A teacher may know fewer of an episode's samples than it has prototypes.
        number = min(number, known_rows(rows))
        return kmeans(
            rows,
            number,
            iterations=config.prototypes.iterations,
            restarts=config.prototypes.restarts,
            init=config.prototypes.init,
            seed=config.run.seed,
            positions=positions,
        )

    return run


def known_rows(rows: Tensor) -> int:
    """Rows of all processes."""
    return int(all_reduce(torch.tensor(len(rows), device=rows.device)))


def schedule(config: Config, optim: Optimisation) -> Schedule:
    steps = config.episodes.size // config.episodes.batch_size
    # Without a rate of its own the locked stage is the end of the one schedule.
    locked = config.episodes.locked_image * steps if optim.locked_learning_rate else 0
    return Schedule(
        peak=optim.learning_rate,
        warm_up=optim.warm_up_steps,
        main_steps=config.episodes.count * steps - locked,
        locked_peak=optim.locked_learning_rate,
        locked_warm_up=config.optim.locked_warm_up_steps,
        locked_steps=locked,
    )


def trainer(
    config: Config,
    *,
    model: ProtoCLIP,
    samples: Pairs | SampleStream,
    precision: Precision,
    log: Callable[[TrainState, Mapping[str, float]], None],
    save: Callable[[TrainState, Grouping | None], bool],
    evaluate: Callable[[TrainState], Mapping[str, float]],
    on_step: Callable[[TrainState, Stage], None],
    on_read: Callable[[int, list[BadSample]], None],
    diverged: Path,
    note: Callable[[str], None] = lambda text: None,
) -> Trainer:
    """The training run of a checked configuration, with what is to happen along the way.

    `diverged` is where the samples of a batch are written that a run was given up at.

    Raises:
        ValueError: The episodes do not fit the data, or teacher features are missing.
    """
    place = next(model.parameters()).device
    context = autocast(precision, place)
    loader = data_loader.loader(
        config,
        samples,
        tokenizer=loading.tokenizer(config.model),
        transform=loading.training_transform(model, config.data.augmentation),
        device=place,
        on_read=on_read,
    )
    external = store.teachers(config, samples, note)
    as_training = config.prototypes.extract_transform == "training"
    transform = loader.transform if as_training else loading.evaluation_transform(model)
    source: FeatureSource = (
        partial(QueuedFeatures, size=config.episodes.size)
        if config.prototype_source == "queue"
        else ExtractedFeatures
    )(
        model=model,
        batches=partial(loader.batches, transform=transform, stream=EXTRACTION_STREAM),
        teachers=external,
        autocast=context,
        each_pair_once=isinstance(samples, Pairs) and not as_training,
    )
    optim, _ = optimisation(config)
    optimizer = adamw(
        model,
        learning_rate=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        scales=rate_scales(config),
        weight_decays=heads_weight_decays(optim),
    )
    scaler = grad_scaler(precision, place)
    return Trainer(
        model=model,
        plan=Plan(
            num_episodes=config.episodes.count,
            warm_up=config.episodes.warm_up,
            locked_image=config.episodes.locked_image,
            prototypical=config.uses_prototypes,
        ),
        episode=sampler.episodes(config, samples),
        batches=loader.batches,
        source=source,
        cluster=cluster(config),
        weights=LossWeights(
            info_nce=config.loss.info_nce,
            prototypical=config.loss.prototypical,
            teachers={
                name: teacher.weight * config.loss.teacher
                for name, teacher in config.external_teachers.items()
            },
        ),
        target_temperatures=target_temperatures(config),
        mask_empty=config.prototypes.mask_empty,
        back_translation=config.prototypes.back_translation,
        optimizer=optimizer,
        schedule=schedule(config, optim),
        scaler=scaler,
        guard=Guard(optimizer, scaler, Health(diverged)),
        autocast=context,
        clip_norm=config.optim.clip_norm,
        micro_batch_size=config.episodes.micro_batch_size,
        log=log,
        log_every=config.run.log_every,
        save=save,
        evaluate=evaluate,
        on_step=on_step,
        position=lambda state: loader.state_dict(state.episode, state.batch, config.episodes.size),
        restore_position=loader.load_state_dict,
    )


def rate_scales(config: Config) -> dict[str, float]:
    """Factors to the learning rate by prefix of parameter names; none where they say nothing."""
    image, text, heads = (
        config.optim.image_lr_scale,
        config.optim.text_lr_scale,
        config.optim.heads_lr_scale,
    )
    # open_clip's towers are named `visual` and, where the text tower is no module, by its parts.
    towers = {"towers.visual.": image, "towers.logit_scale": 1.0, "towers.": text}
    return {
        **(towers if (image, text) != (1.0, 1.0) else {}),
        **({"image_head.": heads, "text_head.": heads} if heads != 1.0 else {}),
    }


def heads_weight_decays(optim: Optimisation) -> dict[str, float]:
    """The heads' weight decay by prefix of parameter names; none where it is everyone's."""
    own = optim.heads_weight_decay
    return {} if own == optim.weight_decay else {"image_head.": own, "text_head.": own}


def target_temperatures(config: Config) -> dict[str, float]:
    """Target temperature by teacher space; 0 stands for hard targets."""
    own = 0.0 if config.prototypes.hard_targets else config.prototypes.target_temperature
    external = {
        name: 0.0 if teacher.hard_targets else teacher.target_temperature
        for name, teacher in config.external_teachers.items()
    }
    return {"image": own, "text": own, **external}
