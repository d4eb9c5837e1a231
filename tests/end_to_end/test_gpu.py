"""The reference's numbers, compiled flex attention and a real layer's memory, on a GPU.

    CUDA_VISIBLE_DEVICES=0 pytest -m gpu

Without a GPU all of these tests are skipped.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from support.paths import ROOT
from support.reference import (
    IMAGE_IDS,
    NEWLINE_ID,
    SEPARATOR,
    VARIANTS,
    VIEWS,
    Variant,
    read_model,
    read_records,
    record_of,
    reference_batch,
    samples_of,
)
from unitoken.common.config import load_config
from unitoken.streaming_data.reading.batch import target_places, unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.config import DecoderConfig, StageConfig, VisionTowerConfig
from unitoken.train.model import decoder
from unitoken.train.model.decoder import DecoderLayer, compute_rotary, document_mask
from unitoken.train.model.loss import Loss
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import build_optimizer, freeze, set_learning_rate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: CUDA_VISIBLE_DEVICES=0 pytest -m gpu"
    ),
    pytest.mark.filterwarnings("ignore"),  # torch.compile's own
]
DEVICE = "cuda"
BATCHES = [
    "two_understanding",
    "generation_and_text",
    "text_only",
    "mixed_three",
    "failed_image",
    "mask_image_logits",
]
LAYER = DecoderConfig(
    vocab_size=65536,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=1,
    num_attention_heads=32,
    qk_norm="layer_shared",
)
SIGLIP = VisionTowerConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=2,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
LENGTH = 4096


@pytest.fixture(autouse=True)
def _as_in_training() -> Iterator[None]:
    """Compute float32 exactly, without TF32, which keeps 10 of its 23 bits and is on for convolutions.

    Also forget what was compiled: after another test's sizes torch would compile for variable sizes.
    """
    torch._dynamo.reset()
    decoder._compiled.cache_clear()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def records(golden: Path) -> dict[str, Any]:
    return read_records(golden)


def case_of(golden: Path, variant: Variant, name: str) -> dict[str, Any]:
    cases: list[dict[str, Any]] = json.loads((golden / "dev/D_model.json").read_text())
    return next(case for case in cases if (case["variant"], case["batch"]) == (variant, name))


def moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def learn(
    model: UniToken, batch: dict[str, Tensor], precision: Literal["fp32", "bf16"] = "fp32"
) -> tuple[Loss, dict[str, float]]:
    """Run forward and backward; bf16 is autocast over float32 weights, as Composer's `amp_bf16`.

    Returns:
        The loss, and the norm of each part's gradient.
    """
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
        loss = model(moved(batch))
    loss.total.backward()
    norms = {}
    for part, module in model.named_children():
        gradients = [
            parameter.grad.double().norm() for parameter in module.parameters() if parameter.grad is not None
        ]
        norms[part] = torch.stack(gradients).norm().item()
    return loss, norms


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_the_references(
    variant: Variant, name: str, golden: Path, records: dict[str, Any]
) -> None:
    """In float32 close to the recording's tolerances, and in bf16 close to its bf16 numbers.

    A GPU adds in another order. On a CPU bf16 is within 1.7e-3 of the recorded bf16 loss, 2.4e-3 of the
    float32 loss, 0.8 % of the norms.
    """
    case = case_of(golden, variant, name)
    batch = reference_batch(samples_of(golden, records, case))
    model = read_model(golden).to(DEVICE)
    model.masked_ids = IMAGE_IDS if case["config"]["mask_image_logits"] else ()
    loss, norms = learn(model, batch)
    assert loss.ce.item() == pytest.approx(case["c_loss"], abs=2e-5)
    assert loss.z.item() == pytest.approx(case["z_loss"], abs=2e-4)
    assert norms == pytest.approx(case["grad_norm_groups"], rel=1e-3, abs=1e-6)
    loss, norms = learn(model, batch, "bf16")
    assert loss.ce.item() == pytest.approx(case["info_c_loss_bf16_autocast"], abs=5e-3)
    assert loss.ce.item() == pytest.approx(case["c_loss"], abs=5e-3)
    assert loss.z.item() == pytest.approx(case["z_loss"], abs=3e-2)
    assert norms == pytest.approx(case["grad_norm_groups"], rel=3e-2, abs=1e-6)


@pytest.mark.parametrize("name", ["two_understanding", "mixed_three"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_flex_attention_equals_sdpa_in_packs(
    variant: Variant, name: str, golden: Path, records: dict[str, Any]
) -> None:
    """Both give the reference's numbers for our packs of several documents with padding at the end."""
    case = case_of(golden, variant, name)
    pack = [record_of(golden, records[entry["record_id"]]) for entry in case["samples"]]
    batch = unpack(Collate(8192, VIEWS[variant], "all", SEPARATOR, NEWLINE_ID, compat=True)([pack]))
    gradients: dict[str, dict[str, Any]] = {}
    for attention in ("sdpa", "flex"):
        model = read_model(golden).to(DEVICE)
        model.attention = attention  # type: ignore[assignment]
        loss, norms = learn(model, batch)
        gradients[attention] = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert loss.ce.item() == pytest.approx(case["c_loss"], abs=2e-5), attention
        assert norms == pytest.approx(case["grad_norm_groups"], rel=1e-3, abs=1e-6), attention
        loss, norms = learn(model, batch, "bf16")
        assert loss.ce.item() == pytest.approx(case["c_loss"], abs=5e-3), attention
        assert norms == pytest.approx(case["grad_norm_groups"], rel=3e-2, abs=1e-6), attention
    for key, expected in gradients["sdpa"].items():
        if not key.endswith("k_proj.bias"):  # zero except for rounding
            assert (gradients["flex"][key] - expected).norm() <= 1e-4 * expected.norm(), key


def test_compiled_flex_attention_keeps_documents_apart() -> None:
    """With 32 heads of 128 in bf16, each document gets what causal attention gives it alone.

    Kernels that add in another order differ by 3e-3 in norm, with single elements off by three hundredths.
    """
    torch.manual_seed(0)
    layer = real_layer(dropout=0.0)
    lengths = [1790, 7, 1201, 500]
    padding = torch.full((LENGTH - sum(lengths),), -1)
    documents = torch.cat([*(torch.full((n,), i) for i, n in enumerate(lengths)), padding])
    positions = torch.cat([torch.arange(n) for n in [*lengths, LENGTH - sum(lengths)]])[None].to(DEVICE)
    mask = document_mask(documents[None].int().to(DEVICE), "flex")
    hidden = torch.randn(1, LENGTH, LAYER.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    other = hidden.clone()
    other[:, 1790:1797] += 1.0  # the second document
    with torch.no_grad():
        cos, sin = compute_rotary(positions, 128, LAYER.rope_theta)
        packed, changed = layer(hidden, cos, sin, mask), layer(other, cos, sin, mask)
        begin = 0
        for number, n in enumerate(lengths):
            one = slice(begin, begin + n)
            alone = layer(hidden[:, one], cos[:, one], sin[:, one], None).float()
            assert (packed[:, one].float() - alone).norm() <= 1e-2 * alone.norm()
            assert torch.equal(changed[:, one], packed[:, one]) == (number != 1)
            begin += n


def real_layer(dropout: float) -> DecoderLayer:
    """Make a layer with bf16 weights, as FSDP2 gathers it under mixed precision."""
    layer = DecoderLayer(LAYER, dropout)
    for parameter in layer.parameters():
        if parameter.ndim == 2 and min(parameter.shape) > 1:
            nn.init.normal_(parameter, 0.0, 0.02)
    return layer.to(DEVICE, torch.bfloat16).train()


def test_a_real_layer_keeps_the_computed_amount_of_memory() -> None:
    """A layer of the 7B model keeps about 1.07 GB of activations of 4,096 tokens, without recomputation."""
    from unitoken.train.accounting.memory import decoder_layer_bytes

    layer = real_layer(dropout=0.05)
    hidden = torch.randn(
        1, LENGTH, LAYER.hidden_size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True
    )
    cos, sin = compute_rotary(torch.arange(LENGTH, device=DEVICE)[None], 128, LAYER.rope_theta)

    def step() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            out: Tensor = layer(hidden, cos, sin, None)
            return out

    step().float().square().mean().backward()  # allocates gradients and the libraries' workspaces
    before = torch.cuda.memory_allocated()
    out = step()
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    assert kept == pytest.approx(LENGTH * decoder_layer_bytes(LAYER, "none", width=2, trains=True), rel=0.1)
    torch.cuda.reset_peak_memory_stats()
    out.float().square().mean().backward()
    # The formula's working memory: gradients in the backward pass of the widest part, and of the output in
    # float32.
    widest = LENGTH * (3 * 2 * LAYER.intermediate_size + 12 * LAYER.hidden_size)
    working = widest + 3 * 4 * LENGTH * LAYER.hidden_size
    weights = 2 * 2 * sum(parameter.numel() for parameter in layer.parameters())  # gradients before the sum
    assert torch.cuda.max_memory_allocated() < before + kept + working + weights
    for tensor in (hidden, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_a_step_needs_no_more_memory_than_the_stage_announces(recomputed: str) -> None:
    """Two of 32 layers and two of the tower's 27 in Stage II check the formula for the README's 7B figure."""
    from unitoken.train.accounting.memory import RUNTIME, estimate_memory

    depth = LAYER.model_copy(update={"num_hidden_layers": 2})
    config = load_config(
        StageConfig, ROOT / "yamls/stage2.yaml", ["microbatch=1", f"activation_checkpointing={recomputed}"]
    )
    model = build_model(depth, SIGLIP, config.model, config.recompute)
    load_weights(model, {}, seed=0)
    trained = freeze(model.to(DEVICE).train(), config.trainable)
    number = sum(model.get_parameter(name).numel() for name in trained)
    optimizer = build_optimizer(model, config.optimizer)
    set_learning_rate(optimizer, 1e-5)
    for _ in range(2):  # in the second step there are Adam's moments
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(moved(two_documents())).total
        loss.backward()
        # Of the passes alone: on eight GPUs the optimizer's step needs an eighth.
        peak = torch.cuda.max_memory_allocated()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    need = estimate_memory(config, depth, SIGLIP, ranks=1, trained=number, views=2)
    announced = need.total - RUNTIME
    assert 0.6 * announced < peak < announced, f"{peak / 1e9:.1f} GB, announced was {need.summary()}"


def two_documents() -> dict[str, Tensor]:
    """A pack of two documents, each a question about an image of 729 features, with 300 trained tokens."""
    half, features = LENGTH // 2, 729
    columns = torch.cat([torch.arange(features) + start for start in (1000, half + 1000)])
    labels = torch.full((1, LENGTH), -100)
    labels[0, half - 300 : half] = labels[0, LENGTH - 300 :] = 7
    return {
        "input_ids": torch.randint(0, 65536, (1, LENGTH)),
        "labels": labels,
        **target_places(labels),
        "position_ids": torch.arange(half).repeat(2)[None],
        "document_ids": torch.arange(2).repeat_interleave(half)[None].int(),
        "pixel_values": torch.randint(0, 256, (2, 3, 384, 384), dtype=torch.uint8),
        "view_rows": torch.zeros(2, dtype=torch.int64),
        "feature_rows": torch.zeros(2 * features, dtype=torch.int64),
        "feature_columns": columns,
        "feature_views": torch.arange(2).repeat_interleave(features),
        "feature_patches": torch.arange(features).repeat(2),
    }
