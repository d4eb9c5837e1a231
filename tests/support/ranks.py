"""Start several ranks, on one machine or as if on several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any


def free_port() -> str:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(ranks: int, *commands: list[Any], nodes: int = 1, **options: Any) -> list[subprocess.Popen[Any]]:
    """Start ranks as `composer -n` does, without the ten seconds that its launcher takes.

    Args:
        ranks: number of ranks.
        commands: arguments of the interpreter: of all ranks, or of each.
        nodes: number of machines to simulate.
        options: further arguments of Popen.
    """
    per_node, port = ranks // nodes, free_port()
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank % per_node,
            "NODE_RANK": rank // per_node,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": per_node,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *commands[rank % len(commands)]],
                env={**os.environ, **{key: str(value) for key, value in environment.items()}},
                **options,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[Any]], timeout: float = 300) -> list[int]:
    """Wait for all processes and return their statuses; kill those that do not end in time."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
