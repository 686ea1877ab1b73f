"""Names of data sets, in records and in the names of metrics."""

import re
from pathlib import Path

from protoclip.terminal import without_secrets

#: Names of folders or tables of one split, which do not distinguish data sets.
SPLITS = ("train", "val", "valid", "validation", "dev", "test")


def plain(name: str) -> str:
    """A name of letters, digits and hyphens only; empty for a pattern.

    >>> plain("my shop"), plain("*")
    ('my-shop', '')
    """
    return re.sub(r"[^\w-]+", "-", name).strip("-")


def add_folder(name: str, folder: str) -> str:
    """A name, with the name of the folder above it if it is a split's.

    >>> add_folder("test", "photos"), add_folder("shop", "photos")
    ('photos-test', 'shop')
    """
    return f"{folder}-{name}" if folder and name.lower() in SPLITS else name


def name_folder(folder: Path) -> str:
    """The name of a folder of classes."""
    real = folder.resolve()
    return add_folder(real.name, real.parent.name)


def name_pairs(name: str, reference: str) -> str:
    """The name of a source of pairs: its own, or that of the folder above it."""
    folders = [folder.name for folder in Path(without_secrets(reference).rstrip("/")).parents]
    parts = [plain(Path(name.rstrip("/")).stem), *map(plain, folders[:2])]
    names = [*filter(None, parts), "", ""]
    return add_folder(names[0], names[1]) or "data"


def name_run_data(run: Path, split: str) -> str:
    """The name of a run's held-out pairs, for evaluating other models on them."""
    return f"{plain(run.resolve().name) or 'run'}-{split}"
