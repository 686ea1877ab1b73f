"""What the map's plot is made of."""

import pytest

from protoclip.explore.map import CONTRAST, GROUNDS, PALETTE, contrast, ink
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
