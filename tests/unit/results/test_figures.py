"""Figures are SVG that fits into a page: its colours, no ids of others, no request."""

import re

import numpy as np

from protoclip.results.figures import COLOURS, DASHES, dash_number, dashes, draw_lines


def curve(number):
    return np.arange(number, dtype=np.float64), np.sin(np.arange(number, dtype=np.float64))


def figures():
    many = [(model, curve(9)) for model in range(20)]
    return [draw_lines(many), draw_lines(many[:1])]


def test_ids_are_of_one_figure_and_nothing_is_fetched():
    found = figures()
    ids = [name for svg in found for name in re.findall(r' id="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in found:
        used = re.findall(r'(?:href="|url\()#([\w-]+)', svg)
        assert used
        assert {*used} <= {*re.findall(r' id="([^"]*)"', svg)}
        assert not re.findall(r'(?:href|src)="(?!#)|url\((?!#)|<script|<style|<metadata', svg)
        assert svg.startswith('<svg aria-hidden="true"')
        assert "width" not in svg[: svg.index(">")]


def test_models_look_different_without_colour():
    looks = [(model % COLOURS, dash_number(model)) for model in range(len(DASHES) * COLOURS)]
    assert len(set(looks)) == len(looks)
    assert len({dashes(model) for model in range(len(DASHES))}) == len(DASHES)
