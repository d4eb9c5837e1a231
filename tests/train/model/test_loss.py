"""Cross-entropy and z-loss over supervised tokens only, in chunks, with the gradient made at once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from support.simulated import PeakBytes
from unitoken.train.model import loss as loss_module
from unitoken.train.model.loss import token_loss

VOCABULARY = 20


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (2, 9, 8), labels (2, 9) with 8 supervised tokens, and an output layer."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    labels[0, :4] = labels[1, 5:] = -100
    return hidden, labels, weight


@pytest.mark.parametrize("masked", [None, torch.tensor([3, 7, 11])])
@pytest.mark.parametrize("chunk", [3, 2048])
def test_the_loss_equals_that_of_full_logits(chunk: int, masked: Tensor | None) -> None:
    hidden, labels, weight = inputs()
    result = token_loss(hidden, labels, weight, 1e-2, masked, chunk_rows=chunk)
    (3 * result.total).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    logits, targets = F.linear(hidden, weight)[:, :-1], labels[:, 1:]
    if masked is not None:
        assert torch.isin(targets, masked).any()
        logits = logits.index_fill(-1, masked, torch.finfo(logits.dtype).min)
    ce = F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1), ignore_index=-100)
    z = logits.logsumexp(-1).square()[targets >= 0].mean()
    (3 * (ce + 1e-2 * z)).backward()
    torch.testing.assert_close((result.ce, result.z, result.total), (ce, z, ce + 1e-2 * z))
    torch.testing.assert_close(result.token_ce.mean(), ce)
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


@pytest.mark.parametrize("chunk", [3, 2048])
def test_the_gradient_is_that_of_finite_differences(chunk: int) -> None:
    hidden, labels, weight = inputs(torch.float64)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return token_loss(hidden, labels, weight, 1e-2, chunk_rows=chunk).total

    assert torch.autograd.gradcheck(total, (hidden, weight))


def test_the_gradient_can_be_taken_again_and_recomputed() -> None:
    hidden, labels, weight = inputs()

    def total() -> Tensor:
        return token_loss(hidden, labels, weight, 1e-2, chunk_rows=3).total

    kept = total()
    first = torch.autograd.grad(kept, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * kept, (hidden, weight)), [2 * each for each in first])
    recomputed = checkpoint(total, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed, (hidden, weight)), first)


def test_bfloat16_chunks_add_up_in_float32() -> None:
    """With a sum in bfloat16 the gradient of the output layer would be 2 % off."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(1, 401, 8), torch.randint(0, VOCABULARY, (1, 401))
    weight = torch.randn(VOCABULARY, 8, requires_grad=True)
    (exact,) = torch.autograd.grad(token_loss(hidden, labels, weight, 1e-2).total, weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_loss(hidden, labels, weight, 1e-2, chunk_rows=1)
    (found,) = torch.autograd.grad(loss.total, weight)
    assert (loss.token_ce.dtype, found.dtype) == (torch.float32, torch.float32)
    assert (found - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize(("trains", "products"), [("both", 3), ("hidden", 2), ("weight", 2), ("neither", 1)])
def test_each_chunk_takes_no_product_twice_or_in_vain(trains: str, products: int) -> None:
    hidden, labels, weight = inputs()
    hidden.requires_grad_(trains in ("both", "hidden"))
    weight.requires_grad_(trains in ("both", "weight"))
    with FlopCounterMode(display=False) as counter:
        total = token_loss(hidden, labels, weight, 0.0, chunk_rows=3).total
        if trains != "neither":
            total.backward()
    assert counter.get_total_flops() == products * 2 * int((labels[:, 1:] >= 0).sum()) * VOCABULARY * 8


def test_without_gradients_none_is_made() -> None:
    hidden, labels, weight = inputs()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_loss(hidden, labels, weight, 0.0, chunk_rows=3)
    assert counter.get_total_flops() == 2 * int((labels[:, 1:] >= 0).sum()) * VOCABULARY * 8


def recomputed_loss(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the loss of chunks whose logits the backward pass computes again, as before."""

    def sums(rows: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(rows, weight).float()
        logsumexp = logits.logsumexp(-1)
        target_logits = logits.gather(-1, targets[:, None]).squeeze(-1)
        return (logsumexp - target_logits).sum() + 1e-2 * logsumexp.square().sum()

    chunks = zip(hidden[0, :-1].split(16), labels[0, 1:].split(16), strict=True)
    total: Tensor = sum(checkpoint(sums, *chunk, use_reentrant=False) for chunk in chunks)  # type: ignore[assignment]
    return total


def chunked_loss(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return token_loss(hidden, labels, weight, 1e-2, chunk_rows=16).total


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_logits_take_two_fifths_of_recomputed_ones(precision: torch.dtype) -> None:
    """With few hidden numbers the logits are nearly all of the memory."""

    def peak(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        torch.manual_seed(0)
        hidden = torch.randn(1, 161, 1, requires_grad=True)
        weight = torch.randn(10_000, 1, requires_grad=True)
        labels = torch.randint(0, 10_000, (1, 161))
        with PeakBytes() as bytes_alive:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                total = loss(hidden, labels, weight)
            total.backward()
        return bytes_alive.most

    assert peak(chunked_loss) <= 0.4 * peak(recomputed_loss)


def test_unsupervised_rows_never_become_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = F.linear
    monkeypatch.setattr(
        loss_module.F,
        "linear",
        lambda states, weight: rows.append(len(states)) or real(states, weight),  # type: ignore[func-returns-value]
    )
    labels = torch.full((4, 100), -100)
    labels[2, 10:15] = 1
    token_loss(torch.randn(4, 100, 8), labels, torch.randn(20, 8), 0.0)
    assert rows == [5]


def test_nothing_to_train_on_is_a_loss_of_zero_with_a_gradient() -> None:
    """All ranks reduce the gradient of the output layer together, also one without a supervised token."""
    hidden, weight = torch.randn(1, 5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    result = token_loss(hidden, torch.full((1, 5), -100), weight, 1e-5)
    assert result.total.item() == 0.0
    result.total.backward()
    for gradient in (hidden.grad, weight.grad):
        assert gradient is not None
        assert not gradient.any()
