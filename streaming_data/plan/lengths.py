"""What a plan needs to know of a dataset's samples, read from its sidecar: no shard has to be there.

A sample is a candidate unless it is of an unwanted kind, on the other side of the held-out split, or longer
than a pack and not to be cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.dataset.kinds import are_of_kinds, kind_numbers
from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.sidecar import sidecar_errors
from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.plan.feature_cost import feature_cost, limit_of
from unitoken.streaming_data.settings import StreamConfig
from unitoken.streaming_data.sources import StreamSource

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

    from unitoken.dataset.vision_views import Views
    from unitoken.streaming_data.plan.recipe import Recipe

READ_ROWS = 1 << 20  # rows of the sidecar that are read at once


@dataclass(frozen=True, eq=False)
class StreamSamples:
    """A stream's samples, one row each, in the order of the index."""

    name: str
    shard_sizes: Integers  # (shards,) samples of each
    lengths: npt.NDArray[np.uint32]  # positions in a pack, continuous features included; 0: no candidate
    target_tokens: npt.NDArray[np.uint32]  # an upper bound for samples that are cut; 0: no candidate
    images: npt.NDArray[np.uint16]  # images with continuous features
    kinds: npt.NDArray[np.uint8]  # places in KINDS
    weight: dict[str, float]
    over_long: int = 0  # samples left out because they are over-long
    cut: int = 0  # samples cut to the stream's limit
    filtered: int = 0  # samples of unwanted kinds or on the other side of the held-out split
    held_out: int = 0  # the latter alone

    def total(self, unit: str) -> int:
        """Return the size of all candidates in `samples`, `tokens` or `target_tokens`."""
        if unit == "samples":
            return int(np.count_nonzero(self.lengths))
        return int((self.lengths if unit == "tokens" else self.target_tokens).sum(dtype=np.int64))


class _Rows(NamedTuple):
    """Some rows of a sidecar, (n,) each."""

    tokens: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.uint32]  # 0: no candidate
    target_tokens: npt.NDArray[np.uint32]  # 0: no candidate
    images: Any  # with continuous features; 0 if no image of the mixture has any
    kinds: npt.NDArray[np.uint8]
    in_split: npt.NDArray[np.bool_]
    candidates: npt.NDArray[np.bool_]  # before the check of the length


class _OverLong(NamedTuple):
    """A sample longer than the limit. They compare by positions first."""

    positions: int
    tokens: int
    images: int  # with continuous features


def read_lengths(source: StreamSource, recipe: Recipe, views: Views | None) -> StreamSamples:
    """Read a stream's sidecar.

    Raises:
        ConfigError: the sidecar does not fit the index or the manifest, or no sample is a candidate.
    """
    import pyarrow.parquet

    path, limit = source.folder / SIDECAR, limit_of(source.config, recipe.packed_length)
    with sidecar_errors(source.name, source.folder):
        source.check_file(SIDECAR)
        shard_sizes = np.array([entry["samples"] for entry in source.shards], np.int64)
        with pyarrow.parquet.ParquetFile(path) as sidecar:
            count = sidecar.metadata.num_rows
            if shard_sizes.sum() != count:
                raise ConfigError(
                    f"{path}: {count} samples, the shards of the index hold {shard_sizes.sum()}"
                )
            samples, shortest = _read_samples(source, shard_sizes, sidecar, recipe, views)
    if not samples.lengths.any():
        raise ConfigError(f"stream '{source.name}': {_why_no_candidate(samples, limit, shortest)}")
    return samples


def _read_samples(
    source: StreamSource,
    shard_sizes: Integers,
    sidecar: pyarrow.parquet.ParquetFile,
    recipe: Recipe,
    views: Views | None,
) -> tuple[StreamSamples, _OverLong | None]:
    """Return the samples, and the shortest one that is over-long."""
    count, stream = sidecar.metadata.num_rows, source.config
    limit = limit_of(stream, recipe.packed_length)
    with_features = recipe.continuous != "none" and views is not None
    lengths, target_tokens = np.empty(count, np.uint32), np.empty(count, np.uint32)
    kinds = np.empty(count, np.uint8)
    images = np.empty(count, np.uint16) if with_features else np.broadcast_to(np.uint16(0), count)
    filtered = held_out = begin = 0
    too_long: list[_OverLong] = []
    for batch in sidecar.iter_batches(READ_ROWS, columns=_columns(source, sidecar, recipe, views)):
        rows = _read_rows(batch, stream, recipe, views)
        place = slice(begin, begin + len(batch))
        begin += len(batch)
        lengths[place], target_tokens[place], kinds[place] = rows.lengths, rows.target_tokens, rows.kinds
        if with_features:
            images[place] = rows.images
        held_out += int(np.count_nonzero(~rows.in_split))
        filtered += int(np.count_nonzero(~rows.candidates))
        too_long += _shortest_over_long(rows, limit, with_features)
    over_long = lengths > limit
    left_out, cut = (int(over_long.sum()), 0) if recipe.over_long == "reject" else (0, int(over_long.sum()))
    if recipe.over_long == "reject":
        lengths[over_long] = target_tokens[over_long] = 0
    else:
        lengths[over_long] = limit
        np.minimum(target_tokens, limit, out=target_tokens)
    samples = StreamSamples(
        source.name, shard_sizes, lengths, target_tokens, images, kinds, stream.weight,
        over_long=left_out, cut=cut, filtered=filtered, held_out=held_out,
    )  # fmt: skip
    return samples, min(too_long, default=None)


def _columns(
    source: StreamSource, sidecar: pyarrow.parquet.ParquetFile, recipe: Recipe, views: Views | None
) -> list[str]:
    """Return the columns of the sidecar that are needed; raise ConfigError for a missing one."""
    columns = ["tokens", "target_tokens", "images", "question_images"]
    if source.config.held_out:
        columns.append("id")
    if views is not None and views.anyres and recipe.continuous != "none":
        columns += ["image_sizes", "generated"]
        if "generated" not in sidecar.schema_arrow.names:
            raise ConfigError(
                f"{source.folder / SIDECAR} has no column `generated`, which AnyRes needs: "
                "tokenize the dataset again"
            )
    return columns


def _read_rows(
    batch: pyarrow.RecordBatch, stream: StreamConfig, recipe: Recipe, views: Views | None
) -> _Rows:
    tokens = _numbers(batch, "tokens")
    kinds = kind_numbers(_numbers(batch, "images"), _numbers(batch, "question_images"))
    in_split = _in_split(batch, stream, recipe.split)
    candidates = in_split & are_of_kinds(kinds, stream.kinds)
    images, positions = _count_features(batch, recipe.continuous, views)
    return _Rows(
        tokens=tokens,
        lengths=(tokens + positions) * candidates,
        target_tokens=_numbers(batch, "target_tokens") * candidates,
        images=images,
        kinds=kinds,
        in_split=in_split,
        candidates=candidates,
    )


def _shortest_over_long(rows: _Rows, limit: int, with_features: bool) -> list[_OverLong]:
    """Return the shortest sample above the limit, or nothing."""
    places = np.flatnonzero(rows.lengths > limit)
    if not len(places):
        return []
    shortest = int(places[np.argmin(rows.lengths[places])])
    images = int(rows.images[shortest]) if with_features else 0
    return [_OverLong(int(rows.lengths[shortest]), int(rows.tokens[shortest]), images)]


def _why_no_candidate(samples: StreamSamples, limit: int, shortest: _OverLong | None) -> str:
    count = len(samples.lengths)
    if not count:
        return "holds no samples"
    filtered = f"{samples.filtered} of its {count} samples are of other kinds or held out"
    if not samples.over_long:
        return filtered
    rest = f"each of the other {samples.over_long}" if samples.filtered else f"each of its {count} samples"
    assert shortest is not None
    length, tokens, images = shortest
    features = (
        f": {tokens} tokens + {length - tokens} features of {images} picture{'s' if images != 1 else ''}"
        if images
        else ""
    )
    too_long = f"{rest} is longer than {limit} positions (the shortest has {length}{features})"
    return f"{filtered}, {too_long}" if samples.filtered else too_long


def _numbers(batch: pyarrow.RecordBatch, column: str) -> Any:
    return batch.column(column).to_numpy()


def _in_split(batch: pyarrow.RecordBatch, stream: StreamConfig, split: str) -> npt.NDArray[np.bool_]:
    """Return which samples are on this side of the held-out split, (n,)."""
    if not stream.held_out:
        return np.ones(len(batch), bool)
    held_out = np.fromiter(
        (is_held_out(name, stream.held_out) for name in batch.column("id").to_pylist()), bool, len(batch)
    )
    return held_out if split == "held_out" else ~held_out


def is_held_out(name: str, fraction: float) -> bool:
    """Return whether the sample with the id `name` is held out.

    Only the id decides, so a sample stays on its side when the dataset grows, and in every stream that
    contains it.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _count_features(batch: pyarrow.RecordBatch, continuous: str, views: Views | None) -> tuple[Any, Any]:
    """Return the number of images with continuous features, and the positions these add, (n,) each."""
    if continuous == "none" or views is None:
        return 0, np.uint32(0)
    images = _numbers(batch, "question_images" if continuous == "questions" else "images")
    if not views.anyres:
        return images, images.astype(np.uint32) * np.uint32(feature_cost(views.features))
    generated, sizes = batch.column("generated"), batch.column("image_sizes")
    flags = generated.flatten().to_numpy(zero_copy_only=False)
    costs = feature_cost(views.counts(sizes.flatten().to_numpy().reshape(-1, 2).astype(np.int64)))
    if continuous == "questions":
        costs = np.where(flags, 0, costs)
    sums = np.concatenate([[0], np.cumsum(costs)])
    offsets = generated.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    return images, (sums[offsets[1:]] - sums[offsets[:-1]]).astype(np.uint32)
