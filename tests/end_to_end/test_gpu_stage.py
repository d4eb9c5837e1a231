"""Whole stages on a GPU, as a user starts them: `CUDA_VISIBLE_DEVICES=0 pytest -m gpu`. Composer in bf16, compiled layers around
flex attention, evaluation and samples, SIGKILL and resume, then generation and export.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.drawn import ROOM, ROOT, drawing_stage, write_data
from support.stages import curve, evaluations, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: CUDA_VISIBLE_DEVICES=0 pytest -m gpu"
    ),
    pytest.mark.timeout(900),  # each process compiles anew
]
SETTINGS = {
    "full": [
        "precision=bf16",
        "model.attention=flex",
        "model.compile=true",
        "activation_checkpointing=full",
        "deterministic=true",
    ],
    "selective": [
        "precision=bf16",
        "model.attention=flex",
        "model.compile=true",
        "activation_checkpointing=selective",
    ],
    "plain": ["precision=bf16", "model.attention=sdpa", "deterministic=true"],
    "fp32": ["precision=fp32", "model.attention=flex"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_data(folder / "data")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.png")
    return folder


def start(folder: Path, run: str, *overrides: str) -> subprocess.Popen[bytes]:
    samples = {
        "interval": "5ba",
        "draw": ["Draw a two."],
        "size": [16, 24],
        "answer": {str(folder / "a.png"): "What is it?"},
    }
    held_out = {"all": {"local": str(folder / "data"), "held_out": 0.2}}
    drawing_stage(folder, f"save.folder={folder / run}", name=run, samples=samples, eval={"interval": "5ba"})
    given = [
        "max_duration=3ep",
        f"model.decoder.vocab_size={ROOM}",
        f"data.streams={json.dumps(held_out)}",
        *overrides,
    ]
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", folder / f"{run}.yaml", f"save.folder={folder / run}", *given]
    )


def test_killed_deterministic_stages_on_a_gpu_resume_bit_for_bit(folder: Path) -> None:
    for name in ("full", "plain"):
        assert start(folder, f"{name}-whole", *SETTINGS[name]).wait() == 0
        killed = start(folder, f"{name}-killed", *SETTINGS[name])
        lines = folder / f"{name}-killed" / "metrics.jsonl"
        while not lines.exists() or len(lines.read_bytes().splitlines()) < 11:
            assert killed.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        assert start(folder, f"{name}-killed", *SETTINGS[name]).wait() == 0
        assert curve(folder / f"{name}-killed") == curve(folder / f"{name}-whole")
        assert evaluations(folder / f"{name}-killed") == evaluations(folder / f"{name}-whole")


@pytest.mark.parametrize("name", ["selective", "fp32"])
def test_a_stage_on_a_gpu_learns_draws_and_logs_its_memory(folder: Path, name: str) -> None:
    assert start(folder, name, *SETTINGS[name]).wait() == 0
    steps = metrics(folder / name)
    assert np.isfinite([line["loss"] for line in steps]).all()
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(0 < line["memory_gib"] < 80 for line in steps)
    with Image.open(folder / name / "samples" / "step-00000005" / "0.png") as drawn:
        assert drawn.size == (24, 16)
    command = [
        sys.executable,
        "-m",
        "unitoken.train",
        "generate",
        folder / name,
        "--out",
        folder / f"{name}-out",
    ]
    drawing = [
        *command,
        "--prompt",
        "Draw a two.",
        "--draw",
        "--size",
        "16x24",
        "--guidance",
        "2",
        "--count",
        "2",
    ]
    subprocess.run(
        drawing, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    )
    assert len(list((folder / f"{name}-out").glob("*.png"))) == 2
    subprocess.run(
        [sys.executable, "-m", "unitoken.train", "export", folder / name, folder / f"{name}-exported"],
        check=True,
    )
    assert (folder / f"{name}-exported" / "model.safetensors").exists()
