"""Positions on a drawing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traceml.renderers.charts.scales import category_scale, text_of, value_scale


def test_ticks_are_round_and_inside():
    """An axis of 0 to 37 ms ends at 40, with labels in between."""
    scale = value_scale({}, [3.0, 37.2], 200, 0)

    assert [label for _, label in scale.ticks] == ["0", "10", "20", "30", "40"]
    assert (scale.at(0), scale.at(40), scale.at(20)) == (200, 0, 100)


def test_an_axis_may_begin_elsewhere():
    """A loss between 2.2 and 2.4 fills its chart; cut values are at the edge."""
    scale = value_scale({"scale": True}, [2.21, 2.38], 100, 0)

    assert scale.low >= 2.0
    assert value_scale({"max": 10}, [5.0, 99.0], 100, 0).at(99.0) == 0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=5))
def test_any_values_have_an_axis(values):
    """No values, equal, tiny, huge or not finite ones: the axis has an extent and labels."""
    scale = value_scale({"scale": True}, values, 0, 100)

    assert scale.high > scale.low
    assert 0 <= scale.at(scale.low) <= scale.at(scale.high) <= 100


def test_labels_leave_room_for_each_other():
    """Of a hundred steps on 400 units about ten have labels, including the first."""
    scale = category_scale([f"{step:,}" for step in range(0, 100_000, 1_000)], 0, 400, bands=False, across=True)

    assert scale.ticks[0][1] == "0"
    assert 4 <= len(scale.ticks) <= 12


def test_bands_lie_inside_the_axis():
    """Three ranks on 90 units have 30 each, their middles at 15, 45, 75."""
    scale = category_scale(["a", "b", "c"], 0, 90, bands=True, across=False)

    assert [scale.at(index) for index in range(3)] == [15, 45, 75]
    assert scale.step == 30


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (1500, 500, "1,500"),
        (0.25, 0.25, "0.25"),
        (1e-5, 1e-5, "1e-05"),
        (2.5, 0.5, "2.5"),
        (3e9, 1e9, "3e+09"),
        (5e-4, 2.5e-4, "0.00050"),
        (1e-3, 2.5e-4, "0.00100"),
    ],
)
def test_numbers_as_labels(value, step, text):
    """As many digits as the step between labels needs."""
    assert text_of(value, step) == text
