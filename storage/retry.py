"""The one retry loop: repeat an action while its error may go away, with pauses in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

RETRY_SECONDS = 120.0  # for which a store's failing request is repeated, unless the caller is less patient
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds

T = TypeVar("T")


def retry(action: Callable[[], T], is_transient: Callable[[Exception], bool], pauses: Iterable[float]) -> T:
    """Call `action` until it succeeds, fails with a permanent error, or no pause is left.

    Args:
        action: called without arguments, once more than pauses are taken at most.
        is_transient: whether an error of `action` may go away.
        pauses: seconds to sleep before each repetition; the next one is taken only after a failure.

    Returns:
        The result of `action`.

    Raises:
        Exception: the last error of `action`.
    """
    remaining = iter(pauses)
    while True:
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            pause = next(remaining, None)
            if pause is None:
                raise
        time.sleep(pause)


def pauses_until(deadline: float) -> Iterator[float]:
    """Yield pauses that double each time, as long as they end before `deadline` (a `time.monotonic`).

    Each is shortened at random by up to a half, so that many clients do not return at the same moment.
    """
    pause = FIRST_PAUSE
    while time.monotonic() + pause <= deadline:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE)
