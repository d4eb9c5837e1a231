"""The settings that a generation runs with: from the command line, and from what lies beside the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unitoken.codec.conversations import Conversation
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.export_mark import is_export
from unitoken.train.checkpoint.metadata import STAGE
from unitoken.train.config import StageConfig

if TYPE_CHECKING:  # torch
    pass


class Request(NamedTuple):
    """What is asked for."""

    config: StageConfig
    checkpoint: Path
    conversations: list[Conversation]  # a reply each
    out: Path
    drawing: bool
    max_tokens: int
    batch: int


def settings(checkpoint: Path, config: Path | None, overrides: Sequence[str]) -> StageConfig:
    """A stage's settings, from `config` or from beside the checkpoint. Raises ConfigError."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not checkpoint.exists():
        raise ConfigError(f"{checkpoint}: no such checkpoint, and no folder of a run or of an exported model")
    if config is None and not (folder / STAGE).is_file():
        raise ConfigError(f"{folder}: it has no {STAGE}: name the stage's YAML file with --config")
    stage = load_config(StageConfig, config or folder / STAGE, overrides)
    # An exported model brings its tokenizer; where that came from may be gone.
    own = stage.codec is not None and is_export(folder) and (folder / "tokenizer_config.json").is_file()
    if stage.codec is None or not own or any(override.startswith("codec") for override in overrides):
        return stage
    return stage.model_copy(update={"codec": stage.codec.model_copy(update={"tokenizer": str(folder)})})


def check_trained_vocabulary(vocabulary: Vocabulary, trained: Vocabulary, where: str) -> None:
    """The tokenizers must be those that the model was trained with. Raises ConfigError."""
    if vocabulary.fingerprint != trained.fingerprint:
        raise ConfigError(
            f"codec: its vocabulary has fingerprint {vocabulary.fingerprint} ({vocabulary.size} ids), {where} has "
            f"{trained.fingerprint} ({trained.size} ids)"
        )
