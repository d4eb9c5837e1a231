"""What is known of an epoch's plan besides the order itself: the mixture as it really is."""

from __future__ import annotations

from unitoken.streaming_data.config import Config

MOST_OVER_LONG = 0.01  # share of a stream's samples that nobody need be told of


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


class Report(Config):
    """What is known of an epoch's plan besides the order itself."""

    recipe: str  # its hash
    order: str  # sha256 of the order itself: another version of this code could draw another
    epoch: int
    packs: int
    dropped_packs: int  # beyond the constant number of packs
    dropped_samples: int
    split_packs: int  # cut in two to reach it
    fill: float  # share of the packs' positions that hold a token
    unit: str  # of what was asked for
    streams: tuple[StreamShare, ...]

    def table(self) -> str:
        """The mixture as it really is, for people."""
        totals = [sum(getattr(s, k) for s in self.streams) for k in ("samples", "tokens", "target_tokens")]
        rows = [["stream", "asked", "samples", "", "tokens", "", "trained on", "", "over-long", "other kinds", "held out"]]
        for s in self.streams:
            cells = [s.name, f"{s.asked:.2%}"]
            for value, total in zip((s.samples, s.tokens, s.target_tokens), totals, strict=True):
                cells += [f"{value:,}", f"{value / max(total, 1):.2%}"]
            rows.append(
                [*cells, f"{s.cut:,} cut" if s.cut else f"{s.over_long:,}", f"{s.filtered - s.held_out:,}", f"{s.held_out:,}"]
            )
        rows[0][1] = f"of {self.unit}".replace("_", " ")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells_of = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        lines = ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, cells_of, strict=True)]
        lines.append(
            f"epoch {self.epoch}: {self.packs:,} packs, {self.fill:.2%} full; {self.dropped_samples:,} samples in "
            f"{self.dropped_packs:,} packs dropped to reach whole global batches; plan {self.recipe}"
        )
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """What may be another mixture than was meant, a line each."""
        lines = []
        for s in self.streams:
            count, wanted = s.over_long + s.cut, s.stored - s.filtered
            if count > MOST_OVER_LONG * wanted > 0:
                what = f"{count:,} of {wanted:,} samples ({count / wanted:.1%}) are longer than a pack"
                fate = "cut" if s.cut else "left out"
                lines.append(f"stream '{s.name}': {what} and are {fate}; see data.packed_length and data.over_long")
        return lines
