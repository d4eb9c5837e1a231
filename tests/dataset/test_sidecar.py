"""The rows of the samples sidecar."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from unitoken.dataset.record import Record
from unitoken.dataset.sidecar import samples_schema, sidecar_row


def record(target_spans: list[list[int]], image_spans: list[list[int]]) -> Record:
    targets = np.array(target_spans, np.uint32).reshape(-1, 2)
    images = np.array(image_spans, np.uint32).reshape(-1, 4)
    return Record("a", np.arange(100, dtype=np.uint16), targets, images, (b"",) * len(images))


def test_a_row_counts_tokens_and_images() -> None:
    """The first image is asked about; the second one, whose span begins with a target, is generated."""
    row = sidecar_row(record([[50, 80], [90, 95]], [[10, 40, 2, 4], [50, 80, 4, 2]]), [(640, 480), (32, 64)])
    assert row == {
        "id": "a",
        "tokens": 100,
        "target_tokens": 35,
        "images": 2,
        "question_images": 1,
        "image_sizes": [640, 480, 32, 64],
        "generated": [False, True],
    }


def test_a_row_without_images() -> None:
    row = sidecar_row(record([[1, 3]], []), [])
    assert (row["images"], row["question_images"], row["generated"]) == (0, 0, [])


@pytest.mark.parametrize("first", [0, 49, 50, 79, 80, 89, 90, 94, 95, 99])
def test_an_image_is_generated_if_its_first_token_has_a_label(first: int) -> None:
    sample = record([[50, 80], [90, 95]], [[first, 100, 2, 2]])
    assert sidecar_row(sample, [(1, 1)])["generated"] == [bool(sample.labels()[first] >= 0)]


def test_rows_have_the_columns_of_the_sidecar() -> None:
    row = sidecar_row(record([[1, 3]], [[5, 9, 2, 2]]), [(7, 8)])
    assert list(row) == samples_schema().names
    assert pa.Table.from_pylist([row], samples_schema()).to_pylist() == [row]


def test_the_sidecars_columns() -> None:
    assert samples_schema().names == [
        "id",
        "tokens",
        "target_tokens",
        "images",
        "question_images",
        "image_sizes",
        "generated",
    ]
