"""Runs stages one after the other, as one rank of several.

One process runs many stages because importing takes a rank longer than these tests train.

python tests/support/rank_program.py '[{"yaml": "stage.yaml", "overrides": ["seed=1"], "stop": 5}, ...]'

`stop`: end the run after the metrics of that step and before its checkpoint; the one before is complete.
Compiled layers use a backend that starts no C++ compiler.
"""

import functools
import json
import os
import sys
from typing import Any

import torch

from unitoken.common.config import load_config
from unitoken.train.callbacks.metrics import Metrics
from unitoken.train.callbacks.saver import Saver
from unitoken.train.check import check_stage
from unitoken.train.config import StageConfig
from unitoken.train.stage import run_stage


class StoppedError(Exception):
    """Raised to end a run before it saves."""


def train(yaml: str, overrides: list[str], stop: int = 0) -> None:
    """Run a stage, until after the metrics of step `stop` if it is not 0."""
    real = Metrics.batch_end

    def batch_end(self: Any, state: Any, logger: Any) -> None:
        real(self, state, logger)
        if state.timestamp.batch.value == stop:
            next(one for one in state.callbacks if isinstance(one, Saver)).finish()
            raise StoppedError

    Metrics.batch_end = batch_end  # type: ignore[method-assign]
    config = load_config(StageConfig, yaml, overrides)
    try:
        run_stage(config, check_stage(config, int(os.environ.get("WORLD_SIZE", "1"))))
    except StoppedError:
        assert stop
    finally:
        Metrics.batch_end = real  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    for stage in json.loads(sys.argv[1]):
        train(**stage)
