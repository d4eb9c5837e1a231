"""The memory estimate of a stage is what the stage takes."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.simulated_step import LUMINA_7B, SIGLIP_SO400M, peak_bytes
from support.paths import ROOT
from support.stages import DECODER, VISION, stage, write_data
from unitoken.common.config import load_config
from unitoken.streaming_data.reading.batch import target_places
from unitoken.train.accounting.memory import (
    adapter_bytes,
    count_adapters,
    count_parameters,
    decoder_layer_bytes,
    estimate_memory,
    stack_bytes,
    tower_layer_bytes,
)
from unitoken.train.check import check_stage
from unitoken.train.config import (
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    StageConfig,
    VisionTowerConfig,
    is_adapter,
)
from unitoken.train.model.activation_checkpointing import RecomputeMode, set_recompute
from unitoken.train.model.decoder import Decoder, _compiled, document_mask
from unitoken.train.model.lora import add_adapters
from unitoken.train.model.unitoken import build_model
from unitoken.train.model.vision_tower import TowerEncoder
from unitoken.train.optim import freeze

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
TOKENS = 96
MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")


class CreatedStorages(TorchDispatchMode):
    """Records every storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def bytes_kept(module: nn.Module, *inputs: Any) -> int:
    """Return the bytes kept after the forward pass, by autograd or by selective checkpointing."""
    with CreatedStorages() as created:
        out = module(*inputs)
    known = {
        tensor.untyped_storage()._cdata
        for tensor in (*module.parameters(), *inputs)
        if isinstance(tensor, Tensor)
    }
    alive = {key: size for key, (reference, size) in created.storages.items() if not reference.expired()}
    out.sum().backward()
    return sum(size for key, size in alive.items() if key not in known)


def kept_by_decoder(
    setting: RecomputeMode | int,
    trains: bool,
    dropout: float,
    dtype: torch.dtype = torch.float32,
    lora: LoraConfig | None = None,
    **changes: Any,
) -> float:
    """Return the bytes per token that a decoder's layers keep."""
    config = DecoderConfig.model_validate({**SIZES, **changes})
    decoder = Decoder(config, dropout).to(dtype)
    decoder.layers.requires_grad_(trains)
    if lora is not None:
        adapt(decoder, lora)
    set_recompute(decoder.layers, setting)
    documents = (torch.arange(TOKENS) // 30)[None].int()
    hidden = torch.randn(1, TOKENS, config.hidden_size, dtype=dtype, requires_grad=True)
    inputs = hidden, torch.arange(TOKENS)[None], document_mask(documents, "sdpa")
    everything = bytes_kept(decoder, *inputs)
    decoder.layers = nn.ModuleList()
    return (everything - bytes_kept(decoder, *inputs)) / TOKENS


def adapt(decoder: Decoder, lora: LoraConfig) -> None:
    """Give a decoder adapters, which alone have gradients."""
    weights = decoder.state_dict()
    add_adapters(decoder.layers, lora)
    drawn = {name: torch.randn(parameter.shape) for name, parameter in decoder.named_parameters()}
    decoder.load_state_dict(drawn | weights, assign=True)
    for name, parameter in decoder.layers.named_parameters():
        parameter.requires_grad_(is_adapter(name))


FAMILIES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 2, "qk_norm": "layer_per_head"},
    {"num_key_value_heads": 2, "qk_norm": "none", "tie_word_embeddings": True},
    {"num_key_value_heads": 2, "qk_norm": "none", "attention_bias": True},
    {"num_key_value_heads": 2, "qk_norm": "rms", "head_dim": 40},
)


@pytest.mark.parametrize("changes", FAMILIES)
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("setting", [*MODES, 2, 4])
def test_a_decoder_keeps_the_estimate(
    setting: RecomputeMode | int, trains: bool, changes: dict[str, Any]
) -> None:
    config = DecoderConfig.model_validate({**SIZES, **changes})
    each = {
        mode: decoder_layer_bytes(config, mode, width=4, trains=trains, mask=4 * TOKENS, dropout=4)
        for mode in MODES
    }
    found = kept_by_decoder(setting, trains, dropout=0.1, **changes)
    found -= 2 * 4 * config.head_size  # cosines and sines, which all layers share
    assert stack_bytes(setting, config.num_hidden_layers, each) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_decoder_keeps_the_estimate_in_bfloat16(mode: RecomputeMode, trains: bool) -> None:
    """On the CPU autocast leaves the head norms in bfloat16; on a GPU they are in float32."""
    each = decoder_layer_bytes(
        DecoderConfig.model_validate(SIZES), mode, width=2, trains=trains, mask=2 * TOKENS, dropout=2
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = kept_by_decoder(mode, trains, dropout=0.1, dtype=torch.bfloat16)
    assert 6 * each == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], None])
@pytest.mark.parametrize("mode", MODES)
def test_a_decoder_keeps_the_estimate_for_adapters(mode: RecomputeMode, targets: list[str] | None) -> None:
    lora = LoraConfig.model_validate({"rank": 4} | ({"targets": targets} if targets else {}))
    config = DecoderConfig.model_validate(SIZES)
    each = decoder_layer_bytes(config, mode, width=4, trains=False, mask=4 * TOKENS, dropout=4)
    found = kept_by_decoder(mode, False, dropout=0.1, lora=lora) - 2 * 4 * config.head_size
    assert 6 * (each + adapter_bytes(config, lora, mode, width=4)) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("setting", MODES)
def test_a_tower_keeps_the_estimate(setting: RecomputeMode) -> None:
    config = VisionTowerConfig.model_validate(
        {**VISION, "hidden_size": 48, "intermediate_size": 160, "num_hidden_layers": 6}
    )
    encoder = TowerEncoder(config)
    set_recompute(encoder.layers, setting)
    features = torch.randn(3, config.features, config.hidden_size, requires_grad=True)
    found = bytes_kept(encoder, features) / (3 * config.features)
    assert 6 * tower_layer_bytes(config, setting, width=4) == pytest.approx(found, rel=0.02)


def test_recomputing_more_keeps_less() -> None:
    none, selective, full = (kept_by_decoder(setting, trains=True, dropout=0.1) for setting in MODES)
    assert none > 1.5 * selective > 2 * full
    assert none > kept_by_decoder(2, True, 0.1) > full


@pytest.mark.parametrize("changes", [*FAMILIES, {"num_key_value_heads": 1}])
def test_parameters_are_counted_like_those_of_the_model(changes: dict[str, Any]) -> None:
    decoder = DecoderConfig.model_validate({**DECODER, "num_attention_heads": 4, **changes})
    vision = VisionTowerConfig.model_validate(VISION)
    model = build_model(decoder, vision, ModelConfig(decoder=decoder, vision=vision))
    assert count_parameters(decoder, vision).total == sum(
        parameter.numel() for parameter in model.parameters()
    )
    lora = LoraConfig(rank=3)
    add_adapters(model.model.layers, lora)
    assert count_adapters(decoder, lora) == sum(
        parameter.numel() for name, parameter in model.named_parameters() if is_adapter(name)
    )
    assert count_parameters(decoder, vision).tower == sum(
        parameter.numel() for parameter in model.vit.parameters()
    )


def test_the_real_models_have_the_references_parameter_counts() -> None:
    assert count_parameters(LUMINA_7B, None).total == 7_013_158_912
    # The decoder, the adapter, and the tower without its head.
    assert count_parameters(LUMINA_7B, SIGLIP_SO400M).total == 7_013_158_912 + 21_504_000 + 412_987_248


LORA = ["model.lora={}", "trainable=[lora, image_rows, vit, adapter]"]


def seven_b(layers: int) -> DecoderConfig:
    return LUMINA_7B.model_copy(update={"num_hidden_layers": layers})


def full(packs: int) -> list[str]:
    """Return the settings that recompute all, with so many packs a microbatch."""
    return ["activation_checkpointing=full", f"microbatch={packs}"]


@pytest.mark.parametrize(
    ("name", "packs", "views", "gigabytes"),
    [("stage1", 8, 2, 27), ("stage2", 8, 2, 39), ("stage1-anyres", 4, 10, 29), ("stage2-anyres", 4, 10, 44)],
)
def test_the_7b_stages_take_the_figures_of_the_page(
    name: str, packs: int, views: int, gigabytes: int
) -> None:
    """Two images a pack, of five views each under AnyRes."""
    config = load_config(StageConfig, ROOT / f"yamls/{name}.yaml", full(packs))
    trained = 434_000_000 if name.startswith("stage1") else 7_447_000_000
    need = estimate_memory(
        config, LUMINA_7B, SIGLIP_SO400M, ranks=8, trained=trained, views=views * config.microbatch_packs
    )
    assert need.total / 1e9 == pytest.approx(gigabytes, abs=1)
    assert need.summary().startswith(f"about {need.total / 1e9:.1f} GB a GPU: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "ranks", "microbatches", "overrides"),
    [
        ("stage1", 32, 8, 1, []),
        ("stage2", 32, 8, 1, []),
        ("stage2-anyres", 32, 8, 1, []),
        ("stage2", 8, 8, 2, ["microbatch=4"]),
        ("stage2", 8, 8, 1, ["trainable=[new_rows, vit, adapter]", "model.grow={}"]),
        ("stage2", 8, 8, 1, LORA),
        ("stage2", 8, 1, 2, [*LORA, "microbatch=1"]),
        ("stage2", 8, 1, 1, [*LORA, "microbatch=1", "activation_checkpointing=none"]),
        ("stage2", 32, 16, 1, ["fsdp.reshard=false"]),
        ("stage2", 8, 8, 2, ["microbatch=1", "fsdp.reduce=bf16"]),
        ("stage1", 4, 8, 1, ["microbatch=2", "activation_checkpointing=none"]),
        ("stage2", 8, 8, 1, ["microbatch=2", "activation_checkpointing=none"]),
        ("stage2", 8, 8, 1, ["microbatch=2", "activation_checkpointing=selective"]),
        ("stage2", 8, 8, 1, ["microbatch=2", "activation_checkpointing=4"]),
        ("stage2", 2, 1, 1, ["microbatch=1", "activation_checkpointing=none"]),
    ],
)
def test_a_step_at_real_size_takes_the_estimate(
    name: str, layers: int, ranks: int, microbatches: int, overrides: list[str]
) -> None:
    """Runs each operation of a step of the 7B model and its tower on tensors without memory."""
    config = load_config(
        StageConfig,
        ROOT / f"yamls/{name}.yaml",
        [*full(4 if "anyres" in name else 8), "model.attention=sdpa", "model.dropout=0.05", *overrides],
    )
    data = config.data.model_copy(update={"global_batch": ranks * config.microbatch_packs * microbatches})
    config = config.model_copy(update={"data": data})
    decoder, views = seven_b(layers), (10 if "anyres" in name else 2) * config.microbatch_packs
    model = build_model(decoder, SIGLIP_SO400M, config.model)
    add_adapters(model.model.layers, config.model.lora)
    trained = sum(model.get_parameter(parameter).numel() for parameter in freeze(model, config.trainable))
    need = estimate_memory(config, decoder, SIGLIP_SO400M, ranks=ranks, trained=trained, views=views)
    found = peak_bytes(config, decoder, SIGLIP_SO400M, ranks=ranks, views=views, microbatches=microbatches)
    assert 0.98 * found < need.total - need.parts["runtime"] < 1.1 * found, (
        f"{found / 1e9:.1f} GB, estimated {need.summary()}"
    )


def test_ranks_replicas_and_resharding_change_the_estimate() -> None:
    config = load_config(StageConfig, ROOT / "yamls/stage2.yaml", full(8))

    def parts(ranks: int, **fsdp: Any) -> dict[str, float]:
        changed = config.model_copy(update={"fsdp": config.fsdp.model_copy(update=fsdp)})
        return estimate_memory(
            changed, LUMINA_7B, SIGLIP_SO400M, ranks=ranks, trained=7_447_000_000, views=16
        ).parts

    assert parts(16)["parameters"] == parts(8)["parameters"] / 2
    assert parts(16, replicas=2) == parts(8)
    assert parts(8, reshard=False)["gathered units"] > 14e9 > parts(8)["gathered units"]
    assert parts(8, reduce="bf16")["gathered units"] < parts(8)["gathered units"]
    assert parts(8)["Adam's moments"] == 2 * 4 * 7_447_000_000 / 8
    # At the peak only the output layer and earlier microbatches have made gradients.
    assert parts(8)["gradients"] == 4 * 65536 * 4096 / 8
    config = config.model_copy(update={"microbatch": 4})
    assert parts(8)["gradients"] == 4 * 7_447_000_000 / 8


@pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own
def test_a_stage_on_a_gpu_reports_its_estimate_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unitoken.train.distributed import composer_trainer
    from unitoken.train.stage import run_stage

    write_data(tmp_path / "data")
    config = stage(tmp_path, "max_duration=1ba")
    monkeypatch.setattr(composer_trainer, "has_gpu", lambda: True)
    monkeypatch.setattr(composer_trainer, "gpu_bytes", lambda: 80e9)
    run_stage(config, check_stage(config, 1))
    assert "tiny: needs about 3.0 GB a GPU: runtime 3.0\n" in capsys.readouterr().out


def supervised_batch(vocabulary: int, rows: int, length: int) -> dict[str, Tensor]:
    """Return packs of documents of 1,800 tokens that are all supervised, on the GPU."""
    ids, places = torch.randint(0, vocabulary, (rows, length)), torch.arange(length).expand(rows, -1)
    batch = {
        "input_ids": ids,
        "labels": ids,
        **target_places(ids),
        "position_ids": places % 1800,
        "document_ids": (places // 1800).int(),
        "pixel_values": torch.zeros(0, 3, 384, 384, dtype=torch.uint8),
    }
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("setting", "attention"), [("full", "flex"), ("full", "sdpa"), ("selective", "sdpa"), ("none", "sdpa")]
)
def test_a_gpu_allocates_the_estimate(setting: RecomputeMode, attention: Literal["sdpa", "flex"]) -> None:
    """Two layers of the 7B model's size, sharded over one rank as FSDP2 shards them over many."""
    from torch import distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    _compiled.cache_clear()
    torch._dynamo.reset()
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sizes = LUMINA_7B.model_copy(update={"num_hidden_layers": 2})
        overrides = [
            "microbatch=2",
            "data.global_batch=4",
            f"activation_checkpointing={setting}",
            f"model.attention={attention}",
        ]
        config = load_config(StageConfig, ROOT / "yamls/stage2.yaml", overrides)
        model_config = ModelConfig(decoder=sizes, dropout=0.05, attention=attention)
        network = build_model(sizes, None, model_config, setting).to_empty(device="cuda")
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0.0, 0.02)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*network.model.layers, network.lm_head, network):
            fully_shard(module, mp_policy=policy, reshard_after_forward=module is not network.lm_head)
        register_fsdp_forward_method(network.lm_head, "loss")
        optimizer = torch.optim.AdamW(network.parameters())
        rows, length = config.microbatch_packs, config.data.packed_length
        batch = supervised_batch(sizes.vocab_size, rows, length)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = network(batch).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        need = estimate_memory(
            config, sizes, None, ranks=2, trained=count_parameters(sizes, None).total, views=0
        )
        shared = sum(need.parts[part] for part in ("parameters", "Adam's moments", "gradients"))
        estimate = need.total - need.parts["runtime"] + shared  # two ranks would have half of these each
        # With two layers and a large vocabulary the output layer's gradients count for more than in a deep
        # model.
        assert 0.75 * estimate < torch.cuda.max_memory_allocated() < 1.05 * estimate
    finally:
        distributed.destroy_process_group()
