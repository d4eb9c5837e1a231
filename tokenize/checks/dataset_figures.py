"""A whole dataset in figures, for its pages: lengths, pictures, codes in use, rejects by reason."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unitoken.common.cli import short_count
from unitoken.common.html_page import figure_tile, html_table
from unitoken.common.svg_charts import bar_chart, histogram
from unitoken.dataset.kinds import KINDS
from unitoken.dataset.manifest import Manifest
from unitoken.dataset.record import Record
from unitoken.tokenize.checks.preview import Dataset
from unitoken.tokenize.checks.sample_cards import KIND_NAMES, codes_of
from unitoken.tokenize.checks.sample_table import PROPORTIONS, SampleTable
from unitoken.tokenize.rejects import RejectGroup

FEWEST_BINS, MOST_BINS = 8, 40
MOST_TOKENS = 1 << 22  # longer samples are counted as this long
SHOWN_KINDS = 30  # of rejects; a user's adapter may invent any number
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 18px 28px }
.charts > div { min-width: 0 } .tables > div + div { margin-top: 16px }
"""


@dataclass(eq=False)
class CodeUsage:
    """How often each code of the codebook is used, in some of a dataset's pictures."""

    counts: npt.NDArray[np.int64]  # (codebook size,)
    pictures: int = 0
    samples: int = 0
    is_whole: bool = False  # whether these are all pictures of the dataset

    def add(self, records: Iterable[Record], dataset: Dataset) -> None:
        """Count the codes of samples' pictures."""
        for record in records:
            self.samples += 1
            self.pictures += len(record.image_spans)
            for number in range(len(record.image_spans)):
                codes = codes_of(record, dataset, number).reshape(-1)
                self.counts += np.bincount(codes, minlength=len(self.counts))

    @property
    def share(self) -> float:
        """The share of the codebook that is used."""
        return float(np.count_nonzero(self.counts)) / len(self.counts)

    @property
    def perplexity(self) -> float:
        """Of how many codes, if all were equally frequent, the choice would be as uncertain."""
        frequencies = self.counts[self.counts > 0] / max(1, self.counts.sum())
        return math.exp(-float((frequencies * np.log(frequencies)).sum()))


def dataset_tiles(manifest: Manifest, table: SampleTable) -> str:
    """Return the boxes with a dataset's main figures."""
    share = manifest.target_tokens / max(1, manifest.tokens)
    rejected = manifest.rejected / max(1, manifest.items)
    median = int(np.median(table.tokens)) if len(table.tokens) else 0
    longest = int(table.tokens.max(initial=0))
    tiles = [
        figure_tile(f"{manifest.samples:,}", "samples"),
        figure_tile(short_count(manifest.tokens), f"tokens, {share:.0%} of them trained on"),
        figure_tile(f"{median:,}", f"tokens in the median sample, {longest:,} in the longest"),
        figure_tile(short_count(manifest.images), "pictures"),
        figure_tile(f"{manifest.rejected:,}", f"items rejected, {rejected:.2%} of all"),
    ]
    return f'<div class="figures">{"".join(tiles)}</div>'


def dataset_sections(table: SampleTable, usage: CodeUsage | None, rejects: list[RejectGroup]) -> str:
    """Return the sections of a page that show a dataset in figures.

    Args:
        table: of all its samples.
        usage: of the image tokenizer's codes; None for a dataset without pictures.
        rejects: by reason.
    """
    sections = [_lengths_section(table)]
    if table.images.any():
        sections.append(_pictures_section(table, usage))
    if rejects:
        sections.append(_rejects_section(rejects))
    return "".join(sections)


def _lengths_section(table: SampleTable) -> str:
    total = max(1, int(table.tokens.sum(dtype=np.int64)))

    def row(name: str, chosen: npt.NDArray[np.bool_]) -> list[object]:
        tokens = table.tokens[chosen]
        share = int(tokens.sum(dtype=np.int64)) / total
        median = int(np.median(tokens)) if len(tokens) else 0
        return [name, len(tokens), f"{share:.1%}", median, int(tokens.max(initial=0))]

    columns = ["samples", "of all tokens", "median", "longest"]
    places = np.unique(table.kinds).tolist()
    by_kind = [row(KIND_NAMES[KINDS[place]], table.kinds == place) for place in places]
    tables = [html_table(["kind", *columns], by_kind)]
    if table.source_names:
        by_source = [row(name, table.sources == place) for place, name in enumerate(table.source_names)]
        tables.append(html_table(["source", *columns], by_source))
    lengths = np.bincount(np.minimum(table.tokens, MOST_TOKENS))
    chart = histogram(_bins(lengths), x_label="tokens in a sample", y_label="samples")
    beside = "".join(tables)
    return f"""<section><h2>Lengths of all samples</h2>
<div class="charts"><div>{chart}</div><div class="tables">{beside}</div></div></section>"""


def _pictures_section(table: SampleTable, usage: CodeUsage | None) -> str:
    charts = [_pictures_chart(table)]
    if table.sizes.longer_sides.any():
        charts += [
            histogram(
                _bins(table.sizes.longer_sides),
                x_label="longer side of the original in pixels",
                y_label="pictures",
            ),
            bar_chart(
                _proportion_names(),
                table.sizes.proportions.tolist(),
                x_label="width : height of the original",
                y_label="pictures",
            ),
        ]
    grid = "".join(f"<div>{chart}</div>" for chart in charts)
    codes = "" if usage is None else f"<h3>Codes in use</h3>{_usage(usage)}"
    return f'<section><h2>Pictures</h2><div class="charts">{grid}</div>{codes}</section>'


def _pictures_chart(table: SampleTable) -> str:
    counts = np.bincount(table.images)
    if len(counts) <= MOST_BINS:
        return bar_chart(
            list(map(str, range(len(counts)))),
            counts.tolist(),
            x_label="pictures in a sample",
            y_label="samples",
        )
    return histogram(_bins(counts), x_label="pictures in a sample", y_label="samples")


def _proportion_names() -> list[str]:
    """Return the names of the bins between PROPORTIONS: `1 : 2`, `1 : 1`, `1.4 : 1`."""
    middles = np.sqrt(PROPORTIONS[:-1] * PROPORTIONS[1:])
    return [f"{ratio:.2g} : 1" if ratio >= 1 else f"1 : {1 / ratio:.2g}" for ratio in middles.tolist()]


def _usage(usage: CodeUsage) -> str:
    size, most = len(usage.counts), int(usage.counts.max())
    total = int(usage.counts.sum())
    tiles = [
        figure_tile(f"{usage.share:.1%}", f"of the {size:,} codes occur"),
        figure_tile(f"{usage.perplexity:,.0f}", "perplexity: as varied as so many equally frequent codes"),
        figure_tile(f"{most / max(1, total):.1%}", "of all is the most frequent one"),
    ]
    counted = f"Counted over {total:,} codes in {usage.pictures:,} pictures of {usage.samples:,} samples"
    rest = (
        "all there are."
        if usage.is_whole
        else "chosen from all over the dataset; with more of them, more codes occur."
    )
    return f'<p>{counted}, {rest}</p><div class="figures">{"".join(tiles)}</div>'


def _rejects_section(rejects: list[RejectGroup]) -> str:
    shown, rest = rejects[:SHOWN_KINDS], rejects[SHOWN_KINDS:]
    rows: list[list[object]] = [[group.kind, group.items, group.example] for group in shown]
    if rest:
        rows.append([f"{len(rest)} more reasons", sum(group.items for group in rest), ""])
    table = html_table(["reason", "items", "the first of them"], rows)
    return f'<section class="rejects"><h2>Rejected items</h2>{table}</section>'


def _bins(counts: npt.NDArray[np.int64]) -> tuple[list[float], list[int]]:
    """Sum (n,) counts by whole numbers into at most MOST_BINS bins of a round width.

    Returns:
        The bins' borders, one more than there are bins, and their counts.
    """
    used = np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
    width = next(
        factor * 10**power
        for power in range(12)
        for factor in (1, 2, 5)
        if (last + 1 - first) <= (MOST_BINS - 1) * factor * 10**power
    )
    start = first // width * width
    bins = max(FEWEST_BINS, (last - start) // width + 1)
    edges = list(range(start, start + (bins + 1) * width, width))
    sums = np.add.reduceat(np.pad(counts, (0, max(0, edges[-1] - len(counts)))), edges[:-1])
    return [float(edge) for edge in edges], sums.tolist()
