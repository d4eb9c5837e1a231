"""What a run is to do, and that all who write into one folder do the same.

The first start leaves `job.json` (what the bytes of the dataset depend on), `input.json` (the files and where they are
cut) and `vocabulary.json` in the output folder. A later start with other settings is refused with both sides of the
difference; the same command goes on where the last one stopped. `settings.yaml` is what it was last run with, where the
tokenizers are for one: later commands on the folder take it where they are told nothing else. `retry-01.json` names the
items of a first round of retries (rejects.py), which have chunks of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic_core import PydanticSerializationError

from unitoken.codec.image_tokenizer.files import find_image_tokenizer
from unitoken.codec.text import load_tokenizer
from unitoken.common.config import Config, load_config, parse_config
from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE
from unitoken.common.urls import without_secrets
from unitoken.dataset.manifest import MANIFEST, VOCABULARY, VisionTokenizer, read_manifest
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT, MAX_GRID, Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, Store, StoreError, is_url
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.output import Output
from unitoken.tokenize.sources.adapters import adapter_fingerprint, find_adapter
from unitoken.tokenize.sources.reader import Input, InputFile, cut, find_files

JOB, INPUT, SETTINGS = "job.json", "input.json", "settings.yaml"
OF_THE_MACHINE: Any = {"threads": True, "vision": {"batch_size"}}  # of its cores and GPU: another may go on
ConfigT = TypeVar("ConfigT", bound=Config)


class JobFile(Config):
    """What the bytes of the dataset depend on."""

    source: str  # fingerprint of the input's files
    chunk_size: int
    vocabulary: str  # fingerprint
    vision: VisionTokenizer
    adapter: str
    target_size: int
    crop: str
    crop_position: str
    seed: int
    max_tokens: int | None
    compat: str | None
    max_reject_fraction: float  # a later start may change this one: nothing is written by it


class Round(Config):
    """A round of retries: the items to do again, as (piece of the input, position in its file), in that order."""

    items: list[tuple[int, int]]


@dataclass(frozen=True)
class Chunk:
    """What is written as one folder: pieces of the input, each with the positions to take (None: all)."""

    name: str
    parts: tuple[tuple[int, tuple[int, ...] | None], ...]

    @property
    def round(self) -> int:
        """Of retries; 0 for what is no retry."""
        return int(self.name.split("-")[1]) if self.name.startswith("retry-") else 0


@dataclass(frozen=True)
class Work:
    """The input's pieces and the rounds of retries -> the chunks of the dataset, in its order."""

    input: Input
    rounds: tuple[Round, ...]
    chunk_size: int

    def chunks(self) -> list[Chunk]:
        chunks = [Chunk(chunk_name(number), ((number, None),)) for number in range(len(self.input.pieces))]
        for number, retry in enumerate(self.rounds, 1):
            for n, start in enumerate(range(0, len(retry.items), self.chunk_size)):
                groups = itertools.groupby(
                    retry.items[start : start + self.chunk_size], key=lambda item: item[0]
                )
                parts = tuple((piece, tuple(position for _, position in group)) for piece, group in groups)
                chunks.append(Chunk(f"retry-{number:02d}-{n:06d}", parts))
        return chunks

    def last_rounds(self) -> dict[tuple[int, int], int]:
        """Item -> the last round that tries it again."""
        return {item: number for number, retry in enumerate(self.rounds, 1) for item in retry.items}

    def items(self, chunk: Chunk) -> int | None:
        """How many items a chunk has; None where that is known once it is read."""
        counts = [
            self.input.pieces[piece].items if positions is None else len(positions)
            for piece, positions in chunk.parts
        ]
        return None if None in counts else sum(count for count in counts if count is not None)


@dataclass(frozen=True)
class Job:
    """Travels to the worker processes, which load the tokenizers themselves."""

    config: TokenizeConfig
    work: Work
    out: str  # path or URL
    file: JobFile

    @property
    def input(self) -> Input:
        return self.work.input

    @property
    def output(self) -> Output:
        return Output(self.out)

    def chunks(self) -> list[Chunk]:
        return self.work.chunks()

    def missing(self) -> list[Chunk]:
        """The chunks that are not done."""
        done = self.output.done()
        return [chunk for chunk in self.chunks() if chunk.name not in done]

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.parse(self.output.store.read(VOCABULARY), f"{self.out}/{VOCABULARY}")


def chunk_name(number: int) -> str:
    return f"chunk-{number:06d}"


def round_name(number: int) -> str:
    return f"retry-{number:02d}.json"


def prepare(config: TokenizeConfig, sources: Sequence[str], out: str) -> Job:
    """Check everything that can be checked before the work, the cheap first, and claim the output folder.

    Raises:
        ConfigError: settings, input, weights or output folder do not fit.
        StoreError: the output's object store does not answer.
    """
    output = Output(out)
    check_out_folder(output)
    weights = find_image_tokenizer(config.vision)
    vision = weights.describe(config.vision)
    _check_size(config.target_size, vision.downsampling)
    adapter = adapter_fingerprint(config.adapter)
    find_adapter(
        config.adapter
    )  # a mistake in a user's file must not leave a folder that refuses the corrected one
    files = find_files(sources)
    tokenizer = load_tokenizer(config.tokenizer)
    vocabulary = Vocabulary.from_tokens(tokenizer.get_vocab(), vision.codebook_size)
    pieces = pieces_of(output, files, config.chunk_size)
    file = JobFile(
        source=pieces.fingerprint,
        vocabulary=vocabulary.fingerprint,
        vision=vision,
        adapter=adapter,
        **config.model_dump(include=set(JobFile.model_fields) - {"vision", "adapter"}),
    )
    if not output.exists(JOB):
        from unitoken.tokenize.first_items import check_first_items

        check_first_items(config, pieces)
    return begin(output, file, pieces, vocabulary, config)


def begin(
    output: Output, file: JobFile, pieces: Input, vocabulary: Vocabulary, config: TokenizeConfig
) -> Job:
    """Claim the output and leave in it what every process and the merge read. Raises ConfigError where it is another's."""
    _clear_if_nothing_was_kept(output, file)
    claim(output, file)
    if not output.exists(INPUT):
        output.store.write(INPUT, dump(_to_be_stored(pieces)))
    output.store.write(VOCABULARY, vocabulary.dump())
    told = _found_anywhere(config).model_dump(mode="json", exclude=OF_THE_MACHINE)
    output.store.write(SETTINGS, yaml.safe_dump(told, sort_keys=False, allow_unicode=True).encode())
    return Job(config, Work(pieces, load_rounds(output.store), config.chunk_size), output.url, file)


def _found_anywhere(config: TokenizeConfig) -> TokenizeConfig:
    """With whole paths, for commands that are run from elsewhere."""
    path, _, function = config.adapter.rpartition(":")
    adapter = f"{_whole_path(path)}:{function}" if path else config.adapter
    vision = config.vision.model_copy(update={"weights": _whole_path(config.vision.weights)})
    return config.model_copy(
        update={"tokenizer": _whole_path(config.tokenizer), "vision": vision, "adapter": adapter}
    )


def _whole_path(name: str) -> str:
    return str(Path(name).absolute()) if not is_url(name) and Path(name).exists() else name


def _to_be_stored(input: Input) -> Input:
    """What is signed or holds a password would let every reader of the dataset read the input; paths are whole ones."""
    files = [
        file.model_copy(update={"name": without_secrets(_whole_path(file.name))}) for file in input.files
    ]
    return input.model_copy(update={"files": files})


def settings_of(out: str, config: Path | None, default: Path, overrides: Sequence[str]) -> TokenizeConfig:
    """What a dataset was last run with, or the file `config`; `default` for a folder that is older than its settings file."""
    if config is None:
        store = open_store(out)
        with contextlib.suppress(StoreError):  # said by whoever reads the dataset
            return parse_config(
                TokenizeConfig,
                store.read(SETTINGS).decode(errors="replace"),
                f"{store.url}/{SETTINGS}",
                overrides,
            )
    return load_config(TokenizeConfig, config or default, overrides)


def _clear_if_nothing_was_kept(output: Output, file: JobFile) -> None:
    """A finished dataset without a sample is a mistake that the corrected command must not collide with."""
    if not output.exists(MANIFEST) or read_manifest(output.store).samples or not _differences(output, file):
        return
    names = sorted(
        output.store.sizes(), key=lambda name: name != MANIFEST
    )  # the manifest first: without it nothing is finished
    for name in names:
        output.store.delete(name)
    if not is_url(output.url):
        for folder in Path(output.url).glob("*/"):
            with contextlib.suppress(OSError):
                folder.rmdir()


def claim(output: Output, file: JobFile) -> None:
    """Leave `job.json` in the output, or compare with the one that is there. Raises ConfigError with the differences."""
    if differences := _differences(output, file):
        raise ConfigError(
            f"{output.url}: was begun with other settings: {'; '.join(differences)}. Go on with what it was begun with "
            f"({SETTINGS} there), or choose another folder"
        )


def _differences(output: Output, file: JobFile) -> list[str]:
    theirs = _settings(_parse(JobFile, output.claim(JOB, dump(file)), f"{output.url}/{JOB}"))
    ours = _settings(file)
    return [
        f"{key} is {theirs[key]!r} there and {ours[key]!r} now" for key in ours if theirs[key] != ours[key]
    ]


def load_job(store: Store) -> JobFile:
    return _load(JobFile, store, JOB)


def load_work(store: Store) -> Work:
    """What the folder of a run that was prepared is to hold in the end."""
    return Work(_load(Input, store, INPUT), load_rounds(store), load_job(store).chunk_size)


def load_rounds(store: Store) -> tuple[Round, ...]:
    rounds: list[Round] = []
    while True:
        name = round_name(len(rounds) + 1)
        try:
            rounds.append(_parse(Round, store.read(name), f"{store.url}/{name}"))
        except MissingError:
            return tuple(rounds)


def _load(model: type[ConfigT], store: Store, name: str) -> ConfigT:
    try:
        return _parse(model, store.read(name), f"{store.url}/{name}")
    except MissingError:
        raise ConfigError(
            f"{store.url}: no {name} in it: not a folder that `python -m unitoken.tokenize run` writes"
        ) from None
    except StoreError as error:
        raise ConfigError(f"{error}") from None


def _parse(model: type[ConfigT], data: bytes, where: str) -> ConfigT:
    try:
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        with contextlib.suppress(ValueError, RecursionError):  # of a path that is not UTF-8, see `dump`
            return model.model_validate(json.loads(data))
        raise ConfigError(f"{where}: not readable: {' '.join(str(error).split())[:200]}") from None


def dump(model: Config) -> bytes:
    try:
        return model.model_dump_json(indent=1).encode() + b"\n"
    except PydanticSerializationError:  # a path that is not UTF-8: its bytes as JSON's escapes of surrogates
        return json.dumps(model.model_dump(mode="python"), indent=1).encode() + b"\n"


def check_out_folder(output: Output) -> None:
    try:
        output.url.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{output.url}: the name of a dataset's folder must be UTF-8: the writer of shards knows no other"
        ) from None
    if not is_url(output.url) and Path(output.url).exists() and not Path(output.url).is_dir():
        raise ConfigError(f"{output.url}: expected a folder to write to, found a file")
    if not output.exists(JOB):
        foreign = [
            name
            for name in output.store.sizes()
            if not any(part.startswith(ASIDE) for part in name.split("/"))
        ]
        if foreign:
            raise ConfigError(
                f"{output.url}: expected an empty folder or one of ours, found {foreign[0]!r} in it and no {JOB}"
            )


def _check_size(target_size: int, downsampling: int) -> None:
    unit = downsampling * LATENTS_PER_GRID_UNIT
    if target_size % unit or not 0 < target_size <= unit * MAX_GRID:
        raise ConfigError(
            f"target_size: expected a multiple of {unit} pixels (2 latents) up to {unit * MAX_GRID}, found {target_size}"
        )


def pieces_of(output: Output, files: list[InputFile], chunk_size: int) -> Input:
    """The files cut, or as an earlier start has cut the same ones: to scan millions of items again would take minutes."""
    if output.exists(INPUT) and output.exists(JOB) and load_job(output.store).chunk_size == chunk_size:
        known = _load(Input, output.store, INPUT)
        if [(f.format, f.size, f.version) for f in known.files] == [
            (f.format, f.size, f.version) for f in files
        ]:
            return Input(files=files, pieces=known.pieces)
    return cut(files, chunk_size)


def _settings(file: JobFile) -> dict[str, Any]:
    nested = file.model_dump(exclude={"max_reject_fraction"})
    vision = {f"vision.{key}": value for key, value in nested.pop("vision").items()}
    return nested | vision
