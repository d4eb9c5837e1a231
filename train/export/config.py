"""The small files of an exported model: config.json of its family in transformers, and the tower's.

Transformers 4.57 and 5 read them without a warning. Torch is not needed.
"""

from __future__ import annotations

import math
from typing import Any

from unitoken.codec.image_tokenizer.files import Parameters, Weights
from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import Vocabulary, image_code_name
from unitoken.train.checkpoint.compatibility import CompleteMetadata
from unitoken.train.checkpoint.families import FAMILIES
from unitoken.train.config import DecoderConfig, VisionTowerConfig

ARCHITECTURES = {
    "chameleon": "ChameleonForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
# The version in whose format the files are written. Transformers 4.57.6 takes the tokenizer of any local
# folder that names a version from 4.57.3 to 4.57.6, or none, for a broken one of Mistral's, and warns.
FORMAT_VERSION = "4.57.0"
# The token that transformers writes where an image will be: by its own name, and by Chameleon's.
IMAGE_NAMES = ("<image>", "<reserved08707>")

Fields = dict[str, Any]


def check_exportable(decoder: DecoderConfig, where: str) -> None:
    """Raise ConfigError for a decoder that no class of transformers computes.

    Args:
        decoder: the sizes and switches.
        where: the checkpoint or the setting, for the message.
    """
    if decoder.family == "chameleon" and (decoder.tie_word_embeddings or decoder.rope_scaling is not None):
        found = "rope_scaling" if decoder.rope_scaling is not None else "tie_word_embeddings"
        raise ConfigError(
            f"{where}: a decoder with qk_norm {decoder.qk_norm} and {found} is of no family in transformers, "
            "so it can not be exported"
        )


def model_config(
    metadata: CompleteMetadata, tokenizer: Any, image_tokenizer: Weights | None, dtype: str
) -> Fields:
    """Return the content of config.json.

    Args:
        metadata: of the model.
        tokenizer: of the export, as it is written; None without one.
        image_tokenizer: Chameleon's, if the folder holds it.
        dtype: of the tensors: bf16 or fp32.
    """
    decoder, vocabulary = metadata.sizes.decoder, metadata.vocabulary
    fields: Fields = {
        "architectures": [ARCHITECTURES[decoder.family]],
        "model_type": decoder.family,
        **_decoder_fields(decoder, metadata.stage.data.packed_length if metadata.stage else 0),
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.end_of_turn,
    }
    pad = _pad_id(tokenizer)
    if pad is not None and pad != vocabulary.end_of_turn:
        # Transformers does not train the row of this token, so it must not be the end of the turn.
        fields["pad_token_id"] = pad
    if decoder.family == "chameleon":
        fields["vocabulary_map"] = _vocabulary_map(vocabulary, tokenizer)
        # Without image tokenizer transformers makes a random one of this size.
        fields["vq_config"] = {"num_embeddings": len(vocabulary.image_ids)}
        if image_tokenizer is not None:
            fields["vq_config"] = _vq_config(image_tokenizer)
    return {**fields, "dtype": DTYPE_NAMES[dtype], "transformers_version": FORMAT_VERSION}


def generation_config(vocabulary: Vocabulary, tokenizer: Any) -> Fields:
    """Return the content of generation_config.json, by which `generate` stops at the end of a turn."""
    pad = _pad_id(tokenizer)
    return {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.end_of_turn,
        "pad_token_id": vocabulary.end_of_turn if pad is None else pad,
        "transformers_version": FORMAT_VERSION,
    }


def _pad_id(tokenizer: Any) -> int | None:
    pad: int | None = tokenizer.pad_token_id if tokenizer is not None else None
    return pad


def _decoder_fields(decoder: DecoderConfig, packed_length: int) -> Fields:
    """Return the decoder's fields under transformers' names, which are ours.

    Args:
        decoder: the sizes.
        packed_length: of the stage; 0: not known.
    """
    sizes = decoder.model_dump(exclude_none=True)
    longest = max(_longest_text(decoder), packed_length)
    if longest:
        sizes["max_position_embeddings"] = longest
    fields = {
        **sizes,
        "num_key_value_heads": decoder.kv_heads,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    if decoder.family == "chameleon":
        # Transformers ignores `qk_norm`, which says that the rows of a norm are equal.
        return {**fields, "mlp_bias": False}
    del fields["qk_norm"], fields["swin_norm"], fields["attention_bias"]
    fields |= {"head_dim": decoder.head_size, "rope_scaling": fields.get("rope_scaling")}
    if decoder.family == "llama":
        return {**fields, "attention_bias": False, "mlp_bias": False}
    fields["use_sliding_window"] = False
    return fields if decoder.family == "qwen2" else {**fields, "attention_bias": False}


def _longest_text(decoder: DecoderConfig) -> int:
    """Return the longest text of the checkpoint, 0 if it is not known."""
    scaling = decoder.rope_scaling
    if decoder.max_position_embeddings is not None:
        return decoder.max_position_embeddings
    if scaling is not None and scaling.original_max_position_embeddings is not None:
        return math.ceil(scaling.factor * scaling.original_max_position_embeddings)
    if decoder.family == "chameleon":
        return int(FAMILIES["chameleon"]["max_position_embeddings"])
    return 0


def _vocabulary_map(vocabulary: Vocabulary, tokenizer: Any) -> dict[str, int]:
    """Return the ids of the image codes and, if the tokenizer has it, of the image's placeholder."""
    names = {image_code_name(code): token for code, token in enumerate(vocabulary.image_ids)}
    ids = tokenizer.get_vocab() if tokenizer is not None else {}
    placeholders = [ids[name] for name in IMAGE_NAMES if name in ids]
    return {**names, "<image>": placeholders[0]} if placeholders else names


def _vq_config(weights: Weights) -> Fields:
    """Return the settings of a Chameleon VQGAN under transformers' names."""
    from unitoken.codec.image_tokenizer.chameleon import shape_of

    assert isinstance(weights.shape, Parameters), "only a Chameleon VQGAN is exported"
    return shape_of(weights.shape)


def tower_config(vision: VisionTowerConfig) -> Fields:
    """Return the sizes of the tower under the names of transformers' SiglipVisionConfig."""
    fixed = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
    return {**fixed, **vision.model_dump()}


def preprocessor_config(vision: VisionTowerConfig) -> Fields:
    """Return the settings of transformers' SiglipImageProcessor."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def prepare_tokenizer(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Add the tokens of a vocabulary to the tokenizer it was made of, and name those that transformers uses.

    A chat template that names the begin or the end of a text keeps those that it was written for.

    Raises:
        ConfigError: the tokenizer gives the new tokens other ids, as there are gaps between its own.
    """
    known, names = tokenizer.get_vocab(), vocabulary.new_names()
    tokenizer.add_tokens([name for name in names if name not in known], special_tokens=True)
    found = tokenizer.convert_tokens_to_ids(names)
    if found != [*vocabulary.new_ids]:
        raise ConfigError(
            f"codec.tokenizer: {names[0]} gets the id {found[0]} in it and has {vocabulary.new_ids[0]} in "
            "the vocabulary: the tokenizer's ids have gaps, so it can not be exported with the new tokens"
        )
    # Tokenizers of no class of their own also return `token_type_ids`, which these models do not take.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # what is saved
    template = str(tokenizer.chat_template or "")
    end = tokenizer.convert_ids_to_tokens(vocabulary.end_of_turn)
    if tokenizer.eos_token_id != vocabulary.end_of_turn and "eos_token" not in template:
        tokenizer.eos_token = end
    if tokenizer.bos_token is None and "bos_token" not in template:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(vocabulary.bos)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = end
    if vocabulary.layout is None:
        tokenizer.sep_token = end  # by which transformers' ChameleonProcessor ends a prompt
