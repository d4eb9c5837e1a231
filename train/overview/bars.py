"""Packs as bars: each row is a pack, each piece of it a document, its colour the stream or the kind.

Without colours a document is a run of its letter, as `|aaaaaa|bbb|AAAA`: documents of one kind that follow
each other are told apart by small and large letters.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from unitoken.dataset.kinds import KINDS
from unitoken.train.overview.first_batch import Segment

MOST_ROWS = 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Pairs, so that two documents of one colour that follow each other are told apart.
COLOURS = (
    ("#3b82f6", "#93c5fd"),
    ("#f59e0b", "#fcd34d"),
    ("#10b981", "#6ee7b7"),
    ("#ec4899", "#f9a8d4"),
    ("#8b5cf6", "#c4b5fd"),
    ("#ef4444", "#fca5a5"),
    ("#14b8a6", "#99f6e4"),
    ("#84cc16", "#d9f99d"),
)


def draw_packs(
    packs: Sequence[Sequence[Segment]], streams: Sequence[str], length: int, width: int, coloured: bool
) -> list[Text]:
    """Return the lines of a legend and of the first packs.

    Args:
        packs: the documents of each.
        streams: the streams' names. Of one stream the colours are its documents' kinds.
        length: positions of a pack.
        width: of a line.
        coloured: whether the terminal shows colours.
    """
    by_stream = len(streams) > 1
    names = list(streams) if by_stream else list(KINDS)
    shown = packs[:MOST_ROWS]
    labels = [_label(number, pack, length) for number, pack in enumerate(shown)]
    cells = width - max(len(left) + len(right) for left, right in labels) - 4
    lines = [_legend(packs, names, by_stream, coloured)]
    for pack, (left, right) in zip(shown, labels, strict=True):
        groups = [segment.stream if by_stream else KINDS.index(segment.kind) for segment in pack]
        line = Text(f"{left} ").append_text(_bar(pack, groups, length, cells, coloured))
        lines.append(line.append(f" {right}"))
    if len(packs) > len(shown):
        lines.append(Text(f"and {len(packs) - len(shown):,} more packs", style="dim"))
    return lines


def _label(number: int, pack: Sequence[Segment], length: int) -> tuple[str, str]:
    used, documents = sum(segment.length for segment in pack), len(pack)
    count = f"{documents} document{'s' if documents != 1 else ''}"
    return f"{number:>3}", f"{used / length:>4.0%}, {count}"


def _bar(pack: Sequence[Segment], groups: Sequence[int], length: int, cells: int, coloured: bool) -> Text:
    """Return a pack; a document that is shorter than a cell may have none."""
    bar, position = Text(), 0
    before: tuple[int, int] | None = None  # group and shade of the document before
    for segment, group in zip(pack, groups, strict=True):
        first = round(position * cells / length)
        position += segment.length
        size = round(position * cells / length) - first
        shade = 1 - before[1] if before is not None and before[0] == group else 0
        if size == 0:
            continue
        before = group, shade
        if coloured:
            bar.append(" " * size, Style(bgcolor=COLOURS[group % len(COLOURS)][shade]))
        else:
            bar.append("|" + _letter(group, shade) * (size - 1))
    bar.append(("·" if coloured else ".") * (cells - len(bar)), "dim")
    return bar


def _letter(group: int, shade: int) -> str:
    letter = LETTERS[group % len(LETTERS)]
    return letter.upper() if shade else letter


def _legend(
    packs: Sequence[Sequence[Segment]], names: Sequence[str], by_stream: bool, coloured: bool
) -> Text:
    """Return what the colours or letters mean, with each one's share of the batch's positions."""
    sums = [0] * len(names)
    for segment in (segment for pack in packs for segment in pack):
        sums[segment.stream if by_stream else KINDS.index(segment.kind)] += segment.length
    total, legend = max(sum(sums), 1), Text()
    for group, name in enumerate(names):
        if not sums[group] and not by_stream:
            continue
        if coloured:
            legend.append("  ", Style(bgcolor=COLOURS[group % len(COLOURS)][0]))
            legend.append("  ", Style(bgcolor=COLOURS[group % len(COLOURS)][1]))
        else:
            legend.append(f"{_letter(group, 0)}/{_letter(group, 1)}")
        legend.append(f" {name} {sums[group] / total:.1%}   ")
    return legend
