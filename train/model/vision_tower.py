"""SigLIP's vision tower and the adapter that projects its features into the decoder's space.

Parameter names are those of the checkpoints (`embeddings.patch_embedding`,
`encoder.layers.N.self_attn.q_proj`, ..., `post_layernorm`). The checkpoints' pooling head is not built: the
features are the last hidden state.

Shapes: V views (images or tiles of S x S pixels), F features a view, hidden = the tower's hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from unitoken.train.config import VisionTowerConfig
from unitoken.train.model import activation_checkpointing


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

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer, recomputing activations in training only."""
        mode = self.recompute if self.training else "none"
        return activation_checkpointing.run_recomputable(self._forward, mode, hidden)

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
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


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
