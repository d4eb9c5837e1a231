"""The floating-point operations that a training step needs, from the model's sizes, and the MFU that follows.

    MFU = FLOPs of the step / (seconds of the step * GPUs * peak FLOP/s of one GPU)

A product with an m x n matrix takes 2mn FLOPs a row in the forward pass; in the backward pass as many again
for the gradient of the matrix if it is trained, and as many again for the gradient of the row if anything
below is trained. So in Stage I each frozen decoder matrix counts twice (it needs no gradient, but the adapter
below it does) and the frozen patch embedding once. The two products of attention have no weights: they count
once forward and twice backward. Norms, biases, activations and the rotary embedding are not counted.

The count is what the model needs, not what is computed: padding is left out; attention counts each document's
own length squared (not halved for causality, as is the custom); only supervised rows meet the output layer;
recomputation by activation checkpointing is not counted (MFU, not HFU); nor are the products of low-rank
adapters, which take about a hundredth at rank 16.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from unitoken.train.config import DecoderConfig, VisionTowerConfig, is_adapter

# Dense bfloat16 with float32 accumulation, in FLOP/s, from the makers' data sheets, by the driver's name of
# the device.
PEAK_FLOPS = {
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


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a device, or None where it is not known.

    Args:
        device_name: as torch.cuda.get_device_name gives it.
    """
    model = device_name.replace("NVIDIA ", "")
    for name, flops in PEAK_FLOPS.items():
        if model == name or model.startswith((f"{name} ", f"{name}-")):
            return flops
    return None


class FlopsPerUnit(NamedTuple):
    """FLOPs of the forward and backward pass, for each unit of work.

    Attributes:
        token: for a token in the decoder, padding left out.
        square: for a unit of the sum of the documents' squared lengths.
        view: for a view (image or tile) in the tower and the adapter.
        target: for a supervised token at the output layer.
    """

    token: float
    square: float
    view: float
    target: float

    def total(self, tokens: float, squares: float, views: float, targets: float) -> float:
        """Return the FLOPs of a step with these numbers of units."""
        return self.token * tokens + self.square * squares + self.view * views + self.target * targets


class _ForwardPass:
    """A walk through the model in the order of the forward pass, counting FLOPs on its way.

    Args:
        trained: names of the trained parameters.
    """

    def __init__(self, trained: Collection[str]) -> None:
        self.trained = trained
        self.input_needs_gradient = False  # whether anything before this point is trained

    def _trains(self, *modules: str) -> bool:
        """Return whether anything in the modules is trained."""
        return any(name.startswith(f"{module}.") for module in modules for name in self.trained)

    def _trains_weights(self, module: str) -> bool:
        """Return the same, without adapters beside the weights."""
        return any(name.startswith(f"{module}.") and not is_adapter(name) for name in self.trained)

    def pass_uncounted(self, *modules: str) -> None:
        """Pass modules whose operations are not counted, such as norms."""
        self.input_needs_gradient |= self._trains(*modules)

    def multiply(self, weights: dict[str, int]) -> float:
        """Multiply the same input with matrices, and return the FLOPs a row.

        Args:
            weights: the number of weights of each module.
        """
        flops = sum(
            2.0 * size * (1 + self.input_needs_gradient + self._trains_weights(module))
            for module, size in weights.items()
        )
        self.input_needs_gradient |= self._trains(*weights)
        return flops

    def attend(self, width: int) -> float:
        """Return the FLOPs of attention's two products for a unit of squared length.

        Args:
            width: size of all heads' queries together.
        """
        return 4.0 * width * (3 if self.input_needs_gradient else 1)


def step_flops(
    decoder: DecoderConfig, vision: VisionTowerConfig | None, trained: Collection[str]
) -> FlopsPerUnit:
    """Return the FLOPs per unit of work of a training step.

    Args:
        decoder: sizes of the decoder.
        vision: sizes of the vision tower, or None.
        trained: names of the trained parameters.
    """
    forward = _ForwardPass(trained)
    view = _view_flops(forward, decoder, vision) if vision else 0.0
    # Looked up, not multiplied; the image features are put among its rows.
    forward.pass_uncounted("model.embed_tokens")

    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    query_size, key_size = decoder.query_size, decoder.key_size
    token = square = 0.0
    for number in range(decoder.num_hidden_layers):
        layer = f"model.layers.{number}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        forward.pass_uncounted(f"{layer}.input_layernorm")
        token += forward.multiply({
            f"{attention}.q_proj": hidden * query_size,
            f"{attention}.k_proj": hidden * key_size,
            f"{attention}.v_proj": hidden * key_size,
        })  # fmt: skip
        forward.pass_uncounted(f"{attention}.q_norm", f"{attention}.k_norm")
        square += forward.attend(query_size)
        token += forward.multiply({f"{attention}.o_proj": query_size * hidden})
        forward.pass_uncounted(f"{layer}.post_attention_layernorm")
        token += forward.multiply({f"{mlp}.gate_proj": hidden * inner, f"{mlp}.up_proj": hidden * inner})
        token += forward.multiply({f"{mlp}.down_proj": hidden * inner})
    forward.pass_uncounted("model.norm")
    head = "model.embed_tokens" if decoder.tie_word_embeddings else "lm_head"
    target = forward.multiply({head: hidden * decoder.vocab_size})
    return FlopsPerUnit(token, square, view, target)


def _view_flops(forward: _ForwardPass, decoder: DecoderConfig, vision: VisionTowerConfig) -> float:
    """Return the FLOPs of a view in the tower and the adapter."""
    hidden, inner = vision.hidden_size, vision.intermediate_size
    feature = forward.multiply({"vit.embeddings.patch_embedding": 3 * vision.patch_size**2 * hidden})
    forward.pass_uncounted("vit.embeddings.position_embedding")
    square = 0.0
    for number in range(vision.num_hidden_layers):
        layer = f"vit.encoder.layers.{number}"
        forward.pass_uncounted(f"{layer}.layer_norm1")
        projections = [f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        feature += forward.multiply(dict.fromkeys(projections, hidden * hidden))
        square += forward.attend(hidden)
        feature += forward.multiply({f"{layer}.self_attn.out_proj": hidden * hidden})
        forward.pass_uncounted(f"{layer}.layer_norm2")
        feature += forward.multiply({f"{layer}.mlp.fc1": hidden * inner})
        feature += forward.multiply({f"{layer}.mlp.fc2": hidden * inner})
    forward.pass_uncounted("vit.post_layernorm")
    feature += forward.multiply({"adapter.0": hidden * decoder.hidden_size})
    feature += forward.multiply({"adapter.2": decoder.hidden_size**2})
    return vision.features * (feature + square * vision.features)
