"""What the map's plot is made of."""

from typing import Any

import numpy as np

from protoclip.explore.map import COLOURS, add_categories
from protoclip.explore.pages import assets


def luminance(colour: str) -> float:
    """The relative luminance of `#rrggbb` by WCAG 2, from 0 to 1."""
    values = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_names_are_legible_in_the_colours_of_their_groups() -> None:
    """On the grounds of the pages."""
    style = assets()["explore.css"].decode()
    for ground, column in (("#ffffff", 1), ("#15181d", 2)):
        assert f"--ground: {ground};" in style
        for inks in COLOURS:
            low, high = sorted((luminance(inks[column]), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_class_of_a_million_characters_is_cut() -> None:
    """It takes no more memory than itself, however many other pairs there are."""
    data, ways = dict[str, Any](), dict[str, Any]()
    add_categories(data, ways, "class", ["x" * 10**6] + ["y"] * 10_000)
    assert ways["class"]["labels"] == ["y", "x" * 39 + "…"]
    assert data["by class"].tolist() == [1] + [0] * 10_000
