"""Cross-entropy and z-loss over supervised tokens only, in chunks."""

import pytest
import torch
import torch.nn.functional as F

from unitoken.train.model import loss as loss_module
from unitoken.train.model.loss import token_loss


@pytest.mark.parametrize("chunk", [3, 2048])
def test_the_loss_equals_that_of_full_logits(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 20, (2, 9), generator=generator)
    labels[0, :4] = labels[1, 5:] = -100
    result = token_loss(hidden, labels, weight, 1e-2, chunk_rows=chunk)
    result.total.backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    logits, targets = F.linear(hidden, weight)[:, :-1], labels[:, 1:]
    ce = F.cross_entropy(logits.reshape(-1, 20), targets.reshape(-1), ignore_index=-100)
    z = logits.logsumexp(-1).square()[targets >= 0].mean()
    (ce + 1e-2 * z).backward()
    torch.testing.assert_close((result.ce, result.z, result.total), (ce, z, ce + 1e-2 * z))
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


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
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    result = token_loss(hidden, torch.full((1, 5), -100), torch.randn(20, 8), 1e-5)
    assert result.total.item() == 0.0
    result.total.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
