"""Several ranks with FSDP2, started as a user does: `composer -n 2 train.py ...`. On CPUs, through gloo."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stages import curve, metrics, stage, write_data, write_stage

from unitoken.train import checkpoints
from unitoken.train.config import check

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_data(folder / "data")
    return folder


def start(yaml: Path, *overrides: str, ranks: int = 2) -> subprocess.Popen[bytes]:
    composer = Path(sys.executable).parent / "composer"
    return subprocess.Popen(
        [composer, "-n", str(ranks), ROOT / "train.py", yaml, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def launch(yaml: Path, *overrides: str, ranks: int = 2) -> None:
    assert start(yaml, *overrides, ranks=ranks).wait(timeout=240) == 0


def kill_after(step: int, run: Path, process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and both ranks at once, when `step` is in the metrics."""
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < step:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_ranks_train_as_one_and_resume_as_if_never_killed(folder: Path, tmp_path: Path) -> None:
    """In one test, because each launch takes ten seconds:

    - two ranks give the losses and gradient norms of one, also where one rank has no image in a microbatch;
    - killed by SIGKILL in the middle of an epoch and started again, with dropout on, the losses are equal bit for bit;
    - one rank goes on from a checkpoint of two, with the same batches.
    """
    from unitoken.train.stage import run

    dry = "model.dropout=0"
    one = stage(folder, f"save.folder={tmp_path}/one", dry, "max_duration=5ba", name="dry")
    run(one, check(one, 1))
    launch(write_stage(folder, name="dry"), f"save.folder={tmp_path}/two", dry, "max_duration=5ba")
    ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("loss", "grad_norm", "tokens"):
        assert [line[key] for line in theirs] == pytest.approx([line[key] for line in ours], rel=1e-5), key

    yaml, long = write_stage(folder), ["max_duration=4ep"]
    launch(yaml, f"save.folder={tmp_path}/whole", *long)
    kill_after(14, tmp_path / "killed", start(yaml, f"save.folder={tmp_path}/killed", *long))
    saved = checkpoints.latest(tmp_path / "killed")
    assert saved is not None
    assert 12 <= checkpoints.step_of(saved) < 36
    shutil.copytree(tmp_path / "killed", tmp_path / "smaller", symlinks=True)
    launch(yaml, f"save.folder={tmp_path}/killed", *long)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")

    smaller = stage(folder, f"save.folder={tmp_path}/smaller", *long)
    run(smaller, check(smaller, 1))
    whole, went_on = metrics(tmp_path / "whole"), metrics(tmp_path / "smaller")
    assert [line["tokens"] for line in went_on] == [line["tokens"] for line in whole]
    assert [line["loss"] for line in went_on] == pytest.approx([line["loss"] for line in whole], rel=0.02)  # dropout differs


def test_wrong_settings_are_one_line_and_status_2_before_anything_is_loaded(folder: Path) -> None:
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", write_stage(folder, name="wrong"), "data.global_batch=3"],
        env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "error: data.global_batch: 3 packs can not be shared evenly by 2 ranks\n"
    assert result.stdout == ""
    assert time.monotonic() - started < 5
