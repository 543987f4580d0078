"""Charts drawn without a browser."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from traceml.renderers.charts import run_charts
from traceml.renderers.charts.chart_options import bar_series, blank, category_axis, line_series, value_axis
from traceml.renderers.charts.palette import LIGHT
from traceml.renderers.charts.svg import draw
from traceml.renderers.charts.svg_marks import escaped
from traceml.runs.rows.series import HeatMap

SVG = "{http://www.w3.org/2000/svg}"


def _drawn(option, **size):
    return ET.fromstring(
        draw(option, "a chart", **size).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    )


def _lines(*series):
    option = blank(LIGHT)
    option["xAxis"] = {**category_axis(["0", "1", "2", "3"], LIGHT), "boundaryGap": False, "name": "step"}
    option["yAxis"] = value_axis(LIGHT, "ms")
    option["series"] = [line_series(name, data, "#123456", 2) for name, data in series]
    return option


def _texts(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def _numbers(path):
    return [tuple(float(n) for n in point.split()) for point in path.get("d").strip("MZ").split("L")]


def test_a_line_goes_through_its_values():
    """Higher values are higher, steps go to the right, and the axes are labeled."""
    root = _drawn(_lines(("p50", [0, 10, 20, 40])))
    line = next(path for path in root.iter(f"{SVG}path") if "#123456" in path.get("style"))
    points = _numbers(line)

    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] - points[1][1] == pytest.approx((points[0][1] - points[3][1]) / 4, abs=0.2)
    assert {"p50", "step", "ms", "0", "40"} <= set(_texts(root))


def test_a_gap_is_a_gap():
    """An unknown value breaks the line; a single value is a dot."""
    root = _drawn(_lines(("loss", [1, 2, None, 4])))

    assert len([path for path in root.iter(f"{SVG}path") if "#123456" in path.get("style")]) == 1
    assert len(list(root.iter(f"{SVG}circle"))) == 1


def test_areas_stand_on_each_other():
    """The second area begins where the first one ends."""
    option = _lines(("a", [10, 10, 10, 10]), ("b", [30, 30, 30, 30]))
    for series in option["series"]:
        series |= {"stack": "step", "areaStyle": {"opacity": 1}}

    areas = [_numbers(path) for path in _drawn(option).iter(f"{SVG}path") if "fill:#123456" in path.get("style")]
    tops, feet = min(y for _, y in areas[0]), max(y for _, y in areas[1])

    assert tops == feet
    assert max(y for _, y in areas[0]) - tops == pytest.approx((feet - min(y for _, y in areas[1])) / 3, abs=0.2)


def test_lying_bars_are_as_long_as_their_values():
    """A rank's phases follow each other from left to right, with their numbers as titles."""
    option = blank(LIGHT)
    option["xAxis"], option["yAxis"] = value_axis(LIGHT, "ms"), {**category_axis(["rank 0"], LIGHT), "inverse": True}
    option["series"] = [bar_series("forward", [10], "#00f", "step"), bar_series("comm", [30], "#f00", "step")]

    bars = [rect for rect in _drawn(option).iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    first, second = (tuple(float(bar.get(name)) for name in ("x", "width")) for bar in bars)

    assert second[0] == pytest.approx(first[0] + first[1], abs=0.2)
    assert second[1] == pytest.approx(3 * first[1], rel=0.02)
    assert bars[1].find(f"{SVG}title").text.startswith("comm: 30")


def test_a_heat_map_joins_cells_of_one_color():
    """A rank that is always slow is one rectangle in the brightest color."""
    excess = np.zeros((3, 50))
    excess[1] = 0.8
    heat = HeatMap(((0, 0), (1, 1), (2, 2)), np.arange(50), 1, excess, excess)

    root = _drawn(run_charts.heatmap_chart(heat, LIGHT), height=300)
    rows = [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]

    assert [group.find(f"{SVG}title").text for group in rows] == ["rank 0", "rank 1", "rank 2"]
    assert [len(group.findall(f"{SVG}rect")) for group in rows] == [1, 1, 1]
    assert LIGHT.heat[-1] in rows[1].find(f"{SVG}rect").get("style")
    assert LIGHT.heat[0] in rows[0].find(f"{SVG}rect").get("style")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x>', "a\x00b", "Größe ✓ 日本語", "&amp;"])
def test_names_are_text(name):
    """The drawing is well-formed and shows any name of a metric."""
    root = _drawn(_lines((name, [1, 2, 3, 4])))

    assert list(root.iter(f"{SVG}script")) == []
    assert any(text == name.replace("\x00", r"\x00") for text in _texts(root))


def test_long_names_are_cut():
    """A legend with names of a thousand letters keeps its size."""
    root = _drawn(_lines(*((f"{number}{'x' * 1000}", [1, 2, 3, 4]) for number in range(9))))

    assert max(len(text or "") for text in _texts(root)) <= 40
    assert all(float(text.get("y")) < 250 for text in root.iter(f"{SVG}text"))


def test_it_says_what_it_shows():
    """Screen readers get the title; a step's numbers are a title under the pointer."""
    root = _drawn(_lines(("p50", [1, 2, 3, 4])))
    said = [title.text for title in root.iter(f"{SVG}title")]

    assert root.get("aria-label") == "a chart"
    assert "step 2\np50: 3.000 ms" in said


def test_escaping_covers_attributes():
    """Quotes are escaped too, for text in attributes."""
    assert escaped("<a href='x\">&") == "&lt;a href=&#x27;x&quot;&gt;&amp;"
