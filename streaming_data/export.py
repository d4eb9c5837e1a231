"""A dataset as WebDataset tars, for those who train on that stack.

    000000123.tokens.npy   (T,) uint16 or uint32
    000000123.json         id, target_spans, image_spans, vocabulary (its fingerprint)
    000000123.0.jpg ...    the images' encoded originals, each with the ending of its kind

beside vocabulary.json and, last, webdataset.json. Stock webdataset reads them by its own decoders; nothing is pickled. Keys are
the samples' numbers, since an id may hold dots, slashes, or what stands elsewhere, too. The same dataset gives the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.manifest import VOCABULARY
from unitoken.streaming_data.mixture import DataConfig, Source, open_sources
from unitoken.streaming_data.record import Record
from unitoken.streaming_data.shards import Shards
from unitoken.streaming_data.stores import Store, StoreError, is_url, open_store

LIST = "webdataset.json"
CACHE_BYTES = 1 << 30  # of a remote dataset's shards, at a time
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # others are called as Pillow calls them


def export(dataset: str, out: str, samples_per_tar: int) -> int:
    """Write `dataset` (a folder or URL) to `out` (a folder or URL); returns the number of tars.

    Raises:
        ConfigError: `dataset` is none, `out` holds something already.
        ShardError, StoreError: what can not be read or written.
    """
    target = open_store(out)
    try:
        found = list(target.sizes())
    except StoreError as error:
        raise ConfigError(str(error)) from None
    foreign = [name for name in found if not (name.endswith(".tar") or name == VOCABULARY)]
    if LIST in found or foreign:
        raise ConfigError(f"{out}: expected an empty place, found {LIST if LIST in found else foreign[0]}")
    with tempfile.TemporaryDirectory() as temporary:
        place = {"remote" if is_url(dataset) else "local": dataset}
        config = DataConfig.model_validate({"streams": {"data": place}, "packed_length": 1, "global_batch": 1, "cache": temporary})
        (source,) = open_sources(config)
        shards = Shards("data", source.folder, source.store, Path(temporary) / "shards", CACHE_BYTES if source.store else None)
        return _write(source, shards, target, Path(temporary), samples_per_tar)


def _write(source: Source, shards: Shards, target: Store, temporary: Path, samples_per_tar: int) -> int:
    records = (record for shard in range(len(shards.samples)) for record in _records(shards, shard))
    names: list[str] = []
    written = 0
    while written < source.manifest.samples:
        name = f"{len(names):06}.tar"
        count = min(samples_per_tar, source.manifest.samples - written)
        with tarfile.open(temporary / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(written, written + count):
                for ending, data in _members(next(records), source.manifest.vocabulary):
                    member = tarfile.TarInfo(f"{number:09}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        target.upload(temporary / name, name)
        (temporary / name).unlink()
        names.append(name)
        written += count
    target.upload(source.folder / VOCABULARY, VOCABULARY)
    summary = {"samples": written, "tars": names, "vocabulary": source.manifest.vocabulary}
    target.write(LIST, json.dumps(summary, indent=1).encode() + b"\n")
    return len(names)


def _records(shards: Shards, shard: int) -> Iterator[Record]:
    for place in range(int(shards.samples[shard])):
        yield shards.record(shard, place)


def _members(record: Record, vocabulary: str) -> Iterator[tuple[str, bytes]]:
    spans = {"target_spans": record.target_spans.tolist(), "image_spans": record.image_spans.tolist()}
    yield "json", json.dumps({"id": record.id, **spans, "vocabulary": vocabulary}).encode()
    tokens = io.BytesIO()
    np.save(tokens, record.tokens)
    yield "tokens.npy", tokens.getvalue()
    for number, image in enumerate(record.images):
        if len(image):  # a dataset may be kept without its pictures
            with Image.open(io.BytesIO(image)) as picture:
                kind = picture.format or "bin"
            yield f"{number}.{ENDINGS.get(kind, kind.lower())}", bytes(image)
