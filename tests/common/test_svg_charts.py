"""Charts: what they show, and that nothing of the data becomes markup."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from unitoken.common.svg_charts import MOST_POINTS, bar_chart, histogram, line_chart, stacked_bars

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


def drawn(chart: str) -> ET.Element:
    """The chart's SVG as a tree, without the legend."""
    return ET.fromstring(re.findall(r'<svg class="chart".*</svg>', chart)[-1])


def points(chart: str) -> list[tuple[float, float]]:
    """The points of a chart's first line, in its coordinates."""
    (line, *_) = drawn(chart).iter("polyline")
    pairs = [pair.split(",") for pair in line.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in pairs]


@given(st.lists(NUMBERS, min_size=1, max_size=50))
def test_all_points_lie_inside_the_chart(values: list[float]) -> None:
    chart = line_chart({"a": (range(len(values)), values)}, x_label="step", y_label="loss")
    for element in drawn(chart).iter():
        for name in ("x1", "x2", "cx"):
            assert 0 <= float(element.attrib.get(name, 0)) <= 640
        for name in ("y1", "y2", "cy"):
            assert -0.1 <= float(element.attrib.get(name, 0)) <= 250
    if len(values) > 1:
        assert all(68 <= x <= 616 and 11.9 <= y <= 206.1 for x, y in points(chart))


def test_long_lines_are_thinned_and_keep_their_spikes() -> None:
    values = [1.0] * 100_000
    values[54_321] = 7.0
    chart = line_chart({"loss": (range(100_000), values)}, x_label="step", y_label="loss")
    line = points(chart)
    assert len(line) <= MOST_POINTS
    assert min(y for _, y in line) < 40  # the spike, near the top
    assert len(chart) < 40_000


def test_values_that_are_not_finite_are_left_out() -> None:
    ys = [1.0, math.nan, math.inf, 2.0]
    chart = line_chart({"a": (range(4), ys)}, x_label="x", y_label="y")
    assert len(points(chart)) == 2
    logarithmic = line_chart({"a": (range(4), [0.0, -1.0, 0.01, 5.0])}, x_label="x", y_label="y", log_y=True)
    assert len(points(logarithmic)) == 2


def test_names_and_marks_from_data_are_escaped() -> None:
    bad = '"><script>alert(1)</script>'
    charts = [
        line_chart({bad: ([0, 1], [1, 2])}, x_label=bad, y_label=bad, marks=[(0.5, bad)]),
        bar_chart([bad], [1], x_label=bad, y_label=bad),
        stacked_bars([bad, "b"], {bad: [1, 2], "c": [1, 1]}, x_label=bad, y_label=bad),
        histogram(([0, 1], [3]), x_label=bad, y_label=bad),
        bar_chart([], [], x_label=bad, y_label=bad),
    ]
    assert all("<script" not in chart for chart in charts)


def test_axes_have_round_numbers_and_bars_their_height() -> None:
    chart = drawn(bar_chart(["a", "b", "c"], [10, 45, 0], x_label="kind", y_label="samples"))
    texts = [text.text for text in chart.iter("text")]
    assert {"0", "10", "20", "30", "40", "50", "a", "b", "c", "kind", "samples"} <= set(texts)
    low, high = (float(bar.attrib["height"]) for bar in chart.iter("rect"))
    assert math.isclose(high / low, 4.5, rel_tol=1e-3)


def test_stacked_bars_stand_on_each_other() -> None:
    chart = drawn(stacked_bars(["1"], {"a": [30], "b": [70]}, x_label="batch", y_label="%"))
    first, second = chart.iter("rect")
    assert math.isclose(
        float(second.attrib["y"]) + float(second.attrib["height"]), float(first.attrib["y"]), abs_tol=0.2
    )
