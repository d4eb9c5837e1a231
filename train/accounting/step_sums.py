"""What a step measures: sums that stay on the device until its end, then one all-reduce and one transfer to the host.

    of each microbatch:  losses, cross-entropy by kind of token and document, tokens by stream, what FLOPs are counted from
    of each rank:        the most memory it has held; a signal that asks it to end

The cross-entropies are those of the loss itself, so `loss_text` and `loss_image`, weighted by their tokens, are `ce`;
so are the three kinds of documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unitoken.common.interruption import received_signal
from unitoken.streaming_data.reading.collate import KINDS, Batch, num_packs
from unitoken.train.distributed import ranks

BUCKETS = 2 * len(KINDS)  # the values of batch["kinds"]
# Losses by what the token is, and by what the document is; "text" documents have no image.
NAMES = {
    "loss_text": (0, 2, 4),
    "loss_image": (1, 3, 5),
    "loss_text_only": (0, 1),
    "loss_understanding": (2, 3),
    "loss_generation": (4, 5),
}
HEAD = 6  # weight; loss, ce and z times it; squares; views


class Measured(NamedTuple):
    """Of one step, or of one evaluation, over all ranks."""

    loss: float
    ce: float
    z: float
    squares: int  # sum of the squares of the documents' lengths
    views: int  # images and tiles that the vision tower saw
    by_kind: list[tuple[float, int]]  # (BUCKETS,) sum of cross-entropies, supervised tokens
    stream_tokens: list[int]
    memory: float  # bytes, of the rank with the most; 0 without a GPU
    norm: float  # of the gradients, before clipping
    signal: int = 0  # that some rank has got, SIGTERM or SIGINT; 0: none

    @property
    def tokens(self) -> int:
        """That are no padding."""
        return sum(self.stream_tokens)

    @property
    def targets(self) -> int:
        """That are trained on."""
        return sum(count for _, count in self.by_kind)

    @property
    def finite(self) -> bool:
        """The same on all ranks: a rank's NaN or infinity goes into every sum."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def losses(self) -> dict[str, float]:
        """Mean cross-entropy by `NAMES`, of those that have any token."""
        found = {}
        for name, buckets in NAMES.items():
            if count := sum(self.by_kind[bucket][1] for bucket in buckets):
                found[name] = sum(self.by_kind[bucket][0] for bucket in buckets) / count
        return found


class Measures:
    """Adds up microbatches. Ranks are weighted by their supervised tokens, or with `by_packs` by packs, as the reference."""

    def __init__(self, by_packs: bool = False) -> None:
        self.by_packs = by_packs
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, outputs: Mapping[str, Any], batch: Batch) -> None:
        """Of a microbatch: what the model gave (loss.py) for what it was given (collate.py). Nothing waits for the device."""
        tokens = outputs["tokens"].double()  # (n,)
        weight = torch.full(
            (), num_packs(batch) if self.by_packs else len(tokens), dtype=torch.float64, device=tokens.device
        )
        real = batch["document_ids"] >= 0
        head = [
            weight,
            *(weight * outputs[name].double() for name in ("total", "ce", "z")),
            ((2 * batch["position_ids"] + 1) * real)
            .sum()
            .double(),  # 1 + 3 + 5 + ... over a document is its length squared
            torch.full_like(weight, len(batch["pixel_values"])),
        ]
        # Not index_add_: on a GPU its order, and so the last bit of its sums, changes from run to run.
        member = batch["kinds"][outputs["places"]][:, None] == torch.arange(
            BUCKETS, device=tokens.device
        )  # (n, BUCKETS)
        of_kind = torch.where(member, tokens[:, None], 0.0).sum(0), member.sum(0)
        sums = torch.cat([torch.stack(head), *of_kind, batch["stream_tokens"].sum(0)])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, norm: Tensor | None = None) -> Measured:
        """What was added up, over all ranks; the next step begins at 0. `norm` is the same on all ranks already."""
        assert self.sums is not None, "no microbatch was added"
        local, self.sums = self.sums, None
        memory = local.new_zeros(
            ranks.world_size()
        )  # each rank has a place of its own, so that the sum is all of them
        memory[ranks.rank()] = torch.cuda.max_memory_allocated() if local.is_cuda else 0
        signals = torch.zeros_like(memory)  # so ranks agree at which step they stop
        signals[ranks.rank()] = received_signal()
        total = ranks.sum_over_ranks(torch.cat([local, signals, memory]))
        last = total.new_zeros(1) if norm is None else norm.double().reshape(1)
        values: list[float] = torch.cat([total, last]).tolist()
        weight, loss, ce, z, squares, views = values[:HEAD]
        weight = weight or 1.0  # nothing was trained on: the sums are 0
        sums, counts = values[HEAD : HEAD + BUCKETS], values[HEAD + BUCKETS : HEAD + 2 * BUCKETS]
        return Measured(
            loss=loss / weight,
            ce=ce / weight,
            z=z / weight,
            squares=int(squares),
            views=int(views),
            by_kind=[(value, int(count)) for value, count in zip(sums, counts, strict=True)],
            stream_tokens=[int(count) for count in values[HEAD + 2 * BUCKETS : -1 - 2 * len(memory)]],
            memory=max(values[-1 - len(memory) : -1]),
            norm=values[-1],
            signal=int(max(values[-1 - 2 * len(memory) : -1 - len(memory)])),
        )
