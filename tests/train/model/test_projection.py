"""Products of a few tokens: the numbers of `F.linear`, the other way round only where nothing is trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unitoken.train.model import projection
from unitoken.train.model.projection import Projection, project


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 2), (16, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_any_tokens_equal_those_of_linear(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    layer, states = Projection(48, 80, bias=bias), torch.randn(*shape, 48)
    with torch.no_grad():
        products = layer(states)
    assert products.is_contiguous()
    torch.testing.assert_close(products, F.linear(states, layer.weight, layer.bias))


@pytest.mark.parametrize("case", ["few", "one", "many", "trained", "bfloat16", "autocast"])
def test_only_few_tokens_in_generation_are_turned(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: list[Tensor] = []

    def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain.append(states)
        return states @ weight.t()

    monkeypatch.setattr(projection.F, "linear", linear)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    states = torch.ones({"one": 1, "many": 16}.get(case, 2), 8, dtype=dtype)
    with torch.set_grad_enabled(case == "trained"), torch.autocast("cpu", enabled=case == "autocast"):
        project(states, torch.ones(4, 8, dtype=dtype))
    assert bool(plain) == (case != "few")
