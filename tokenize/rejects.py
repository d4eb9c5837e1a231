"""List the rejects of a dataset, grouped by kind: `unitoken rejects`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from unitoken.common.cli import printable, report
from unitoken.dataset.manifest import REJECTS, read_manifest
from unitoken.storage.open import open_store

SHOWN_KINDS = 30  # a user's adapter may invent any number
SHOWN_LETTERS = 100  # of an example
CURES = {"no such image": "; names are relative to the folder of the input file"}
"""What helps against all rejects of a kind."""


class RejectGroup(NamedTuple):
    """All rejects of one kind."""

    kind: str
    items: int  # how many there are
    example: str  # the first of them


def kind_of(reason: str) -> str:
    """Return the kind of a reject: the part of its reason that holds nothing of the item."""
    return reason.partition(": ")[0]


def read_rejects(out: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a dataset's `rejects.jsonl`."""
    with open_store(out).open(REJECTS) as file:
        yield from map(json.loads, file)


def group_rejects(out: str) -> list[RejectGroup]:
    """Group the rejects of a dataset by kind, the most frequent kind first."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for reject in read_rejects(out):
        kind, _, details = reject["reason"].partition(": ")
        counts[kind] += 1
        if kind not in examples:
            place = f"{reject['file']} item {reject['position']} ({reject['id']})"
            examples[kind] = printable(f"{place} {details}")
    return [RejectGroup(kind, count, examples[kind]) for kind, count in counts.most_common()]


def show_rejects(out: str) -> None:
    """Print a table of the rejects of a dataset. Raises ConfigError where it is not finished."""
    manifest = read_manifest(open_store(out))
    groups = group_rejects(out)
    shown, rest = groups[:SHOWN_KINDS], groups[SHOWN_KINDS:]
    report(f"{out}: {manifest.rejected:,} of {manifest.items:,} items were rejected")
    width = max((len(group.kind) for group in shown), default=0)
    for group in shown:
        report(f"{group.items:>8,}  {group.kind:<{width}}  {_shortened(group.example)}")
    if rest:
        report(f"{sum(group.items for group in rest):>8,}  of {len(rest)} more kinds")


def _shortened(example: str) -> str:
    return example if len(example) <= SHOWN_LETTERS else f"{example[: SHOWN_LETTERS - 3]}..."
