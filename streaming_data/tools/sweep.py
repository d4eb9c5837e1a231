"""How full packs of other lengths would be, and what of the data would not fit into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.build import build
from unitoken.streaming_data.plan.lengths import StreamSamples, read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.sources import StreamSource

LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
UNLIMITED = (1 << 31) - 1
FEW_PACKS = 100


@dataclass(frozen=True)
class SweepRow:
    length: int
    fill: float  # share of the packs' positions that hold a token
    over_long: int  # samples that are left out, or cut
    kept: float  # share of the datasets' tokens that is not
    packs: int = 0
    problem: str = ""  # why there is no such plan


def sweep(recipe: Recipe, sources: Sequence[StreamSource], views: Views | None) -> list[SweepRow]:
    """Plan the first epoch for each length, with all its packs."""

    def samples(length: int) -> tuple[Recipe, list[StreamSamples]]:
        other = recipe.model_copy(update={"packed_length": length, "global_batch": 1, "canonical_nodes": 1})
        return other, [read_lengths(source, other, views) for source in sources]

    everything = sum(stream.total("tokens") for stream in samples(UNLIMITED)[1])
    rows = []
    for length in LENGTHS:
        try:
            other, streams = samples(length)
            report = build(other, streams, 0, None).report
        except ConfigError as error:  # each sample of a stream may be longer
            rows.append(SweepRow(length, 0.0, 0, 0.0, problem=str(error)))
            continue
        over_long = sum(stream.over_long + stream.cut for stream in streams)
        kept = sum(s.total("tokens") for s in streams) / everything
        rows.append(SweepRow(length, report.fill, over_long, kept, report.packs))
    return rows


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """For people. The best is what fills packs with most of the data: short packs are full because long samples are left out."""
    highest = max(row.fill * row.kept for row in rows)
    best = next(row for row in rows if row.fill * row.kept >= highest - 0.0005)  # the shortest of equals
    lines = ["packed_length    full  over-long samples  tokens kept"]
    for row in rows:
        if row.problem:
            lines.append(f"{row.length:>13,}       -  {row.problem}")
        else:
            mark = "  <- best" if row is best else ""
            lines.append(
                f"{row.length:>13,}  {row.fill:>6.2%}  {row.over_long:>17,}  {row.kept:>11.2%}{mark}"
            )
    if best.packs < FEW_PACKS:
        lines.append(
            f"too few packs to tell: {best.packs:,} at {best.length:,}; with more data others may be fuller"
        )
    return "\n".join(lines)
