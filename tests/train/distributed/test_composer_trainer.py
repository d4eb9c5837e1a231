"""What Composer is told of the ranks, and what they tell each other; test_ranks.py has several of them."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from composer.core import Precision
from composer.distributed.fsdp2 import create_mixed_precision_policy

from support.stages import stage
from unitoken.common.errors import ConfigError, is_transient
from unitoken.storage.store import StoreError, TransientStoreError
from unitoken.train.distributed import composer_trainer, ranks

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental")


@pytest.mark.parametrize("reduce", ["bf16", "fp32"])
def test_gradients_are_summed_in_what_the_settings_say(
    reduce: Literal["bf16", "fp32"], tmp_path: Path
) -> None:
    """And layers compute in bf16 either way."""
    mesh: Any = object()
    config = composer_trainer.fsdp2_config(
        stage(tmp_path, "precision=bf16", f"fsdp.reduce={reduce}", "fsdp.reshard=false"), mesh
    )
    policy = create_mixed_precision_policy(Precision.AMP_BF16, config.mixed_precision)
    assert policy.param_dtype == torch.bfloat16
    assert policy.reduce_dtype == (torch.bfloat16 if reduce == "bf16" else torch.float32)
    assert (config.device_mesh, config.reshard_after_forward) == (mesh, False)


def say(monkeypatch: pytest.MonkeyPatch, *others: Any) -> list[Any]:
    """This is the first of several ranks; the others say that. Gives back what this one says, as it does."""
    said: list[Any] = []
    monkeypatch.setattr(ranks, "_of_all_ranks", lambda mine: said.append(mine) or [mine, *others])
    return said


def test_what_goes_wrong_on_another_rank_goes_wrong_here(monkeypatch: pytest.MonkeyPatch) -> None:
    said = say(monkeypatch, None, ("settings", "no such folder"))
    with pytest.raises(ConfigError, match=r"^rank 2: no such folder$"), ranks.together():
        pass
    with pytest.raises(KeyError, match="mine"), ranks.together():  # its own comes first
        raise KeyError("mine")
    assert said == [None, ("lasting", "'mine'")]  # the others heard of it
    say(monkeypatch, None, None)
    with ranks.together():
        pass


def test_all_ranks_end_with_the_status_of_the_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    for failure in (ConfigError("a"), TransientStoreError("b"), StoreError("c")):
        said = say(monkeypatch)
        with pytest.raises(type(failure)), ranks.together():
            raise failure
        say(monkeypatch, *said)
        with pytest.raises(type(failure)) as heard, ranks.together():
            pass
        assert type(heard.value) is type(failure)


def test_a_full_disk_is_named_as_the_system_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a write fails torch can not end the file either, and raises that."""

    def save(*_: object) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            torch.save({"a": torch.zeros(100_000)}, file)

    monkeypatch.setattr(composer_trainer, "save_checkpoint", save)
    state: Any = None
    with pytest.raises(OSError, match="No space left on device") as error:
        composer_trainer.write_checkpoint(state, Path("x"))
    assert is_transient(error.value)


def test_what_must_be_alike_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "order a", "order b")
    with pytest.raises(
        ConfigError,
        match=r"^data: rank 0 finds order a and rank 2 finds order b; it must be the same on all machines$",
    ):
        ranks.check_alike("data", "order a")
    say(monkeypatch, "order a", "order a")
    ranks.check_alike("data", "order a")


@pytest.mark.parametrize(
    ("environment", "node"),
    [({"GROUP_RANK": "1"}, "1"), ({"NODE_RANK": "2", "GROUP_RANK": "1"}, "2"), ({}, "0")],
)
def test_torchrun_says_which_machine_it_is_by_another_name(
    environment: dict[str, str], node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    met: list[float] = []
    monkeypatch.setattr(ranks.dist, "initialize_dist", lambda device, timeout: met.append(timeout))
    for name in ("NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks.connect()
    assert not met  # alone
    for name, value in {**environment, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ranks.connect()
    assert (os.environ["NODE_RANK"], met) == (node, [ranks.TIMEOUT])
    del os.environ["NODE_RANK"]  # monkeypatch would put it back for the tests that come after
