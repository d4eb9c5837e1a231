"""Run train.py with a loss that is NaN at some steps on one rank.

python poisoned.py 3,4 1 STAGE.yaml a.b=c ...       steps 3 and 4, rank 1
"""

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
    """Make a forward pass that multiplies the loss by `factor` in the last microbatch of some training steps.

    Args:
        steps: counted from 1.
        microbatches: in each step.
        factor: NaN by default.
    """
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
        forward = poisoned([int(step) for step in steps.split(",")], microbatches=2)
        UniToken.forward = forward  # type: ignore[method-assign]
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")
