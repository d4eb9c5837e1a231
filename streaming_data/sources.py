"""The datasets of a mixture: where they are, and checks that need only their small files.

    streams:
      captions: {local: data/captions, proportion: 0.7}
      drawings: {remote: s3://bucket/drawings, local: /scratch/drawings, proportion: 0.3, kinds: [generation]}
    unit: tokens
    packed_length: 4096
    global_batch: 128

Of a remote dataset, `open_sources` downloads the small files (manifest, vocabulary, index, sidecar), and no
shard. Neither torch nor streaming is imported, except by `to_streams`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unitoken.common.errors import ConfigError
from unitoken.common.files import locked, remove_abandoned, write_aside
from unitoken.common.hashing import fingerprint, sha256_of_file
from unitoken.common.missing_paths import check_writable, where_looked
from unitoken.dataset.manifest import INDEX, MANIFEST, SIDECAR, VOCABULARY, Manifest, load_manifest
from unitoken.dataset.mds_index import read_index
from unitoken.storage.open import open_store
from unitoken.storage.shard_cache import SHARD_RETRY_SECONDS, ShardError, fetch
from unitoken.storage.store import MissingError, Store
from unitoken.streaming_data.settings import DataConfig, StreamConfig

if TYPE_CHECKING:
    import streaming


@dataclasses.dataclass(frozen=True)
class StreamSource:
    """A stream's dataset, whose small files are in `folder`."""

    name: str
    folder: Path
    store: Store | None  # where its shards come from; None: they are in `folder`
    config: StreamConfig
    manifest: Manifest
    shards: list[dict[str, Any]] = dataclasses.field(repr=False)  # the entries of the index

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the samples and their order; moving the dataset does not change it."""
        files = [self.manifest.files.get(name) for name in (INDEX, SIDECAR)]
        return fingerprint(json.dumps(files).encode())

    def check_file(self, file: str) -> None:
        """Raise ConfigError unless a file of the folder has the hash that the manifest lists."""
        with _errors_of_stream(self.name):
            _check_file(self.folder, self.manifest, file)


def open_sources(config: DataConfig) -> list[StreamSource]:
    """Find every stream's dataset, download its small files if it is remote, and compare the vocabularies.

    Raises:
        ConfigError: a dataset is missing or damaged, or the streams have different vocabularies.
    """
    check_writable("data.cache", config.cache_folder)
    sources = [_open_source(name, stream, config.cache_folder) for name, stream in config.streams.items()]
    first = sources[0]
    for other in sources[1:]:
        if other.manifest.layout != first.manifest.layout:
            raise ConfigError(
                f"streams '{first.name}' and '{other.name}' have different layouts: {first.folder} has "
                f"'{first.manifest.layout}', {other.folder} has '{other.manifest.layout}'; "
                "tokenize both with one layout"
            )
        if other.manifest.vocabulary != first.manifest.vocabulary:
            raise ConfigError(
                f"streams '{first.name}' and '{other.name}' have different vocabularies: "
                f"{first.folder} has fingerprint {first.manifest.vocabulary}, "
                f"{other.folder} has {other.manifest.vocabulary}; tokenize both with one tokenizer"
            )
    return sources


def _open_source(name: str, stream: StreamConfig, cache: Path) -> StreamSource:
    remote = stream.remote.removeprefix("file://").rstrip("/") if stream.remote else None
    store: Store | None = None
    if remote is None:
        assert stream.local is not None, "checked by StreamConfig"
        folder = Path(stream.local)
    else:
        store = open_store(remote, stream.endpoint, SHARD_RETRY_SECONDS)
        key = fingerprint(f"{stream.endpoint or ''}{remote}".encode())
        folder = Path(stream.local) if stream.local else cache / "datasets" / key
        _fetch_small_files(name, store, folder)
    with _errors_of_stream(name):
        manifest = load_manifest(folder)
        _check_file(folder, manifest, INDEX)
        return StreamSource(name, folder, store, stream, manifest, read_index(folder))


def _check_file(folder: Path, manifest: Manifest, file: str) -> None:
    problem = _hash_problem(folder / file, manifest.files.get(file))
    if problem:
        raise ConfigError(f"{folder / file} is {problem}")


@contextlib.contextmanager
def _errors_of_stream(name: str) -> Iterator[None]:
    """Name the stream in every ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"stream '{name}': {error}") from None


def crops_of(manifests: Sequence[Manifest]) -> list[tuple[int, int]]:
    """Return the sizes that the streams' images were cropped to for the image tokenizer.

    Returns:
        Different (width, height) in pixels, beginning with those of the dataset that has most images.
    """
    with_images = sorted(
        (manifest for manifest in manifests if manifest.images), key=lambda manifest: -manifest.images
    )
    return list(dict.fromkeys(crop for manifest in with_images for crop in manifest.crops()))


def to_streams(sources: Sequence[StreamSource]) -> list[streaming.Stream]:
    """Return mosaicml-streaming's own `Stream` for each source, weights included."""
    from streaming import Stream

    return [
        Stream(local=str(source.folder), remote=source.config.remote, **source.config.weight)
        for source in sources
    ]


def _fetch_small_files(name: str, store: Store, folder: Path) -> None:
    """Download manifest, vocabulary, index and sidecar into the cache `folder`; the manifest last.

    The remote manifest is read each time, which shows whether the cache holds another dataset or an older
    state of this one.
    """
    try:
        with locked(folder / ".lock"):
            remove_abandoned(folder)  # left by killed runs
            manifest_path, remote_manifest = folder / MANIFEST, store.read(MANIFEST)
            if manifest_path.exists() and manifest_path.read_bytes() != remote_manifest:
                raise ConfigError(
                    f"stream '{name}': {folder} caches another dataset than {store.url} holds now; "
                    "delete it, or name another `local`"
                )
            try:
                files = json.loads(remote_manifest)["files"]
                hashes = {file: files[file] for file in (VOCABULARY, INDEX, SIDECAR)}
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"stream '{name}': {store.url}/{MANIFEST} is not the manifest of a dataset"
                ) from None
            for file, sha256 in hashes.items():
                problem = functools.partial(_hash_problem, expected=sha256)
                if problem(folder / file):
                    fetch(store, file, folder / file, problem).close()
            write_aside(manifest_path, remote_manifest)
    except MissingError:
        hint = where_looked(store.url)
        raise ConfigError(
            f"stream '{name}': {store.url}: not a dataset folder: it has no {MANIFEST}{hint}"
        ) from None
    except (OSError, ShardError) as error:
        raise ConfigError(f"stream '{name}': {error}") from None


def _hash_problem(path: Path, expected: str | None) -> str | None:
    """Return what is wrong with a file, to follow the words `FILE is`; None if it has the expected hash."""
    if not path.exists():
        return "missing"
    found = sha256_of_file(path)
    if found == expected:
        return None
    return f"not the file that {MANIFEST} names: its sha256 is {found}, expected {expected}"
