"""Values of settings: as TOML would hold them, and as messages show them. Standard library only."""

import datetime
import os
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

LONGEST_SHOWN = 80  # characters of a wrong value in a message
PERCENT = re.compile(r" *(\d+(?:\.\d+)?) *%")
SIMPLE = (NoneType, int, float, datetime.date, datetime.time)


def plain(value: Any) -> Any:
    """A value as TOML would hold it: paths as text, and NumPy's numbers as those of Python."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # So has a tensor of one number. NumPy is not imported for this.
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    number = value.item()
    # The shortest decimal of a narrow float: 0.001 and not 0.0010000000474974513.
    is_narrow = isinstance(number, float) and type(value).__module__ == "numpy"
    return float(str(value)) if is_narrow else number


def shown(value: Any) -> str:
    """A value as a recipe would hold it, on one line, for messages; of others their type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]}...")
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, Mapping):
        text = f"{{{', '.join(f'{key} = {shown(item)}' for key, item in value.items())}}}"
    elif isinstance(value, SIMPLE):
        text = str(value)
    else:
        name = type(value).__name__
        text = f"{'an' if name[0] in 'AEIOaeion' else 'a'} {name}"  # an ndarray
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def refuse_percent(name: str, value: Any) -> None:
    """Refuse a share that is written as a percentage."""
    if isinstance(value, str) and (percent := PERCENT.fullmatch(value)):
        raise ValueError(f"{name}: {shown(value)}: write a share as {float(percent[1]) / 100:g}")


def way_to_file(value: Any) -> str:
    """What to say of a table in memory, such as a DataFrame, where a file is meant; or nothing."""
    for write in ("to_parquet", "write_parquet"):  # of pandas and of polars
        if hasattr(value, write):
            return f"; save it (df.{write}) and give the file's name"
    return ""
