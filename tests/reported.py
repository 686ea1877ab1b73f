"""Runs of seconds for the tests of the report, on data whose every text is hostile."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from interrupting import with_changes
from protoclip.training import run
from testing import tiny_config, tiny_pairs

# An emoji of joined parts, a script, an image that would load, a mark that turns text, a bell.
HOSTILE = "👩\u200d🚀 <script>alert(1)</script><img src='//e.test/x'>\u202eturn\x07"


def hostile_pairs(path: Path, number: int = 60) -> Path:
    """A table of pairs with classes; each caption is different, and all are hostile."""
    table = tiny_pairs(number)
    captions = [f"{text.as_py()} {row} {HOSTILE}" for row, text in enumerate(table["caption"])]
    classes = [f"{text.as_py().split()[1]} {HOSTILE}" for text in table["caption"]]
    table = table.set_column(1, "caption", pa.array(captions))
    pq.write_table(table.append_column("class", pa.array(classes)), path)
    return path


def trained(folder: Path, data: Path, **sections: Mapping[str, Any]) -> Path:
    """A run of seconds on such a table."""
    config = tiny_config(str(data), out=str(folder))
    given = {
        "run": {"name": folder.name},
        "data": {"validation": 0.4, "class_column": "class"},
        "episodes": {"size": 32, "count": 3, "batch_size": 16},
    }
    for section, values in sections.items():
        given[section] = {**given.get(section, {}), **values}
    run.train(with_changes(config, given))
    return folder
