"""SigLIP's vision tower and the adapter that brings its features into the decoder's space.

Parameter names are the checkpoints' own (`embeddings.patch_embedding`, `encoder.layers.N.self_attn.q_proj`, ...,
`post_layernorm`). The pooling head of the checkpoints is not built: the features are the last hidden state.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from unitoken.train.config import VisionTowerConfig
from unitoken.train.model import activation_checkpointing


class TowerEmbeddings(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.features, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, F, hidden)
        patches: Tensor = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


class TowerAttention(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class TowerMLP(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))
        return out


class TowerLayer(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.self_attn = TowerAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TowerMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recompute: activation_checkpointing.Mode = "none"

    def forward(self, hidden: Tensor) -> Tensor:
        return activation_checkpointing.run_layers(
            self._forward, self.recompute if self.training else "none", hidden
        )

    def _forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        out: Tensor = hidden + self.mlp(self.layer_norm2(hidden))
        return out


class TowerEncoder(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class VisionTower(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.embeddings = TowerEmbeddings(config)
        self.encoder = TowerEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (N, 3, S, S) -> features (N, F, hidden). Normalised here, so that a quarter of the bytes travel."""
        dtype = self.post_layernorm.weight.dtype
        normalised = ((pixels.float() / 255 - 0.5) / 0.5).to(dtype)
        out: Tensor = self.post_layernorm(self.encoder(self.embeddings(normalised)))
        return out


def adapter(vision_size: int, hidden_size: int) -> nn.Sequential:
    """Features (N, F, vision size) -> (N, F, hidden size); the GELU is the exact one, unlike the tower's."""
    return nn.Sequential(nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
