"""The samples that `data.only` and `data.without` choose, by lists of their ids.

Pairs that are held out to judge a model are chosen in `split.py`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from protoclip.config import DataConfig
from protoclip.data.access import reason_of
from protoclip.data.pairs import ImageTextPairs
from protoclip.files import checksum, open_local
from protoclip.terminal import visible

COLUMN = "sample_id"
Keeps = Callable[[str], bool]  # whether the sample with this id is used


@dataclass(frozen=True, kw_only=True)
class IdList:
    """The ids in the file of a setting; `header` is a word that may be an id or a column's name."""

    setting: str
    path: str
    ids: frozenset[str]
    header: str = ""

    def notes(self, known: set[str]) -> list[str]:
        """What to say about ids that no sample has."""
        ids = self.ids - ({self.header} - known)
        if not (unknown := ids - known):
            return []
        example = visible(min(unknown)[:60])
        what = f"{len(unknown):,} of {len(ids):,} ids are of no sample, such as '{example}'"
        return [f"data.{self.setting}: {self.path}: {what}"]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What is used of the samples: those that `only` names, if set, but none of `without`."""

    only: IdList | None = None
    without: IdList | None = None

    @property
    def lists(self) -> list[IdList]:
        return [each for each in (self.only, self.without) if each is not None]

    @property
    def settings(self) -> str:
        return " and ".join(f"data.{each.setting}" for each in self.lists)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Identifies the ids of each setting, in whatever order and form a file holds them."""
        return {
            f"data.{each.setting}": checksum(json.dumps(sorted(each.ids)).encode())
            for each in self.lists
        }

    def keeps(self, sample_id: str) -> bool:
        if self.without is not None and sample_id in self.without.ids:
            return False
        return self.only is None or sample_id in self.only.ids

    def apply(self, sources: Sequence[ImageTextPairs]) -> list[ImageTextPairs]:
        """What is left of each source. The first one's notes say what was left out.

        Of several sources, ids begin with the name of their source. Raises `ValueError` if no
        sample is left at all.
        """
        known: dict[str, set[str]] = {each.setting: set() for each in self.lists}
        mixed, left = len(sources) > 1, list[ImageTextPairs]()
        for source in sources:
            ids = (source.in_mixture() if mixed else source).sample_ids()
            rows = []
            for row, sample_id in enumerate(ids):
                for each in self.lists:
                    if sample_id in each.ids:
                        known[each.setting].add(sample_id)
                if self.keeps(sample_id):
                    rows.append(row)
            left.append(source.subset(np.array(rows, np.int64)))
        used, total = sum(map(len, left)), sum(map(len, sources))
        if not used:
            first = sources[0].in_mixture() if mixed else sources[0]
            example = visible(first.sample_id(0)[:80])
            raise ValueError(
                f"{self.settings}: no sample is left of {total:,}; ids of this data look like "
                f"'{example}'"
            )
        notes = [note for each in self.lists for note in each.notes(known[each.setting])]
        left[0].notes = [
            *left[0].notes,
            f"{self.settings}: {used:,} of {total:,} samples are used",
            *notes,
        ]
        return left


def read_chosen(data: DataConfig) -> Chosen | None:
    """The lists that the settings name; None if there are none; raises as `read_ids`."""
    if data.only is None and data.without is None:
        return None
    return Chosen(
        only=None if data.only is None else read_ids("only", data.only),
        without=None if data.without is None else read_ids("without", data.without),
    )


def read_ids(setting: str, path: str) -> IdList:
    """Sample ids from a JSON file (a list of ids, or of objects with a `sample_id`) or a CSV file.

    The CSV file has a column `sample_id`, or a single column, which may lack a header.

    Raises:
        ValueError: The file cannot be read, holds something else, or no id.
    """
    try:
        with open_local(path) as file:
            text = file.read().decode("utf-8-sig")
        if text.lstrip().startswith(("[", "{")) or path.lower().endswith(".json"):
            ids, header = _json_ids(text), ""
        else:
            ids, header = _csv_ids(text)
        if not ids - {header}:
            raise ValueError("it holds no id")
    except UnicodeDecodeError:
        raise ValueError(f"data.{setting}: {path}: it is not UTF-8; save it as UTF-8") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"data.{setting}: {path}: {reason_of(error)}") from None
    return IdList(setting=setting, path=path, ids=frozenset(ids), header=header)


def _json_ids(text: str) -> set[str]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({reason_of(error)})") from None
    if not isinstance(entries, list):
        raise ValueError("it needs to be a list of ids, or of objects with a sample_id")
    return set(_texts([each.get(COLUMN) if isinstance(each, dict) else each for each in entries]))


def _texts(values: Iterable[Any]) -> Iterable[str]:
    """Ids as texts; a column of ids may hold whole numbers."""
    for number, value in enumerate(values, 1):
        is_id = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        if not is_id:
            raise ValueError(f"entry {number} has no sample_id")
        yield str(value)


def _csv_ids(text: str) -> tuple[set[str], str]:
    """The ids, and the header if it may be an id too."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = next((each for each in "\t,;" if each in first), ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    ids: set[str] = set()
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if not header:
            header = [cell.strip() for cell in row]
            if len(header) > 1 and COLUMN not in header:
                shown = visible(", ".join(header)[:80])
                raise ValueError(f"it has no column {COLUMN}, only {shown}")
            column = header.index(COLUMN) if COLUMN in header else 0
            continue
        if len(row) != len(header) or not (cell := row[column]):
            raise ValueError(f"line {rows.line_num} has no {COLUMN}")
        ids.add(cell)
    if header and COLUMN not in header:
        return ids | {header[0]}, header[0]
    return ids, ""
