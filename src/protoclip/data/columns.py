"""Which columns of a table hold the pictures, the captions and the ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from protoclip.data.tables import Table, line

# Names that columns go by, the likeliest first; capitals do not matter.
IMAGE_COLUMNS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes"),
    *("filepath", "file_path", "image_path", "img_path", "file_name", "filename", "file", "path"),
    *("image_url", "url"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "title", "text", "texts", "txt"),
    *("description", "alt_text", "sentence", "sentences"),
)
ID_COLUMNS = ("sample_id", "key", "uid")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table that are used, and notes on why these."""

    image: str
    captions: tuple[str, ...]
    sample_id: str | None
    notes: tuple[str, ...]

    @property
    def wanted(self) -> list[str]:
        return list(dict.fromkeys(c for c in (self.image, *self.captions, self.sample_id) if c))


def choose(
    table: Table, *, image: str | None, captions: list[str], sample_id: str | None
) -> Columns:
    """The columns that were named, or else go by a usual name and hold a usable type."""
    notes: list[str] = []

    def find(setting: str, usual: Sequence[str], usable: Any, needed: str) -> str:
        fields = {field.name.lower().strip(): field for field in reversed(list(table.schema))}
        found = [fields[n].name for n in usual if n in fields and usable(fields[n].type)]
        if not found:
            raise missing(table, f"no column with {needed}; set {setting} to one, or add it")
        if len(found) > 1:
            notes.append(
                f"{table.path}: {needed} are taken from column '{found[0]}', not from "
                f"{quoted(found[1:])}; {setting} names another"
            )
        return str(found[0])

    image = image or find("image_column", IMAGE_COLUMNS, holds_images, "images")
    captions = captions or [find("caption_column", CAPTION_COLUMNS, holds_captions, "captions")]
    present = {n.lower(): n for n in reversed(table.schema.names)}
    sample_id = sample_id or next((present[n] for n in ID_COLUMNS if n in present), None)
    checks = [("image_column", image, holds_images, "paths, URLs or bytes")]
    checks += [("caption_column", c, holds_captions, "text or lists of text") for c in captions]
    if sample_id:
        checks.append(("id_column", sample_id, holds_ids, "text or whole numbers"))
    for setting, column, usable, needed in checks:
        count = table.schema.names.count(column)
        if count != 1:
            raise missing(table, f"{'no' if not count else 'more than one'} column '{column}'")
        type_ = table.schema.field(column).type
        if not usable(type_):
            raise ValueError(
                f"{table.path}: column '{column}' holds {line(str(type_), 60)}, not {needed}; "
                f"set {setting} to another"
            )
    if len(captions) > 1 and any(holds_lists(table.schema.field(c).type) for c in captions):
        raise ValueError(
            f"{table.path}: caption_column is either one column of lists or several of text"
        )
    return Columns(image=image, captions=tuple(captions), sample_id=sample_id, notes=tuple(notes))


def missing(table: Table, what: str) -> ValueError:
    return ValueError(f"{table.path}: {what}; it has {quoted(table.schema.names)}")


def quoted(names: Sequence[str]) -> str:
    return line(", ".join(f"'{name}'" for name in names), 300)


def is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return str(type_) in ("string", "large_string", "string_view", "null")


def is_bytes(type_: pa.DataType) -> bool:
    return str(type_) in ("binary", "large_binary", "binary_view")


def holds_lists(type_: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
    )


def holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return any(type_.field(n).name in ("bytes", "path") for n in range(type_.num_fields))
    return is_text(type_) or is_bytes(type_)


def holds_captions(type_: pa.DataType) -> bool:
    inner = type_.value_type if holds_lists(type_) else type_
    return is_text(inner) or is_bytes(inner)


def holds_ids(type_: pa.DataType) -> bool:
    return is_text(type_) or bool(pa.types.is_integer(type_))
