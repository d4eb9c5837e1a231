"""Train with two ranks under the real launcher, and disturb the run again and again.

    python tests/support/chaos_training.py FOLDER EVENTS [URL]

It kills, stops and starves the run, and damages its checkpoints. It prints one JSON object with the number
of each event, the seconds, and the folder in which the disturbed run worked. Its losses are there, in
metrics.jsonl, and those of an undisturbed run in FOLDER/undisturbed/metrics.jsonl. With a URL the disturbed
run is saved there, else in FOLDER/run.
"""

from __future__ import annotations

import contextlib
import itertools
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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.paths import ROOT
from support.stages import write_data, write_stage
from unitoken.common.config import load_config
from unitoken.storage.open import open_store
from unitoken.train.checkpoint.locations import INDEX, is_checkpoint
from unitoken.train.config import StageConfig
from unitoken.train.run.bucket import working_folder

STEPS = 36  # 4 epochs of 9
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
TARGETS = ("one rank", "all ranks", "launcher")
MOMENTS = ("starting", "planning", "training", "saving")
WAIT_SECONDS = 120.0  # until a run must have come to its moment, or its end
EXPORTING_KILLED = "SIGKILL all ranks exporting"


class Event(NamedTuple):
    """What happens to a run."""

    name: str  # a signal, or another kind of trouble
    target: str = ""  # of a signal
    moment: str = "training"

    def __str__(self) -> str:
        return f"{self.name} {self.target} {self.moment}" if self.target else self.name


class Stage(NamedTuple):
    """The stage of a run.

    Attributes:
        folder: holds data, settings and logs.
        saved: `save.folder`, a folder or a URL.
    """

    folder: Path
    saved: str

    @property
    def work(self) -> Path:
        """The folder in which the run works."""
        overrides = [f"save.folder={self.saved}"]
        return working_folder(load_config(StageConfig, self.folder / "tiny.yaml", overrides))

    def remove(self) -> None:
        """Remove all that the run has saved."""
        store = open_store(self.saved)
        for name in store.sizes():
            store.delete(name)
        shutil.rmtree(self.work)


class Start:
    """One start of the stage's command."""

    def __init__(self, stage: Stage, *overrides: str, small_files: bool = False) -> None:
        def limit() -> None:  # no file can grow beyond it, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        self.work = stage.work
        name = Path(stage.saved).name
        self._log = open(stage.folder / f"{name}.log", "ab")  # noqa: SIM115 - closed in `wait`
        composer = str(Path(sys.executable).parent / "composer")
        command = [composer, "-n", "2", "train.py", str(stage.folder / "tiny.yaml")]
        self.process = subprocess.Popen(
            [*command, f"save.folder={stage.saved}", *overrides],
            cwd=ROOT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": os.environ["SHORT_TMPDIR"]},
            start_new_session=True,
            preexec_fn=limit if small_files else None,
        )

    def ranks(self) -> list[int]:
        """The ids of the ranks' processes."""
        return [int(pid) for pid in _pgrep("-P", str(self.process.pid), "-f", "train.py")]

    def until(self, moment: Callable[[], bool]) -> bool:
        """Wait for a moment. Returns False where the run ended before it."""
        end = time.monotonic() + WAIT_SECONDS
        while not moment():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, "the moment never came"
            time.sleep(0.002)
        return True

    def send(self, target: str, number: int, choice: random.Random) -> None:
        """Send a signal to one rank, to all ranks or to the launcher."""
        ranks = self.ranks()
        if target == "one rank":
            ranks = ranks and [choice.choice(ranks)]
        for pid in [self.process.pid] if target == "launcher" else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> int:
        status = self.process.wait(WAIT_SECONDS)
        self._log.close()
        return status


def _pgrep(*arguments: str) -> list[str]:
    return subprocess.run(["pgrep", *arguments], capture_output=True, text=True, check=False).stdout.split()


def wait_for_orphans(folder: Path) -> None:
    """Wait until all ranks have ended, also those whose launcher was killed."""
    end = time.monotonic() + 40
    while orphans := _pgrep("-f", f"train.py.*{folder}"):
        assert time.monotonic() < end, f"orphans: {orphans}"
        time.sleep(0.05)


def steps(run: Path) -> int:
    """The number of steps that a run has logged."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def damage(stage: Stage, event: Event) -> bool:
    """Damage the newest checkpoint where there is another to resume from. Returns whether there is."""
    store = open_store(stage.saved)
    saved = [name for name in store.sizes("step-") if name.endswith(INDEX)]
    if len(saved) < 2:
        return False
    files = list(store.sizes(saved[-1].removesuffix(INDEX)))
    name = files[steps(stage.work) % 3]  # the index, or the file of a rank
    content = bytearray(store.read(name))
    if event.name == "cut checkpoint":
        content = content[:-1000]
    else:
        content[len(content) // 2] ^= 1
    store.write(name, bytes(content))
    return True


def all_events(choice: random.Random) -> list[Event]:
    """Every signal at every moment, and twice each other kind of trouble, in random order."""
    signals = [Event(name, target, moment) for target in TARGETS for name in SIGNALS for moment in MOMENTS]
    stopped, full = [Event("SIGSTOP")] * 2, [Event("disk full")] * 2
    events = signals + stopped + full + [Event("cut checkpoint"), Event("flipped checkpoint")] * 2
    choice.shuffle(events)
    return events


def disturb(stage: Stage, count: int, seed: int) -> Counter[str]:
    """Let `count` events happen to the run, then kill it while it exports, then let it finish."""
    choice = random.Random(seed)
    events = itertools.cycle(all_events(choice))
    done: Counter[str] = Counter()
    while sum(done.values()) < count:
        event = next(events)
        if event.name in ("cut checkpoint", "flipped checkpoint"):
            done[event.name] += damage(stage, event)
            continue
        if event.moment == "planning":
            shutil.rmtree(stage.folder / "cache" / "plans", ignore_errors=True)
        happened = start_and_disturb(stage, event, choice)
        if not happened and steps(stage.work) >= STEPS:  # it ended before the moment: begin again
            stage.remove()
            continue
        wait_for_orphans(stage.folder)
        done[str(event)] += 1
    kill_while_exporting(stage, choice, done)
    assert Start(stage, export_to(stage.folder)).wait() == 0
    wait_for_orphans(stage.folder)
    return done


def start_and_disturb(stage: Stage, event: Event, choice: random.Random) -> bool:
    """Start the run, and let the event happen. Returns False where the run ended before its moment."""
    before = steps(stage.work)
    start = Start(stage, export_to(stage.folder), small_files=event.name == "disk full")
    if event.name == "disk full":
        assert start.wait() == 1
        return True
    if not start.until(lambda: has_come(event.moment, stage, start, before)):
        start.wait()
        return False
    if event.name == "SIGSTOP":
        stop_for_a_while(start, choice)
        start.send("launcher", signal.SIGTERM, choice)
    else:
        start.send(event.target, SIGNALS[event.name], choice)
    start.wait()
    return True


def has_come(moment: str, stage: Stage, start: Start, before: int) -> bool:
    """Whether a run that began with `before` steps is at a moment."""
    run, plans = start.work, stage.folder / "cache" / "plans"
    if moment == "starting":
        return len(start.ranks()) == 2
    if moment == "planning":
        return any(plans.glob("*/.aside-*")) or any(plans.glob("*/epoch-*"))
    if moment == "saving":
        return any(not is_checkpoint(path) for path in run.glob("step-*"))
    return steps(run) not in (before, 0) and steps(run) % 3 == 1


def stop_for_a_while(start: Start, choice: random.Random) -> None:
    """Stop a rank for two seconds, and wait until the run makes another step."""
    rank = choice.choice(start.ranks())
    os.kill(rank, signal.SIGSTOP)
    time.sleep(2)
    os.kill(rank, signal.SIGCONT)
    at = steps(start.work)
    start.until(lambda: steps(start.work) > at)


def kill_while_exporting(stage: Stage, choice: random.Random, done: Counter[str]) -> None:
    """Kill the finished run while it exports its model, until an export succeeds or for four times."""
    while done[EXPORTING_KILLED] <= 3:
        start = Start(stage, export_to(stage.folder))
        if start.until(lambda: any(stage.folder.glob(".aside-model-*"))):
            start.send("all ranks", signal.SIGKILL, choice)
            done[EXPORTING_KILLED] += 1
        status = start.wait()
        wait_for_orphans(stage.folder)
        if status == 0:
            return


def export_to(folder: Path) -> str:
    return f"save.export={folder}/model"


def main(folder: Path, count: int, saved: str, seed: int = 0) -> None:
    (folder / "tmp").mkdir(parents=True)
    # With a long path, the ranks' sockets would not fit into a temporary folder of their own.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        (Path(short) / "t").symlink_to(folder / "tmp")
        os.environ["SHORT_TMPDIR"] = f"{short}/t"
        run(folder, count, saved, seed)


def run(folder: Path, count: int, saved: str, seed: int) -> None:
    write_data(folder / "data")
    write_stage(folder, max_duration="4ep", save={"folder": "x", "interval": "3ba", "keep": 3})
    shared = sorted(path.name for path in Path("/dev/shm").iterdir())
    assert Start(Stage(folder, str(folder / "undisturbed"))).wait() == 0
    begun = time.monotonic()
    disturbed = Stage(folder, saved)
    done = disturb(disturbed, count, seed)
    left = sorted(path.name for path in Path("/dev/shm").iterdir() if path.name not in shared)
    seconds = round(time.monotonic() - begun)
    result = {
        "events": sum(done.values()),
        "kinds": done,
        "seconds": seconds,
        "left_in_shm": left,
        "work": str(disturbed.work),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [*sys.argv, f"{sys.argv[1]}/run"][3])
