"""The first global batch of a stage: where its documents lie in their packs, and the records of the first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unitoken.dataset.kinds import KINDS, Kind
from unitoken.dataset.record import Record
from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.reading.null_prompts import drop_captions
from unitoken.streaming_data.reading.shards import Shards
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource


class Segment(NamedTuple):
    """A document in a pack."""

    stream: int
    row: int  # in the stream's sidecar
    kind: Kind
    length: int  # positions, image features included


def first_batch(plan: Plan, streams: Sequence[StreamSamples], packs: int) -> list[list[Segment]]:
    """Return the documents of the first packs of an epoch, in their order."""
    firsts = np.cumsum([0] + [len(stream.lengths) for stream in streams])
    ids, ends = plan.samples_of(np.arange(min(packs, plan.packs)))
    numbers = np.searchsorted(firsts, ids, side="right") - 1
    segments = [
        _segment(streams[stream], stream, row)
        for stream, row in zip(numbers.tolist(), (ids - firsts[numbers]).tolist(), strict=True)
    ]
    return [segments[begin:end] for begin, end in itertools.pairwise([0, *ends])]


def _segment(samples: StreamSamples, stream: int, row: int) -> Segment:
    return Segment(stream, row, KINDS[int(samples.kinds[row])], int(samples.lengths[row]))


def read_pack(pack: Sequence[Segment], sources: Sequence[StreamSource], data: DataConfig) -> list[Record]:
    """Read the records of a pack, as training sees them: some with null prompts, where the settings say so.

    Raises:
        ConfigError: a shard of a local dataset is missing.
        ShardError: a shard can not be read.
    """
    stamps = data.cache_folder / "shards"
    needed = {segment.stream: sources[segment.stream] for segment in pack}
    shards = {
        number: Shards(source.name, source.folder, source.shards, source.store, stamps, data.cache_limit)
        for number, source in needed.items()
    }
    records = [_read(shards[segment.stream], segment) for segment in pack]
    if data.null_prompt_fraction:
        (records,) = drop_captions([records], data.null_prompt_fraction, data.seed, 0)
    return records


def _read(shards: Shards, segment: Segment) -> Record:
    ends: Integers = np.cumsum(shards.samples)
    shard = int(np.searchsorted(ends, segment.row, side="right"))
    place = segment.row - int(ends[shard] - shards.samples[shard])
    return next(shards.open(shard).records(np.array([place]), segment.stream))
