"""What happens after the metrics of a step, and before its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from unitoken.train.callbacks.metrics import Metrics


class KilledError(Exception):
    """Ends a run without any cleaning up."""


def at_step(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call an action after the metrics of a step."""
    real = Metrics.batch_end

    def batch_end(self: Any, state: Any, logger: Any) -> None:
        real(self, state, logger)
        if state.timestamp.batch.value == step:
            action()

    monkeypatch.setattr(Metrics, "batch_end", batch_end)


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the run after the metrics of a step."""

    def kill() -> None:
        raise KilledError

    at_step(step, kill, monkeypatch)
