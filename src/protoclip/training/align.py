"""Aligning two frozen halves: what `protoclip align` does.

An image half and a text half that have never met encode each image and each caption once. Then
their projections into a joint space train on these features, as `train` trains towers on images,
with other defaults. The halves group the pairs too, each as an external teacher (PBT).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch

from protoclip.config import (
    HALVES,
    Config,
    EpisodeConfig,
    Settings,
    TeacherConfig,
)
from protoclip.data.captions import caption_draw
from protoclip.data.decode import decode
from protoclip.data.loader import read_image
from protoclip.data.pairs import BadSample, Pairs, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.data.view import without
from protoclip.distributed import collectives
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first
from protoclip.encode import teachers as external
from protoclip.encode.canonical import canonical_projections, second_moments
from protoclip.encode.halves import (
    encode_halves,
    features_folder,
    image_halves,
    images_at_once,
)
from protoclip.encode.rows import HalfRows, open_listing, write_listing
from protoclip.encode.stream import encode_stream
from protoclip.evaluation.validation import Judged
from protoclip.models import loading
from protoclip.models.aligned import FrozenHalves, Projection, start_projections
from protoclip.models.formats import closed_formats
from protoclip.models.precision import autocast, resolve
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.resolve import names_model
from protoclip.models.start import Start
from protoclip.models.timm import PUBLISHED
from protoclip.rules import check_amounts, require_named_pairs, require_store
from protoclip.terminal import say
from protoclip.training import sizes
from protoclip.training.choices import Choices, choices_of, given_settings
from protoclip.training.overfit import given_for_few
from protoclip.training.plan import Plan
from protoclip.training.run import train_together

PASSES = 30  # over the data
LARGEST_BATCH = 1024
GROUPS_OF_TEACHER = 2.0  # their weight; the 0.5 of `train` was chosen for towers that train
# What aligning chooses where it is not given.
CHOSEN = {
    *("run.name", "model.embed_dim"),
    *("episodes.batch_size", "episodes.size", "episodes.count", "episodes.replacement"),
    *("episodes.locked_image", "episodes.warm_up", "optim.learning_rate", "optim.warm_up_steps"),
    *("optim.weight_decay", "optim.heads_weight_decay", "optim.heads_lr_scale", "optim.betas"),
    *("loss.prototypical", "loss.teacher"),
}
NEEDS = (
    "needs two pretrained halves, as in --model.image.name timm:vit_small_patch14_dinov2.lvd142m "
    "--model.text.name minilm"
)


def align(settings: Settings, *, resume: Literal["never", "auto"] = "never") -> dict[str, Any]:
    """Train the heads between a frozen image half and a frozen text half.

    Args:
        settings: Those of `Config` as a recipe holds them, such as `{"model": {"image": {"name":
            "timm:vit_small_patch14_dinov2.lvd142m"}, "text": {"name": "minilm"}}, "data":
            {"train": "pairs.tsv"}}`. Others get the values that suit aligning: see `before_data`
            and `with_data`. Those of a `Config` that are at their default count as not given.
        resume: As for `train`.

    Returns:
        The content of `results.json`, as `train` returns.

    Raises:
        ValueError: As for `train`; or a half is missing, or cannot be one.
    """
    given = given_settings(settings)
    device = collectives.device(Config.from_dict(given).run.device)

    with collectives.process_group(device):
        few = given_for_few(given, aligns=True)
        choices = choices_of(before_data, few, resume=resume == "auto", chosen=CHOSEN)
        require_named_pairs(given, "aligning")
        return train_together(
            choices.config,
            device,
            resume=resume == "auto",
            defaults=partial(with_data, choices),
            pass_stream=partial(pass_stream, choices, device),
            encode=partial(encode, choices),
        )


def before_data(given: Mapping[str, Any]) -> Choices:
    """What is chosen before the data are opened: the halves, and what depends on nothing else.

    Raises:
        ValueError: A half is missing, or a setting is wrong or is for towers that train.
    """
    choices = Choices(given, "aligning")
    choices.require_sizes()
    config = choices.config
    model, image = config.model, config.model.image
    for setting, value in (("name", model.name), ("start", model.start)):
        if value is not None:
            raise ValueError(f"model.{setting}: is a whole model, but align {NEEDS}")
    if model.text.name is None:
        raise ValueError(f"model.text.name: align {NEEDS}")
    if "name" not in given.get("model", {}).get("image", {}):
        raise ValueError(f"model.image.name: align {NEEDS}")
    if config.align.features is not None:
        require_store("align.features", config.align.features)
    refuse(config)
    image = replace(image, name=image.name.removeprefix("timm:"))
    if not names_model("image", image.name):
        image = replace(image, weights=image.weights or PUBLISHED)
    choices.config = replace(config, model=replace(model, image=image))
    choices.choose("run.name", "aligned")
    choices.choose("model.embed_dim", 512)
    choices.choose("episodes.locked_image", 0)
    choices.choose("loss.prototypical", 0.0)  # docs/LOG.md: no prototypes helped here
    has_teacher = config.teacher.features is not None or bool(config.teachers)
    choices.choose("loss.teacher", GROUPS_OF_TEACHER if has_teacher else 0.0)
    if choices.config.loss.prototypical == 0 < choices.config.loss.teacher:
        choices.choose("episodes.warm_up", 0)
    choices.choose("optim.learning_rate", 1e-3)
    choices.choose("optim.weight_decay", 0.1)
    choices.choose("optim.betas", (0.9, 0.98))
    teacher = config.teacher
    if choices.config.loss.teacher > 0 and not has_teacher:
        halves = [replace(teacher, name=name, features=kind) for name, kind in HALVES.items()]
        teachers: list[TeacherConfig] = halves
        usual = TeacherConfig()
        choices.config = replace(choices.config, teachers=teachers, teacher=usual)
    if choices.config.uses_prototypes:  # or nothing trains the heads that they are of
        choices.choose("optim.heads_weight_decay", 0.1)
        choices.choose("optim.heads_lr_scale", 1.0)
    return choices


def refuse(config: Config) -> None:
    """Refuse what is no text half, and settings of towers that train."""
    model, parallel = config.model, config.parallel
    text = model.text.name or ""
    folder = Path(text.removeprefix("hf:"))
    if folder.is_file():
        raise ValueError(
            f"model.text.name: {text}: is a file; name a folder, or a text model of the hub"
        )
    if text.startswith("timm:") or timm.is_model(text):
        raise ValueError(
            f"model.text.name: {text}: is an image model of timm; name it by model.image.name, and "
            "a text model here, such as minilm"
        )
    after = "align leaves the halves as they are; protoclip finetune trains them afterwards"
    frozen = {
        "model.locked": model.locked,
        "model.lora": model.lora,
        "parallel.activation_checkpointing": parallel.activation_checkpointing,
        "parallel.compile": parallel.compile,
        "parallel.sync_batch_norm": parallel.sync_batch_norm,
        "loss.keep": config.loss.keep,
        "teacher.distil": any(each.distil for each in (config.teacher, *config.teachers)),
    }
    for setting, value in frozen.items():
        if value:
            raise ValueError(f"{setting}: {after}; leave it out")
    if config.optim.layer_decay < 1:
        raise ValueError(f"optim.layer_decay: {after}; leave it out")
    if parallel.strategy == "fsdp":
        raise ValueError("parallel.strategy: fsdp shards towers that train; align takes ddp")
    if config.data.captions == "sentences":
        raise ValueError(
            "data.captions: align encodes whole captions; give a table whose captions are the "
            "sentences, or leave it out"
        )


def with_data(
    choices: Choices, config: Config, start: Start, data: Judged
) -> tuple[Config, list[str]]:
    """The defaults of aligning for `plan.complete`: an episode is a pass, up to the largest one."""
    assert isinstance(data.training, Pairs)  # a stream has passed by now
    choices.config, choose = config, choices.choose
    # An image that several rows show is one sample with all their captions.
    path = write_listing(data.training, features_folder(config))
    rows = len(open_listing(path).rows)
    closed = on_exports(choices.config, start)
    read_once = ("data.augmentation", "data.cache_gb", "data.shuffle_buffer")
    idle = dict.fromkeys(read_once, "each image is read once")
    idle["model.frozen_batch_norm"] = "the halves are frozen"
    closed += [
        f"{name}: no effect, since {why}" for name, why in idle.items() if choices.is_given(name)
    ]
    if config.model.text.pooling is not None and names_model("text", config.model.text.name):
        closed.append("model.text.pooling: no effect, since the text half has one of its own")
    given = config.episodes
    usual = batch_for(given.size or rows, divides=given.size is not None)
    batch = choose("episodes.batch_size", usual)
    # In larger ones the prototypes of a teacher would grow with the pairs.
    most = min(rows, sizes.LARGEST_EPISODE)
    size = choose("episodes.size", max(batch, most // batch * batch))
    if size <= rows:
        choose("episodes.replacement", False)
    count = choose("episodes.count", sizes.episodes_with(PASSES * rows, size, batch))
    choose("optim.warm_up_steps", min(500, max(1, count * (size // batch) // 20)))
    return choices.config, choices.notes + closed


def on_exports(config: Config, start: Start) -> list[str]:
    """What to tell of formats of `protoclip export` that cannot hold the run."""
    built = start.build(on_meta=True)
    if loading.gets_logit_bias(config, start):
        built.add_logit_bias()
    config_of_towers = start.open_clip_config
    assert config_of_towers is not None  # two halves are towers of open_clip
    return [
        f"the run cannot be exported as {name}: {reason}"
        for name, reason in closed_formats(built.towers, config_of_towers).items()
    ]


def batch_for(pairs: int, *, divides: bool) -> int:
    """How many of so many pairs make a batch; if possible one that divides their number."""
    batch = 2
    while batch < LARGEST_BATCH and 4 * batch <= pairs:
        batch *= 2
    return sizes.batch_near(batch, dividing=pairs if divides else None)


def require_possible(choices: Choices, config: Config) -> None:
    """Refuse what no data make possible, before a stream passes for hours.

    Raises:
        ValueError: Given amounts do not fit.
    """
    episodes = config.episodes
    if episodes.size is not None and not choices.is_given("episodes.batch_size"):
        episodes = replace(episodes, batch_size=batch_for(episodes.size, divides=True))
    if not choices.is_given("episodes.count"):  # the pairs decide; here it is what stages need
        episodes = replace(episodes, count=episodes.warm_up + config.locked_episodes)
    check_amounts(replace(config, episodes=episodes))


def encode(choices: Choices, plan: Plan, model: ProtoCLIP) -> tuple[Plan, HalfRows]:
    """Encode all pairs of a plan by the halves of a model, and leave bad pairs out. Collective.

    An episode that was chosen shrinks to what is left.

    Raises:
        ValueError: The store cannot be used, more pairs are bad than `data.max_bad_share` says, or
            a visit cannot bring the captions that `data.captions` names.
    """
    config, samples = plan.config, plan.samples
    assert isinstance(samples, Pairs)
    halves = frozen(model)
    rows = encode_halves(
        halves,
        samples,
        tokenizer=loading.tokenizer(plan.start),
        views=[loading.evaluation_transform(model)],
        root=features_folder(config),
        threads=threads_of(config),
        **arithmetic(config, next(halves.parameters()).device),
    )
    shown, notes = rows.listing.shown, [*plan.notes]
    bad = np.flatnonzero(np.isin(shown, rows.good.left_out))
    repeated = np.flatnonzero(rows.listing.rows[shown] != np.arange(len(samples)))
    if len(also := np.setdiff1d(repeated, bad)):
        notes.append(
            f"{len(also):,} of {len(samples):,} pairs have the image of another one, "
            "which has their captions too"
        )
    if len(bad):
        example = why_bad(samples, int(bad[0]), config.data.max_image_pixels)
        said = f"{len(bad):,} of {len(samples):,} pairs cannot be used, such as {example}"
        if len(bad) > config.data.max_bad_share * len(samples):
            raise ValueError(
                f"{said}; that is more than data.max_bad_share ({config.data.max_bad_share:g}) "
                "allows; mend the data or raise it"
            )
        notes.append(f"{said}; they are left out")
    left_out = np.union1d(bad, repeated)
    if len(left_out) == len(samples):
        raise ValueError(f"{samples.name}: no pair can be used; {notes[-1]}")
    left = len(samples) - len(left_out)
    some = np.array(evenly_spaced(left, min(left, 1000), seed=0))
    compared = {"images": rows.image_rows(some), "captions": rows.mean_text_rows(some)}
    equal = [what for what, features in compared.items() if bool((features == features[0]).all())]
    if len(equal) == 2:
        raise ValueError(f"{samples.name}: fewer than two pairs differ; name other pairs, or more")
    notes += [f"all {what} are equal, so no pair can be told from another" for what in equal]
    if config.run.overfit is None:  # there all pairs may be known before the first step
        moments = second_moments(rows, next(halves.parameters()).device)
        start_projections(model, *canonical_projections(moments))
        towers: Any = model.towers
        for tower in (towers.visual, towers.text):
            for parameter in Projection(tower).parameters():  # hosts may compute other last digits
                collectives.broadcast(parameter.data)
    kept: Pairs = without(samples, left_out) if len(left_out) else samples
    episodes = config.episodes
    if config.run.overfit is not None:  # each pair that is left, in one batch
        episodes = replace(episodes, size=left, batch_size=left)
    elif len(left_out):
        episodes, said_too = fitting(choices, episodes, left)
        notes += said_too
    config = replace(config, episodes=episodes)
    captions, said_too = raise_on_all_ranks(lambda: caption_draw(config, rows))
    notes += said_too
    for name, teacher in plan.teachers.items():
        notes += raise_on_all_ranks(partial(external.unknown_to, name, teacher, kept))
    plan = replace(plan, config=config, samples=kept, captions=captions, notes=notes)
    return plan, rows


def fitting(
    choices: Choices, episodes: EpisodeConfig, pairs: int
) -> tuple[EpisodeConfig, list[str]]:
    """Episodes of the pairs that are left: what was chosen adapts. And notes on it."""
    notes, batch = list[str](), episodes.batch_size
    if pairs < episodes.size and not choices.is_given("episodes.size"):
        size = max(batch, pairs // batch * batch)
        if size != episodes.size:
            notes.append(f"episodes.size = {size}, so that an episode fits into what is left")
        episodes = replace(episodes, size=size)
    is_chosen = not choices.is_given("episodes.replacement")
    if pairs < episodes.size and is_chosen and not episodes.replacement:
        notes.append("episodes.replacement = true, since an episode is larger than what is left")
        episodes = replace(episodes, replacement=True)
    return episodes, notes


def pass_stream(
    choices: Choices, device: torch.device, config: Config, start: Start, stream: SampleStream
) -> Pairs:
    """Encode the images of a stream as they pass, each once, and keep the captions. Collective.

    Raises:
        ValueError: As `encode`; or settings do not go together, whatever passes.
    """
    rank0_first(lambda: require_possible(choices, config))
    if config.external_teachers:  # or hours pass before they are refused
        told: list[str] = []
        raise_on_all_ranks(lambda: external.teachers(config, stream, told.append))
        for note in told if rank() == 0 else ():
            say(f"note: {note}")
    model = loading.to_device(loading.model(start, seed=config.run.seed), device)
    halves, root = frozen(model), features_folder(config)
    return encode_stream(
        stream,
        image_halves(
            halves, [loading.evaluation_transform(model)], root, **arithmetic(config, device)
        ),
        root,
        batch_size=images_at_once(halves),
        max_bad_share=config.data.max_bad_share,
        threads=threads_of(config),
    )


def frozen(model: ProtoCLIP) -> FrozenHalves:
    return FrozenHalves(model.towers).eval().requires_grad_(False)


def arithmetic(config: Config, device: torch.device) -> dict[str, Any]:
    """What decides about features besides the halves and the transforms."""
    return {
        "max_pixels": config.data.max_image_pixels,
        "autocast": autocast(resolve(config.run.precision, device), device),
    }


def threads_of(config: Config) -> int | None:
    workers = config.data.workers
    return None if workers == "auto" else max(1, workers)


def why_bad(samples: Pairs, row: int, max_pixels: int) -> str:
    """What is wrong with a pair, in words."""
    try:
        read_image(samples, row, partial(decode, max_pixels=max_pixels))
    except BadSample as error:
        return str(error)
    return f"sample '{samples.sample_id(row)}', which can be read by now"
