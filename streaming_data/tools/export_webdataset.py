"""A dataset as WebDataset tars, for those who train on that stack.

    000000123.tokens.npy   (T,) uint16 or uint32
    000000123.json         id, target_spans, image_spans, vocabulary (its fingerprint)
    000000123.0.jpg ...    the images' encoded originals, each with the ending of its kind

beside vocabulary.json, README.md (a dataset card, from which Hugging Face's `datasets` knows every column) and, last,
webdataset.json. Stock webdataset reads them by its own decoders; nothing is pickled. Keys are the samples' numbers in index
order, since an id may hold dots, slashes, or what stands elsewhere, too. The same dataset gives the same bytes, and an export
that was killed goes on with the tar it was at.
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
AT_ONCE = 256  # samples
ENDINGS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "TIFF": "tif",
    "JPEG2000": "jp2",
}  # others are called as Pillow calls them


def export_webdataset(dataset: str, out: str, samples_per_tar: int) -> int:
    """Write `dataset` (a folder or URL) to `out` (a folder or URL); returns the number of tars.

    Raises:
        ConfigError: `dataset` is none, or `out` holds something else already.
        ShardError, StoreError: what can not be read or written.
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
        shards = Shards(
            "data",
            source.folder,
            source.store,
            Path(temporary) / "shards",
            CACHE_BYTES if source.store else None,
        )
        return _write(source, shards, target, done, Path(temporary), samples_per_tar)


def _begin(target: Store, begun: bytes) -> set[str]:
    """Say in an empty place what will be written there; or go on with the same. Returns what is there."""
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
    samples = source.manifest.samples
    names: list[str] = []
    endings: set[str] = set()
    for begin in range(0, samples, samples_per_tar):
        name = f"{len(names):06}.tar"
        names.append(name)
        if name in done:
            for _, record in _records(shards, begin, min(begin + samples_per_tar, samples)):
                endings |= {ending for ending, _ in _members(record, source.manifest.vocabulary)}
            continue
        with tarfile.open(temporary / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, record in _records(shards, begin, min(begin + samples_per_tar, samples)):
                for ending, data in _members(record, source.manifest.vocabulary):
                    endings.add(ending)
                    member = tarfile.TarInfo(f"{number:09}.{ending}")  # its time is 0, its owner is nobody
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        target.upload(temporary / name, name)
        (temporary / name).unlink()
    target.upload(source.folder / VOCABULARY, VOCABULARY)
    token_type = dict(
        zip(shards.entries[0]["column_names"], shards.entries[0]["column_encodings"], strict=True)
    )["tokens"]
    target.write(CARD, _card(endings, token_type.removeprefix("ndarray:")))
    summary = {
        "samples": samples,
        "samples_per_tar": samples_per_tar,
        "tars": names,
        "dataset": source.manifest.model_dump(),
    }
    target.write(LIST, json.dumps(summary, indent=1).encode() + b"\n")
    target.delete(BEGUN)
    return len(names)


def _card(endings: set[str], token_type: str) -> bytes:
    """A dataset card. `datasets` takes the columns of a WebDataset from its first samples, and would drop the pictures of later
    ones or fail at them: here all are listed.
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
    pictures = sorted(
        (ending for ending in endings if ending[0].isdigit()),
        key=lambda one: (int(one.partition(".")[0]), one),
    )
    features += [
        {"name": ending, "dtype": "binary" if ending.endswith(".bin") else "image"} for ending in pictures
    ]
    features += [{"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]
    fields = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
        "dataset_info": {"config_name": "default", "features": features},
    }
    text = yaml.safe_dump(fields, sort_keys=False)
    return f"---\n{text}---\n\nTokenized conversations, written by `export-webdataset` of unitoken-streaming.\n".encode()


def _records(shards: Shards, begin: int, end: int) -> Iterator[tuple[int, Record]]:
    """Samples [begin, end) with their numbers."""
    borders = np.cumsum([0, *shards.samples])
    while begin < end:
        shard = int(np.searchsorted(borders, begin, side="right")) - 1
        stop = min(end, int(borders[shard + 1]), begin + AT_ONCE)
        records = shards.open(shard).records(np.arange(begin, stop) - borders[shard], 0)
        yield from zip(range(begin, stop), records, strict=True)
        begin = stop


def _members(record: Record, vocabulary: str) -> Iterator[tuple[str, bytes]]:
    spans = {"target_spans": record.target_spans.tolist(), "image_spans": record.image_spans.tolist()}
    yield "json", json.dumps({"id": record.id, **spans, "vocabulary": vocabulary}).encode()
    tokens = io.BytesIO()
    np.save(tokens, record.tokens, allow_pickle=False)
    yield "tokens.npy", tokens.getvalue()
    for number, image in enumerate(record.images):
        if len(image):  # a dataset may be kept without its pictures
            data = bytes(image)
            yield f"{number}.{_kind(data)}", data


def _kind(image: bytes) -> str:
    """The ending of an encoded picture. Nothing is decoded: that was done when it was tokenized."""
    try:
        kind = read_header(image).format or "bin"
    except ImageError:
        return "bin"
    return ENDINGS.get(kind, kind.lower())
