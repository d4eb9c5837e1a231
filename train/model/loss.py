"""Cross-entropy and z-loss over the supervised tokens only.

A row of logits of the 7B model is 65,536 numbers: 262 kB in float32. For 16 sequences of 1,790 tokens the
full logits would take 7.5 GB, and most rows are not trained on. Here only supervised rows meet the output
layer, `CHUNK_ROWS` at a time, and each chunk's logits are recomputed in the backward pass instead of being
kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 2048  # rows of logits that exist at once: 0.5 GB in float32 for 65,536 ids


class Loss(NamedTuple):
    """The loss of a microbatch with n supervised tokens: means over these tokens, 0 where there are none.

    Attributes:
        total: `ce` plus the z-loss weight times `z`.
        ce: mean cross-entropy.
        z: mean of the squared logsumexp of the logits.
        token_ce: (n,) float32, the cross-entropy of each supervised token, without gradient.
        label_indices: (n,) rows and (n,) columns of these tokens' labels.
    """

    total: Tensor
    ce: Tensor
    z: Tensor
    token_ce: Tensor
    label_indices: tuple[Tensor, Tensor]


def token_loss(
    hidden: Tensor,
    labels: Tensor,
    output_weight: Tensor,
    z_weight: float,
    masked_ids: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Loss:
    """Compare the logits at i - 1 with the label at i, wherever labels[:, i] >= 0.

    Args:
        hidden: (P, L, hidden), the hidden states after the last norm.
        labels: (P, L), not shifted; negative where a token is not trained on.
        output_weight: (vocabulary, hidden).
        z_weight: weight of the mean of the squared logsumexp.
        masked_ids: token ids that get no probability (the reference's `mask_image_logits`), or None.
        chunk_rows: the most rows of logits that exist at once.
    """
    # The only place in the model that waits for the GPU.
    row, column = (labels[:, 1:] >= 0).nonzero(as_tuple=True)
    rows, targets = hidden[row, column], labels[row, column + 1]  # (n, hidden), (n,)
    token_ce: list[Tensor] = []
    ce = z = rows.sum(dtype=torch.float64) * 0.0  # keeps the graph connected where nothing is trained on
    chunks = list(zip(torch.split(rows, chunk_rows), torch.split(targets, chunk_rows), strict=True))
    for chunk, chunk_targets in chunks:
        if len(chunks) > 1 and torch.is_grad_enabled():
            sums = checkpoint(
                _chunk_sums, chunk, chunk_targets, output_weight, masked_ids, use_reentrant=False
            )
        else:
            sums = _chunk_sums(chunk, chunk_targets, output_weight, masked_ids)
        ce, z = ce + sums[0], z + sums[1]
        token_ce.append(sums[2])
    count = max(len(targets), 1)
    ce, z = (ce / count).float(), (z / count).float()
    return Loss(ce + z_weight * z, ce, z, torch.cat(token_ce), (row, column + 1))


def _chunk_sums(
    rows: Tensor, targets: Tensor, output_weight: Tensor, masked_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's sums of cross-entropy and of squared logsumexp, and each row's cross-entropy."""
    logits = F.linear(rows, output_weight).float()
    if masked_ids is not None:
        logits = logits.index_fill(-1, masked_ids, torch.finfo(logits.dtype).min)
    logsumexp = logits.logsumexp(-1)
    target_logits = logits.gather(-1, targets[:, None]).squeeze(-1)
    token_ce = logsumexp - target_logits
    # With a squared logsumexp of 100 a row, float32 sums of some thousand rows are off by 1e-5 in the mean.
    return token_ce.sum(dtype=torch.float64), logsumexp.square().sum(dtype=torch.float64), token_ce.detach()
