"""What the map's plot is made of."""

import numpy as np
import pytest

from protoclip.explore.map import (
    CONTRAST,
    GROUNDS,
    MOST_SIZE,
    PALETTE,
    contrast,
    ink,
    point_size,
    range_of,
)
from protoclip.explore.render import assets


def test_names_are_legible_in_the_colours_of_their_groups() -> None:
    """On the grounds of the pages; a colour that is legible stays as it is."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    style = assets()["explore.css"].decode()
    for ground in GROUNDS:
        assert f"--ground: {ground};" in style
        inks = [ink(colour, ground) for colour in PALETTE]
        assert min(contrast(each, ground) for each in inks) >= CONTRAST
        assert len(set(inks)) == len(PALETTE)
        for colour, found in zip(PALETTE, inks, strict=True):
            assert (found == colour) == (contrast(colour, ground) >= CONTRAST)


def test_the_first_view_holds_most_points_and_few_are_large() -> None:
    """Not the few that lie far off, which would shrink all others."""
    values = np.concatenate([np.linspace(-1, 1, 995), np.full(5, 1000.0)])
    first = range_of(values)
    assert -1.2 < first.start < -0.9
    assert 0.9 < first.end < 1.2
    assert MOST_SIZE == point_size(1) > point_size(2000) > point_size(10_000) > 3
