"""Durations and intervals of the settings in steps, and when something that happens at an interval is due."""

from __future__ import annotations

import re
from typing import NamedTuple

from composer.core import Time, TimeUnit


class EpochLength(NamedTuple):
    """The length of an epoch of the plan, which converts epochs and tokens to steps.

    Attributes:
        steps: global batches.
        tokens: tokens in all of them, image features included.
    """

    steps: int
    tokens: float

    def steps_in(self, duration: Time) -> float:
        """Convert batches, epochs or tokens to steps; tokens by the mean of tokens per global batch."""
        steps_per_unit = {
            TimeUnit.BATCH: 1.0,
            TimeUnit.EPOCH: self.steps,
            TimeUnit.TOKEN: self.steps / self.tokens,
        }
        return float(duration.value * steps_per_unit[duration.unit])

    def steps_of_warmup(self, warmup: str) -> float:
        """Convert a setting such as `0.01ep` to steps. Composer's `Time` takes whole numbers only."""
        match = re.fullmatch(r"([\d.]+)(ep|ba|tok)", warmup)
        assert match is not None, "checked by the settings"
        return float(match[1]) * self.steps_in(Time(1, match[2]))

    def steps_between(self, interval: str) -> int:
        """Convert a setting such as `1000ba` or `1ep` to steps."""
        return int(self.steps_in(Time.from_timestring(interval)))


def is_due(step: int, every: int, last: int | None = None) -> bool:
    """Return whether something is due after a step.

    Args:
        step: steps done since the stage began.
        every: steps between two times.
        last: a step at which it is due in any case.
    """
    return step % every == 0 or step == last
