"""What a run writes down of itself: metrics.jsonl, the loggers, and what is seen on the terminal.

A line a step; where there is an evaluation, one more: {"step": 1000, "eval": {"loss": ..., "loss_text": ...}}.

    loss, ce, z                means over the supervised tokens of the step, all ranks together: loss = ce + z_loss * z
    loss_text, loss_image      cross-entropy of text tokens; of tokens of images
    loss_text_only, loss_understanding, loss_generation
                               cross-entropy by document: no image; all are asked about; one at least is drawn
    grad_norm                  L2, before clipping
    lr, lr_NAME                the schedule's; of a group of parameters
    tokens, useful             of the batch, image features included; their share of its positions, the rest is padding
    seconds                    waiting for data and training; not: evaluating, saving, drawing samples
    tokens_seen                of each stream, since the stage began; those of skipped steps too
    skipped                    steps whose loss or gradient was not finite, since the stage began; what is not finite is null
    memory_gib, mfu            on GPUs: the most that any rank has held so far; model FLOPs utilization (flops.py)

Losses by kind are there only in steps that have such tokens.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from composer import Callback, Logger, State

from unitoken.common.files import write_aside
from unitoken.train.accounting.flops import FlopsPerUnit, peak_flops
from unitoken.train.accounting.step_sums import StepResult
from unitoken.train.callbacks.optimisation import Optimisation
from unitoken.train.callbacks.progress import progress_of
from unitoken.train.config import StageConfig
from unitoken.train.distributed import ranks

METRICS = "metrics.jsonl"


class Metrics(Callback):  # type: ignore[misc]
    """Comes after `Saver` in the list of callbacks: the clock of a step starts when the one before is saved.

    A run that resumes at step s first drops the lines after s, so that no step is there twice.
    """

    def __init__(
        self, config: StageConfig, optimisation: Optimisation, total_steps: int, flops: FlopsPerUnit
    ) -> None:
        self.path = Path(config.save.folder) / METRICS
        self.optimisation, self.total_steps, self.flops, self.every = (
            optimisation,
            total_steps,
            flops,
            config.log.every,
        )
        self.positions = config.data.global_batch * config.data.packed_length  # tokens and padding in a batch
        self.tokens_seen = dict.fromkeys(config.data.streams, 0)
        self.progress = progress_of(config.name, total_steps, config.log.every, config.log.progress)
        on_gpu = torch.cuda.is_available() and config.precision == "bf16"
        self.peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
        self.clock = 0.0
        self.file: TextIO | None = None  # of the first rank

    def state_dict(self) -> dict[str, Any]:
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens_seen |= state["tokens_seen"]

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if ranks.is_first_rank():
            done = state.timestamp.batch.value
            kept = (
                [line for line in read_metrics(self.path) if line["step"] <= done]
                if self.path.exists()
                else []
            )
            write_aside(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
            self.progress.start(done)
        self.clock = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        seconds, measured = time.perf_counter() - self.clock, self.optimisation.measured
        for name, tokens in zip(self.tokens_seen, measured.stream_tokens, strict=True):
            self.tokens_seen[name] += tokens
        rates = {f"lr_{group['name']}": group["lr"] for group in state.optimizers[0].param_groups}
        line = {
            "step": state.timestamp.batch.value,
            **losses(measured),
            "grad_norm": measured.norm,
            "lr": self.optimisation.rate,
            **rates,
            "tokens": measured.tokens,
            "useful": measured.tokens / self.positions,
            "seconds": seconds,
            "tokens_per_second": measured.tokens / seconds,
            "tokens_seen": dict(self.tokens_seen),
            "skipped": self.optimisation.skipped,
        }
        if measured.memory:
            line["memory_gib"] = measured.memory / 2**30
        if self.peak:
            needed = self.flops.total(measured.tokens, measured.squares, measured.views, measured.targets)
            line["mfu"] = needed / (seconds * ranks.world_size() * self.peak)
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        self.write(line)
        if self.file is not None:
            self.progress.step(line)
        if line["step"] % self.every == 0 or line["step"] == self.total_steps:
            logger.log_metrics(named(line, "train"))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.clock = time.perf_counter()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.clock = time.perf_counter()

    def write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def say(self, text: str) -> None:
        if self.file is not None:
            self.progress.say(text)

    def close(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self.file is not None:
            self.progress.close()
            self.file.close()
            self.file = None


def losses(measured: StepResult) -> dict[str, float]:
    return {"loss": measured.loss, "ce": measured.ce, "z": measured.z, **measured.losses()}


def named(line: dict[str, Any], prefix: str) -> dict[str, float]:
    """A line as loggers get it: `train/loss`, `train/tokens_seen/captions`; nothing that is not finite."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= named(value, f"{prefix}/{key}")
        elif value is not None and key != "step":
            flat[f"{prefix}/{key}"] = value
    return flat


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, evaluations among them. A broken one, by a kill or a disk, costs itself alone, and is said."""
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            line = text
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif line is not None:
            print(f"warning: {path}: line {number} is broken and left out", flush=True)
    return lines
