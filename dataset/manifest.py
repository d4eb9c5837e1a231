"""What a dataset folder says of itself.

    index.json           stock MDS index: an unmodified `streaming.StreamingDataset` reads the folder
    chunk-000000/ ...    the shards, one folder a chunk of the input
    samples.parquet      the sidecar: one row a sample, in index order (SAMPLES_SCHEMA)
    rejects.jsonl        one line an item that is not in the dataset, with its reason
    vocabulary.json      the id space the tokens are in
    manifest.json        this; written last, so a folder that has one is complete

Nothing in it depends on when, where or by how many workers it was written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic

from unitoken.common.config import Config, first_problem
from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT, Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, Store, StoreError

if TYPE_CHECKING:
    pass

FORMAT = "unitoken-dataset"
VERSION = 1
INDEX, SIDECAR, REJECTS, VOCABULARY, MANIFEST = (
    "index.json",
    "samples.parquet",
    "rejects.jsonl",
    "vocabulary.json",
    "manifest.json",
)
LEFT_OUT = "turns_left_out"  # beside an adapted item's conversations, in a chunk's index and in the manifest
UNKNOWN = "unknown"  # the fingerprint of the image tokenizer of a dataset that was migrated


class VisionTokenizer(Config):
    """Which image tokenizer made the codes."""

    kind: str
    weights: str  # sha256 of the weights, first 16 digits
    codebook_size: int = pydantic.Field(gt=0, lt=1 << 24)
    downsampling: int = pydantic.Field(gt=0, le=1 << 10)  # pixels a latent, each way
    precision: str


class Manifest(Config):
    """Counts reconcile: `items == samples + rejected`."""

    format: str = FORMAT
    version: int = VERSION
    vocabulary: str  # fingerprint of vocabulary.json
    vision: VisionTokenizer
    target_size: int = pydantic.Field(gt=0, le=1 << 14)
    adapter: str = "standard"
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
        if (
            min(
                self.samples,
                self.rejected,
                self.tokens,
                self.target_tokens,
                self.images,
                self.turns_left_out,
                self.chunks,
            )
            < 0
        ):
            raise ValueError("its counts are not all 0 or more")
        if self.target_size < self.vision.downsampling * LATENTS_PER_GRID_UNIT:
            raise ValueError(
                f"no picture can be cut to target_size {self.target_size} for {self.vision.downsampling} pixels a latent"
            )
        return self

    def crops(self) -> list[tuple[int, int]]:
        """The (width, height) in pixels that its pictures were cut to for the image tokenizer."""
        from unitoken.dataset.images import crops

        return crops(self.crop, self.target_size, self.vision.downsampling * LATENTS_PER_GRID_UNIT)

    def dump(self) -> bytes:
        return json.dumps(self.model_dump(), indent=1, sort_keys=True).encode() + b"\n"


def read_manifest(store: Store) -> Manifest:
    """Read a dataset's manifest. Raises ConfigError for a folder or bucket that is no finished dataset."""
    try:
        return _parse(store.read(MANIFEST), f"{store.url}/{MANIFEST}")
    except MissingError:
        begun = bool(store.sizes("chunk-"))
        hint = "; finish it with `python -m unitoken.tokenize merge`" if begun else ""
        raise ConfigError(f"{store.url}: not a dataset folder: it has no {MANIFEST}{hint}") from None
    except StoreError as error:
        raise ConfigError(str(error)) from None


def load_manifest(folder: Path) -> Manifest:
    """`read_manifest` for a folder of this machine."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: not a dataset folder: no such folder")
    return read_manifest(open_store(str(folder)))


def _parse(data: bytes, where: str) -> Manifest:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable: {error}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.get("version") != VERSION:
        found = (
            f"{fields.get('format')!r} version {fields.get('version')!r}"
            if isinstance(fields, dict)
            else type(fields).__name__
        )
        raise ConfigError(f"{where}: expected {FORMAT!r} version {VERSION}, found {found}")
    try:
        return Manifest.model_validate(fields)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error)}") from None


def load_vocabulary(folder: Path, expected: str | None = None) -> Vocabulary:
    """The dataset's vocabulary, checked against the fingerprint in its manifest.

    Args:
        folder: of the dataset.
        expected: that fingerprint, where the manifest is read already.
    """
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    if expected is None:
        expected = load_manifest(folder).vocabulary
    if vocabulary.fingerprint != expected:
        raise ConfigError(
            f"{folder / VOCABULARY}: its fingerprint is {vocabulary.fingerprint}, {MANIFEST} names {expected}: "
            "the folder was changed by hand"
        )
    return vocabulary
