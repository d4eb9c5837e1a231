"""How long a sample may be in a pack, and whether an image of the data can be in one at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.sidecar import sidecar_errors
from unitoken.dataset.vocabulary import image_tokens

if TYPE_CHECKING:
    from unitoken.dataset.vision_views import Views
    from unitoken.streaming_data.settings import DataConfig, StreamConfig
    from unitoken.streaming_data.sources import StreamSource

ROWS = 1 << 16  # of the sidecar, read at once: most often the first image fits


def limit_of(stream: StreamConfig, packed_length: int) -> int:
    """The most positions that a sample of the stream may take in a pack."""
    return min(stream.max_tokens or packed_length, packed_length)


def check_images_fit(source: StreamSource, config: DataConfig, views: Views | None) -> None:
    """Raise ConfigError where a stream has images to ask about, or to draw, and the smallest is too long for a pack.

    A sample has text, too, and other images may be larger: what is over-long all the same is counted when the plan is made.
    """
    if not source.manifest.images:
        return
    with sidecar_errors(source.name, source.folder):
        _check_images_fit(source, config, views)


def _check_images_fit(source: StreamSource, config: DataConfig, views: Views | None) -> None:
    source.check(SIDECAR)
    limit, block = limit_of(source.config, config.packed_length), _block(source)
    found = _found(source)
    for kind, brings in (("asked about", config.continuous != "none"), ("drawn", config.continuous == "all")):
        if kind not in found:
            continue
        features = _features(source, kind, limit - block, views) if brings and views is not None else 0
        if block + features > limit:
            key = f"streams.{source.name}.max_tokens" if limit < config.packed_length else "packed_length"
            parts = f"{block} tokens" + (f", a separator and {features - 1} features" if features else "")
            raise ConfigError(
                f"data.{key}: {limit} is too short for any image of stream '{source.name}' that is {kind}: "
                f"the smallest takes {block + features} ({parts})"
            )


def _block(source: StreamSource) -> int:
    """Tokens of the smallest image of a stream."""
    latent = source.manifest.vision.downsampling
    return min(image_tokens(height // latent, width // latent) for width, height in source.manifest.crops())


def _found(source: StreamSource) -> set[str]:
    """What is done with images in the samples of the kinds wanted: asked about, drawn, or both. Rows are many, memory is not."""
    import pyarrow.parquet

    kinds, found = source.config.kinds, set()
    with pyarrow.parquet.ParquetFile(source.folder / SIDECAR) as sidecar:
        for batch in sidecar.iter_batches(ROWS, columns=["images", "question_images"]):
            images, asked = (batch.column(name).to_numpy() for name in ("images", "question_images"))
            drawn = asked < images
            if kinds is not None:
                wanted = np.where(drawn, "generation" in kinds, "understanding" in kinds)
                asked, drawn = asked * wanted, drawn & wanted
            found |= ({"asked about"} if asked.any() else set()) | ({"drawn"} if drawn.any() else set())
            if len(found) == 2:
                break
    return found


def _features(source: StreamSource, kind: str, room: int, views: Views) -> int:
    """Separator and features of an image that fits into `room`, or else of the smallest."""
    import pyarrow.parquet

    if not views.anyres:
        return 1 + views.features
    smallest = 1 << 62
    with pyarrow.parquet.ParquetFile(source.folder / SIDECAR) as sidecar:
        if "generated" not in sidecar.schema_arrow.names:
            return 1 + views.features  # what is missing is said when the lengths are read
        for batch in sidecar.iter_batches(ROWS, columns=["image_sizes", "generated"]):
            sizes = batch.column("image_sizes").flatten().to_numpy().reshape(-1, 2).astype(np.int64)
            drawn = batch.column("generated").flatten().to_numpy(zero_copy_only=False).astype(bool)
            counts = views.counts(sizes[drawn == (kind == "drawn")])
            smallest = min(smallest, 1 + int(counts.min(initial=smallest - 1)))
            if smallest <= room:
                break
    return smallest
