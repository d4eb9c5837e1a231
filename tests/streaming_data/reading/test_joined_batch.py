"""A batch arrives from a worker as it was collated."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from support.small_datasets import data_config, make_record, small_vocabulary, write_dataset
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.reading import joined_batch
from unitoken.streaming_data.reading.batch import PackedBatch
from unitoken.streaming_data.reading.joined_batch import JoinedBatch
from unitoken.streaming_data.reading.loader import build_loader


def some_batch() -> PackedBatch:
    tensors = {
        "input_ids": torch.arange(15, dtype=torch.int32).view(3, 5).to(torch.uint16),
        "documents": torch.empty(0, 4, dtype=torch.int32),
        "stream_tokens": torch.arange(6).view(3, 2),
        "pixel_values": torch.arange(27, dtype=torch.uint8).view(1, 3, 3, 3),
        "view_rows": torch.tensor([2]),
    }
    return cast(PackedBatch, {**tensors, "targets": 7, "features": 0})


def assert_equal(found: PackedBatch, expected: PackedBatch) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]  # type: ignore[literal-required]
        if isinstance(value, Tensor):
            assert (other.dtype, other.shape) == (value.dtype, value.shape), name
            assert torch.equal(other, value), name
        else:
            assert other == value, name


def tensors_sent(batch: JoinedBatch) -> tuple[int, JoinedBatch]:
    """Return how many tensors a process sends by handles, and what arrives."""
    sent = []

    def count(tensor: Tensor) -> Any:
        sent.append(tensor)
        return reductions.reduce_tensor(tensor)

    pickler = multiprocessing.reduction.ForkingPickler
    pickler.register(Tensor, count)
    try:
        message = bytes(pickler.dumps(batch))
    finally:
        pickler.register(Tensor, reductions.reduce_tensor)
    return len(sent), pickle.loads(message)


@pytest.mark.parametrize(("limit", "sent"), [(0, 1), (1 << 20, 0)])
def test_a_joined_batch_splits_into_itself(limit: int, sent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one is one tensor in shared memory, and a small one bytes in the message."""
    monkeypatch.setattr(joined_batch, "MESSAGE_BYTES", limit)
    joined = JoinedBatch.of(some_batch())
    assert joined.content.is_shared() is bool(sent)
    count, arrived = tensors_sent(joined)
    assert count == sent
    assert_equal(joined.split(), some_batch())
    assert_equal(arrived.split(), some_batch())
    arrived.split()["stream_tokens"].zero_()  # it may be written to


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_workers_deliver_what_is_collated_here(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_batch, "MESSAGE_BYTES", limit)
    vocabulary = small_vocabulary()
    records = [make_record(f"r{n}", vocabulary, 9 + n % 7, question_images=n % 3) for n in range(40)]
    write_dataset(tmp_path / "data", records, vocabulary)
    batches = {}
    for workers in (0, 2):
        settings = {"packed_length": 64, "global_batch": 2, "workers": workers, "cache": str(tmp_path / "c")}
        config = data_config(tmp_path, {"all": {"local": str(tmp_path / "data")}}, **settings)
        loader = build_loader(config, views=Views(8, 4), vocabulary=vocabulary, batch_packs=2, compat=False)
        batches[workers] = list(loader)
    assert len(batches[0]) == len(batches[2]) > 3
    for here, sent in zip(batches[0], batches[2], strict=True):
        assert_equal(sent, here)
