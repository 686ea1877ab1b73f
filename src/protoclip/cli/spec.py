"""From a command line and recipes to a command with its settings, and to its help.

A command is a dataclass: positional fields are positional arguments, keyword-only fields options,
and nested dataclasses sections (`--section.name value`). The comment behind a field is its help.
Options that several commands take are declared here, as classes that these commands inherit.
"""

import ast
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from protoclip.cli.recipes import merged, read_recipe
from protoclip.config import Config, Count, DataConfig, build, unknown
from protoclip.rules import TRAIN_OR_SOURCES, require_file

Command = TypeVar("Command")


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """A command whose sections may come from recipes."""

    config: list[str] = field(default_factory=list)  # Recipe: settings as TOML. May be repeated.

    # What recipes and the command line set, as they say it, and what the command line alone does;
    # the rest has defaults.
    given: ClassVar[Mapping[str, Any]] = {}
    typed: ClassVar[Mapping[str, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    json: bool = False  # Print the results as JSON.


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps.


@dataclass(frozen=True, kw_only=True)
class EncodingOptions(DeviceOption):
    """How a frozen model encodes."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto is fp32 on a CPU.


@dataclass(frozen=True, kw_only=True)
class BatchOption:
    batch_size: Count = 256  # Images or texts encoded at once.


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Settings of `data` by their own names: how a table is read."""

    image_column: str | None = None  # Column of paths, URLs or bytes; else detected.
    caption_column: list[str] | str | None = None  # Column(s) of captions; else detected.
    id_column: str | None = None  # Column of sample ids; else detected.
    root: str | None = None  # Folder that holds all images of a table.
    allow_links: bool = False  # Follow symbolic links that leave the root.

    def data_config(self, **more: Any) -> DataConfig:
        """These settings, those of `ChosenOptions` and `PairsOptions`, and more of them."""
        groups = [kind for kind in type(self).__mro__ if kind in (TableOptions, *OF_DATA)]
        names = {entry.name for kind in groups for entry in fields(kind)} - {"data"}
        return DataConfig(**{name: getattr(self, name) for name in names}, **more)


@dataclass(frozen=True, kw_only=True)
class ChosenOptions(TableOptions):
    """... and which samples are used."""

    only: str | None = None  # As data.only.
    without: str | None = None  # As data.without.


@dataclass(frozen=True, kw_only=True)
class PairsOptions(ChosenOptions):
    """... of the pairs that a command names."""

    data: str  # Pairs, as data.train.
    read: Literal["auto", "streaming"] = "auto"  # auto: local shards are indexed.


OF_DATA = (ChosenOptions, PairsOptions)


def parse(kind: type[Command], words: list[str]) -> Command:
    """Later recipes override earlier ones; options override recipes. Any order of words will do.

    Raises:
        ValueError: In one line that names the option, or the recipe and its setting.
    """
    hints = get_type_hints(kind)
    given, rest = read_options(kind, words)
    for name in arguments(kind):
        if rest and get_origin(hints[name]) is list:
            given[name], rest = rest, []
        elif rest:
            given[name], *rest = rest
    if rest:
        raise ValueError(f"{rest[0]}: unexpected argument")
    tree: dict[str, Any] = {}
    for path in given.get("config", []):
        require_file("--config", path)
        recipe, sections = read_recipe(Path(path)), get_type_hints(Config)
        tree = merged(tree, {k: v for k, v in recipe.items() if hints.get(k) == sections[k]})
    if named_twice(tree, given):
        raise ValueError(TRAIN_OR_SOURCES)
    tree = merged(tree, given)
    command = build(kind, tree)
    if isinstance(command, Recipes):
        object.__setattr__(command, "given", tree)  # commands are frozen
        object.__setattr__(command, "typed", given)
    return command


def named_twice(recipes: Mapping[str, Any], typed: Mapping[str, Any]) -> bool:
    """Whether the command line names pairs beside a recipe's mixture. Once both are one, the emoji,
    which are the default of `data.train`, would count as not named."""
    data = typed.get("data")
    names = isinstance(data, Mapping) and "train" in data
    return names and bool(recipes.get("data", {}).get("sources"))


def arguments(kind: type[Any]) -> list[str]:
    """The fields of a command that are given without their names."""
    return [entry.name for entry in fields(kind) if not entry.kw_only]


def options(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of all arguments and options of a command, those of its sections included."""
    hints = get_type_hints(kind)
    for name in (entry.name for entry in fields(kind)):
        if is_dataclass(hints[name]):
            yield from options(hints[name], f"{prefix}{name}.")
        else:
            yield prefix + name, hints[name]


def read_options(kind: type[Any], words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options among the words as a tree of settings, and the other words.

    `--no-NAME` switches a flag off. A list grows with each option, and so does a tuple of any
    length. The last part of a setting's name will do where no other ends in it (`full_name`).

    Raises:
        ValueError: There is no such option, or its value is missing.
    """
    known, left, rest = dict(options(kind)), list(words), list[str]()
    given: dict[str, list[str]] = {}
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        if word == "--":
            raise ValueError("--: has no meaning here; leave it out")
        option, is_joined, value = word.partition("=")
        if value.startswith("~/"):  # which shells leave as it is behind "="
            value = os.path.expanduser(value)  # noqa: PTH111
        name = option.lstrip("-").replace("-", "_")
        if name in arguments(kind):
            raise ValueError(f"{option}: is an argument, not an option; give it without {option}")
        flag = full_name(re.sub(r"(^|\.)no_", r"\1", name), known)
        name = full_name(name, known)
        if name in known:
            values = [value] if is_joined else take_values(left, known[name])
        elif known.get(flag) is bool and not is_joined:
            name, values = flag, ["false"]
        else:
            raise ValueError(unknown(name, [*known]))
        if not values or (list in origins(known[name]) and values == [""]):
            raise ValueError(f"{option}: needs a value")
        given[name] = [*given.get(name, ()), *values] if grows(known[name]) else values
    tree: dict[str, Any] = {}
    for name, values in given.items():
        several = {list, tuple} & origins(known[name])
        setting = value_of(values if several else values[0], known[name])
        for part in reversed(name.split(".")):
            setting = {part: setting}
        tree = merged(tree, setting)
    return tree, rest


def full_name(name: str, known: Collection[str]) -> str:
    """The option that is meant: `run.seed` by `seed`, if nothing else ends in it; and `root` by
    `data.root` in commands that take settings of `data` by their own names."""
    if name in known:
        return name
    if name.removeprefix("data.") in known and "data.train" not in known:
        return name.removeprefix("data.")
    meant = [each for each in known if each.endswith(f".{name}")]
    return meant[0] if len(meant) == 1 else name


def take_values(left: list[str], hint: Any) -> list[str]:
    """Remove the value of an option from the words behind it: all up to the next one for a tuple,
    one for others, none for a flag but `true` or `false`."""
    if hint is bool and (not left or left[0].lower() not in ("true", "false")):
        return ["true"]
    most = len(left) if tuple in origins(hint) else 1
    values = [*takewhile(lambda word: not word.startswith("--"), left[:most])]
    del left[: len(values)]
    return values


def grows(hint: Any) -> bool:
    """Whether a value has any number of parts: a list, or a tuple of no fixed length."""
    return list in origins(hint) or any(... in get_args(part) for part in (hint, *get_args(hint)))


def origins(hint: Any) -> set[Any]:
    """The kinds of container that a value may be, such as `list` of `list[str] | None`."""
    return {get_origin(hint), *map(get_origin, get_args(hint))}


def value_of(words: Any, hint: Any) -> Any:
    """The words of an option as the value that a recipe would hold; text if they are not one."""
    inner = get_args(hint)
    if isinstance(words, list):
        if words in (["none"], ["null"]) and NoneType in inner and str not in inner:
            return None
        values = [value_of(word, hint) for word in words]
        alone = len(values) == 1 and (isinstance(values[0], list) or str in inner[1:])
        return values[0] if alone else values
    if not isinstance(words, str) or hint is str or get_origin(hint) is Literal:
        return words
    if hint is bool and words.lower() in ("true", "false"):
        return words.lower() == "true"
    if words.lower() in ("none", "null") and NoneType in inner:
        return None
    if str not in inner or float in inner or words.startswith("["):
        for reader in (json.loads, ast.literal_eval, float, with_not_finite):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return reader(words)
    return words


def with_not_finite(words: str) -> Any:
    """A list in which numbers that are not finite are written as in TOML and Python."""
    names = {"nan": "NaN", "inf": "Infinity"}
    return json.loads(re.sub(r"\b(nan|inf)\b", lambda match: names[match[0]], words))


def help_text(command: str, kind: type[Any]) -> str:
    """What `--help` shows of a command."""
    words = [entry.name.upper() for entry in fields(kind) if not entry.kw_only]
    usage = " ".join(["usage: protoclip", command, *words, "[OPTIONS]"])
    note = "In brackets: the default, then other choices. --no-NAME switches a flag off."
    if any(entry.name == "run" for entry in fields(kind)):
        note += "\nThe last part of a name will do if no other ends in it: --seed, --lora 8."
    lines = section_help(kind, getattr(kind, "defaults", {}))
    return "\n".join([usage, "", inspect.getdoc(kind) or "", "", note, *lines])


def section_help(
    kind: type[Any], defaults: Mapping[str, Any] = MappingProxyType({}), prefix: str = ""
) -> Iterator[str]:
    """The settings of a section, one line each; then its sections. A command may have `defaults` of
    its own, by the names of settings."""
    hints, texts = get_type_hints(kind), descriptions(kind)
    rows: dict[str, str] = {}
    sections: list[str] = []
    own = inspect.get_annotations(kind)
    entries = sorted(fields(kind), key=lambda entry: entry.name not in own)  # then what is shared
    for entry in sorted(entries, key=is_optional):
        hint, default = hints[entry.name], defaults.get(f"{prefix}{entry.name}", entry.default)
        default = "on" if default is True else "off" if entry.default is True else default
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        if is_dataclass(hint):
            sections += section_help(hint, defaults, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
            continue
        name = f"--{prefix}{entry.name}" if entry.kw_only else entry.name.upper()
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        shown = "|".join([str(default), *(c for c in choices if c != default)])
        silent = default is None or default is False or default is MISSING
        rows[name] = texts[entry.name] + ("" if silent else f" [{shown}]")
    return iter(["", *aligned(rows), *sections])


def is_optional(entry: Field[Any]) -> tuple[bool, bool]:
    """Sorts arguments before what must be given by name, and that before the rest."""
    return bool(entry.kw_only), not entry.default is entry.default_factory is MISSING


def aligned(rows: Mapping[str, str]) -> Iterator[str]:
    """Names, and texts beside them, or below in a narrow terminal, in its width."""
    column, width = max(map(len, rows), default=0) + 4, shutil.get_terminal_size().columns
    is_narrow = width < column + 30
    indent = " " * (6 if is_narrow else column)
    for name, text in rows.items():
        line = text if is_narrow else f"  {name}".ljust(column) + text
        first = indent if is_narrow else ""
        yield from [f"  {name}"] * is_narrow
        yield from textwrap.wrap(
            line, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
        )


def descriptions(kind: type[Any]) -> dict[str, str]:
    """The comments behind the fields of a class and of its parents."""
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        texts |= read_comments(owner.__module__).get(owner.__name__, {})
    return texts


@cache
def read_comments(module: str) -> dict[str, dict[str, str]]:
    """The comments behind the fields of a module's classes; `inspect` would parse it for each."""
    by_class: dict[str, dict[str, str]] = {}
    texts: dict[str, str] = {}
    for line in inspect.getsource(sys.modules[module]).splitlines():
        if line[:1].strip():  # a class, or something else, whose lines count for none
            found = re.match(r"class (\w+)", line)
            texts = by_class.setdefault(found[1] if found else "", {})
        elif found := re.match(r"    (\w+): .*  # (.+)$", line):
            texts[found[1]] = found[2]
    return by_class
