"""The samples sidecar `samples.parquet`: one row a sample, in the order of the index."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unitoken.common.errors import ConfigError, one_line
from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.record import Record

if TYPE_CHECKING:
    import pyarrow


@contextlib.contextmanager
def sidecar_errors(stream: str, folder: Path) -> Iterator[None]:
    """What goes wrong while a stream's sidecar is read is one ConfigError."""
    import pyarrow

    try:
        yield
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        words = one_line(error, 200)
        raise ConfigError(
            f"stream '{stream}': {folder / SIDECAR}: not readable as Parquet: {words}"
        ) from None


@functools.cache
def samples_schema() -> pyarrow.Schema:
    """The sidecar's columns. `question_images` counts the images that are not generated (not trained on)."""
    import pyarrow as pa  # 0.2 s, and only those who read or write a sidecar need it

    return pa.schema(
        [
            ("id", pa.string()),
            ("tokens", pa.uint32()),
            ("target_tokens", pa.uint32()),
            ("images", pa.uint16()),
            ("question_images", pa.uint16()),
            (
                "image_sizes",
                pa.list_(pa.uint32()),
            ),  # width, height, width, height, ... of the originals in pixels
            ("generated", pa.list_(pa.bool_())),  # of each image: is it trained on
        ]
    )


def sidecar_row(record: Record, image_sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return a record's row of the sidecar.

    Args:
        record: the sample; its target spans are in order and do not overlap.
        image_sizes: width and height of each original in pixels.
    """
    targets = record.target_spans.astype(np.int64)  # (S, 2)
    starts = record.image_spans[:, :1]  # (N, 1): the first token of each image
    generated = ((targets[:, 0] <= starts) & (starts < targets[:, 1])).any(1)  # (N,)
    return {
        "id": record.id,
        "tokens": len(record.tokens),
        "target_tokens": int((targets[:, 1] - targets[:, 0]).sum()),
        "images": len(record.image_spans),
        "question_images": int((~generated).sum()),
        "image_sizes": [side for size in image_sizes for side in size],
        "generated": generated.tolist(),
    }
