"""Shards as samples: memory-mapped, decoded where they lie. All that knows how mosaicml-streaming lays out its files.

Why not upstream's own reading: it takes a file lock and opens a file for each sample (1k to 2k samples/s where a
memory-map gives 35k), one missing shard ends a background thread without a word, and its host-wide shared memory collides
between jobs.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError, one_line
from unitoken.dataset.manifest import INDEX
from unitoken.dataset.mds_index import read_index
from unitoken.dataset.record import Record, unpack_bytes
from unitoken.storage.shard_cache import Cache, ShardError
from unitoken.storage.store import Store

MOST_OPEN = 4096  # memory-maps a stream and process; Linux allows 65,530 a process
MOST_OPEN_LIMITED = 64  # where evicted shards shall give their room back: a mapped file keeps its own

_HEADER = np.arange(20)  # bytes: the sizes of a sample's five columns
_NO_IMAGES = np.zeros((0, 4), np.uint32)


def _check_columns(entry: dict[str, Any]) -> None:
    """Raises ValueError or KeyError."""
    names, encodings, sizes = (entry[f"column_{part}"] for part in ("names", "encodings", "sizes"))
    texts = (
        isinstance(names, list)
        and isinstance(encodings, list)
        and all(isinstance(one, str) for one in [*names, *encodings])
    )
    if (
        not texts
        or not isinstance(sizes, list)
        or not len(names) == len(encodings) == len(sizes) == len(set(names))
    ):
        raise ValueError(
            "column_names, column_encodings and column_sizes: expected three lists of one length"
        )
    if not all(size is None or (type(size) is int and 0 <= size < 1 << 32) for size in sizes):
        raise ValueError(f"`column_sizes`: expected numbers or null, found {sizes!r}")


Ids = npt.NDArray[np.int64]
SampleDecoder = Callable[
    [mmap.mmap, Ids, int], Iterator[Record]
]  # (data, where samples begin, stream) -> the samples


class Shard(NamedTuple):
    """A shard in memory."""

    name: str  # for messages
    data: mmap.mmap
    offsets: npt.NDArray[np.uint32]  # (samples + 1,) where each sample begins
    decode: SampleDecoder

    def records(self, places: Ids, stream: int) -> Iterator[Record]:
        """The samples at `places` (n,), each made when it is asked for. Raises ShardError for one that is none."""
        try:
            yield from self.decode(self.data, self.offsets[places].astype(np.int64), stream)
        except (IndexError, ValueError, TypeError, OverflowError, MemoryError) as error:
            words = one_line(error, 200)
            raise ShardError(f"{self.name} is corrupt: one of its samples is not readable: {words}") from None


class Shards:
    """The shards of one stream. Several processes and threads may use the same folder."""

    def __init__(
        self, stream: str, folder: Path, store: Store | None, stamps: Path, limit: int | None = None
    ) -> None:
        self.folder = folder
        self.entries = read_index(folder)
        self.samples = np.array([entry["samples"] for entry in self.entries], np.int64)
        self.cache = Cache(stream, self.entries, store, folder, stamps, limit)
        self._stream = stream
        self._most_open = MOST_OPEN if limit is None else MOST_OPEN_LIMITED
        self._decoders: dict[str, SampleDecoder] = {}
        self._decoder_of = [self._decoder(entry) for entry in self.entries]
        self._open: dict[int, Shard] = {}
        if store is None:  # what is missing is missing for good: say so before training begins
            for entry in self.entries:
                path, size = folder / entry["raw_data"]["basename"], entry["raw_data"]["bytes"]
                if not path.exists() or path.stat().st_size != size:
                    what = f"corrupt: {path.stat().st_size} bytes" if path.exists() else "missing"
                    raise ConfigError(
                        f"stream '{stream}': the shard {path} is {what}, {INDEX} lists it with {size} bytes"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_decoders": {}, "_decoder_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._decoder_of = [self._decoder(entry) for entry in self.entries]

    def record(self, shard: int, index: int) -> Record:
        """Sample `index` of shard `shard`; downloads and verifies the shard first if that was not done yet."""
        return next(self.open(shard).records(np.array([index]), 0))

    def open(self, shard: int) -> Shard:
        """A shard, mapped: there and verified. Raises ShardError, naming it, where it can't be had."""
        if opened := self._open.get(shard):
            return opened
        path = self.folder / self.entries[shard]["raw_data"]["basename"]
        name = f"stream '{self._stream}': the shard {path}"
        with self.cache.open(shard) as file:
            size = file.seek(0, 2)
            if size < 8:
                raise ShardError(f"{name} is corrupt: {size} bytes are no shard")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.frombuffer(data, "<u4", 1)[0])
        if count != self.samples[shard]:
            raise ShardError(
                f"{name} is corrupt: it holds {count} samples, {INDEX} names {self.samples[shard]}"
            )
        if 4 * (count + 2) > size:
            raise ShardError(f"{name} is corrupt: {size} bytes do not hold where {count} samples begin")
        offsets = np.frombuffer(data, "<u4", count + 1, 4)
        if (
            int(offsets[0]) < 4 * (count + 2)
            or int(offsets[-1]) != size
            or (np.diff(offsets.astype(np.int64)) < 0).any()
        ):
            raise ShardError(
                f"{name} is corrupt: its samples do not begin one after the other, and end where it ends"
            )
        while len(self._open) >= self._most_open:
            self._open.pop(next(iter(list(self._open))), None)  # threads may have been faster
        return self._open.setdefault(shard, Shard(name, data, offsets, self._decoder_of[shard]))

    def _decoder(self, entry: dict[str, Any]) -> SampleDecoder:
        """Ours for our columns alone; upstream's where there are others besides. One for all shards with the same columns."""
        try:
            _check_columns(entry)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{self.folder / INDEX}: not an MDS index: {type(error).__name__}: {error}"
            ) from None
        key = json.dumps([entry["column_names"], entry["column_encodings"], entry["column_sizes"]])
        if key not in self._decoders:
            columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
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
            plain = list(columns) == sorted(ours) and not any(entry["column_sizes"])
            self._decoders[key] = (
                _plain(tokens.removeprefix("ndarray:")) if plain else _general(self.folder, entry)
            )
        return self._decoders[key]


def _plain(token_type: str) -> SampleDecoder:
    """A decoder of samples with exactly our columns: 2 us a text sample, where upstream's takes 25. Tokens are views of the map.

    A sample is the sizes of its five columns (uint32), then the columns in the order of their names. An array is a byte
    (dimensions, and the width of each), its shape, its values. All that is arithmetic is done for many samples at once; the
    records are made one by one, since hundreds that wait for their turn would set off the garbage collector: a quarter of the time.
    """
    dtype = np.dtype(token_type).newbyteorder("<")

    def decode(data: mmap.mmap, begins: Ids, stream: int) -> Iterator[Record]:
        raw = np.frombuffer(data, np.uint8)
        sizes = raw[begins[:, None] + _HEADER].view("<u4").astype(np.int64)  # (n, 5)
        columns = np.cumsum(
            np.concatenate([begins[:, None] + _HEADER.size, sizes], axis=1), axis=1
        )  # (n, 6) their borders
        targets, tokens = columns[:, 3], columns[:, 4]
        first_span = targets + 1 + (2 << (raw[targets] & 3))
        first_token = tokens + 1 + (1 << (raw[tokens] & 3))
        counts = (columns[:, 5] - first_token) // dtype.itemsize
        spans, borders = _gather(raw, first_span, (tokens - first_span) // 8)
        _check_targets(spans, borders, counts)
        places = columns[:, :4].T.tolist(), counts.tolist(), first_token.tolist()
        return (
            Record(
                str(data[name:name_end], "utf-8"),
                np.frombuffer(data, dtype, count, token),
                spans[span:next_span],
                np.frombuffer(data, "<u4", (images - name_end) // 4, name_end).reshape(-1, 4)
                if images > name_end
                else _NO_IMAGES,
                unpack_bytes(memoryview(data)[images:end]) if images > name_end else (),
                stream,
            )
            for name, name_end, images, end, count, token, span, next_span in zip(
                *places[0], *places[1:], borders, borders[1:], strict=False
            )
        )

    return decode


def _check_targets(spans: npt.NDArray[np.uint32], borders: list[int], counts: Ids) -> None:
    """Raises ValueError for what is trained on and no token: a slice beyond the end would be shorter without a word."""
    ends = np.repeat(counts, np.diff(borders))
    if (spans[:, 0] >= spans[:, 1]).any() or (spans[:, 1] > ends).any() or (counts <= 0).any():
        raise ValueError("its target spans lie outside of its tokens")


def _gather(raw: npt.NDArray[np.uint8], begins: Ids, counts: Ids) -> tuple[npt.NDArray[np.uint32], list[int]]:
    """Pairs of uint32, `counts` of them from each of `begins`, one after the other; and where each one's begin and end."""
    borders = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(8 * borders[-1]) + np.repeat(begins - 8 * borders[:-1], 8 * counts)
    return raw[places].view("<u4").reshape(-1, 2), borders.tolist()


def _general(folder: Path, entry: dict[str, Any]) -> SampleDecoder:
    """A decoder of samples with more columns than ours."""
    from streaming.base.format import reader_from_json

    reader: Any = reader_from_json(str(folder), None, entry)
    try:
        reader.validate(allow_unsafe_types=False)  # pickled columns run code
    except ValueError as error:
        raise ConfigError(f"{folder / INDEX}: {error}") from None

    fixed = [size for size in entry["column_sizes"] if size]
    varying = len(entry["column_sizes"]) - len(fixed)

    def decode(data: mmap.mmap, begins: Ids, stream: int) -> Iterator[Record]:
        for begin in begins.tolist():
            size = 4 * varying + sum(fixed) + int(np.frombuffer(data, "<u4", varying, begin).sum())
            yield Record.from_mds(reader.decode_sample(data[begin : begin + size]), stream)

    return decode
