"""Rows share passes through the model and nothing else: padding and neighbours change no logits."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from support.decoders import small_config
from unitoken.dataset.record import Record
from unitoken.streaming_data.reading.batch import unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.config import ModelConfig
from unitoken.train.generation.rows import CachedRows
from unitoken.train.model.unitoken import UniToken, build_model

ALL = slice(None)
TEXTS = [np.random.default_rng(n).integers(0, 50, length) for n, length in enumerate((9, 3, 6, 4))]


@pytest.fixture(scope="module")
def model() -> UniToken:
    config = small_config(num_key_value_heads=2)
    model = build_model(config, None, ModelConfig(decoder=config, vision=None))
    load_weights(model, {}, seed=1)
    with torch.no_grad():
        model.output_weight.mul_(50)
    return model.eval()


def open_rows(rows: CachedRows, numbers: Sequence[int], texts: Sequence[np.ndarray]) -> torch.Tensor:
    no_spans = np.zeros((0, 2), np.uint32), np.zeros((0, 4), np.uint32)
    records = [Record("r", text.astype(np.uint16), *no_spans, ()) for text in texts]
    collate = Collate(max(map(len, texts)), None, "none", 0, 0, False)
    return rows.open(numbers, unpack(collate([[record] for record in records])), ALL)


def plain_logits(model: UniToken, text: Sequence[int]) -> torch.Tensor:
    """The logits (T, vocabulary) behind each token of a text, without a cache."""
    ids = torch.tensor(text)[None]
    embedded = model.model.embed_tokens(ids)
    hidden = model.model(embedded, torch.arange(len(text))[None], None)
    return torch.nn.functional.linear(hidden, model.output_weight)[0]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_and_neighbours_change_no_logits(model: UniToken) -> None:
    """Rows of several lengths; a row that rests for a step; a row that takes another text half-way."""
    rows = CachedRows(model, 3, 40)
    texts = [text.tolist() for text in TEXTS]
    scale = float(plain_logits(model, texts[0]).abs().max())
    for logits, text in zip(open_rows(rows, [0, 1, 2], TEXTS[:3]), texts, strict=False):
        close(logits / scale, plain_logits(model, text)[-1] / scale)
    for step, used in enumerate([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 1, 0]]):
        if step == 3:
            texts[1] = TEXTS[3].tolist()
            close(open_rows(rows, [1], TEXTS[3:])[0] / scale, plain_logits(model, texts[1])[-1] / scale)
        tokens = torch.randint(0, 50, (3, 2), generator=torch.Generator().manual_seed(step))
        found = rows.read(tokens, [bool(use) for use in used], ALL, torch.tensor([[0, 1]] * 3))
        rows.advance([2 * use for use in used])
        for row in np.flatnonzero(used):
            texts[row] += tokens[row].tolist()
            close(found[row] / scale, plain_logits(model, texts[row])[-2:] / scale)


@torch.no_grad()
def test_tokens_that_are_not_kept_leave_no_trace(model: UniToken) -> None:
    """As wrong guesses are; here more of them than the row has room for."""
    rows = CachedRows(model, 2, 9)
    open_rows(rows, [0, 1], TEXTS[1:3])
    texts = [text.tolist() for text in TEXTS[1:3]]
    for kept in (1, 0, 2):
        tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(kept))
        found = rows.read(tokens, [True, True], slice(10, 30), torch.tensor([[0], [0]]))
        rows.advance([kept, kept])
        for row, text in enumerate(texts):
            expected = plain_logits(model, [*text, int(tokens[row, 0])])[-1:, 10:30]
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-4)
            text += tokens[row, :kept].tolist()


@torch.no_grad()
def test_rows_are_added_beside_those_that_were_read(model: UniToken) -> None:
    rows = CachedRows(model, 1, 12)
    open_rows(rows, [0], TEXTS[:1])
    rows.grow(2)
    open_rows(rows, [1], TEXTS[1:2])
    found = rows.read(torch.tensor([[5], [6]]), [True, True], ALL)
    for row, (text, token) in enumerate(zip(TEXTS[:2], (5, 6), strict=True)):
        expected = plain_logits(model, [*text.tolist(), token])[-1:]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-4)
