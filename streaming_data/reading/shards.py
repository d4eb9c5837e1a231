"""Shards as samples, memory-mapped and decoded in place. Only this module knows the layout of MDS files.

Why not upstream's own reading: it takes a file lock and opens a file for each sample (1k to 2k samples/s,
where a memory-map gives 35k), one missing shard ends a background thread without a word, and its host-wide
shared memory collides between jobs.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError, one_line
from unitoken.dataset.manifest import INDEX
from unitoken.dataset.mds_index import shard_columns, shard_offsets
from unitoken.dataset.record import Record, unpack_bytes
from unitoken.storage.shard_cache import Cache, ShardError
from unitoken.storage.store import Store
from unitoken.streaming_data.arrays import Integers

MOST_MAPPED = 4096  # shards of a stream in each process; Linux allows 65,530 memory-maps a process
MOST_MAPPED_LIMITED = 64  # with a limited cache: an evicted file takes space as long as it is mapped

_HEADER = np.arange(20)  # bytes: the sizes of a sample's five columns
_NO_IMAGES = np.zeros((0, 4), np.uint32)

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# (data, where samples begin, number of the stream) -> the samples
SampleDecoder = Callable[[mmap.mmap, Integers, int], Iterator[Record]]


class Newest(Generic[K, T]):
    """Keeps the values that were added last. Several threads may use it."""

    def __init__(self, most: int) -> None:
        """Keep up to `most` values."""
        self.most = most
        self._values: dict[K, T] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> T | None:
        """Return the value of a key; None if there is none, or none any more."""
        return self._values.get(key)

    def add(self, key: K, value: T) -> T:
        """Add a value and return it, or the value that another thread has added for the same key."""
        while len(self._values) >= self.most:
            self._values.pop(next(iter(list(self._values))), None)  # another thread may have removed it
        return self._values.setdefault(key, value)


class Shard(NamedTuple):
    """A shard in memory."""

    name: str  # for messages
    data: mmap.mmap
    offsets: npt.NDArray[np.uint32]  # (samples + 1,) where each sample begins
    decode: SampleDecoder

    def records(self, places: Integers, stream: int) -> Iterator[Record]:
        """Yield the samples at `places` (n,), each decoded when it is needed.

        Raises:
            ShardError: a sample can not be decoded.
        """
        try:
            yield from self.decode(self.data, self.offsets[places].astype(np.int64), stream)
        except (IndexError, ValueError, TypeError, OverflowError, MemoryError) as error:
            problem = one_line(error, 200)
            raise ShardError(
                f"{self.name} is corrupt: one of its samples is not readable: {problem}"
            ) from None


class Shards:
    """The shards of one stream. Several processes and threads may use the same folder."""

    def __init__(
        self,
        stream: str,
        folder: Path,
        entries: list[dict[str, Any]],
        store: Store | None,
        stamps: Path,
        limit: int | None = None,
        most_mapped: int | None = None,
    ) -> None:
        """Check the entries of the index, and that the shards of a local dataset are there.

        Args:
            stream: its name.
            folder: of the dataset, or of its cache.
            entries: of its index (dataset/mds_index.py).
            store: where missing shards are downloaded from; None for a local dataset.
            stamps: folder of this host's record of verified and downloaded shards.
            limit: bytes that downloaded shards may take.
            most_mapped: shards that a process keeps mapped; None: as many as its `limit` allows.

        Raises:
            ConfigError: a shard has other columns than a record, or a shard of a local dataset is missing.
        """
        self.folder = folder
        self.entries = entries
        self.samples = np.array([entry["samples"] for entry in self.entries], np.int64)
        self.cache = Cache(stream, self.entries, store, folder, stamps, limit)
        self._stream = stream
        self._decoders: dict[str, SampleDecoder] = {}
        self._decoder_of = [self._decoder(entry) for entry in self.entries]
        if most_mapped is None:
            most_mapped = MOST_MAPPED if limit is None else MOST_MAPPED_LIMITED
        self.mapped: Newest[int, Shard] = Newest(most_mapped)
        if store is None:  # a local shard that is missing stays missing: fail before training begins
            for entry in self.entries:
                path, size = folder / entry["raw_data"]["basename"], entry["raw_data"]["bytes"]
                if not path.exists() or path.stat().st_size != size:
                    problem = f"corrupt: {path.stat().st_size} bytes" if path.exists() else "missing"
                    raise ConfigError(
                        f"stream '{stream}': the shard {path} is {problem}, "
                        f"{INDEX} lists it with {size} bytes"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mapped": Newest(self.mapped.most), "_decoders": {}, "_decoder_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._decoder_of = [self._decoder(entry) for entry in self.entries]

    def record(self, shard: int, index: int) -> Record:
        """Return sample `index` of shard `shard`, which is downloaded and verified first if necessary."""
        return next(self.open(shard).records(np.array([index]), 0))

    def open(self, shard: int) -> Shard:
        """Return a shard, verified and mapped.

        Raises:
            ShardError: the shard is missing, unreachable or corrupt.
        """
        mapped = self.mapped.get(shard)
        if mapped is not None:
            return mapped
        path = self.folder / self.entries[shard]["raw_data"]["basename"]
        name = f"stream '{self._stream}': the shard {path}"
        with self.cache.open(shard) as file:
            try:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # ValueError for an empty file
                offsets = shard_offsets(data, int(self.samples[shard]))
            except ValueError as error:
                raise ShardError(f"{name} is corrupt: {error}") from None
        return self.mapped.add(shard, Shard(name, data, offsets, self._decoder_of[shard]))

    def _decoder(self, entry: dict[str, Any]) -> SampleDecoder:
        """Return the decoder for a shard's columns: ours, or upstream's if there are other columns, too."""
        try:
            columns = shard_columns(entry)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{self.folder / INDEX}: not an MDS index: {type(error).__name__}: {error}"
            ) from None
        key = json.dumps([entry["column_names"], entry["column_encodings"], entry["column_sizes"]])
        if key not in self._decoders:
            tokens = columns.get("tokens", "")
            ours = {
                "id": "str",
                "image_spans": "bytes",
                "images": "bytes",
                "target_spans": "ndarray:uint32",
                "tokens": tokens,
            }
            if tokens not in ("ndarray:uint16", "ndarray:uint32") or columns != {**columns, **ours}:
                raise ConfigError(f"{self.folder / INDEX}: expected the columns {ours}, found {columns}")
            ours_alone = list(columns) == sorted(ours) and not any(entry["column_sizes"])
            self._decoders[key] = (
                _fast_decoder(tokens.removeprefix("ndarray:"))
                if ours_alone
                else _upstream_decoder(self.folder, entry)
            )
        return self._decoders[key]


def _fast_decoder(token_type: str) -> SampleDecoder:
    """Return a decoder of samples with exactly our columns: 2 us a text sample, where upstream's takes 25.

    A sample is the sizes of its five columns (uint32), then the columns in the order of their names. An array
    is a byte (dimensions, and the width of each), its shape, its values. All arithmetic is done for many
    samples at once; the records are made one by one, since hundreds of them that wait would set off the
    garbage collector: a quarter of the time. Their tokens are views of the memory-map.
    """
    dtype = np.dtype(token_type).newbyteorder("<")

    def decode(data: mmap.mmap, begins: Integers, stream: int) -> Iterator[Record]:
        raw = np.frombuffer(data, np.uint8)
        sizes = raw[begins[:, None] + _HEADER].view("<u4").astype(np.int64)  # (n, 5)
        borders = np.cumsum(np.concatenate([begins[:, None] + _HEADER.size, sizes], axis=1), axis=1)  # (n, 6)
        ids, image_spans, images, targets, tokens, ends = borders.T  # where each column begins, and the end
        first_span = targets + 1 + (2 << (raw[targets] & 3))
        first_token = tokens + 1 + (1 << (raw[tokens] & 3))
        counts = (ends - first_token) // dtype.itemsize
        spans, span_borders = _gather_pairs(raw, first_span, (tokens - first_span) // 8)
        _check_targets(spans, span_borders, counts)
        columns = [column.tolist() for column in (ids, image_spans, images, targets, first_token, counts)]
        rows = zip(*columns, span_borders[:-1], span_borders[1:], strict=True)
        for id_, id_end, images_begin, images_end, token, count, first, last in rows:
            name, token_ids = str(data[id_:id_end], "utf-8"), np.frombuffer(data, dtype, count, token)
            if images_begin == id_end:  # no images
                yield Record(name, token_ids, spans[first:last], _NO_IMAGES, (), stream)
                continue
            blocks = np.frombuffer(data, "<u4", (images_begin - id_end) // 4, id_end).reshape(-1, 4)
            encoded = unpack_bytes(memoryview(data)[images_begin:images_end])
            yield Record(name, token_ids, spans[first:last], blocks, encoded, stream)

    return decode


def _check_targets(spans: npt.NDArray[np.uint32], borders: list[int], counts: Integers) -> None:
    """Raise ValueError for target spans outside of the tokens, which slicing would shorten without a word."""
    ends = np.repeat(counts, np.diff(borders))
    if (spans[:, 0] >= spans[:, 1]).any() or (spans[:, 1] > ends).any() or (counts <= 0).any():
        raise ValueError("its target spans lie outside of its tokens")


def _gather_pairs(
    raw: npt.NDArray[np.uint8], begins: Integers, counts: Integers
) -> tuple[npt.NDArray[np.uint32], list[int]]:
    """Gather pairs of uint32, `counts[i]` of them from `begins[i]` on.

    Returns:
        The pairs (m, 2), one after the other, and the borders between those of each sample (n + 1).
    """
    borders = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(8 * borders[-1]) + np.repeat(begins - 8 * borders[:-1], 8 * counts)
    return raw[places].view("<u4").reshape(-1, 2), borders.tolist()


def _upstream_decoder(folder: Path, entry: dict[str, Any]) -> SampleDecoder:
    """Return a decoder of samples that have other columns besides ours."""
    from streaming.base.format import reader_from_json

    reader: Any = reader_from_json(str(folder), None, entry)
    try:
        reader.validate(allow_unsafe_types=False)  # pickled columns run code
    except ValueError as error:
        raise ConfigError(f"{folder / INDEX}: {error}") from None

    fixed = [size for size in entry["column_sizes"] if size]
    varying = len(entry["column_sizes"]) - len(fixed)

    def decode(data: mmap.mmap, begins: Integers, stream: int) -> Iterator[Record]:
        for begin in begins.tolist():
            size = 4 * varying + sum(fixed) + int(np.frombuffer(data, "<u4", varying, begin).sum())
            yield Record.from_mds(reader.decode_sample(data[begin : begin + size]), stream)

    return decode
