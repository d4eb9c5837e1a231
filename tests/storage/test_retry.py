"""The retry loop: what it repeats, how often, and which error it ends with."""

from __future__ import annotations

import time
from itertools import islice

import pytest

from unitoken.storage import retry as module
from unitoken.storage.retry import pauses_until, retry


class Failing:
    """Raises one error after the other, and then returns how often it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def is_timeout(error: Exception) -> bool:
    return isinstance(error, TimeoutError)


def test_transient_errors_are_repeated() -> None:
    assert retry(Failing(TimeoutError(), TimeoutError()), is_timeout, [0, 0, 0]) == 3


def test_a_permanent_error_is_raised_at_once() -> None:
    action = Failing(TimeoutError(), ValueError("permanent"), TimeoutError())
    with pytest.raises(ValueError, match="permanent"):
        retry(action, is_timeout, [0] * 9)
    assert action.calls == 2


def test_the_last_error_is_raised_when_no_pause_is_left() -> None:
    action = Failing(TimeoutError("first"), TimeoutError("second"), TimeoutError("third"))
    with pytest.raises(TimeoutError, match="second"):
        retry(action, is_timeout, [0])
    assert action.calls == 2


def test_pauses_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 5.0)
    pauses = list(islice(pauses_until(time.monotonic() + 60), 5))
    for pause, longest in zip(pauses, (1, 2, 4, 5, 5), strict=True):
        assert longest / 2 <= pause <= longest


def test_pauses_end_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    pauses = pauses_until(101.0)
    assert next(pauses) <= 0.5
    clock[0] = 100.1
    assert next(pauses, None) is None, "a pause of 1 s would end after the deadline"
