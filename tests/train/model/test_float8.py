"""Products in float8, emulated on a CPU, train as those in bfloat16 do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from support.decoders import counting_batch
from support.stages import DECODER, stage, write_data
from unitoken.common.errors import ConfigError
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.config import DecoderConfig, ModelConfig, OptimizerConfig
from unitoken.train.model.float8 import use_float8
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import build_optimizer, set_learning_rate

SIZES = DecoderConfig.model_validate(DECODER)


def build(float8: bool) -> UniToken:
    model = build_model(SIZES, None, ModelConfig(decoder=SIZES, dropout=0.0))
    if float8:
        use_float8(model.model.layers, emulate=True)
    load_weights(model, {}, seed=0)
    return model.train()


def losses(model: UniToken, steps: int = 150) -> list[float]:
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.01))
    set_learning_rate(optimizer, 0.01)
    found = []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(counting_batch(range(50, 82), step)).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_float8_learns_what_bfloat16_learns() -> None:
    plain, rounded = losses(build(float8=False)), losses(build(float8=True))
    assert rounded != plain
    assert rounded[0] == pytest.approx(plain[0], rel=0.01)
    assert plain[-1] < 0.1 * plain[0]
    for first in (25, 50, 100):
        means = [sum(curve[first : first + 25]) / 25 for curve in (plain, rounded)]
        assert means[1] == pytest.approx(means[0], rel=0.1, abs=0.02)


def test_only_the_layers_products_change() -> None:
    plain, rounded = build(float8=False), build(float8=True)
    assert [name for name, _ in rounded.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(
        torch.equal(one, other) for one, other in zip(plain.parameters(), rounded.parameters(), strict=True)
    )
    changed = {
        name.rpartition(".")[2]
        for name, module in rounded.named_modules()
        if isinstance(module, nn.Linear) and type(module).__name__ == "Float8Linear"
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_without_torchao_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "data")
    config = stage(tmp_path, "model.float8=true", "precision=bf16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^model\.float8: torchao is not installed: pip install 'uni"):
        check_stage(config, 1)
