"""Other defaults than those of `train`, for the commands that have some: fine-tuning, aligning.

The values are in `finetune.py` and `align.py`; what a run itself fills in is decided in `plan.py`.
Here unset means that the user did not give a setting, be it at its default: a question of the
command, which is answered before the plan. In the plan unset is a setting without a value.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from protoclip.config import Config, shown, tree_of
from protoclip.data.loader import share_of
from protoclip.distributed.collectives import rank0_first
from protoclip.rules import check_sizes
from protoclip.training import sync
from protoclip.training.run_folder import read_settings


def given_settings(settings: Any) -> dict[str, Any]:
    """The settings as a recipe holds them: of a `Config`, those that differ from the defaults.

    Raises:
        ValueError: They are neither a `Config` nor a mapping, or those of a `Config` are wrong.
    """
    tree = Config.from_dict(settings) if isinstance(settings, Config) else tree_of(settings)
    return given_in(tree, Config())


def given_in(section: Any, usual: Any) -> dict[str, Any]:
    """All settings of a mapping; of a dataclass those that are not as in `usual`."""
    is_mapping, given = isinstance(section, Mapping), dict[str, Any]()
    for name, value in (section if is_mapping else vars(section)).items():
        default = getattr(usual, str(name), None)
        if is_mapping or value != default:
            is_section = isinstance(value, Mapping) or hasattr(value, "__dataclass_fields__")
            given[name] = given_in(value, default) if is_section else value
    return given


class Choices:
    """What a command chooses for settings that are not `given`, as a recipe holds them.

    `config` has the settings that are given and those that were chosen so far. `what` the choices
    are for is what notes say.
    """

    def __init__(self, given: Mapping[str, Any], what: str) -> None:
        self.given, self.config, self.what = given, Config.from_dict(given), what
        self.chosen: dict[str, dict[str, Any]] = {}

    def require_sizes(self) -> None:
        """Refuse sizes that are given and do not fit, before hours of reading or encoding."""
        if self.is_given("episodes.batch_size") and self.config.run.overfit is None:
            share_of(self.config.episodes.batch_size)
        if self.is_given("episodes.size") and self.is_given("episodes.batch_size"):
            check_sizes(self.config.episodes)

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
            f"for {self.what}: "
            + ", ".join(f"{section}.{key} = {shown(value)}" for key, value in values.items())
            for section, values in self.chosen.items()
        ]


def choices_of(
    before_data: Callable[[Mapping[str, Any]], Choices],
    given: Mapping[str, Any],
    *,
    resume: bool,
    chosen: Collection[str],
) -> Choices:
    """What `before_data` chooses for the given settings. Collective.

    With `resume` a run that was begun keeps what it chose of the settings `chosen`.
    """

    def begin() -> Choices:
        choices = before_data(given)
        if resume:
            with sync.begun(choices.config) as folder:
                choices = before_data(with_begun(given, folder, chosen))
        return choices

    return rank0_first(begin)


def with_begun(
    given: Mapping[str, Any], folder: Path, chosen: Collection[str]
) -> Mapping[str, Any]:
    """The settings that are given, and below them what a run in this folder chose for others."""
    if not (folder / "config.toml").is_file():
        return given
    saved = read_settings(folder)
    tree = dict(given)
    for name in saved.keys() & {*chosen}:
        section, key = name.split(".")
        tree[section] = {key: saved[name], **tree.get(section, {})}
    return tree
