"""Which language models can be read, by the config.json and the tensor names of transformers 4 and 5.

All are the one decoder of `train/model/decoder.py`; here a family is the values that its config.json leaves
out. What the decoder does not compute is refused by name. Torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unitoken.common.errors import ConfigError
from unitoken.train.config import ROPE_NUMBERS, DecoderConfig

Fields = dict[str, Any]

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"

_LLAMA: Fields = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "qk_norm": "none",
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
# transformers' own defaults by `model_type`, and the switches of the family.
FAMILIES: dict[str, Fields] = {
    "chameleon": {
        **_LLAMA,
        "vocab_size": 65536,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "qk_norm": None,  # the layout of the norms shows in their shapes
    },
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {**_QWEN2, "attention_bias": True},
    "qwen3": {**_QWEN2, "head_dim": 128, "qk_norm": "rms"},
    "emu3_text_model": {
        **_LLAMA,
        "vocab_size": 184622,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 9216,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
}
# Models with a language model inside: the `model_type` that their `text_config` has if it names none.
NESTED = {"emu3": "emu3_text_model", "janus": "llama"}

# Fields by which other architectures differ, and the values with which they change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "num_local_experts": (0, 1),
    "num_experts": (0,),
    "n_routed_experts": (0,),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
}


def text_fields(fields: Fields, path: Path) -> tuple[str | None, Fields]:
    """Return the `model_type` and the fields of a config.json's language model.

    Args:
        fields: the content of config.json.
        path: the file, for messages.

    Returns:
        The type, None if the file has none (old files of Chameleon's), and the fields, which are those of
        `text_config` in a model that has one.

    Raises:
        ConfigError: a type that is not supported.
    """
    kind = fields.get("model_type")
    if kind in NESTED:
        inner = fields.get("text_config") or {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: `text_config`: expected an object, found {type(inner).__name__}")
        kind, fields = inner.get("model_type", NESTED[kind]), inner
    if kind is not None and (not isinstance(kind, str) or kind not in FAMILIES):
        supported = ", ".join(sorted([*FAMILIES, *NESTED]))
        raise ConfigError(f"{path}: `model_type` {kind!r} is not supported; supported are {supported}")
    return kind, fields


def ties_inner_embeddings(fields: Fields) -> bool:
    """Return whether a model with a language model inside ties its embeddings by a field of its own.

    Transformers 5 reads this field of the whole model, which is true by default in Janus'; transformers 4
    reads the language model's.
    """
    kind = fields.get("model_type")
    return kind in NESTED and bool(fields.get("tie_word_embeddings", kind == "janus"))


def decoder_fields(kind: str | None, fields: Fields, path: Path) -> Fields:
    """Return the fields of `DecoderConfig` that a config.json gives, with transformers' defaults.

    Args:
        kind: the `model_type`; None: Chameleon's, and all sizes must be there.
        fields: of the language model, from `text_fields`.
        path: the file, for messages.

    Raises:
        ConfigError: a feature that the decoder does not compute.
    """
    defaults = FAMILIES[kind] if kind is not None else {}
    merged = {**defaults, **fields}
    _check_architecture(kind, merged, path)
    _check_windows(merged, path)
    if kind != "chameleon" and kind is not None:  # other families' files do not have these
        merged |= {name: defaults.get(name) for name in ("qk_norm", "attention_bias", "swin_norm")}
    merged |= _rotary_fields(merged, path)
    return {name: merged[name] for name in DecoderConfig.model_fields if merged.get(name) is not None}


def _check_architecture(kind: str | None, fields: Fields, path: Path) -> None:
    without_effect = dict(_WITHOUT_EFFECT)
    if kind != "qwen2":  # whose biases are none of the output projection, and in no field of its file
        without_effect["attention_bias"] = (False,)
    for name, values in without_effect.items():
        value = fields.get(name)
        if value is not None and value not in values:
            only = f"; only {values[0]!r} is supported" if values else ""
            raise ConfigError(f"{path}: `{name}` is {value!r}{only or ', which is not supported'}")


def _check_windows(fields: Fields, path: Path) -> None:
    """Raise ConfigError if any layer's attention has a sliding window that is shorter than the texts."""
    kinds = fields.get("layer_types")
    others = sorted({str(each) for each in kinds} - {"full_attention"}) if isinstance(kinds, list) else []
    if others:
        raise ConfigError(f"{path}: `layer_types` has {', '.join(others)}; only full_attention is supported")
    window, longest = fields.get("sliding_window"), fields.get("max_position_embeddings")
    if window is None or kinds or not fields.get("use_sliding_window", True):
        return
    if isinstance(longest, int) and isinstance(window, int) and window >= longest:
        return
    first, layers = fields.get("max_window_layers"), fields.get("num_hidden_layers")
    if isinstance(first, int) and isinstance(layers, int) and first >= layers:
        return
    raise ConfigError(
        f"{path}: `sliding_window` is {window!r}, below `max_position_embeddings` {longest!r}: "
        "attention with a window is not supported"
    )


def _rotary_fields(fields: Fields, path: Path) -> Fields:
    """Return `rope_theta` and `rope_scaling`, which transformers 5 keeps in `rope_parameters`."""
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(key) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{path}: `{key}`: expected an object, found {type(rope).__name__}")
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    factor = rope.get("partial_rotary_factor")
    if factor not in (None, 1):
        raise ConfigError(f"{path}: `partial_rotary_factor` is {factor!r}; only 1 is supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ROPE_NUMBERS:
        supported = ", ".join(["default", *ROPE_NUMBERS])
        raise ConfigError(
            f"{path}: `{key}`: rotary embeddings of type {kind!r} are not supported; "
            f"supported are {supported}"
        )
    needed, allowed = ROPE_NUMBERS[kind]
    numbers = {name: rope[name] for name in (*needed, *allowed) if rope.get(name) is not None}
    if "original_max_position_embeddings" in needed:
        numbers.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **numbers}}


def decoder_names(stored: Iterable[str]) -> dict[str, str]:
    """Return the stored name of each tensor by our name: `model.*`, `lm_head.*`, and what else we export.

    In models with a language model inside (Emu3's, Janus') its tensors are `text_model.model.*`,
    `model.language_model.*` or the like, and the rest is left out. A VQ-VAE that transformers keeps in
    `model.vqmodel` is left out, as it has no part in training, and so are the pooling head of the tower in
    UniToken's checkpoints and the rotary frequencies in old ones.
    """
    names = [name for name in stored if not name.endswith("rotary_emb.inv_freq")]
    prefixes = [name.removesuffix(EMBEDDING) for name in names if f".{name}".endswith(f".{EMBEDDING}")]
    if len(prefixes) != 1 or prefixes[0] == "model.":
        unused = ("model.vqmodel.", "vit.head.")
        return {name: name for name in names if not name.startswith(unused)}
    (prefix,) = prefixes
    head = next((name for name in names if f".{name}".endswith(f".{HEAD}")), None)
    ours = {f"model.{name.removeprefix(prefix)}": name for name in names if name.startswith(prefix)}
    ours = {name: theirs for name, theirs in ours.items() if theirs != head}
    return ours if head is None else {**ours, HEAD: head}


def check_tensors(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise ConfigError if heads or tied embeddings are not those of the tensors.

    Args:
        config: the sizes.
        shapes: of the tensors, by our names.
        folder: for messages.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads}
    for projection, count in heads.items():
        name = f"model.layers.0.self_attn.{projection}.weight"
        found = shapes.get(name)
        if found is not None and found[:1] != (count * config.head_size,):
            raise ConfigError(
                f"{folder}: {count} heads of head_dim {config.head_size} do not fit {name} of shape {found}"
            )
    if config.family != "chameleon" and not config.tie_word_embeddings and HEAD not in shapes:
        raise ConfigError(f"{folder}: `tie_word_embeddings` is false, and there is no {HEAD}")
