"""The positions that images take in a pack, and a check that a stream's images fit into packs at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from unitoken.common.errors import ConfigError
from unitoken.dataset.kinds import are_of_kinds, kind_numbers
from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.sidecar import sidecar_errors
from unitoken.streaming_data.arrays import Integers

if TYPE_CHECKING:
    from unitoken.dataset.vision_views import Views
    from unitoken.dataset.vocabulary import Vocabulary
    from unitoken.streaming_data.settings import DataConfig, StreamConfig
    from unitoken.streaming_data.sources import StreamSource

CountT = TypeVar("CountT", int, Integers)

CHECKED_ROWS = 1 << 16  # rows of the sidecar that the check reads at once: most often the first image fits


def feature_cost(features: CountT) -> CountT:
    """Return the positions that an image's features take besides its tokens: a separator and the features."""
    return 1 + features


def limit_of(stream: StreamConfig, packed_length: int) -> int:
    """Return the most positions that a sample of the stream may take in a pack."""
    return min(stream.max_tokens or packed_length, packed_length)


def check_images_fit(
    source: StreamSource, config: DataConfig, views: Views | None, vocabulary: Vocabulary
) -> None:
    """Check that a stream's smallest question image and smallest generated image fit into a pack.

    A sample also has text, and other images may be larger: over-long samples are counted when the plan is
    made.

    Raises:
        ConfigError: the smallest image is too long.
    """
    if not source.manifest.images:
        return
    with sidecar_errors(source.name, source.folder):
        source.check_file(SIDECAR)
        uses = _image_uses(source)
        if "question" in uses:
            with_features = views if config.continuous != "none" else None
            _check_fits(source, config, with_features, vocabulary, "question")
        if "generated" in uses:
            with_features = views if config.continuous == "all" else None
            _check_fits(source, config, with_features, vocabulary, "generated")


def _check_fits(
    source: StreamSource, config: DataConfig, views: Views | None, vocabulary: Vocabulary, use: str
) -> None:
    """Raise ConfigError if the smallest image of a use is too long; `views` is None if it has no features."""
    limit, block = limit_of(source.config, config.packed_length), _smallest_block(source, vocabulary)
    cost = _smallest_cost(source, use, limit - block, views) if views is not None else 0
    if block + cost > limit:
        key = f"streams.{source.name}.max_tokens" if limit < config.packed_length else "packed_length"
        parts = f"{block} tokens" + (f", a separator and {cost - feature_cost(0)} features" if cost else "")
        raise ConfigError(
            f"data.{key}: {limit} is too short for any {use} image of stream '{source.name}': "
            f"the smallest takes {block + cost} ({parts})"
        )


def _smallest_block(source: StreamSource, vocabulary: Vocabulary) -> int:
    """Return the tokens of a stream's smallest image."""
    latent, image = source.manifest.vision.downsampling, vocabulary.image
    return min(image.count(height // latent, width // latent) for width, height in source.manifest.crops())


def _image_uses(source: StreamSource) -> set[str]:
    """Return the uses of images in samples of the stream's kinds: "question", "generated", or both."""
    import pyarrow.parquet

    uses: set[str] = set()
    with pyarrow.parquet.ParquetFile(source.folder / SIDECAR) as sidecar:
        for batch in sidecar.iter_batches(CHECKED_ROWS, columns=["images", "question_images"]):
            images, questions = (batch.column(name).to_numpy() for name in ("images", "question_images"))
            used = are_of_kinds(kind_numbers(images, questions), source.config.kinds)
            if (questions * used).any():
                uses.add("question")
            if ((questions < images) & used).any():
                uses.add("generated")
            if len(uses) == 2:
                break
    return uses


def _smallest_cost(source: StreamSource, use: str, room: int, views: Views) -> int:
    """Return the feature cost of an image that fits into `room`, or else of the smallest of that use."""
    import pyarrow.parquet

    if not views.anyres:
        return feature_cost(views.features)
    fewest = 1 << 62  # features
    with pyarrow.parquet.ParquetFile(source.folder / SIDECAR) as sidecar:
        if "generated" not in sidecar.schema_arrow.names:
            return feature_cost(views.features)  # `read_lengths` reports the missing column
        for batch in sidecar.iter_batches(CHECKED_ROWS, columns=["image_sizes", "generated"]):
            sizes = batch.column("image_sizes").flatten().to_numpy().reshape(-1, 2).astype(np.int64)
            generated = batch.column("generated").flatten().to_numpy(zero_copy_only=False).astype(bool)
            counts = views.counts(sizes[generated == (use == "generated")])
            fewest = int(counts.min(initial=fewest))
            if feature_cost(fewest) <= room:
                break
    return feature_cost(fewest)
