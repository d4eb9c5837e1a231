"""Cross-entropy and z-loss over the supervised tokens only.

A row of logits of the 7B model is 65,536 numbers: 262 kB in float32. For 16 sequences of 1,790 tokens all of them
would be 7.5 GB, and most rows are not trained on. Here only supervised rows meet the output layer, `CHUNK` at a time,
and each chunk's logits are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # rows of logits that exist at once: 0.5 GB in float32 for 65,536 ids


class Loss(NamedTuple):
    """Means over the n supervised tokens; 0 where there are none. `total` = ce + weight * z."""

    total: Tensor
    ce: Tensor
    z: Tensor
    tokens: Tensor  # (n,) float32, cross-entropy of each supervised token, without gradient
    places: tuple[Tensor, Tensor]  # (n,) rows and (n,) columns of their labels


def token_loss(
    hidden: Tensor, labels: Tensor, output_weight: Tensor, z_weight: float, masked: Tensor | None = None
) -> Loss:
    """Compare the logits at i - 1 with the label at i, wherever labels[:, i] >= 0.

    Args:
        hidden: (P, L, hidden) after the last norm.
        labels: (P, L), not shifted; negative where not trained on.
        output_weight: (vocabulary, hidden).
        z_weight: weight of the mean of logsumexp squared.
        masked: ids that get no probability (the reference's `mask_image_logits`), or None.
    """
    row, column = (labels[:, 1:] >= 0).nonzero(
        as_tuple=True
    )  # the one place of the model that waits for a GPU
    rows, targets = hidden[row, column], labels[row, column + 1]  # (n, hidden), (n,)
    tokens: list[Tensor] = []
    ce = z = rows.sum(dtype=torch.float64) * 0.0  # keeps the graph whole where there is nothing to train on
    chunks = list(zip(torch.split(rows, CHUNK), torch.split(targets, CHUNK), strict=True))
    for chunk_rows, chunk_targets in chunks:
        if len(chunks) > 1 and torch.is_grad_enabled():
            sums = checkpoint(_sums, chunk_rows, chunk_targets, output_weight, masked, use_reentrant=False)
        else:
            sums = _sums(chunk_rows, chunk_targets, output_weight, masked)
        ce, z = ce + sums[0], z + sums[1]
        tokens.append(sums[2])
    count = max(len(targets), 1)
    ce, z = (ce / count).float(), (z / count).float()
    return Loss(ce + z_weight * z, ce, z, torch.cat(tokens), (row, column + 1))


def _sums(
    rows: Tensor, targets: Tensor, output_weight: Tensor, masked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(rows, output_weight).float()
    if masked is not None:
        logits = logits.index_fill(-1, masked, torch.finfo(logits.dtype).min)
    normaliser = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    tokens = normaliser - chosen
    # A z of 100 a row: float32 sums of some thousand rows are off by 1e-5 in the mean.
    return tokens.sum(dtype=torch.float64), normaliser.square().sum(dtype=torch.float64), tokens.detach()
