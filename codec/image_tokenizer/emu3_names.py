"""The names and sizes of BAAI/Emu3-VisionTokenizer, as its authors' code has them -> transformers'.

The rules are those of transformers' own conversion (`convert_emu3_weights_to_hf.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "Emu3VisionVQ"
SIZES = {
    "codebook_size": "codebook_size",
    "embed_dim": "embed_dim",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "temporal_downsample_factor": "temporal_downsample_factor",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "dropout": "dropout",
}
RULES = (
    # Norms stand beside the attention, not in it.
    (r"\.mid\.attn_1\.norm\.", ".mid.attn_norm."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.([qkv])\.(weight|bias)$", r".\1_proj.\2"),
    (r"\.proj_out\.", ".out_proj."),
    (r"\.down\.", ".down_block.down."),
    (r"\.up\.", ".up_block.up."),
    (r"\.mid\.", ".middle_block."),
)
PROJECTION = re.compile(r"\.(?:[qkv]|out)_proj\.weight$")
"""A convolution of 1 x 1 pixel in the authors' code, (C, C, 1, 1), and a matrix (C, C) in transformers'."""


def transformers_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of transformers' Emu3VQVAEConfig."""
    return {theirs: sizes[name] for name, theirs in SIZES.items() if name in sizes}


def transformers_name(name: str) -> str:
    """Return a tensor's name in transformers' Emu3VQVAE."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def transformers_shape(name: str, shape: list[int]) -> list[int]:
    """Return a tensor's shape in transformers' Emu3VQVAE.

    Args:
        name: its name there.
        shape: its shape in the authors' files.
    """
    return shape[:2] if PROJECTION.search(name) and shape[2:] == [1, 1] else shape
