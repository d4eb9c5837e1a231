"""The settings of `generate`: from the command line, and from the files beside the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unitoken.codec.conversations import Conversation
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.common.missing_paths import where_looked
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.locations import is_export
from unitoken.train.checkpoint.metadata import STAGE, metadata_folder
from unitoken.train.config import StageConfig


class Request(NamedTuple):
    """What `generate` is asked to do.

    Attributes:
        config: the settings of the stage that trained the model.
        checkpoint: anything that `init_from` takes.
        conversations: the prompts; there is one reply to each, so repeated prompts get several.
        out: the folder for the replies.
        drawing: a reply is one image and nothing else.
        max_tokens: the most tokens of a reply that is not a drawing.
        batch: replies at a time.
    """

    config: StageConfig
    checkpoint: Path
    conversations: list[Conversation]
    out: Path
    drawing: bool
    max_tokens: int
    batch: int


def settings(checkpoint: Path, config: Path | None, overrides: Sequence[str]) -> StageConfig:
    """Load the settings of the stage that trained a model.

    Args:
        checkpoint: a checkpoint, or a folder of a run or an exported model.
        config: the stage's YAML file; None: the one beside the checkpoint.
        overrides: `key=value`, as in training.

    Raises:
        ConfigError: there is no such file, or the settings are wrong.
    """
    folder = metadata_folder(checkpoint)
    if not checkpoint.exists():
        hint = where_looked(checkpoint)
        raise ConfigError(
            f"{checkpoint}: no such checkpoint, and no folder of a run or of an exported model{hint}"
        )
    if config is None and not (folder / STAGE).is_file():
        raise ConfigError(f"{folder}: it has no {STAGE}: name the stage's YAML file with --config")
    stage = load_config(StageConfig, config or folder / STAGE, overrides)
    if stage.codec is None or any(override.startswith("codec") for override in overrides):
        return stage
    # An exported model contains its tokenizer; the folder that the settings name may no longer exist.
    if not is_export(folder) or not (folder / "tokenizer_config.json").is_file():
        return stage
    return stage.model_copy(update={"codec": stage.codec.model_copy(update={"tokenizer": str(folder)})})


def check_trained_vocabulary(vocabulary: Vocabulary, trained: Vocabulary, where: str) -> None:
    """Raise ConfigError unless `vocabulary`, of the tokenizers, is the one that the model was trained with.

    Args:
        vocabulary: of the tokenizers in `codec`.
        trained: of the model.
        where: how the message names the model.
    """
    if vocabulary.fingerprint != trained.fingerprint:
        raise ConfigError(
            f"codec: its vocabulary has fingerprint {vocabulary.fingerprint} ({vocabulary.size} ids), "
            f"{where} has {trained.fingerprint} ({trained.size} ids)"
        )
