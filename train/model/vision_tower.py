"""SigLIP's vision tower and the adapter that projects its features into the decoder's space.

Parameter names are those of the checkpoints (`embeddings.patch_embedding`,
`encoder.layers.N.self_attn.q_proj`, ..., `post_layernorm`). The checkpoints' pooling head is not built: the
features are the last hidden state.

Shapes: V views (images or tiles of S x S pixels), F features a view, hidden = the tower's hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitoken.train.config import VisionTowerConfig
from unitoken.train.model import activation_checkpointing
from unitoken.train.model.autocast import product_dtype


class TowerEmbeddings(nn.Module):
    """Patch embeddings plus learnt position embeddings: (V, 3, S, S) -> (V, F, hidden)."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.features, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels (V, 3, S, S) as (V, F, hidden)."""
        patches: Tensor = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


class TowerAttention(nn.Module):
    """Self-attention among the features of a view: (V, F, hidden) -> (V, F, hidden)."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Attend over all features of each view."""
        # On a GPU autocast computes LayerNorm in float32: rounded here it is rounded, and kept, once for
        # three.
        hidden = hidden.to(product_dtype(hidden))
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (V, heads, F, head dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class TowerMLP(nn.Module):
    """Two linear layers around a GELU in its tanh approximation: (V, F, hidden) -> (V, F, hidden)."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the MLP to each feature."""
        out: Tensor = self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))
        return out


class TowerLayer(nn.Module):
    """A pre-norm transformer layer: (V, F, hidden) -> (V, F, hidden).

    `recompute` says what the backward pass recomputes of it.
    """

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.self_attn = TowerAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TowerMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recompute: activation_checkpointing.RecomputeMode = "none"
        self.is_compiled = False

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer, recomputing activations in training only."""
        return self._train(hidden) if self.training else self._forward(hidden)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layer for training, with the arguments of `torch.compile`; see DecoderLayer.compile."""
        self._train = torch.compile(self._train, *args, **kwargs)  # type: ignore[method-assign]
        self.is_compiled = True

    def _train(self, hidden: Tensor) -> Tensor:
        return activation_checkpointing.run_recomputable(self._forward, self.recompute, hidden)

    def _forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        out: Tensor = hidden + self.mlp(self.layer_norm2(hidden))
        return out


class TowerEncoder(nn.Module):
    """The stack of layers: (V, F, hidden) -> (V, F, hidden)."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layers in order."""
        if self.training and self.layers[0].is_compiled:
            return self._apply_compiled(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def _apply_compiled(self, hidden: Tensor) -> Tensor:
        """Apply compiled layers to any number of views without compiling them again.

        torch.compile takes a first dimension of 1 for a constant, so a single view gets a second one; and
        the embeddings come with other strides than what the layers return.
        """
        views = len(hidden)
        hidden = F.pad(hidden, (0, 0, 0, 0, 0, 1)) if views == 1 else hidden.contiguous()
        torch._dynamo.mark_dynamic(hidden, 0)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:views]


class VisionTower(nn.Module):
    """The whole tower: uint8 pixels (V, 3, S, S) -> features (V, F, hidden)."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.embeddings = TowerEmbeddings(config)
        self.encoder = TowerEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of uint8 pixels, normalised here so that a quarter of the bytes travel."""
        dtype = self.post_layernorm.weight.dtype
        normalised = ((pixels.float() / 255 - 0.5) / 0.5).to(dtype)
        out: Tensor = self.post_layernorm(self.encoder(self.embeddings(normalised)))
        return out


def build_adapter(vision_size: int, hidden_size: int) -> nn.Sequential:
    """Build the projection of features (V, F, vision size) to (V, F, hidden size).

    Its GELU is the exact function, unlike the tower's.
    """
    return nn.Sequential(nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
