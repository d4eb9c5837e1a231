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
from support.stages import curve


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(3, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(40, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)]),
    ],
)
def test_a_disturbed_run_has_the_curve_of_an_undisturbed_one(events: int, tmp_path: Path) -> None:
    program = [sys.executable, str(TESTS / "support" / "chaos_training.py"), str(tmp_path), str(events)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + (tmp_path / "run.log").read_text()[-3000:]
    figures = json.loads(result.stdout.splitlines()[-1])
    print(figures)
    assert figures["left_in_shm"] == []
    assert figures["events"] >= events
    assert curve(tmp_path / "run") == curve(tmp_path / "undisturbed")
    assert len(curve(tmp_path / "run")) == 36
    assert [path.name for path in tmp_path.rglob(".aside-*")] == []
    temporary = {
        path.name: sorted(file.name for file in path.iterdir()) for path in (tmp_path / "tmp").iterdir()
    }
    (ours,) = (name for name in temporary if name.startswith("unitoken-"))
    assert temporary.pop(ours) == []
    # A launcher that is killed leaves two folders: its ranks' output, and torch's.
    killed = sum(count for kind, count in figures["kinds"].items() if kind.startswith("SIGKILL launcher"))
    own = (["_remote_module_non_scriptable.py"], ["rank1.stderr.txt", "rank1.stdout.txt"])
    assert len(temporary) <= 2 * killed
    assert all(files in own for files in temporary.values())
    assert (tmp_path / "model" / "model.safetensors").exists()
