"""Everything that can be found wrong with a mixture before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import load_vocabulary
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.plan.feature_cost import check_images_fit
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource

if TYPE_CHECKING:
    from unitoken.dataset.vision_views import Views


def check_sources(sources: Sequence[StreamSource], config: DataConfig, views: Views | None) -> Vocabulary:
    """Check all that can be known of the datasets before they are read; return their common vocabulary.

    Args:
        sources: the datasets of `config`, as `open_sources` returns them.
        config: the `data:` part of a stage.
        views: how the vision tower sees an image; None for a model without one.

    Raises:
        ConfigError: no image of a stream fits into a pack.
    """
    for source in sources:
        check_images_fit(source, config, views)
    return load_vocabulary(sources[0].folder, sources[0].manifest.vocabulary)


def other_codes(sources: Sequence[StreamSource]) -> list[str]:
    """A warning each, no error: bf16 changes one code in eight, which may be meant; a migrated dataset's weights are unknown."""
    lines = []
    with_images = [source for source in sources if source.manifest.images]
    for other in with_images[1:]:
        first = with_images[0]
        ours, theirs = first.manifest.vision.model_dump(), other.manifest.vision.model_dump()
        if differences := [
            f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]
        ]:
            names = f"streams '{first.name}' and '{other.name}'"
            lines.append(f"{names} have image codes of different tokenizers: {', '.join(differences)}")
    return lines


def uneven_proportions(config: DataConfig) -> list[str]:
    """A warning where proportions look like shares of 1 and are not."""
    given = {
        name: stream.proportion for name, stream in config.streams.items() if stream.proportion is not None
    }
    total = sum(given.values())
    if not given or abs(total - 1) < 1e-6 or all(value.is_integer() for value in given.values()):
        return []  # 3 to 1 is meant as it is said
    shares = ", ".join(f"{name} {value / total:.1%}" for name, value in given.items())
    return [f"the proportions sum to {total:g} and not to 1: the shares are {shares}"]


def check_streams_vocabulary(sources: Sequence[StreamSource], vocabulary: Vocabulary, owner: str) -> None:
    """Raise ConfigError unless the streams are tokenized in `vocabulary`, which is `owner`'s."""
    for source in sources:
        if source.manifest.vocabulary != vocabulary.fingerprint:
            raise ConfigError(
                f"stream '{source.name}': {source.folder} has a vocabulary with fingerprint {source.manifest.vocabulary} "
                f"({load_vocabulary(source.folder).size} tokens), {owner} has {vocabulary.fingerprint} ({vocabulary.size} tokens)"
            )
