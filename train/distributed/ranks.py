"""Several ranks: who this one is, and what they say to each other so that none waits for one that is gone."""

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

FIRST_RANK_SECONDS = 300.0  # until the first rank must have been started
TIMEOUT = 1800.0  # seconds a rank waits for the others; the first one reads tens of GB while they wait


def world_size() -> int:
    """As the launcher says, before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    return rank() == 0


def connect() -> None:
    """Meet the other ranks, if there are any."""
    if world_size() > 1:
        os.environ.setdefault(
            "NODE_RANK", os.environ.get("GROUP_RANK", "0")
        )  # torchrun's name of what Composer asks for
        _wait_for_first_rank()
        dist.initialize_dist(get_device(None), timeout=TIMEOUT)


def _wait_for_first_rank() -> None:
    """Raises ConfigError where nobody answers at its address for minutes: torch would wait half an hour, and say little."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if is_first_rank() or not host or not port.isdigit():
        return
    end = time.monotonic() + FIRST_RANK_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"rank {rank()}: the first rank does not answer at {host}:{port} (MASTER_ADDR, MASTER_PORT) for "
                    f"{FIRST_RANK_SECONDS:.0f} s: {error.strerror or error}; is the launcher of the first machine running?"
                ) from None
            time.sleep(0.5)
        else:
            return


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What goes wrong in this block on one rank ends all of them with the same status, and none waits for one that is gone."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    mine = None
    if failure is not None:
        kind = (
            "settings"
            if isinstance(failure, ConfigError)
            else "transient"
            if is_transient(failure)
            else "lasting"
        )
        mine = kind, str(failure) or type(failure).__name__
    said = _of_all_ranks(mine)
    if failure is not None:
        raise failure
    for rank, other in enumerate(said):
        if other is not None:
            kinds = {"settings": ConfigError, "transient": TransientStoreError, "lasting": StoreError}
            raise kinds[other[0]](f"rank {rank}: {other[1]}")


def check_alike(where: str, found: str) -> None:
    """Raises ConfigError on all ranks where they found different things: two machines whose folders are not the same one."""
    for rank, other in enumerate(everywhere := _of_all_ranks(found)):
        if other != everywhere[0]:
            raise ConfigError(
                f"{where}: rank 0 finds {everywhere[0]} and rank {rank} finds {other}; it must be the same on all machines"
            )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError on all ranks where two of them have other settings, by an old file on one machine.

    Each would train its own shards of the model in its own way, and nothing else would tell.
    """
    first, *others = [json.loads(text) for text in _of_all_ranks(json.dumps(settings))]
    for rank, other in enumerate(others, 1):
        if names := changed_names(first, other):
            here, there = first.get(names[0]), other.get(names[0])
            raise ConfigError(
                f"{names[0]}: rank 0 has {here} and rank {rank} has {there}; settings must be the same on all machines"
            )


def _of_all_ranks(mine: Any) -> list[Any]:
    return list(dist.all_gather_object(mine)) if world_size() > 1 else [mine]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The same on all ranks."""
    dist.all_reduce(values)
    return values


def first_ranks(tensor: Tensor) -> Tensor:
    """The first rank's, on all ranks: they must go the same way where they gather shards together."""
    dist.broadcast(tensor, src=0)
    return tensor


def barrier() -> None:
    dist.barrier()
