"""Recipes: settings as TOML, whose paths start at the current folder or beside the recipe."""

import os
import re
import tomllib
from collections.abc import Mapping
from glob import iglob
from pathlib import Path
from typing import Any

from protoclip.config import HALVES, START, Config, build
from protoclip.files import read_local

# What stands for no file in `teacher.features`.
TEACHERS_OF_A_RUN = ("emoji", START, *HALVES.values())
# Settings that may name a file or folder beside the recipe, and the words there that name none.
PATH_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "data.train": ("emoji",),
    "data.sources.path": ("emoji",),
    "data.sources.root": (),
    "data.validation": ("emoji",),
    "data.root": (),
    "data.only": (),
    "data.without": (),
    "run.guard": ("emoji",),
    "model.start": (),
    "model.image.name": (),
    "model.image.weights": ("published",),
    "model.text.name": ("minilm",),
    "teacher.features": TEACHERS_OF_A_RUN,
    "teachers.features": TEACHERS_OF_A_RUN,
    "align.features": (),
}
# In a guard, what may stand before a file or folder.
PATH_PREFIXES = ("wds:", "karpathy:", "root=")
# The settings that name models, and what may stand before and behind a file or folder there.
MODEL_SETTINGS = ("model.start", "model.image.name", "model.text.name")
MODEL_PATH = re.compile(r"((?:local-dir|hf|reference):)?(.*?)(,model=[^,]*)?", re.DOTALL)


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
            "--data.allow_links true on the command line if you trust the source"
        )
    for name in config.run.loggers:
        if ":" in name:
            raise ValueError(
                f"{path}: run.loggers: a recipe cannot name a class ({name}); remove it, and give "
                "--run.loggers on the command line if you trust its code"
            )
    return {name: located(value, path.parent, name) for name, value in tree.items()}


def located(value: Any, folder: Path, name: str) -> Any:
    """The value of a setting of a recipe in this folder, with its paths located.

    A relative path starts at the current folder, or at the recipe's if only that has such a file.
    """
    if isinstance(value, dict):
        return {key: located(inner, folder, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [located(inner, folder, name) for inner in value]
    if isinstance(value, str) and value.startswith("~/"):
        value = os.path.expanduser(value)  # noqa: PTH111
    if not isinstance(value, str) or value in PATH_SETTINGS.get(name, (value,)):
        return value
    if name == "run.guard":  # may have settings of its own, one of which is a folder
        return ",".join(located_part(part, folder) for part in value.split(","))
    if name in MODEL_SETTINGS:
        return located_model(value, folder, name)
    return located_path(value, folder)


def located_model(reference: str, folder: Path, name: str) -> str:
    parts = MODEL_PATH.fullmatch(reference)
    assert parts is not None, "any text fits"
    before, path, behind = (part or "" for part in parts.groups())
    moved = f"{before}{located_path(path, folder)}{behind}"
    if moved != reference and name == "model.image.name":
        from protoclip.models.timm import is_image_name

        return reference if is_image_name(reference) else moved
    return moved


def located_part(part: str, folder: Path) -> str:
    before = next((each for each in PATH_PREFIXES if part.startswith(each)), "")
    return before + located_path(part.removeprefix(before), folder)


def located_path(path: str, folder: Path) -> str:
    pattern = re.sub(r"\{.*\}", "*", path)
    # Path.glob refuses absolute patterns.
    here, beside = any(iglob(pattern)), any(iglob(pattern, root_dir=folder))  # noqa: PTH207
    return str(folder / path) if beside and not here else path


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of settings; `above` wins."""
    both = [k for k in below.keys() & above.keys() if isinstance(below[k], dict)]
    return {**below, **above, **{name: merged(below[name], above[name]) for name in both}}
