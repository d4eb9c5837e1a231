"""A step whose loss or gradient is not finite changes nothing, on any rank."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from support.paths import TESTS
from support.poisoned import poisoned
from support.ranks import finish, start
from support.stages import metrics, stage, write_data, write_stage
from unitoken.train.callbacks.metrics import Metrics
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.locations import latest_checkpoint, step_of
from unitoken.train.config import StageConfig
from unitoken.train.model.unitoken import UniToken
from unitoken.train.stage import run_stage

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipping")
    write_data(folder / "data")
    return folder


def train(config: StageConfig) -> list[dict[str, Any]]:
    run_stage(config, check_stage(config, 1))
    return metrics(Path(config.save.folder))


def watch(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Weights and optimizer state after each step."""
    after: list[dict[str, Any]] = []
    real = Metrics.batch_end

    def batch_end(self: Metrics, state: Any, logger: Any) -> None:
        real(self, state, logger)
        after.append(
            copy.deepcopy(
                {"model": state.model.state_dict(), "moments": state.optimizers[0].state_dict()["state"]}
            )
        )

    monkeypatch.setattr(Metrics, "batch_end", batch_end)
    return after


def tensors_of(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [state]


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_nan_loss_skips_its_step_and_is_counted_bug_26(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference ended one rank with `sys.exit(1)`, and the others waited for it."""
    after = watch(monkeypatch)
    monkeypatch.setattr(UniToken, "forward", poisoned([3, 5, 6], microbatches=4))
    lines = train(stage(folder, f"save.folder={tmp_path}"))
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 2, 3, 3, 3, 3]
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 5, 6]
    assert equal(after[1], after[2])  # weights, moments, step counts
    assert equal(after[3], after[5])
    assert not equal(after[2], after[3])
    assert lines[2]["lr"] > lines[3]["lr"]  # the schedule goes on


def test_a_gradient_that_is_not_finite_skips_its_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = watch(monkeypatch)
    huge = poisoned([4], microbatches=4)

    def forward(self: UniToken, batch: Any) -> Any:
        loss, whole = huge(self, batch), self.lm_head.weight
        if loss.total.isfinite():
            return loss
        infinite = (whole[0, 0] - whole[0, 0].detach()) * 3e38 * 3e38  # 0, with a gradient of infinity
        return loss._replace(total=infinite.nan_to_num(), ce=infinite.nan_to_num().detach())

    monkeypatch.setattr(UniToken, "forward", forward)
    lines = train(stage(folder, f"save.folder={tmp_path}", "max_duration=5ba"))
    assert lines[3]["loss"] is not None
    assert lines[3]["grad_norm"] is None
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1]
    assert equal(after[2], after[3])


def test_a_run_ends_after_too_many_skipped_steps_in_a_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UniToken, "forward", poisoned([2, 4, 5, 6, 7], microbatches=4))
    config = stage(folder, f"save.folder={tmp_path}", "optimizer.max_skipped=2")
    with pytest.raises(
        FloatingPointError, match=r"loss nan .* at step 6: the last 3 steps .* weights are those after step 3"
    ):
        train(config)
    assert len(metrics(tmp_path)) == 6
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert step_of(checkpoint) == 4


def test_a_run_that_diverges_ends(folder: Path, tmp_path: Path) -> None:
    huge = ("optimizer.lr=1e30", "optimizer.clip_norm=1e30")
    config = stage(folder, f"save.folder={tmp_path}", *huge, "optimizer.max_skipped=1")
    with pytest.raises(FloatingPointError, match="not finite and skipped"):
        train(config)


def test_a_run_that_resumes_goes_on_counting(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also skipped steps in a row: killing a run does not allow it more of them."""
    config = stage(
        folder,
        f"save.folder={tmp_path}",
        "optimizer.max_skipped=2",
        "max_duration=4ba",
        "optimizer.schedule=constant",
    )
    with monkeypatch.context() as patch:
        patch.setattr(UniToken, "forward", poisoned([1, 3, 4], microbatches=4))
        train(config)
    longer = stage(
        folder,
        f"save.folder={tmp_path}",
        "optimizer.max_skipped=2",
        "max_duration=9ba",
        "optimizer.schedule=constant",
    )
    with monkeypatch.context() as patch:
        patch.setattr(UniToken, "forward", poisoned([1], microbatches=4))
        with pytest.raises(FloatingPointError, match="at step 5: the last 3 steps"):
            train(longer)
    assert metrics(tmp_path)[-1]["skipped"] == 4


POISONED = TESTS / "support" / "poisoned.py"


@pytest.mark.slow
def test_a_nan_loss_on_one_rank_skips_the_step_on_both_bug_26(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other steps equal those of one rank that skipped the same steps."""
    overrides = ["model.dropout=0", "max_duration=6ba", "optimizer.max_skipped=2"]
    command = [POISONED, "3,4", "1", write_stage(folder), f"save.folder={tmp_path}/two", *overrides]
    assert finish(start(2, command)) == [0, 0]
    monkeypatch.setattr(UniToken, "forward", poisoned([3, 4], microbatches=4))
    ours = train(stage(folder, f"save.folder={tmp_path}/one", *overrides))
    theirs = metrics(tmp_path / "two")
    assert [line["skipped"] for line in theirs] == [0, 0, 1, 2, 2, 2]
    for key in ("loss", "grad_norm", "tokens_seen"):
        assert [line[key] for line in theirs] == [
            value if value is None or isinstance(value, dict) else pytest.approx(value, rel=1e-5)
            for value in (line[key] for line in ours)
        ]


@pytest.mark.slow
def test_both_ranks_end_if_one_has_only_nan_losses(folder: Path, tmp_path: Path) -> None:
    command = [
        POISONED,
        "2,3,4,5",
        "1",
        write_stage(folder),
        f"save.folder={tmp_path}",
        "optimizer.max_skipped=1",
    ]
    ranks = start(2, command, stderr=subprocess.PIPE)
    errors = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
    assert all(rank.returncode not in (0, None) for rank in ranks)
    assert all(
        "FloatingPointError: loss nan and gradient norm nan at step 3: the last 2 steps" in error
        for error in errors
    )
