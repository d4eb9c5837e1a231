"""A training run that is disturbed has the losses of an undisturbed run, bit for bit.

support/chaos_training.py disturbs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import TESTS
from support.services import started, used
from support.stages import curve
from unitoken.storage.open import open_store


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(3, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(40, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)]),
    ],
)
def test_a_disturbed_run_has_the_curve_of_an_undisturbed_one(events: int, tmp_path: Path) -> None:
    check_disturbed(tmp_path, events)


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(2, marks=[pytest.mark.slow, pytest.mark.cloud, pytest.mark.timeout(600)]),
        pytest.param(40, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)]),
    ],
)
def test_a_disturbed_run_in_a_bucket_has_the_same_curve(events: int, tmp_path: Path) -> None:
    with started("s3", tmp_path / "server") as service, used(service):
        check_disturbed(tmp_path / "stage", events, service.url("run"))
        saved = open_store(service.url("run")).sizes()
    checkpoints = {name.split("/")[0] for name in saved if name.startswith("step-")}
    assert checkpoints == {"step-00000030", "step-00000033", "step-00000036"}


def check_disturbed(folder: Path, events: int, *url: str) -> None:
    """Disturb a run, and check its losses and what it leaves."""
    program = [sys.executable, str(TESTS / "support" / "chaos_training.py"), str(folder), str(events), *url]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    logs = "".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))
    assert result.returncode == 0, result.stderr + logs
    figures = json.loads(result.stdout.splitlines()[-1])
    print(figures)
    assert figures["left_in_shm"] == []
    assert figures["events"] >= events
    disturbed = curve(Path(figures["work"]))
    assert disturbed == curve(folder / "undisturbed")
    assert len(disturbed) == 36
    assert [path.name for path in folder.rglob(".aside-*")] == []
    temporary = {
        path.name: sorted(file.name for file in path.iterdir()) for path in (folder / "tmp").iterdir()
    }
    (ours,) = (name for name in temporary if name.startswith("unitoken-"))
    assert temporary.pop(ours) == []
    # A launcher that is killed leaves two folders: its ranks' output, and torch's.
    killed = sum(count for kind, count in figures["kinds"].items() if kind.startswith("SIGKILL launcher"))
    own = (["_remote_module_non_scriptable.py"], ["rank1.stderr.txt", "rank1.stdout.txt"])
    assert len(temporary) <= 2 * killed
    assert all(files in own for files in temporary.values())
    assert (folder / "model" / "model.safetensors").exists()
