"""Settings that are chosen where none is given: by `align`, `finetune`, and all commands.

To a command a setting is unset if the user did not give it, be it at its default. What no command
chooses is filled where it has no value, or `auto`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from protoclip.config import (
    ALIGN,
    ENCODERS,
    FINETUNE,
    SMALL_CONTEXT_LENGTHS,
    SMALL_IMAGE_SIZES,
    START,
    Config,
    TeacherConfig,
    tree_of,
)
from protoclip.data.loader import divide_batch
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.summary import Summary, choose_context_length, count_captions, count_tokens
from protoclip.distributed import collectives
from protoclip.distributed.collectives import rank
from protoclip.encode.rows import features_folder, open_listing, write_listing
from protoclip.models.joined import AUTO, PLAIN
from protoclip.models.open_clip import clip_tokenizer
from protoclip.models.start import Start, names_model
from protoclip.models.timm import PUBLISHED
from protoclip.rules import check_sizes, require_named_pairs, require_place
from protoclip.terminal import say

Command = Literal["train", "align", "finetune"]
Section = TypeVar("Section")
WORK = {"align": "aligning", "finetune": "fine-tuning"}
LARGEST_EPISODE = 2**17  # the paper has 200,000 pairs
EPISODES, PASSES, FEWEST_STEPS = 35, 20, 280  # the fewest of `train`; docs/results.md has these
MOST_STEPS = 100_000  # of any command that trains
PAIRS_A_PROTOTYPE, FEWEST_PROTOTYPES = 10, 8  # the paper has 10
# A crop has about this share of an image's shorter side, and need not be enlarged.
CROPPED = 0.8
SLOW_HEADS = 0.01  # of the towers' learning rate
OVERFIT_STEPS = 500  # after which `run.overfit` gives the pairs up
ALIGN_PASSES = 30  # over the data
FEW_CAPTIONS, RATE_FOR_FEW = 8192, 3e-4  # at a higher one heads lose what the closed form found
ALIGN_LARGEST_BATCH = 1024
GROUPS_OF_TEACHER = 2.0  # their weight; the 0.5 of `train` was chosen for towers that train
NEEDS = (
    "needs two pretrained encoders, as in --model.image.name timm:vit_small_patch14_dinov2.lvd142m "
    "--model.text.name minilm"
)
FINETUNE_PASSES = 5  # over the images
FINETUNE_LARGEST_EPISODE, LARGEST_BATCH, SMALLEST_BATCH = 200_000, 512, 16
NEARLY_ALL = 0.99  # share of pairs with an image of their own, below which a note says so
LEAST_STEPS = 32  # in a pass over the data, if batches can be small enough


class Choices:
    """The settings that a command was given, and what it chooses for others.

    `config` has both, as far as they were chosen; `alpha` is for `finetune`.
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
        """How many settings were chosen, of which nobody wants to read all."""
        number, work = sum(map(len, self.chosen.values())), WORK[self.command]
        return [f"{number} settings are chosen for {work}; config.toml of the run lists them"]


def read_given(command: Command, settings: Any) -> dict[str, Any]:
    """The settings that a command was given, as a recipe holds them, with those of `run.overfit`.

    Of a `Config` these are the ones that differ from the defaults.
    """
    tree = Config.from_dict(settings) if isinstance(settings, Config) else tree_of(settings)
    given = list_given(tree, Config())
    config = Config.from_dict(given)
    if command == "finetune":
        if not config.model.has_start:
            raise ValueError(
                "model.start: fine-tuning needs a model to start from: a run, or open_clip:NAME/TAG"
            )
        require_named_pairs(given, WORK[command])
    number, validation = config.run.overfit, config.data.validation
    if number is None:
        return given
    if validation is not None and validation != 0 and rank() == 0:
        say("note: data.validation: no effect, since run.overfit holds no pairs out")
    # One batch of all pairs a step, by the instance loss alone, and nothing that keeps a model from
    # learning by heart. The rate and the model stay.
    decided: dict[str, dict[str, Any]] = {
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
    if command == "align":
        decided["align"] = {"dropout": 0.0, "geometry": 0.0}
    return given | {name: {**given.get(name, {}), **values} for name, values in decided.items()}


def list_given(section: Any, usual: Any) -> dict[str, Any]:
    """All settings of a mapping; of a dataclass those that are not as in `usual`."""
    is_mapping, given = isinstance(section, Mapping), dict[str, Any]()
    for name, value in (section if is_mapping else vars(section)).items():
        default = getattr(usual, str(name), None)
        if is_mapping or value != default:
            is_section = isinstance(value, Mapping) or hasattr(value, "__dataclass_fields__")
            given[name] = list_given(value, default) if is_section else value
    return given


def choose_before_data(
    command: Command, given: Mapping[str, Any], *, alpha: float | None = None
) -> Choices:
    """What a command chooses before the data are opened."""
    choices = Choices(command, given, alpha=alpha)
    if command == "train":
        return choices
    episodes = choices.config.episodes
    # Sizes that do not fit are refused before hours of reading or encoding.
    if choices.is_given("episodes.batch_size") and choices.config.run.overfit is None:
        divide_batch(episodes.batch_size)
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
    samples: Pairs | SampleStream,
    summary: Summary,
    *,
    is_evaluated: bool,
) -> tuple[Config, list[str]]:
    """The settings with what a command chooses by the pairs to train on; notes on all it chose.

    `is_evaluated` says whether pairs are held out, or a guard is named.
    """
    choices.config = config
    if choices.command == "align":
        assert isinstance(samples, Pairs)  # a stream has passed by now
        choose_to_align_pairs(choices, samples)
        return choices.config, choices.notes
    if choices.alpha is None and not is_evaluated:
        raise ValueError(
            "alpha: no data evaluates models between start and end; hold out pairs "
            "(data.validation), name a guard, or give an alpha"
        )
    notes = choose_to_finetune_on(choices, start, summary)
    return choices.config, choices.notes + notes


# `align`: heads between two frozen encoders


def choose_to_align(choices: Choices) -> None:
    """The encoders, and what depends on nothing else."""
    config = choices.config
    model, image, teacher = config.model, config.model.image, config.teacher
    for setting, value in (("name", model.name), ("start", model.start)):
        if value is not None:
            raise ValueError(f"model.{setting}: is a whole model, but align {NEEDS}")
    if model.text.name is None:
        raise ValueError(f"model.text.name: align {NEEDS}")
    if "name" not in choices.given.get("model", {}).get("image", {}):
        raise ValueError(f"model.image.name: align {NEEDS}")
    if (store := config.align.features) is not None and not (store and Path(store).is_dir()):
        require_place("align.features", store, is_folder=True)
    refuse_for_align(config)
    if not names_model("image", image.name):
        image = replace(image, weights=image.weights or PUBLISHED)
    # What is learned by heart needs no closed form, by which layers are chosen.
    usual = AUTO if config.run.overfit is None else PLAIN
    image = replace(image, joined_layers=image.joined_layers or usual)
    text = replace(model.text, joined_layers=model.text.joined_layers or usual)
    choices.config = replace(config, model=replace(model, image=image, text=text))
    for name, value in ALIGN.items():
        choices.choose(name, value)
    has_teacher = teacher.features is not None or bool(config.teachers)
    choices.choose("loss.teacher", GROUPS_OF_TEACHER if has_teacher else 0.0)
    if choices.config.loss.prototypical == 0 < choices.config.loss.teacher:
        choices.choose("episodes.warm_up", 0)
    if choices.config.loss.teacher > 0 and not has_teacher:
        sides = [replace(teacher, name=name, features=kind) for name, kind in ENCODERS.items()]
        choices.config = replace(choices.config, teachers=sides, teacher=TeacherConfig())
    if choices.config.uses_prototypes:  # or nothing trains the heads that they are of
        choices.choose("optim.heads_weight_decay", 0.1)
        choices.choose("optim.heads_lr_scale", 1.0)
    require_named_pairs(choices.given, WORK["align"])


def refuse_for_align(config: Config) -> None:
    """Refuse settings of towers that train."""
    model, parallel = config.model, config.parallel
    towers_train = {
        "model.locked": model.locked,
        "model.lora": model.lora,
        "optim.layer_decay": config.optim.layer_decay < 1,
        "parallel.activation_checkpointing": parallel.activation_checkpointing,
        "parallel.compile": parallel.compile,
        "parallel.sync_batch_norm": parallel.sync_batch_norm,
        "parallel.strategy": parallel.strategy == "fsdp",
        "loss.keep": config.loss.keep,
        "teacher.distil": any(teacher.distil for teacher in (config.teacher, *config.teachers)),
    }
    for setting, value in towers_train.items():
        if value:
            raise ValueError(
                f"{setting}: align leaves the encoders as they are; protoclip finetune trains them "
                "afterwards; leave it out"
            )
    if config.data.captions == "sentences":
        raise ValueError(
            "data.captions: align encodes whole captions; give a table whose captions are the "
            "sentences, or leave it out"
        )


def choose_to_align_pairs(choices: Choices, pairs: Pairs) -> None:
    """Episodes, by the pairs: an episode is a pass, up to the largest one."""
    # An image that several rows show is one sample with all their captions.
    listing = open_listing(write_listing(pairs, features_folder(choices.config)))
    rows = len(listing.rows)
    if len(listing.captions) < FEW_CAPTIONS:
        choices.choose("optim.learning_rate", RATE_FOR_FEW)
    batch = floor_power((choices.config.episodes.size or rows) // 2, 2, ALIGN_LARGEST_BATCH)
    # In larger episodes the prototypes of a teacher would grow with the pairs.
    size = min(rows, LARGEST_EPISODE)
    choose_episodes(choices, rows, batch=batch, size=size, total=ALIGN_PASSES * rows)


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
        choices.alpha = 1.0  # there is nothing to evaluate others on
    evaluates = config.data.validation != 0 or bool(config.run.guard)
    choices.choose("run.evaluate_every", int(evaluates))  # with nothing held out alpha is given
    if config.model.lora is None:
        choices.choose("optim.layer_decay", 0.7)


def choose_to_finetune_on(choices: Choices, start: Start, summary: Summary) -> list[str]:
    """Episodes, the rate and the losses, by the pairs; a note where they show fewer images.

    An episode is a pass over the images, so rows of one image take no longer. The peak learning
    rate is FLYP's (arXiv 2212.00638), ten times as much for LoRA, and for small towers the one at
    which they were trained: at FLYP's they learn nothing in a few passes (docs/LOG.md).
    """
    choose, rows, given = choices.choose, summary.rows, choices.config.episodes
    has_amounts = given.size is not None and choices.is_given("episodes.count")
    if rows is None and not has_amounts:
        raise ValueError(
            "episodes.size: a stream has no length; give episodes.size and episodes.count"
        )
    images = 0
    if rows is not None and not has_amounts:
        # All passes together see each pair, and there are enough steps.
        enough = min(rows, SMALLEST_BATCH * LEAST_STEPS)
        images = max(summary.images or rows, math.ceil(rows / FINETUNE_PASSES), enough)
    wanted = given.size or min(FINETUNE_LARGEST_EPISODE, images)
    batch = min(wanted, floor_power(wanted // LEAST_STEPS, SMALLEST_BATCH, LARGEST_BATCH))
    choose_episodes(choices, rows, batch=batch, size=wanted, total=FINETUNE_PASSES * images)
    config = choices.config
    rate = 1e-3 if start.tower_kind is None else 1e-5 if config.model.lora is None else 1e-4
    choose("optim.learning_rate", rate)
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
        choose("optim.heads_lr_scale", 1.0 if start.heads_are_new else SLOW_HEADS)
    if rows and images and images < NEARLY_ALL * rows:
        return [f"{rows:,} pairs show fewer images, so a pass over these is {images:,} pairs"]
    return []


# What both commands, or every run, fill


def choose_episodes(
    choices: Choices, rows: int | None, *, batch: int, size: int, total: int
) -> None:
    """Episodes of about this `size` and these batches, which have `total` pairs together."""
    choose = choices.choose
    usual = choose_batch(batch, dividing=choices.config.episodes.size)
    batch = choose("episodes.batch_size", usual)
    size = choose("episodes.size", max(batch, size // batch * batch))
    if rows is not None and size <= rows:
        choose("episodes.replacement", False)
    count = choose("episodes.count", count_episodes(total, size, batch))
    choose("optim.warm_up_steps", min(500, max(1, count * (size // batch) // 20)))


def floor_power(number: int, least: int, most: int) -> int:
    """The largest power of two up to a number, within limits that are powers of two."""
    return min(most, max(least, 1 << max(0, number.bit_length() - 1)))


def fill(section: Section, values: Mapping[str, Any]) -> Section:
    """A section of the settings, with these values for what it leaves unset, or `auto`."""
    unset = {n: value for n, value in values.items() if getattr(section, n) in (None, "auto")}
    return replace(section, **unset)  # type: ignore[type-var]


def fill_settings(
    config: Config, start: Start, samples: Pairs | SampleStream, summary: Summary
) -> tuple[Config, list[str]]:
    """Every unset setting by the training pairs and the model, and a note on each decision.

    Small towers that start untrained get the largest image size that crops of half of the images
    have, and the smallest caption length that cuts at most one caption of 20. Above 40 pixels they
    get crops alone, which keep the colours that captions name (docs/results.md).
    """
    notes, model, data = list[str](), config.model, config.data
    sides = summary.sides
    reason = f"by {len(sides)} of the samples" if sides else "since no sample could be looked at"
    is_open = model.start is None and model.name is None
    if is_open and model.image.size is None and model.image.weights is None:
        largest = CROPPED * float(np.median(sides)) if sides else 0.0
        size = max([SMALL_IMAGE_SIZES[0], *(s for s in SMALL_IMAGE_SIZES if s <= largest)])
        model = replace(model, image=replace(model.image, size=size))
        notes.append(f"model.image.size = {size}, {reason}")
    if is_open and model.text.context_length is None and model.text.name is None:
        counts = count_tokens(clip_tokenizer(SMALL_CONTEXT_LENGTHS[-1]), summary.captions_of_images)
        lengths = [number for number, _ in counts]
        length = choose_context_length(lengths)
        model = replace(model, text=replace(model.text, context_length=length))
        cut = sum(number > length for number in lengths)
        few = f", which cuts {cut:,} of {len(lengths):,} captions" if cut else ""
        notes.append(f"model.text.context_length = {length}, {reason}{few}")
    start = replace(start, model=model)
    size, length = start.sizes["image_size"], start.sizes["context_length"]
    image, text = replace(model.image, size=size), replace(model.text, context_length=length)
    model = replace(model, image=image, text=text)
    prototypes = fill(config.prototypes, {"source": config.prototype_source})
    config = replace(config, model=model, prototypes=prototypes)
    pairs = samples if isinstance(samples, Pairs) else None
    config, said = fill_episodes(config, summary.rows, pairs)
    kind = start.tower_kind
    is_small = kind is not None or (model.image.size or 0) <= SMALL_IMAGE_SIZES[0]
    augmentation = "light" if is_small or config.run.overfit is not None else "clip"
    if data.augmentation == "auto" and augmentation != "light":
        above = f"above {SMALL_IMAGE_SIZES[0]} pixels"
        notes.append(f"data.augmentation = {augmentation}, for small towers {above}")
    values = choose_optimizer(config, kind)
    if kind is not None:
        name = model.name or model.start or model.image.name
        filled = [
            f"optim.{setting} = {value}"
            for setting, value in values.items()
            if getattr(config.optim, setting) is None
            and (setting != "locked_learning_rate" or config.locked_episodes)
        ]
        if config.optim.learning_rate is None:  # else a recipe chose it, and few read the rest
            said.append(f"{', '.join(filled)}, from {name} at batch {config.episodes.batch_size}")
            if model.has_start:
                said.append("optim.learning_rate suits new weights; finetune has lower ones")
    data, optim = fill(data, {"augmentation": augmentation}), fill(config.optim, values)
    return replace(config, data=data, optim=optim), notes + said


def fill_episodes(
    config: Config, rows: int | None, pairs: Pairs | None = None
) -> tuple[Config, list[str]]:
    """The size and number of episodes, and the numbers of prototypes; and notes on these.

    An episode is the largest power of two that `rows` pairs fill, up to 131,072 as for a stream
    (None), in whole batches. There are 35 episodes, or more for 20 passes over the pairs or for 280
    steps. A prototype stands for ten pairs, as in the paper, but there are no more than different
    captions among `pairs`.
    """
    notes, batch, size = list[str](), config.episodes.batch_size, config.episodes.size
    if size is None:
        most = LARGEST_EPISODE if rows is None else 2 ** int(math.log2(max(1, rows)))
        size = max(1, min(LARGEST_EPISODE, most) // batch) * batch
        amount = "a stream" if rows is None else f"{rows:,} pairs"
        notes.append(f"episodes.size = {size}, for {amount}")
    least = max(EPISODES * size, PASSES * (rows or 0), FEWEST_STEPS * batch)
    stages = config.episodes.warm_up + config.locked_episodes
    count = max(count_episodes(least, size, batch), stages + 1)
    number = min(size, max(FEWEST_PROTOTYPES, size // PAIRS_A_PROTOTYPE))
    unset = [f"{name}.number" for name, given in config.prototype_numbers.items() if given is None]
    if unset and pairs is not None:  # captions are read for a number that is used
        number = count_captions(pairs, size, most=number)
    number = max(2, number)
    if unset:
        few = number < size // PAIRS_A_PROTOTYPE
        reason = "since captions repeat" if few else "a tenth of an episode"
        notes.append(f"{' and '.join(unset)} = {number}, {reason}")
    without = {} if config.teachers or config.teacher.features else {"distil": 0.0}
    usual, whiten = TeacherConfig().whiten, config.teacher.whiten
    shared = {"number": config.teacher.number or number, "distil": config.teacher.distil}
    config = replace(
        config,
        episodes=fill(config.episodes, {"size": size, "count": count}),
        prototypes=fill(config.prototypes, {"number": number}),
        teacher=fill(config.teacher, {"number": number, **without}),
        teachers=[
            replace(fill(one, shared), whiten=whiten if one.whiten == usual else one.whiten)
            for one in config.teachers
        ],
    )
    return config, notes


def count_episodes(pairs: int, size: int, batch: int) -> int:
    """How many episodes have this number of pairs together, or as many as `MOST_STEPS` allow."""
    return max(1, min(round(pairs / size), MOST_STEPS * batch // size))


def choose_batch(usual: int, *, dividing: int | None) -> int:
    """A batch of about the usual size, which ranks share evenly, with at least two pairs each.

    It divides the number `dividing`, if one can that is at least half as large.
    """
    ranks = collectives.world_size()
    usual = max(2 * ranks, usual // ranks * ranks)
    if dividing is None:
        return usual
    even = range(usual, max(ranks, usual // 2 - 1), -ranks)
    return next((size for size in even if dividing % size == 0), usual)


def choose_optimizer(config: Config, kind: str | None) -> dict[str, Any]:
    """The settings of `[optim]` that depend on the model.

    Small towers that start untrained, of no `kind`, get values that suit the bundled emoji, and
    half of their rate above 40 pixels (docs/LOG.md). Other models, transformers or convolutional,
    get values between known recipes ("Rates of known recipes" in docs/LOG.md).
    """
    episodes, given = config.episodes, config.optim
    if kind is None:
        rate = 2e-3 if (config.model.image.size or 0) <= SMALL_IMAGE_SIZES[0] else 1e-3
        return {
            "learning_rate": rate,
            "warm_up_steps": 50,
            "locked_learning_rate": (given.learning_rate or rate) / 10,
            "betas": (0.9, 0.98),
            "eps": 1e-6,
            "weight_decay": 0.2,
            "heads_weight_decay": 0.2 if given.weight_decay is None else given.weight_decay,
            "heads_lr_scale": SLOW_HEADS,
        }
    is_transformer, batch = kind == "transformer", episodes.batch_size
    steps = episodes.count * (episodes.size // batch)
    rate = 5e-4 * min(1.0, batch / 512)
    return {
        "learning_rate": rate,
        "warm_up_steps": min(max(steps // 50, 500_000 // batch), max(steps // 10, 1)),
        "locked_learning_rate": (given.learning_rate or rate) / 10,
        "betas": (0.9, 0.98) if is_transformer else (0.9, 0.999),
        "eps": 1e-6 if is_transformer else 1e-8,
        "weight_decay": 0.2 if is_transformer else 0.1,
        "heads_weight_decay": 0.0,
        # Fast heads leave behind the projections that wait in a queue (docs/LOG.md).
        "heads_lr_scale": 1.0 if config.prototypes.source == "extract" else SLOW_HEADS,
    }
