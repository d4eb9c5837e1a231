"""A Ray cluster of two nodes on this machine, one CPU each.

It has a token of its own. Without one Ray would write a token to the user's home, where every later cluster
would find it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.services import free_port

OBJECT_STORE = 100 << 20  # bytes; Ray's default is a third of the memory
START_SECONDS = 120


@dataclass(frozen=True)
class Cluster:
    environment: dict[str, str]  # of a process that connects to it
    nodes: tuple[int, int]  # the process groups of the head and of the other node

    def kill_node(self) -> None:
        """Kill all processes of the node that is not the head, at once."""
        os.killpg(self.nodes[1], signal.SIGKILL)


@contextlib.contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Start the cluster, and stop it at the end."""
    port, environment = free_port(), private()
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path has at most 107 characters
    groups: list[int] = []
    try:
        head = ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", folder]
        groups.append(_start(environment, *head))
        groups.append(_start(environment, "--address", f"127.0.0.1:{port}"))
        yield Cluster(environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, (groups[0], groups[1]))
    finally:
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def private() -> dict[str, str]:
    """The environment with which Ray writes nothing to the user's home and reports no usage."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}


def _start(environment: dict[str, str], *arguments: str) -> int:
    """Start a node in a process group of its own. Returns the group's id."""
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", *arguments, "--num-cpus", "1", "--num-gpus", "0", "--disable-usage-stats"]
    command += ["--object-store-memory", str(OBJECT_STORE)]
    with tempfile.TemporaryFile() as log:  # a pipe would stay open in the node's processes
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
        status = process.wait(timeout=START_SECONDS)
        log.seek(0)
        assert status == 0, log.read().decode()[-1000:]
    return process.pid
