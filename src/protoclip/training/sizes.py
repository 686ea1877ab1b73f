"""Sizes that a configuration leaves to the data: of episodes, small towers and prototypes."""

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from protoclip.config import Config, ModelConfig
from protoclip.data import sources
from protoclip.data.decode import dimensions
from protoclip.data.defaults import (
    LOOKED_AT,
    fitting_context_length,
    fitting_image_size,
    some_samples,
)
from protoclip.data.pairs import BadSample, Pairs, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.evaluation.validation import judged
from protoclip.files import read_toml
from protoclip.models.towers import TokenCounter, build_tokenizer
from protoclip.paths import require_paths

LARGEST_EPISODE = 2**17  # the paper has 200,000 pairs
PAIRS_A_PROTOTYPE, FEWEST_PROTOTYPES = 10, 8  # the paper has 10


def sized(config: Config, *, before: Path | None = None) -> tuple[Config, list[str]]:
    """The configuration with all sizes that follow from the data, and notes on these.

    An episode is the largest power of two that the training pairs fill, at most 131,072, and at
    least a batch. The length of a stream is not known, so there it is 131,072. A prototype stands
    for ten pairs of an episode, as in the paper. There are no more prototypes than captions. Image
    size and caption length of small towers that start untrained suit some hundred of the samples.

    Args:
        before: Folder of a run that may go on. What is open is as it was there.

    Raises:
        ValueError: The data are wrong.
    """
    if not is_open(config):
        return config, []
    if before is not None and (before / "config.toml").is_file():
        with suppress(ValueError):  # the settings are compared later
            same = filled(config, Config.from_dict(read_toml(before / "config.toml")))
            if not is_open(same):
                return same, []
    require_paths(config)
    samples = judged(config, sources.pairs(config)).training
    model, notes = sized_model(config, samples)
    size, batch = config.episodes.size, config.episodes.batch_size
    if size == 0:
        rows = len(samples) if isinstance(samples, Pairs) else LARGEST_EPISODE
        size = episode_size(rows, batch)
        of = f"{rows:,} pairs" if isinstance(samples, Pairs) else "a stream"
        notes.append(f"episodes.size = {size}, for {of}")
    number = number_of_prototypes(samples, size)
    if names := open_numbers(config):
        few = number < size // PAIRS_A_PROTOTYPE
        notes.append(
            f"{' and '.join(f'{name}.number' for name in names)} = {number}, "
            + ("since captions repeat" if few else "a tenth of an episode")
        )
    config = replace(config, model=model)
    return filled(config, sizes_of(config, size, number)), notes


def sized_model(config: Config, samples: Pairs | SampleStream) -> tuple[ModelConfig, list[str]]:
    """The `[model]` section with the sizes of small towers, and notes on these."""
    model, notes = config.model, list[str]()
    if not (model.leaves_image_size_open or model.leaves_context_length_open):
        return model, notes
    sides, lengths = list[int](), list[int]()
    count_tokens = TokenCounter(build_tokenizer(None))
    for sample in some_samples(samples, LOOKED_AT):
        with suppress(ValueError):  # a bad image
            sides.append(min(dimensions(sample.image, max_pixels=config.data.max_image_pixels)))
            lengths += count_tokens(list(sample.captions))
    of = f"by {len(sides)} of the samples" if sides else "since no sample could be looked at"
    if model.leaves_image_size_open:
        size = fitting_image_size(sides)
        model = replace(model, image=replace(model.image, size=size))
        notes.append(f"model.image.size = {size}, {of}")
    if model.leaves_context_length_open:
        length = fitting_context_length(lengths)
        model = replace(model, text=replace(model.text, context_length=length))
        notes.append(f"model.text.context_length = {length}, {of}")
    return model, notes


def episode_size(rows: int, batch: int) -> int:
    """The largest power of two up to so many pairs, as whole batches."""
    size: int = min(LARGEST_EPISODE, 2 ** int(math.log2(max(1, rows))))
    return max(batch, size // batch * batch)


def is_open(config: Config) -> bool:
    """Whether a size is left to the data."""
    teachers = [config.teacher, *config.teachers]
    numbers = config.episodes.size, config.prototypes.number, *(t.number for t in teachers)
    model = config.model
    return 0 in numbers or model.leaves_image_size_open or model.leaves_context_length_open


def open_numbers(config: Config) -> list[str]:
    """The names before `.number` of prototypes that are in use and left to the data."""
    numbers = {"prototypes": config.prototypes.number} if config.groups_modalities else {}
    numbers |= {name: teacher.number for name, teacher in config.external_teachers.items()}
    return [name for name, number in numbers.items() if number == 0]


def sizes_of(config: Config, size: int, number: int) -> Config:
    """The configuration with these sizes."""
    return replace(
        config,
        episodes=replace(config.episodes, size=size),
        prototypes=replace(config.prototypes, number=number),
        teacher=replace(config.teacher, number=number),
        teachers=[replace(teacher, number=number) for teacher in config.teachers],
    )


def filled(config: Config, other: Config) -> Config:
    """The configuration, with the sizes of another one where its own are open."""
    teachers = config.teachers
    if len(teachers) == len(other.teachers):
        pairs = zip(teachers, other.teachers, strict=True)
        teachers = [replace(own, number=own.number or theirs.number) for own, theirs in pairs]
    prototypes, teacher, model = config.prototypes, config.teacher, config.model
    if model.leaves_image_size_open:
        model = replace(model, image=replace(model.image, size=other.model.image.size))
    if model.leaves_context_length_open:
        length = other.model.text.context_length
        model = replace(model, text=replace(model.text, context_length=length))
    return replace(
        config,
        model=model,
        episodes=replace(config.episodes, size=config.episodes.size or other.episodes.size),
        prototypes=replace(prototypes, number=prototypes.number or other.prototypes.number),
        teacher=replace(teacher, number=teacher.number or other.teacher.number),
        teachers=teachers,
    )


def number_of_prototypes(samples: Pairs | SampleStream, size: int) -> int:
    """How many prototypes an episode of this size has: a tenth, but no more than captions."""
    number = min(size, max(FEWEST_PROTOTYPES, size // PAIRS_A_PROTOTYPE))
    if isinstance(samples, Pairs):  # captions may name few classes
        number = min(number, different_captions(samples, size))
    return max(2, number)


def different_captions(samples: Pairs, size: int) -> int:
    """How many first captions differ among the pairs of an episode, drawn evenly."""
    found = set()
    for row in evenly_spaced(len(samples), min(len(samples), size), seed=0):
        with suppress(BadSample):
            found.add(samples.sample_captions(row)[0])
    return len(found)
