"""train.py with a loss that is not a number, at some steps and on one rank:  python poisoned.py 3,4 1 STAGE.yaml a.b=c ..."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from unitoken.train.model.unitoken import UniToken


def poisoned(steps: Sequence[int], microbatches: int, factor: float = torch.nan) -> Callable[..., Any]:
    """A forward pass whose loss, in training, is multiplied by `factor` in the last microbatch of these steps, from 1."""
    real, calls = UniToken.forward, 0

    def forward(self: UniToken, batch: Any) -> Any:
        nonlocal calls
        loss = real(self, batch)
        if not self.training:
            return loss
        calls += 1
        bad = calls % microbatches == 0 and calls // microbatches in steps
        return loss._replace(total=loss.total * factor, ce=loss.ce * factor) if bad else loss

    return forward


if __name__ == "__main__":
    steps, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        UniToken.forward = poisoned([int(step) for step in steps.split(",")], microbatches=2)  # type: ignore[method-assign]
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")
