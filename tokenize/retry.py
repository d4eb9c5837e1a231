"""Try rejected items again: `unitoken rejects --retry`.

A retry is a round of its own: `retry-01.json` names the items, they get chunks of their own, and the merge
takes the result of the last round for each item. Until the merge the dataset stays as it was, with its
manifest. A retry that is killed at any point goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Collection

from unitoken.common.cli import report
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import MANIFEST, read_manifest
from unitoken.tokenize.job import Round, dump_json, load_work, round_name
from unitoken.tokenize.output import Output
from unitoken.tokenize.rejects import SHOWN_KINDS, group_rejects, kind_of, read_rejects


def begin_retry(out: str, kinds: Collection[str] | None = None) -> int:
    """Make a round of a dataset's rejected items, or continue a round that was begun and has not ended.

    Args:
        out: path or URL of the dataset.
        kinds: the kinds of rejects to try again; None for all. A round that is continued keeps its own.

    Returns:
        How many items there are to try.

    Raises:
        ConfigError: the dataset is not finished, or has no rejects of a kind in `kinds`.
    """
    output = Output(out)
    work = load_work(output.store)
    finished = output.exists(MANIFEST)
    if work.rounds and (not finished or read_manifest(output.store).chunks < len(work.chunks())):
        report(f"{out}: going on with the retry that was begun ({round_name(len(work.rounds))})")
        return len(work.rounds[-1].items)
    read_manifest(output.store)  # raises ConfigError for an unfinished dataset
    items = _rejected_items(out, kinds)
    if not items:
        report(f"{out}: nothing was rejected")
        return 0
    output.store.write(round_name(len(work.rounds) + 1), dump_json(Round(items=items)))
    return len(items)


def _rejected_items(out: str, kinds: Collection[str] | None) -> list[tuple[int, int]]:
    """Return (piece, position) of the rejects in that order, so that pieces are read one after the other."""
    if kinds:
        known = [group.kind for group in group_rejects(out)]
        unknown = [kind for kind in kinds if kind not in known]
        if unknown:
            raise ConfigError(
                f"{out}: no rejects of the kind {unknown[0]!r}; "
                f"there are: {', '.join(known[:SHOWN_KINDS]) or 'none'}"
            )
    return sorted(
        (reject["chunk"], reject["position"])
        for reject in read_rejects(out)
        if not kinds or kind_of(reject["reason"]) in kinds
    )
