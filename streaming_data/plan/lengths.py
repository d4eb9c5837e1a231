"""What the plan needs to know of a dataset's samples, from its sidecar: how long each is in a pack, and whether it is wanted.

A sample is no candidate where it is of another kind than asked for, on the other side of the held-out fraction, or
longer than a pack and not to be cut. Nothing but the sidecar is read: no shard is there yet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.mds_index import read_index
from unitoken.dataset.sidecar import sidecar_errors
from unitoken.streaming_data.plan.feature_cost import limit_of
from unitoken.streaming_data.settings import Kind, StreamConfig
from unitoken.streaming_data.sources import StreamSource

if TYPE_CHECKING:
    import pyarrow

    from unitoken.dataset.vision_views import Views
    from unitoken.streaming_data.plan.recipe import Recipe

ROWS = 1 << 20  # of the sidecar, read at once
KINDS: tuple[Kind, ...] = ("text", "understanding", "generation")  # a sample's kind is its place here
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StreamSamples:
    """A stream's samples, one row each, in index order."""

    name: str
    shard_sizes: Ids  # samples a shard
    lengths: npt.NDArray[np.uint32]  # positions in a pack, continuous features included; 0: no candidate
    target_tokens: npt.NDArray[np.uint32]  # at most so many, where a sample is cut; 0: no candidate
    images: npt.NDArray[np.uint16]  # that bring continuous features
    kinds: npt.NDArray[np.uint8]  # places in KINDS
    weight: dict[str, float]
    over_long: int = 0  # left out
    cut: int = 0  # to the stream's length
    filtered: int = 0  # of other kinds, or on the other side of the held-out fraction
    held_out: int = 0  # of these: on the other side

    def total(self, unit: str) -> int:
        """All candidates, in `samples`, `tokens` or `target_tokens`."""
        if unit == "samples":
            return int(np.count_nonzero(self.lengths))
        return int((self.lengths if unit == "tokens" else self.target_tokens).sum(dtype=np.int64))


def read_lengths(source: StreamSource, recipe: Recipe, views: Views | None) -> StreamSamples:
    """Read a stream's sidecar.

    Raises:
        ConfigError: the sidecar does not fit the index or the manifest, or no sample is a candidate.
    """
    with sidecar_errors(source.name, source.folder):
        return _read_lengths(source, recipe, views)


def _read_lengths(source: StreamSource, recipe: Recipe, views: Views | None) -> StreamSamples:
    import pyarrow.parquet

    source.check(SIDECAR)
    path, stream = source.folder / SIDECAR, source.config
    shard_sizes = np.array([entry["samples"] for entry in read_index(source.folder)], np.int64)
    with pyarrow.parquet.ParquetFile(path) as sidecar:
        count = sidecar.metadata.num_rows
        if shard_sizes.sum() != count:
            raise ConfigError(f"{path}: {count} samples, the shards of the index hold {shard_sizes.sum()}")
        lengths, target_tokens = np.empty(count, np.uint32), np.empty(count, np.uint32)
        kinds = np.empty(count, np.uint8)
        counted = recipe.continuous != "none" and views is not None
        images = np.empty(count, np.uint16) if counted else np.broadcast_to(np.uint16(0), count)
        wanted = ["tokens", "target_tokens", "images", "question_images"]
        if stream.held_out:
            wanted.append("id")
        if views and views.anyres and recipe.continuous != "none":
            wanted += ["image_sizes", "generated"]
            if "generated" not in sidecar.schema_arrow.names:
                raise ConfigError(
                    f"{path} has no column `generated`, which AnyRes needs: tokenize the dataset again"
                )
        filtered = held_out = begin = 0
        shortest: tuple[int, int, int] | None = (
            None  # of the over-long: positions, tokens, images that bring features
        )
        limit = limit_of(stream, recipe.packed_length)
        for batch in sidecar.iter_batches(ROWS, columns=wanted):
            rows = slice(begin, begin := begin + len(batch))
            ours = _on_our_side(batch, stream, recipe.split)
            kinds[rows] = of_batch = _kinds(batch)
            candidates = ours & _wanted(of_batch, stream)
            held_out += len(batch) - int(ours.sum())
            filtered += len(batch) - int(candidates.sum())
            of_images, features = _features(batch, recipe.continuous, views)
            if counted:
                images[rows] = of_images
            lengths[rows] = (_numbers(batch, "tokens") + features) * candidates
            if len(long_here := np.flatnonzero(lengths[rows] > limit)):
                at = int(long_here[np.argmin(lengths[rows][long_here])])
                bring = int(of_images[at]) if counted else 0
                found = int(lengths[rows][at]), int(_numbers(batch, "tokens")[at]), bring
                shortest = min(shortest or found, found)
            target_tokens[rows] = _numbers(batch, "target_tokens") * candidates
    long = lengths > limit
    over_long = int(long.sum())
    if recipe.over_long == "reject":
        lengths[long] = target_tokens[long] = 0
    else:
        lengths[long] = limit
        np.minimum(target_tokens, limit, out=target_tokens)
    samples = StreamSamples(
        source.name,
        shard_sizes,
        lengths,
        target_tokens,
        images,
        kinds,
        stream.weight,
        over_long if recipe.over_long == "reject" else 0,
        over_long if recipe.over_long != "reject" else 0,
        filtered,
        held_out,
    )
    if not lengths.any():
        raise ConfigError(f"stream '{source.name}': {_why_nothing(samples, limit, shortest)}")
    return samples


def _why_nothing(samples: StreamSamples, limit: int, shortest: tuple[int, int, int] | None) -> str:
    count = len(samples.lengths)
    if not count:
        return "holds no samples"
    left_out = f"{samples.filtered} of its {count} samples are of other kinds or held out"
    if not samples.over_long:
        return left_out
    rest = f"each of the other {samples.over_long}" if samples.filtered else f"each of its {count} samples"
    assert shortest is not None
    length, tokens, images = shortest
    features = (
        f": {tokens} tokens + {length - tokens} features of {images} picture{'s' if images != 1 else ''}"
        if images
        else ""
    )
    too_long = f"{rest} is longer than {limit} positions (the shortest has {length}{features})"
    return f"{left_out}, {too_long}" if samples.filtered else too_long


def _numbers(batch: pyarrow.RecordBatch, column: str) -> Any:
    return batch.column(column).to_numpy()


def _kinds(batch: pyarrow.RecordBatch) -> npt.NDArray[np.uint8]:
    images, asked = _numbers(batch, "images"), _numbers(batch, "question_images")
    kinds: npt.NDArray[np.uint8] = np.where(images == 0, 0, np.where(asked == images, 1, 2)).astype(np.uint8)
    return kinds


def _wanted(kinds: npt.NDArray[np.uint8], stream: StreamConfig) -> npt.NDArray[np.bool_]:
    if stream.kinds is None:
        return np.ones(len(kinds), bool)
    return np.isin(kinds, [KINDS.index(kind) for kind in stream.kinds])


def _on_our_side(batch: pyarrow.RecordBatch, stream: StreamConfig, split: str) -> npt.NDArray[np.bool_]:
    if not stream.held_out:
        return np.ones(len(batch), bool)
    held_out = np.fromiter(
        (_is_held_out(name, stream.held_out) for name in batch.column("id").to_pylist()), bool, len(batch)
    )
    return held_out if split == "held_out" else ~held_out


def _is_held_out(name: str, fraction: float) -> bool:
    """By the id alone, so that a sample stays on its side whatever is added to the dataset, and in whichever stream it is."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _features(batch: pyarrow.RecordBatch, continuous: str, views: Views | None) -> tuple[Any, Any]:
    """Images with continuous features, and the positions these take: (n,) each."""
    if continuous == "none" or views is None:
        return 0, np.uint32(0)
    images = _numbers(batch, "question_images" if continuous == "questions" else "images")
    if not views.anyres:
        return images, images.astype(np.uint32) * np.uint32(1 + views.features)
    generated, sizes = batch.column("generated"), batch.column("image_sizes")
    flags = generated.flatten().to_numpy(zero_copy_only=False)
    places = 1 + views.counts(sizes.flatten().to_numpy().reshape(-1, 2).astype(np.int64))
    if continuous == "questions":
        places = np.where(flags, 0, places)
    ends = np.concatenate([[0], np.cumsum(places)])
    offsets = generated.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    return images, (ends[offsets[1:]] - ends[offsets[:-1]]).astype(np.uint32)
