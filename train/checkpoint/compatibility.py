"""Check whether a stage can start from trained weights, or was already finished by the run in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from unitoken.common.config import Config, changed_names, flatten
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import VOCABULARY
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.check import check_sources
from unitoken.streaming_data.sources import open_sources
from unitoken.train.check_tokenizers import describe_vocabulary
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.metadata import (
    MODEL,
    CheckpointMetadata,
    ModelSizes,
    PictureCrops,
    read_metadata,
    read_stage,
)
from unitoken.train.config import StageConfig

# Paths that may differ between the machines of a run.
_MACHINE_PATHS = ("save.folder", "data.cache")
# Settings that the weights of a finished run depend on: not what was written beside them.
_WEIGHT_SETTINGS = ("model.", "init_from", "trainable", "optimizer.", "data.", "precision", "compat", "seed")
# Settings among these that only say how the weights are computed.
_COMPUTE_SETTINGS = ("model.attention", "model.compile", "data.cache", "data.workers", "data.prefetch")
# Sizes that decide the shapes of tensors and the order of layers; the family stands for biases and for the
# kind of the norms of queries and keys.
_DECODER_SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_heads",
    "family",
    "swin_norm",
    "tie_word_embeddings",
)
_VISION_SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
# Constants of the model that no tensor's shape shows.
_DECODER_CONSTANTS = ("rope_theta", "rope_scaling", "rms_norm_eps")
_VISION_CONSTANTS = ("layer_norm_eps",)


def settings_of_all_machines(stage: StageConfig) -> dict[str, Any]:
    """Return the settings that all machines of a run share, by dotted name: all but their own paths."""
    return {
        name: value
        for name, value in flatten(stage.model_dump(mode="json")).items()
        if not name.startswith(_MACHINE_PATHS) and not name.endswith(".local")
    }


def check_finished(run: Path, stage: StageConfig) -> None:
    """Raise ConfigError if a finished run had other settings, with which these would never be trained."""
    finished = read_stage(run)
    if finished is None:
        return
    then, now = flatten(finished.model_dump(mode="json")), flatten(stage.model_dump(mode="json"))
    differences = [
        f"{name} {then.get(name)}, now {now.get(name)}"
        for name in changed_names(then, now)
        if name.startswith(_WEIGHT_SETTINGS) and not name.startswith(_COMPUTE_SETTINGS)
    ]
    if differences:
        raise ConfigError(
            f"{run}: finished with other settings: {'; '.join(differences)}. Choose another save.folder"
        )


class CompleteMetadata(NamedTuple):
    """Metadata of trained weights with all that a model needs, and the stage if it is known."""

    stage: StageConfig | None
    sizes: ModelSizes
    vocabulary: Vocabulary
    pictures: PictureCrops | None


def read_complete_metadata(origin: Path, stage: StageConfig | None = None) -> CompleteMetadata:
    """Read the metadata beside trained weights, completed from the stage.

    Args:
        origin: the file or folder that `find_origin` found.
        stage: the stage that made the weights; None reads it from beside them.

    Raises:
        ConfigError: something is missing in both.
    """
    metadata, stage = read_metadata(origin), stage or read_stage(origin)
    sizes, vocabulary = metadata.sizes, metadata.vocabulary
    if stage is None and (sizes is None or vocabulary is None):
        missing = VOCABULARY if vocabulary is None else MODEL
        raise ConfigError(
            f"{origin}: no {missing} beside it; name the stage that made it: --config yamls/stage1.yaml"
        )
    if vocabulary is None:
        assert stage is not None
        vocabulary = check_sources(open_sources(stage.data), stage.data, views=None)
    if sizes is None:
        assert stage is not None
        decoder, vision = model_configs(stage.model, vocabulary.size)
        sizes = ModelSizes(decoder=decoder, vision=vision)
    return CompleteMetadata(stage, sizes, vocabulary, metadata.pictures)


def check_fits(metadata: CheckpointMetadata, sizes: ModelSizes, vocabulary: Vocabulary, where: str) -> None:
    """Raise ConfigError if weights have another architecture or vocabulary than a stage.

    Args:
        metadata: of the weights; what it does not have is not compared.
        sizes: the stage's sizes.
        vocabulary: the vocabulary of the stage's datasets.
        where: the setting and the weights, for the message.
    """
    if metadata.sizes is not None:
        own_head_dim = metadata.sizes.decoder.head_dim or sizes.decoder.head_dim
        fields = (*_DECODER_SHAPES, "head_size") if own_head_dim else _DECODER_SHAPES
        _check_same(metadata.sizes.decoder, sizes.decoder, fields, where, "decoder")
        if metadata.sizes.vision is not None and sizes.vision is None:
            raise ConfigError(f"{where}: it has a vision tower, this stage's model has none (model.vision)")
        if metadata.sizes.vision is not None and sizes.vision is not None:
            _check_same(metadata.sizes.vision, sizes.vision, _VISION_SHAPES, where, "vision tower")
    if metadata.vocabulary is not None and metadata.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"{where}: it was trained in a vocabulary with fingerprint "
            f"{describe_vocabulary(metadata.vocabulary)}, the datasets have {describe_vocabulary(vocabulary)}"
        )


def check_growth(
    metadata: CheckpointMetadata, sizes: ModelSizes, vocabulary: Vocabulary, where: str
) -> CheckpointMetadata:
    """Check that weights can grow to a stage's size, or have grown to it already.

    Args:
        metadata: of the weights. With a vocabulary they have grown to it, or had room for it.
        sizes: the stage's sizes, grown.
        vocabulary: the vocabulary of the stage's datasets.
        where: the setting and the weights, for the message.

    Returns:
        The metadata of the weights after growth, for `check_fits`.

    Raises:
        ConfigError: they have grown to another vocabulary, or their tokenizer is not that of the datasets.
    """
    if metadata.vocabulary is not None:
        if metadata.vocabulary.fingerprint != vocabulary.fingerprint:
            raise ConfigError(
                f"{where}: a vocabulary grows once: it has grown to that with fingerprint "
                f"{describe_vocabulary(metadata.vocabulary)}, and the datasets have "
                f"{describe_vocabulary(vocabulary)}; start from weights before growth"
            )
        return metadata
    if metadata.sizes is None:
        return metadata
    room, first = metadata.sizes.decoder.vocab_size, vocabulary.new_ids.start
    if not first <= room <= sizes.decoder.vocab_size:
        raise ConfigError(
            f"{where}: it has rows for {room} ids; model.grow needs {first} (the ids of the datasets' "
            f"tokenizer) to {sizes.decoder.vocab_size} (those after growth)"
        )
    decoder = metadata.sizes.decoder.model_copy(update={"vocab_size": sizes.decoder.vocab_size})
    return metadata._replace(sizes=metadata.sizes.model_copy(update={"decoder": decoder}))


def compare_constants(metadata: CheckpointMetadata, sizes: ModelSizes) -> str | None:
    """Describe how constants that no tensor's shape shows differ from the stage's, or return None.

    With other constants the same weights are another model.
    """
    if metadata.sizes is None:
        return None
    differences = _differences(metadata.sizes.decoder, sizes.decoder, _DECODER_CONSTANTS)
    if metadata.sizes.vision is not None and sizes.vision is not None:
        differences += _differences(metadata.sizes.vision, sizes.vision, _VISION_CONSTANTS)
    return f"its model and this stage's have {', '.join(differences)}" if differences else None


def _check_same(found: Config, needed: Config, fields: tuple[str, ...], where: str, part: str) -> None:
    differences = _differences(found, needed, fields)
    if differences:
        raise ConfigError(
            f"{where}: another architecture: its {part} and this stage's have {', '.join(differences)}"
        )


def _differences(found: Config, needed: Config, fields: tuple[str, ...]) -> list[str]:
    """Return the fields whose values differ, each as "field found and needed"."""
    return [
        f"{field} {getattr(found, field)} and {getattr(needed, field)}"
        for field in fields
        if getattr(found, field) != getattr(needed, field)
    ]
