"""Chameleon's VQGAN as a network.

Encoder and quantizer are transformers' Chameleon modules. Those have no decoder; Janus' is the same network but for
attention at its lowest resolution and the order in which it counts its levels. Weights bear Meta's names.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoder,
    ChameleonVQVAEVectorQuantizer,
)
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from unitoken.codec.image_tokenizer.files import Parameters


def shape_of(parameters: Parameters) -> dict[str, Any]:
    """Meta's YAML in the words of transformers' ChameleonVQVAEConfig."""
    d = parameters.ddconfig
    return {
        "embed_dim": parameters.embed_dim,
        "num_embeddings": parameters.n_embed,
        "double_latent": d.double_z,
        "latent_channels": d.z_channels,
        "resolution": d.resolution,
        "in_channels": d.in_channels,
        "base_channels": d.ch,
        "channel_multiplier": d.ch_mult,
        "num_res_blocks": d.num_res_blocks,
        "dropout": d.dropout,
    }


class VQGAN(nn.Module):
    """Parameters are named as Meta names them, but for `decoder.up`, which transformers counts the other way."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        d = parameters.ddconfig
        shape = shape_of(parameters)
        encoder = ChameleonVQVAEConfig(**shape, attn_resolutions=[])
        self.encoder = ChameleonVQVAEEncoder(encoder)
        self.quantize = ChameleonVQVAEVectorQuantizer(encoder)
        shape.pop("resolution")  # Janus has none
        self.decoder = JanusVQVAEDecoder(JanusVQVAEConfig(**shape, out_channels=d.out_ch))
        self.decoder.up[0].attn = nn.ModuleList()
        self.quant_conv = nn.Conv2d(d.z_channels * (2 if d.double_z else 1), parameters.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(parameters.embed_dim, d.z_channels, 1)

    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, embed_dim, h, w), before they are quantized."""
        latents: Tensor = self.quant_conv(self.encoder(pixels))
        return latents

    def pixels(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, 3, H, W), about -1..1."""
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
        pixels: Tensor = self.decoder(self.post_quant_conv(quantized))
        return pixels


def meta_name(name: str, levels: int) -> str:
    """A parameter's name in `VQGAN` -> in Meta's files."""
    if name.startswith("decoder.up."):
        level, rest = name.removeprefix("decoder.up.").split(".", 1)
        return f"decoder.up.{levels - 1 - int(level)}.{rest}"
    return name
