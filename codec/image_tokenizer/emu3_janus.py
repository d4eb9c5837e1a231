"""The image tokenizers of Emu3 and of Janus (LlamaGen's) as networks: transformers' models, and what those leave out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.janus.modeling_janus import JanusVQVAE


class Emu3(Emu3VQVAE):  # type: ignore[misc]
    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, embed_dim, h, w).

        Emu3 tokenizes videos; an image is `temporal_downsample_factor` times the same frame, which give one frame of
        latents. Up to the convolutions over time all frames are equal, so they are computed once: 4 times faster than
        `Emu3VQVAE.encode`, with its codes.
        """
        encoder = self.encoder
        hidden = encoder.norm_out(encoder.middle_block(encoder.down_block(encoder.conv_in(pixels))))
        hidden = encoder.conv_out(hidden * torch.sigmoid(hidden))
        frames = hidden.unsqueeze(2).repeat(
            1, 1, self.config.temporal_downsample_factor, 1, 1
        )  # (B, C, T, h, w)
        for convolution in encoder.time_conv:
            frames = convolution(frames)
            frames = frames * torch.sigmoid(frames)
        for layer in encoder.time_res_stack:
            frames = layer(frames)
        latents: Tensor = self.quant_conv(frames).squeeze(2)
        return latents

    def pixels(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, 3, H, W), about -1..1."""
        pixels: Tensor = self.decode(codes)
        return pixels


class Janus(JanusVQVAE):  # type: ignore[misc]
    def normalize_codebook(self) -> None:
        """To vectors of length 1: LlamaGen compares directions. Janus' own encoder does, transformers' does not (its
        decoder does), which gives other codes wherever the lengths in a checkpoint differ. The length of a latent
        changes no comparison with such vectors.
        """
        weight = self.quantize.embedding.weight
        weight.data = F.normalize(weight.data, p=2, dim=-1)

    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, embed_dim, h, w)."""
        latents: Tensor = self.quant_conv(self.encoder(pixels))
        return latents

    def pixels(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, 3, H, W), about -1..1, of any size: transformers' `decode` knows one."""
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
        pixels: Tensor = self.decoder(self.post_quant_conv(quantized))
        return pixels
