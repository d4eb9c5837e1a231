"""A batch travels small, and becomes on the device what a model reads."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.small_datasets import make_record, small_vocabulary
from unitoken.dataset.record import IGNORED, Record, spans_of
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.reading.batch import (
    Batch,
    PackedBatch,
    num_packs,
    num_targets,
    num_tokens,
    split_batch,
    target_places,
    unpack,
)
from unitoken.streaming_data.reading.collate import Collate

VOCABULARY = small_vocabulary()
F = 4


def record(name: str, text: int = 6, questions: int = 0, answers: int = 0) -> Record:
    return make_record(name, VOCABULARY, text, questions, answers)


def collate(packs: list[list[Record]], length: int = 80, size: int = VOCABULARY.size) -> PackedBatch:
    views = Views(image_size=8, patch_size=4)
    return Collate(
        length, views, "questions", VOCABULARY.separator, VOCABULARY.newline, False, vocabulary_size=size
    )(packs)


@pytest.mark.parametrize(("size", "most"), [(1 << 16, 4), ((1 << 16) + 1, 6)])
def test_a_token_travels_in_few_bytes(size: int, most: int) -> None:
    """Pixels left out; as tensors of a batch that a model reads it would be 29."""
    packs = [[record(f"{row}-{n}", text=20, questions=n % 2) for n in range(4)] for row in range(4)]
    tokens = num_tokens(collate(packs, length=400))
    batch = collate(packs, length=tokens // 4, size=size)  # packs of equal length, without padding
    tensors = [value for name, value in batch.items() if isinstance(value, Tensor) and name != "pixel_values"]
    assert num_tokens(batch) == batch["input_ids"].numel() == tokens
    assert sum(tensor.nbytes for tensor in tensors) <= most * tokens


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1])
def test_the_largest_ids_survive(size: int) -> None:
    tokens = np.array([1, size - 1, 2], np.uint32)
    spans, none = np.array([[1, 2]], np.uint32), np.empty((0, 4), np.uint32)
    batch = unpack(collate([[Record("a", tokens, spans, none, ())]], length=4, size=size))
    assert batch["input_ids"].tolist() == [[1, size - 1, 2, 0]]
    assert batch["labels"].tolist() == [[IGNORED, size - 1, IGNORED, IGNORED]]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 1 << 9)), max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_documents_and_spans_expand_to_their_places(packs: list[list[tuple[int, int, int]]]) -> None:
    """Each document is its length, its kind, and which of its tokens are in the loss, as bits."""
    length = 40
    ids = torch.arange(len(packs) * length).view(len(packs), length)
    expected = {
        "labels": torch.full_like(ids, IGNORED),
        "position_ids": torch.zeros_like(ids),
        "document_ids": torch.full_like(ids, -1).int(),
        "kinds": torch.full_like(ids, -1).to(torch.int8),
    }
    documents, targets = [], []
    for row, pack in enumerate(packs):
        start = 0
        for number, (tokens, kind, bits) in enumerate(pack):
            end = start + tokens
            mask = np.array([place > 0 and bool(bits >> place & 1) for place in range(tokens)])
            documents.append((row, start, end, kind))
            targets += [(row, start + first, start + last) for first, last in spans_of(mask).tolist()]
            expected["labels"][row, start:end][torch.from_numpy(mask)] = ids[row, start:end][mask]
            expected["position_ids"][row, start:end] = torch.arange(tokens)
            expected["document_ids"][row, start:end] = number
            expected["kinds"][row, start:end] = 2 * kind
            start = end
    batch = collate([[] for _ in packs], length)
    batch["input_ids"] = ids.int()
    batch["documents"] = torch.tensor(documents, dtype=torch.int32).reshape(-1, 4)
    batch["target_spans"] = torch.tensor(targets, dtype=torch.int32).reshape(-1, 3)
    batch["targets"] = sum(end - start for _, start, end in targets)
    found = unpack(batch)
    for name, value in (expected | target_places(expected["labels"])).items():
        assert torch.equal(found[name], value), name


def in_the_batch(parts: list[Batch]) -> Batch:
    """Join microbatches, with the rows and views counted from the batch's first."""
    rows = views = 0
    for part in parts:
        part["feature_views"] = part["feature_views"] + views
        for name in ("view_rows", "feature_rows", "target_rows"):
            part[name] = part[name] + rows
        rows, views = rows + num_packs(part), views + len(part["view_rows"])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_microbatches_together_are_the_batch(size: int) -> None:
    packs = [
        [record("a", questions=1)],
        [record("b")],
        [record("c", questions=2)],
        [record("d", questions=1), record("e", answers=1)],
        [record("f")],
    ]
    batch = collate(packs)
    parts = [unpack(part) for part in split_batch(batch, size)]
    assert [num_packs(part) for part in parts] == [min(size, 5 - begin) for begin in range(0, 5, size)]
    for part in parts:
        assert all(0 <= row < num_packs(part) for row in part["view_rows"])
        assert (part["feature_rows"] == part["view_rows"][part["feature_views"]]).all()
        first = part["feature_patches"] == 0
        before = part["input_ids"][part["feature_rows"][first], part["feature_columns"][first] - 1]
        assert (before == VOCABULARY.separator).all()
    joined = in_the_batch(parts)
    for name, value in unpack(batch).items():
        assert torch.equal(joined[name], value), name


def test_tokens_are_counted_as_the_loss_counts_them() -> None:
    packs = [[record("a", questions=1), record("b")], [record("c", text=3)]]
    batch = collate(packs)
    tokens = sum(len(rec.tokens) for pack in packs for rec in pack) + 1 + F
    trained = sum(int((rec.labels() != IGNORED).sum()) for pack in packs for rec in pack)
    assert (num_tokens(batch), num_targets(batch), num_targets(unpack(batch))) == (tokens, trained, trained)
    assert trained == int((unpack(batch)["labels"][:, 1:] != IGNORED).sum())
    assert sum(map(num_targets, split_batch(batch, 1))) == trained


def test_target_places_are_those_of_the_labels_in_order() -> None:
    packs = [[record("a", questions=1), record("b")], [record("c", text=3)], [record("d", answers=1)]]
    batch = unpack(collate(packs))
    assert len(batch["target_rows"])
    for name, expected in target_places(batch["labels"]).items():
        assert torch.equal(batch[name], expected)
