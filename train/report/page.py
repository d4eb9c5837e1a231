"""The report of one run, or of several beside each other, as a page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unitoken.common.cli import warn
from unitoken.common.errors import ConfigError, one_line
from unitoken.common.files import write_aside
from unitoken.common.html_page import figure_tile, html_page, html_table
from unitoken.common.svg_charts import line_chart
from unitoken.train.report.run_log import Curve, RunLog, read_run
from unitoken.train.report.samples_section import samples_section

REPORT = "report.html"
SMOOTHED_PARTS = 100  # a smoothed curve takes the mean over this part of the run
STYLE = """
.charts { display: grid; gap: 8px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr)) }
.charts h3 { margin-top: 10px }
table.drawings { border-collapse: separate; border-spacing: 6px; font-size: 13.5px }
table.drawings th { color: var(--soft); font-weight: 600; text-align: left }
table.drawings th:first-child { min-width: 100px }
table.drawings img { display: block; width: 96px; image-rendering: pixelated; border-radius: 6px }
details summary { cursor: pointer; color: var(--accent); margin-bottom: 8px }
"""
KINDS = {
    "loss_text": "text tokens",
    "loss_image": "image tokens",
    "loss_text_only": "documents without images",
    "loss_understanding": "documents that read images",
    "loss_generation": "documents that draw",
}


class _Measure(NamedTuple):
    """A chart from 0 on: its title, and the name in metrics.jsonl of what it shows."""

    title: str
    name: str
    unit: str
    factor: float = 1.0
    smoothed: bool = False


MEASURES = (
    _Measure("Learning rate", "lr", "learning rate"),
    _Measure("Gradient norm", "grad_norm", "L2 norm before clipping", smoothed=True),
    _Measure("Speed", "tokens_per_second", "tokens/s", smoothed=True),
    _Measure("Useful share", "useful", "% of positions", 100.0, smoothed=True),
    _Measure("Memory", "memory_gib", "GiB on a GPU"),
    _Measure("Model FLOPs utilisation", "mfu", "%", 100.0, smoothed=True),
    _Measure("Skipped steps", "skipped", "steps"),
)


def write_run_report(folder: Path) -> None:
    """Write report.html into a run's folder; what goes wrong is a warning, as the run itself is well."""
    try:
        write_aside(folder / REPORT, report_page([read_run(folder, folder.name)]).encode())
    except Exception as error:
        warn(f"{folder / REPORT}: not written: {one_line(error, 200)}")


def write_report(runs: Sequence[tuple[str, Path]], out: Path) -> None:
    """Write the report of runs.

    Args:
        runs: their names and folders.
        out: the HTML file.

    Raises:
        ConfigError: a folder is not a run's, or the file can not be written.
    """
    page = report_page([read_run(folder, name) for name, folder in runs])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_aside(out, page.encode())
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


def report_page(runs: Sequence[RunLog]) -> str:
    """Return the page of at least one run."""
    title = str(runs[0].settings.get("name", runs[0].name)) if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(runs), _loss_section(runs), _evaluations(runs)]
    parts += [_course(runs), _streams(runs)]
    for run in runs:
        about = "Samples" if len(runs) == 1 else f"Samples of {run.name}"
        parts.append(samples_section(run.folder, about))
    parts += [_starts(runs), _settings(runs)]
    return html_page(title, "\n".join(part for part in parts if part), STYLE)


# --- What the runs came to ----------------------------------------------------------------------------------


def _summary(runs: Sequence[RunLog]) -> str:
    rows = [_figures(run) for run in runs]
    if len(runs) == 1:
        tiles = "".join(figure_tile(value, label) for label, value in rows[0].items() if value)
        return f'<p>{html.escape(runs[0].name)}</p><div class="figures">{tiles}</div>'
    head = ["run", *rows[0]]
    table = html_table(head, [[run.name, *row.values()] for run, row in zip(runs, rows, strict=True)])
    return f"<section>{table}</section>"


def _figures(run: RunLog) -> dict[str, str]:
    """Return the figures of a run by what they are; empty where it did not log them."""
    curves = run.curves
    seconds = sum(curves["seconds"].values) if "seconds" in curves else 0.0
    tokens = sum(curves["tokens"].values) if "tokens" in curves else 0.0
    loss = _smoothed(curves["loss"]).last if "loss" in curves else None
    useful = curves.get("useful")
    return {
        "steps": f"{run.steps:,}",
        "loss at the end, smoothed": "" if loss is None else f"{loss:.4f}",
        "tokens": _large(tokens) if tokens else "",
        "tokens/s": f"{tokens / seconds:,.0f}" if seconds else "",
        "of training": _duration(seconds) if seconds else "",
        "of the positions useful": f"{np.mean(useful.values):.1%}" if useful else "",
        "starts": f"{len(run.starts):,}" if run.starts else "",
    }


def _large(value: float) -> str:
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- Curves -------------------------------------------------------------------------------------------------


def _smoothed(curve: Curve) -> Curve:
    """Return the means over windows of a hundredth of the run, each at the middle of its window."""
    window = max(1, len(curve.values) // SMOOTHED_PARTS)
    if window == 1:
        return curve
    sums = np.cumsum([0.0, *curve.values])
    means = (sums[window:] - sums[:-window]) / window
    middle = window // 2
    return Curve(list(curve.steps[middle : middle + len(means)]), means.tolist())


def _scaled(curve: Curve, factor: float) -> Curve:
    return curve if factor == 1.0 else Curve(curve.steps, [value * factor for value in curve.values])


def _marks(runs: Sequence[RunLog]) -> list[tuple[float, str]]:
    """Return the steps at which a run was started again."""
    return [
        (start.step, f"{run.name}: {_describe(start.step, start.reached)}")
        for run in runs
        for start in run.starts
        if start.step > 0
    ]


def _describe(step: int, reached: int) -> str:
    if reached > step:
        return f"stopped after step {reached:,}, resumed at step {step:,}"
    return f"resumed at step {step:,}"


def _chart(runs: Sequence[RunLog], lines: Mapping[str, Curve], y_label: str, from_zero: bool = False) -> str:
    series = {name: (curve.steps, curve.values) for name, curve in lines.items()}
    return line_chart(series, x_label="step", y_label=y_label, marks=_marks(runs), from_zero=from_zero)


def _charts(charts: Iterable[tuple[str, str]]) -> str:
    parts = "".join(f"<div><h3>{html.escape(title)}</h3>{chart}</div>" for title, chart in charts)
    return f'<div class="charts">{parts}</div>' if parts else ""


def _by_run(runs: Sequence[RunLog], name: str) -> dict[str, Curve]:
    return {run.name: run.curves[name] for run in runs if name in run.curves}


def _loss_section(runs: Sequence[RunLog]) -> str:
    """Return the losses: of one run also those of each step; of several smoothed ones alone."""
    totals = {name: _smoothed(curve) for name, curve in _by_run(runs, "loss").items()}
    if not totals:
        return ""
    if len(runs) == 1:
        totals = {"each step": runs[0].curves["loss"], "smoothed": next(iter(totals.values()))}
    charts = [("All supervised tokens", _chart(runs, totals, "loss"))]
    kinds = [name for name in KINDS if _by_run(runs, name)]
    if len(runs) == 1:
        lines = {KINDS[name]: _smoothed(runs[0].curves[name]) for name in kinds}
        charts += [("By kind, smoothed", _chart(runs, lines, "cross-entropy"))] if lines else []
    else:
        for name in kinds:
            lines = {run: _smoothed(curve) for run, curve in _by_run(runs, name).items()}
            charts.append((KINDS[name].capitalize(), _chart(runs, lines, "cross-entropy")))
    return f"<section><h2>Loss</h2>{_charts(charts)}</section>"


def _evaluations(runs: Sequence[RunLog]) -> str:
    """Return a chart of each measure that was taken at an interval."""
    names = dict.fromkeys(
        (group, name) for run in runs for group, measures in run.evaluations.items() for name in measures
    )
    charts = []
    for group, name in names:
        if name == "targets":  # how many tokens an evaluation has, the same each time
            continue
        lines = {
            run.name: run.evaluations[group][name] for run in runs if name in run.evaluations.get(group, {})
        }
        title = name if group == "eval" else f"{group}: {name}"
        charts.append((title, _chart(runs, lines, name)))
    return f"<section><h2>Evaluations</h2>{_charts(charts)}</section>" if charts else ""


def _course(runs: Sequence[RunLog]) -> str:
    """Return the charts of `MEASURES` that any run has; skipped steps only where there are any."""
    charts = []
    for measure in MEASURES:
        lines = _by_run(runs, measure.name)
        if not lines or (measure.name == "skipped" and not any(curve.last for curve in lines.values())):
            continue
        shown = {
            run: _scaled(_smoothed(curve) if measure.smoothed else curve, measure.factor)
            for run, curve in lines.items()
        }
        charts.append((measure.title, _chart(runs, shown, measure.unit, from_zero=True)))
    return f"<section><h2>Course</h2>{_charts(charts)}</section>" if charts else ""


# --- Data, starts and settings ------------------------------------------------------------------------------


def _streams(runs: Sequence[RunLog]) -> str:
    """Return the tokens of each stream, and their shares."""
    prefix = "tokens_seen/"
    rows: list[list[object]] = []
    for run in runs:
        seen = {
            name.removeprefix(prefix): int(curve.last)
            for name, curve in run.curves.items()
            if name.startswith(prefix)
        }
        total = sum(seen.values()) or 1
        rows += [[run.name, name, count, f"{count / total:.1%}"] for name, count in seen.items()]
    if not rows:
        return ""
    table = html_table(["run", "stream", "tokens seen", "share"], rows)
    return f"<section><h2>Data</h2>{table}</section>"


def _starts(runs: Sequence[RunLog]) -> str:
    """Return when the runs were started, and what had to be repeated."""
    rows: list[list[object]] = [
        [run.name, start.time, start.step, start.reached - start.step, start.ranks]
        for run in runs
        for start in run.starts
    ]
    if not rows:
        return ""
    table = html_table(["run", "time (UTC)", "from step", "steps repeated", "ranks"], rows)
    return f"<section><h2>Starts</h2>{table}</section>"


def _settings(runs: Sequence[RunLog]) -> str:
    """Return all settings of one run, or those that differ between runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    if not names:
        return ""
    if len(runs) == 1:
        table = html_table(["setting", "value"], [[name, _shown(runs[0].settings[name])] for name in names])
        return (
            f"<section><h2>Settings</h2><details><summary>All {len(names)} settings</summary>{table}"
            "</details></section>"
        )
    rows = []
    for name in names:
        values = [_shown(run.settings.get(name)) for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    differences = html_table(["setting", *(run.name for run in runs)], rows) if rows else "<p>None.</p>"
    return f"<section><h2>Settings that differ</h2>{differences}</section>"


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
