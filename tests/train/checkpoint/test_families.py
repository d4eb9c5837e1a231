"""Which language models are read, and what is refused in one line before any weight is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.families import FAMILIES, NESTED, decoder_fields, decoder_names, text_fields
from unitoken.train.checkpoint.layouts import has_vision, model_configs, read_decoder
from unitoken.train.checkpoint.loading import find_weights
from unitoken.train.checkpoint.tensors import open_decoder_folder
from unitoken.train.config import DecoderConfig, ModelConfig
from unitoken.train.model.unitoken import UniToken, build_model

SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


def write(folder: Path, fields: dict[str, Any], **switches: Any) -> Path:
    """Write a folder with these fields in config.json and the tensors of a decoder with these switches."""
    decoder = DecoderConfig.model_validate({**SIZES, "qk_norm": "none", **switches})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SIZES, **fields}))
    save_file(UniToken(decoder, None).state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_defaults_are_those_of_transformers(kind: str) -> None:
    """A file may leave them out: the sizes of Janus' language model are there only where they differ."""
    from transformers import AutoConfig
    from transformers.models.emu3 import Emu3TextConfig

    theirs = Emu3TextConfig() if kind == "emu3_text_model" else AutoConfig.for_model(kind)
    fields = theirs.to_dict()
    rope = fields.get("rope_parameters") or {"rope_theta": fields.get("rope_theta")}
    for name, value in FAMILIES[kind].items():
        if name in ("qk_norm", "attention_bias"):
            continue
        expected = rope["rope_theta"] if name == "rope_theta" else fields.get(name)
        if name == "num_key_value_heads" and value is None:
            value = fields["num_attention_heads"]
        if name == "head_dim" and value is None:
            value = expected and fields["hidden_size"] // fields["num_attention_heads"]
        if name == "sliding_window" and not fields.get("use_sliding_window", True):
            continue  # transformers drops it where it is not used
        assert value == expected, name


def test_defaults_fill_what_a_nested_file_leaves_out() -> None:
    fields = {"model_type": "janus", "text_config": {"num_hidden_layers": 3}, "hidden_size": 5}
    kind, inner = text_fields(fields, Path("config.json"))
    assert kind == "llama"
    decoder = DecoderConfig.model_validate(decoder_fields(kind, inner, Path("config.json")))
    assert (decoder.num_hidden_layers, decoder.hidden_size, decoder.vocab_size) == (3, 4096, 32000)
    assert (decoder.rms_norm_eps, decoder.max_position_embeddings) == (1e-6, 2048)
    assert text_fields({"model_type": "emu3"}, Path())[0] == "emu3_text_model"


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("text_model.model.", "text_model.lm_head.weight"),
        ("text_model.", "text_model.lm_head.weight"),
        ("model.text_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("", "lm_head.weight"),
        ("model.", "lm_head.weight"),
    ],
)
def test_a_language_model_is_found_inside_another(prefix: str, head: str) -> None:
    inside = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight"]
    others = ["vqmodel.encoder.conv_in.weight", "model.vision_model.post_layernorm.bias"] if prefix else []
    others = [] if prefix == "model." else others
    rotary = f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"  # in old checkpoints
    expected = {f"model.{name}": f"{prefix}{name}" for name in inside} | {"lm_head.weight": head}
    assert decoder_names([*(f"{prefix}{name}" for name in inside), head, rotary, *others]) == expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma2"}, "`model_type` 'gemma2' is not supported; supported are chameleon, emu3, "),
    ({"model_type": "qwen3_moe"}, "`model_type` 'qwen3_moe' is not supported"),
    ({"model_type": "janus", "text_config": {"model_type": "phi"}}, "`model_type` 'phi' is not supported"),
    ({"model_type": "janus", "text_config": 3}, "`text_config`: expected an object, found int"),
    ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; only 'silu' is supported"),
    ({"attention_bias": True}, "`attention_bias` is True; only False is supported"),
    ({"model_type": "qwen3", "attention_bias": True}, "`attention_bias` is True; only False is supported"),
    ({"mlp_bias": True}, "`mlp_bias` is True; only False is supported"),
    ({"num_local_experts": 8}, "`num_local_experts` is 8; only 0 is supported"),
    ({"num_experts": 4}, "`num_experts` is 4; only 0 is supported"),
    ({"final_logit_softcapping": 30.0}, "`final_logit_softcapping` is 30.0, which is not supported"),
    ({"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping` is 50.0, which is not supported"),
    ({"logits_scaling": 8.0}, "`logits_scaling` is 8.0; only 1 is supported"),
    ({"residual_multiplier": 0.2}, "`residual_multiplier` is 0.2; only 1 is supported"),
    ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` is 0.5; only 1 is supported"),
    (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "`partial_rotary_factor` is 0.5; only 1 is supported",
    ),
    ({"quantization_config": {"bits": 4}}, "`quantization_config` is {'bits': 4}, which is not supported"),
    (
        {"model_type": "mistral", "sliding_window": 32},
        "`sliding_window` is 32, below `max_position_embeddings` 64: "
        "attention with a window is not supported",
    ),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0},
        "`sliding_window` is 32, below `max_position_embeddings` 64",
    ),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "`layer_types` has sliding_attention; only full_attention is supported",
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2}},
        "`rope_scaling`: rotary embeddings of type 'dynamic' are not supported; "
        "supported are default, linear, llama3, yarn",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        "`rope_parameters`: rotary embeddings of type 'longrope' are not supported",
    ),
    ({"rope_scaling": "linear"}, "`rope_scaling`: expected an object, found str"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: Field required"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "rope_type llama3 needs low_freq_factor"),
    (
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}},
        "high_freq_factor 1 is not above low_freq_factor 1",
    ),
    ({"num_key_value_heads": 3}, "2 attention heads can not share 3 key-value heads"),
    (
        {"head_dim": 6},
        "2 heads of head_dim 6 do not fit model.layers.0.self_attn.q_proj.weight of shape (8, 8)",
    ),
    (
        {"num_key_value_heads": 2},
        "2 heads of head_dim 4 do not fit model.layers.0.self_attn.k_proj.weight of shape (4, 8)",
    ),
    ({"head_dim": 3}, "head_dim 3 is not even, as the rotary embedding needs it"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_is_not_computed_is_refused_in_one_line(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", {"model_type": "llama", **fields})
    with pytest.raises(ConfigError) as caught:
        model_configs(ModelConfig(decoder=str(folder)))
    assert str(caught.value).startswith(f"model.decoder: {folder}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": 64},
        {"model_type": "mistral", "sliding_window": 32, "layer_types": ["full_attention"]},
        {"model_type": "qwen3", "head_dim": 4, "sliding_window": 32, "use_sliding_window": False},
        {"model_type": "qwen3", "head_dim": 4, "sliding_window": 32, "use_sliding_window": True},
        {"model_type": "llama", "logits_scaling": 1.0, "pretraining_tp": 2, "num_experts": 0},
    ],
)
def test_a_feature_that_is_not_in_use_is_no_error(fields: dict[str, Any], tmp_path: Path) -> None:
    rms = fields["model_type"] == "qwen3"
    folder = write(tmp_path / "model", fields, qk_norm="rms" if rms else "none")
    assert read_decoder(str(folder)).family == ("qwen3" if rms else "llama")


def test_tying_that_is_not_that_of_the_tensors_is_refused(tmp_path: Path) -> None:
    tied = write(tmp_path / "tied", {"model_type": "llama"}, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"tied: `tie_word_embeddings` is false, and there is no lm_head"):
        read_decoder(str(tied))
    folder = write(tmp_path / "apart", {"model_type": "llama", "tie_word_embeddings": True})
    config = ModelConfig(decoder=str(folder))
    model = build_model(*model_configs(config), config)
    with pytest.raises(
        ConfigError,
        match=r"apart: lm_head\.weight differs from model\.embed_tokens\.weight, "
        r"the model has one tensor for both \(tie_word_embeddings: true\)$",
    ):
        find_weights(model, config, None)
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copied / "model.safetensors")
    config = ModelConfig(decoder=str(copied))
    parts = find_weights(build_model(*model_configs(config), config), config, None)
    assert parts["lm_head"].shapes == {}


def test_transformers_5_ties_janus_by_the_whole_models_field(tmp_path: Path) -> None:
    fields = {"model_type": "janus", "text_config": SIZES}
    tied = write(tmp_path / "tied", fields, tie_word_embeddings=True)
    assert read_decoder(str(tied)).tie_word_embeddings
    assert not read_decoder(str(write(tmp_path / "apart", fields))).tie_word_embeddings
    untied = write(tmp_path / "no", {**fields, "tie_word_embeddings": False}, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="`tie_word_embeddings` is false, and there is no lm_head"):
        read_decoder(str(untied))


def test_the_tower_of_another_model_is_not_taken_for_ours(tmp_path: Path) -> None:
    for kind in NESTED:
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": {}}))
        assert not has_vision(folder)


def test_surplus_tensors_of_a_flat_folder_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {"model_type": "llama"}, attention_bias=True)
    config = ModelConfig(decoder=str(folder))
    model = build_model(*model_configs(config), config)
    with pytest.raises(
        ConfigError, match=r"not part of this model: model\.layers\.0\.self_attn\.k_proj\.bias"
    ):
        find_weights(model, config, None)
    assert torch.equal(
        open_decoder_folder(str(folder)).read(["model.norm.weight"])["model.norm.weight"], torch.ones(8)
    )
