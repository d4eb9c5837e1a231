"""Whether a stage can go on from, or is already done by, what is in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from unitoken.common.config import Config, changed_names, flatten
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import VOCABULARY
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.check import check_mixture
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.metadata import MODEL, About, ModelSizes, PictureCrops, read_about, read_stage
from unitoken.train.config import StageConfig


def shared(stage: StageConfig) -> dict[str, Any]:
    """The settings by their dotted names, without the places of data and folders, which machines may name in their own way."""
    places = ("save.folder", "data.cache")
    return {
        name: value
        for name, value in flatten(stage.model_dump(mode="json")).items()
        if not name.startswith(places) and not name.endswith(".local")
    }


# What the weights of a finished run depend on: not how it was computed, nor what was written beside.
_OF_WEIGHTS = ("model.", "init_from", "trainable", "optimizer.", "data.", "precision", "compat", "seed")


_OF_COMPUTING = ("model.attention", "model.compile", "data.cache", "data.workers", "data.prefetch")


def check_finished(run: Path, stage: StageConfig) -> None:
    """Raises ConfigError where a finished run was another one: taken for done, what is asked for would never be trained."""
    made_by = read_stage(run)
    then, now = (flatten(one.model_dump(mode="json")) if one is not None else {} for one in (made_by, stage))
    names = [
        name
        for name in changed_names(then, now)
        if name.startswith(_OF_WEIGHTS) and not name.startswith(_OF_COMPUTING)
    ]
    found = [f"{name} {then.get(name)}, now {now.get(name)}" for name in names]
    if made_by is not None and found:
        raise ConfigError(
            f"{run}: finished with other settings: {'; '.join(found)}. Choose another save.folder"
        )


class Whole(NamedTuple):
    """`About` with nothing missing that a model needs."""

    stage: StageConfig | None
    sizes: ModelSizes
    vocabulary: Vocabulary
    pictures: PictureCrops | None


def read_whole(origin: Path, stage: StageConfig | None = None) -> Whole:
    """What `origin` says of itself; what it does not say, `stage` says. Raises ConfigError where neither does."""
    about, stage = read_about(origin), stage or read_stage(origin)
    if stage is None and (about.sizes is None or about.vocabulary is None):
        missing = VOCABULARY if about.vocabulary is None else MODEL
        raise ConfigError(
            f"{origin}: no {missing} beside it; name the stage that made it: --config yamls/stage1.yaml"
        )
    sizes, vocabulary = about.sizes, about.vocabulary
    if sizes is None:
        assert stage is not None
        decoder, vision = model_configs(stage.model)
        sizes = ModelSizes(decoder=decoder, vision=vision)
    if vocabulary is None:
        assert stage is not None
        vocabulary = check_mixture(stage.data)
    return Whole(stage, sizes, vocabulary, about.pictures)


# What gives tensors their shapes and layers their order; `other_constants` has the rest.
_DECODER = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_heads",
    "swin_norm",
)


_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


def check_fits(about: About, sizes: ModelSizes, vocabulary: Vocabulary, where: str) -> None:
    """Raises ConfigError where weights are of another architecture, or were trained in another vocabulary, than is needed."""
    if about.sizes is not None:
        _same(about.sizes.decoder, sizes.decoder, _DECODER, where, "decoder")
        if about.sizes.vision is not None and sizes.vision is None:
            raise ConfigError(f"{where}: it has a vision tower, this stage's model has none (model.vision)")
        if about.sizes.vision is not None and sizes.vision is not None:
            _same(about.sizes.vision, sizes.vision, _VISION, where, "vision tower")
    if about.vocabulary is not None and about.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"{where}: it was trained in a vocabulary with fingerprint {about.vocabulary.fingerprint} "
            f"({about.vocabulary.size} tokens), the datasets have {vocabulary.fingerprint} ({vocabulary.size} tokens)"
        )


def other_constants(about: About, sizes: ModelSizes) -> str | None:
    """Numbers that no tensor shows and that differ: the same weights are another model with them."""
    if about.sizes is None:
        return None
    found = _differences(about.sizes.decoder, sizes.decoder, ("rope_theta", "rms_norm_eps"))
    if about.sizes.vision is not None and sizes.vision is not None:
        found += _differences(about.sizes.vision, sizes.vision, ("layer_norm_eps",))
    return f"its model and this stage's have {', '.join(found)}" if found else None


def _same(found: Config, needed: Config, fields: tuple[str, ...], where: str, part: str) -> None:
    if differences := _differences(found, needed, fields):
        raise ConfigError(
            f"{where}: another architecture: its {part} and this stage's have {', '.join(differences)}"
        )


def _differences(found: Config, needed: Config, fields: tuple[str, ...]) -> list[str]:
    return [
        f"{field} {getattr(found, field)} and {getattr(needed, field)}"
        for field in fields
        if getattr(found, field) != getattr(needed, field)
    ]
