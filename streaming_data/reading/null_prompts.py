"""Prompts without their text: what a drawing is guided away from, and what training sees now and then so that it can be.

A null prompt is the beginning of text, the prompt's pictures, and the end of the turn:

    <s> Draw a cat. end-of-turn | image ...      ->      <s> end-of-turn | image ...

It is defined here alone; training (`null_prompt_fraction`) and generation both ask for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from unitoken.dataset.record import IGNORED, Record, spans_of


def without_text(record: Record, end: int) -> Record:
    """The record with its first `end` tokens, a prompt, replaced by their null prompt. Pictures stay, and their features."""
    keep = np.ones(len(record.tokens), bool)
    keep[1 : end - 1] = False
    for first, last, *_ in record.image_spans.tolist():
        keep[first:last] = True
    place = np.cumsum(keep) - keep  # of what is kept, in the new record
    spans = record.image_spans.copy()
    spans[:, 0] = place[record.image_spans[:, 0]]
    spans[:, 1] = place[record.image_spans[:, 1] - 1] + 1
    targets = spans_of((record.labels() != IGNORED)[keep])
    return dataclasses.replace(record, tokens=record.tokens[keep], target_spans=targets, image_spans=spans)


def is_drawn(record: Record) -> bool:
    """Whether the first thing that is trained on is an image: with text before it the null prompt would ask for text, too."""
    return bool(len(record.image_spans)) and int(record.target_spans[0, 0]) in record.image_spans[:, 0]


def drop_captions(
    packs: Iterable[list[Record]], fraction: float, seed: int, epoch: int
) -> Iterator[list[Record]]:
    """Packs in which `fraction` of the drawn records have a null prompt. A pack may end earlier for it, never later.

    Which ones is a function of the seed, the epoch and the record's id: the same on any number of ranks and after a resume.
    """
    for pack in packs:
        yield [
            without_text(record, int(record.target_spans[0, 0]))
            if is_drawn(record) and _chance(seed, epoch, record.id) < fraction
            else record
            for record in pack
        ]


def _chance(seed: int, epoch: int, name: str) -> float:
    digest = hashlib.blake2b(f"{seed} {epoch} {name}".encode(), digest_size=8, person=b"null prompt").digest()
    return int.from_bytes(digest, "little") / 2.0**64
