"""Settings for Composer, and errors shared between ranks; test_ranks.py runs several ranks."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from composer.core import Precision
from composer.distributed.fsdp2 import create_mixed_precision_policy

from support.stages import stage
from unitoken.common.errors import ConfigError
from unitoken.storage.store import StoreError, TransientStoreError
from unitoken.train.distributed import composer_trainer, ranks

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
