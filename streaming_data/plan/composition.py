"""What the packs of a plan are made of, along an epoch: for pages, so in no more parts than one can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unitoken.dataset.kinds import KINDS
from unitoken.streaming_data.arrays import Floats, Integers
from unitoken.streaming_data.plan.build import PACKS_AT_ONCE, Plan, samples_by_stream
from unitoken.streaming_data.plan.lengths import StreamSamples

FILL_BINS = 50  # of the packs' fill, from empty to full


@dataclass(frozen=True, eq=False)
class Composition:
    """An epoch's global batches in parts of successive ones, as even as whole batches allow.

    Attributes:
        borders: (parts + 1,) the first global batch of each part, and their number.
        tokens: (streams, kinds, parts) tokens.
        fill: (parts,) share of the packs' positions that hold a token.
        least_fill: (parts,) that of the emptiest pack.
        pack_fills: (FILL_BINS,) packs by their fill.
    """

    borders: Integers
    tokens: Floats
    fill: Floats
    least_fill: Floats
    pack_fills: Integers


def compose(
    plan: Plan, streams: Sequence[StreamSamples], packed_length: int, global_batch: int, most_parts: int
) -> Composition:
    """Measure an epoch.

    Args:
        plan: of the epoch.
        streams: the samples of each stream, as for `build`.
        packed_length: positions of a pack.
        global_batch: packs of a global batch.
        most_parts: the most parts to make.
    """
    batches = plan.packs // global_batch
    parts = min(most_parts, batches)
    borders = np.arange(parts + 1) * batches // parts
    part_of_batch = np.repeat(np.arange(parts), np.diff(borders))
    tokens = np.zeros((len(streams), len(KINDS), parts))
    fills = np.empty(plan.packs, np.float32)
    for begin in range(0, plan.packs, PACKS_AT_ONCE):
        end = min(begin + PACKS_AT_ONCE, plan.packs)
        ids = plan.ids[int(plan.offsets[begin]) : int(plan.offsets[end])]
        sizes = np.diff(plan.offsets[begin : end + 1].astype(np.int64))
        packs = np.repeat(np.arange(end - begin), sizes)
        in_packs = np.zeros(end - begin)
        for number, places, rows in samples_by_stream(streams, ids):
            lengths = streams[number].lengths[rows]
            in_packs += np.bincount(packs[places], lengths, end - begin)
            cells = streams[number].kinds[rows] * np.int64(parts)
            cells += part_of_batch[(begin + packs[places]) // global_batch]
            tokens[number] += np.bincount(cells, lengths, len(KINDS) * parts).reshape(len(KINDS), parts)
        fills[begin:end] = in_packs / packed_length
    starts = borders[:-1] * global_batch
    return Composition(
        borders,
        tokens,
        np.add.reduceat(fills, starts, dtype=np.float64) / (np.diff(borders) * global_batch),
        np.minimum.reduceat(fills, starts),
        np.histogram(fills, FILL_BINS, (0.0, 1.0))[0],
    )
