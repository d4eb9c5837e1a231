"""Measure how long a save stops training, and the memory it takes, against the whole files of before.

    python -m benchmarks.saving [--ranks 2] [--hidden 768] [--layers 8]

Trains a decoder for 12 steps with a checkpoint every third, each time in processes of their own, and resumes:

sharded    as a run saves: each rank copies its rows, and writes them in the background.
whole      as once: the first rank gathers everything and writes one file, while all ranks wait.

A stall is the time in which a rank's training stands still for a save. Memory is that of the process (the
peak of its resident set) beyond what it had before its first save; and, where it resumes, beyond what it had
after its imports. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DATASET = ROOT / "tests" / "data" / "before" / "dataset"
STEPS, EVERY = 12, 3


def settings(folder: Path, hidden: int, layers: int, ranks: int) -> dict[str, Any]:
    """Return the settings of a stage whose steps are short and whose checkpoints are large."""
    return {
        "name": "saving",
        "model": {
            "decoder": {
                "vocab_size": 640,
                "hidden_size": hidden,
                "intermediate_size": 4 * hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": 8,
            }
        },
        "trainable": ["model", "lm_head"],
        "optimizer": {"lr": 1e-4},
        "max_duration": f"{STEPS}ba",
        "data": {
            "streams": {"all": {"local": str(DATASET)}},
            "packed_length": 64,
            "global_batch": ranks,
            "continuous": "none",
            "cache": str(folder / "cache"),
            "workers": 0,
        },
        "precision": "fp32",
        "save": {"folder": str(folder / "run"), "interval": f"{EVERY}ba"},
        "log": {"progress": False, "tensorboard": False},
    }


def memory(key: str) -> float:
    """Return a figure of this process in MB: VmRSS, the memory it has now, or VmHWM, the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


def run_rank(way: str, stage: Path) -> None:
    """Train as one of the ranks, and print what was measured."""
    from unitoken.common.config import load_config
    from unitoken.train.callbacks.saver import Saver
    from unitoken.train.check import check_stage
    from unitoken.train.config import StageConfig
    from unitoken.train.stage import run_stage

    stalls: list[float] = []
    before: list[float] = []
    real = Saver.batch_checkpoint

    def measured(saver: Any, state: Any, logger: Any) -> None:
        if not before:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at VmRSS
            before.append(memory("VmRSS"))
        begun, step = time.perf_counter(), state.timestamp.batch.value
        real(saver, state, logger)
        seconds = time.perf_counter() - begun
        if step % EVERY == 0:
            stalls.append(seconds)
        elif stalls:
            stalls[-1] += seconds  # to complete what was written in the background

    Saver.batch_checkpoint = measured  # type: ignore[method-assign, assignment]
    if way == "whole":
        Saver.save = save_whole  # type: ignore[method-assign, assignment]
    config = load_config(StageConfig, stage)
    resolved = check_stage(config, int(os.environ["WORLD_SIZE"]))
    started, begun = memory("VmRSS"), time.perf_counter()
    run_stage(config, resolved)
    figures = {
        "stalls": stalls,
        "saving_mb": memory("VmHWM") - before[0],
        "resuming_mb": memory("VmHWM") - started,
        "seconds": time.perf_counter() - begun,
    }
    print(json.dumps(figures), flush=True)


def save_whole(saver: Any, state: Any) -> None:
    """Save as before: Composer's whole file, written aside by the first rank."""
    from composer.utils.checkpoint import save_checkpoint

    step = state.timestamp.batch.value
    if step == saver.saved_at:
        return
    saver.saved_at = step
    written = saver.folder / f".aside-step-{step:08d}.pt"
    save_checkpoint(state, str(written))
    if os.environ["RANK"] == "0":
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        written.rename(saver.folder / f"step-{step:08d}.pt")
        for old in sorted(saver.folder.glob("step-*"))[: -saver.keep]:
            old.unlink()


def launch(way: str, stage: Path, ranks: int) -> list[dict[str, Any]]:
    """Run all ranks, and return the figures of each."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common: dict[str, object] = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "NODE_RANK": 0,
        "OMP_NUM_THREADS": 1,
    }
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-m", "benchmarks.saving", "--way", way, "--stage", str(stage)]
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=1200)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank failed: {outputs}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure(way: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and save in one way, and resume from half of it."""
    wanted = settings(folder, arguments.hidden, arguments.layers, arguments.ranks)
    stage = folder / "stage.yaml"
    stage.write_text(json.dumps(wanted))
    saved = launch(way, stage, arguments.ranks)
    size = sum(path.stat().st_size for path in folder.glob(f"run/step-{STEPS:08d}*/*"))
    size = size or (folder / "run" / f"step-{STEPS:08d}.pt").stat().st_size
    stage.write_text(json.dumps({**wanted, "max_duration": f"{STEPS + 1}ba"}))
    resumed = launch(way, stage, arguments.ranks)
    shutil.rmtree(folder / "run")
    return {
        "stall_seconds": round(max(statistics.median(rank["stalls"]) for rank in saved), 3),
        "saving_mb": [round(rank["saving_mb"]) for rank in saved],
        "resuming_mb": [round(rank["resuming_mb"]) for rank in resumed],
        "training_seconds": round(saved[0]["seconds"], 1),
        "checkpoint_mb": round(size / 1e6),
    }


def main() -> None:
    """Measure both ways, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_rank(arguments.way, arguments.stage)
        return
    build = ROOT / "build"  # on the disk of the repository, as /tmp may be memory
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        figures = {way: measure(way, Path(folder).resolve(), arguments) for way in ("whole", "sharded")}
    for way, values in figures.items():
        print(way, values)
    whole, sharded = figures["whole"], figures["sharded"]
    saving = sharded["saving_mb"]
    result = {
        "save_stall_ratio": round(sharded["stall_seconds"] / whole["stall_seconds"], 3),
        "save_peak_ratio": round(saving[0] / max(saving[1:] or saving), 2),
        **{f"{way}_{key}": value for way, values in figures.items() for key, value in values.items()},
        "ranks": arguments.ranks,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "host": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
