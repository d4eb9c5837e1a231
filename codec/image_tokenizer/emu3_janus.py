"""The image tokenizers of Emu3 and of Janus (LlamaGen's) as networks, made from transformers' models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.janus.modeling_janus import JanusVQVAE


class Emu3(Emu3VQVAE):  # type: ignore[misc]
    """Emu3's network for images, which computes what is equal for all frames of a video only once."""

    def latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in -1..1 as latents (B, embed_dim, h, w).

        Emu3 tokenizes videos: an image is a video of `temporal_downsample_factor` equal frames, which become
        one frame of latents. Up to the convolutions over time the frames are equal and are computed once.
        This is 4 times faster than `Emu3VQVAE.encode` and gives the same codes.
        """
        encoder = self.encoder
        hidden = encoder.norm_out(encoder.middle_block(encoder.down_block(encoder.conv_in(pixels))))
        hidden = encoder.conv_out(hidden * torch.sigmoid(hidden))
        # (B, C, T, h, w)
        frames = hidden.unsqueeze(2).repeat(1, 1, self.config.temporal_downsample_factor, 1, 1)
        for convolution in encoder.time_conv:
            frames = convolution(frames)
            frames = frames * torch.sigmoid(frames)
        for layer in encoder.time_res_stack:
            frames = layer(frames)
        latents: Tensor = self.quant_conv(frames).squeeze(2)
        return latents

    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) to pixels (B, 3, H, W), which are about -1..1."""
        pixels: Tensor = self.decode(codes)
        return pixels


class Janus(JanusVQVAE):  # type: ignore[misc]
    """Janus' network for images of any size, with LlamaGen's comparison of latents and codes."""

    def normalize_codebook(self) -> None:
        """Scale the vectors of the codebook to length 1, because LlamaGen compares directions.

        Janus' own encoder does this, and transformers' decoder, but not transformers' encoder: its codes
        differ wherever the lengths in a checkpoint differ. Latents need no scaling: their length changes no
        comparison with vectors of length 1.
        """
        weight = self.quantize.embedding.weight
        weight.data = F.normalize(weight.data, p=2, dim=-1)

    def latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in -1..1 as latents (B, embed_dim, h, w)."""
        latents: Tensor = self.quant_conv(self.encoder(pixels))
        return latents

    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) to pixels (B, 3, H, W), which are about -1..1.

        They may have any size; transformers' `decode` is for one size only.
        """
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
        pixels: Tensor = self.decoder(self.post_quant_conv(quantized))
        return pixels
