"""The shards of a small dataset, opened and read."""

import shutil

from unitoken.dataset.manifest import INDEX
from unitoken.dataset.record import Record
from unitoken.storage.open import open_store
from unitoken.streaming_data.reading.shards import Shards


def open_shards(folder, remote=None, **settings) -> Shards:
    """`folder` itself, or a cache for it beside."""
    stamps = folder.parent / "cache"
    if remote is None:
        return Shards("a", folder, None, stamps)
    folder.mkdir(exist_ok=True)
    if not (folder / INDEX).exists():
        shutil.copy(remote / INDEX, folder / INDEX)
    return Shards("a", folder, open_store(str(remote)), stamps, **settings)


def read_all(shards: Shards) -> list[Record]:
    return [shards.record(shard, i) for shard, count in enumerate(shards.samples) for i in range(count)]
