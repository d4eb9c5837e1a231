"""What a run is to do, and that all who write into one folder do the same.

The first start leaves `job.json` (and `vocabulary.json`) in the output folder. A later start with other settings is
refused with both sides of the difference; the same command goes on where the last one stopped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from unitoken.streaming_data.config import Config, ConfigError
from unitoken.streaming_data.files import ASIDE, aside
from unitoken.streaming_data.manifest import INDEX, VOCABULARY, VisionTokenizer, sha256_file
from unitoken.streaming_data.vocabulary import LATENTS_PER_GRID_UNIT, MAX_GRID, Vocabulary
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.sources import chunk_count, chunk_name, load_items
from unitoken.tokenize.text import load_tokenizer
from unitoken.tokenize.weights import find_weights

JOB = "job.json"


class JobFile(Config):
    """What the bytes of the dataset depend on, and the counts that follow from it."""

    source: str  # sha256 of the input, first 16 digits
    items: int
    chunk_size: int
    vocabulary: str  # fingerprint
    vision: VisionTokenizer
    target_size: int
    crop: str
    compat: str | None
    max_reject_fraction: float  # a later start may change this one: nothing is written by it

    @property
    def chunks(self) -> int:
        return chunk_count(self.items, self.chunk_size)


@dataclass(frozen=True)
class Job:
    """Travels to the worker processes, which load the tokenizers themselves."""

    config: TokenizeConfig
    source: Path
    out: Path
    file: JobFile

    def missing(self) -> list[int]:
        """The chunks that are not done."""
        return missing_chunks(self.out, self.file.chunks)


def missing_chunks(out: Path, chunks: int) -> list[int]:
    return [number for number in range(chunks) if not (out / chunk_name(number) / INDEX).is_file()]


def prepare(config: TokenizeConfig, source: Path, out: Path) -> Job:
    """Check everything that can be checked before the work, the cheap first, and claim the output folder.

    Raises:
        ConfigError: settings, input, weights or output folder do not fit.
    """
    _check_folder(out)
    weights = find_weights(config.vision.weights)
    vision = weights.describe(config.vision)
    _check_size(config.target_size, vision.downsampling)
    items = load_items(source)
    tokenizer = load_tokenizer(config.tokenizer)
    vocabulary = Vocabulary.from_tokens(tokenizer.get_vocab(), vision.codebook_size)
    file = JobFile(
        source=sha256_file(source)[:16],
        items=len(items),
        vocabulary=vocabulary.fingerprint,
        vision=vision,
        **config.model_dump(include={"chunk_size", "target_size", "crop", "compat", "max_reject_fraction"}),
    )
    _claim(out, file)
    vocabulary.save(out / VOCABULARY)
    return Job(config, source, out, file)


def load_job(out: Path) -> JobFile:
    path = out / JOB
    try:
        return JobFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{out}: no {JOB} in it: not a folder that `python -m unitoken.tokenize run` writes") from None
    except (OSError, pydantic.ValidationError) as error:
        raise ConfigError(f"{path}: not readable: {' '.join(str(error).split())[:200]}") from None


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: expected a folder to write to, found a file")
    if out.is_dir() and not (out / JOB).exists():
        foreign = sorted(path.name for path in out.iterdir() if not path.name.startswith(ASIDE))
        if foreign:
            raise ConfigError(f"{out}: expected an empty folder or one of ours, found {foreign[0]!r} in it and no {JOB}")


def _check_size(target_size: int, downsampling: int) -> None:
    unit = downsampling * LATENTS_PER_GRID_UNIT
    if target_size % unit or not 0 < target_size <= unit * MAX_GRID:
        raise ConfigError(
            f"target_size: expected a multiple of {unit} pixels (2 latents) up to {unit * MAX_GRID}, found {target_size}"
        )


def _claim(out: Path, file: JobFile) -> None:
    path = out / JOB
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = aside(path)
        temporary.write_text(file.model_dump_json(indent=1) + "\n", encoding="utf-8")
        try:
            os.link(temporary, path)  # unlike a rename it fails if another run was first: then the two are compared
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
    theirs, ours = _settings(load_job(out)), _settings(file)
    differences = [f"{key} is {theirs[key]!r} there and {ours[key]!r} now" for key in ours if theirs[key] != ours[key]]
    if differences:
        raise ConfigError(
            f"{out}: was begun with other settings: {'; '.join(differences)}. Choose another folder, or remove this one"
        )


def _settings(file: JobFile) -> dict[str, Any]:
    nested = file.model_dump(exclude={"max_reject_fraction"})
    vision = {f"vision.{key}": value for key, value in nested.pop("vision").items()}
    return nested | vision
