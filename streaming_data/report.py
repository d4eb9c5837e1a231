"""What is known of an epoch's plan besides the order itself: the mixture as it really is."""

from __future__ import annotations

from unitoken.streaming_data.config import Config


class StreamShare(Config):
    """What a stream really contributes to an epoch."""

    name: str
    over_long: int  # samples of the dataset that are longer than a pack and were left out
    samples: int
    tokens: int
    target_tokens: int


class Report(Config):
    """What is known of an epoch's plan besides the order itself."""

    recipe: str  # its hash
    order: str  # sha256 of the order itself: other versions of numpy or streaming could draw another
    epoch: int
    packs: int
    dropped_packs: int  # beyond the constant number of packs
    dropped_samples: int
    split_packs: int  # cut in two to reach it
    fill: float  # share of the packs' positions that hold a token
    streams: tuple[StreamShare, ...]

    def table(self) -> str:
        """The mixture as it really is, for people."""
        totals = [sum(getattr(s, k) for s in self.streams) for k in ("samples", "tokens", "target_tokens")]
        rows = [["stream", "samples", "", "tokens", "", "trained on", "", "over-long"]]
        for s in self.streams:
            cells = [s.name]
            for value, total in zip((s.samples, s.tokens, s.target_tokens), totals, strict=True):
                cells += [f"{value:,}", f"{value / max(total, 1):.1%}"]
            rows.append([*cells, f"{s.over_long:,}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells_of = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        lines = ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, cells_of, strict=True)]
        lines.append(
            f"epoch {self.epoch}: {self.packs:,} packs, {self.fill:.1%} full; {self.dropped_samples:,} samples in "
            f"{self.dropped_packs:,} packs dropped to reach whole global batches; plan {self.recipe}"
        )
        return "\n".join(lines)
