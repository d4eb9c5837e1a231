"""Null prompts: prompts without their text, which classifier-free guidance compares an image with.

A null prompt is the beginning of text, the prompt's images, and the end of the turn:

    <s> Draw a cat. end-of-turn | image ...      ->      <s> end-of-turn | image ...

Training sees some of them (`null_prompt_fraction`), so that generation can use them. Both call this module.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from unitoken.dataset.record import IGNORED, Record, spans_of


def without_text(record: Record, end: int) -> Record:
    """Return the record with its first `end` tokens, a prompt, replaced by their null prompt; images stay."""
    keep = np.ones(len(record.tokens), bool)
    keep[1 : end - 1] = False
    for first, last, *_ in record.image_spans.tolist():
        keep[first:last] = True
    place = np.cumsum(keep) - keep  # of each token in the new record
    spans = record.image_spans.copy()
    spans[:, 0] = place[record.image_spans[:, 0]]
    spans[:, 1] = place[record.image_spans[:, 1] - 1] + 1
    targets = spans_of((record.labels() != IGNORED)[keep])
    return dataclasses.replace(record, tokens=record.tokens[keep], target_spans=targets, image_spans=spans)


def is_drawn(record: Record) -> bool:
    """Return whether training begins with an image; with text first, a null prompt would ask for text."""
    return bool(len(record.image_spans)) and int(record.target_spans[0, 0]) in record.image_spans[:, 0]


def drop_captions(
    packs: Iterable[list[Record]], fraction: float, seed: int, epoch: int
) -> Iterator[list[Record]]:
    """Give `fraction` of the records that draw an image a null prompt; packs become shorter, never longer.

    Which records is a function of the seed, the epoch and the record's id: the same on any number of ranks
    and after a resume.
    """
    for pack in packs:
        yield [
            without_text(record, int(record.target_spans[0, 0]))
            if is_drawn(record) and _random_share(seed, epoch, record.id) < fraction
            else record
            for record in pack
        ]


def _random_share(seed: int, epoch: int, name: str) -> float:
    """Return a random number from 0 to 1 that belongs to a record and an epoch."""
    digest = hashlib.blake2b(f"{seed} {epoch} {name}".encode(), digest_size=8, person=b"null prompt").digest()
    return int.from_bytes(digest, "little") / 2.0**64
