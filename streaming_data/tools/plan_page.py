"""A plan as a page: the mixture asked and realised, in every batch of a run, and how full packs are."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unitoken.common.cli import short_count
from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside
from unitoken.common.html_page import figure_tile, html_page, html_table
from unitoken.common.svg_charts import bar_chart, histogram, line_chart, stacked_bars
from unitoken.dataset.kinds import KINDS
from unitoken.streaming_data.arrays import Floats, Integers
from unitoken.streaming_data.plan.composition import FILL_BINS, Composition, compose
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.report import PlanReport
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.streaming_data.tools.data_section import DataSection
from unitoken.streaming_data.tools.sweep import SweepRow

MOST_EPOCHS = 4  # of a run, on its page
MOST_PARTS = 240  # bars along the run
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 18px 28px; align-items: center }
"""


@dataclass(frozen=True)
class PlannedEpoch:
    """An epoch's plan, and what its packs are made of."""

    report: PlanReport
    composition: Composition


def write_plan_page(
    path: Path,
    stage: Path,
    section: DataSection,
    recipe: Recipe,
    samples: Sequence[StreamSamples],
    epoch: int,
    sweep: Sequence[SweepRow],
) -> None:
    """Write the page of a stage's plan.

    Args:
        path: of the HTML file.
        stage: the stage's file.
        section: what it says of its data.
        recipe: the plan's.
        samples: of each stream.
        epoch: the first one to show; the page shows the run's next ones, too.
        sweep: how full packs of other lengths would be; empty if that was not asked for.

    Raises:
        ConfigError: the file can not be written.
    """
    folder, batch = section.data.cache_folder / "plans", recipe.global_batch
    first = load_or_build(folder, recipe, epoch, lambda: samples)
    run_epochs = epochs_of_run(section.max_duration, first.report, batch)
    numbers = range(epoch, max(epoch + 1, min(run_epochs, epoch + MOST_EPOCHS)))
    plans = [load_or_build(folder, recipe, number, lambda: samples) for number in numbers]
    parts = MOST_PARTS // len(plans)
    epochs = [
        PlannedEpoch(plan.report, compose(plan, samples, recipe.packed_length, batch, parts))
        for plan in plans
    ]
    try:
        write_aside(path, plan_page(str(stage), recipe, epochs, run_epochs, sweep).encode())
    except OSError as error:
        raise ConfigError(f"--report {path}: cannot be written: {error.strerror}") from None


def epochs_of_run(max_duration: str | None, report: PlanReport, global_batch: int) -> int:
    """Return how many epochs a run begins.

    Args:
        max_duration: the stage's, in epochs (`2ep`) or batches (`500ba`); all else counts as one epoch.
        report: of an epoch; all have equally many packs.
        global_batch: packs of a global batch.
    """
    match = re.fullmatch(r"(\d+)(ep|ba)", max_duration or "")
    if match is None:
        return 1
    amount = int(match[1])
    return amount if match[2] == "ep" else math.ceil(amount * global_batch / report.packs)


def plan_page(
    name: str, recipe: Recipe, epochs: Sequence[PlannedEpoch], run_epochs: int, sweep: Sequence[SweepRow]
) -> str:
    """Return the page.

    Args:
        name: of the stage's file.
        recipe: the plan's.
        epochs: successive ones, the first of which is shown in most figures.
        run_epochs: how many the whole run begins.
        sweep: how full packs of other lengths would be; empty if that was not asked for.
    """
    first = epochs[0].report
    settings = (
        f"packs of {recipe.packed_length:,} tokens, {recipe.global_batch:,} in a global batch, "
        f"batching_method: {recipe.batching_method}, plan {recipe.hash}"
    )
    sections = [
        _tiles(recipe, first, run_epochs),
        _mixture_section(first),
        _batches_section(epochs, recipe.global_batch),
        _fill_section(epochs, recipe, sweep),
        _epochs_section(epochs, run_epochs),
    ]
    body = f"<h1>The plan of {html.escape(name)}</h1><p>{html.escape(settings)}</p>{''.join(sections)}"
    return html_page(f"plan of {Path(name).name}", body, STYLE)


def _tiles(recipe: Recipe, report: PlanReport, run_epochs: int) -> str:
    batches = report.packs // recipe.global_batch
    run = f" x {run_epochs:,} epochs" if run_epochs > 1 else " in the run"
    left_out = sum(stream.over_long for stream in report.streams)
    cut = sum(stream.cut for stream in report.streams)
    tiles = [
        figure_tile(f"{batches:,}", f"global batches in an epoch{run}"),
        figure_tile(short_count(sum(s.samples for s in report.streams)), "samples in an epoch"),
        figure_tile(short_count(sum(s.tokens for s in report.streams)), "tokens in an epoch"),
        figure_tile(f"{report.fill:.1%}", f"of {report.packs:,} packs is filled with tokens"),
        figure_tile(
            f"{report.dropped_samples:,}",
            "samples dropped in an epoch, to reach whole global batches",
        ),
        figure_tile(f"{left_out:,}", "samples left out: longer than a pack"),
        *([figure_tile(f"{cut:,}", "samples cut to the length of a pack")] if cut else []),
    ]
    return f'<div class="figures">{"".join(tiles)}</div>'


def _mixture_section(report: PlanReport) -> str:
    units = ("samples", "tokens", "target_tokens")
    totals = {unit: max(1, sum(getattr(s, unit) for s in report.streams)) for unit in units}
    rows: list[list[object]] = []
    for stream in report.streams:
        shares = {unit: f"{getattr(stream, unit) / totals[unit]:.1%}" for unit in units}
        candidates = stream.stored - stream.filtered - stream.over_long
        rows.append([
            stream.name, f"{stream.asked:.1%}", shares[report.unit],
            stream.samples, shares["samples"], short_count(stream.tokens), shares["tokens"],
            short_count(stream.target_tokens), shares["target_tokens"],
            f"{stream.samples / max(1, candidates):.2f}",
        ])  # fmt: skip
    unit = report.unit.replace("_", " ")
    head = [
        *("stream", f"asked of {unit}", "realised", "samples", "share", "tokens", "share"),
        *("trained on", "share", "passes over its data"),
    ]
    table = html_table(head, rows)
    return f"<section><h2>The mixture of an epoch</h2>{table}{_left_out(report)}</section>"


def _left_out(report: PlanReport) -> str:
    names = ("stored", "over-long, left out", "over-long, cut", "of other kinds", "held out")
    rows: list[list[object]] = [
        [s.name, s.stored, s.over_long, s.cut, s.filtered - s.held_out, s.held_out] for s in report.streams
    ]
    used = [column for column in range(2, 6) if any(row[column] for row in rows)]
    if not used:
        return ""
    head = ["stream", "samples stored", *(names[column - 1] for column in used)]
    table = html_table(head, [[*row[:2], *(row[column] for column in used)] for row in rows])
    return f"<h3>What is not in it</h3>{table}"


def _batches_section(epochs: Sequence[PlannedEpoch], global_batch: int) -> str:
    report = epochs[0].report
    batches = report.packs // global_batch
    starts = _starts(epochs, batches)
    tokens = np.concatenate([epoch.composition.tokens for epoch in epochs], axis=2)
    each = round(batches * len(epochs) / len(starts))
    bars = "Each bar is one global batch" if each <= 1 else f"Each bar is the mean of {each:,} global batches"
    parts = [f"<p>{bars}; {_epochs_of(epochs)}.</p>"]
    if len(report.streams) > 1:
        of_streams = {s.name: tokens[number].sum(axis=0) for number, s in enumerate(report.streams)}
        parts.append(f"<h3>By stream</h3>{_share_bars(starts, of_streams)}{_scatter_table(report)}")
    of_kinds: dict[str, Floats] = {kind: tokens[:, place].sum(axis=0) for place, kind in enumerate(KINDS)}
    used = {kind: of_kind for kind, of_kind in of_kinds.items() if of_kind.any()}
    parts.append(f"<h3>By kind</h3>{_share_bars(starts, used)}")
    return f"<section><h2>The mixture in every batch</h2>{''.join(parts)}</section>"


def _starts(epochs: Sequence[PlannedEpoch], batches: int) -> Integers:
    """Return the first global batch of each part, counted on from epoch to epoch."""
    parts = [epoch.composition.borders[:-1] + number * batches for number, epoch in enumerate(epochs)]
    return np.concatenate(parts)


def _epochs_of(epochs: Sequence[PlannedEpoch]) -> str:
    first, last = epochs[0].report.epoch, epochs[-1].report.epoch
    return f"epoch {first}" if first == last else f"epochs {first} to {last}, one after the other"


def _scatter_table(report: PlanReport) -> str:
    """Return a table of how each stream's share scatters from batch to batch."""
    rows: list[list[object]] = []
    for stream in report.streams:
        if (share := stream.in_batches) is not None:
            values = (share.mean, share.sd, share.least, share.most, share.independent_sd)
            rows.append([stream.name, *(f"{value:.1%}" for value in values)])
    head = ["of a global batch's tokens", "mean", "sd", "least", "most", "sd of independent draws"]
    return html_table(head, rows)


def _share_bars(starts: Integers, tokens: Mapping[str, Floats]) -> str:
    """Draw the shares of tokens by the first global batch of each part."""
    total = np.sum(list(tokens.values()), axis=0)
    shares = {name: (100 * of_name / total).tolist() for name, of_name in tokens.items()}
    labels = [f"{start:,}" for start in starts.tolist()]
    return stacked_bars(labels, shares, x_label="global batch", y_label="% of tokens")


def _fill_section(epochs: Sequence[PlannedEpoch], recipe: Recipe, sweep: Sequence[SweepRow]) -> str:
    starts = _starts(epochs, epochs[0].report.packs // recipe.global_batch).tolist()
    mean = np.concatenate([epoch.composition.fill for epoch in epochs])
    least = np.concatenate([epoch.composition.least_fill for epoch in epochs])
    lines = {"mean": (starts, (100 * mean).tolist()), "emptiest": (starts, (100 * least).tolist())}
    fills = epochs[0].composition.pack_fills
    emptiest = int(np.flatnonzero(fills)[0])
    edges = np.linspace(0, 100, FILL_BINS + 1)[emptiest:].tolist()
    charts = [
        line_chart(lines, x_label="global batch", y_label="% of a pack filled"),
        histogram((edges, fills[emptiest:].tolist()), x_label="% of a pack filled", y_label="packs"),
    ]
    both = "".join(f"<div>{chart}</div>" for chart in charts)
    others = _sweep_part(sweep, recipe.packed_length)
    return f"""<section><h2>How full packs are</h2><div class="charts">{both}</div>
<h3>Packs of other lengths</h3>{others}</section>"""


def _sweep_part(sweep: Sequence[SweepRow], packed_length: int) -> str:
    if not sweep:
        return "<p>Add <code>--sweep-length</code> to see how full packs of other lengths would be.</p>"
    chart = bar_chart(
        [f"{row.length:,}" for row in sweep], [100 * row.fill * row.kept for row in sweep],
        x_label="packed_length", y_label="% filled x % kept",
    )  # fmt: skip
    rows: list[list[object]] = []
    for row in sweep:
        is_set = "as the settings have it" if row.length == packed_length else ""
        figures = [f"{row.fill:.2%}", f"{row.kept:.2%}", row.over_long]
        rows.append([row.length, *(["-", "-", "-"] if row.problem else figures), row.problem or is_set])
    table = html_table(["packed_length", "filled", "tokens kept", "over-long samples", ""], rows)
    return f"""<p>Short packs are full because long samples are left out: the best length fills its packs with
most of the tokens.</p><div class="charts"><div>{chart}</div>{table}</div>"""


def _epochs_section(epochs: Sequence[PlannedEpoch], run_epochs: int) -> str:
    head = [
        "epoch",
        "packs",
        "filled",
        "samples",
        "tokens",
        "samples dropped",
        "packs dropped",
        "packs split",
    ]
    rows: list[list[object]] = []
    for report in (epoch.report for epoch in epochs):
        samples, tokens = sum(s.samples for s in report.streams), sum(s.tokens for s in report.streams)
        dropped = [report.dropped_samples, report.dropped_packs, report.split_packs]
        rows.append([report.epoch, report.packs, f"{report.fill:.2%}", samples, tokens, *dropped])
    rest = run_epochs - epochs[-1].report.epoch - 1
    more = f" {rest:,} more follow in this run." if rest > 0 else ""
    return f"""<section><h2>Epochs</h2><p>All epochs have equally many packs. What is above that number is
dropped, in every epoch other samples; where packs are missing, the fullest are split in two.{more}</p>
{html_table(head, rows)}</section>"""
