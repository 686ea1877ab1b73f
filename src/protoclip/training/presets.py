"""What a command chooses for settings that are not given: `align`, `finetune`, and `run.overfit`.

Here unset means that the user did not give a setting, be it at its default: a question of the
command, which is answered before the plan. In `plan.py` unset is a setting without a value. The
values that depend on nothing else are in `defaults.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import timm

from protoclip.config import HALVES, START, Config, TeacherConfig, shown, tree_of
from protoclip.data.loader import share_of
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.distributed.collectives import rank
from protoclip.encode.halves import features_folder
from protoclip.encode.rows import open_listing, write_listing
from protoclip.models import loading
from protoclip.models.formats import closed_formats
from protoclip.models.resolve import names_model
from protoclip.models.start import Start
from protoclip.models.timm import PUBLISHED
from protoclip.rules import (
    check_amounts,
    check_sizes,
    require_named_pairs,
    require_start,
    require_store,
)
from protoclip.terminal import say
from protoclip.training import optim, sizes
from protoclip.training.defaults import ALIGN, FINETUNE

Command = Literal["train", "align", "finetune"]
WORK = {"align": "aligning", "finetune": "fine-tuning"}
OVERFIT_STEPS = 500  # after which `run.overfit` gives the pairs up
ALIGN_PASSES = 30  # over the data
ALIGN_LARGEST_BATCH = 1024
GROUPS_OF_TEACHER = 2.0  # their weight; the 0.5 of `train` was chosen for towers that train
NEEDS = (
    "needs two pretrained halves, as in --model.image.name timm:vit_small_patch14_dinov2.lvd142m "
    "--model.text.name minilm"
)
# finetune
FINETUNE_PASSES = 5  # over the images
LARGEST_EPISODE, LARGEST_BATCH, SMALLEST_BATCH = 200_000, 512, 16
NEARLY_ALL = 0.99  # share of pairs with an image of their own, below which a note says so
LEAST_STEPS = 32  # in a pass over the data, if batches can be small enough


class Choices:
    """The settings that a command was given, and what it chooses for others.

    Attributes:
        given: As a recipe holds them.
        config: The settings that are given and those that were chosen so far.
        alpha: That of `finetune`, if it was given.
    """

    def __init__(
        self, command: Command, given: Mapping[str, Any], *, alpha: float | None = None
    ) -> None:
        self.command, self.given, self.config = command, given, Config.from_dict(given)
        self.alpha = alpha
        self.chosen: dict[str, dict[str, Any]] = {}

    def is_given(self, name: str) -> bool:
        section, key = name.split(".")
        given = self.given.get(section, {})
        # Here what is None is unset, and else would get what `train` chooses.
        is_open = section in ("optim", "episodes")
        return key in given and not (is_open and given[key] is None)

    def choose(self, name: str, value: Any) -> Any:
        """The value of a setting: what is given, else this one."""
        section, key = name.split(".")
        values = getattr(self.config, section)
        if self.is_given(name):
            return getattr(values, key)
        self.chosen.setdefault(section, {})[key] = value
        self.config = replace(self.config, **{section: replace(values, **{key: value})})
        return value

    @property
    def notes(self) -> list[str]:
        """One for each section."""
        return [
            f"for {WORK[self.command]}: "
            + ", ".join(f"{section}.{key} = {shown(value)}" for key, value in values.items())
            for section, values in self.chosen.items()
        ]


def read_given(command: Command, settings: Any) -> dict[str, Any]:
    """The settings that a command was given, as a recipe holds them, with those of `run.overfit`.

    Of a `Config` these are the ones that differ from the defaults.

    Raises:
        ValueError: They hold no settings, or wrong ones, or lack what the command needs.
    """
    tree = Config.from_dict(settings) if isinstance(settings, Config) else tree_of(settings)
    given = given_in(tree, Config())
    config = Config.from_dict(given)
    if command == "finetune":
        require_start(config)
        require_named_pairs(given, WORK[command])
    if config.run.overfit is None:
        return given
    decided = overfit_settings(config)
    if command == "align":
        decided["align"] = {"dropout": 0.0, "geometry": 0.0}
    return given | {name: {**given.get(name, {}), **values} for name, values in decided.items()}


def given_in(section: Any, usual: Any) -> dict[str, Any]:
    """All settings of a mapping; of a dataclass those that are not as in `usual`."""
    is_mapping, given = isinstance(section, Mapping), dict[str, Any]()
    for name, value in (section if is_mapping else vars(section)).items():
        default = getattr(usual, str(name), None)
        if is_mapping or value != default:
            is_section = isinstance(value, Mapping) or hasattr(value, "__dataclass_fields__")
            given[name] = given_in(value, default) if is_section else value
    return given


def overfit_settings(config: Config) -> dict[str, dict[str, Any]]:
    """What `run.overfit` decides: one batch of all pairs a step, by the instance loss alone, and
    nothing that keeps a model from learning by heart. The rate and the model stay."""
    number, validation = config.run.overfit, config.data.validation
    if validation is not None and validation != 0 and rank() == 0:
        say("note: data.validation: no effect, since run.overfit holds no pairs out")
    return {
        "run": {
            **{"log_every": 1, "evaluate": False, "evaluate_every": 0, "guard": []},
            **{"keep_best": None, "stop_by": None},
        },
        "data": {"validation": None if config.data.is_emoji else 0.0},
        "episodes": {
            **{"size": number, "batch_size": number, "count": OVERFIT_STEPS, "replacement": False},
            **{"warm_up": 0, "locked_image": 0},
        },
        "loss": {"info_nce": 1.0, "prototypical": 0.0, "teacher": 0.0, "keep": 0.0},
        "optim": {"warm_up_steps": 10},
    }


def choose_before_data(
    command: Command, given: Mapping[str, Any], *, alpha: float | None = None
) -> Choices:
    """What a command chooses before the data are opened.

    Raises:
        ValueError: A setting is wrong, or is none of this command.
    """
    choices = Choices(command, given, alpha=alpha)
    if command == "train":
        return choices
    episodes = choices.config.episodes
    # Sizes that do not fit are refused before hours of reading or encoding.
    if choices.is_given("episodes.batch_size") and choices.config.run.overfit is None:
        share_of(episodes.batch_size)
        if choices.is_given("episodes.size"):
            check_sizes(episodes)
    if command == "align":
        choose_to_align(choices)
    else:
        choose_to_finetune(choices)
    return choices


def choose_with_data(
    choices: Choices,
    config: Config,
    start: Start,
    training: Pairs | SampleStream,
    *,
    is_judged: bool,
) -> tuple[Config, list[str]]:
    """The settings with what a command chooses by the pairs to train on; notes on all it chose.

    Args:
        is_judged: Whether pairs are held out, or a guard is named.

    Raises:
        ValueError: A stream has no length, or nothing judges the weights that fine-tuning could
            choose.
    """
    choices.config = config
    if choices.command == "finetune" and choices.alpha is None and not is_judged:
        raise ValueError(
            "alpha: nothing judges the models between start and end; hold out pairs "
            "(data.validation), name a guard, or give an alpha"
        )
    if choices.command == "align":
        assert isinstance(training, Pairs)  # a stream has passed by now
        notes = choose_to_align_pairs(choices, start, training)
    elif choices.command == "finetune":
        notes = choose_to_finetune_on(choices, start, training)
    else:
        return config, []
    return choices.config, choices.notes + notes


# `align`: heads between two frozen encoders


def choose_to_align(choices: Choices) -> None:
    """The halves, and what depends on nothing else.

    Raises:
        ValueError: A half or pairs are missing, or a setting is wrong or is for towers that train.
    """
    config = choices.config
    model, image, teacher = config.model, config.model.image, config.teacher
    for setting, value in (("name", model.name), ("start", model.start)):
        if value is not None:
            raise ValueError(f"model.{setting}: is a whole model, but align {NEEDS}")
    if model.text.name is None:
        raise ValueError(f"model.text.name: align {NEEDS}")
    if "name" not in choices.given.get("model", {}).get("image", {}):
        raise ValueError(f"model.image.name: align {NEEDS}")
    if config.align.features is not None:
        require_store("align.features", config.align.features)
    refuse_for_align(config)
    image = replace(image, name=image.name.removeprefix("timm:"))
    if not names_model("image", image.name):
        image = replace(image, weights=image.weights or PUBLISHED)
    choices.config = replace(config, model=replace(model, image=image))
    for name, value in ALIGN.items():
        choices.choose(name, value)
    has_teacher = teacher.features is not None or bool(config.teachers)
    choices.choose("loss.teacher", GROUPS_OF_TEACHER if has_teacher else 0.0)
    if choices.config.loss.prototypical == 0 < choices.config.loss.teacher:
        choices.choose("episodes.warm_up", 0)
    if choices.config.loss.teacher > 0 and not has_teacher:
        halves = [replace(teacher, name=name, features=kind) for name, kind in HALVES.items()]
        choices.config = replace(choices.config, teachers=halves, teacher=TeacherConfig())
    if choices.config.uses_prototypes:  # or nothing trains the heads that they are of
        choices.choose("optim.heads_weight_decay", 0.1)
        choices.choose("optim.heads_lr_scale", 1.0)
    require_named_pairs(choices.given, WORK["align"])


def refuse_for_align(config: Config) -> None:
    """Refuse what is no text half, and settings of towers that train."""
    model, parallel = config.model, config.parallel
    text = model.text.name or ""
    if Path(text.removeprefix("hf:")).is_file():
        raise ValueError(
            f"model.text.name: {text}: is a file; name a folder, or a text model of the hub"
        )
    if text.startswith("timm:") or timm.is_model(text):
        raise ValueError(
            f"model.text.name: {text}: is an image model of timm; name it by model.image.name, and "
            "a text model here, such as minilm"
        )
    towers_train = {
        "model.locked": model.locked,
        "model.lora": model.lora,
        "optim.layer_decay": config.optim.layer_decay < 1,
        "parallel.activation_checkpointing": parallel.activation_checkpointing,
        "parallel.compile": parallel.compile,
        "parallel.sync_batch_norm": parallel.sync_batch_norm,
        "loss.keep": config.loss.keep,
        "teacher.distil": any(each.distil for each in (config.teacher, *config.teachers)),
    }
    for setting, value in towers_train.items():
        if value:
            raise ValueError(
                f"{setting}: align leaves the halves as they are; protoclip finetune trains them "
                "afterwards; leave it out"
            )
    if parallel.strategy == "fsdp":
        raise ValueError("parallel.strategy: fsdp shards towers that train; align takes ddp")
    if config.data.captions == "sentences":
        raise ValueError(
            "data.captions: align encodes whole captions; give a table whose captions are the "
            "sentences, or leave it out"
        )


def choose_to_align_pairs(choices: Choices, start: Start, pairs: Pairs) -> list[str]:
    """Episodes, by the pairs: an episode is a pass, up to the largest one.

    Returns notes on settings without effect, and on formats that cannot hold the run.
    """
    config, choose = choices.config, choices.choose
    # An image that several rows show is one sample with all their captions.
    path = write_listing(pairs, features_folder(config))
    rows = len(open_listing(path).rows)
    notes = on_exports(config, start)
    read_once = ("data.augmentation", "data.cache_gb", "data.shuffle_buffer")
    idle = dict.fromkeys(read_once, "each image is read once")
    idle["model.frozen_batch_norm"] = "the halves are frozen"
    notes += [
        f"{name}: no effect, since {why}" for name, why in idle.items() if choices.is_given(name)
    ]
    if config.model.text.pooling is not None and names_model("text", config.model.text.name):
        notes.append("model.text.pooling: no effect, since the text half has one of its own")
    size = config.episodes.size
    batch = choose("episodes.batch_size", align_batch(size or rows, divides=size is not None))
    # In larger ones the prototypes of a teacher would grow with the pairs.
    most = min(rows, sizes.LARGEST_EPISODE)
    size = choose("episodes.size", max(batch, most // batch * batch))
    if size <= rows:
        choose("episodes.replacement", False)
    count = choose("episodes.count", sizes.episodes_with(ALIGN_PASSES * rows, size, batch))
    choose("optim.warm_up_steps", min(500, max(1, count * (size // batch) // 20)))
    return notes


def on_exports(config: Config, start: Start) -> list[str]:
    """Notes on formats of `protoclip export` that cannot hold the run."""
    built = start.build(on_meta=True)
    if loading.gets_logit_bias(config, start):
        built.add_logit_bias()
    config_of_towers = start.open_clip_config
    assert config_of_towers is not None  # two halves are towers of open_clip
    return [
        f"the run cannot be exported as {name}: {reason}"
        for name, reason in closed_formats(built.towers, config_of_towers).items()
    ]


def align_batch(pairs: int, *, divides: bool) -> int:
    """Pairs of a batch, by the number of all; if it `divides` that, one that does if possible."""
    batch = 2
    while batch < ALIGN_LARGEST_BATCH and 4 * batch <= pairs:
        batch *= 2
    return sizes.batch_near(batch, dividing=pairs if divides else None)


def require_possible(choices: Choices, config: Config) -> None:
    """Refuse what no data make possible, before a stream passes for hours.

    Raises:
        ValueError: Given amounts do not fit.
    """
    episodes = config.episodes
    if episodes.size is not None and not choices.is_given("episodes.batch_size"):
        episodes = replace(episodes, batch_size=align_batch(episodes.size, divides=True))
    if not choices.is_given("episodes.count"):  # the pairs decide; here it is what stages need
        episodes = replace(episodes, count=episodes.warm_up + config.locked_episodes)
    check_amounts(replace(config, episodes=episodes))


# `finetune`: a model that is adapted to pairs


def choose_to_finetune(choices: Choices) -> None:
    """What depends on no data.

    Decay, warm-up and the largest batch are those of FLYP (arXiv 2212.00638), which fine-tunes CLIP
    by its own loss too. The rate falls by 0.7 from layer to layer, as is usual for pretrained
    transformers and ConvNeXt (arXiv 2201.03545, 2212.06138).
    """
    for name, value in FINETUNE.items():
        choices.choose(name, value)
    config = choices.config
    if config.run.overfit is not None:
        choices.alpha = 1.0  # there is nothing to judge others by
    judges = config.data.validation != 0 or bool(config.run.guard)
    choices.choose("run.evaluate_every", int(judges))  # with nothing held out alpha is given
    if config.model.lora is None:
        choices.choose("optim.layer_decay", 0.7)


def finetune_rate(start: Start, *, is_lora: bool) -> float:
    """The peak learning rate: FLYP's (arXiv 2212.00638), or ten times as much for LoRA, which moves
    few weights.

    Small towers that were trained from scratch learn on at the rate at which they learned. At
    FLYP's they learn nothing in a few passes (docs/LOG.md).
    """
    if start.tower_kind is None:
        return 1e-3
    return 1e-4 if is_lora else 1e-5


def choose_to_finetune_on(
    choices: Choices, start: Start, training: Pairs | SampleStream
) -> list[str]:
    """Episodes, the rate and the losses, by the pairs: an episode is a pass over the images.

    Returns a note where pairs show fewer images.
    """
    config, choose = choices.config, choices.choose
    rows, images = None, None
    if isinstance(training, Pairs):
        rows = len(training)
        if not (choices.is_given("episodes.size") and choices.is_given("episodes.count")):
            images = images_in(training)
    batch, size, count = finetune_episodes(choices, rows, images)
    choose("optim.learning_rate", finetune_rate(start, is_lora=config.model.lora is not None))
    choose("optim.warm_up_steps", min(500, max(1, count * (size // batch) // 20)))
    features = None
    if config.loss.teacher > 0 and not config.teachers:
        # A stream has no end, so its captions cannot all be embedded before the run.
        features = choose("teacher.features", START if rows is not None else None)
    if config.loss.prototypical > 0 or features is not None or config.grouping_teachers:
        # With these the gains of docs/LOG.md were measured.
        choose("loss.strengths", "constant")
        choose("loss.prototypical", 1.0)
        choose("loss.teacher", 1.0)
        if features == START:
            choose("teacher.whiten", 0)
            choose("episodes.warm_up", 0)  # its features are good from the beginning
        choose("optim.heads_lr_scale", 1.0 if start.heads_are_new else optim.SLOW_HEADS)
    if rows and images and images < NEARLY_ALL * rows:
        return [f"{rows:,} pairs show fewer images, so a pass over these is {images:,} pairs"]
    return []


def images_in(pairs: Pairs) -> int:
    """How many images a pass counts: so many that all passes together see each pair, and that there
    are enough steps, where these pairs show fewer."""
    rows = len(pairs)
    enough = min(rows, SMALLEST_BATCH * LEAST_STEPS)
    return max(sizes.number_of_images(pairs), math.ceil(rows / FINETUNE_PASSES), enough)


def finetune_episodes(
    choices: Choices, rows: int | None, images: int | None
) -> tuple[int, int, int]:
    """Pairs in a batch and in an episode, and episodes: some passes over this number of images.

    So a table with a row a caption takes as long as one with a row an image.
    """
    choose, given = choices.choose, choices.config.episodes
    if rows is None and not (given.size and choices.is_given("episodes.count")):
        raise ValueError(
            "episodes.size: a stream has no length; give episodes.size and episodes.count"
        )
    wanted = given.size or min(LARGEST_EPISODE, images or 0)
    batch = SMALLEST_BATCH
    while batch < LARGEST_BATCH and wanted // (2 * batch) >= LEAST_STEPS:
        batch *= 2
    usual = sizes.batch_near(min(batch, wanted), dividing=given.size)
    batch = choose("episodes.batch_size", usual)
    size = choose("episodes.size", max(batch, wanted // batch * batch))
    if rows is not None and size <= rows:
        choose("episodes.replacement", False)
    count = 1 if images is None else sizes.episodes_with(FINETUNE_PASSES * images, size, batch)
    return batch, size, choose("episodes.count", count)
