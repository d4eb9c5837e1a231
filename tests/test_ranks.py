"""Several ranks with FSDP2, started as a user does: `composer -n 2 train.py ...`. On CPUs, through gloo."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from stages import curve, metrics, stage, write_data, write_stage

from unitoken.train import checkpoints
from unitoken.train.check import check
from unitoken.train.folders import latest_checkpoint

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_data(folder / "data")
    return folder


def ranks_of(
    yaml: Path, *overrides: str, program: Sequence[str | Path] = (ROOT / "train.py",), stderr: int | None = None
) -> list[subprocess.Popen[bytes]]:
    """Two ranks as `composer -n 2` starts them, but without the ten seconds that it takes itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
    return [
        subprocess.Popen(
            [sys.executable, *program, yaml, *overrides],
            env={**common, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=stderr,
        )
        for rank in "01"
    ]


def launch(yaml: Path, *overrides: str, program: Sequence[str | Path] = (ROOT / "train.py",)) -> None:
    assert [rank.wait(timeout=240) for rank in ranks_of(yaml, *overrides, program=program)] == [0, 0]


def kill_after(step: int, run: Path, ranks: list[subprocess.Popen[bytes]]) -> None:
    """SIGKILL to both ranks as soon as `step` is in the metrics."""
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < step:
        assert all(rank.poll() is None for rank in ranks), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.wait()


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run, with dropout, of the whole program as a user starts it."""
    composer = Path(sys.executable).parent / "composer"
    command = [composer, "-n", "2", ROOT / "train.py", write_stage(folder), f"save.folder={folder}/whole", "max_duration=3ep"]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=240)
    return folder / "whole"


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """A run of the same settings after SIGKILL in the middle of its second epoch."""
    run = folder / "killed"
    kill_after(14, run, ranks_of(write_stage(folder), f"save.folder={run}", "max_duration=3ep"))
    saved = latest_checkpoint(run)
    assert saved is not None
    assert 12 <= checkpoints.step_of(saved) < 27
    return run


def test_two_ranks_train_as_one(folder: Path, tmp_path: Path) -> None:
    """The same losses and gradient norms, also where one of the ranks has no image in a microbatch."""
    from unitoken.train.stage import run

    overrides = ["model.dropout=0", "max_duration=5ba"]
    one = stage(folder, f"save.folder={tmp_path}/one", *overrides, name="dry")
    run(one, check(one, 1))
    launch(write_stage(folder, name="dry"), f"save.folder={tmp_path}/two", *overrides)
    ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("loss", "grad_norm", "tokens"):
        assert [line[key] for line in theirs] == pytest.approx([line[key] for line in ours], rel=1e-5), key


def test_a_killed_run_goes_on_as_if_never_killed(folder: Path, whole: Path, killed: Path, tmp_path: Path) -> None:
    """Losses equal bit for bit, with dropout on."""
    shutil.copytree(killed, tmp_path / "run", symlinks=True)
    launch(write_stage(folder), f"save.folder={tmp_path}/run", "max_duration=3ep")
    assert curve(tmp_path / "run") == curve(whole)


def test_one_rank_goes_on_from_two_with_the_same_batches(folder: Path, whole: Path, killed: Path, tmp_path: Path) -> None:
    from unitoken.train.stage import run

    shutil.copytree(killed, tmp_path / "run", symlinks=True)
    smaller = stage(folder, f"save.folder={tmp_path}/run", "max_duration=3ep")
    run(smaller, check(smaller, 1))
    expected, found = metrics(whole), metrics(tmp_path / "run")
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=0.02)  # dropout differs


def test_wrong_settings_are_one_line_and_status_2_before_anything_is_loaded(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", write_stage(folder, name="wrong"), "data.global_batch=3"],
        env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "error: data.global_batch: 3 packs can not be shared evenly by 2 ranks\n"
    assert result.stdout == ""
