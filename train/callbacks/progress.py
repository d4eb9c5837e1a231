"""Progress of a run on the terminal: a bar, or a line every so many steps where there is no terminal."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Any

from unitoken.common.cli import report
from unitoken.train.callbacks.intervals import is_due

# How metrics are shown, by their keys in metrics.jsonl.
FORMATS = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad {:.3f}",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "useful": "{:.0%} useful",
    "mfu": "{:.0%} MFU",
    "skipped": "{} skipped",
}
BAR_METRICS = (
    "loss",
    "tokens_per_second",
    "useful",
    "skipped",
)  # shown beside a bar, where there is room
DROP_ORDER = ("useful", "tokens_per_second", "skipped", "loss")  # dropped one by one where there is no room
MIN_BAR_WIDTH = 12  # columns, with the spaces around the bar


class StepProgressLines:
    """Prints a line every `every` steps and at the end."""

    def __init__(self, name: str, total_steps: int, every: int) -> None:
        self.name, self.total_steps, self.every = name, total_steps, every

    def start(self, done: int) -> None:
        """Start the clock; `done` steps were done before."""
        self.done, self.start_time = done, time.monotonic()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a step, given its line of metrics.jsonl."""
        step = metrics["step"]
        if is_due(step, self.every, self.total_steps):
            report(f"step {step}/{self.total_steps}  {self.status(metrics, *FORMATS)}")

    def status(self, metrics: Mapping[str, Any], *keys: str) -> str:
        """Format those metrics of `keys` that are known and not 0, and the time left."""
        shown = [FORMATS[key].format(metrics[key]) for key in keys if metrics.get(key)]
        return "  ".join([*shown, f"{self.time_left(metrics['step'])} left"])

    def time_left(self, step: int) -> datetime.timedelta:
        """Estimate the time to the end from the mean time per step since the run started, pauses included."""
        seconds_per_step = (time.monotonic() - self.start_time) / max(step - self.done, 1)
        return datetime.timedelta(seconds=round(seconds_per_step * (self.total_steps - step)))

    def print_line(self, text: str) -> None:
        """Print a line of text; a bar moves below it."""
        report(text)

    def close(self) -> None:
        """Stop drawing."""


class StepProgressBar(StepProgressLines):
    """A bar that is redrawn each step; text that is printed meanwhile appears above it."""

    def start(self, done: int) -> None:
        """Start the clock and draw the bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        super().start(done)
        name, status = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
        bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # takes the width that the others leave
        self.bar = Progress(name, bar, MofNCompleteColumn(), status, expand=True, refresh_per_second=4)
        self.task = self.bar.add_task(self.name, total=self.total_steps, completed=done, status="")
        self.bar.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Redraw the bar."""
        counter = f"{self.name}{self.total_steps}/{self.total_steps}"
        columns = self.bar.console.width - len(counter) - MIN_BAR_WIDTH
        status = self.status_within(metrics, columns)
        self.bar.update(self.task, completed=metrics["step"], status=status)

    def status_within(self, metrics: Mapping[str, Any], columns: int) -> str:
        """Format as many metrics as fit into the columns; rich would cut the counter and the time left."""
        for count in range(len(DROP_ORDER) + 1):
            keys = [key for key in BAR_METRICS if key not in DROP_ORDER[:count]]
            status = self.status(metrics, *keys)
            if len(status) <= columns:
                break
        return status

    def close(self) -> None:
        """Stop redrawing, and leave the bar as it is."""
        self.bar.stop()


def build_progress(name: str, total_steps: int, every: int, bar: bool) -> StepProgressLines:
    """Build a bar if `bar` is set and stdout is a terminal, and lines otherwise."""
    return (StepProgressBar if bar and sys.stdout.isatty() else StepProgressLines)(name, total_steps, every)
