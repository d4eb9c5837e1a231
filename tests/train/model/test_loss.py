"""Cross-entropy and z-loss over supervised tokens only, in chunks, with the gradient made at once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.simulated_step import PeakBytes
from unitoken.train.model.loss import token_loss

VOCABULARY = 20


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (10, 8), the tokens that follow them (10,), and an output layer."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8, generator=generator, dtype=dtype, requires_grad=True)
    return rows, torch.randint(0, VOCABULARY, (10,), generator=generator), weight


@pytest.mark.parametrize("masked", [None, torch.tensor([3, 7, 11])])
@pytest.mark.parametrize("chunk", [3, 2048])
def test_the_loss_equals_that_of_full_logits(chunk: int, masked: Tensor | None) -> None:
    rows, targets, weight = inputs()
    result = token_loss(rows, targets, weight, 1e-2, masked, chunk_rows=chunk)
    (3 * result.total).backward()
    found = rows.grad, weight.grad
    rows.grad = weight.grad = None

    logits = F.linear(rows, weight)
    if masked is not None:
        logits = logits.index_fill(-1, masked, torch.finfo(logits.dtype).min)
    ce, z = F.cross_entropy(logits, targets), logits.logsumexp(-1).square().mean()
    (3 * (ce + 1e-2 * z)).backward()
    torch.testing.assert_close((result.ce, result.z, result.total), (ce, z, ce + 1e-2 * z))
    torch.testing.assert_close(result.token_ce.mean(), ce)
    torch.testing.assert_close(found, (rows.grad, weight.grad))


@pytest.mark.parametrize("chunk", [3, 2048])
def test_the_gradient_is_that_of_finite_differences(chunk: int) -> None:
    rows, targets, weight = inputs(torch.float64)

    def total(rows: Tensor, weight: Tensor) -> Tensor:
        return token_loss(rows, targets, weight, 1e-2, chunk_rows=chunk).total

    assert torch.autograd.gradcheck(total, (rows, weight))


def test_the_gradient_can_be_taken_again_and_recomputed() -> None:
    rows, targets, weight = inputs()

    def total() -> Tensor:
        return token_loss(rows, targets, weight, 1e-2, chunk_rows=3).total

    kept = total()
    first = torch.autograd.grad(kept, (rows, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * kept, (rows, weight)), [2 * each for each in first])
    recomputed = checkpoint(total, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed, (rows, weight)), first)


def test_bfloat16_chunks_add_up_in_float32() -> None:
    """With a sum in bfloat16 the gradient of the output layer would be 2 % off."""
    torch.manual_seed(0)
    rows, targets = torch.randn(400, 8), torch.randint(0, VOCABULARY, (400,))
    weight = torch.randn(VOCABULARY, 8, requires_grad=True)
    (exact,) = torch.autograd.grad(token_loss(rows, targets, weight, 1e-2).total, weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_loss(rows, targets, weight, 1e-2, chunk_rows=1)
    (found,) = torch.autograd.grad(loss.total, weight)
    assert (loss.token_ce.dtype, found.dtype) == (torch.float32, torch.float32)
    assert (found - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize(("trains", "products"), [("both", 3), ("rows", 2), ("weight", 2), ("neither", 1)])
def test_each_chunk_takes_no_product_twice_or_in_vain(trains: str, products: int) -> None:
    rows, targets, weight = inputs()
    rows.requires_grad_(trains in ("both", "rows"))
    weight.requires_grad_(trains in ("both", "weight"))
    with FlopCounterMode(display=False) as counter:
        total = token_loss(rows, targets, weight, 0.0, chunk_rows=3).total
        if trains != "neither":
            total.backward()
    assert counter.get_total_flops() == products * 2 * len(rows) * VOCABULARY * 8


def test_without_gradients_none_is_made() -> None:
    rows, targets, weight = inputs()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_loss(rows, targets, weight, 0.0, chunk_rows=3)
    assert counter.get_total_flops() == 2 * len(rows) * VOCABULARY * 8


def recomputed_loss(rows: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Return the loss of chunks whose logits the backward pass computes again, as before."""

    def sums(rows: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(rows, weight).float()
        logsumexp = logits.logsumexp(-1)
        target_logits = logits.gather(-1, targets[:, None]).squeeze(-1)
        return (logsumexp - target_logits).sum() + 1e-2 * logsumexp.square().sum()

    chunks = zip(rows.split(16), targets.split(16), strict=True)
    return torch.stack([checkpoint(sums, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def chunked_loss(rows: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return token_loss(rows, targets, weight, 1e-2, chunk_rows=16).total


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_logits_take_two_fifths_of_recomputed_ones(precision: torch.dtype) -> None:
    """With few hidden numbers the logits are nearly all of the memory."""

    def peak(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        torch.manual_seed(0)
        rows, targets = torch.randn(160, 1, requires_grad=True), torch.randint(0, 10_000, (160,))
        weight = torch.randn(10_000, 1, requires_grad=True)
        with PeakBytes() as bytes_alive:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                total = loss(rows, targets, weight)
            total.backward()
        return bytes_alive.most

    assert peak(chunked_loss) <= 0.4 * peak(recomputed_loss)


def test_nothing_to_train_on_is_a_loss_of_zero_with_a_gradient() -> None:
    """All ranks reduce the gradient of the output layer together, also one without a supervised token."""
    rows, weight = torch.randn(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    result = token_loss(rows, torch.zeros(0, dtype=torch.int64), weight, 1e-5)
    assert (result.total.item(), len(result.token_ce)) == (0.0, 0)
    result.total.backward()
    for tensor in (rows, weight):
        assert tensor.grad is not None
        assert not tensor.grad.any()
