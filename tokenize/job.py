"""The files that describe a run, and the chunks that follow from them.

The first start of a run leaves in the output folder
    job.json          what the bytes of the dataset depend on (`JobFile`)
    input.json        the input's files, and where they are cut into pieces (sources/reader.py: `Input`)
    vocabulary.json   the id space of the tokens
    settings.yaml     the settings of the last run, as defaults for later commands
and each round of retries adds
    retry-01.json     the rejected items to try again (`Round`), which get chunks of their own

prepare.py writes them; all processes of the run, the merge and the checks read them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import dataclass
from typing import Any, TypeVar

import pydantic
from pydantic_core import PydanticSerializationError

from unitoken.common.config import Config
from unitoken.common.errors import ConfigError, one_line
from unitoken.dataset.manifest import VOCABULARY, VisionTokenizer, without_later_fields
from unitoken.dataset.vocabulary import CHAMELEON, Vocabulary
from unitoken.storage.store import MissingError, Store, StoreError
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.output import Output
from unitoken.tokenize.sources.reader import Input

JOB, INPUT, SETTINGS = "job.json", "input.json", "settings.yaml"
ConfigT = TypeVar("ConfigT", bound=Config)


class JobFile(Config):
    """What the bytes of the dataset depend on."""

    source: str  # fingerprint of the input's files
    chunk_size: int
    vocabulary: str  # fingerprint
    vision: VisionTokenizer
    adapter: str
    layout: str = CHAMELEON
    system: str | None = None
    target_size: int
    crop: str
    crop_position: str
    seed: int
    max_tokens: int | None
    compat: str | None
    max_reject_fraction: float  # no byte depends on it: a later start may change it

    @pydantic.model_serializer(mode="wrap")
    def _as_older_versions(
        self, serialize: pydantic.SerializerFunctionWrapHandler, info: pydantic.SerializationInfo
    ) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return without_later_fields(fields) if info.mode == "json" else fields

    def manifest_fields(self) -> dict[str, Any]:
        """Return the fields that the manifest repeats."""
        return self.model_dump(exclude={"max_reject_fraction"})

    def differences(self, now: JobFile) -> list[str]:
        """Compare with the job of a later start. Returns each difference as `NAME is A there and B now`."""
        there, here = self._flat(), now._flat()
        return [
            f"{name} is {there[name]!r} there and {here[name]!r} now"
            for name in here
            if there[name] != here[name]
        ]

    def _flat(self) -> dict[str, Any]:
        fields = self.manifest_fields()
        vision = {f"vision.{name}": value for name, value in fields.pop("vision").items()}
        return fields | vision


class Round(Config):
    """A round of retries: the items to try again, as (piece, position in its file), in that order."""

    items: list[tuple[int, int]]


@dataclass(frozen=True)
class Chunk:
    """What is written as one folder.

    Attributes:
        name: of the folder.
        parts: pieces of the input, each with the positions of the items to take (None: all).
    """

    name: str
    parts: tuple[tuple[int, tuple[int, ...] | None], ...]

    @property
    def round(self) -> int:
        """The number of its round of retries; 0 for a chunk of the first run."""
        return int(self.name.split("-")[1]) if self.name.startswith("retry-") else 0


@dataclass(frozen=True)
class Work:
    """The input's pieces and the rounds of retries, from which the chunks follow."""

    input: Input
    rounds: tuple[Round, ...]
    chunk_size: int

    def chunks(self) -> list[Chunk]:
        """Return the chunks of the dataset, in its order: one for each piece, then those of each round."""
        chunks = [Chunk(f"chunk-{number:06d}", ((number, None),)) for number in range(len(self.input.pieces))]
        for number, retry in enumerate(self.rounds, 1):
            for chunk_number, start in enumerate(range(0, len(retry.items), self.chunk_size)):
                items = retry.items[start : start + self.chunk_size]
                parts = tuple(
                    (piece, tuple(position for _, position in group))
                    for piece, group in itertools.groupby(items, key=lambda item: item[0])
                )
                chunks.append(Chunk(f"retry-{number:02d}-{chunk_number:06d}", parts))
        return chunks

    def last_rounds(self) -> dict[tuple[int, int], int]:
        """Return, for each item that is tried again, the last round that does so."""
        return {item: number for number, retry in enumerate(self.rounds, 1) for item in retry.items}

    def count_items(self, chunk: Chunk) -> int | None:
        """Count the items of a chunk; None where the number is known only after reading it."""
        total = 0
        for piece, positions in chunk.parts:
            count = self.input.pieces[piece].items if positions is None else len(positions)
            if count is None:
                return None
            total += count
        return total


@dataclass(frozen=True)
class Job:
    """A prepared run. It travels to the worker processes, which load the tokenizers themselves."""

    config: TokenizeConfig
    work: Work
    out: str  # path or URL
    file: JobFile

    @property
    def input(self) -> Input:
        """The input's files and pieces."""
        return self.work.input

    @property
    def output(self) -> Output:
        """The folder or bucket to write to."""
        return Output(self.out)

    def chunks(self) -> list[Chunk]:
        """Return all chunks, in the dataset's order."""
        return self.work.chunks()

    def missing(self) -> list[Chunk]:
        """Return the chunks that are not done."""
        done = self.output.done()
        return [chunk for chunk in self.chunks() if chunk.name not in done]

    def vocabulary(self) -> Vocabulary:
        """Read the vocabulary from the output."""
        return Vocabulary.parse(self.output.store.read(VOCABULARY), f"{self.out}/{VOCABULARY}")


def round_name(number: int) -> str:
    """Return the name of a round's file. Rounds are counted from 1."""
    return f"retry-{number:02d}.json"


def load_job(store: Store) -> JobFile:
    """Read `job.json`. Raises ConfigError for a folder that no run has been prepared in."""
    return load_file(JobFile, store, JOB)


def load_work(store: Store) -> Work:
    """Read which chunks the folder of a prepared run holds once it is done."""
    return Work(load_file(Input, store, INPUT), load_rounds(store), load_job(store).chunk_size)


def load_rounds(store: Store) -> tuple[Round, ...]:
    """Read all rounds of retries."""
    rounds: list[Round] = []
    while True:
        name = round_name(len(rounds) + 1)
        try:
            rounds.append(parse_json(Round, store.read(name), f"{store.url}/{name}"))
        except MissingError:
            return tuple(rounds)


def load_file(model: type[ConfigT], store: Store, name: str) -> ConfigT:
    """Read one of the files of a prepared run.

    Raises:
        ConfigError: the folder has no such file, or it can not be read.
    """
    try:
        return parse_json(model, store.read(name), f"{store.url}/{name}")
    except MissingError:
        raise ConfigError(
            f"{store.url}: no {name} in it: not a folder that `unitoken tokenize` writes"
        ) from None
    except StoreError as error:
        raise ConfigError(f"{error}") from None


def parse_json(model: type[ConfigT], data: bytes, where: str) -> ConfigT:
    """Parse what `dump_json` wrote. Raises ConfigError, which names the file `where`."""
    try:
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        with contextlib.suppress(ValueError, RecursionError):  # a path that is not UTF-8, see `dump_json`
            return model.model_validate(json.loads(data))
        raise ConfigError(f"{where}: not readable: {one_line(error, 200)}") from None


def dump_json(model: Config) -> bytes:
    """Return the content of a file of the run."""
    try:
        return model.model_dump_json(indent=1).encode() + b"\n"
    except PydanticSerializationError:  # a path that is not UTF-8: its bytes as JSON's escapes of surrogates
        return json.dumps(model.model_dump(mode="python"), indent=1).encode() + b"\n"
