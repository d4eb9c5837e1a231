"""A run of two ranks that is disturbed again and again, under the real launcher: support/chaos_training.py FOLDER EVENTS

Prints one JSON object: how many of each event, and seconds. The run's curve is left in FOLDER/run/metrics.jsonl, the
undisturbed one's in FOLDER/undisturbed/metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.paths import ROOT
from support.stages import write_data, write_stage

STEPS = 36  # 4 epochs of 9
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
WHO = ("one rank", "all ranks", "launcher")
PATIENCE = 120.0  # seconds until a start must have come to its moment, or its end


class Start:
    """The stage's command, started once."""

    def __init__(self, folder: Path, name: str, *overrides: str, small_files: bool = False) -> None:
        def limit() -> None:  # as a full disk: no file can grow beyond it
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        self.run = folder / name
        self._log = open(folder / f"{name}.log", "ab")  # noqa: SIM115 - closed in `wait`
        composer = str(Path(sys.executable).parent / "composer")
        self.process = subprocess.Popen(
            [
                composer,
                "-n",
                "2",
                "train.py",
                str(folder / "tiny.yaml"),
                f"save.folder={self.run}",
                *overrides,
            ],
            cwd=ROOT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": os.environ["SHORT_TMPDIR"]},
            start_new_session=True,
            preexec_fn=limit if small_files else None,
        )

    def ranks(self) -> list[int]:
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "train.py"],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in found.stdout.split()]

    def until(self, moment: Callable[[], bool]) -> bool:
        """False where the run ended before."""
        end = time.monotonic() + PATIENCE
        while not moment():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, "the moment never came"
            time.sleep(0.002)
        return True

    def send(self, who: str, number: int, choice: random.Random) -> None:
        ranks = self.ranks()
        pids = {
            "one rank": ranks and [choice.choice(ranks)],
            "all ranks": ranks,
            "launcher": [self.process.pid],
        }[who]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> int:
        status = self.process.wait(PATIENCE)
        self._log.close()
        return status


def orphans(folder: Path) -> list[str]:
    found = subprocess.run(
        ["pgrep", "-f", f"train.py.*{folder}"], capture_output=True, text=True, check=False
    )
    return found.stdout.split()


def gone(folder: Path) -> None:
    """Ranks whose launcher was killed end, too."""
    end = time.monotonic() + 40
    while left := orphans(folder):
        assert time.monotonic() < end, f"orphans: {left}"
        time.sleep(0.05)


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def damage(run: Path, kind: str) -> bool:
    """The newest of two checkpoints or more."""
    saved = sorted(run.glob("step-*.pt"))
    if len(saved) < 2:
        return False
    content = bytearray(saved[-1].read_bytes())
    if kind == "cut":
        content = content[:-1000]
    else:
        content[len(content) // 2] ^= 1
    saved[-1].write_bytes(content)
    return True


def disturb(folder: Path, count: int, seed: int) -> Counter[str]:
    """`count` events, then to the end."""
    choice, run = random.Random(seed), folder / "run"
    done: Counter[str] = Counter()
    kinds = [
        (who, name, moment)
        for who in WHO
        for name in SIGNALS
        for moment in ("starting", "planning", "training", "saving")
    ]
    kinds += (
        [("", "SIGSTOP", "")] * 2
        + [("", "disk full", "")] * 2
        + [("", "cut checkpoint", ""), ("", "flipped checkpoint", "")] * 2
    )
    choice.shuffle(kinds)
    export = f"save.export={folder}/model"
    number = 0
    while sum(done.values()) < count:
        who, name, moment = kinds[number % len(kinds)]
        number += 1
        if name in ("cut checkpoint", "flipped checkpoint"):
            done[name] += damage(run, name.partition(" ")[0])
            continue
        if moment == "planning":
            shutil.rmtree(folder / "cache" / "plans", ignore_errors=True)
        before = steps(run)
        start = Start(folder, "run", export, small_files=name == "disk full")
        moments: dict[str, Callable[[], bool]] = {
            "starting": lambda start=start: len(start.ranks()) == 2,  # type: ignore[misc]
            "planning": lambda: (
                any((folder / "cache" / "plans").glob("*/.aside-*"))
                or any((folder / "cache").glob("plans/*/epoch-*"))
            ),
            "saving": lambda: any(run.glob(".aside-step-*")),
            "training": lambda before=before: steps(run) not in (before, 0) and steps(run) % 3 == 1,  # type: ignore[misc]
        }
        if name == "disk full":
            assert start.wait() == 1
        elif start.until(moments[moment or "training"]):
            if name == "SIGSTOP":
                rank = choice.choice(start.ranks())
                os.kill(rank, signal.SIGSTOP)
                time.sleep(2)
                os.kill(rank, signal.SIGCONT)
                at = steps(run)
                start.until(lambda at=at: steps(run) > at)  # type: ignore[misc]
                start.send("launcher", signal.SIGTERM, choice)
            else:
                start.send(who, SIGNALS[name], choice)
            start.wait()
        else:
            start.wait()
            if steps(run) >= STEPS:  # it came to its end before the moment: once more from the beginning
                shutil.rmtree(run)
                continue
        gone(folder)
        done[" ".join(filter(None, (name, who, moment)))] += 1
    while True:  # and while exporting, once
        start = Start(folder, "run", export)
        if start.until(lambda: any(folder.glob(".aside-model-*"))):
            start.send("all ranks", signal.SIGKILL, choice)
            done["SIGKILL all ranks exporting"] += 1
        status = start.wait()
        gone(folder)
        if status == 0 or done["SIGKILL all ranks exporting"] > 3:
            break
    final = Start(folder, "run", export)
    assert final.wait() == 0
    gone(folder)
    return done


def main(folder: Path, count: int, seed: int = 0) -> None:
    (folder / "tmp").mkdir(parents=True)
    with tempfile.TemporaryDirectory(
        dir="/tmp"
    ) as short:  # where paths are long ranks have no folder of their own
        (Path(short) / "t").symlink_to(folder / "tmp")
        os.environ["SHORT_TMPDIR"] = f"{short}/t"
        run(folder, count, seed)


def run(folder: Path, count: int, seed: int) -> None:
    write_data(folder / "data")
    write_stage(folder, max_duration="4ep", save={"folder": "x", "interval": "3ba", "keep": 3})
    shared = sorted(path.name for path in Path("/dev/shm").iterdir())
    assert Start(folder, "undisturbed").wait() == 0
    begun = time.monotonic()
    done = disturb(folder, count, seed)
    left = sorted(path.name for path in Path("/dev/shm").iterdir() if path.name not in shared)
    print(
        json.dumps(
            {
                "events": sum(done.values()),
                "kinds": done,
                "seconds": round(time.monotonic() - begun),
                "left_in_shm": left,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
