"""Recomputed or compiled layers train like plain layers; test_memory.py checks what they keep."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from support.decoders import build_decoder, packed_inputs, small_config
from support.stages import DECODER, VISION
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.config import ModelConfig, VisionTowerConfig
from unitoken.train.model.activation_checkpointing import RecomputeMode, set_recompute
from unitoken.train.model.decoder import Decoder, document_mask
from unitoken.train.model.unitoken import build_model
from unitoken.train.model.vision_tower import VisionTower

# Torch 2.11 looks at it itself while it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
FLEX = pytest.mark.skipif(
    torch.__version__ >= "2.11", reason="this torch compiles no gradient of flex attention on a CPU"
)
FAMILIES: tuple[dict[str, Any], ...] = (
    {},
    {"qk_norm": "none", "attention_bias": True, "num_key_value_heads": 2},
    {"qk_norm": "rms", "head_dim": 12, "num_key_value_heads": 2},
)
MODES: tuple[RecomputeMode, ...] = ("none", "full", "selective")


def gradients_of(module: nn.Module) -> list[Tensor]:
    gradients = [parameter.grad for parameter in module.parameters()]
    return [gradient.clone() for gradient in gradients if gradient is not None]


def loss_and_gradients(decoder: Decoder, attention: Literal["sdpa", "flex"]) -> list[Tensor]:
    """Return the loss and all gradients, with dropout drawn from seed 3."""
    ids, positions, documents = packed_inputs()
    torch.manual_seed(3)
    decoder.zero_grad()
    loss = decoder(decoder.embed_tokens(ids), positions, document_mask(documents, attention)).square().mean()
    loss.backward()
    return [loss.detach(), *gradients_of(decoder)]


@pytest.mark.parametrize(
    ("setting", "attention"),
    [("full", "sdpa"), ("selective", "sdpa"), (1, "sdpa"), (2, "sdpa"), ("full", "flex")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recomputed_decoder_gives_bit_identical_gradients(
    setting: RecomputeMode | int, attention: Literal["sdpa", "flex"], family: dict[str, Any]
) -> None:
    decoder = build_decoder(small_config(num_hidden_layers=3, **family), dropout=0.3)
    plain = loss_and_gradients(decoder, attention)
    set_recompute(decoder.layers, setting)
    for expected, found in zip(plain, loss_and_gradients(decoder, attention), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("setting", ["full", "selective", 2])
def test_a_recomputed_tower_gives_bit_identical_gradients(setting: RecomputeMode | int) -> None:
    torch.manual_seed(0)
    tower = VisionTower(VisionTowerConfig.model_validate({**VISION, "num_hidden_layers": 3}))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    results = []
    for recompute in ("none", setting):
        set_recompute(tower.encoder.layers, recompute)
        tower.zero_grad()
        tower(pixels).square().mean().backward()
        results.append(gradients_of(tower))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("none", "nnnn"), ("full", "ffff"), ("selective", "ssss"), (1, "ffff"), (2, "fnfn"), (3, "fnnf")],
)
def test_the_setting_applies_to_the_decoder_and_the_tower(
    setting: RecomputeMode | int, expected: str
) -> None:
    config = ModelConfig.model_validate(
        {"decoder": {**DECODER, "num_hidden_layers": 4}, "vision": {**VISION, "num_hidden_layers": 4}}
    )
    model = build_model(*model_configs(config), config, setting)
    for layers in (model.model.layers, model.vit.encoder.layers):
        assert "".join(layer.recompute[0] for layer in layers) == expected


@pytest.mark.parametrize(
    ("backend", "setting", "attention"),
    [
        ("eager", "none", "sdpa"),
        ("eager", "full", "sdpa"),
        ("eager", "selective", "sdpa"),
        pytest.param("aot_eager", "selective", "sdpa", marks=pytest.mark.slow),
        pytest.param("aot_eager", "full", "flex", marks=[pytest.mark.slow, FLEX]),
        # Torch 2.7 has no rule for selective checkpointing of flex attention.
        pytest.param("aot_eager", "selective", "flex", marks=[pytest.mark.slow, FLEX]),
        pytest.param("inductor", "selective", "sdpa", marks=pytest.mark.slow),  # builds C++: half a minute
    ],
)
def test_one_compilation_serves_all_layers_and_trains_the_same(
    backend: str, setting: RecomputeMode, attention: Literal["sdpa", "flex"]
) -> None:
    """A compilation for each layer would take minutes more, and torch stops compiling at eight."""
    from torch._dynamo.utils import counters

    decoder = build_decoder(small_config(num_hidden_layers=10))
    plain, names = loss_and_gradients(decoder, attention), [name for name, _ in decoder.named_parameters()]
    torch._dynamo.reset()
    counters.clear()
    set_recompute(decoder.layers, setting)
    for layer in decoder.layers:
        layer.compile(backend=backend)
    assert [name for name, _ in decoder.named_parameters()] == names
    for expected, found in zip(plain, loss_and_gradients(decoder, attention), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (counters["stats"]["unique_graphs"], counters["graph_break"]) == (1, {})
    decoder.eval()
    counters.clear()
    loss_and_gradients(decoder, attention)
    if attention == "sdpa":  # flex attention compiles itself
        # Generation and evaluation, whose lengths change all the time, are not compiled.
        assert not counters["stats"]


def test_one_compilation_serves_a_tower_with_any_number_of_views() -> None:
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    tower = VisionTower(VisionTowerConfig.model_validate({**VISION, "num_hidden_layers": 10}))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    batches = [torch.randint(0, 256, (views, 3, 8, 8), dtype=torch.uint8) for views in (2, 1, 5, 3, 1)]

    def train() -> list[Tensor]:
        tower.zero_grad()
        features = [tower(pixels) for pixels in batches]
        torch.cat(features).square().mean().backward()
        return [*features, *gradients_of(tower)]

    plain = train()
    torch._dynamo.reset()
    counters.clear()
    for layer in tower.encoder.layers:
        layer.compile(backend="eager")
    for expected, found in zip(plain, train(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (counters["stats"]["unique_graphs"], counters["graph_break"]) == (1, {})
