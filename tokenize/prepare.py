"""Prepare a run: check the settings, cut the input, and claim the output folder for these settings.

A later start with other settings is refused, with both sides of each difference; the same command goes on
where the last one stopped. job.py describes the files that are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from unitoken.codec.image_tokenizer.files import find_image_tokenizer
from unitoken.codec.text import load_tokenizer
from unitoken.codec.tokenizer_vocabulary import is_layout_file, tokenizer_vocabulary
from unitoken.common.config import load_config, parse_config
from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE
from unitoken.common.missing_paths import check_writable
from unitoken.common.urls import without_secrets
from unitoken.dataset.layout import MAX_GRID
from unitoken.dataset.manifest import MANIFEST, VOCABULARY, VisionTokenizer, read_manifest
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT, Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import StoreError, is_url
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.first_items import check_first_items
from unitoken.tokenize.job import (
    INPUT,
    JOB,
    SETTINGS,
    Job,
    JobFile,
    Work,
    dump_json,
    load_file,
    load_job,
    load_rounds,
    parse_json,
)
from unitoken.tokenize.output import Output
from unitoken.tokenize.sources.adapters import adapter_fingerprint, find_adapter
from unitoken.tokenize.sources.reader import Input, InputFile, cut, find_files

# These fit the cores and the GPU of one machine; the run may go on with others on another machine.
MACHINE_SETTINGS: Any = {"threads": True, "vision": {"batch_size"}}


def prepare(config: TokenizeConfig, sources: Sequence[str], out: str) -> Job:
    """Check everything that can be checked before the work, cheap checks first, and claim the output folder.

    Args:
        config: the settings.
        sources: paths, URLs and globs of the input.
        out: path or URL of the dataset.

    Raises:
        ConfigError: settings, input, weights or output folder do not fit.
        StoreError: the output's object store does not answer.
    """
    output = Output(out)
    checked = check_run(config, sources, out)
    input = cut_once(output, checked.files, config.chunk_size)
    if not output.exists(JOB):
        check_first_items(config, input, checked.vocabulary)
    return begin_job(output, describe_job(config, checked, input), input, checked.vocabulary, config)


class Checked(NamedTuple):
    """What the settings name, found and checked."""

    files: list[InputFile]
    vision: VisionTokenizer
    adapter: str  # fingerprint
    vocabulary: Vocabulary


def check_run(config: TokenizeConfig, sources: Sequence[str], out: str) -> Checked:
    """Check settings, input and output without reading an item; the arguments are those of `prepare`.

    Raises:
        ConfigError: as `prepare`.
    """
    check_output(Output(out))
    vision = find_image_tokenizer(config.vision).describe(config.vision)
    _check_size(config.target_size, vision.downsampling)
    adapter = adapter_fingerprint(config.adapter)
    # Load a user's adapter now: a mistake in it must not leave a folder that refuses the corrected one.
    find_adapter(config.adapter)
    files = find_files(sources)
    tokenizer = load_tokenizer(config.tokenizer)
    return Checked(
        files, vision, adapter, tokenizer_vocabulary(tokenizer, vision.codebook_size, config.layout)
    )


def describe_job(config: TokenizeConfig, checked: Checked, input: Input) -> JobFile:
    """Return what the bytes of the dataset depend on."""
    return JobFile(
        source=input.fingerprint,
        vocabulary=checked.vocabulary.fingerprint,
        vision=checked.vision,
        adapter=checked.adapter,
        layout=checked.vocabulary.layout_name,
        **config.model_dump(include=set(JobFile.model_fields) - {"vision", "adapter", "layout"}),
    )


def check_may_go_on(out: str, file: JobFile) -> None:
    """Check that a run may go on in a folder, without looking at its input. Raises ConfigError."""
    output = Output(out)
    if not output.exists(JOB):
        return
    there = load_job(output.store)
    if output.exists(MANIFEST) and not read_manifest(output.store).samples:
        return  # a run would begin anew there
    differences = there.model_copy(update={"source": file.source}).differences(file)
    if differences:
        raise ConfigError(_other_settings(output, differences))


def begin_job(
    output: Output, file: JobFile, input: Input, vocabulary: Vocabulary, config: TokenizeConfig
) -> Job:
    """Claim the output, and write the files that every process and the merge read.

    Raises:
        ConfigError: the output was begun with other settings.
    """
    _clear_empty_dataset(output, file)
    differences = _claim(output, file)
    if differences:
        raise ConfigError(_other_settings(output, differences))
    if not output.exists(INPUT):
        output.store.write(INPUT, dump_json(_without_signatures(input)))
    output.store.write(VOCABULARY, vocabulary.dump())
    output.store.write(SETTINGS, _dump_settings(config))
    return Job(config, Work(input, load_rounds(output.store), config.chunk_size), output.url, file)


def _other_settings(output: Output, differences: list[str]) -> str:
    return (
        f"{output.url}: was begun with other settings: {'; '.join(differences)}. "
        f"Go on with the settings that it was begun with ({SETTINGS} there), or choose another folder"
    )


def load_settings(out: str, config: Path | None, default: Path, overrides: Sequence[str]) -> TokenizeConfig:
    """Load the settings for a command on an existing dataset.

    Args:
        out: path or URL of the dataset.
        config: the settings' file; None for the settings that the dataset was last run with.
        default: the settings' file for a dataset that is older than its settings file.
        overrides: as `vision.batch_size=4`.
    """
    if config is None:
        store = open_store(out)
        with contextlib.suppress(StoreError):  # the command's own reading of the dataset reports it
            text = store.read(SETTINGS).decode(errors="replace")
            return parse_config(TokenizeConfig, text, f"{store.url}/{SETTINGS}", overrides)
    return load_config(TokenizeConfig, config or default, overrides)


def check_output(output: Output) -> None:
    """Raise ConfigError for a place that is no folder, or holds something else than a run of ours."""
    try:
        output.url.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{output.url}: the name of a dataset's folder must be UTF-8: the writer of shards needs that"
        ) from None
    if not is_url(output.url) and Path(output.url).exists() and not Path(output.url).is_dir():
        raise ConfigError(f"{output.url}: expected a folder to write to, found a file; name another folder")
    if not is_url(output.url):
        check_writable("--out-dir", Path(output.url))
    if output.exists(JOB):
        return
    for name in output.store.sizes():
        if not any(part.startswith(ASIDE) for part in name.split("/")):
            raise ConfigError(
                f"{output.url}: expected an empty folder or one of ours, found {name!r} in it and no {JOB}"
            )


def cut_once(output: Output, files: list[InputFile], chunk_size: int) -> Input:
    """Cut the input into pieces, or take the pieces of an earlier start.

    To scan millions of items again would take minutes, and every rank of a cluster starts by this.
    """
    if output.exists(INPUT) and output.exists(JOB) and load_job(output.store).chunk_size == chunk_size:
        known = load_file(Input, output.store, INPUT)
        if [_content(file) for file in known.files] == [_content(file) for file in files]:
            return Input(files=files, pieces=known.pieces)
    return cut(files, chunk_size)


def _content(file: InputFile) -> tuple[str, int, str]:
    return file.format, file.size, file.version


def _claim(output: Output, file: JobFile) -> list[str]:
    """Write `job.json` unless it is there. Returns how the file that is there differs from ours."""
    there = output.claim(JOB, dump_json(file))
    return parse_json(JobFile, there, f"{output.url}/{JOB}").differences(file)


def _clear_empty_dataset(output: Output, file: JobFile) -> None:
    """Remove a finished dataset without samples that other settings made.

    Such a dataset is the result of a mistake, and must not refuse the corrected command.
    """
    if not output.exists(MANIFEST) or read_manifest(output.store).samples:
        return
    if not load_job(output.store).differences(file):
        return
    # The manifest first: without it the dataset is not finished, whenever this is killed.
    for name in sorted(output.store.sizes(), key=lambda name: name != MANIFEST):
        output.store.delete(name)
    if not is_url(output.url):
        for folder in Path(output.url).glob("*/"):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_size(target_size: int, downsampling: int) -> None:
    unit = downsampling * LATENTS_PER_GRID_UNIT
    if target_size % unit or not 0 < target_size <= unit * MAX_GRID:
        raise ConfigError(
            f"target_size: expected a multiple of {unit} pixels (2 latents) up to {unit * MAX_GRID}, "
            f"found {target_size}"
        )


# --- what is stored with the dataset ---


def _dump_settings(config: TokenizeConfig) -> bytes:
    """Return `settings.yaml`: with absolute paths, for commands that are run from elsewhere."""
    path, _, function = config.adapter.rpartition(":")
    adapter = f"{_absolute(path)}:{function}" if path else config.adapter
    vision = config.vision.model_copy(update={"weights": _absolute(config.vision.weights)})
    stored = config.model_copy(
        update={
            "tokenizer": _absolute(config.tokenizer),
            "vision": vision,
            "adapter": adapter,
            "layout": _absolute(config.layout) if is_layout_file(config.layout) else config.layout,
        }
    )
    fields = stored.model_dump(mode="json", exclude=MACHINE_SETTINGS)
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).encode()


def _without_signatures(input: Input) -> Input:
    """Return the input with absolute paths and without secrets.

    A URL's signature or password would let every reader of the dataset read the input.
    """
    files = [file.model_copy(update={"name": without_secrets(_absolute(file.name))}) for file in input.files]
    return input.model_copy(update={"files": files})


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if not is_url(name) and Path(name).exists() else name
