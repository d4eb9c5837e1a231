"""Chameleon's decoder in plain torch, for packed sequences.

Parameter names are those of the Hugging Face checkpoints (`embed_tokens`, `layers.N.self_attn.q_proj`, ..., `norm`).
What sets Chameleon apart from Llama: query and key pass a LayerNorm over the head dimension before the rotary
embedding, and dropout sits on both residual branches (attention has none).

Positions and documents are data: tokens attend to earlier tokens of the same document only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitoken.train.config import DecoderConfig
from unitoken.train.model import activation_checkpointing

if TYPE_CHECKING:  # three seconds to import; sdpa does without
    from torch.nn.attention.flex_attention import BlockMask

Mask = Union[Tensor, "BlockMask", None]  # None: one document a row, plain causal


class KVCache:
    """Keys and values of the tokens seen so far, for generation; `length` tokens at most."""

    STEP = 256  # tokens of room added at once: doubling took twice the memory of a long prompt

    def __init__(self, layers: int, length: int) -> None:
        self.length = length
        self.seen = 0  # moved on by the decoder after its last layer
        self.stored: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, heads, T, head_dim) and give back all of (B, heads, seen + T, head_dim)."""
        end = self.seen + key.shape[2]
        assert end <= self.length, f"a cache for {self.length} tokens, asked to hold {end}"
        room = self.stored[layer]
        if room is None or room[0].shape[2] < end:
            taken = min(self.length, end + self.STEP)
            shape = (*key.shape[:2], taken, key.shape[3])
            larger = (key.new_empty(shape), value.new_empty(shape))
            for new, old in zip(larger, room or (), strict=False):
                new[:, :, : self.seen] = old[:, :, : self.seen]
            room = self.stored[layer] = larger
        room[0][:, :, self.seen : end] = key
        room[1][:, :, self.seen : end] = value
        return room[0][:, :, :end], room[1][:, :, :end]


def document_mask(document_ids: Tensor, kind: Literal["sdpa", "flex"]) -> Tensor | BlockMask:
    """Who sees whom in packs (P, L): causal, and inside the same document.

    Padding (-1) sees padding, so that no row of the softmax is empty (an empty one gives NaN).
    """
    if kind == "sdpa":
        return causal_mask(document_ids)
    rows, length = document_ids.shape

    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - the signature is torch's
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    make = _compiled(create_block_mask) if document_ids.is_cuda else create_block_mask
    mask: BlockMask = make(allowed, rows, None, length, length, device=str(document_ids.device))
    return mask


def causal_mask(document_ids: Tensor) -> Tensor:
    """The same as a tensor (P, 1, L, L), for sdpa."""
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (document_ids[:, None, :, None] == document_ids[:, None, None, :]) & causal


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():  # with the layer around it
        return cast(Tensor, flex_attention(query, key, value, block_mask=mask))
    if query.is_cuda:
        return cast(Tensor, _compiled(flex_attention)(query, key, value, block_mask=mask))
    with (
        warnings.catch_warnings()
    ):  # newer versions of torch warn that eager is slow; on the CPU it is for tests
        warnings.simplefilter("ignore")
        try:
            return cast(Tensor, flex_attention(query, key, value, block_mask=mask))
        except NotImplementedError:  # torch 2.11 has no gradient of it on a CPU
            return _dense(query, key, value, mask)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    rows, _, length, _ = query.shape
    allowed = create_mask(mask.mask_mod, rows, 1, length, length, device=str(query.device))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


class HeadNorm(nn.Module):
    """LayerNorm over the head dimension with a gain and a bias a head (transformers) or one for all (UniToken: groups = 1)."""

    def __init__(self, groups: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, head_dim))
        self.bias = nn.Parameter(torch.zeros(groups, head_dim))

    def forward(self, states: Tensor) -> Tensor:  # (P, L, heads, head_dim)
        return F.layer_norm(states, states.shape[-1:], eps=1e-5) * self.weight + self.bias


def rotary(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (P, L, head_dim), in float32: bfloat16 can not tell neighbouring positions apart."""
    steps = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    with torch.autocast(position_ids.device.type, enabled=False):
        angles = position_ids[:, :, None].float() * (1.0 / theta**steps)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (P, heads, L, head_dim)
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None].to(states.dtype) + torch.cat([-second, first], dim=-1) * sin[:, None].to(
        states.dtype
    )


class DecoderAttention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads
        self.head_dim = config.hidden_size // self.heads
        shared = config.qk_norm == "shared"
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = HeadNorm(1 if shared else self.heads, self.head_dim)
        self.k_norm = HeadNorm(1 if shared else self.kv_heads, self.head_dim)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask, past: KVCache | None) -> Tensor:
        rows, length, _ = hidden.shape
        query = self.q_norm(self.q_proj(hidden).view(rows, length, self.heads, self.head_dim)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(rows, length, self.kv_heads, self.head_dim)).transpose(
            1, 2
        )
        value = self.v_proj(hidden).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves the norms in float32
        if past is not None:
            key, value = past.update(self.layer, key, value)
        if self.kv_heads != self.heads:
            key, value = (
                states.repeat_interleave(self.heads // self.kv_heads, dim=1) for states in (key, value)
            )
        if mask is not None and not isinstance(mask, Tensor):
            mixed = _flex(query, key, value, mask)
        else:  # without a mask one new token behind a cache sees everything; several at once only come where it is empty
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None and length > 1
            )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        return out


class DecoderMLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class DecoderLayer(nn.Module):
    """One layer. `recompute` says what of it the backward pass computes again instead of keeping it."""

    def __init__(self, config: DecoderConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config, layer)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.swin_norm = config.swin_norm
        self.dropout = dropout
        self.recompute: activation_checkpointing.Mode = "none"

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask, past: KVCache | None = None
    ) -> Tensor:
        if self.training and past is None:
            return self._train(hidden, cos, sin, mask)
        return self._forward(hidden, cos, sin, mask, past)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """For training. Of the module its method, so that FSDP's hooks stay outside, and one compilation serves all layers."""
        self._train = torch.compile(self._train, *args, **kwargs)  # type: ignore[method-assign]

    def _train(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        return activation_checkpointing.run_layers(
            self._forward, self.recompute, hidden, cos, sin, mask, None
        )

    def _forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask, past: KVCache | None) -> Tensor:
        if self.swin_norm:  # the 34B model norms what a branch gives, not what it takes
            hidden = hidden + self._drop(self.input_layernorm(self.self_attn(hidden, cos, sin, mask, past)))
            return hidden + self._drop(self.post_attention_layernorm(self.mlp(hidden)))
        hidden = hidden + self._drop(self.self_attn(self.input_layernorm(hidden), cos, sin, mask, past))
        return hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout, self.training)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, dropout) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, mask: Mask, past: KVCache | None = None
    ) -> Tensor:
        """Embeddings (P, L, hidden), positions (P, L) -> hidden states (P, L, hidden) after the last norm."""
        cos, sin = rotary(position_ids, self.head_dim, self.rope_theta)
        hidden = embeddings
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask, past)
        if past is not None:
            past.seen += embeddings.shape[1]
        out: Tensor = self.norm(hidden)
        return out
