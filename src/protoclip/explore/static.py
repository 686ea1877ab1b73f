"""The explorer as files: pages for any web server, and a table for embedding-atlas.

The pages themselves are made in `render.py`, and `server.py` serves them without files.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protoclip.explore.atlas import MAP_PAIRS, MODALITIES
from protoclip.explore.explorer import Explorer
from protoclip.explore.render import Pages, Site, assets, ids_as
from protoclip.explore.thumbnails import THUMBNAIL_SIDE, thumbnail
from protoclip.files import naming, replacing
from protoclip.paths import require_empty
from protoclip.progress import Progress
from protoclip.terminal import say

BATCH = 2048
SAMPLED = 50  # images, to say how large all will be


def write_static(explorers: list[Explorer], folder: Path) -> int:
    """Write read-only pages to a new or empty folder, which appears whole; returns their number.

    They have the map, the prototypes with their nearest members, the odd ones out and the
    near-duplicates, but no search and no pages of single pairs, which need the model. Before it
    writes the images, which are most of it, it says how large all will be.

    Raises:
        ValueError: The folder holds something, or its disk has too little room.
        OSError: The pages cannot be written; names the folder.
    """
    require_empty("--static", folder)
    pages, rows = Pages(explorers, live=False), set[int]()
    real = folder.resolve()  # a link is left as it is
    real.parent.mkdir(parents=True, exist_ok=True)
    temporary = real.with_name(f".{real.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    number, size = 0, 0
    try:
        with naming(folder):
            for name, content in contents(pages, rows):
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, str):
                    content = content.encode("utf-8", "replace")
                path.write_bytes(content)
                number += name.endswith(".html")
                size += len(content)
            free = shutil.disk_usage(temporary).free
            announce(pages, sorted(rows), folder, written=size, free=free)
            progress = Progress("images", len(rows))
            (temporary / "images").mkdir()
            for done, row in enumerate(sorted(rows), 1):
                path = temporary / "images" / f"{row}.webp"
                path.write_bytes(pages.image(row, THUMBNAIL_SIDE))
                progress.update(done)
            require_empty("--static", folder)  # by now
            if real.exists():
                real.rmdir()
            temporary.rename(real)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return number


def announce(pages: Pages, rows: list[int], folder: Path, *, written: int, free: int) -> None:
    """Say how large pages and images will be; raise `ValueError` if the images find no room."""
    some = rows[:: max(1, len(rows) // SAMPLED)]
    each = sum(len(pages.image(row, THUMBNAIL_SIDE)) for row in some) / max(1, len(some))
    images = round(each * len(rows))
    about = f"about {(written + images) / 1e6:,.0f} MB, with {len(rows):,} images"
    if images > free:
        raise ValueError(
            f"{folder}: the pages take {about}, and the disk has {free / 1e6:,.0f} MB left; choose "
            "another disk, or fewer pairs with --only"
        )
    say(f"the pages take {about}")


def contents(pages: Pages, rows: set[int]) -> Iterator[tuple[str, str | bytes]]:
    """The files but for images, by name; adds to `rows` those whose images they show."""
    yield "index.html", pages.front()
    for name, asset in assets().items():
        yield f"assets/{name}", asset
    for number in range(1, len(pages.explorers) + 1):
        site = pages.site(number)
        site.on_card = rows.add
        rows.update(site.atlas.rows[site.atlas.drawn].tolist())
        for name, content in site_contents(site, compared=len(pages.explorers) > 1):
            yield f"{number}/{name}", content


def site_contents(site: Site, *, compared: bool) -> Iterator[tuple[str, str]]:
    yield "index.html", site.index()
    yield "odd-distance.html", site.odd("distance")
    yield "odd-loss.html", site.odd("loss")
    yield "duplicates.html", site.duplicates()
    for modality in MODALITIES:
        yield f"prototypes-{modality}.html", site.prototype_list(modality)
        if compared:
            yield f"moved-{modality}.html", site.moved(modality)
        for number in range(site.atlas.number):
            yield f"prototype-{modality}-{number}.html", site.prototype(modality, number)
            ids = site.ids(modality, number)
            yield f"ids-{modality}-{number}.csv", ids_as(ids, "csv")
            yield f"ids-{modality}-{number}.json", ids_as(ids, "json")


def write_table(explorer: Explorer, path: Path) -> int:
    """Write the table that embedding-atlas takes; returns its number of rows.

    A row is a point of the map: the image or the text of a pair, with `x`, `y`, `text`, `image`
    (small, as WebP; only of at most 10,000 pairs), `sample_id` and what is known of it.
    """
    atlas, pairs = explorer.atlas, explorer.pairs
    with_images = len(atlas) <= MAP_PAIRS
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema(
        {
            "id": pa.string(),
            "modality": pa.string(),
            "x": pa.float32(),
            "y": pa.float32(),
            "text": pa.string(),
            "sample_id": pa.string(),
            "image_row": pa.int64(),
            "source": pa.string(),
            "class": pa.string(),
            "prototype": pa.int32(),
            "distance": pa.float32(),
            "loss": pa.float32(),
            **({"image": image_type} if with_images else {}),
        }
    )
    progress = Progress("table", len(atlas))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch, pq.ParquetWriter(scratch, schema) as writer:
        for start in range(0, len(atlas), BATCH):
            part = slice(start, start + BATCH)
            rows = atlas.rows[part]
            ids = [pairs.sample_id(row) for row in rows.tolist()]
            columns: dict[str, Any] = {
                "text": [whole_characters(pairs.caption_or_reason(row)) for row in rows.tolist()],
                "sample_id": ids,
                "image_row": rows,
                "source": [pairs.sources[pairs.source_of(row)].name for row in rows.tolist()],
                "class": [pairs.class_of(row) for row in rows.tolist()],
                "distance": atlas.distance[part].astype(np.float32),
                "loss": atlas.loss[part].astype(np.float32),
            }
            if with_images:
                columns["image"] = [
                    {"bytes": thumbnail(pairs, row, THUMBNAIL_SIDE), "path": None}
                    for row in rows.tolist()
                ]
            for modality in MODALITIES:
                x, y = atlas.map_position(modality)[part].astype(np.float32).T
                columns |= {
                    "id": [f"{modality}:{each}" for each in ids],
                    "modality": [modality] * len(rows),
                    "x": x,
                    "y": y,
                    "prototype": atlas.prototype(modality)[part].astype(np.int32),
                }
                writer.write_table(pa.table(columns, schema=schema))
            progress.update(start + len(rows))
    return 2 * len(atlas)


def whole_characters(text: str) -> str:
    """A text that UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode()
