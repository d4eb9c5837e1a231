"""The ranks of a run: this rank's number, and exchanges in which none waits for a rank that has ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from composer.utils import dist, get_device
from torch import Tensor

from unitoken.common.config import changed_names
from unitoken.common.errors import ConfigError, is_transient
from unitoken.storage.store import StoreError, TransientStoreError

FIRST_RANK_SECONDS = 300.0  # how long ranks wait for the first rank to start
TIMEOUT = 1800.0  # seconds a rank waits for the others; they wait while the first rank reads tens of GB
ERRORS = {"settings": ConfigError, "transient": TransientStoreError, "lasting": StoreError}


def world_size() -> int:
    """Return the number of ranks that the launcher starts, also before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this rank's number."""
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Return whether this is rank 0."""
    return rank() == 0


def connect() -> None:
    """Connect to the other ranks, if there are any. Raises ConfigError if the first rank does not answer."""
    if world_size() > 1:
        # torchrun's name of the variable that Composer reads.
        os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
        _wait_for_first_rank()
        dist.initialize_dist(get_device(None), timeout=TIMEOUT)


def _wait_for_first_rank() -> None:
    """Raise ConfigError if nothing answers at the first rank's address for minutes.

    Torch would wait half an hour, and its message does not help.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if is_first_rank() or not host or not port.isdigit():
        return
    deadline = time.monotonic() + FIRST_RANK_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank {rank()}: the first rank does not answer at {host}:{port} (MASTER_ADDR, "
                    f"MASTER_PORT) for {FIRST_RANK_SECONDS:.0f} s: {error.strerror or error}; "
                    "is the launcher of the first machine running?"
                ) from None
            time.sleep(0.5)
        else:
            return


@contextlib.contextmanager
def share_errors() -> Iterator[None]:
    """Raise an error of this block on all ranks, so that all end with one status and none waits for another.

    All ranks have to enter the block. A rank's own error comes before those of others.
    """
    own_error = None
    try:
        yield
    except Exception as error:
        own_error = error
    failures = gather(None if own_error is None else _describe(own_error))
    if own_error is not None:
        raise own_error
    for number, failure in enumerate(failures):
        if failure is not None:
            kind, message = failure
            raise ERRORS[kind](f"rank {number}: {message}")


def _describe(error: Exception) -> tuple[str, str]:
    """Return the kind of an error (a key of `ERRORS`), which decides the exit status, and its message."""
    message = str(error) or type(error).__name__
    if isinstance(error, ConfigError):
        return "settings", message
    return "transient" if is_transient(error) else "lasting", message


def check_same(where: str, value: str) -> None:
    """Raise ConfigError on all ranks if they found different values, as where machines do not share a folder.

    Args:
        where: the setting, for the message.
        value: what this rank found.
    """
    values = gather(value)
    for number, other in enumerate(values):
        if other != values[0]:
            raise ConfigError(
                f"{where}: rank 0 finds {values[0]} and rank {number} finds {other}; "
                "it must be the same on all machines"
            )


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError on all ranks if two of them have different settings, as from an old file.

    Each would train its own shards of the model in its own way, without any other error.

    Args:
        settings: by dotted name.
    """
    first, *others = [json.loads(text) for text in gather(json.dumps(settings))]
    for number, other in enumerate(others, 1):
        names = changed_names(first, other)
        if names:
            name = names[0]
            raise ConfigError(
                f"{name}: rank 0 has {first.get(name)} and rank {number} has {other.get(name)}; "
                "settings must be the same on all machines"
            )


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    return list(dist.all_gather_object(value)) if world_size() > 1 else [value]


def smallest(value: float) -> float:
    """Return the smallest of the ranks' values."""
    values: list[float] = gather(value)
    return min(values)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    dist.all_reduce(values)
    return values


def broadcast_from_first_rank(tensor: Tensor) -> Tensor:
    """Replace a tensor by the first rank's, in place, and return it.

    Ranks that gather shards together have to make the same choices.
    """
    dist.broadcast(tensor, src=0)
    return tensor


def barrier() -> None:
    """Wait until all ranks are here."""
    dist.barrier()
