"""The report of an epoch's plan: the mixture as it really is, over the epoch and in each batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unitoken.common.cli import short_count
from unitoken.common.config import Config
from unitoken.streaming_data.arrays import Floats
from unitoken.streaming_data.tables import format_table

MOST_OVER_LONG = 0.01  # the largest share of over-long samples in a stream that gives no warning
NAME_WIDTH = 20  # of a stream's name, in a table of 80 columns


class InBatches(Config):
    """A stream's share of the tokens of a global batch."""

    mean: float
    sd: float
    least: float
    most: float
    independent_sd: float  # if documents were drawn one by one (`in_batches_of`)


def in_batches_of(tokens: Floats, stream: int, squares: Sequence[int]) -> InBatches:
    """Return how a stream's share scatters from batch to batch.

    With documents of lengths l drawn independently, n a batch, of which the stream's make up the share p of
    all tokens, the share of a batch is a ratio of means with variance E[l^2 (z - p)^2] / (n E[l]^2), where z
    is 1 for the stream's documents and 0 for others (Cochran, Sampling Techniques, 6.3). Sums over the epoch
    take the place of the expectations.

    Args:
        tokens: (streams, batches).
        stream: its number.
        squares: (streams,) sums of the squares of the documents' lengths.
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
    """What a stream contributes to an epoch. Plans of earlier versions lack the fields with defaults."""

    name: str
    asked: float = 0.0  # share of the epoch that the settings ask for, in the mixture's unit
    over_long: int  # samples of the dataset left out because they are longer than a pack
    cut: int  # samples of the dataset that are cut to fit, each time they are taken
    filtered: int  # samples of the dataset left out for their kind or their side of the held-out split
    held_out: int = 0  # the latter alone
    stored: int = 0  # all samples of the dataset
    samples: int  # taken, repetitions included
    tokens: int
    target_tokens: int
    in_batches: InBatches | None = None
    packs: int | None = None  # with batching_method: per_stream, packs of this stream alone


class PlanReport(Config):
    """What is known of an epoch's plan besides the order itself."""

    recipe: str  # hash of the recipe
    order: str  # hash of the order: another version of this code could make another one
    weights: str | None = None  # hash of the packs' squares and images; None in plans of earlier versions
    epoch: int
    packs: int
    dropped_packs: int  # beyond the constant number of packs
    dropped_samples: int
    split_packs: int  # cut in two to reach the constant number
    fill: float  # share of the packs' positions that hold a token
    unit: str  # the mixture's
    streams: tuple[StreamShare, ...]

    def table(self) -> str:
        """Return the mixture as it really is, as text of 80 columns."""
        lines = [*self._epoch_table(), *self._left_out()]
        lines.append(
            f"epoch {self.epoch}: {self.packs:,} packs, {self.fill:.2%} full, plan {self.recipe}; "
            "dropped to reach\n"
            f"whole global batches: {self.dropped_samples:,} samples in {self.dropped_packs:,} packs"
        )
        in_batches = self._batch_table()
        return "\n".join([*lines, "", *in_batches] if in_batches else lines)

    def _epoch_table(self) -> list[str]:
        """Return the table of the streams' shares of the epoch."""
        columns = ("samples", "tokens", "target_tokens")
        totals = [sum(getattr(stream, column) for stream in self.streams) for column in columns]
        head = ["stream", f"of {self.unit}".replace("_", " "), "samples", "", "tokens", "", "trained on", ""]
        rows = [head]
        for stream in self.streams:
            cells = [_short_name(stream.name), f"{stream.asked:.1%}"]
            for column, total in zip(columns, totals, strict=True):
                value = getattr(stream, column)
                cells += [short_count(value), f"{value / max(total, 1):.1%}"]
            rows.append(cells)
        return format_table(rows, left=1)

    def _left_out(self) -> list[str]:
        """Return a line for each stream of which samples are left out or cut."""
        lines = []
        for stream in self.streams:
            counts = {
                "over-long": stream.over_long,
                "over-long and cut": stream.cut,
                "of other kinds": stream.filtered - stream.held_out,
                "held out": stream.held_out,
            }
            if any(counts.values()):
                parts = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
                lines.append(f"{_short_name(stream.name)}: of {stream.stored:,} samples {parts}")
        return lines

    def _batch_table(self) -> list[str]:
        """Return the table of the streams' shares of a batch; nothing if there is only one stream."""
        shares = [(s.name, s.in_batches) for s in self.streams if s.in_batches is not None]
        if len(shares) < 2:
            return []
        rows = [["of a global batch's tokens", "mean", "sd", "least", "most", "sd of independent draws"]]
        for name, share in shares:
            values = (share.mean, share.sd, share.least, share.most, share.independent_sd)
            rows.append([_short_name(name), *(f"{value:.1%}" for value in values)])
        return format_table(rows, left=1)

    def warnings(self) -> list[str]:
        """Return warnings about a mixture that differs from what the settings seem to intend."""
        lines = []
        for s in self.streams:
            count, candidates = s.over_long + s.cut, s.stored - s.filtered
            if count > MOST_OVER_LONG * candidates > 0:
                what = (
                    f"{count:,} of {candidates:,} samples ({count / candidates:.1%}) are longer than a pack"
                )
                fate = "cut" if s.cut else "left out"
                lines.append(
                    f"stream '{s.name}': {what} and are {fate}; see data.packed_length and data.over_long"
                )
        return lines


def _short_name(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."
