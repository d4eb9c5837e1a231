"""The floating-point operations that a step of training needs, by the model's sizes, and the MFU that follows.

    MFU = FLOPs of the step / (seconds of the step * GPUs * peak of one GPU)

A multiplication with a matrix of m x n is 2mn FLOPs a row: forward, once more in the backward pass for the gradient of its
weight if that is trained, and once more for the gradient of what it was given if anything below it is trained. So in Stage I
the frozen decoder counts twice (its weights need no gradient, but the adapter below it does) and the frozen patch embedding
once. The two products of attention have no weights: once forward, twice backward. Norms, activations and the rotary
embedding are not counted.

Counted is what the model needs, not what is computed: no padding; attention by each document's own length squared (not
halved for causality, as is the custom); only supervised rows meet the output layer; nothing is counted twice for
activation checkpointing (MFU, not HFU).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from unitoken.train.config import DecoderConfig, VisionTowerConfig

# Dense bfloat16 with float32 accumulation, in FLOP/s, as the makers' data sheets say; by what the driver calls the device.
PEAKS = {
    "H100 80GB HBM3": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756.0e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "A100": 312.0e12,
    "L40S": 362.1e12,
    "L4": 121.0e12,
}


def peak(device: str) -> float | None:
    """Of one device, by the name that torch.cuda.get_device_name gives; None where it is not known."""
    words = device.replace("NVIDIA ", "")
    return next(
        (
            flops
            for name, flops in PEAKS.items()
            if words == name or words.startswith((f"{name} ", f"{name}-"))
        ),
        None,
    )


class Flops(NamedTuple):
    """FLOPs of forward and backward pass, each for one of what it is named for."""

    token: float  # a token in the decoder, padding left out
    square: float  # a unit of the documents' lengths squared
    view: float  # an image or tile in the tower and the adapter
    target: float  # a supervised token at the output layer

    def of(self, tokens: int, squares: int, views: int, targets: int) -> float:
        return self.token * tokens + self.square * squares + self.view * views + self.target * targets


class _Pass:
    """Goes through the model in the order of the forward pass; `flows` once what comes next is given something trained."""

    def __init__(self, trained: Collection[str]) -> None:
        self.trained = trained
        self.flows = False

    def trains(self, *modules: str) -> bool:
        return any(name.startswith(f"{module}.") for module in modules for name in self.trained)

    def norm(self, *modules: str) -> None:
        self.flows |= self.trains(*modules)

    def matrices(self, modules: dict[str, int]) -> float:
        """Of matrices, with their numbers of weights, that are given the same: FLOPs a row."""
        flops = sum(2.0 * size * (1 + self.flows + self.trains(module)) for module, size in modules.items())
        self.flows |= self.trains(*modules)
        return flops

    def attention(self, width: int) -> float:
        """Scores and mixing: FLOPs a unit of length squared, for all heads together."""
        return 4.0 * width * (3 if self.flows else 1)


def step_flops(decoder: DecoderConfig, vision: VisionTowerConfig | None, trained: Collection[str]) -> Flops:
    """What a step costs in which the parameters of these names are trained."""
    on = _Pass(trained)
    view = _view(on, decoder, vision) if vision else 0.0
    on.norm("model.embed_tokens")  # looked up, not multiplied; features are put among its rows

    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    shared = hidden // decoder.num_attention_heads * decoder.kv_heads
    token = square = 0.0
    for number in range(decoder.num_hidden_layers):
        layer = f"model.layers.{number}"
        on.norm(f"{layer}.input_layernorm")
        projections = {"q_proj": hidden * hidden, "k_proj": hidden * shared, "v_proj": hidden * shared}
        token += on.matrices({f"{layer}.self_attn.{name}": size for name, size in projections.items()})
        on.norm(f"{layer}.self_attn.q_norm", f"{layer}.self_attn.k_norm")
        square += on.attention(hidden)
        token += on.matrices({f"{layer}.self_attn.o_proj": hidden * hidden})
        on.norm(f"{layer}.post_attention_layernorm")
        token += on.matrices(
            {f"{layer}.mlp.gate_proj": hidden * inner, f"{layer}.mlp.up_proj": hidden * inner}
        )
        token += on.matrices({f"{layer}.mlp.down_proj": hidden * inner})
    on.norm("model.norm")
    return Flops(token, square, view, target=on.matrices({"lm_head": hidden * decoder.vocab_size}))


def _view(on: _Pass, decoder: DecoderConfig, vision: VisionTowerConfig) -> float:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    rows = on.matrices(
        {"vit.embeddings.patch_embedding": 3 * vision.patch_size**2 * hidden}
    )  # FLOPs a feature
    on.norm("vit.embeddings.position_embedding")
    attention = 0.0
    for number in range(vision.num_hidden_layers):
        layer = f"vit.encoder.layers.{number}"
        on.norm(f"{layer}.layer_norm1")
        rows += on.matrices(
            {f"{layer}.self_attn.{name}": hidden * hidden for name in ("q_proj", "k_proj", "v_proj")}
        )
        attention += on.attention(hidden)
        rows += on.matrices({f"{layer}.self_attn.out_proj": hidden * hidden})
        on.norm(f"{layer}.layer_norm2")
        rows += on.matrices({f"{layer}.mlp.fc1": hidden * inner})
        rows += on.matrices({f"{layer}.mlp.fc2": hidden * inner})
    on.norm("vit.post_layernorm")
    rows += on.matrices({"adapter.0": hidden * decoder.hidden_size})
    rows += on.matrices({"adapter.2": decoder.hidden_size**2})
    return vision.features * (rows + attention * vision.features)
