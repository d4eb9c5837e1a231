"""Chameleon's VQGAN: pixels -> codes -> pixels.

Encoder and quantizer are transformers' Chameleon modules. Those have no decoder; Janus' is the same network but for
attention at its lowest resolution and the order in which it counts its levels. Weights bear Meta's names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEEncoder, ChameleonVQVAEVectorQuantizer
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from unitoken.streaming_data.config import ConfigError
from unitoken.tokenize.weights import Parameters, Weights, find_weights


class VQGAN(nn.Module):
    """Parameters are named as Meta names them, but for `decoder.up`, which transformers counts the other way."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        d = parameters.ddconfig
        shape: dict[str, Any] = {
            "embed_dim": parameters.embed_dim,
            "num_embeddings": parameters.n_embed,
            "double_latent": d.double_z,
            "latent_channels": d.z_channels,
            "in_channels": d.in_channels,
            "base_channels": d.ch,
            "channel_multiplier": d.ch_mult,
            "num_res_blocks": d.num_res_blocks,
            "dropout": d.dropout,
        }
        encoder = ChameleonVQVAEConfig(**shape, resolution=d.resolution, attn_resolutions=[])
        self.encoder = ChameleonVQVAEEncoder(encoder)
        self.quantize = ChameleonVQVAEVectorQuantizer(encoder)
        self.decoder = JanusVQVAEDecoder(JanusVQVAEConfig(**shape, out_channels=d.out_ch))
        self.decoder.up[0].attn = nn.ModuleList()
        self.quant_conv = nn.Conv2d(d.z_channels * (2 if d.double_z else 1), parameters.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(parameters.embed_dim, d.z_channels, 1)

    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, embed_dim, h, w), before they are quantized."""
        latents: Tensor = self.quant_conv(self.encoder(pixels))
        return latents

    def codes(self, latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        codes: Tensor = self.quantize(latents)[2]
        return codes.view(batch, height, width)

    def pixels(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, 3, H, W), about -1..1."""
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
        pixels: Tensor = self.decoder(self.post_quant_conv(quantized))
        return pixels


class VisionCodec:
    """Arrays in, arrays out, whatever the device. Float32 all through: TF32 would flip 1.5 % of the codes."""

    def __init__(self, weights: Weights, device: str) -> None:
        self.codebook_size = weights.parameters.n_embed
        self.downsampling = weights.parameters.downsampling
        self.fingerprint = weights.fingerprint
        self._device = torch.device(device)
        levels = len(weights.parameters.ddconfig.ch_mult)
        with torch.device("meta"):
            model = VQGAN(weights.parameters)
        names = {name: meta_name(name, levels) for name in model.state_dict()}  # ours -> Meta's
        found = _read(weights.file)
        _check(found, {names[name]: tensor for name, tensor in model.state_dict().items()}, weights.file)
        model.load_state_dict({name: found[theirs].float() for name, theirs in names.items()}, assign=True)
        self._model = model.to(self._device).eval().requires_grad_(False)

    def encode(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """(B, H, W, 3) -> codes (B, H / downsampling, W / downsampling)."""
        with torch.inference_mode(), _float32():
            x = torch.tensor(pixels, device=self._device).permute(0, 3, 1, 2)
            # Contiguous: over channels-last data torch's GroupNorm on CPU takes the variance as E[x^2] - E[x]^2, and
            # nearly white images lost all their codes. By way of float64, as the reference scales.
            x = (x.contiguous().double() / 255 * 2 - 1).float()
            codes: npt.NDArray[np.int64] = self._model.codes(self._model.latents(x)).cpu().numpy()
        return codes

    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """Codes (B, h, w) -> (B, H, W, 3)."""
        with torch.inference_mode(), _float32():
            x = self._model.pixels(torch.tensor(codes, dtype=torch.int64, device=self._device))
            x = (x.clamp(-1, 1) + 1) / 2 * 255
            pixels: npt.NDArray[np.uint8] = x.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()  # truncated, as the reference
        return pixels


def load_vision(name: str, device: str = "cpu") -> VisionCodec:
    return VisionCodec(find_weights(name), device)


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _read(path: Path) -> dict[str, Tensor]:
    """Name -> tensor. Pickled files are read with `weights_only`: no code in them runs."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            content = content.get("state_dict", content)
        tensors = {name: tensor for name, tensor in content.items() if not name.startswith("loss.")}
    except Exception as error:  # zip, pickle, safetensors and their kin, all for a file that is no weights file
        raise ConfigError(f"vision.weights: {path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    return tensors


def meta_name(name: str, levels: int) -> str:
    if name.startswith("decoder.up."):
        level, rest = name.removeprefix("decoder.up.").split(".", 1)
        return f"decoder.up.{levels - 1 - int(level)}.{rest}"
    return name


def _check(found: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: Path) -> None:
    problems = [f"missing {name}" for name in needed if name not in found]
    problems += [f"unknown {name}" for name in found if name not in needed]
    problems += [
        f"{name} is {list(found[name].shape)}, the .yaml says {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConfigError(f"vision.weights: {path}: does not fit its .yaml: {'; '.join(problems[:8])}{more}")
