"""Image tokenizers: pixels -> codes -> pixels, in one of three precisions, on a CPU or a GPU.

fp32   everything in float32
tf32   cuDNN's convolutions in TF32, the rest in float32: the default of torch and reference; fp32 on a CPU
bf16   weights and activations in bfloat16; pictures are scaled and codes compared in float32
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unitoken.codec.config import ImageTokenizerConfig
from unitoken.codec.image_tokenizer.files import Weights, check_decoder, find_image_tokenizer
from unitoken.codec.image_tokenizer.network import load_network

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)
Codes = npt.NDArray[np.int64]  # (h, w)

MAX_DISTANCES = 1 << 25
"""Distances between latents and codes in memory at once, 128 MiB. Emu3 has 2**27 for a 512 x 512 image."""
CPU_PIXELS = 512 * 512
"""Pixels that a CPU encodes at once: more is no faster, and takes 0.7 GiB for each picture of 512 x 512."""
COMPILED_SIZES = 64
"""The most crop sizes that torch.compile compiles for; Lumina's list for 512 pixels has 31."""


class Pending(Protocol):
    """A batch in the encoder."""

    started: float
    """Seconds on the codec's own clock; set by `codes`."""
    ended: float

    def codes(self) -> npt.NDArray[np.int64]:
        """Wait for the codes and return them, (B, h, w)."""
        ...


class VisionCodec(Protocol):
    """An image tokenizer with arrays as input and output, on any device."""

    codebook_size: int
    downsampling: int
    """Pixels per latent, in each direction."""
    fingerprint: str
    """The fingerprint of the weights."""

    def begin(self, pictures: Sequence[Pixels] | Pixels) -> Pending:
        """Start to encode a batch of pictures of one size; on a GPU, return before the codes are ready."""
        ...

    def encode(self, pixels: Sequence[Pixels] | Pixels) -> npt.NDArray[np.int64]:
        """Encode pictures (B, H, W, 3) as codes (B, H / downsampling, W / downsampling)."""
        ...

    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """Decode codes (B, h, w) to pictures (B, H, W, 3).

        Raises:
            ConfigError: the image tokenizer has no decoder.
        """
        ...


def load_vision(config: ImageTokenizerConfig, device: str = "cpu") -> VisionCodec:
    """Load an image tokenizer onto a device.

    Raises:
        ConfigError: its files are missing or do not fit.
    """
    weights = find_image_tokenizer(config)
    return _Codec(load_network(config.kind, weights), weights, config, torch.device(device))


class _Codec:
    def __init__(
        self, network: Any, weights: Weights, config: ImageTokenizerConfig, device: torch.device
    ) -> None:
        self.codebook_size = weights.codebook_size
        self.downsampling = weights.downsampling
        self.fingerprint = weights.fingerprint
        self._weights, self._name = weights, config.weights
        self._device, self._precision = device, config.precision
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._codebook = network.quantize.embedding.weight.to(device, torch.float32, copy=True)
        self._network = network.to(device, self._dtype)
        self._latents = network.latents
        # Emu3's attention takes a view of its input, which must not be channels-last.
        self._channels_last = device.type == "cuda" and config.kind != "emu3"
        if self._channels_last:
            self._network.to(memory_format=torch.channels_last)
        self._padded_to = 0
        if config.compile:
            # Beyond its limit torch runs uncompiled, without a warning.
            torch._dynamo.config.recompile_limit = COMPILED_SIZES
            self._latents = torch.compile(network.latents, dynamic=False)
            self._padded_to = config.batch_size  # each new number of pictures would be compiled for minutes
        self._clock_start = _now(device)

    def begin(self, pictures: Sequence[Pixels] | Pixels) -> Pending:
        with torch.inference_mode(), _arithmetic(self._precision, self._device):
            x = self._upload(pictures)
            started = _now(self._device)
            # Scaled in float64, as in the reference. Channels-last on a GPU only: on a CPU, GroupNorm takes
            # the variance of channels-last data as E[x^2] - E[x]^2, and nearly white images lost all their
            # codes.
            format = torch.channels_last if self._channels_last else torch.contiguous_format
            x = x.permute(0, 3, 1, 2).contiguous(memory_format=format)
            x = (x.double() / 255 * 2 - 1).to(self._dtype)
            parts = [x] if x.is_cuda else torch.split(x, max(1, CPU_PIXELS // x[0, 0].numel()))
            codes = torch.cat([nearest_codes(self._latents(part), self._codebook) for part in parts])
            codes = codes[: len(pictures)].to("cpu", non_blocking=True)
            return _Batch(codes, self._clock_start, started, _now(self._device))

    def encode(self, pixels: Sequence[Pixels] | Pixels) -> npt.NDArray[np.int64]:
        return self.begin(pixels).codes()

    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        check_decoder(self._weights, self._name, "vision.weights")
        with torch.inference_mode(), _arithmetic(self._precision, self._device):
            x = self._network.pixels(torch.tensor(codes, dtype=torch.int64, device=self._device)).float()
            x = (x.clamp(-1, 1) + 1) / 2 * 255
            # Truncated, not rounded, as in the reference.
            pixels: npt.NDArray[np.uint8] = x.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
        return pixels

    def _upload(self, pictures: Sequence[Pixels] | Pixels) -> Tensor:
        """Copy pictures to the device as bytes (B, H, W, 3), to a GPU from pinned memory without waiting."""
        count = max(len(pictures), self._padded_to)
        batch = torch.zeros(
            (count, *pictures[0].shape), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )
        np.stack(list(pictures), out=batch[: len(pictures)].numpy())
        return batch.to(self._device, non_blocking=True)


class _Batch:
    """The `Pending` of `_Codec`."""

    def __init__(self, codes: Tensor, origin: _Moment, started: _Moment, ended: _Moment) -> None:
        self._codes, self._origin, self._started, self._ended = codes, origin, started, ended
        self.started = self.ended = 0.0

    def codes(self) -> npt.NDArray[np.int64]:
        if isinstance(self._ended, torch.cuda.Event):
            self._ended.synchronize()
        self.started = _seconds_between(self._origin, self._started)
        self.ended = _seconds_between(self._origin, self._ended)
        codes: npt.NDArray[np.int64] = self._codes.numpy()
        return codes


_Moment = float | torch.cuda.Event


def _now(device: torch.device) -> _Moment:
    """Return the present moment; on a GPU, the moment at which it has finished its work so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()  # type: ignore[no-untyped-call]
    return event


def _seconds_between(start: _Moment, end: _Moment) -> float:
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000  # type: ignore[no-untyped-call]
    assert not isinstance(end, torch.cuda.Event)
    return end - start


def nearest_codes(latents: Tensor, codebook: Tensor, max_distances: int = MAX_DISTANCES) -> Tensor:
    """Return the code nearest to each latent, compared in float32.

    The distance is computed as in transformers' `ChameleonVQVAEVectorQuantizer`, term by term, so that the
    codes are the same in spite of rounding.

    Args:
        latents: (B, D, h, w).
        codebook: (codes, D).
        max_distances: the most distances in memory at once.

    Returns:
        The codes, (B, h, w).
    """
    batch, dimension, height, width = latents.shape
    rows = latents.float().permute(0, 2, 3, 1).reshape(-1, dimension)
    squares = torch.sum(codebook**2, dim=1)
    found = [
        torch.argmin(
            torch.sum(z**2, dim=1, keepdim=True) + squares - 2 * torch.einsum("bd,dn->bn", z, codebook.T),
            dim=1,
        )
        for z in torch.split(rows, max(1, max_distances // len(codebook)))
    ]
    return torch.cat(found).view(batch, height, width)


@contextlib.contextmanager
def _arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in the codec's precision even under autocast, as in a training run that draws samples."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=precision != "fp32"
            ),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
