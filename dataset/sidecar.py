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
    """Turn errors of reading a stream's sidecar into a ConfigError."""
    import pyarrow

    try:
        yield
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"stream '{stream}': {folder / SIDECAR}: not readable as Parquet: {one_line(error, 200)}"
        ) from None


@functools.cache
def samples_schema() -> pyarrow.Schema:
    """Return the columns of the sidecar; `sidecar_row` says what they mean."""
    import pyarrow as pa  # 0.2 s, and only readers and writers of a sidecar need it

    return pa.schema(
        [
            ("id", pa.string()),
            ("tokens", pa.uint32()),
            ("target_tokens", pa.uint32()),
            ("images", pa.uint16()),
            ("question_images", pa.uint16()),
            ("image_sizes", pa.list_(pa.uint32())),
            ("generated", pa.list_(pa.bool_())),
        ]
    )


def sidecar_row(record: Record, image_sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return a record's row in the sidecar.

    Args:
        record: with target spans that do not overlap.
        image_sizes: (width, height) in pixels of each original image, (0, 0) if it was not kept.

    Returns:
        id: of the item.
        tokens, target_tokens: the number of tokens, and of those that are trained on.
        images, question_images: the number of images, and of those that are not trained on.
        image_sizes: width, height, width, height, ...
        generated: of each image, whether it is trained on.
    """
    starts, ends = record.target_spans.astype(np.int64).T  # (S,)
    first_tokens = record.image_spans[:, :1]  # (N, 1)
    generated = ((starts <= first_tokens) & (first_tokens < ends)).any(axis=1)  # (N,)
    return {
        "id": record.id,
        "tokens": len(record.tokens),
        "target_tokens": int((ends - starts).sum()),
        "images": len(record.image_spans),
        "question_images": int((~generated).sum()),
        "image_sizes": [side for size in image_sizes for side in size],
        "generated": generated.tolist(),
    }
