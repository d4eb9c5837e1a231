"""FLOPs computed from the model's sizes, against those that torch counts while it computes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unitoken.dataset.record import IGNORED
from unitoken.streaming_data.reading.batch import target_places
from unitoken.train.accounting.flops import peak_flops, step_flops
from unitoken.train.config import DecoderConfig, VisionTowerConfig
from unitoken.train.model.unitoken import UniToken
from unitoken.train.optim import freeze

DECODER = DecoderConfig(
    vocab_size=90,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
VISION = VisionTowerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=2,
)
PACKS, LENGTH, VIEWS = 2, 40, 3


def batch() -> dict[str, torch.Tensor]:
    """Return packs of one document each, so that torch counts no attention across documents."""
    rows, columns = torch.tensor([[0] * 32 + [1] * 16, [*range(32), *range(16)]])
    labels = torch.full((PACKS, LENGTH), IGNORED)
    labels[:, 30:] = 5
    return {
        "input_ids": torch.zeros(PACKS, LENGTH, dtype=torch.int64),
        "labels": labels,
        **target_places(labels),
        "position_ids": torch.arange(LENGTH).expand(PACKS, LENGTH),
        "document_ids": torch.zeros(PACKS, LENGTH, dtype=torch.int32),
        "pixel_values": torch.zeros(VIEWS, 3, 8, 8, dtype=torch.uint8),
        "feature_rows": rows,
        "feature_columns": columns,
        "feature_views": torch.arange(48) // 16,
        "feature_patches": torch.arange(48) % 16,
    }


@pytest.mark.parametrize(
    "trainable",
    [
        ["vit", "adapter"],  # Stage I
        ["vit", "adapter", "model", "lm_head"],  # Stage II
        ["adapter"],
        ["vit.embeddings", "lm_head"],
        ["lm_head"],
        ["model.layers.1.mlp", "model.layers.2.self_attn.q_norm"],
    ],
    ids=",".join,
)
def test_the_flops_of_a_step_are_those_torch_counts(trainable: list[str]) -> None:
    assert_counted(DECODER, trainable)


@pytest.mark.parametrize(
    "changes", [{"qk_norm": "rms", "head_dim": 20}, {"qk_norm": "none", "attention_bias": True}]
)
@pytest.mark.parametrize("trainable", [["vit", "adapter"], ["model"], ["model.layers.2"]], ids=",".join)
def test_other_families_flops_are_those_torch_counts(
    trainable: list[str], changes: dict[str, object]
) -> None:
    tied = {**DECODER.model_dump(), **changes, "tie_word_embeddings": True}
    assert_counted(DecoderConfig.model_validate(tied), trainable)


def assert_counted(decoder: DecoderConfig, trainable: list[str]) -> None:
    model = UniToken(decoder, VISION)
    trained = freeze(model, trainable)
    # The counter does not count the other attention kernels on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch()).total.backward()
    flops = step_flops(decoder, VISION, trained).total(PACKS * LENGTH, PACKS * LENGTH**2, VIEWS, targets=20)
    assert flops == pytest.approx(counter.get_total_flops(), rel=1e-3)  # torch 2.7: the same number


def test_a_7b_weight_takes_six_flops_a_token_or_four_if_frozen() -> None:
    decoder = DecoderConfig(
        vocab_size=65536,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert step_flops(decoder, None, ["model.embed_tokens.weight"]).token == 4 * weights
    assert step_flops(decoder, None, ["lm_head.weight"]).token == 2 * weights  # nothing below is trained
    some = [f"model.layers.{n}.{m}.weight" for n in range(32) for m in ("self_attn.q_proj", "mlp.up_proj")]
    partly_trained = step_flops(decoder, None, ["model.embed_tokens.weight", *some]).token
    assert 4 * weights < partly_trained < 6 * weights


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops_are_those_of_the_data_sheet_or_unknown(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


def test_adapters_need_no_gradients_of_the_weights_beside_them() -> None:
    names = [f"model.layers.{number}.mlp.up_proj.lora_a" for number in range(3)]
    matrix = 2 * 48 * 80
    adapted, frozen = step_flops(DECODER, None, names), step_flops(DECODER, None, ())
    # Behind the first adapter all matrices have gradients of their rows: one of its layer, and two layers.
    layer = 2 * (2 * 48 * 48 + 2 * 48 * 24) + 3 * matrix
    assert adapted.token - frozen.token == matrix + 2 * layer
