"""The metrics of a run: written to metrics.jsonl, given to the loggers, and shown on the terminal.

There is one line per step, one per evaluation: {"step": 1000, "eval": {"loss": ..., "loss_text": ...}}, and
one per suite: {"step": 1000, "suite": {"reading/exact_match": ...}}.

    loss, ce, z                means over the step's supervised tokens on all ranks: loss = ce + z_loss * z
    loss_text, loss_image      cross-entropy of text tokens; of image tokens
    loss_text_only, loss_understanding, loss_generation
                               cross-entropy by document: without images; with input images only; with a
                               generated image
    grad_norm                  L2, before clipping
    lr, lr_NAME                learning rate of the schedule; of a group of parameters
    tokens, useful             tokens in the batch, image features included; their share of its positions
    seconds                    waiting for data and training; not evaluating, saving, or generating samples
    tokens_seen                tokens of each stream since the stage began, those of skipped steps included
    skipped                    steps since the stage began whose loss or gradient was not finite, and is null
    memory_gib, mfu            on GPUs: the most memory that a rank has used; FLOPs utilization (flops.py)

A loss by kind is missing in steps without such tokens.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

from composer import Callback, Logger, State

from unitoken.common.files import write_aside
from unitoken.streaming_data.settings import DataConfig
from unitoken.train.accounting.flops import FlopsPerUnit
from unitoken.train.accounting.step_sums import StepResult
from unitoken.train.callbacks.intervals import is_due
from unitoken.train.callbacks.optimisation import Optimisation
from unitoken.train.callbacks.progress import StepProgressLines
from unitoken.train.distributed import ranks
from unitoken.train.run.log_files import METRICS, note_start, read_metrics


class Metrics(Callback):  # type: ignore[misc]
    """Writes, logs and shows the metrics of each step.

    A run that resumes at step s first removes the lines after s, so that each step has one line.

    Args:
        folder: the run's folder, for metrics.jsonl.
        data: the data that is trained on.
        optimisation: measures the steps.
        progress: shows the steps on the terminal.
        every: steps between two points of the loggers.
        total_steps: steps of the stage.
        flops: FLOPs of forward and backward pass.
        peak_flops: FLOP/s of one GPU; None where they are unknown.
    """

    def __init__(
        self,
        folder: Path,
        data: DataConfig,
        optimisation: Optimisation,
        progress: StepProgressLines,
        *,
        every: int,
        total_steps: int,
        flops: FlopsPerUnit,
        peak_flops: float | None,
    ) -> None:
        self.path = folder / METRICS
        self.optimisation, self.progress = optimisation, progress
        self.every, self.total_steps = every, total_steps
        self.flops, self.peak_flops = flops, peak_flops
        self.positions = data.global_batch * data.packed_length  # tokens and padding in a batch
        self.tokens_seen = dict.fromkeys(data.streams, 0)
        self.step_start = 0.0
        self.file: TextIO | None = None  # on the first rank

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep."""
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.tokens_seen |= state["tokens_seen"]

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Open metrics.jsonl, without the lines after the step that the run goes on from."""
        if ranks.is_first_rank():
            done = state.timestamp.batch.value
            lines = list(read_metrics(self.path)) if self.path.exists() else []
            reached = max((line["step"] for line in lines), default=done)
            lines = [line for line in lines if line["step"] <= done]
            write_aside(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())
            note_start(self.path.parent, done, reached, ranks.world_size())
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
            self.progress.start(done)
        self.step_start = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write, show and log the metrics of a step."""
        line = self._line(state, time.perf_counter() - self.step_start)
        self.write(line)
        if self.file is not None:
            self.progress.step(line)
        if is_due(line["step"], self.every, self.total_steps):
            logger.log_metrics(logger_metrics(line, "train"))

    def _line(self, state: State, seconds: float) -> dict[str, Any]:
        measured = self.optimisation.measured
        for name, tokens in zip(self.tokens_seen, measured.stream_tokens, strict=True):
            self.tokens_seen[name] += tokens
        line = {
            "step": state.timestamp.batch.value,
            **losses(measured),
            "grad_norm": measured.norm,
            "lr": self.optimisation.rate,
            **{f"lr_{group['name']}": group["lr"] for group in state.optimizers[0].param_groups},
            "tokens": measured.tokens,
            "useful": measured.tokens / self.positions,
            "seconds": seconds,
            "tokens_per_second": measured.tokens / seconds,
            "tokens_seen": dict(self.tokens_seen),
            "skipped": self.optimisation.skipped,
        }
        if measured.memory:
            line["memory_gib"] = measured.memory / 2**30
        if self.peak_flops is not None:
            flops = self.flops.total(measured.tokens, measured.squares, measured.views, measured.targets)
            line["mfu"] = flops / (seconds * ranks.world_size() * self.peak_flops)
        return {key: None if _is_not_finite(value) else value for key, value in line.items()}

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Start the clock of the next step."""
        self.step_start = time.perf_counter()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Start the clock of the next step."""
        self.step_start = time.perf_counter()

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, on the first rank."""
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def print_line(self, text: str) -> None:
        """Print a line of text, on the first rank."""
        if self.file is not None:
            self.progress.print_line(text)

    def close(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Close the file and the progress bar."""
        if self.file is not None:
            self.progress.close()
            self.file.close()
            self.file = None


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def losses(measured: StepResult) -> dict[str, float]:
    """Return all losses of a step or an evaluation by name."""
    return {"loss": measured.loss, "ce": measured.ce, "z": measured.z, **measured.losses()}


def logger_metrics(line: dict[str, Any], prefix: str) -> dict[str, float]:
    """Flatten a line for loggers: `train/loss`, `train/tokens_seen/captions`; without null values."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= logger_metrics(value, f"{prefix}/{key}")
        elif value is not None and key != "step":
            flat[f"{prefix}/{key}"] = value
    return flat
