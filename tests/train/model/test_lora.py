"""Adapters: what they compute, what they train, and how a run with them is saved, resumed and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.checkpoints import all_tensors
from support.decoders import counting_batch
from support.small_datasets import small_vocabulary
from support.stages import DECODER, curve, stage, write_data
from unitoken.common.errors import ConfigError
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.checkpoint.locations import latest_checkpoint
from unitoken.train.config import (
    VOCABULARY_MATRICES,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainedRows,
    is_adapter,
)
from unitoken.train.export.model import export_model
from unitoken.train.generation.engine import load_model
from unitoken.train.model.lora import add_adapters, merged_weight
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import build_optimizer, freeze, keep_old_rows, set_learning_rate
from unitoken.train.run import run_folder

SIZES = DecoderConfig.model_validate(DECODER)
LORA = LoraConfig(rank=4, alpha=8)
IDS = torch.randint(0, 170, (2, 11), generator=torch.Generator().manual_seed(0))


def build(lora: LoraConfig | None = None, seed: int = 0, ids: int = 170) -> UniToken:
    """Return a decoder with drawn weights, in evaluation mode."""
    sizes = SIZES.model_copy(update={"vocab_size": ids})
    model = build_model(sizes, None, ModelConfig(decoder=sizes, dropout=0.0))
    add_adapters(model.model.layers, lora)
    load_weights(model, {}, seed)
    return model.eval()


@torch.no_grad()
def logits(model: UniToken) -> Tensor:
    positions = torch.arange(IDS.shape[1]).expand(2, -1)
    return model.lm_head(model.model(model.model.embed_tokens(IDS), positions, None))


def test_before_training_the_logits_are_the_bases() -> None:
    adapted = build(LORA)
    assert torch.equal(logits(adapted), logits(build()))
    a = adapted.get_parameter("model.layers.0.mlp.up_proj.lora_a")
    assert a.shape == (4, 32)
    assert 0.5 / 32**0.5 < a.abs().max() <= 1 / 32**0.5
    assert not torch.equal(a, build(LORA, seed=1).get_parameter("model.layers.0.mlp.up_proj.lora_a"))


def test_targets_alone_get_adapters_with_one_data_type() -> None:
    model = build(LoraConfig(targets=["q_proj", "down_proj"]))
    names = {name.rsplit(".", 2)[1] for name, _ in model.named_parameters() if is_adapter(name)}
    assert names == {"q_proj", "down_proj"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # FSDP2 needs it
    plain = {name for name, _ in build().named_parameters()}
    assert {name for name, _ in model.named_parameters() if not is_adapter(name)} == plain


def test_merged_weights_give_the_adapted_logits() -> None:
    adapted, merged = build(LORA), build()
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    tensors = adapted.state_dict()
    merged.load_state_dict({name: merged_weight(name, tensors, LORA.scale) for name in merged.state_dict()})
    assert (logits(adapted) - logits(build())).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)


CODES = range(50, 82)  # new ids, of which each follows the one before


def loss_after_training_on_codes(trainable: list[str], rows: TrainedRows | None) -> float:
    """Train adapters of a model whose new rows are the mean of the old ones, as `model.grow` makes them."""
    model = build(LoraConfig(rank=16), ids=CODES.stop)
    with torch.no_grad():
        for name in VOCABULARY_MATRICES:
            matrix = model.get_parameter(name)
            matrix[CODES.start :] = matrix[: CODES.start].mean(0)
    freeze(model.train(), trainable)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.01, weight_decay=0), rows=rows)
    set_learning_rate(optimizer, 0.01)
    for step in range(150):
        loss = model(counting_batch(CODES, step)).total
        loss.backward()
        keep_old_rows(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def test_adapters_learn_new_image_codes_with_their_rows_only() -> None:
    """Codes with the same row get the same logit: alone, adapters can not tell 32 of them apart."""
    rows = TrainedRows("new_rows", CODES.start, CODES.stop)
    assert loss_after_training_on_codes(["lora"], None) > 3.4  # log 32 is 3.47
    assert loss_after_training_on_codes(["lora", "new_rows"], rows) < 0.5


# --- whole stages -------------------------------------------------------------------------------------------

TRAINED = ("model.lora={rank: 4, alpha: 8}", "trainable=[lora, image_rows, adapter]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_data(folder / "data")
    return folder


def train(folder: Path, run: str, *overrides: str) -> dict[str, Tensor]:
    """Run a stage, and return all tensors of its last checkpoint."""
    from unitoken.train.stage import run_stage

    config = stage(folder, f"save.folder={folder / run}", *overrides)
    run_stage(config, check_stage(config, 1))
    return saved(folder / run)


def saved(run: Path) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    prefix = "model/"
    tensors = all_tensors(checkpoint).items()
    return {name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)}


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Tensor]:
    return train(folder, "whole", *TRAINED, "max_duration=6ba", "optimizer.lr=0.02")


@pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own
def test_only_adapters_and_rows_change(folder: Path, trained: dict[str, Tensor]) -> None:
    before = train(folder, "start", *TRAINED, "max_duration=1ba")  # at a learning rate of 0
    codes = sorted(small_vocabulary().image_ids)
    others = [row for row in range(170) if row not in codes]
    for name, tensor in trained.items():
        if name in VOCABULARY_MATRICES:
            assert torch.equal(tensor[others], before[name][others]), name
            assert (tensor[codes] != before[name][codes]).any(), name
        else:
            changes = is_adapter(name) or name.startswith("adapter.")
            assert torch.equal(tensor, before[name]) != changes, name


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_adapters_resumes_bit_for_bit(folder: Path, trained: dict[str, Tensor]) -> None:
    from support import rank_program

    arguments = [f"save.folder={folder}/resumed", *TRAINED, "max_duration=6ba", "optimizer.lr=0.02"]
    for stop in (5, 0):
        rank_program.train(str(folder / "tiny.yaml"), arguments, stop=stop)
    assert curve(folder / "resumed") == curve(folder / "whole")
    for name, tensor in saved(folder / "resumed").items():
        assert torch.equal(tensor, trained[name]), name


@pytest.mark.filterwarnings("ignore")
def test_adapters_do_not_change_halfway(folder: Path, trained: dict[str, Tensor]) -> None:
    message = r"saved by a stage with `lora` \{.*'alpha': 8\.0, .*this one has \{.*'alpha': 9\.0"
    with pytest.raises(ConfigError, match=message):
        train(folder, "whole", *TRAINED, "model.lora.alpha=9", "max_duration=8ba")


@pytest.mark.filterwarnings("ignore")
def test_export_generate_and_init_from_merge_adapters(folder: Path, trained: dict[str, Tensor]) -> None:
    adapted = build_model(SIZES, None, ModelConfig(decoder=SIZES, dropout=0.0))
    add_adapters(adapted.model.layers, LORA)
    own = {name: tensor for name, tensor in trained.items() if name in adapted.state_dict()}
    adapted.load_state_dict(own, assign=True)
    expected = logits(adapted.eval())
    export_model(str(folder / "whole"), folder / "exported", "fp32")
    config = stage(folder)
    for origin in ("whole", "exported"):
        found = logits(load_model(config.model, folder / origin))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(build())).abs().max() > 1e-3
    merged = run_folder.open_weights(folder / "exported").load()
    again = train(folder, "again", *TRAINED, "name=again", f"init_from={folder}/whole", "max_duration=1ba")
    for name, tensor in again.items():
        if name.endswith("lora_b"):
            assert not tensor.any(), name
        elif "proj" in name and not is_adapter(name):
            assert torch.equal(tensor, merged[name]), name
