"""The shards of a small dataset, opened and read."""

import shutil
from pathlib import Path

from unitoken.dataset.manifest import INDEX
from unitoken.dataset.mds_index import read_index
from unitoken.dataset.record import Record
from unitoken.storage.open import open_store
from unitoken.streaming_data.reading.shards import Shards


def open_shards(folder: Path, remote: Path | None = None, limit: int | None = None) -> Shards:
    """Open the dataset in `folder`, or with `remote`, the cache of that dataset in `folder`."""
    stamps = folder.parent / "cache"
    if remote is None:
        return Shards("a", folder, read_index(folder), None, stamps)
    folder.mkdir(exist_ok=True)
    if not (folder / INDEX).exists():
        shutil.copy(remote / INDEX, folder / INDEX)
    return Shards("a", folder, read_index(folder), open_store(str(remote)), stamps, limit)


def read_all(shards: Shards) -> list[Record]:
    """Read every sample, in the order of the index."""
    return [shards.record(shard, i) for shard, count in enumerate(shards.samples) for i in range(count)]
