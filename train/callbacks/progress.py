"""How far a run is, for whoever looks at its terminal or reads what it printed: a bar, or a line every so many steps."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Any

FORMS = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad {:.3f}",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "useful": "{:.0%} useful",
    "mfu": "{:.0%} MFU",
    "skipped": "{} skipped",
}
BESIDE = ("loss", "tokens_per_second", "useful", "skipped")  # a bar, where there is room
SPARED = (
    "useful",
    "tokens_per_second",
    "skipped",
    "loss",
)  # first to last, where there is none: step and time left stay
BAR = 12  # columns of it at least, with the spaces around it


class Lines:
    """A line every `every` steps and at the end."""

    def __init__(self, name: str, total_steps: int, every: int) -> None:
        self.name, self.total, self.every = name, total_steps, every

    def start(self, done: int) -> None:
        self.done, self.begun = done, time.monotonic()

    def step(self, line: Mapping[str, Any]) -> None:
        """`line` is one of metrics.jsonl."""
        if line["step"] % self.every == 0 or line["step"] == self.total:
            print(f"step {line['step']}/{self.total}  {self.words(line, *FORMS)}", flush=True)

    def words(self, line: Mapping[str, Any], *keys: str) -> str:
        """What is known and not 0 of `keys`, and the time left."""
        shown = [FORMS[key].format(line[key]) for key in keys if line.get(key)]
        return "  ".join([*shown, f"{self.left(line['step'])} left"])

    def left(self, step: int) -> datetime.timedelta:
        """Time to the end at the pace since the run started, with all that it paused for."""
        pace = (time.monotonic() - self.begun) / max(step - self.done, 1)
        return datetime.timedelta(seconds=round(pace * (self.total - step)))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class Bar(Lines):
    """A bar that is redrawn each step; whatever is printed meanwhile appears above it."""

    def start(self, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        super().start(done)
        name, words = TextColumn("{task.description}"), TextColumn("{task.fields[words]}")
        bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # it takes what the others leave
        self.bar = Progress(name, bar, MofNCompleteColumn(), words, expand=True, refresh_per_second=4)
        self.task = self.bar.add_task(self.name, total=self.total, completed=done, words="")
        self.bar.start()

    def step(self, line: Mapping[str, Any]) -> None:
        words = self.fitting(
            line, self.bar.console.width - len(f"{self.name}{self.total}/{self.total}") - BAR
        )
        self.bar.update(self.task, completed=line["step"], words=words)

    def fitting(self, line: Mapping[str, Any], columns: int) -> str:
        """Rich would cut the counter and the time left."""
        spared = (
            self.words(line, *(key for key in BESIDE if key not in SPARED[:most]))
            for most in range(len(SPARED) + 1)
        )
        words = next((words for words in spared if len(words) <= columns), None)
        return f"{self.left(line['step'])} left" if words is None else words

    def close(self) -> None:
        self.bar.stop()


def progress_of(name: str, total_steps: int, every: int, bar: bool) -> Lines:
    """A bar where one is wanted and there is a terminal to draw it on."""
    return (Bar if bar and sys.stdout.isatty() else Lines)(name, total_steps, every)
