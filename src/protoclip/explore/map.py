"""The map of images and texts, drawn by Bokeh.

Positions on it are computed in `atlas.py`, and names of its groups in `names.py`.
"""

from collections import Counter
from dataclasses import asdict
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
from protoclip.explore.names import group_map
from protoclip.explore.pairs import ID_LENGTH, ExploredPairs, shorten

MAP_CAPTION_LENGTH, NAME_LENGTH = 120, 40
OUTER = 0.01  # share of the points at each side that the first view may leave out
MOST_SIZE = 8  # pixels across a point
# Colours of points, which differ on light and dark ground; and of text on the light and the dark
# ground of `explore.css`, as dark or as bright as a contrast of 4.5 needs (WCAG 2).
COLOURS = (
    ("#3b82f6", "#3472d8", "#3b82f6"),
    ("#e8590c", "#cc4e0b", "#e8590c"),
    ("#2f9e44", "#278539", "#2f9e44"),
    ("#d6336c", "#d6336c", "#db4b7e"),
    ("#9c36b5", "#9c36b5", "#b262c5"),
    ("#0c8599", "#0c8296", "#1f8fa1"),
    ("#b08900", "#907000", "#b08900"),
    ("#e03131", "#e03131", "#e44a4a"),
    ("#5f3dc4", "#5f3dc4", "#8c73d5"),
    ("#66a80f", "#50830c", "#66a80f"),
    ("#1098ad", "#0d8091", "#1098ad"),
    ("#f06595", "#bb4f74", "#f06595"),
    ("#845ef7", "#7f5aed", "#8b68f7"),
    ("#20c997", "#158564", "#20c997"),
    ("#fd7e14", "#b65b0e", "#fd7e14"),
    ("#4c6ef5", "#496aeb", "#5777f6"),
    ("#a61e4d", "#a61e4d", "#c16282"),
    ("#087f5b", "#087f5b", "#2b9172"),
    ("#c2255c", "#c2255c", "#d15983"),
    ("#868e96", "#71777e", "#868e96"),
)
PALETTE = [colour for colour, _, _ in COLOURS]  # later categories share the last one
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


def make_map(atlas: Atlas, pairs: ExploredPairs) -> dict[str, Any]:
    """The map for the page, as JSON: the plot, the names of groups, the coarse ones first, and the
    legend of each way of colouring."""
    drawn = atlas.drawn
    rows = atlas.rows[drawn]
    listed = rows.tolist()
    ids = [pairs.sample_id(row) for row in listed]
    captions = [pairs.caption(row) for row in listed]
    data: dict[str, Any] = {
        "image_x": atlas.image_map_position[drawn, 0],
        "image_y": atlas.image_map_position[drawn, 1],
        "text_x": atlas.text_map_position[drawn, 0],
        "text_y": atlas.text_map_position[drawn, 1],
        "row": rows.astype(np.int32),
        "position": drawn.astype(np.int32),
        "caption": [shorten(caption, MAP_CAPTION_LENGTH) for caption in captions],
        "id": [shorten(sample_id, ID_LENGTH) for sample_id in ids],
        "distance": atlas.distance[drawn].astype(np.float32),
        "loss": atlas.loss[drawn].astype(np.float32),
    }
    positions = np.stack([atlas.map_position(modality)[drawn] for modality in MODALITIES], axis=1)
    groups, group_names = group_map(positions, captions, data["distance"])
    ways: dict[str, Any] = {}
    colour_of = add_categories(data, ways, "group", group_names)
    ways["group"]["inks"] = [inks for _, *inks in COLOURS]
    ways["modality"] = {"kind": "modality", "labels": ["images", "texts"]}
    for modality in MODALITIES:
        numbers = atlas.prototype(modality)[drawn].tolist()
        add_categories(data, ways, f"{modality} prototype", [*map(str, numbers)])
    if pairs.has_classes:
        add_categories(data, ways, "class", [*map(pairs.class_of, listed)])
    if len(pairs.sources) > 1:
        add_categories(data, ways, "source", [*map(pairs.source_name, listed)])
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
    names = [
        {
            **asdict(group),
            "name": shorten(group.name, NAME_LENGTH),
            "colour": colour_of[group.coarse],
        }
        for group in groups
    ]
    return {
        "plot": json_item(plot_points(data, positions)),
        "ways": ways,
        "ids": ids,
        "groups": names,
    }


def add_categories(
    data: dict[str, Any], ways: dict[str, Any], name: str, values: list[str]
) -> dict[str, int]:
    """Add a way of colouring by categories; the most frequent have colours of their own. Returns
    the index of each category's colour in the palette."""
    distinct = [value for value, _ in Counter(values).most_common()]
    last = len(PALETTE) - 1
    rank = {value: min(number, last) for number, value in enumerate(distinct)}
    data[f"by {name}"] = np.array([rank[value] for value in values], np.uint8)
    largest = distinct if len(distinct) <= len(PALETTE) else distinct[:last]
    labels = [shorten(value, 40) or "none" for value in largest]
    if len(largest) < len(distinct):
        labels.append(f"{len(distinct) - len(largest)} others")
    ways[name] = {"kind": "categories", "labels": labels, "colours": PALETTE}
    return rank


def plot_points(data: dict[str, Any], positions: Array) -> Any:
    """A plot of columns `data`, with the models by name that `explore.js` colours."""
    source = ColumnDataSource(data, name="pairs")
    plot = figure(
        x_range=first_range(positions[..., 0]),
        y_range=first_range(positions[..., 1]),
        tools="",
        sizing_mode="stretch_both",
        min_height=320,
        toolbar_location="above",
        toolbar_sticky=False,  # else tools make room for a title, which the plot lacks
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
            size=point_size(len(positions)),
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
    plot.add_tools(
        PanTool(),
        zoom,
        BoxSelectTool(continuous=False, renderers=glyphs),
        LassoSelectTool(continuous=False, renderers=glyphs),
        TapTool(renderers=glyphs),
        HoverTool(tooltips=TOOLTIP, renderers=glyphs, limit=1),
        ResetTool(),
    )
    plot.toolbar.active_scroll = zoom
    plot.toolbar.logo = None
    for name, palette in (("categories", PALETTE), ("range", list(Viridis256))):
        mapper = LinearColorMapper(palette=palette, low=0, high=len(palette) - 1, name=name)
        # A mapper reaches the page with a glyph that uses it.
        nothing = ColumnDataSource({"x": [], "y": [], "fill": []})
        glyph = plot.scatter("x", "y", source=nothing, fill_color=field("fill", mapper))
        glyph.visible = False
    return plot


def point_size(number: int) -> float:
    """Pixels across a point, so that any number of pairs covers as much of the map."""
    return float(min(MOST_SIZE, 340 / max(1, number) ** 0.5))


def first_range(values: Array) -> Range1d:
    """The first view of the map: all points except a few that lie far off."""
    low, high = np.quantile(values, [OUTER, 1 - OUTER]).tolist()
    margin = 0.06 * (high - low) or 1.0
    return Range1d(low - margin, high + margin)
