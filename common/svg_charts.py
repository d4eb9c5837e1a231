"""Charts as inline SVG for `html_page`, in the colours of its style, light and dark as the page is."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

WIDTH, HEIGHT = 640, 250  # of a chart, in the units of its own coordinates
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 12, 44  # margins, in which labels stand
WIDEST = 800  # pixels; html_page's style makes the text of narrow charts larger
MOST_POINTS = 1000  # of a line, twice as many as a chart has pixels
SERIES_COLOURS = 8
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)

Range = tuple[float, float]


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    log_y: bool = False,
    from_zero: bool = False,
) -> str:
    """Return a chart of lines.

    Args:
        series: by name, the places on the x axis in increasing order and the values there. Long ones are
            thinned out, and keep the least and the largest value of each stretch. What is not finite is left
            out.
        x_label: what the x axis shows.
        y_label: what the y axis shows.
        marks: places on the x axis with what happened there, as dashed lines.
        log_y: show powers of ten at equal distances; values that are not above 0 are left out.
        from_zero: let the y axis begin at 0, so that small changes look small.
    """
    lines = {name: _thinned(_shown_points(xs, ys, log_y)) for name, (xs, ys) in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return _nothing(y_label)
    places = [x for points in lines.values() for x, _ in points]
    values = [y for points in lines.values() for _, y in points] + ([0.0] if from_zero else [])
    plot = _Plot(_widened(min(places), max(places)), _value_range(values, log_y), log_y)
    parts = [plot.axes(x_label, y_label)]
    for place, text in marks:
        if plot.x_range[0] <= place <= plot.x_range[1]:
            parts.append(_mark(plot.x(place), text))
    for number, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
        last = points[-1][1]
        title = f"<title>{html.escape(name)}: {_short(last)} at the end</title>"
        look = f'fill="none" stroke="{_colour(number)}" stroke-width="1.7" stroke-linejoin="round"'
        if len(points) == 1:
            spot = f'cx="{plot.x(points[0][0]):.1f}" cy="{plot.y(last):.1f}"'
            parts.append(f'<circle {spot} r="3" fill="{_colour(number)}">{title}</circle>')
        else:
            parts.append(f'<polyline points="{path}" {look}>{title}</polyline>')
    return _chart(parts, f"{y_label} by {x_label}", list(lines) if len(lines) > 1 else [])


def bar_chart(labels: Sequence[str], values: Sequence[float], *, x_label: str, y_label: str) -> str:
    """Return a chart with a bar for each label."""
    return _bars(labels, {y_label: values}, x_label, y_label, gap=0.25)


def stacked_bars(
    labels: Sequence[str], series: Mapping[str, Sequence[float]], *, x_label: str, y_label: str
) -> str:
    """Return a chart with a bar for each label, in which the series' values stand on each other.

    Args:
        labels: one per bar.
        series: by name, a value for each bar, at least 0.
        x_label: what the x axis shows.
        y_label: what the y axis shows.
    """
    return _bars(labels, series, x_label, y_label, gap=0.12 if len(labels) < 60 else 0.0)


def histogram(bins: tuple[Sequence[float], Sequence[float]], *, x_label: str, y_label: str) -> str:
    """Return a chart of counts.

    Args:
        bins: the edges of the bins, which may have different widths, and the count in each: one less.
        x_label: what was counted.
        y_label: what a count is of.
    """
    edges, counts = bins
    if not counts or max(counts) <= 0:
        return _nothing(y_label)
    plot = _Plot((edges[0], edges[-1]), _value_range([0.0, *counts], False))
    parts = [plot.axes(x_label, y_label)]
    for first, end, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            left, right = plot.x(first), plot.x(end)
            width = max(right - left - 1, 0.6)
            title = f"{_short(first)} to {_short(end)}: {_short(count)}"
            parts.append(_box(left, plot.y(count), width, plot.y(0) - plot.y(count), 0, title))
    return _chart(parts, f"{y_label} by {x_label}", [])


class _Plot:
    """The place of values in a chart's coordinates."""

    def __init__(self, x_range: Range, y_range: Range, log_y: bool = False) -> None:
        self.x_range = x_range
        self.y_range = y_range
        self.log_y = log_y

    def x(self, value: float) -> float:
        first, last = self.x_range
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log_y:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str, with_numbers: bool = True) -> str:
        """Return the grid, the numbers on both axes and what they are."""
        right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for value in _powers(self.y_range) if self.log_y else _ticks(self.y_range, 5):
            y = self.y(value)
            parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
            parts.append(_text(LEFT - 7, y + 4, _short(value), "end"))
        for value in _ticks(self.x_range, 7) if with_numbers else ():
            parts.append(_text(self.x(value), floor + 17, _short(value), "middle"))
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}" stroke="var(--soft)"/>')
        parts.append(_text((LEFT + right) / 2, HEIGHT - 6, x_label, "middle"))
        middle = (TOP + floor) / 2
        parts.append(
            f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})" '
            f'fill="var(--soft)">{html.escape(y_label)}</text>'
        )
        return "".join(parts)


def _bars(
    labels: Sequence[str], series: Mapping[str, Sequence[float]], x_label: str, y_label: str, gap: float
) -> str:
    """Return a chart of bars; `gap` is the share of a bar's place that stays empty."""
    heights = [sum(values[place] for values in series.values()) for place in range(len(labels))]
    if not heights or max(heights) <= 0:
        return _nothing(y_label)
    plot = _Plot((0, len(labels)), _value_range([0.0, *heights], False))
    overlap = 0.0 if gap else 0.7  # bars that only touch would show seams
    touching = "" if gap else ' shape-rendering="crispEdges"'
    parts = [plot.axes(x_label, y_label, with_numbers=False), f"<g{touching}>"]
    for place, label in enumerate(labels):
        left, width = plot.x(place + gap / 2), plot.x(1 - gap) - plot.x(0)
        below = 0.0
        for number, (name, values) in enumerate(series.items()):
            value = values[place]
            if value > 0:
                top, floor = plot.y(below + value), plot.y(below)
                title = f"{label}: {name} {_short(value)}" if len(series) > 1 else f"{label}: {_short(value)}"
                parts.append(_box(left, top, width + overlap, floor - top + overlap, number, title))
                below += value
    parts.append("</g>")
    for place in _shown_labels(labels):
        parts.append(_text(plot.x(place + 0.5), HEIGHT - BOTTOM + 17, labels[place], "middle"))
    return _chart(parts, f"{y_label} by {x_label}", list(series) if len(series) > 1 else [])


def _shown_labels(labels: Sequence[str]) -> range:
    """Return the places of the labels that fit side by side."""
    widest = max(len(label) for label in labels) * 6.8 + 12
    fitting = max(1, int((WIDTH - LEFT - RIGHT) / widest))
    return range(0, len(labels), math.ceil(len(labels) / fitting))


def _chart(parts: Iterable[str], about: str, names: Sequence[str]) -> str:
    """Return the whole chart, with a legend if there are names."""
    entries = (
        '<span style="white-space:nowrap;margin-right:16px"><svg width="12" height="12" aria-hidden="true">'
        f'<rect y="1" width="11" height="11" rx="2" fill="{_colour(number)}"/></svg> {html.escape(name)}'
        "</span>"
        for number, name in enumerate(names)
    )
    legend = f'<div style="font-size:13.5px;margin:2px 0 6px">{"".join(entries)}</div>' if names else ""
    return (
        f'{legend}<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(about)}" style="display:block;width:100%;max-width:{WIDEST}px" '
        f'font-size="12" font-family="inherit">{"".join(parts)}</svg>'
    )


def _nothing(about: str) -> str:
    return f"<p>{html.escape(about)}: nothing to show.</p>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--soft)">{html.escape(text)}</text>'
    )


def _box(x: float, y: float, width: float, height: float, number: int, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}" fill="{_colour(number)}">'
        f"<title>{html.escape(title)}</title></rect>"
    )


def _mark(x: float, text: str) -> str:
    return (
        f'<g><title>{html.escape(text)}</title><line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}" stroke="var(--bad)" stroke-dasharray="4 3"/>'
        f'<rect x="{x - 4:.1f}" y="{TOP}" width="8" height="{HEIGHT - TOP - BOTTOM}" fill="transparent"/></g>'
    )


def _colour(number: int) -> str:
    return f"var(--series-{number % SERIES_COLOURS + 1})"


def _shown_points(xs: Sequence[float], ys: Sequence[float], log_y: bool) -> list[tuple[float, float]]:
    return [
        (x, y)
        for x, y in zip(xs, ys, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)
    ]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep at most `MOST_POINTS`: the least and the largest of each stretch of equal length, in order."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    kept = []
    for number in range(stretches):
        stretch = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _widened(low: float, high: float) -> Range:
    """Return a range that is not empty."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _value_range(values: Sequence[float], log_y: bool) -> Range:
    """Return the range of a y axis: from 0 where the values come near it, and to round numbers."""
    low, high = min(values), max(values)
    if log_y:
        return 10.0 ** math.floor(math.log10(low)), 10.0 ** (math.floor(math.log10(high)) + 1)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    low, high = _widened(low, high)
    step = _step(high - low, 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _step(span: float, most: int) -> float:
    """Return the smallest round step that cuts a span into at most so many parts."""
    size = 10.0 ** math.floor(math.log10(span / most))
    return next(size * factor for factor in _STEPS if span / (size * factor) <= most * (1 + 1e-9))


def _ticks(shown: Range, most: int) -> list[float]:
    """Return round numbers within a range."""
    low, high = shown
    step = _step(high - low, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _powers(shown: Range) -> list[float]:
    """Return the powers of ten within a range."""
    first, last = (round(math.log10(value)) for value in shown)
    return [10.0**power for power in range(first, last + 1)]


def _short(value: float) -> str:
    """Write a number as short as an axis needs it: 0.25, 1,500, 20k, 3M, 2e-05."""
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.3g}"
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= factor and (unit != "k" or size >= 1e4):
            return f"{value / factor:.4g}{unit}"
    return f"{value:,.4g}" if size < 1e3 else f"{value:,.0f}"
