"""Settings for Composer, and errors shared between ranks; test_ranks.py runs several ranks."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from composer.core import Precision
from composer.distributed.fsdp2 import create_mixed_precision_policy, prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from support.decoders import small_config
from support.small_datasets import make_record, small_vocabulary
from support.stages import DECODER, stage
from unitoken.common.errors import ConfigError
from unitoken.storage.store import StoreError, TransientStoreError
from unitoken.streaming_data.reading.batch import target_places
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.config import DecoderConfig, ModelConfig
from unitoken.train.distributed import composer_trainer, ranks
from unitoken.train.generation.engine import generate
from unitoken.train.generation.sampling import Sampling
from unitoken.train.model.decoder import KVCache
from unitoken.train.model.unitoken import UniToken, build_model

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental")


@pytest.mark.parametrize("reduce", ["bf16", "fp32"])
def test_gradients_are_summed_in_the_configured_precision(
    reduce: Literal["bf16", "fp32"], tmp_path: Path
) -> None:
    """Layers compute in bf16 with both."""
    mesh: Any = object()
    config = composer_trainer.fsdp2_config(
        stage(tmp_path, "precision=bf16", f"fsdp.reduce={reduce}", "fsdp.reshard=false"), mesh
    )
    policy = create_mixed_precision_policy(Precision.AMP_BF16, config.mixed_precision)
    assert policy.param_dtype == torch.bfloat16
    assert policy.reduce_dtype == (torch.bfloat16 if reduce == "bf16" else torch.float32)
    assert (config.device_mesh, config.reshard_after_forward) == (mesh, False)


@pytest.fixture
def _two_ranks() -> Iterator[None]:
    """Be the first of two ranks whose collectives move nothing."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def sharded(tmp_path: Path, **changes: Any) -> UniToken:
    """Return a model without a tower, sharded as in training."""
    config, decoder = stage(tmp_path), DecoderConfig.model_validate({**DECODER, **changes})
    network = build_model(decoder, None, ModelConfig(decoder=decoder, dropout=0.0)).to_empty(device="cpu")
    model = composer_trainer.TrainingModel(network)
    settings = composer_trainer.fsdp2_config(config, init_device_mesh("cpu", (2,)))
    prepare_fully_shard(model, settings, Precision.FP32, generate_composer_model_policy(model))
    composer_trainer._finish_sharding(config, network)
    return network.train()


@pytest.mark.usefixtures("_two_ranks")
def test_the_output_layer_is_a_unit_unless_it_is_tied(tmp_path: Path) -> None:
    def units(network: UniToken) -> list[str]:
        return [name for name, module in network.named_modules() if isinstance(module, FSDPModule)]

    tied = sharded(tmp_path, qk_norm="none", tie_word_embeddings=True)
    assert units(tied) == ["", "model.layers.0", "model.layers.1"]
    assert units(sharded(tmp_path)) == ["", "model.layers.0", "model.layers.1", "lm_head"]


@pytest.mark.usefixtures("_two_ranks")
def test_the_output_layers_gradient_is_reduced_first(tmp_path: Path) -> None:
    """As a part of the root it would stay, whole, until the end of the backward pass."""
    network, reduced = sharded(tmp_path), []

    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(lambda _: reduced.append(network.lm_head.weight.grad is not None))

    for layer in network.model.layers:
        layer.register_forward_hook(watch)
    ids = torch.zeros(1, 9, dtype=torch.int64)
    batch = {
        "input_ids": ids,
        "labels": ids,
        **target_places(ids),
        "position_ids": torch.arange(9)[None],
        "document_ids": ids.int(),
        "pixel_values": torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    }
    network(batch).total.backward()
    assert reduced == [True, True]  # at the gradients of the last layer's output, and of the first's
    assert network.model.embed_tokens.weight.grad is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="sets the products of GPUs, which test_gpu.py measures")
def test_a_cpu_rounds_factors_with_tf32_and_never_with_fp32(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("tf32", "medium"), ("fp32", "highest")):
            composer_trainer.set_precision_of_products(stage(tmp_path, f"precision={precision}"))
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def simulate_ranks(monkeypatch: pytest.MonkeyPatch, *others: Any) -> list[Any]:
    """Make this the first of several ranks that gather `others`; return the list of what it sends."""
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        return [value, *others]

    monkeypatch.setattr(ranks, "gather", gather)
    return sent


def test_an_error_of_another_rank_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = simulate_ranks(monkeypatch, None, ("settings", "no such folder"))
    with pytest.raises(ConfigError, match=r"^rank 2: no such folder$"), ranks.share_errors():
        pass
    with pytest.raises(KeyError, match="mine"), ranks.share_errors():  # its own comes first
        raise KeyError("mine")
    assert sent == [None, ("lasting", "'mine'")]  # the other ranks got it
    simulate_ranks(monkeypatch, None, None)
    with ranks.share_errors():
        pass


def test_all_ranks_end_with_the_status_of_the_failed_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for failure in (ConfigError("a"), TransientStoreError("b"), StoreError("c")):
        sent = simulate_ranks(monkeypatch)
        with pytest.raises(type(failure)), ranks.share_errors():
            raise failure
        simulate_ranks(monkeypatch, *sent)
        with pytest.raises(type(failure)) as shared, ranks.share_errors():
            pass
        assert type(shared.value) is type(failure)


def test_values_that_must_be_the_same_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_ranks(monkeypatch, "order a", "order b")
    with pytest.raises(
        ConfigError,
        match=r"^data: rank 0 finds order a and rank 2 finds order b; it must be the same on all machines$",
    ):
        ranks.check_same("data", "order a")
    simulate_ranks(monkeypatch, "order a", "order a")
    ranks.check_same("data", "order a")


@pytest.mark.parametrize(
    ("environment", "node"),
    [({"GROUP_RANK": "1"}, "1"), ({"NODE_RANK": "2", "GROUP_RANK": "1"}, "2"), ({}, "0")],
)
def test_torchruns_name_of_the_machines_number_is_used(
    environment: dict[str, str], node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    timeouts: list[float] = []
    monkeypatch.setattr(ranks.dist, "initialize_dist", lambda device, timeout: timeouts.append(timeout))
    for name in ("NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks.connect()
    assert not timeouts  # there is a single rank
    for name, value in {**environment, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ranks.connect()
    assert (os.environ["NODE_RANK"], timeouts) == (node, [ranks.TIMEOUT])
    del os.environ["NODE_RANK"]  # monkeypatch would set it again for the tests that follow


@pytest.mark.parametrize("reshards", [True, False])
def test_samples_gather_each_weight_once(reshards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of tokens; afterwards all weights are in shards, and layers free them as before."""
    gathered: list[str] = []
    real = torch.distributed.all_gather_into_tensor

    def watched(*arguments: Any, **settings: Any) -> Any:
        gathered.append("weights")
        return real(*arguments, **settings)

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", watched)
    vocabulary = small_vocabulary()
    config = small_config(vocab_size=vocabulary.size)
    network = build_model(config, None, ModelConfig(decoder=config, vision=None))
    load_weights(network, {}, seed=0)
    prompt = make_record("p", vocabulary, 5)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        for layer in network.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshards)
        fully_shard(network, mesh=mesh)
        register_fsdp_forward_method(network, "predict")
        model = composer_trainer.TrainingModel(network)
        model.reshards = reshards
        state: Any = SimpleNamespace(model=model, precision="fp32", precision_config=None)
        for size in ((2, 2), (6, 6)):
            gathered.clear()
            with composer_trainer.evaluation_mode(state) as drawing:
                generate(drawing, vocabulary, [prompt], Sampling(0.0), sizes=[size], drawing=True)
            assert len(gathered) == 1 + config.num_hidden_layers
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        gathered.clear()
        with torch.no_grad():
            for _ in range(2):
                predict(network)
        assert len(gathered) == 1 + config.num_hidden_layers * (2 if reshards else 1)
    finally:
        torch.distributed.destroy_process_group()


def predict(network: UniToken) -> None:
    """Read two tokens."""
    past = KVCache(len(network.model.layers), 1, 2)
    past.begin(torch.tensor([0]), 2)
    ids = torch.tensor([[1, 2]])
    network.predict({"input_ids": ids, "position_ids": ids, "pixel_values": torch.empty(0)}, None, past)
