"""From a command line and recipes to a command with its settings, and to its help.

A command is a dataclass: positional fields are positional arguments, keyword-only fields options,
and nested dataclasses sections (`--section.name value`). The comment behind a field is its help.
"""

import ast
import inspect
import json
import re
import shutil
import textwrap
import tomllib
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from glob import iglob
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from protoclip.config import PERMISSIONS, Config, build, unknown

Command = TypeVar("Command")
# Settings that may name a file or folder beside the recipe.
PLACES = {"train", "path", "root", "checkpoint", "features"}


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """A command whose sections may come from recipes."""

    config: list[str] = field(default_factory=list)  # Recipe: settings as TOML. May be repeated.


class OptionParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub("^argument (.+): expected .*", r"\1: needs a value", message))


def parse(kind: type[Command], words: list[str]) -> Command:
    """Later recipes override earlier ones; options override recipes. Any order of words will do.

    Raises:
        ValueError: In one line that names the option, or the recipe and its setting.
    """
    hints, known = get_type_hints(kind), dict(options(kind))
    positional = arguments_of(kind)
    parser = OptionParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    for name in known.keys() - positional:
        kinds = {get_origin(known[name]), *map(get_origin, get_args(known[name]))}
        if list in kinds:  # repeat the option to add more
            parser.add_argument(f"--{name}", action="append")
        else:
            parser.add_argument(f"--{name}", nargs="+" if tuple in kinds else None)
    found, rest = parser.parse_known_args(spelled_out(words, known))
    given = vars(found)
    for word in rest:
        if word.startswith("-"):
            name = word.partition("=")[0].lstrip("-")
            raise ValueError(unknown(name, [*known]))
    for name in positional:
        if rest and get_origin(hints[name]) is list:
            given[name], rest = rest, []
        elif rest:
            given[name], *rest = rest
    if rest:
        raise ValueError(f"{rest[0]}: unexpected argument")
    tree: dict[str, Any] = {}
    for path in given.get("config", []):
        recipe, sections = read_recipe(Path(path)), get_type_hints(Config)
        tree = merged(tree, {k: v for k, v in recipe.items() if hints.get(k) == sections[k]})
    for name in given:
        value = value_of(given[name], known[name])
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return build(kind, tree)


def arguments_of(kind: type[Any]) -> list[str]:
    return [entry.name for entry in fields(kind) if not entry.kw_only]


def options(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of all arguments of a command, those of its sections included."""
    hints = get_type_hints(kind)
    for name in (entry.name for entry in fields(kind)):
        if is_dataclass(hints[name]):
            yield from options(hints[name], f"{prefix}{name}.")
        else:
            yield prefix + name, hints[name]


def spelled_out(words: list[str], known: Mapping[str, Any]) -> list[str]:
    """Options with `_` for `-`, and flags with a value: `--json=true`, `--run.evaluate=false`."""
    result = []
    for word, following in pairwise([*words, ""]):
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name[2:].replace("-", "_")
        positive = re.sub(r"(^|\.)no_", r"\1", name)
        if name not in known and known.get(positive) is bool:
            name, equals, value = positive, "=", "false"
        elif known.get(name) is bool and not equals and following.lower() not in ("true", "false"):
            equals, value = "=", "true"
        result.append(f"--{name}{equals}{value}")
    return result


def value_of(words: Any, hint: Any) -> Any:
    """The words of an option as the value that a recipe would hold; text if they are not one."""
    inner = get_args(hint)
    if isinstance(words, list):
        values = [value_of(word, hint) for word in words]
        alone = len(values) == 1 and (isinstance(values[0], list) or str in inner[1:])
        return values[0] if alone else values
    if not isinstance(words, str) or hint is str or get_origin(hint) is Literal:
        return words
    if words.lower() in ("none", "null") and NoneType in inner:
        return None
    if str not in inner or words.startswith("["):
        for reader in (json.loads, ast.literal_eval, float):
            with suppress(ValueError, SyntaxError):
                return reader(words)
    return words


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, checked."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"--config: {path}: no such file") from error
    except ValueError as error:
        raise ValueError(f"--config: {path}: not TOML ({error})") from error
    try:
        data = build(Config, tree).data
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for permission in PERMISSIONS:
        if getattr(data, permission):
            raise ValueError(
                f"{path}: data.{permission}: a recipe cannot allow this; remove it, and say "
                f"--data.{permission} true on the command line if you trust the source"
            )
    return {name: located(value, path.parent) for name, value in tree.items()}


def located(value: Any, folder: Path, name: str = "") -> Any:
    """A value of a recipe in this folder, with its paths located.

    A relative path starts at the current folder, or at the recipe's if only that has such a file.
    """
    if isinstance(value, dict):
        return {key: located(inner, folder, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [located(inner, folder, name) for inner in value]
    if name not in PLACES or value == "emoji":
        return value
    pattern = re.sub(r"\{.*\}", "*", value)
    # Path.glob refuses absolute patterns.
    here, beside = any(iglob(pattern)), any(iglob(pattern, root_dir=folder))  # noqa: PTH207
    return str(folder / value) if beside and not here else value


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of settings; `above` wins."""
    both = [k for k in below.keys() & above.keys() if isinstance(below[k], dict)]
    return {**below, **above, **{name: merged(below[name], above[name]) for name in both}}


def help_text(command: str, kind: type[Any]) -> str:
    """What `--help` shows of a command."""
    words = [name.upper() for name in arguments_of(kind)]
    usage = " ".join(["usage: protoclip", command, *words, "[OPTIONS]"])
    note = "In brackets: the default, then other choices. --no-NAME switches a flag off."
    return "\n".join([usage, "", inspect.getdoc(kind) or "", "", note, *section_help(kind)])


def section_help(kind: type[Any], prefix: str = "") -> Iterator[str]:
    """The settings of a section, one line each; then its sections."""
    hints, texts = get_type_hints(kind), descriptions(kind)
    rows: dict[str, str] = {}
    sections: list[str] = []
    for entry in fields(kind):
        hint, default = hints[entry.name], "on" if entry.default is True else entry.default
        if is_dataclass(hint):
            sections += section_help(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
            continue
        name = f"--{prefix}{entry.name}" if entry.kw_only else entry.name.upper()
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        shown = "|".join([str(default), *(c for c in choices if c != default)])
        silent = default is None or default is False or default is MISSING
        rows[name] = texts[entry.name] + ("" if silent else f" [{shown}]")
    return iter(["", *aligned(rows), *sections])


def aligned(rows: Mapping[str, str]) -> Iterator[str]:
    """Names, and texts beside them, in the width of the terminal."""
    column, width = max(map(len, rows), default=0) + 4, shutil.get_terminal_size().columns
    for name, text in rows.items():
        line, indent = f"  {name}".ljust(column) + text, " " * column
        yield from textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)


def descriptions(kind: type[Any]) -> dict[str, str]:
    """The comments behind the fields of a class and of its parents."""
    sources = [inspect.getsource(owner) for owner in kind.__mro__[:-1]]
    return dict(re.findall(r"^    (\w+): .*  # (.+)$", "".join(sources), re.MULTILINE))
