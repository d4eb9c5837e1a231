"""Which parameters are trained, and in which groups of the optimizer."""

import copy
import math
from typing import Literal

import pytest
import torch

from unitoken.common.errors import ConfigError
from unitoken.train.config import DecoderConfig, ModelConfig, OptimizerConfig, TrainedRows, VisionTowerConfig
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import (
    build_optimizer,
    decay_new_rows,
    freeze,
    keep_old_rows,
    learning_rate,
    place_step_counts,
    set_learning_rate,
)

DECODER = DecoderConfig(
    vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2
)
VISION = VisionTowerConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)


@pytest.fixture
def model() -> UniToken:
    return build_model(DECODER, VISION, ModelConfig(decoder=DECODER, vision=VISION))


def trained(model: UniToken) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_stage_one_trains_adapter_and_tower_without_embeddings(model: UniToken) -> None:
    names = freeze(model, ["vit", "adapter"])
    assert set(names) == trained(model)
    assert {name.split(".")[0] for name in names} == {"vit", "adapter"}
    assert not any(name.startswith("vit.embeddings") for name in names)


def test_the_towers_embeddings_train_if_they_are_named(model: UniToken) -> None:
    assert any(
        name.startswith("vit.embeddings.patch_embedding") for name in freeze(model, ["vit", "vit.embeddings"])
    )
    assert trained(model) >= {"vit.embeddings.position_embedding.weight"}


def test_a_name_is_a_whole_name_not_a_substring(model: UniToken) -> None:
    """In the reference `vit` trains every parameter with `vit` anywhere in its name (bug 30)."""
    names = freeze(model, ["model.layers.1"])
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)  # and not model.layers.10
    assert not any("lm_head" in name for name in freeze(model, ["model"]))


@pytest.mark.parametrize(
    "name", ["vitt", "layers", "model.layers.99", "vit.encoder.layers.0.self_attn.q_proj.weigh"]
)
def test_a_name_that_trains_nothing_is_an_error(name: str, model: UniToken) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' names no parameter"):
        freeze(model, ["adapter", name])


def test_groups_are_the_tower_and_the_rest_all_with_decay(model: UniToken) -> None:
    freeze(model, ["vit", "adapter", "model", "lm_head"])
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0, lr_scales={"vit": 0.01}), compat=True)
    set_learning_rate(optimizer, 2.0)
    vit, rest = optimizer.param_groups
    assert (vit["lr"], rest["lr"]) == (0.02, 2.0)
    assert {id(p) for p in vit["params"]} == {id(p) for p in model.vit.parameters() if p.requires_grad}
    assert len(vit["params"]) + len(rest["params"]) == len(trained(model))
    assert vit["weight_decay"] == rest["weight_decay"] == 0.1
    assert type(optimizer) is torch.optim.AdamW
    freeze(model, ["lm_head"])
    assert len(build_optimizer(model, OptimizerConfig(lr=1.0)).param_groups) == 1


def test_fused_steps_are_those_of_plain_adamw(model: UniToken) -> None:
    freeze(model, ["vit", "adapter", "model", "lm_head"])
    ours, theirs = model.to_empty(device="cpu"), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        own.data.normal_(generator=generator)
        other.data.copy_(own)
    config = OptimizerConfig(lr=1.0, lr_scales={"vit": 0.1})
    fused, plain = build_optimizer(ours, config), build_optimizer(theirs, config)
    for group in plain.param_groups:
        group.update(fused=False, foreach=False)
    for step in range(1, 4):
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            own.grad = torch.randn(own.shape, generator=generator) if own.requires_grad else None
            other.grad = own.grad
        for optimizer in (fused, plain):
            set_learning_rate(optimizer, 0.1 / step)
            optimizer.step()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_step_counts_of_earlier_checkpoints_are_moved(model: UniToken) -> None:
    """The kernel of a GPU would read a count on the CPU as if it were in its own memory."""
    freeze(model, ["lm_head"])
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0))
    weight = model.lm_head.weight  # on the device `meta`
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(weight)}
    place_step_counts(optimizer)
    assert optimizer.state[weight]["step"].device == weight.device


def test_norms_and_biases_are_not_decayed(model: UniToken) -> None:
    """The reference pulls them to zero (bug 29)."""
    freeze(model, ["vit", "adapter", "model", "lm_head"])
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0, lr_scales={"vit": 0.01}))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decay[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name


def test_only_new_rows_have_gradients_and_decay(model: UniToken) -> None:
    """Of a step's norm, moments and decay the old rows have no part."""
    model = model.to_empty(device="cpu")
    names = freeze(model, ["new_rows", "model.norm"])
    assert names == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    config = OptimizerConfig(lr=1.0, weight_decay=0.5, lr_scales={"new_rows": 0.1})
    optimizer = build_optimizer(model, config, rows=TrainedRows("new_rows", 15, 20))
    set_learning_rate(optimizer, 1.0)
    rows, rest = optimizer.param_groups
    assert (rows["name"], rows["lr"], rows["weight_decay"]) == ("new_rows", 0.1, 0.0)
    assert (rest["name"], rest["lr"]) == ("rest", 1.0)
    for parameter in (*rows["params"], *rest["params"]):
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
    keep_old_rows(optimizer)
    decay_new_rows(optimizer)
    assert model.model.norm.weight.grad is not None
    assert model.model.norm.weight.grad.all()
    for parameter in rows["params"]:
        assert parameter.grad.norm().item() == pytest.approx(math.sqrt(5 * 8))
        assert (parameter.data[:15] == 1.0).all()
        assert (parameter.data[15:] == 0.95).all()
    optimizer.step()
    for parameter in rows["params"]:
        assert (parameter.data[:15] == 1.0).all()
        torch.testing.assert_close(parameter.data[15:], torch.full((5, 8), 0.85))
        assert not optimizer.state[parameter]["exp_avg_sq"][:15].any()


def test_only_image_rows_have_gradients_and_decay(model: UniToken) -> None:
    """Rows in the middle: those behind them stay, too."""
    model = model.to_empty(device="cpu")
    freeze(model, ["image_rows"])
    config = OptimizerConfig(lr=1.0, weight_decay=0.5, lr_scales={"image_rows": 0.1})
    optimizer = build_optimizer(model, config, rows=TrainedRows("image_rows", 5, 9))
    set_learning_rate(optimizer, 1.0)
    (group,) = optimizer.param_groups
    assert (group["name"], group["lr"], len(group["params"])) == ("image_rows", 0.1, 2)
    for parameter in group["params"]:
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
    keep_old_rows(optimizer)
    decay_new_rows(optimizer)
    optimizer.step()
    for parameter in group["params"]:
        others = torch.cat([parameter.data[:5], parameter.data[9:]])
        assert (others == 1.0).all()
        torch.testing.assert_close(parameter.data[5:9], torch.full((4, 8), 0.85))


def test_the_longest_name_decides_the_learning_rate(model: UniToken) -> None:
    freeze(model, ["vit", "adapter", "model", "lm_head"])
    optimizer = build_optimizer(
        model, OptimizerConfig(lr=1.0, lr_scales={"model": 0.5, "model.embed_tokens": 0.1})
    )
    set_learning_rate(optimizer, 1.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(model.model.embed_tokens.weight)] == 0.1
    assert rate[id(model.model.norm.weight)] == 0.5
    assert rate[id(model.lm_head.weight)] == 1.0


def test_a_learning_rate_for_a_frozen_part_is_an_error(model: UniToken) -> None:
    freeze(model, ["lm_head"])
    with pytest.raises(ConfigError, match=r"optimizer.lr_scales: 'vit' names no parameter that is trained"):
        build_optimizer(model, OptimizerConfig(lr=1.0, lr_scales={"vit": 0.01}))


def test_schedules_warm_up_and_fall_to_the_minimum() -> None:
    def rates(schedule: Literal["cosine", "linear", "constant"]) -> list[float]:
        config = OptimizerConfig(lr=1.0, min_lr=0.2, schedule=schedule)
        return [learning_rate(done, config, warmup=2, total=10) for done in (0, 1, 2, 6, 8, 10)]

    fallen = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.75))
    assert rates("cosine") == pytest.approx([0, 0.5, 1.0, 0.6, fallen, 0.2])
    assert rates("linear") == pytest.approx([0, 0.5, 1.0, 0.6, 0.4, 0.2])
    assert rates("constant") == pytest.approx([0, 0.5, 1.0, 1.0, 1.0, 1.0])
