"""The folder of a run with logs that were made up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from unitoken.train.run.log_files import note_start


def write_run(folder: Path, steps: int = 200, **settings: object) -> Path:
    """A run's folder with metrics, two evaluations, one resumption and its settings."""
    folder.mkdir()
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "loss": 2 + 3 * math.exp(-5 * step / steps),
                "loss_text": 4.0,
                "loss_image": 6.0,
                "lr": 1e-4,
                "grad_norm": None if step == 3 else 1.5,
                "tokens": 1000,
                "useful": 0.97,
                "seconds": 0.5,
                "tokens_per_second": 2000.0,
                "tokens_seen": {"captions": 400 * step, "drawings": 600 * step},
                "skipped": 0,
            }
        )
        if step % 100 == 0:
            lines.append({"step": step, "eval": {"loss": 4.5, "targets": 17}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "stage.yaml").write_text(yaml.safe_dump({"name": "stage1", "optimizer": settings}))
    note_start(folder, 0, 0, 2)
    note_start(folder, 120, 133, 4)
    return folder


def write_samples(folder: Path, step: int, prompt: str = "Draw a cat.") -> None:
    target = folder / "samples" / f"step-{step:08d}"
    target.mkdir(parents=True)
    Image.fromarray(np.full((256, 512, 3), step % 255, np.uint8)).save(target / "0.png")
    (target / "drawings.txt").write_text(f"0.png\t{prompt}\n")
    (target / "answers.txt").write_text(f"data/cat.png\tWhat is this?\tAnswer {step}\n")
