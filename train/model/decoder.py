"""A decoder in plain torch, for packed sequences: Chameleon's, Llama's, Mistral's, Qwen2's or Qwen3's.

Parameter names are those of the Hugging Face checkpoints (`embed_tokens`, `layers.N.self_attn.q_proj`, ...,
`norm`). The families are one network with switches, which are the fields of `DecoderConfig`. Chameleon
differs from Llama in that query and key pass a LayerNorm over the head dimension before the rotary embedding;
Qwen3 has a root-mean-square norm there, Qwen2 has biases. All have dropout on both residual branches
(attention has none). `swin_norm` is the variant of Chameleon 34B.

Positions and documents are inputs: tokens attend to earlier tokens of the same document only.

Shapes: P packs (rows), L positions, H query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitoken.train.config import DecoderConfig, RopeScaling
from unitoken.train.model import activation_checkpointing
from unitoken.train.model.autocast import product_dtype
from unitoken.train.model.projection import Projection

if TYPE_CHECKING:  # takes three seconds to import, and sdpa does not need it
    from torch.nn.attention.flex_attention import BlockMask

Mask = Union[Tensor, "BlockMask", None]  # None: one document a row, plain causal attention
MASK_BLOCK = 128  # queries and keys of a block of flex attention's mask, torch's default


class KVCache:
    """Keys and values of the tokens read so far, for generation: buffers of fixed shape.

    A row holds its tokens in order from the first place on, so that a token's place is its position in the
    text. Rows are read whole from their beginning (`begin`), then go on with a few tokens at a time
    (`proceed`). Each row may be at a position of its own. A token that is read again takes the place of what
    was there: so padding behind a row, and tokens that turn out to be wrong, leave no trace.

    Args:
        layers: number of decoder layers.
        rows: number of rows.
        length: the most tokens that a row may hold.
    """

    def __init__(self, layers: int, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        # By layer keys and values (rows, length, K * D), made when the layer first has some.
        self.stored: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._places: Tensor  # of the tokens that are read next, in the flat buffers
        self._end: int | None = None  # of the places that they see; None: only themselves

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored, which is that of attention."""
        assert self.stored[0] is not None, "nothing was read so far"
        return self.stored[0][0].dtype

    def grow(self, rows: int) -> None:
        """Make room for more rows."""
        for layer, buffers in enumerate(self.stored):
            if buffers is not None:
                larger = tuple(buffer.new_zeros(rows, *buffer.shape[1:]) for buffer in buffers)
                for new, old in zip(larger, buffers, strict=True):
                    new[: len(old)] = old
                self.stored[layer] = larger[0], larger[1]
        self.rows = rows

    def begin(self, rows: Tensor, tokens: int) -> None:
        """Prepare for reading whole texts.

        Args:
            rows: (P,), of the cache, that take a text each in place of what they hold.
            tokens: the length of the texts, T, with padding behind the shorter ones.
        """
        assert tokens <= self.length, f"a cache for {self.length} tokens can not hold {tokens}"
        columns = torch.arange(tokens, device=rows.device)
        self._places, self._end = (rows[:, None] * self.length + columns).flatten(), None

    def proceed(self, positions: Tensor, end: int) -> None:
        """Prepare for reading the next tokens of the first rows.

        Args:
            positions: (P, T), of the new tokens of the first P rows. What lies beyond the cache's length, as
                it does for rows that read nothing of use, lands in the last place.
            end: the number of places, from the first, that queries see; a mask hides some of them.
        """
        begins = torch.arange(len(positions), device=positions.device)[:, None] * self.length
        self._places = (begins + positions.clamp(max=self.length - 1)).flatten()
        self._end = end

    def of_layer(self, layer: int, hidden: Tensor, width: int) -> LayerCache:
        """Return what a layer needs of the cache.

        Args:
            layer: number of the layer.
            hidden: (P, T, hidden), the layer's input.
            width: K * D, the size of a token's keys.
        """
        buffers = self.stored[layer]
        if buffers is None:
            shape, dtype = (self.rows, self.length, width), product_dtype(hidden)
            # Zeros, as a masked place has a weight of 0, but 0 times what lies in fresh memory may be NaN.
            buffers = hidden.new_zeros(shape, dtype=dtype), hidden.new_zeros(shape, dtype=dtype)
            self.stored[layer] = buffers
        return LayerCache(*buffers, self._places, self._end)


class LayerCache(NamedTuple):
    """What a layer needs of a `KVCache`.

    Attributes:
        keys: (rows, length, K * D), of all tokens read so far.
        values: of the same shape.
        places: (P * T,), where the new tokens go in both: row * length + position.
        end: the number of places of the first P rows that the new tokens see; None: only themselves.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    end: int | None

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (P, K, T, D) of new tokens, and return those (P, K, S, D) that they see."""
        rows, heads, _, size = key.shape
        for buffer, new in ((self.keys, key), (self.values, value)):
            buffer.flatten(0, 1).index_copy_(0, self.places, new.transpose(1, 2).reshape(-1, heads * size))
        if self.end is None:
            return key, value
        keys, values = (
            buffer[:rows, : self.end].view(rows, -1, heads, size).transpose(1, 2)
            for buffer in (self.keys, self.values)
        )
        return keys, values


def causal_bias(positions: Tensor, end: int, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to the scores of a cache's places: 0 up to each query's, -inf behind it.

    Args:
        positions: (P, T), of the queries.
        end: the number of places, S.
        dtype: of attention. Adding this costs less than a boolean mask, which every layer would convert.

    Returns:
        (P, 1, T, S).
    """
    hidden = torch.arange(end, device=positions.device) > positions[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def document_mask(document_ids: Tensor, kind: Literal["sdpa", "flex"]) -> Tensor | BlockMask:
    """Return which keys each query sees in packs: earlier positions of the same document.

    Padding (-1) sees padding, so that no row of the softmax is empty (an empty row gives NaN).

    Args:
        document_ids: (P, L), the number of the document at each position; -1 is padding. For "flex" a
            document is one run of positions, as in every pack.
        kind: the attention implementation; "sdpa" takes a tensor (P, 1, L, L), "flex" a block mask.
    """
    if kind == "sdpa":
        return dense_document_mask(document_ids)
    return _block_mask(document_ids)


def _block_mask(document_ids: Tensor) -> BlockMask:
    """Return the block mask of packs whose documents are one run of positions each.

    A query sees its document up to itself. So where a document begins decides about whole blocks, and no
    matrix of L x L is made of it, as torch's `create_block_mask` does.

    Args:
        document_ids: (P, L).
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = document_ids.shape[1]
    firsts = torch.arange(0, length, MASK_BLOCK, device=document_ids.device)  # (B,), of each block
    lasts = (firsts + (MASK_BLOCK - 1)).clamp(max=length - 1)
    begins = _document_begins(document_ids)  # they never decrease
    before = firsts[:, None] > firsts  # (B of queries, B of keys)
    # The first query of a block sees most of what is before the block, its last query least.
    seen = before & (begins[:, firsts, None] <= lasts)  # (P, B, B), by some query
    whole = before & (begins[:, lasts, None] <= firsts)  # by all queries
    if length % MASK_BLOCK:
        whole[:, -1] = False  # torch counts the queries behind the end, which see nothing
    diagonal = firsts[:, None] == firsts
    partly = (seen & ~whole) | diagonal

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - torch's signature
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    mask: BlockMask = BlockMask.from_kv_blocks(
        *_listed_blocks(partly),
        *_listed_blocks(whole),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=allowed,
        seq_lengths=(length, length),
    )
    return mask


def _document_begins(document_ids: Tensor) -> Tensor:
    """Return for each position the first position (P, L) of its document."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_inside = F.pad(document_ids[:, 1:] == document_ids[:, :-1], (1, 0))
    return places.masked_fill(is_inside, 0).cummax(1).values


def _listed_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of set blocks (P, 1, B) in each row (P, B, B), and all, set ones first."""
    numbers = blocks.int()
    order = numbers.argsort(dim=-1, descending=True, stable=True)
    return numbers.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def dense_document_mask(document_ids: Tensor) -> Tensor:
    """Return the mask of `document_mask` as a boolean tensor (P, 1, L, L), True where a query sees a key."""
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (document_ids[:, None, :, None] == document_ids[:, None, None, :]) & causal


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Return flex attention (P, H, L, D) of queries (P, H, L, D), keys and values (P, K, L, D)."""
    from torch.nn.attention.flex_attention import flex_attention

    settings: dict[str, Any] = {"block_mask": mask, "enable_gqa": query.shape[1] != key.shape[1]}
    if torch.compiler.is_compiling():  # compiled together with the layer around it
        return cast(Tensor, flex_attention(query, key, value, **settings))
    if query.is_cuda:
        return cast(Tensor, _compiled(flex_attention)(query, key, value, **settings))
    with warnings.catch_warnings():
        # Newer versions of torch warn that eager flex attention is slow; on the CPU it is for tests.
        warnings.simplefilter("ignore")
        try:
            return cast(Tensor, flex_attention(query, key, value, **settings))
        except NotImplementedError:  # torch 2.11 has no gradient of it on a CPU
            return _dense_attention(query, key, value, mask)


def _dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Return what flex attention would, computed by sdpa with the mask as a tensor."""
    from torch.nn.attention.flex_attention import create_mask

    rows, _, length, _ = query.shape
    allowed = create_mask(mask.mask_mod, rows, 1, length, length, device=str(query.device))
    return _sdpa(query, key, value, allowed)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention (P, H, L, D) of queries (P, H, L, D) to keys and values (P, K, S, D).

    Args:
        query: (P, H, L, D).
        key: (P, K, S, D).
        value: (P, K, S, D).
        mask: which keys each query sees, as booleans or as what is added to the scores. Without one a single
            query sees all keys; several are in a causal order, with no keys before theirs.
    """
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    if groups != heads and (length == 1 or length < key.shape[2]):
        # A few queries that see a cache: the heads of a group are computed like places of one head, and the
        # cache is not copied.
        query = query.reshape(rows, groups, heads // groups * length, size)
        if mask is not None and length > 1:
            mask = mask.repeat(1, 1, heads // groups, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.reshape(rows, heads, length, size)
    if groups != heads:
        # With `enable_gqa` torch 2.7 has no fast kernel on CPUs (forward and backward take 2.4 times as long
        # for 1,024 tokens), nor one with a mask on GPUs, and computes whole matrices of probabilities.
        key, value = (states.repeat_interleave(heads // groups, dim=1) for states in (key, value))
    causal = mask is None and length > 1
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain over the last dimension, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise (..., size)."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


class HeadNorm(nn.Module):
    """LayerNorm over the head dimension, of the queries or keys.

    Args:
        groups: rows of gains and biases: the number of heads (transformers), or 1 for all heads (UniToken).
        head_dim: D.
    """

    def __init__(self, groups: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, head_dim))
        self.bias = nn.Parameter(torch.zeros(groups, head_dim))

    def forward(self, states: Tensor) -> Tensor:
        """Normalise (P, L, heads, D) over D."""
        return F.layer_norm(states, states.shape[-1:], eps=1e-5) * self.weight + self.bias


def compute_rotary(
    position_ids: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary embedding (arXiv 2104.09864), each (P, L, D).

    They are in float32, as bfloat16 can not tell neighbouring positions apart.

    Args:
        position_ids: (P, L), positions inside the document.
        head_dim: D.
        theta: base of the wavelengths.
        scaling: how the frequencies are scaled for longer texts, or None.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    with torch.autocast(position_ids.device.type, enabled=False):
        frequencies = 1.0 / theta**exponents
        if scaling is not None:
            frequencies = _scale_frequencies(frequencies, theta, scaling)
        angles = position_ids[:, :, None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        factor = _attention_factor(scaling)
        if factor == 1:
            return angles.cos(), angles.sin()
        return angles.cos() * factor, angles.sin() * factor


def _scale_frequencies(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Scale the frequencies (D / 2) of the rotary embedding, as transformers' modeling_rope_utils.py does."""
    factor, length = scaling.factor, scaling.original_max_position_embeddings
    if scaling.rope_type == "linear":
        return frequencies / factor
    assert length is not None
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None
        assert high is not None
        wavelengths = 2 * math.pi / frequencies
        unscaled = ((length / wavelengths - low) / (high - low)).clamp(0, 1)
    else:  # yarn, arXiv 2309.00071
        size = 2 * len(frequencies)
        fast, slow = (
            size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
            for rotations in (scaling.beta_fast or 32, scaling.beta_slow or 1)
        )
        if scaling.truncate is not False:
            fast, slow = math.floor(fast), math.ceil(slow)
        first, last = max(fast, 0), min(slow, size - 1)
        places = torch.arange(size // 2, device=frequencies.device, dtype=torch.float32)
        unscaled = 1 - ((places - first) / (last - first or 0.001)).clamp(0, 1)
    scaled: Tensor = frequencies / factor * (1 - unscaled) + frequencies * unscaled
    return scaled


def _attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor of queries and keys by which yarn keeps attention as sharp in longer texts."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def logarithmic(scale: float) -> float:
        return 0.1 * scale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return logarithmic(scaling.mscale) / logarithmic(scaling.mscale_all_dim)
    return logarithmic(1.0)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to queries or keys (P, heads, L, D)."""
    cos, sin = cos[:, None].to(states.dtype), sin[:, None].to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def _build_head_norm(config: DecoderConfig, heads: int) -> nn.Module:
    """Build the norm of so many heads of queries or keys; an identity, which has no parameters, for none."""
    if config.qk_norm == "none":
        return nn.Identity()
    if config.qk_norm == "rms":
        return RMSNorm(config.head_size, config.rms_norm_eps)
    return HeadNorm(heads if config.qk_norm == "layer_per_head" else 1, config.head_size)


class DecoderAttention(nn.Module):
    """Grouped-query self-attention: (P, L, hidden) -> (P, L, hidden).

    Queries and keys pass a norm, where the family has one, and the rotary embedding.

    Args:
        config: sizes of the decoder.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        bias = config.attention_bias
        self.q_proj = Projection(config.hidden_size, config.query_size, bias=bias)
        self.k_proj = Projection(config.hidden_size, config.key_size, bias=bias)
        self.v_proj = Projection(config.hidden_size, config.key_size, bias=bias)
        self.o_proj = Projection(config.query_size, config.hidden_size, bias=False)
        self.q_norm = _build_head_norm(config, config.num_attention_heads)
        self.k_norm = _build_head_norm(config, config.kv_heads)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask, past: LayerCache | None
    ) -> Tensor:
        """Attend within documents, and to the tokens of `past`.

        Args:
            hidden: (P, L, hidden).
            cos: (P, L, D) of the rotary embedding.
            sin: (P, L, D) of the rotary embedding.
            mask: which keys each query sees.
            past: the cache to read and extend, or None.
        """
        rows, length, _ = hidden.shape
        by_head = (rows, length, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden).view(by_head)).transpose(1, 2)  # (P, H, L, D)
        key = self.k_norm(self.k_proj(hidden).view(by_head)).transpose(1, 2)  # (P, K, L, D)
        value = self.v_proj(hidden).view(by_head).transpose(1, 2)  # (P, K, L, D)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves the norms in float32
        if past is not None:
            key, value = past.update(key, value)
        if mask is not None and not isinstance(mask, Tensor):
            attended = _flex_attention(query, key, value, mask)
        else:
            # Several tokens without a mask are whole texts, which see no cache.
            attended = _sdpa(query, key, value, mask)
        out: Tensor = self.o_proj(attended.transpose(1, 2).reshape(rows, length, -1))
        return out


class DecoderMLP(nn.Module):
    """SwiGLU feed-forward network (arXiv 2002.05202): (P, L, hidden) -> (P, L, hidden)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the network to each position."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class DecoderLayer(nn.Module):
    """One transformer layer: (P, L, hidden) -> (P, L, hidden).

    `recompute` says what the backward pass recomputes of it, in training.

    Args:
        config: sizes of the decoder.
        dropout: probability on both residual branches.
    """

    def __init__(self, config: DecoderConfig, dropout: float) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.swin_norm = config.swin_norm
        self.dropout = dropout
        self.recompute: activation_checkpointing.RecomputeMode = "none"

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask, past: LayerCache | None = None
    ) -> Tensor:
        """Apply the layer; the arguments are those of `DecoderAttention.forward`."""
        if self.training and past is None:
            return self._train(hidden, cos, sin, mask)
        return self._forward(hidden, cos, sin, mask, past)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layer for training, with the arguments of `torch.compile`.

        Only a method is compiled, so that FSDP's hooks stay outside and one compilation serves all layers.
        """
        self._train = torch.compile(self._train, *args, **kwargs)  # type: ignore[method-assign]

    def _train(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        return activation_checkpointing.run_recomputable(
            self._forward, self.recompute, hidden, cos, sin, mask, None
        )

    def _forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask, past: LayerCache | None
    ) -> Tensor:
        if self.swin_norm:  # the 34B model normalises the output of each branch, not its input
            hidden = hidden + self._dropout(
                self.input_layernorm(self.self_attn(hidden, cos, sin, mask, past))
            )
            return hidden + self._dropout(self.post_attention_layernorm(self.mlp(hidden)))
        hidden = hidden + self._dropout(self.self_attn(self.input_layernorm(hidden), cos, sin, mask, past))
        return hidden + self._dropout(self.mlp(self.post_attention_layernorm(hidden)))

    def _dropout(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout, self.training)


class Decoder(nn.Module):
    """The layers and the last norm: embeddings (P, L, hidden) -> hidden states (P, L, hidden).

    It holds the token embedding `embed_tokens`, which its caller applies.

    Args:
        config: sizes of the decoder.
        dropout: probability on both residual branches of each layer.
    """

    def __init__(self, config: DecoderConfig, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_dim, self.key_size = config.head_size, config.key_size
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, mask: Mask, past: KVCache | None = None
    ) -> Tensor:
        """Return the hidden states (P, L, hidden) after the last norm.

        Args:
            embeddings: (P, L, hidden), of tokens and image features.
            position_ids: (P, L), positions inside the document.
            mask: which keys each query sees; None for one document a row.
            past: the cache of earlier tokens, which is told before where these belong; or None.
        """
        cos, sin = compute_rotary(position_ids, self.head_dim, self.rope_theta, self.rope_scaling)
        hidden = embeddings
        for number, layer in enumerate(self.layers):
            seen = None if past is None else past.of_layer(number, hidden, self.key_size)
            hidden = layer(hidden, cos, sin, mask, seen)
        out: Tensor = self.norm(hidden)
        return out
