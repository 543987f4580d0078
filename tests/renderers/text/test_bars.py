"""Bars of an exact width."""

from __future__ import annotations

import pytest

from traceml.renderers.text.bars import bar, sparkline, stacked, stacked_parts
from traceml.renderers.text.viewport import ASCII, Viewport


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.0001, 0.333, 0.999, 1.0, 7.0])
@pytest.mark.parametrize("viewport", [Viewport(), Viewport(glyphs=ASCII)])
def test_bar_has_its_width(share, viewport):
    """A bar has the requested width for any share."""
    assert bar(share, 20, viewport).cell_len == 20


def test_small_share_is_seen():
    """Any share above 0 is drawn."""
    assert bar(0.0001, 20, Viewport()).plain.strip() == "▏"
    assert bar(0.0, 20, Viewport()).plain.strip() == ""


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("width", [1, 7, 50])
def test_stacked_has_its_width(color, width):
    """Phases fill exactly the width, also where they round."""
    shares = [("input_wait", 0.334), ("数据增强", 0.333), ("backward", 0.333)]

    assert stacked(shares, width, Viewport(color=color)).cell_len == width
    assert stacked([], width, Viewport(color=color)).cell_len == width
    parts = [("startup", 0.3), ("steps", 0.6), ("idle", 0.1)]
    assert stacked_parts(parts, width, Viewport(color=color)).cell_len == width


def test_sparkline():
    """The newest values are at the right, scaled from 0 to the largest."""
    assert sparkline([0.0, 4.0, 8.0], 5, Viewport()) == "  ▁▅█"
    assert sparkline([0.0, 0.0], 2, Viewport()) == "▁▁"
    assert sparkline([], 3, Viewport()) == "   "
    assert sparkline(range(100), 3, Viewport()) == "███"
