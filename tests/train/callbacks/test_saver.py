"""Checkpoints are written while training goes on, and whatever happens meanwhile, one of before is there."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import all_tensors
from support.killing import at_step
from support.paths import ROOT
from support.stages import curve, metrics, stage, write_data, write_stage
from unitoken.storage.store import StoreError, TransientStoreError
from unitoken.train.callbacks import saver
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.locations import latest_checkpoint
from unitoken.train.checkpoint.sharded import HeldRows, RankPart, write_pieces
from unitoken.train.config import StageConfig
from unitoken.train.stage import run_stage

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saver")
    write_data(folder / "data")
    return folder


def train(config: StageConfig) -> Path:
    run_stage(config, check_stage(config, 1))
    return Path(config.save.folder)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return train(stage(folder, f"save.folder={folder}/undisturbed", "save.keep=9"))


def test_a_checkpoint_written_late_holds_its_own_step(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on meanwhile, and changes all weights, moments, and counts."""
    passed = threading.Event()

    def write_late(path: Path, pieces: Sequence[HeldRows]) -> RankPart:
        if path.parent.name == "step-00000004":
            assert passed.wait(60), "the run did not go on"
        return write_pieces(path, pieces)

    monkeypatch.setattr(saver, "write_pieces", write_late)
    at_step(5, passed.set, monkeypatch)
    run = train(stage(folder, f"save.folder={tmp_path}", "save.keep=9"))
    assert curve(run) == curve(undisturbed)
    expected = all_tensors(undisturbed / "step-00000004")
    found = all_tensors(run / "step-00000004")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def full_disk(name: str) -> Any:
    """A function that fails for a step's checkpoint, after a part of it is written."""

    def write(path: Path, pieces: Sequence[HeldRows]) -> RankPart:
        if path.parent.name == name:
            path.parent.mkdir()
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_pieces(path, pieces)

    return write


def test_an_error_of_the_writing_ends_a_later_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the next save; and the incomplete files do not keep a full disk full."""
    monkeypatch.setattr(saver, "write_pieces", full_disk("step-00000004"))
    config = stage(folder, f"save.folder={tmp_path}", "save.interval=4ba", "max_duration=9ba")
    with pytest.raises(TransientStoreError, match=r"^step 4 could not be saved: No space left on device$"):
        train(config)
    assert 5 <= len(metrics(tmp_path)) < 8
    assert list(tmp_path.glob("step-*")) == []


def test_an_error_in_the_last_save_is_raised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no finished run, and nothing is exported."""
    monkeypatch.setattr(saver, "write_pieces", full_disk("step-00000003"))
    config = stage(folder, f"save.folder={tmp_path}/run", "max_duration=3ba", f"save.export={tmp_path}/model")
    with pytest.raises(StoreError, match=r"^step 3 could not be saved: No space left on device$"):
        train(config)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-00000002"
    assert not (tmp_path / "model").exists()


def test_an_index_that_can_not_be_written_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("unitoken.train.run.run_folder.publish_checkpoint", fail)
    with pytest.raises(StoreError, match=r"^step 2 could not be saved: Input/output error$"):
        train(stage(folder, f"save.folder={tmp_path}"))
    assert list(tmp_path.glob("step-*")) == []


KILLED = """
import os, pathlib, runpy, signal, sys
from unitoken.train.callbacks import saver
from unitoken.train.run import run_folder

def killed(path):
    if os.path.basename(path) == "step-00000006":
        os.kill(os.getpid(), signal.SIGKILL)

def write(path, pieces, real=saver.write_pieces):
    part = real(path, pieces)
    if MOMENT == "a part of the file" and path.parent.name == "step-00000006":
        os.truncate(path, part.file["bytes"] // 2)
        killed(path.parent)
    return part

def publish(checkpoint, *others, real=run_folder.publish_checkpoint):
    if MOMENT == "no index":
        killed(checkpoint)
    real(checkpoint, *others)

MOMENT = sys.argv.pop(1)
saver.write_pieces, run_folder.publish_checkpoint = write, publish
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a part of the file", "no index"])
def test_a_run_killed_while_it_writes_resumes_from_before(
    moment: str, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL in the background, while the steps after the save go on: the losses are equal bit for bit."""
    program = ["-c", KILLED, moment, str(write_stage(folder)), f"save.folder={tmp_path}"]
    killed = subprocess.run(
        [sys.executable, *program], cwd=ROOT, check=False, timeout=120, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "step-00000006").is_dir(), "it was being written"
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    train(stage(folder, f"save.folder={tmp_path}"))
    assert [step for step, _ in curve(tmp_path)] == list(range(1, 10))
    assert curve(tmp_path) == curve(undisturbed)
