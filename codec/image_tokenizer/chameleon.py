"""Chameleon's VQGAN as a network.

Encoder and quantizer are transformers' Chameleon modules, which have no decoder. Janus' decoder is the same
network, apart from attention at its lowest resolution and the order in which it counts its levels.
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
    """Translate Meta's YAML into the arguments of transformers' ChameleonVQVAEConfig."""
    sizes = parameters.ddconfig
    return {
        "embed_dim": parameters.embed_dim,
        "num_embeddings": parameters.n_embed,
        "double_latent": sizes.double_z,
        "latent_channels": sizes.z_channels,
        "resolution": sizes.resolution,
        "in_channels": sizes.in_channels,
        "base_channels": sizes.ch,
        "channel_multiplier": sizes.ch_mult,
        "num_res_blocks": sizes.num_res_blocks,
        "dropout": sizes.dropout,
    }


class VQGAN(nn.Module):
    """The network. Its parameters have Meta's names, but `decoder.up` counts backwards: see `meta_name`.

    Args:
        parameters: its sizes.
        with_decoder: False: it only encodes.
    """

    def __init__(self, parameters: Parameters, with_decoder: bool = True) -> None:
        super().__init__()
        sizes = parameters.ddconfig
        shape = shape_of(parameters)
        encoder = ChameleonVQVAEConfig(**shape, attn_resolutions=[])
        self.encoder = ChameleonVQVAEEncoder(encoder)
        self.quantize = ChameleonVQVAEVectorQuantizer(encoder)
        shape.pop("resolution")  # unknown to Janus
        if with_decoder:
            self.decoder = JanusVQVAEDecoder(JanusVQVAEConfig(**shape, out_channels=sizes.out_ch))
            self.decoder.up[0].attn = nn.ModuleList()
        self.quant_conv = nn.Conv2d(sizes.z_channels * (2 if sizes.double_z else 1), parameters.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(parameters.embed_dim, sizes.z_channels, 1)

    def latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in -1..1 as latents (B, embed_dim, h, w), not yet quantized."""
        latents: Tensor = self.quant_conv(self.encoder(pixels))
        return latents

    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) to pixels (B, 3, H, W), which are about -1..1."""
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
        pixels: Tensor = self.decoder(self.post_quant_conv(quantized))
        return pixels


def meta_name(name: str, levels: int) -> str:
    """Return the name in Meta's files of a parameter of `VQGAN`.

    Args:
        name: the parameter's name in `VQGAN`.
        levels: the number of resolutions, the length of `ch_mult`.
    """
    if name.startswith("decoder.up."):
        level, rest = name.removeprefix("decoder.up.").split(".", 1)
        return f"decoder.up.{levels - 1 - int(level)}.{rest}"
    return name
