"""The files of a dataset folder, and its manifest.

    index.json           stock MDS index: an unmodified `streaming.StreamingDataset` reads the folder
    chunk-000000/ ...    the shards, one folder for each chunk of the input
    samples.parquet      the sidecar: one row a sample, in the order of the index (sidecar.py)
    rejects.jsonl        one line for each item that is not in the dataset, with its reason
    vocabulary.json      the id space of the tokens
    manifest.json        the manifest; written last, so a folder that has one is complete

Nothing in the manifest depends on when, where or by how many workers the dataset was written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic

from unitoken.common.config import Config, first_problem
from unitoken.common.errors import ConfigError
from unitoken.common.missing_paths import where_looked
from unitoken.dataset.vocabulary import CHAMELEON, LATENTS_PER_GRID_UNIT, Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, Store, StoreError

FORMAT = "unitoken-dataset"
VERSION = 1
INDEX = "index.json"
SIDECAR = "samples.parquet"
REJECTS = "rejects.jsonl"
VOCABULARY = "vocabulary.json"
MANIFEST = "manifest.json"
LEFT_OUT = "turns_left_out"  # a key of an adapted item, of a chunk's index and of the manifest
UNKNOWN = "unknown"  # the fingerprint of the image tokenizer of a migrated dataset


class VisionTokenizer(Config):
    """The image tokenizer that made the codes."""

    kind: str
    weights: str  # fingerprint of the weights
    codebook_size: int = pydantic.Field(gt=0, lt=1 << 24)
    downsampling: int = pydantic.Field(gt=0, le=1 << 10)  # pixels a latent, each way
    precision: str


def without_later_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out fields that older versions do not have where they say what these versions did."""
    older = {"layout": CHAMELEON, "system": None}
    return {name: value for name, value in fields.items() if name not in older or value != older[name]}


class Manifest(Config):
    """What a dataset was made from and with, and its counts: `items == samples + rejected`."""

    format: str = FORMAT
    version: int = VERSION
    vocabulary: str  # fingerprint of vocabulary.json
    vision: VisionTokenizer
    target_size: int = pydantic.Field(gt=0, le=1 << 14)
    adapter: str = "standard"
    layout: str = CHAMELEON
    system: str | None = None  # what became of system turns, where the settings say it
    crop: str
    crop_position: str = "center"
    seed: int = 0  # of random crops
    max_tokens: int | None = None
    compat: str | None
    items: int
    samples: int
    rejected: int
    tokens: int
    target_tokens: int
    images: int
    turns_left_out: int = 0  # of conversations that begin with the assistant
    chunks: int
    chunk_size: int
    source: str  # fingerprint of the input's files
    files: dict[str, str]  # sha256 of index.json, samples.parquet, rejects.jsonl and vocabulary.json

    @pydantic.model_validator(mode="after")
    def _reconciles(self) -> Manifest:
        if self.items != self.samples + self.rejected:
            raise ValueError(f"{self.items} items are not {self.samples} samples + {self.rejected} rejected")
        counts = self.samples, self.rejected, self.tokens, self.target_tokens, self.images
        if min(*counts, self.turns_left_out, self.chunks) < 0:
            raise ValueError("its counts are not all 0 or more")
        if self.target_size < self.vision.downsampling * LATENTS_PER_GRID_UNIT:
            raise ValueError(
                f"no picture can be cut to target_size {self.target_size} "
                f"for {self.vision.downsampling} pixels a latent"
            )
        return self

    def crops(self) -> list[tuple[int, int]]:
        """Return the (width, height) in pixels that pictures may have been cut to."""
        from unitoken.dataset.images import allowed_crops

        return allowed_crops(self.crop, self.target_size, self.vision.downsampling * LATENTS_PER_GRID_UNIT)

    def dump(self) -> bytes:
        """Return the content of the manifest file."""
        return json.dumps(without_later_fields(self.model_dump()), indent=1, sort_keys=True).encode() + b"\n"


def read_manifest(store: Store) -> Manifest:
    """Read a dataset's manifest. Raises ConfigError if the store does not hold a finished dataset."""
    try:
        return _parse(store.read(MANIFEST), f"{store.url}/{MANIFEST}")
    except MissingError:
        is_unfinished = bool(store.sizes("chunk-"))
        hint = "; finish it with `unitoken merge`" if is_unfinished else where_looked(store.url)
        raise ConfigError(f"{store.url}: not a dataset folder: it has no {MANIFEST}{hint}") from None
    except StoreError as error:
        raise ConfigError(str(error)) from None


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a local dataset folder, as `read_manifest` does."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: not a dataset folder: no such folder{where_looked(folder)}")
    return read_manifest(open_store(str(folder)))


def _parse(data: bytes, where: str) -> Manifest:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable: {error}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.get("version") != VERSION:
        found = type(fields).__name__
        if isinstance(fields, dict):
            found = f"{fields.get('format')!r} version {fields.get('version')!r}"
        raise ConfigError(f"{where}: expected {FORMAT!r} version {VERSION}, found {found}")
    try:
        return Manifest.model_validate(fields)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error)}") from None


def load_vocabulary(folder: Path, expected: str | None = None) -> Vocabulary:
    """Read a local dataset's vocabulary, and check it against the fingerprint in its manifest.

    Args:
        folder: of the dataset.
        expected: the fingerprint in the manifest; None reads the manifest.
    """
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    if expected is None:
        expected = load_manifest(folder).vocabulary
    if vocabulary.fingerprint != expected:
        raise ConfigError(
            f"{folder / VOCABULARY}: its fingerprint is {vocabulary.fingerprint}, "
            f"{MANIFEST} names {expected}: the folder was changed by hand"
        )
    return vocabulary
