"""Weights are compared with the stage that would start from them: switches of the family, and constants."""

from typing import Any

import pytest

from support.small_datasets import small_vocabulary
from support.stages import DECODER
from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.compatibility import check_fits, compare_constants
from unitoken.train.checkpoint.metadata import CheckpointMetadata, ModelSizes
from unitoken.train.config import DecoderConfig

LINEAR = {"rope_type": "linear", "factor": 2}


def sizes(**switches: Any) -> ModelSizes:
    decoder = DecoderConfig.model_validate({**DECODER, "qk_norm": "none", **switches})
    return ModelSizes(decoder=decoder, vision=None)


def saved(**switches: Any) -> CheckpointMetadata:
    return CheckpointMetadata(sizes(**switches), None, None)


@pytest.mark.parametrize(
    ("switches", "difference"),
    [
        ({"qk_norm": "rms"}, "family llama and qwen3"),
        ({"qk_norm": "layer_per_head"}, "family llama and chameleon"),
        ({"attention_bias": True}, "family llama and qwen2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings False and True"),
        ({"head_dim": 8}, "head_size 16 and 8"),
    ],
)
def test_another_family_is_refused(switches: dict[str, Any], difference: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^x: another architecture: its decoder and this stage's have {difference}$"
    ):
        check_fits(saved(), sizes(**switches), small_vocabulary(), "x")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"head_dim": 16}),
        ({"qk_norm": "layer_per_head"}, {"qk_norm": "layer_shared"}),
        ({"max_position_embeddings": 2048}, {}),
    ],
)
def test_what_gives_the_same_model_fits(before: dict[str, Any], after: dict[str, Any]) -> None:
    check_fits(saved(**before), sizes(**after), small_vocabulary(), "x")
    assert compare_constants(saved(**before), sizes(**after)) is None


def test_another_scaling_of_the_rotary_embedding_is_named() -> None:
    assert compare_constants(saved(rope_scaling=LINEAR), sizes(rope_scaling=LINEAR)) is None
    assert compare_constants(saved(), sizes(rope_scaling=LINEAR)) == (
        "its model and this stage's have rope_scaling None and linear (factor 2)"
    )
