"""Measure a step: sums stay on the device until its end, then one all-reduce and one transfer to the host.

    of each microbatch:  losses, cross-entropy by kind of token and document, tokens by stream, what FLOPs are
    counted from of each rank:        the most memory it has held; a signal that asks it to end; how far it is
    with what it does in the background

The cross-entropies are those of the loss itself, so `loss_text` and `loss_image`, weighted by their tokens,
give `ce`, and so do the losses of the three kinds of documents.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unitoken.common.interruption import received_signal
from unitoken.dataset.kinds import KINDS
from unitoken.streaming_data.reading.batch import Batch, num_packs
from unitoken.train.distributed import ranks

BUCKETS = 2 * len(KINDS)  # the values of batch["kinds"]
# The buckets of each loss: by what the token is, and by what the document is; "text_only" documents have no
# image.
LOSS_BUCKETS = {
    "loss_text": (0, 2, 4),
    "loss_image": (1, 3, 5),
    "loss_text_only": (0, 1),
    "loss_understanding": (2, 3),
    "loss_generation": (4, 5),
}
SCALARS = 6  # weight; loss, ce and z times the weight; squares; views


class Readiness(enum.IntEnum):
    """How far a rank is with what it does in the background."""

    WORKING = 0  # or nothing to do
    READY = 1
    FAILED = 2


class StepResult(NamedTuple):
    """What was measured in a step or an evaluation, over all ranks.

    Attributes:
        loss: the mean loss that was trained on.
        ce: its cross-entropy.
        z: its mean squared logsumexp.
        squares: sum of the squared lengths of the documents.
        views: images and tiles that the vision tower saw.
        by_kind: (BUCKETS,) pairs of the sum of cross-entropies and the number of supervised tokens.
        stream_tokens: tokens of each stream of the mixture.
        memory: bytes held by the rank with the most; 0 without a GPU.
        norm: L2 norm of the gradients before clipping.
        signal: a signal that any rank received, SIGTERM or SIGINT; 0 for none.
        background_over: all ranks are ready with what they do in the background, or one has failed.
    """

    loss: float
    ce: float
    z: float
    squares: int
    views: int
    by_kind: list[tuple[float, int]]
    stream_tokens: list[int]
    memory: float
    norm: float
    signal: int = 0
    background_over: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens, padding left out."""
        return sum(self.stream_tokens)

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return sum(count for _, count in self.by_kind)

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are finite, on all ranks: a rank's NaN or infinity enters every sum."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def losses(self) -> dict[str, float]:
        """Return the mean cross-entropy by the names in `LOSS_BUCKETS`, without those that have no token."""
        return losses_by_kind(self.by_kind)


def sum_by_kind(token_ce: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the sums of cross-entropies (BUCKETS,) and the numbers of tokens (BUCKETS,) of a microbatch.

    Args:
        token_ce: (n,) float64, of each supervised token.
        batch: the microbatch.
    """
    # Not index_add_: on a GPU its order, and so the last bit of its sums, changes from run to run.
    buckets = batch["kinds"][batch["target_rows"], batch["target_columns"]]  # (n,)
    in_bucket = buckets[:, None] == torch.arange(BUCKETS, device=token_ce.device)  # (n, BUCKETS)
    return torch.where(in_bucket, token_ce[:, None], 0.0).sum(0), in_bucket.sum(0)


def losses_by_kind(by_kind: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Return the mean cross-entropy by the names in `LOSS_BUCKETS`, without those that have no token.

    Args:
        by_kind: (BUCKETS,) pairs of the sum of cross-entropies and the number of supervised tokens.
    """
    losses = {}
    for name, buckets in LOSS_BUCKETS.items():
        count = sum(by_kind[bucket][1] for bucket in buckets)
        if count:
            losses[name] = sum(by_kind[bucket][0] for bucket in buckets) / count
    return losses


class StepSums:
    """The sums over the microbatches of a step.

    Args:
        by_packs: weight microbatches and ranks by their packs, as the reference does, instead of their
            supervised tokens.
    """

    def __init__(self, by_packs: bool = False) -> None:
        self.by_packs = by_packs
        self.sums: Tensor | None = None
        self.readiness = Readiness.WORKING  # of this rank; the other ranks get it with the sums

    @torch.no_grad()
    def add(self, outputs: Mapping[str, Any], batch: Batch) -> None:
        """Add a microbatch, without waiting for the device.

        Args:
            outputs: the model's `Loss` as a dictionary.
            batch: the microbatch.
        """
        token_ce = outputs["token_ce"].double()  # (n,)
        device = token_ce.device
        count = num_packs(batch) if self.by_packs else len(token_ce)
        weight = torch.full((), count, dtype=torch.float64, device=device)
        # 1 + 3 + 5 + ... over the positions of a document is its length squared.
        odd_numbers = (2 * batch["position_ids"] + 1) * (batch["document_ids"] >= 0)
        scalars = [
            weight,
            *(weight * outputs[name].double() for name in ("total", "ce", "z")),
            odd_numbers.sum().double(),
            torch.full_like(weight, len(batch["pixel_values"])),
        ]
        ce_sums, counts = sum_by_kind(token_ce, batch)
        sums = torch.cat([torch.stack(scalars), ce_sums, counts, batch["stream_tokens"].sum(0)])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, norm: Tensor | None = None) -> StepResult:
        """Return the sums over all ranks, and start again at 0.

        Args:
            norm: the gradients' norm, which already is the same on all ranks; None for an evaluation.
        """
        assert self.sums is not None, "no microbatch was added"
        local, self.sums = self.sums, None
        world_size, rank = ranks.world_size(), ranks.rank()
        # Each rank has an element of its own, so that the sums over ranks hold the values of all.
        signals, memory, readiness = local.new_zeros(3, world_size)
        signals[rank] = received_signal()  # so that the ranks agree at which step they stop
        memory[rank] = torch.cuda.max_memory_allocated() if local.is_cuda else 0
        readiness[rank] = self.readiness
        sums = ranks.sum_over_ranks(torch.cat([local, signals, memory, readiness]))
        norm = sums.new_zeros(1) if norm is None else norm.double().reshape(1)
        values: list[float] = torch.cat([sums, norm]).tolist()  # the only transfer to the host
        streams = len(local) - SCALARS - 2 * BUCKETS
        scalars, ce_sums, counts, stream_tokens, all_signals, all_memory, all_readiness, (norm_value,) = _cut(
            values, (SCALARS, BUCKETS, BUCKETS, streams, world_size, world_size, world_size, 1)
        )
        weight, loss, ce, z, squares, views = scalars
        weight = weight or 1.0  # nothing was trained on: the sums are 0
        return StepResult(
            loss=loss / weight,
            ce=ce / weight,
            z=z / weight,
            squares=int(squares),
            views=int(views),
            by_kind=[(value, int(count)) for value, count in zip(ce_sums, counts, strict=True)],
            stream_tokens=[int(count) for count in stream_tokens],
            memory=max(all_memory),
            norm=norm_value,
            signal=int(max(all_signals)),
            background_over=Readiness.FAILED in all_readiness or Readiness.WORKING not in all_readiness,
        )


def _cut(values: list[float], lengths: tuple[int, ...]) -> list[list[float]]:
    """Cut a list into consecutive parts of these lengths, which add up to its own."""
    remaining = iter(values)
    parts = [list(itertools.islice(remaining, length)) for length in lengths]
    assert next(remaining, None) is None, "values are left over"
    return parts
