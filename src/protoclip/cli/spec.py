"""From a command line and recipes to a command with its settings, and to its help.

A command is a dataclass: positional fields are positional arguments, keyword-only fields options,
and nested dataclasses sections (`--section.name value`). The comment behind a field is its help.
Options that several commands take are declared here, as classes that these commands inherit.
"""

import ast
import atexit
import gc
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from protoclip.config import Config, Count, DataConfig, build, describe_unknown, hints_of, is_each
from protoclip.files import read_local, to_json
from protoclip.rules import require_path

if TYPE_CHECKING:  # `--help` does without
    import torch

Command = TypeVar("Command")
SECTIONS = {section.name for section in fields(Config)}
# Libraries that a command needs, which come with an extra of its name.
LIBRARIES = {
    "report": ("jinja2", "matplotlib"),
    "explore": ("bokeh", "jinja2", "starlette", "uvicorn"),
}


# Options that commands share


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A command that answers: every one but `completion`."""

    json: bool = False  # Print the results as JSON.

    def answer(self, results: Any, show: Callable[[], object]) -> None:
        """Print results, as JSON if that is asked for, and else as `show` does."""
        if self.json:
            print(to_json(results, indent=2), flush=True)
        else:
            show()


@dataclass(frozen=True, kw_only=True)
class Recipes(Answers):
    """A command whose sections may come from recipes."""

    config: list[str] = field(default_factory=list)  # Recipe: settings as TOML. May be repeated.

    # What recipes and the command line set, as they say it; the rest has defaults.
    given: ClassVar[Mapping[str, Any]] = {}

    def settings(self) -> dict[str, Any]:
        """The sections of a run that recipes and the command line set."""
        return {name: value for name, value in self.given.items() if name in SECTIONS}


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps.
    engine: Literal["auto", "torch", "onnx", "openvino"] = "auto"  # CPU encoder; auto: fastest.


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
    caption_column: list[str] | str | None = None  # Column(s) of captions (A B); else detected.
    id_column: str | None = None  # Column of sample ids; else detected.
    root: str | None = None  # Folder that holds all images of a table.
    allow_links: bool = False  # Follow symbolic links that leave the root.

    def data_settings(self) -> dict[str, Any]:
        """The options of this command that are given and are settings of `data` by their names."""
        # Encoders have the names of two settings here, which align alone uses.
        names = {entry.name for entry in fields(DataConfig)} - {"images", "texts"}
        given = {name: value for name, value in vars(self).items() if name in names}
        return {k: v for k, v in given.items() if v is not None and v is not False}


@dataclass(frozen=True, kw_only=True)
class ChosenOptions(TableOptions):
    """... and which samples are used."""

    only: str | None = None  # CSV or JSON file: use the samples with these ids.
    without: str | None = None  # CSV or JSON file: leave these ids out.


@dataclass(frozen=True, kw_only=True)
class PairsOptions(ChosenOptions):
    """... of the pairs that a command names."""

    data: str  # Pairs: table, hf:OWNER/NAME, shards or folder.
    read: Literal["auto", "streaming"] = "auto"  # auto: local shards are indexed.


# What a command needs to start


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import within it what a command needs; that takes a sixth less time.

    Python's cyclic collector would look at half a million objects that stay, again and again. So
    it rests here, and leaves them alone afterwards.
    """
    if "torch" in sys.modules:  # other objects are there, which may be garbage
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if "triton" in sys.modules:  # what is left of it at the end, it complains of in many lines
            atexit.register(gc.unfreeze)


def open_device(name: str = "auto") -> "torch.device":
    """The device that `--device` names, with torch set up for it, whose import takes a second."""
    import torch

    from protoclip.distributed import collectives

    torch.set_flush_denormal(True)  # CPUs are very slow with the denormals of soft targets
    return collectives.choose_device(name, setting="device" if name == "auto" else "--device")


def require_libraries(command: str) -> None:
    """Refuse a command whose libraries are missing, with what to install."""
    if missing := [name for name in LIBRARIES[command] if find_spec(name) is None]:
        raise ValueError(
            f"{command}: needs {' and '.join(missing)}; pip install 'protoclip[{command}]'"
        )


# From words to a command


def parse(kind: type[Command], words: list[str]) -> Command:
    """Later recipes override earlier ones; options override recipes. Any order of words will do."""
    hints, sections = get_type_hints(kind), get_type_hints(Config)
    typed, rest = read_options(kind, words)
    for name in positional(kind):
        if rest and get_origin(hints[name]) is list:
            typed[name], rest = rest, []
        elif rest:
            typed[name], *rest = rest
    if rest:
        raise ValueError(f"{rest[0]}: unexpected argument")
    given: dict[str, Any] = {}
    for path in typed.get("config", []):
        require_path("--config", path)
        recipe = read_recipe(Path(path))
        given = merge_trees(given, {k: v for k, v in recipe.items() if hints.get(k) == sections[k]})
    given = merge_trees(given, typed)
    command = build(kind, given)
    if isinstance(command, Recipes):
        object.__setattr__(command, "given", given)  # commands are frozen
    return command


def positional(kind: type[Any]) -> list[str]:
    """The fields of a command that are given without their names."""
    return [entry.name for entry in fields(kind) if not entry.kw_only]


def options(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of all arguments and options of a command, those of its sections included."""
    hints = get_type_hints(kind)
    for name in (entry.name for entry in fields(kind)):
        if is_dataclass(hints[name]):
            yield from options(hints[name], f"{prefix}{name}.")
        else:
            several = is_each(hints_of(kind)[name])  # type: ignore[arg-type]
            several |= {str, list[str]} <= {*get_args(hints[name])}
            yield prefix + name, tuple[str, ...] | hints[name] if several else hints[name]


def read_options(kind: type[Any], words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options among the words as a tree of settings, and the other words.

    `--no-NAME` switches a flag off. A list, or a tuple of any length, grows with each option. An
    argument that is needed may stand behind such a tuple: its last word is that one.
    """
    types, left, rest = dict(options(kind)), list(words), list[str]()
    given: dict[str, list[str]] = {}
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        option, is_joined, value = word.partition("=")
        value = expand_home(value)  # shells leave it as it is behind "="
        name = option.lstrip("-").replace("-", "_")
        flag = full_name(re.sub(r"(^|\.)no_", r"\1", name), types)
        name = full_name(name, types)
        if name in types:
            values = [value] if is_joined else take_values(left, types[name])
        elif types.get(flag) is bool and not is_joined:
            name, values = flag, ["false"]
        else:
            raise ValueError(describe_unknown(name, [*types]))
        if not values:
            raise ValueError(f"{option}: needs a value")
        hints = (types[name], *get_args(types[name]))
        grows = list in containers(types[name]) or any(... in get_args(hint) for hint in hints)
        given[name] = [*given.get(name, ()), *values] if grows else values
    needed = [entry for entry in fields(kind) if not entry.kw_only and entry.default is MISSING]
    several = [own for name, own in given.items() if tuple in containers(types[name]) and own[1:]]
    if needed and not rest and several:
        rest.append(several[-1].pop())
    tree: dict[str, Any] = {}
    for name, own in given.items():  # as the value that a recipe would hold
        values, hint = [read_word(word, types[name]) for word in own], types[name]
        is_list = values[0] is None or isinstance(values[0], list) or str in get_args(hint)[1:]
        has_parts = {list, tuple} & containers(hint) and not (len(values) == 1 and is_list)
        setting: Any = values if has_parts else values[0]
        for part in reversed(name.split(".")):
            setting = {part: setting}
        tree = merge_trees(tree, setting)
    return tree, rest


def full_name(name: str, names: Collection[str]) -> str:
    """The option that is meant: `run.seed` by `seed`, if nothing else ends in it."""
    # Some commands take settings of `data` by their own names.
    if "data.train" not in names:
        name = name.removeprefix("data.")
    meant = [option for option in names if option.endswith(f".{name}")]
    return meant[0] if name not in names and len(meant) == 1 else name


def take_values(left: list[str], hint: Any) -> list[str]:
    """Remove an option's value from the words behind it: all up to the next option for a tuple, or
    for sections."""
    if hint is bool and (not left or left[0].lower() not in ("true", "false")):
        return ["true"]
    most = len(left) if tuple in containers(hint) or any(map(is_dataclass, get_args(hint))) else 1
    values = [*takewhile(lambda word: not word.startswith("--"), left[:most])]
    del left[: len(values)]
    return values


def containers(hint: Any) -> set[Any]:
    """The kinds of container that a value may be, such as `list` of `list[str] | None`."""
    return {get_origin(hint), *map(get_origin, get_args(hint))}


def read_word(word: str, hint: Any) -> Any:
    """A word as a number, a flag, a list or None, if it is one; else as text."""
    kinds = get_args(hint)
    if hint is str or get_origin(hint) is Literal:
        return word
    if word.lower() in ("none", "null") and NoneType in kinds:
        return None
    if str not in kinds or float in kinds or word.startswith("["):
        for reader in (json.loads, ast.literal_eval, float):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return reader(word)
    return word


# Recipes


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, checked."""
    try:
        tree = tomllib.loads(read_local(path, encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config: {path}: not TOML ({error})") from error
    try:
        config = build(Config, tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if config.data.allow_links:
        raise ValueError(
            f"{path}: data.allow_links: a recipe cannot allow this; remove it, and say "
            "--allow_links true on the command line if you trust the source"
        )
    for name in config.run.loggers:
        if ":" in name:
            raise ValueError(
                f"{path}: run.loggers: a recipe cannot name a class ({name}); remove it, and give "
                "--run.loggers on the command line if you trust its code"
            )
    return {name: expand_home(value) for name, value in tree.items()}


def expand_home(value: Any) -> Any:
    """A value, or all values in it, with the home folder for a `~/` at its beginning."""
    if isinstance(value, dict):
        return {key: expand_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand_home(inner) for inner in value]
    is_home = isinstance(value, str) and value.startswith("~/")
    return os.path.expanduser(value) if is_home else value  # noqa: PTH111


def merge_trees(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of settings; `above` wins."""
    both = [k for k in below.keys() & above.keys() if isinstance(below[k], dict)]
    return {**below, **above, **{name: merge_trees(below[name], above[name]) for name in both}}


# Help


def help_text(command: str, kind: type[Any], everything: bool = False) -> str:
    """What `--help` shows of a command: of one that trains the usual settings, or everything."""
    words = [name.upper() for name in positional(kind)]
    usage = " ".join(["usage: protoclip", command, *words, "[OPTIONS]"])
    note = "In brackets: the default, then other choices. --no-NAME switches a flag off.\n"
    note += "-q prints only warnings and errors."
    usual = "run" in (names := [entry.name for entry in fields(kind)]) and not everything
    if "run" in names:
        note += "\nThe last part of a name is enough if it is unique: --seed, --lora 8."
    lines = [*section_help(kind, getattr(kind, "defaults", {}), usual=usual)]
    lines += ["", f"protoclip {command} --help all lists all settings."] * usual
    return "\n".join([usage, "", inspect.getdoc(kind) or "", "", note, *lines])


def section_help(
    kind: type[Any], defaults: Mapping[str, Any], prefix: str = "", *, usual: bool = False
) -> Iterator[str]:
    """The settings of a section, one line each; then its sections. A command may have `defaults` of
    its own, by the names of settings. With `usual`, sections have their marked settings alone."""
    hints, texts, marked = get_type_hints(kind), descriptions(kind), descriptions(kind, usual=usual)
    rows: dict[str, str] = {}
    sections: list[str] = []
    own = inspect.get_annotations(kind)
    entries = sorted(fields(kind), key=lambda entry: entry.name not in own)  # then what is shared
    for entry in sorted(entries, key=is_optional):
        hint, default = hints[entry.name], defaults.get(f"{prefix}{entry.name}", entry.default)
        default = "on" if default is True else "off" if entry.default is True else default
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        if is_dataclass(hint):
            inner = f"{prefix}{entry.name}."
            sections += section_help(hint, defaults, inner, usual=usual)  # type: ignore[arg-type]
            continue
        if entry.name not in marked and (prefix or entry.name in SECTIONS):
            continue
        name = f"--{prefix}{entry.name}" if entry.kw_only else entry.name.upper()
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        shown = "|".join([str(default), *(c for c in choices if c != default)])
        silent = default is None or default is False or default is MISSING
        rows[name] = texts[entry.name] + ("" if silent else f" [{shown}]")
    return iter([*[""] * bool(rows), *align_rows(rows), *sections])


def is_optional(entry: Field[Any]) -> tuple[bool, bool]:
    """Sorts arguments before what must be given by name, and that before the rest."""
    return bool(entry.kw_only), not entry.default is entry.default_factory is MISSING


def align_rows(rows: Mapping[str, str]) -> Iterator[str]:
    """Names, and texts beside them, in the width of the terminal."""
    column = max(map(len, rows), default=0) + 4
    width = max(shutil.get_terminal_size().columns, column + 30)
    for name, text in rows.items():
        line, indent = f"  {name}".ljust(column) + text, " " * column
        yield from textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)


def descriptions(kind: type[Any], *, usual: bool = False) -> dict[str, str]:
    """The comments behind the fields of a class and of its parents; or the `usual`, marked ones."""
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        texts |= read_comments(owner.__module__).get(owner.__name__, {})
    mark = ":" if usual else ""
    return {name: text.lstrip(": ") for name, text in texts.items() if text.startswith(mark)}


@cache
def read_comments(module: str) -> dict[str, dict[str, str]]:
    """The comments behind the fields of a module's classes; `inspect` would parse it for each."""
    by_class: dict[str, dict[str, str]] = {}
    texts: dict[str, str] = {}
    for line in inspect.getsource(sys.modules[module]).splitlines():
        if line[:1].strip():  # a class, or something else, whose lines count for none
            found = re.match(r"class (\w+)", line)
            texts = by_class.setdefault(found[1] if found else "", {})
        elif found := re.match(r"    (\w+): .*  #(:? .+)$", line):
            texts[found[1]] = found[2]
    return by_class
