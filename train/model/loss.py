"""Cross-entropy and z-loss over the supervised tokens only, with the gradient made in the forward pass.

A row of logits of the 7B model is 65,536 numbers: 262 kB in float32. For 16 sequences of 1,790 tokens the
full logits would take 7.5 GB, and most rows are not trained on. Here only supervised rows meet the output
layer, `CHUNK_ROWS` at a time, and a chunk's logits become its gradient in place before the next chunk: three
products with the output layer, where keeping nothing and computing the logits again takes four. The backward
pass only multiplies by the gradient that comes in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unitoken.train.model.autocast import product_dtype

CHUNK_ROWS = 2048  # rows of logits that exist at once: 0.5 GB in float32 for 65,536 ids


class Loss(NamedTuple):
    """The loss of a microbatch with n supervised tokens: means over these tokens, 0 where there are none.

    Only `total` has a gradient.

    Attributes:
        total: `ce` plus the z-loss weight times `z`.
        ce: mean cross-entropy.
        z: mean of the squared logsumexp of the logits.
        token_ce: (n,) float32, the cross-entropy of each supervised token.
    """

    total: Tensor
    ce: Tensor
    z: Tensor
    token_ce: Tensor


def token_loss(
    rows: Tensor,
    targets: Tensor,
    output_weight: Tensor,
    z_weight: float,
    masked_ids: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Loss:
    """Compare the logits of hidden states with the tokens that follow them.

    Args:
        rows: (n, hidden), after the last norm, at the positions before each supervised token.
        targets: (n,), the supervised tokens.
        output_weight: (vocabulary, hidden).
        z_weight: weight of the mean of the squared logsumexp.
        masked_ids: token ids that get no probability (the reference's `mask_image_logits`), or None.
        chunk_rows: the most rows of logits that exist at once.
    """
    terms = _Terms(targets, z_weight, masked_ids, chunk_rows, torch.is_grad_enabled())
    return Loss(*_LossAndGradient.apply(rows, output_weight, terms))  # type: ignore[no-untyped-call]


class _Terms(NamedTuple):
    """What the loss of n rows depends on besides the rows and the output layer."""

    targets: Tensor  # (n,)
    z_weight: float
    masked_ids: Tensor | None
    chunk_rows: int
    trains: bool  # False makes no gradient


class _LossAndGradient(torch.autograd.Function):
    """The loss of rows (n, hidden) and an output layer (vocabulary, hidden), with the gradient of its total.

    Products are in autocast's dtype. What is computed of logits, and the sum of the chunks' gradients of the
    output layer, is in float32 (in float64 for float64 rows).
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, terms: _Terms
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return total, cross-entropy, z, and each row's cross-entropy (n,)."""
        dtype = product_dtype(rows)
        exact = torch.promote_types(dtype, torch.float32)
        needs_rows, needs_weight = (terms.trains and needed for needed in ctx.needs_input_grad[:2])
        rows_gradient = torch.empty_like(rows, dtype=dtype) if needs_rows else None
        weight_gradient = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        token_ce = rows.new_empty(len(rows), dtype=exact)
        logsumexp = torch.empty_like(token_ce)
        with torch.autocast(rows.device.type, enabled=False):
            matrix = weight.to(dtype)
            for first in range(0, len(rows), terms.chunk_rows):
                chunk = slice(first, first + terms.chunk_rows)
                inputs = rows[chunk].to(dtype)
                logits = F.linear(inputs, matrix).to(exact)
                token_ce[chunk], logsumexp[chunk], sums = _exponentiate(logits, chunk, terms)
                gradient = None
                if needs_rows or needs_weight:
                    gradient = _turn_into_gradient(logits, sums, logsumexp[chunk], chunk, terms).to(dtype)
                del logits
                if gradient is not None and rows_gradient is not None:
                    rows_gradient[chunk] = gradient @ matrix
                if gradient is not None and weight_gradient is not None:
                    weight_gradient += gradient.T @ inputs
                del gradient  # or it would exist beside the next chunk's logits
        ctx.save_for_backward(rows_gradient, weight_gradient)
        ctx.dtypes = rows.dtype, weight.dtype
        # With a squared logsumexp of 100 a row, float32 sums of some thousand rows are off by 1e-5 in the
        # mean.
        count = max(len(rows), 1)
        ce = (token_ce.sum(dtype=torch.float64) / count).to(exact)
        z = (logsumexp.square().sum(dtype=torch.float64) / count).to(exact)
        ctx.mark_non_differentiable(ce, z, token_ce)
        return ce + terms.z_weight * z, ce, z, token_ce

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and weight, which the forward pass has made for a factor of 1."""
        gradients = [
            None if gradient is None else _multiply(gradient, factor, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None)


def _exponentiate(logits: Tensor, chunk: slice, terms: _Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Replace a chunk's logits (c, vocabulary) by exp(logit - the row's largest).

    Returns:
        The rows' cross-entropy (c,), their logsumexp (c,), and the sums of the exponentials (c, 1).
    """
    if terms.masked_ids is not None:
        logits.index_fill_(-1, terms.masked_ids, torch.finfo(logits.dtype).min)
    target_logits = logits.gather(-1, terms.targets[chunk, None])
    largest = logits.amax(-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    logsumexp = sums.log() + largest
    return (logsumexp - target_logits).squeeze(-1), logsumexp.squeeze(-1), sums


def _turn_into_gradient(
    exponentials: Tensor, sums: Tensor, logsumexp: Tensor, chunk: slice, terms: _Terms
) -> Tensor:
    """Replace a chunk's exponentials by the gradient of the total by its logits, and return them.

    It is (probability * (1 + 2 * z_weight * logsumexp) - 1 at the target) / n, and 0 at masked ids.
    """
    count, targets = len(terms.targets), terms.targets[chunk, None]
    exponentials.mul_((1 + 2 * terms.z_weight * logsumexp[:, None]) / (sums * count))
    exponentials.scatter_add_(-1, targets, exponentials.new_full(targets.shape, -1 / count))
    if terms.masked_ids is not None:
        exponentials.index_fill_(-1, terms.masked_ids, 0.0)
    return exponentials


def _multiply(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product in another dtype, rounded once, and without a copy of the gradient in between."""
    # With a factor without dimensions torch would multiply, and round, in the gradient's own dtype.
    return torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient, dtype=dtype))
