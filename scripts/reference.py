"""The pages of the reference that are made from the code, as Markdown.

Every setting from config.py, every command's help, and the public names of the package. The site's
build calls this (scripts/site_hooks.py).
"""

import ast
import dataclasses
import inspect
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import protoclip
from protoclip import config
from protoclip.cli import COMMANDS
from protoclip.cli.spec import descriptions, help_text
from protoclip.config import shown

SOURCE = Path(protoclip.__file__).parent
# The pages that explain a section of settings, where they are called otherwise.
PAGES = {
    "run": "training.md",
    "model": "models.md",
    "episodes": "data.md#episodes",
    "prototypes": "method.md",
    "teacher": "teachers.md",
    "loss": "method.md#the-sum",
    "optim": "training.md#the-model-and-what-follows-from-it",
    "encode": "embed.md",
    "parallel": "scaling.md",
}
KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
GROUPS = {
    "Train and use": [
        "Config",
        "train",
        "align",
        "finetune",
        "load",
        "evaluate",
        "embed",
        "export",
    ],
    "The method, on tensors": [
        *("info_nce", "sigmoid_loss", "kmeans", "KMeans", "back_translate"),
        *("prototypical_loss", "Target", "objective", "Embeddings", "ProtoCLIP"),
    ],
}
MEMBERS = {"Config": ["from_dict"], "ProtoCLIP": ["encode_image", "encode_text", "forward"]}


def settings() -> str:
    """A table a section: the name, type, default, limits and comment of every setting."""
    lines = [
        "# Settings",
        "",
        "Every setting of a run, made from `config.py`. A recipe holds them as TOML (`[data]`, "
        '`train = "pairs.tsv"`), the command line as `--data.train pairs.tsv`, and Python as '
        '`protoclip.Config.from_dict({"data": {"train": "pairs.tsv"}})`. *Unset* means that a '
        "value follows from the data, the model or the command; a run prints it and keeps it in "
        "`config.toml`. `align` and `finetune` have other defaults ([align.md](../align.md), "
        "[models.md](../models.md#fine-tune)).",
        *section(config.Config, ""),
        "",
        "## Only on the command line",
        "",
        "- `data.allow_links`: a recipe cannot allow it.",
        "",
        "## Settings of earlier versions",
        "",
        "| setting | what became of it |",
        "|---|---|",
        *(f"| `{name}` | {what} |" for name, (what, _) in config.REMOVED.items()),
    ]
    return "\n".join(lines) + "\n"


def section(kind: type[Any], prefix: str) -> Iterator[str]:
    """The table of a section's settings, then its sections."""
    hints, texts = get_type_hints(kind, include_extras=True), descriptions(kind)
    entries = [
        entry
        for entry in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(hints[entry.name])
    ]
    rows, title = [], prefix.rstrip(".")
    for entry in entries:
        name, hint = prefix + entry.name, hints[entry.name]
        default = entry.default
        if default is dataclasses.MISSING:
            has_none = entry.default_factory is dataclasses.MISSING
            default = None if has_none else entry.default_factory()  # type: ignore[misc]
        text = "unset" if default is None else f"`{shown(default)}`"
        title_cell = f'<span id="{name}"></span>`{name}`'
        cells = (title_cell, texts[entry.name], type_of(hint), text, limits(hint))
        rows.append(f"| {' | '.join(cells)} |")
    head = ("| setting | what | type | default | limits |", "|---|---|---|---|---|")
    if prefix:
        yield from ("", f"{'##' if prefix.count('.') < 2 else '###'} [{title}]", "")
        if "." not in title:
            page = PAGES.get(title, f"{title}.md")
            yield from (f"Explained in [{page}](../{page}).", "")
        yield from (*head, *rows)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from section(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        elif get_origin(hint) is list and get_args(hint)[0] is config.SourceConfig:
            yield from section(get_args(hint)[0], f"{prefix}{entry.name}[].")
    if not prefix:
        yield from ("", "## Outside of sections", "", *head, *rows)


def type_of(hint: Any) -> str:
    """What a value may be, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated and config.SEVERAL in inner:
        return f"{type_of(Literal[inner[2:]] if inner[2:] else inner[0])}, or a list of them"
    if origin is Annotated:
        return type_of(inner[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join(type_of(part) for part in inner if part is not NoneType)
    if origin is list and dataclasses.is_dataclass(inner[0]):
        return "list of tables"
    if origin is list:
        return f"list of {type_of(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} numbers"
    return KINDS[hint]


def limits(hint: Any) -> str:
    """The least and the most that a number may be."""
    found = []
    for part in walk(hint):
        _, least, most = get_args(part)
        low = "above 0" if least == config.ABOVE_0 else f"from {least}"
        high = "below 1" if most == config.BELOW_1 else f"to {rounded(most)}"
        found.append(low if most == math.inf else f"{low} {high}")
    return "; ".join(dict.fromkeys(found))


def rounded(most: float) -> str:
    """A limit as people read it."""
    for power in (31, 40, 63):
        if most in (2**power, 2**power - 1):
            return f"2^{power}" + (" - 1" if most < 2**power else "")
    return f"{most:,.0f}" if most > 1 else f"{most}"


def walk(hint: Any) -> Iterator[Any]:
    """The annotations with limits within a type."""
    if get_origin(hint) is Annotated:
        if config.SEVERAL not in get_args(hint):
            yield hint
    else:
        for inner in get_args(hint):
            yield from walk(inner)


def commands() -> str:
    """The help of every command; settings of a run are named by their sections."""
    names = {field.name for field in dataclasses.fields(config.Config)}
    lines = [
        "# Commands",
        "",
        "What `protoclip COMMAND --help` says. Where a command takes settings of a run, "
        "[Settings](settings.md) has them; here their sections are named.",
    ]
    for name, kind in COMMANDS.items():
        kept, sections = [], {}
        for line in full_help(name, kind).splitlines():
            first = line.strip().removeprefix("--").partition(".")[0]
            if line.startswith("  --") and "." in line.split()[0] and first in names:
                sections[first] = None
            else:
                kept.append(line)
        text = "\n".join(kept).strip("\n")
        lines += ["", f"## {name}", "", "```text", text, "```"]
        if sections:
            links = ", ".join(f"[`[{section}]`](settings.md#{section})" for section in sections)
            lines += ["", f"And the settings of {links}."]
    return "\n".join(lines) + "\n"


def full_help(name: str, kind: type[Any]) -> str:
    """A command's help in a wide terminal, so that an option is a line."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "160"
    try:
        return help_text(name, kind, True)
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def python() -> str:
    """The public names, which mkdocstrings shows from their docstrings."""
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(protoclip.__all__), "a public name has no place here"
    lines = [
        "# Python",
        "",
        "The public API is what `protoclip` lists: `import protoclip`, then `protoclip.NAME`. "
        "Names load their modules on first use.",
    ]
    for title, names in GROUPS.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", f"::: {path_of(name)}"]
            if name in MEMBERS:
                members = f"[{', '.join(MEMBERS[name])}]"
                lines += [
                    "    options:",
                    f"      members: {members}",
                    "      inherited_members: true",
                ]
            if name == "Config":
                lines += ["", "Its fields are the sections of [Settings](settings.md)."]
    return "\n".join(lines) + "\n"


def path_of(name: str) -> str:
    """The module of a public name, and its name there."""
    module = next(module for module, names in protoclip._MODULES.items() if name in names)
    return f"protoclip.{module}.{name}"


def python_as_text() -> str:
    """Signature and docstring of each public name."""
    lines = ["# Python"]
    for names in GROUPS.values():
        for name in names:
            module = path_of(name).split(".")[1:-1]
            tree = ast.parse(
                (SOURCE.joinpath(*module).with_suffix(".py")).read_text(encoding="utf-8")
            )
            node = next(node for node in tree.body if getattr(node, "name", None) == name)
            assert isinstance(node, ast.FunctionDef | ast.ClassDef)
            lines += ["", f"## protoclip.{name}", "", "```python", *signatures(node), "```", ""]
            lines.append(inspect.cleandoc(ast.get_docstring(node) or ""))
    return "\n".join(lines) + "\n"


def signatures(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """The line that a function begins with; of a class also its fields and public methods."""
    if isinstance(node, ast.FunctionDef):
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"def {node.name}({ast.unparse(node.args)}){result}"
        return
    yield f"class {node.name}"
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign):
            yield f"    {ast.unparse(inner)}"
        elif isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
            yield f"    {next(signatures(inner))}"
