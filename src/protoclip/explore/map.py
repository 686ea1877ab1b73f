"""The map of images and texts, drawn by Bokeh.

Positions on it are computed in `atlas.py`, and names of its groups in `names.py`.
"""

from collections import Counter
from typing import Any

import numpy as np
from bokeh.core.properties import field
from bokeh.embed import json_item
from bokeh.models import (
    BoxSelectTool,
    ColumnDataSource,
    HoverTool,
    LassoSelectTool,
    LinearColorMapper,
    PanTool,
    Range1d,
    ResetTool,
    TapTool,
    WheelZoomTool,
)
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from protoclip.explore.atlas import MODALITIES, Array, Atlas
from protoclip.explore.names import groups_of_map
from protoclip.explore.pairs import ID_LENGTH, ExploredPairs, shown

MAP_CAPTION_LENGTH, NAME_LENGTH = 120, 40
OUTER = 0.01  # share of the points at each side that the first view may leave out
MOST_SIZE = 8  # pixels across a point
CATEGORIES = 20  # colours; later categories share the last one
GROUNDS = ("#ffffff", "#15181d")  # of the pages in light and in dark, as `explore.css` has them
CONTRAST = 4.5  # of text to its ground at least, as WCAG 2 asks
# Colours that can be told apart on light and dark ground.
PALETTE = (
    *("#3b82f6", "#e8590c", "#2f9e44", "#d6336c", "#9c36b5", "#0c8599", "#b08900", "#e03131"),
    *("#5f3dc4", "#66a80f", "#1098ad", "#f06595", "#845ef7", "#20c997", "#fd7e14", "#4c6ef5"),
    *("#a61e4d", "#087f5b", "#c2255c", "#868e96"),
)
# Bokeh escapes what it puts in the place of a column's name.
TOOLTIP = """
<div class="tooltip">
  <img src="../images/@row{0}.webp" width="160" alt="">
  <div class="caption">@caption</div>
  <div>distance @distance{0.000}, loss @loss{0.00}</div>
  <div>@id</div>
  <div class="more"></div>
</div>
"""


def map_json(atlas: Atlas, pairs: ExploredPairs) -> dict[str, Any]:
    """What the page draws: the plot, the names of groups, the coarse ones first, and for each way
    of colouring its columns and its legend."""
    drawn = atlas.drawn
    rows = atlas.rows[drawn]
    ids = [pairs.sample_id(row) for row in rows.tolist()]
    captions = [pairs.caption(row) for row in rows.tolist()]
    data: dict[str, Any] = {
        "image_x": atlas.image_map_position[drawn, 0],
        "image_y": atlas.image_map_position[drawn, 1],
        "text_x": atlas.text_map_position[drawn, 0],
        "text_y": atlas.text_map_position[drawn, 1],
        "row": rows.astype(np.int32),
        "position": drawn.astype(np.int32),
        "caption": [shown(caption, MAP_CAPTION_LENGTH) for caption in captions],
        "id": [shown(sample_id, ID_LENGTH) for sample_id in ids],
        "distance": atlas.distance[drawn].astype(np.float32),
        "loss": atlas.loss[drawn].astype(np.float32),
    }
    map_positions = np.stack(
        [atlas.map_position(modality)[drawn] for modality in MODALITIES], axis=1
    )
    groups, group_names = groups_of_map(map_positions, captions, data["distance"])
    ways: dict[str, Any] = {}
    place = add_categories(data, ways, "group", group_names)
    ways["group"]["inks"] = [[ink(colour, ground) for ground in GROUNDS] for colour in PALETTE]
    ways["modality"] = {"kind": "modality", "labels": ["images", "texts"]}
    for modality in MODALITIES:
        numbers = atlas.prototype(modality)[drawn].tolist()
        add_categories(data, ways, f"{modality} prototype", [*map(str, numbers)])
    if pairs.has_classes:
        add_categories(data, ways, "class", [pairs.class_of(row) for row in rows.tolist()])
    if len(pairs.sources) > 1:
        names = [pairs.sources[pairs.source_of(row)].name for row in rows.tolist()]
        add_categories(data, ways, "source", names)
    for measure in ("distance", "loss"):
        values = data[measure]
        low, high = np.quantile(values, [0.01, 0.99])
        share = np.clip((values - low) / max(1e-9, high - low), 0, 1)
        data[f"by {measure}"] = (255 * share).astype(np.uint8)
        ways[measure] = {
            "kind": "range",
            "labels": [f"{low:.3g}", f"{high:.3g}"],
            "colours": list(Viridis256[::32]),
        }
    source = ColumnDataSource(data, name="pairs")
    x, y = (range_of(map_positions[..., axis]) for axis in (0, 1))
    plot = figure(
        x_range=x,
        y_range=y,
        tools="",
        sizing_mode="stretch_both",
        min_height=320,
        toolbar_location="above",
        toolbar_sticky=False,  # or tools give way to the width of a title that there is not
        lod_threshold=4000,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        name="map",
    )
    plot.axis.visible = False
    plot.grid.visible = False
    glyphs: Any = [
        plot.scatter(
            f"{modality}_x",
            f"{modality}_y",
            source=source,
            name=f"{modality}s",
            marker=marker,
            size=point_size(len(drawn)),
            fill_color=colour,
            line_color=None,
            fill_alpha=0.7,
            nonselection_fill_alpha=0.08,
            selection_fill_alpha=1.0,
        )
        for modality, marker, colour in (
            ("image", "circle", PALETTE[0]),
            ("text", "triangle", PALETTE[1]),
        )
    ]
    zoom = WheelZoomTool()
    lasso = LassoSelectTool(continuous=False, renderers=glyphs)
    plot.add_tools(
        PanTool(),
        zoom,
        BoxSelectTool(continuous=False, renderers=glyphs),
        lasso,
        TapTool(renderers=glyphs),
        HoverTool(tooltips=TOOLTIP, renderers=glyphs, limit=1),
        ResetTool(),
    )
    plot.toolbar.active_scroll = zoom
    plot.toolbar.logo = None
    for name, palette, high in (
        ("categories", PALETTE, CATEGORIES - 1),
        ("range", Viridis256, 255),
    ):
        mapper = LinearColorMapper(palette=list(palette), low=0, high=high, name=name)
        # A mapper reaches the page with a glyph that uses it.
        nothing = ColumnDataSource({"x": [], "y": [], "fill": []})
        glyph = plot.scatter("x", "y", source=nothing, fill_color=field("fill", mapper))
        glyph.visible = False
    named = [
        {
            "name": shown(each.name, NAME_LENGTH),
            "x": each.middle[0],
            "y": each.middle[1],
            "level": each.level,
            "colour": place[each.coarse],
            "example": each.example,
            "size": each.size,
        }
        for each in groups
    ]
    return {"plot": json_item(plot), "ways": ways, "ids": ids, "groups": named}


def point_size(number: int) -> float:
    """Pixels across a point, so that any number of pairs covers as much of the map."""
    return float(min(MOST_SIZE, 340 / max(1, number) ** 0.5))


def range_of(values: Array) -> Range1d:
    """What the map shows first: all but a few points that lie far off."""
    low, high = np.quantile(values, [OUTER, 1 - OUTER]).tolist()
    margin = 0.06 * (high - low) or 1.0
    return Range1d(low - margin, high + margin)


def add_categories(
    data: dict[str, Any], ways: dict[str, Any], name: str, values: list[str]
) -> dict[str, int]:
    """A way of colouring by categories: the most frequent have colours of their own. Returns the
    place of each category's colour in the palette."""
    distinct = [value for value, _ in Counter(values).most_common()]
    rank = {value: min(number, CATEGORIES - 1) for number, value in enumerate(distinct)}
    data[f"by {name}"] = np.array([rank[value] for value in values], np.uint8)
    named = distinct if len(distinct) <= CATEGORIES else distinct[: CATEGORIES - 1]
    labels = [shown(value, 40) or "none" for value in named]
    if len(distinct) > CATEGORIES:
        labels.append(f"{len(distinct) - CATEGORIES + 1} others")
    ways[name] = {"kind": "categories", "labels": labels, "colours": list(PALETTE)}
    return rank


def ink(colour: str, ground: str) -> str:
    """A colour for text: the given one, made as dark or as bright as a ground needs."""
    pixels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    end = 0 if luminance(ground) > 0.5 else 255
    for share in np.linspace(0, 1, 51):
        mixed = np.rint(pixels + share * (end - pixels)).astype(int).tolist()
        found = "#{:02x}{:02x}{:02x}".format(*mixed)
        if contrast(found, ground) >= CONTRAST:
            break
    return found


def contrast(colour: str, other: str) -> float:
    """The contrast of two colours by WCAG 2, from 1 to 21."""
    low, high = sorted((luminance(colour), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """The relative luminance of `#rrggbb` by WCAG 2, from 0 to 1."""
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
