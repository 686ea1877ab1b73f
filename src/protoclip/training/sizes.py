"""The size of an episode and the number of prototypes, where a configuration leaves them open."""

import math
import tomllib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from protoclip.config import Config
from protoclip.data import sources
from protoclip.data.inspect import drawn
from protoclip.data.pairs import BadSample, Pairs, SampleStream
from protoclip.evaluation.validation import judged
from protoclip.paths import require_paths

LARGEST_EPISODE = 2**17  # the paper has 200,000 pairs
PAIRS_A_PROTOTYPE, FEWEST_PROTOTYPES = 10, 8  # the paper has 10


def sized(config: Config, *, before: Path | None = None) -> tuple[Config, list[str]]:
    """The configuration with `episodes.size` and every `number` of prototypes, and notes on these.

    An episode is the largest power of two that the training pairs fill, at most 131,072, and at
    least a batch. The length of a stream is not known, so there it is 131,072. A prototype stands
    for ten pairs of an episode, as in the paper. There are no more prototypes than captions.

    Args:
        before: Folder of a run that may go on. What is open is as it was there.

    Raises:
        ValueError: The data are wrong.
    """
    if not is_open(config):
        return config, []
    if before is not None and (before / "config.toml").is_file():
        with suppress(ValueError):  # the settings are compared later
            text = (before / "config.toml").read_text(encoding="utf-8")
            same = filled(config, Config.from_dict(tomllib.loads(text)))
            if not is_open(same):
                return same, []
    require_paths(config)
    samples, notes = judged(config, sources.pairs(config)).training, []
    size, batch = config.episodes.size, config.episodes.batch_size
    if size == 0:
        rows = len(samples) if isinstance(samples, Pairs) else LARGEST_EPISODE
        size = episode_size(rows, batch)
        of = f"{rows:,} pairs" if isinstance(samples, Pairs) else "a stream"
        notes.append(f"episodes.size = {size}, for {of}")
    number = number_of_prototypes(samples, size)
    if config.uses_prototypes:
        few = number < size // PAIRS_A_PROTOTYPE
        notes.append(
            f"prototypes.number = {number}, "
            + ("since captions repeat" if few else "a tenth of an episode")
        )
    return filled(config, sizes_of(config, size, number)), notes


def episode_size(rows: int, batch: int) -> int:
    """The largest power of two up to so many pairs, as whole batches."""
    size: int = min(LARGEST_EPISODE, 2 ** int(math.log2(max(1, rows))))
    return max(batch, size // batch * batch)


def is_open(config: Config) -> bool:
    """Whether a size is left to the data."""
    teachers = [config.teacher, *config.teachers]
    return 0 in (config.episodes.size, config.prototypes.number, *(t.number for t in teachers))


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
    prototypes, teacher = config.prototypes, config.teacher
    return replace(
        config,
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
    for row in drawn(len(samples), min(len(samples), size), seed=0):
        with suppress(BadSample):
            found.add(samples.sample_captions(row)[0])
    return len(found)
