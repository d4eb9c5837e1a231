"""The rows of a model that reads texts token by token: what each has read, and where its next token goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unitoken.streaming_data.reading.batch import Batch
from unitoken.train.model.decoder import KVCache, causal_bias
from unitoken.train.model.unitoken import UniToken

MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "pixel_values",
    "feature_rows",
    "feature_columns",
    "feature_views",
    "feature_patches",
)
SEEN_STEP = 64  # attention sees a multiple of this many places, so that shapes seldom change


class CachedRows:
    """Rows of a cache of fixed shape. They share passes through the model, but nothing else.

    Positions are kept on the device, and once more here, so that no pass waits for the device.

    Args:
        network: the model.
        rows: number of rows.
        length: the most tokens that a row may hold.
    """

    def __init__(self, network: UniToken, rows: int, length: int) -> None:
        self._network, self._device = network, network.output_weight.device
        # One place more, for padding behind a row that is full.
        self._cache = KVCache(len(network.model.layers), rows, length + 1)
        self._lengths = [0] * rows
        self._positions = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._no_pixels = torch.empty(0)

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self._lengths)

    def grow(self, rows: int) -> None:
        """Add rows, up to so many."""
        added = rows - self.count
        self._cache.grow(rows)
        self._positions = torch.cat([self._positions, self._positions.new_zeros(added)])
        self._lengths += [0] * added

    def open(self, rows: Sequence[int], batch: Batch, ids: slice) -> Tensor:
        """Read a whole prompt into each of some rows, in place of what they hold.

        Args:
            rows: the rows, in the order of the batch.
            batch: the prompts, padded at the right.
            ids: the range of the vocabulary whose logits are needed.

        Returns:
            The logits (R, ids) of the tokens that follow the prompts.
        """
        lengths = (batch["document_ids"] >= 0).sum(1)
        for row, length in zip(rows, lengths.tolist(), strict=True):
            self._lengths[row] = length
        indices, lengths = torch.tensor(rows, device=self._device), lengths.to(self._device)
        self._positions[indices] = lengths
        self._cache.begin(indices, batch["input_ids"].shape[1])
        inputs = {name: batch[name].to(self._device) for name in MODEL_INPUTS}
        self._no_pixels = inputs["pixel_values"][:0]
        columns = (lengths - 1)[:, None]
        return self._network.predict(inputs, None, self._cache, columns=columns, ids=ids)[:, 0]

    def read(self, tokens: Tensor, used: Sequence[bool], ids: slice, columns: Tensor | None = None) -> Tensor:
        """Read T tokens in each of the first R rows; `advance` then says how many of them stay.

        Args:
            tokens: (R, T).
            used: which rows read anything of use.
            ids: the range of the vocabulary whose logits are needed.
            columns: (R, C), the tokens whose followers are wanted; None: the last, so C is 1.

        Returns:
            The logits (R, C, ids) of the tokens that follow.
        """
        rows, count = tokens.shape
        longest = max(length for length, is_used in zip(self._lengths, used, strict=False) if is_used)
        end = min(-(-(longest + count) // SEEN_STEP) * SEEN_STEP, self._cache.length)
        positions = self._positions[:rows, None] + torch.arange(count, device=self._device)
        self._cache.proceed(positions, end)
        bias = causal_bias(positions, end, self._cache.dtype)
        inputs = {"input_ids": tokens, "position_ids": positions, "pixel_values": self._no_pixels}
        return self._network.predict(inputs, bias, self._cache, columns=columns, ids=ids)

    def advance(self, counts: Sequence[int]) -> None:
        """Keep so many of the tokens that the first rows have just read."""
        for row, count in enumerate(counts):
            self._lengths[row] += count
        if len(set(counts)) == 1:
            self._positions[: len(counts)] += counts[0]
        else:
            self._positions[: len(counts)] += torch.tensor(counts, device=self._device)
