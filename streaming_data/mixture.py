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
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

from unitoken.common.config import Bytes, Config, Count, Name, Seed, also_text
from unitoken.common.errors import ConfigError
from unitoken.common.files import locked, remove_abandoned, write_aside
from unitoken.dataset.manifest import INDEX, MANIFEST, SIDECAR, VOCABULARY, Manifest, load_manifest, load_vocabulary, sha256_file
from unitoken.dataset.mds_index import read_index
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.shard_cache import PATIENCE, ShardError, fetch
from unitoken.storage.store import Store
from unitoken.streaming_data.limits import check_images_fit

if TYPE_CHECKING:
    import streaming

    from unitoken.dataset.vision_views import Views


Length = Annotated[int, Field(gt=0, le=2**24)]  # positions in a pack
Unit = Literal["samples", "tokens", "target_tokens"]
Kind = Literal["understanding", "generation", "text"]  # all images are asked about; one at least is generated; no image
Continuous = Literal["questions", "all", "none"]
OverLong = Literal["reject", "truncate_text"]
BatchingMethod = Literal["stratified", "random", "per_stream"]


class StreamConfig(Config):
    """One dataset of the mixture. Without proportion, repeat or choose every sample is seen once an epoch."""

    local: Name | None = None  # the dataset folder; with `remote`, the folder that caches it
    remote: Name | None = None  # a folder, s3://, gs://, azure://, hf:// ...
    endpoint: Name | None = None  # the S3 server of this stream; default S3_ENDPOINT_URL, or Amazon's
    proportion: Annotated[float, Field(ge=0, le=1e9)] | None = None  # share of the epoch in `unit`, relative to the other streams'
    repeat: Annotated[float, Field(ge=0, le=1e6)] | None = None  # times all it has
    choose: Annotated[int, Field(ge=0, le=10**15)] | None = None  # so many of `unit`
    max_tokens: Length | None = None  # a longer sample, features included, is over-long; default packed_length
    kinds: Annotated[tuple[Kind, ...] | None, Field(min_length=1)] = None  # only samples of these kinds; default all
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the samples, by hash of their ids, that is not trained on

    @pydantic.model_validator(mode="after")
    def _one_weight(self) -> StreamConfig:
        if not self.local and not self.remote:
            raise ValueError("a stream needs `local` or `remote`")
        if len(self.weight) > 1:
            raise ValueError(f"give one of proportion, repeat and choose, not {' and '.join(self.weight)}")
        if self.endpoint and not (self.remote or "").startswith("s3://"):
            raise ValueError(f"`endpoint` is for a `remote` that begins with s3://, found {self.remote!r}")
        return self

    @property
    def weight(self) -> dict[str, float]:
        """The one weight given, by its name; empty where none is."""
        return self.model_dump(include={"proportion", "repeat", "choose"}, exclude_none=True)


class DataConfig(Config):
    """What is streamed, and in which order. All but the last five settings decide the order of the samples."""

    streams: dict[str, StreamConfig] = Field(min_length=1)
    packed_length: Length  # tokens a pack, image features included
    global_batch: Annotated[
        Count, also_text("^[1-9][0-9]* *tok$")
    ]  # packs a step, over all ranks; or positions: 524288tok is 128 packs of 4,096
    seed: Seed = 0
    unit: Unit = "samples"  # what proportion and choose count
    epoch_samples: Annotated[int, Field(gt=0, lt=2**32)] | None = (
        None  # an epoch's size, where the streams have proportions or no weights at all
    )
    epoch_tokens: Annotated[int, Field(gt=0, le=10**15)] | None = (
        None  # the same in tokens, features included; default: what all streams have together
    )
    split: Literal["train", "held_out"] = "train"  # held_out: what training leaves out, to evaluate on
    continuous: Continuous = "questions"  # which images bring their continuous features
    anyres: bool = False  # besides the whole picture its tiles at full resolution
    canonical_nodes: Count = 1  # rows of shards that are read side by side: the most nodes that share no shard
    shuffle: bool = True
    window: Annotated[int, Field(gt=0, lt=2**31)] = 131072  # samples that are packed together
    # stratified: every global batch holds the epoch's mixture. random: packs in random order. per_stream: each batch is of one
    # stream, in proportion. Without `shuffle` packs come in the order of the samples.
    batching_method: BatchingMethod = "stratified"
    over_long: OverLong = "reject"  # leave out what is longer than a pack; or cut it at its end, never inside an image
    null_prompt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the drawings are trained on without their prompt's text
    workers: Annotated[int, Field(ge=0, le=1024)] = 0  # processes a rank; 0 loads in the training process
    prefetch: Annotated[int, Field(gt=0, le=1024)] = 2  # batches that each worker prepares ahead
    timeout: Count = 600  # seconds without a batch from a worker until that is an error
    cache_limit: Bytes | None = None  # that downloaded shards may take in each cache folder: 500gb
    cache: Name | None = None  # plans and caches of remote datasets; default $XDG_CACHE_HOME/unitoken or ~/.cache/unitoken

    @pydantic.model_validator(mode="before")
    @classmethod
    def _tokens_a_batch(cls, settings: Any) -> Any:
        """`global_batch: 524288tok` -> packs."""
        batch = settings.get("global_batch") if isinstance(settings, dict) else None
        match = re.fullmatch(r"([1-9]\d*) *tok", batch) if isinstance(batch, str) else None
        length = settings.get("packed_length") if match else None
        if match is None or not isinstance(length, int) or length <= 0:
            return settings  # what is wrong with packed_length is said of itself
        packs, rest = divmod(int(match[1]), length)
        if not packs or rest:
            raise ValueError(f"global_batch: {batch} are no whole number of packs of packed_length: {length}")
        return {**settings, "global_batch": packs}

    @pydantic.model_validator(mode="after")
    def _weights_fit(self) -> DataConfig:
        kinds = {name: next(iter(stream.weight), "no weight") for name, stream in self.streams.items()}
        proportional = [name for name, kind in kinds.items() if kind == "proportion"]
        absolute = [f"'{name}' ({kind})" for name, kind in kinds.items() if kind != "proportion"]
        if proportional and absolute:
            raise ValueError(f"proportion is for all streams or for none: '{proportional[0]}' has it, {', '.join(absolute)} not")
        if proportional and not any(stream.proportion for stream in self.streams.values()):
            raise ValueError("the proportions of all streams are 0")
        if self.epoch_samples and self.epoch_tokens:
            raise ValueError("give one of epoch_samples and epoch_tokens")
        size = "epoch_samples" if self.epoch_samples else "epoch_tokens" if self.epoch_tokens else None
        if size and not proportional and any(kind != "no weight" for kind in kinds.values()):
            raise ValueError(f"{size} does not go with repeat or choose: {', '.join(absolute)}")
        everything = [name for name, stream in self.streams.items() if not stream.held_out]
        if self.split == "held_out" and everything:
            raise ValueError(f"split: held_out needs `held_out` above 0 in every stream: '{everything[0]}' has none")
        return self

    @property
    def cache_folder(self) -> Path:
        if self.cache:
            return Path(self.cache)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unitoken"


@dataclasses.dataclass(frozen=True)
class Source:
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
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

    def check(self, file: str) -> None:
        """Raise ConfigError unless a file of the folder is the one that the manifest names."""
        wrong = _wrong_sha256(self.folder / file, self.manifest.files.get(file))
        if wrong:
            raise ConfigError(f"stream '{self.name}': {self.folder / file} is {wrong}")


def open_sources(config: DataConfig) -> list[Source]:
    """Find every stream's dataset and check that they share one vocabulary. Raises ConfigError."""
    sources = []
    for name, stream in config.streams.items():
        remote = stream.remote.removeprefix("file://").rstrip("/") if stream.remote else None
        store: Store | None = None
        if remote is None:
            assert stream.local is not None, "checked by StreamConfig"
            folder = Path(stream.local)
        else:
            store = open_store(remote, stream.endpoint, PATIENCE)
            key = hashlib.sha256(f"{stream.endpoint or ''}{remote}".encode()).hexdigest()[:16]
            folder = Path(stream.local) if stream.local else config.cache_folder / "datasets" / key
            _fetch_small_files(name, store, folder)
        with _of_stream(name):
            source = Source(name, folder, store, stream, load_manifest(folder))
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
    pictures first."""
    with_images = sorted((manifest for manifest in manifests if manifest.images), key=lambda manifest: -manifest.images)
    return list(dict.fromkeys(crop for manifest in with_images for crop in manifest.crops()))


def check_mixture(config: DataConfig, views: Views | None = None) -> Vocabulary:
    """Everything that can be said of the data without loading it; returns the streams' one vocabulary. Raises ConfigError."""
    return check_sources(open_sources(config), config, views)


def check_sources(sources: Sequence[Source], config: DataConfig, views: Views | None) -> Vocabulary:
    """The same, of datasets that are found already. Raises ConfigError."""
    for source in sources:
        check_images_fit(source, config, views)
    return load_vocabulary(sources[0].folder)


def other_codes(sources: list[Source]) -> list[str]:
    """A warning each, no error: bf16 changes one code in eight, which may be meant; a migrated dataset's weights are unknown."""
    lines = []
    with_images = [source for source in sources if source.manifest.images]
    for other in with_images[1:]:
        first = with_images[0]
        ours, theirs = first.manifest.vision.model_dump(), other.manifest.vision.model_dump()
        if differences := [f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
            names = f"streams '{first.name}' and '{other.name}'"
            lines.append(f"{names} have image codes of different tokenizers: {', '.join(differences)}")
    return lines


def uneven_proportions(config: DataConfig) -> list[str]:
    """A warning where proportions look like shares of 1 and are not."""
    given = {name: stream.proportion for name, stream in config.streams.items() if stream.proportion is not None}
    total = sum(given.values())
    if not given or abs(total - 1) < 1e-6 or all(value.is_integer() for value in given.values()):
        return []  # 3 to 1 is meant as it is said
    shares = ", ".join(f"{name} {value / total:.1%}" for name, value in given.items())
    return [f"the proportions sum to {total:g} and not to 1: the shares are {shares}"]


def check_vocabulary(sources: list[Source], vocabulary: Vocabulary, owner: str) -> None:
    """Raise ConfigError unless the streams are tokenized in `vocabulary`, which is `owner`'s."""
    for source in sources:
        if source.manifest.vocabulary != vocabulary.fingerprint:
            raise ConfigError(
                f"stream '{source.name}': {source.folder} has a vocabulary with fingerprint {source.manifest.vocabulary} "
                f"({load_vocabulary(source.folder).size} tokens), {owner} has {vocabulary.fingerprint} ({vocabulary.size} tokens)"
            )


def to_streams(sources: list[Source]) -> list[streaming.Stream]:
    """The sources as streaming's own objects, weights included."""
    from streaming import Stream

    return [Stream(local=str(source.folder), remote=source.config.remote, **source.config.weight) for source in sources]


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
                raise ConfigError(f"stream '{name}': {store.url}/{MANIFEST} is not the manifest of a dataset") from None
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
    found = sha256_file(path)
    return None if found == expected else f"not the file that {MANIFEST} names: its sha256 is {found}, expected {expected}"
