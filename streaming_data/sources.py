"""Which datasets are mixed, and how: the YAML under `data:` and the checks that come before anything heavy.

    streams:
      captions: {local: data/captions, proportion: 0.7}
      drawings: {remote: s3://bucket/drawings, local: /scratch/drawings, proportion: 0.3, kinds: [generation]}
    unit: tokens
    packed_length: 4096
    global_batch: 128

Nothing here imports torch or streaming, except to fetch the small files of a remote dataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unitoken.common.errors import ConfigError
from unitoken.common.files import locked, remove_abandoned, write_aside
from unitoken.common.hashing import fingerprint, sha256_of_file
from unitoken.dataset.manifest import INDEX, MANIFEST, SIDECAR, VOCABULARY, Manifest, load_manifest
from unitoken.dataset.mds_index import read_index
from unitoken.storage.open import open_store
from unitoken.storage.shard_cache import SHARD_RETRY_SECONDS, ShardError, fetch
from unitoken.storage.store import Store
from unitoken.streaming_data.settings import DataConfig, StreamConfig

if TYPE_CHECKING:
    import streaming


@dataclasses.dataclass(frozen=True)
class StreamSource:
    """A stream whose dataset was found, and whose small files are in `folder`."""

    name: str
    folder: Path
    store: Store | None  # where its shards come from; None: they are in `folder`
    config: StreamConfig
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Of the samples and their order: equal for a dataset that was moved, another for one that was changed."""
        files = [self.manifest.files.get(name) for name in (INDEX, SIDECAR)]
        return fingerprint(json.dumps(files).encode())

    def check(self, file: str) -> None:
        """Raise ConfigError unless a file of the folder is the one that the manifest names."""
        wrong = _wrong_sha256(self.folder / file, self.manifest.files.get(file))
        if wrong:
            raise ConfigError(f"stream '{self.name}': {self.folder / file} is {wrong}")


def open_sources(config: DataConfig) -> list[StreamSource]:
    """Find every stream's dataset and check that they share one vocabulary. Raises ConfigError."""
    sources = []
    for name, stream in config.streams.items():
        remote = stream.remote.removeprefix("file://").rstrip("/") if stream.remote else None
        store: Store | None = None
        if remote is None:
            assert stream.local is not None, "checked by StreamConfig"
            folder = Path(stream.local)
        else:
            store = open_store(remote, stream.endpoint, SHARD_RETRY_SECONDS)
            key = fingerprint(f"{stream.endpoint or ''}{remote}".encode())
            folder = Path(stream.local) if stream.local else config.cache_folder / "datasets" / key
            _fetch_small_files(name, store, folder)
        with _of_stream(name):
            source = StreamSource(name, folder, store, stream, load_manifest(folder))
        source.check(INDEX)
        with _of_stream(name):
            read_index(folder)
        sources.append(source)
    first = sources[0]
    for other in sources[1:]:
        if other.manifest.vocabulary != first.manifest.vocabulary:
            raise ConfigError(
                f"streams '{first.name}' and '{other.name}' have different vocabularies: {first.folder} has fingerprint "
                f"{first.manifest.vocabulary}, {other.folder} has {other.manifest.vocabulary}; tokenize both with one tokenizer"
            )
    return sources


@contextlib.contextmanager
def _of_stream(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"stream '{name}': {error}") from None


def crops_of(manifests: Sequence[Manifest]) -> list[tuple[int, int]]:
    """The (width, height) in pixels that the pictures of all streams were cut to for the image tokenizer, those of most
    pictures first.
    """
    with_images = sorted(
        (manifest for manifest in manifests if manifest.images), key=lambda manifest: -manifest.images
    )
    return list(dict.fromkeys(crop for manifest in with_images for crop in manifest.crops()))


def to_streams(sources: list[StreamSource]) -> list[streaming.Stream]:
    """The sources as streaming's own objects, weights included."""
    from streaming import Stream

    return [
        Stream(local=str(source.folder), remote=source.config.remote, **source.config.weight)
        for source in sources
    ]


def _fetch_small_files(name: str, store: Store, folder: Path) -> None:
    """Bring manifest, vocabulary, index and sidecar into the cache `folder`; the manifest last.

    The remote manifest is always read anew, so a cache of another dataset, or of an older state of this one, is found.
    """
    try:
        with locked(folder / ".lock"):
            remove_abandoned(folder)  # what killed runs left
            manifest_path, fresh = folder / MANIFEST, store.read(MANIFEST)
            if manifest_path.exists() and manifest_path.read_bytes() != fresh:
                raise ConfigError(
                    f"stream '{name}': {folder} caches another dataset than {store.url} holds now; "
                    "delete it, or name another `local`"
                )
            try:
                files = json.loads(fresh)["files"]
                wanted = {file: files[file] for file in (VOCABULARY, INDEX, SIDECAR)}
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"stream '{name}': {store.url}/{MANIFEST} is not the manifest of a dataset"
                ) from None
            for file, sha256 in wanted.items():
                wrong = functools.partial(_wrong_sha256, expected=sha256)
                if wrong(folder / file):
                    fetch(store, file, folder / file, wrong).close()
            write_aside(manifest_path, fresh)
    except (OSError, ShardError) as error:
        raise ConfigError(f"stream '{name}': {error}") from None


def _wrong_sha256(path: Path, expected: str | None) -> str | None:
    if not path.exists():
        return "missing"
    found = sha256_of_file(path)
    return (
        None
        if found == expected
        else f"not the file that {MANIFEST} names: its sha256 is {found}, expected {expected}"
    )
