"""How full packs of other lengths would be, and which part of the data would not fit into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.build import build
from unitoken.streaming_data.plan.lengths import StreamSamples, read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.sources import StreamSource
from unitoken.streaming_data.tables import format_table

LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
UNLIMITED = (1 << 31) - 1
FEW_PACKS = 100


@dataclass(frozen=True)
class SweepRow:
    """The result for one packed length."""

    length: int
    fill: float  # share of the packs' positions that hold a token
    over_long: int  # samples that are left out, or cut
    kept: float  # share of the datasets' tokens that is in the packs
    packs: int = 0
    problem: str = ""  # why there is no such plan


def sweep(recipe: Recipe, sources: Sequence[StreamSource], views: Views | None) -> list[SweepRow]:
    """Plan the first epoch for each length, with all its packs."""

    def read(length: int) -> tuple[Recipe, list[StreamSamples]]:
        other = recipe.model_copy(update={"packed_length": length, "global_batch": 1, "canonical_nodes": 1})
        return other, [read_lengths(source, other, views) for source in sources]

    all_tokens = sum(stream.total("tokens") for stream in read(UNLIMITED)[1])
    rows = []
    for length in LENGTHS:
        try:
            other, streams = read(length)
            report = build(other, streams, 0, None).report
        except ConfigError as error:  # every sample of a stream may be longer
            rows.append(SweepRow(length, 0.0, 0, 0.0, problem=str(error)))
            continue
        over_long = sum(stream.over_long + stream.cut for stream in streams)
        kept = sum(stream.total("tokens") for stream in streams) / all_tokens
        rows.append(SweepRow(length, report.fill, over_long, kept, report.packs))
    return rows


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """Return the rows as a table for people, with the best length marked.

    The best length fills packs with most of the data: short packs alone are full because long samples are
    left out.
    """
    highest = max(row.fill * row.kept for row in rows)
    best = next(row for row in rows if row.fill * row.kept >= highest - 0.0005)  # the shortest of equals
    cells = [["packed_length", "full", "over-long samples", "tokens kept"]]
    for row in rows:
        if row.problem:
            cells.append([f"{row.length:,}", "-", "", ""])
        else:
            cells.append([f"{row.length:,}", f"{row.fill:.2%}", f"{row.over_long:,}", f"{row.kept:.2%}"])
    head, *lines = format_table(cells)
    for number, row in enumerate(rows):
        if row.problem:
            lines[number] = f"{lines[number].rstrip()}  {row.problem}"
        elif row is best:
            lines[number] += "  <- best"
    if best.packs < FEW_PACKS:
        lines.append(
            f"too few packs to compare: {best.packs:,} at {best.length:,}; with more data, "
            "another length may be better"
        )
    return "\n".join([head, *lines])
