"""What is known of an epoch's plan besides the order itself: the mixture as it really is, over the epoch and in each batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from unitoken.common.config import Config

MOST_OVER_LONG = 0.01  # share of a stream's samples that nobody need be told of
NAME_WIDTH = 20  # of a stream, in a table of 80 columns


class InBatches(Config):
    """A stream's share of the tokens of a global batch."""

    mean: float
    sd: float
    least: float
    most: float
    independent_sd: float  # if documents were drawn one by one (`in_batches_of`)


def in_batches_of(tokens: npt.NDArray[np.float64], stream: int, squares: Sequence[int]) -> InBatches:
    """Args:
        tokens: (streams, batches).
        squares: (streams,) sums of the squares of the documents' lengths.

    With documents of lengths l drawn independently, n a batch, of which the stream's make up the share p of all tokens, the
    share of a batch is a ratio of means with variance E[l^2 (z - p)^2] / (n E[l]^2), z being 1 for the stream's own (Cochran,
    Sampling Techniques, 6.3). Sums over the epoch take the place of the expectations.
    """
    shares = tokens[stream] / tokens.sum(axis=0)
    p = float(tokens[stream].sum() / tokens.sum())
    own, others = squares[stream], sum(squares) - squares[stream]
    independent = math.sqrt(tokens.shape[1] * ((1 - p) ** 2 * own + p**2 * others)) / float(tokens.sum())
    return InBatches(
        mean=float(shares.mean()),
        sd=float(shares.std()),
        least=float(shares.min()),
        most=float(shares.max()),
        independent_sd=independent,
    )


class StreamShare(Config):
    """What a stream really contributes to an epoch."""

    name: str
    asked: float = 0.0  # share of the epoch, in the mixture's unit
    over_long: int  # samples of the dataset that are longer than a pack and were left out
    cut: int  # ... that are cut to fit, each time they are taken
    filtered: int  # ... that are of other kinds or held out
    held_out: int = 0  # ... of these, those held out
    stored: int = 0  # samples of the dataset; these two are not in plans that were saved before
    samples: int
    tokens: int
    target_tokens: int
    in_batches: InBatches | None = None  # None in plans that were saved before
    packs: int | None = None  # of batches that are of this stream alone, with batching_method: per_stream


class PlanReport(Config):
    """What is known of an epoch's plan besides the order itself."""

    recipe: str  # its hash
    order: str  # sha256 of the order itself: another version of this code could draw another
    weights: str | None = (
        None  # sha256 of the packs' squares and images; None in plans that were saved before
    )
    epoch: int
    packs: int
    dropped_packs: int  # beyond the constant number of packs
    dropped_samples: int
    split_packs: int  # cut in two to reach it
    fill: float  # share of the packs' positions that hold a token
    unit: str  # of what was asked for
    streams: tuple[StreamShare, ...]

    def table(self) -> str:
        """The mixture as it really is, for people, in 80 columns."""
        totals = [sum(getattr(s, k) for s in self.streams) for k in ("samples", "tokens", "target_tokens")]
        rows = [
            ["stream", f"of {self.unit}".replace("_", " "), "samples", "", "tokens", "", "trained on", ""]
        ]
        for s in self.streams:
            cells = [_cut(s.name), f"{s.asked:.1%}"]
            for value, total in zip((s.samples, s.tokens, s.target_tokens), totals, strict=True):
                cells += [_short(value), f"{value / max(total, 1):.1%}"]
            rows.append(cells)
        lines = _aligned(rows)
        for s in self.streams:
            left = {
                "over-long": s.over_long,
                "over-long and cut": s.cut,
                "of other kinds": s.filtered - s.held_out,
                "held out": s.held_out,
            }
            if any(left.values()):
                told = ", ".join(f"{count:,} {what}" for what, count in left.items() if count)
                lines.append(f"{_cut(s.name)}: of {s.stored:,} samples {told}")
        lines.append(
            f"epoch {self.epoch}: {self.packs:,} packs, {self.fill:.2%} full, plan {self.recipe}; dropped to reach\n"
            f"whole global batches: {self.dropped_samples:,} samples in {self.dropped_packs:,} packs"
        )
        known = [(s.name, s.in_batches) for s in self.streams if s.in_batches is not None]
        if len(known) > 1:
            rows = [["of a global batch's tokens", "mean", "sd", "least", "most", "sd of independent draws"]]
            for name, b in known:
                rows.append(
                    [_cut(name), *(f"{x:.1%}" for x in (b.mean, b.sd, b.least, b.most, b.independent_sd))]
                )
            lines += ["", *_aligned(rows)]
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """What may be another mixture than was meant, a line each."""
        lines = []
        for s in self.streams:
            count, wanted = s.over_long + s.cut, s.stored - s.filtered
            if count > MOST_OVER_LONG * wanted > 0:
                what = f"{count:,} of {wanted:,} samples ({count / wanted:.1%}) are longer than a pack"
                fate = "cut" if s.cut else "left out"
                lines.append(
                    f"stream '{s.name}': {what} and are {fate}; see data.packed_length and data.over_long"
                )
        return lines


def _cut(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."


def _short(count: int) -> str:
    """At most six characters: 12,345 or 12.3M."""
    if count < 100_000:
        return f"{count:,}"
    scale = next(
        scale for scale in ((1e6, "M"), (1e9, "G"), (1e12, "T"), (math.inf, "")) if count < 999.5 * scale[0]
    )
    return f"{count / scale[0]:.3g}{scale[1]}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *right[1:]]) for row, right in zip(rows, cells, strict=True)]
