"""Export a dataset as WebDataset tars, for training stacks that read these.

    000000123.tokens.npy   (T,) uint16 or uint32
    000000123.json         id, target_spans, image_spans, vocabulary (its fingerprint)
    000000123.0.jpg ...    the images' encoded originals, each with the ending of its format

The folder also holds vocabulary.json, README.md (a dataset card, from which Hugging Face's `datasets` knows
every column) and, written last, webdataset.json. Stock webdataset reads the tars with its own decoders;
nothing is pickled. Keys are the samples' numbers in the order of the index, since an id may hold dots or
slashes, or occur in several datasets. The same dataset gives the same bytes, and a killed export continues
with the tar it was at.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from unitoken.common.errors import ConfigError
from unitoken.common.files import remove_abandoned
from unitoken.dataset.image_files import ImageError, read_header
from unitoken.dataset.manifest import VOCABULARY
from unitoken.dataset.record import Record
from unitoken.storage.open import open_store
from unitoken.storage.store import Store, is_url
from unitoken.streaming_data.reading.shards import Shards
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource, open_sources

CARD = "README.md"
LIST, BEGUN = "webdataset.json", "webdataset.begun.json"
CACHE_BYTES = 1 << 30  # of a remote dataset's shards, at a time
SAMPLES_AT_ONCE = 256  # that are read from a shard

# File endings of image formats; other formats have Pillow's name in lower case.
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


def export_webdataset(dataset: str, out: str, samples_per_tar: int) -> int:
    """Write a dataset as tars, and return their number.

    Args:
        dataset: a folder or URL.
        out: an empty folder or URL, or one where this export was killed.
        samples_per_tar: in each tar but the last.

    Raises:
        ConfigError: there is no dataset, or `out` holds something else.
        ShardError: a shard of the dataset can not be read.
        StoreError: `out` can not be written.
    """
    target = open_store(out)
    with tempfile.TemporaryDirectory() as temporary:
        place = {"remote" if is_url(dataset) else "local": dataset}
        config = DataConfig.model_validate(
            {"streams": {"data": place}, "packed_length": 1, "global_batch": 1, "cache": temporary}
        )
        (source,) = open_sources(config)
        if not is_url(out) and Path(out).is_dir():
            remove_abandoned(Path(out))
        begun = {
            "dataset": source.fingerprint,
            "vocabulary": source.manifest.vocabulary,
            "samples_per_tar": samples_per_tar,
        }
        done = _begin(target, json.dumps(begun).encode() + b"\n")
        limit = CACHE_BYTES if source.store else None
        shards = Shards("data", source.folder, source.shards, source.store, Path(temporary) / "shards", limit)
        return _write(source, shards, target, done, Path(temporary), samples_per_tar)


def _begin(target: Store, begun: bytes) -> set[str]:
    """Mark an empty place with this export, or check that it has the mark; return the names of its files."""
    found = set(target.sizes())
    if found and (LIST in found or BEGUN not in found or target.read(BEGUN) != begun):
        other = next((name for name in (LIST, BEGUN) if name in found), min(found))
        raise ConfigError(f"{target.url}: expected an empty place, or this export begun, found {other}")
    if not found:
        target.write(BEGUN, begun)
    return found


def _write(
    source: StreamSource, shards: Shards, target: Store, done: set[str], temporary: Path, samples_per_tar: int
) -> int:
    """Write the tars that are not `done` yet, and the other files; return the number of tars."""
    samples, vocabulary = source.manifest.samples, source.manifest.vocabulary
    names: list[str] = []
    endings: set[str] = set()
    for begin in range(0, samples, samples_per_tar):
        name = f"{len(names):06}.tar"
        names.append(name)
        records = _records(shards, begin, min(begin + samples_per_tar, samples))
        if name in done:
            endings |= {ending for _, record in records for ending, _ in _members(record, vocabulary)}
        else:
            endings |= _write_tar(temporary / name, records, vocabulary)
            target.upload(temporary / name, name)
            (temporary / name).unlink()
    target.upload(source.folder / VOCABULARY, VOCABULARY)
    first = shards.entries[0]
    encodings = dict(zip(first["column_names"], first["column_encodings"], strict=True))
    target.write(CARD, _card(endings, encodings["tokens"].removeprefix("ndarray:")))
    summary = {
        "samples": samples,
        "samples_per_tar": samples_per_tar,
        "tars": names,
        "dataset": source.manifest.model_dump(),
    }
    target.write(LIST, json.dumps(summary, indent=1).encode() + b"\n")
    target.delete(BEGUN)
    return len(names)


def _write_tar(path: Path, records: Iterator[tuple[int, Record]], vocabulary: str) -> set[str]:
    """Write numbered records to a tar, and return the endings of its members."""
    endings = set()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, record in records:
            for ending, data in _members(record, vocabulary):
                endings.add(ending)
                member = tarfile.TarInfo(f"{number:09}.{ending}")  # its time is 0, its owner is nobody
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return endings


def _card(endings: set[str], token_type: str) -> bytes:
    """Return a dataset card that lists all columns.

    Without it, `datasets` takes the columns of a WebDataset from its first samples, and drops the images of
    later samples or fails at them.
    """
    features: list[dict[str, object]] = [
        {"name": "json", "struct": [
            {"name": "id", "dtype": "string"},
            {"name": "target_spans", "sequence": {"sequence": "uint32"}},
            {"name": "image_spans", "sequence": {"sequence": "uint32"}},
            {"name": "vocabulary", "dtype": "string"},
        ]},
        {"name": "tokens.npy", "sequence": token_type},
    ]  # fmt: skip
    images = sorted(
        (ending for ending in endings if ending[0].isdigit()),
        key=lambda ending: (int(ending.partition(".")[0]), ending),
    )
    features += [
        {"name": ending, "dtype": "binary" if ending.endswith(".bin") else "image"} for ending in images
    ]
    features += [{"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]
    fields = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
        "dataset_info": {"config_name": "default", "features": features},
    }
    text = yaml.safe_dump(fields, sort_keys=False)
    title = "Tokenized conversations, written by `export-webdataset` of unitoken-streaming."
    return f"---\n{text}---\n\n{title}\n".encode()


def _records(shards: Shards, begin: int, end: int) -> Iterator[tuple[int, Record]]:
    """Yield the samples [begin, end) with their numbers."""
    borders = np.cumsum([0, *shards.samples])
    while begin < end:
        shard = int(np.searchsorted(borders, begin, side="right")) - 1
        stop = min(end, int(borders[shard + 1]), begin + SAMPLES_AT_ONCE)
        records = shards.open(shard).records(np.arange(begin, stop) - borders[shard], 0)
        yield from zip(range(begin, stop), records, strict=True)
        begin = stop


def _members(record: Record, vocabulary: str) -> Iterator[tuple[str, bytes]]:
    """Yield the ending and the content of each of a sample's files."""
    spans = {"target_spans": record.target_spans.tolist(), "image_spans": record.image_spans.tolist()}
    yield "json", json.dumps({"id": record.id, **spans, "vocabulary": vocabulary}).encode()
    tokens = io.BytesIO()
    np.save(tokens, record.tokens, allow_pickle=False)
    yield "tokens.npy", tokens.getvalue()
    for number, image in enumerate(record.images):
        if len(image):  # a dataset may be stored without its images
            data = bytes(image)
            yield f"{number}.{_ending(data)}", data


def _ending(image: bytes) -> str:
    """Return the file ending of an encoded image, from its header: it was decoded when it was tokenized."""
    try:
        image_format = read_header(image).format or "bin"
    except ImageError:
        return "bin"
    return ENDINGS.get(image_format, image_format.lower())
