"""Checks of a mixture that need no sample to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unitoken.dataset.manifest import load_vocabulary
from unitoken.dataset.vocabulary import Vocabulary, check_same_vocabulary
from unitoken.streaming_data.plan.feature_cost import check_images_fit
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource

if TYPE_CHECKING:
    from unitoken.dataset.vision_views import Views


def check_sources(sources: Sequence[StreamSource], config: DataConfig, views: Views | None) -> Vocabulary:
    """Check that the datasets can be packed with these settings, and return their common vocabulary.

    Args:
        sources: the datasets of `config`, as `open_sources` returns them.
        config: the `data:` part of a stage.
        views: how the vision tower sees an image; None for a model without a vision tower.

    Raises:
        ConfigError: a stream has images, and none of them fits into a pack.
    """
    vocabulary = vocabulary_of(sources)
    for source in sources:
        check_images_fit(source, config, views, vocabulary)
    return vocabulary


def vocabulary_of(sources: Sequence[StreamSource]) -> Vocabulary:
    """Read the vocabulary of datasets that `open_sources` found to have the same. Raises ConfigError."""
    return load_vocabulary(sources[0].folder, sources[0].manifest.vocabulary)


def check_streams_vocabulary(sources: Sequence[StreamSource], vocabulary: Vocabulary, owner: str) -> None:
    """Raise ConfigError unless the streams were tokenized with `vocabulary`, which is that of `owner`."""
    for source in sources:
        if source.manifest.vocabulary != vocabulary.fingerprint:
            theirs = load_vocabulary(source.folder)
            check_same_vocabulary(theirs, f"stream '{source.name}': {source.folder}", vocabulary, owner)


def other_codes(sources: Sequence[StreamSource]) -> list[str]:
    """Return a warning for each stream whose image tokenizer differs from the first stream's.

    This is not an error, because it can be intended: the same tokenizer in bf16 gives another code for one
    image token in eight, and the tokenizer's weights are unknown for a migrated dataset.
    """
    warnings = []
    with_images = [source for source in sources if source.manifest.images]
    for other in with_images[1:]:
        first = with_images[0]
        ours, theirs = first.manifest.vision.model_dump(), other.manifest.vision.model_dump()
        differences = [f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
        if differences:
            names = f"streams '{first.name}' and '{other.name}'"
            warnings.append(f"{names} have image codes of different tokenizers: {', '.join(differences)}")
    return warnings


def uneven_proportions(config: DataConfig) -> list[str]:
    """Return a warning if the proportions look like shares of 1 and do not sum to 1."""
    given = {
        name: stream.proportion for name, stream in config.streams.items() if stream.proportion is not None
    }
    total = sum(given.values())
    if not given or abs(total - 1) < 1e-6 or all(value.is_integer() for value in given.values()):
        return []  # whole numbers such as 3 and 1 are ratios
    shares = ", ".join(f"{name} {value / total:.1%}" for name, value in given.items())
    return [f"the proportions sum to {total:g} and not to 1: the shares are {shares}"]
