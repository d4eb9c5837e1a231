"""What was rejected, grouped by reason, and trying it again.

A retry is a round of its own: `retry-01.json` names the items, which get chunks of their own, and the merge takes the
last round's word for each item. Until then the dataset stays what it was, manifest and all. Killed at any point the
same command goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from unitoken.common.cli import printable
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import MANIFEST, REJECTS, read_manifest
from unitoken.storage.open import open_store
from unitoken.tokenize.job import Round, dump, load_work, round_name
from unitoken.tokenize.output import Output

KINDS = 30  # that are shown; a user's adapter may invent any number
WIDTH = 100  # of an example


def grouped(out: str) -> list[tuple[str, int, str]]:
    """Every kind of reject, the most frequent first: its name, how many there are, and the first of them."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for reject in _rejects(out):
        kind, _, details = reject["reason"].partition(": ")
        counts[kind] += 1
        examples.setdefault(
            kind, printable(f"{reject['file']} item {reject['position']} ({reject['id']}) {details}")
        )
    return [(kind, count, examples[kind]) for kind, count in counts.most_common()]


def show_rejects(out: str) -> None:
    """Print a table of them."""
    manifest = read_manifest(open_store(out))
    groups = grouped(out)
    print(f"{out}: {manifest.rejected:,} of {manifest.items:,} items were rejected")
    width = max((len(kind) for kind, *_ in groups[:KINDS]), default=0)
    for kind, count, example in groups[:KINDS]:
        print(
            f"{count:>8,}  {kind:<{width}}  {example if len(example) <= WIDTH else f'{example[: WIDTH - 3]}...'}"
        )
    if rest := groups[KINDS:]:
        print(f"{sum(count for _, count, _ in rest):>8,}  of {len(rest)} more kinds")


def begin_retry(out: str, kinds: Collection[str] | None = None) -> int:
    """Make a round of the rejected items, or of those of some kinds. Returns how many there are to try.

    A round that was begun and did not end is gone on with, whatever `kinds` says.

    Raises:
        ConfigError: no finished dataset, or a kind that it does not have.
    """
    output = Output(out)
    work = load_work(output.store)
    finished = output.exists(MANIFEST)
    if work.rounds and (not finished or read_manifest(output.store).chunks < len(work.chunks())):
        print(f"{out}: going on with the retry that was begun ({round_name(len(work.rounds))})")
    else:
        read_manifest(output.store)
        items = _chosen(out, kinds)
        if not items:
            print(f"{out}: nothing was rejected")
            return 0
        output.store.write(round_name(len(work.rounds) + 1), dump(Round(items=items)))
        work = load_work(output.store)
    return len(work.rounds[-1].items)


def _chosen(out: str, kinds: Collection[str] | None) -> list[tuple[int, int]]:
    if kinds:
        found = [kind for kind, *_ in grouped(out)]
        if unknown := [kind for kind in kinds if kind not in found]:
            raise ConfigError(
                f"{out}: no rejects of the kind {unknown[0]!r}; there are: {', '.join(found[:KINDS]) or 'none'}"
            )
    # By place, so that pieces are read one after the other.
    return sorted(
        (reject["chunk"], reject["position"])
        for reject in _rejects(out)
        if not kinds or reject["reason"].partition(": ")[0] in kinds
    )


def _rejects(out: str) -> Iterator[dict[str, Any]]:
    with open_store(out).open(REJECTS) as file:
        yield from map(json.loads, file)
