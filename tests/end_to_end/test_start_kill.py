"""Jobs side by side on one host, started and killed again and again: each start works, and nothing is left behind."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.paths import TESTS
from support.processes import wait_for
from support.small_datasets import text_records, write_dataset
from support.soak_streaming import SAMPLES

PROGRAM = TESTS / "support" / "soak_streaming.py"
MARK = "UNITOKEN_START_KILL"


class Job:
    """Two ranks with two workers each, started and killed together."""

    def __init__(self, root: Path, number: int) -> None:
        self.root, self.folder = root, root / f"job-{number}"
        self.folder.mkdir()
        self.random = random.Random(number)

    def start(self, *more: str) -> list[subprocess.Popen[bytes]]:
        environment = os.environ | {MARK: str(self.root), "TMPDIR": str(self.root / "tmp")}
        arguments = [str(self.folder), str(self.root / "data"), str(self.root / "cache"), *more]
        with open(self.folder / "log.txt", "ab") as log:
            return [
                subprocess.Popen(
                    [sys.executable, str(PROGRAM), str(rank), *arguments],
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
                for rank in range(2)
            ]

    def lines(self) -> int:
        return min(len(path.read_text().splitlines()) if path.exists() else 0 for path in self.logs())

    def logs(self) -> list[Path]:
        return [self.folder / f"rank-{rank}.txt" for rank in range(2)]

    def start_and_kill(self) -> None:
        before, ranks = self.lines(), self.start()
        end = time.monotonic() + 120
        while self.lines() == before:
            assert all(rank.poll() is None for rank in ranks), (self.folder / "log.txt").read_text()[-2000:]
            assert time.monotonic() < end, "no batch within two minutes"
            time.sleep(0.05)
        time.sleep(self.random.uniform(0, 0.5))
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.wait()


def left_behind(root: Path) -> list[int]:
    """Processes of ours that still run: workers whose parent was killed."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARK}={root}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def nobodys(names: set[str]) -> set[str]:
    """Shared memory that no process has open: that of other tests on this host does not count."""
    held = ""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                held += (entry / "maps").read_text() + "".join(
                    str(fd.readlink()) for fd in (entry / "fd").iterdir()
                )
    return {name for name in names if f"/dev/shm/{name}" not in held and (Path("/dev/shm") / name).exists()}


def run_cycles(root: Path, jobs: int, cycles: int) -> None:
    (root / "tmp").mkdir()
    write_dataset(root / "data", text_records(SAMPLES))
    shared_before = files(Path("/dev/shm"))
    others = Path("/dev/shm") / f"somebody-elses-{os.getpid()}"
    others.write_bytes(b"1")
    try:
        all_jobs = [Job(root, number) for number in range(jobs)]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda job: [job.start_and_kill() for _ in range(cycles)], all_jobs))
        end = time.monotonic() + 60
        while left_behind(root):
            assert time.monotonic() < end, "workers outlive the rank that was killed"
            time.sleep(0.2)
        time.sleep(1.1)  # files aside that are younger may still be somebody's
        ranks = all_jobs[0].start("3")
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0], (
            all_jobs[0].folder / "log.txt"
        ).read_text()[-2000:]
        # What a killed program of somebody else's leaves, its resource tracker removes in a moment; ours
        # would stay.
        wait_for(lambda: nobodys(files(Path("/dev/shm")) - shared_before) == {others.name}, seconds=30)
        assert others.read_bytes() == b"1"
    finally:
        others.unlink()
    left = list(
        (root / "tmp").iterdir()
    )  # `import torch.distributed` makes a folder for one template: a killed rank's stays
    assert len(left) <= 2 * jobs * cycles
    assert set().union(*map(files, left)) <= {"_remote_module_non_scriptable.py", "__pycache__"}
    assert not list((root / "cache").glob("**/.aside-*"))
    shards = list((root / "cache").glob("datasets/*/chunk-*/*.mds"))
    assert len(shards) == len(list((root / "data").glob("chunk-*/*.mds"))), "all were read, none twice"
    for rank in range(
        2
    ):  # the same place of the same epoch holds the same, in every job and after every kill
        seen: dict[str, str] = {}
        for job in all_jobs:
            for line in job.logs()[rank].read_text().splitlines():
                epoch, packs, digest = line.split()
                assert seen.setdefault(f"{epoch} {packs}", digest) == digest
        assert len(seen) > 3


@pytest.mark.slow
def test_jobs_start_again_after_every_kill_and_leave_nothing(tmp_path):
    run_cycles(tmp_path, jobs=2, cycles=2)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_a_hundred_starts_and_kills_of_four_jobs_side_by_side(tmp_path):
    run_cycles(tmp_path, jobs=4, cycles=25)
