"""Single samples of a dataset by their number: nothing else of a shard is read, wherever the dataset is."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from unitoken.common.errors import DataError, one_line
from unitoken.dataset.record import Record
from unitoken.storage.store import Store
from unitoken.tokenize.checks.verify_chunks import read_root_index


class SampleReader:
    """Reads samples, each with two requests. Several threads may use it."""

    def __init__(self, store: Store) -> None:
        """Read the dataset's index.

        Raises:
            ConfigError: it is no index, or names files outside the dataset.
        """
        self._store = store
        self.entries = read_root_index(store)
        self._ends = np.cumsum([entry["samples"] for entry in self.entries], dtype=np.int64)  # (shards,)
        self._decoder = functools.lru_cache(1 << 12)(self._new_decoder)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, number: int) -> Record:
        """Read a sample; they are numbered from 0, in the order of the index.

        Raises:
            DataError: what is there can not be decoded.
            StoreError: the shard can not be read.
        """
        shard = int(np.searchsorted(self._ends, number, "right"))
        name = self.entries[shard]["raw_data"]["basename"]
        place = number - int(self._ends[shard]) + int(self.entries[shard]["samples"])
        try:
            decoder = self._decoder(shard)
            offsets = self._store.read_range(name, 4 * (place + 1), 4 * (place + 3))
            start, end = np.frombuffer(offsets, "<u4").tolist()
            if not start <= end <= self.entries[shard]["raw_data"]["bytes"]:
                raise ValueError(f"it reaches from byte {start} to {end}")
            return Record.from_mds(decoder.decode_sample(self._store.read_range(name, start, end)))
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            reason = one_line(error, 200)
            raise DataError(
                f"{self._store.url}/{name}: sample {place} is not readable: {reason}; see `unitoken verify`"
            ) from None

    def _new_decoder(self, shard: int) -> Any:
        from streaming.base.format import reader_from_json

        decoder = reader_from_json(".", None, self.entries[shard])
        decoder.validate(allow_unsafe_types=False)  # pickled columns run code
        return decoder


def spread_numbers(samples: int, count: int) -> list[int]:
    """Choose samples from all over a dataset, always the same ones.

    Args:
        samples: of the dataset.
        count: how many to choose: one at random from each of as many stretches; all if there are fewer.

    Returns:
        Their numbers, ascending.
    """
    if count >= samples:
        return list(range(samples))
    borders = np.linspace(0, samples, count + 1).astype(np.int64)
    return np.random.default_rng(0).integers(borders[:-1], borders[1:]).tolist()  # type: ignore[no-any-return]
