"""What data sets are called, in records and in the names of metrics."""

import re
from pathlib import Path

from protoclip.terminal import without_secrets

#: What a folder or table of one split is called, which does not tell data sets apart.
SPLITS = ("train", "val", "valid", "validation", "dev", "test")


def plain(name: str) -> str:
    """A name with letters, digits and hyphens alone; of a pattern, nothing.

    >>> plain("my shop"), plain("*")
    ('my-shop', '')
    """
    return re.sub(r"[^\w-]+", "-", name).strip("-")


def with_folder(name: str, folder: str) -> str:
    """A name, with that of the folder above it where it is a split's.

    >>> with_folder("test", "photos"), with_folder("shop", "photos")
    ('photos-test', 'shop')
    """
    return f"{folder}-{name}" if folder and name.lower() in SPLITS else name


def of_folder(folder: Path) -> str:
    """What a folder of classes is called."""
    real = folder.resolve()
    return with_folder(real.name, real.parent.name)


def of_pairs(name: str, reference: str) -> str:
    """What a source of pairs is called: by its own name, or that of the folder above it."""
    above = [folder.name for folder in Path(without_secrets(reference).rstrip("/")).parents]
    parts = [plain(Path(name.rstrip("/")).stem), *map(plain, above[:2])]
    named = [*filter(None, parts), "", ""]
    return with_folder(named[0], named[1]) or "data"


def of_run(run: Path, split: str) -> str:
    """What the pairs that a run held out are called, as other models are judged on them."""
    return f"{plain(run.resolve().name) or 'run'}-{split}"
