"""How fast samples come from disk, what a plan costs, and how soon a resumed run has its first batch.

    python -m benchmarks.streaming [--short] [--rounds 3]

text       the same 60,000 text samples (1,300 tokens on average), shuffled, by ours, mosaicml-streaming's own iteration,
           webdataset, LitData, the reference's pickle a sample, and a raw memory map as the limit: to arrays in one process,
           and to batches of tensors through a DataLoader with two workers (ours packed, the others padded)
images     one 1024 x 768 JPEG to the vision tower's input on one core, against the reference's way
plan       sidecar on disk -> saved plan, 1 M to 100 M samples, in a process of its own
start      process with the plan at hand -> first batch, at 0 %, 50 %, 99 % of an epoch of a million samples
fill       of packs of 4,096: text; of a mixture with pictures of 1,790 tokens, at the best of several lengths

Sides take turns; figures are medians over the rounds, ratios of medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import stream_sides
from benchmarks.reference_views import processor, reference_pixels
from unitoken.dataset.manifest import INDEX, SIDECAR
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.build import build
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.recipe import Recipe, StreamRecipe

PHOTOGRAPH = (
    Path(__file__).parent.parent / "tests" / "data" / "golden" / "assets" / "images" / "d10_large.jpg"
)
SWEEP = (4096, 6144, 8192, 12288, 16384)


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    result = np.empty(count, np.uint32)
    for begin in range(0, count, 1 << 20):
        rng = np.random.default_rng([seed, begin])
        result[begin : begin + (1 << 20)] = np.clip(
            rng.lognormal(6.0, 0.9, len(result[begin : begin + (1 << 20)])), 16, 4096
        )
    return result


# --- text -----------------------------------------------------------------------------------------


def text(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    stream_sides.write_all(folder, count)
    child("benchmarks.streaming", "--child", "litdata", str(folder), str(count))
    total = sum(len(tokens) for tokens, _ in stream_sides.samples(count))
    found: dict[str, dict[str, list[float]]] = {}
    # One way after the other: what a process has forked it shares, and must copy where it writes, for as long as it lives.
    for way, read in (("one_process", read_here), ("two_workers", read_by_workers)):
        for number in range(rounds + 1):  # the first warms the page cache and is not counted
            for side in stream_sides.ONE_PROCESS:
                seconds, samples, tokens = read(side, folder)
                complete = samples > 0.98 * count if side == "ours" else (samples, tokens) == (count, total)
                if not complete:  # ours has whole global batches
                    raise RuntimeError(
                        f"{side}, {way}: {samples} samples of {count}, {tokens} tokens of {total}"
                    )
                if number:
                    figures = found.setdefault(side, {})
                    figures.setdefault(f"{way}_samples_per_s", []).append(samples / seconds)
                    figures.setdefault(f"{way}_tokens_per_s", []).append(tokens / seconds)
    return {
        side: {name: round(statistics.median(values)) for name, values in of.items()}
        for side, of in found.items()
    }


def litdata_here(folder: str, count: str) -> dict[str, float]:
    stream_sides.write_litdata(Path(folder) / "litdata", int(count))
    return {}


def read_here(side: str, folder: Path) -> tuple[float, int, int]:
    begun, samples, tokens, check = time.perf_counter(), 0, 0, 0
    for ids, spans in stream_sides.ONE_PROCESS[side](folder):
        samples += 1
        tokens += len(ids)
        check += int(ids[0]) + int(ids[-1]) + int(spans[0][0])  # what is not touched need not be there
    return time.perf_counter() - begun, samples, tokens


def read_by_workers(side: str, folder: Path) -> tuple[float, int, int]:
    begun, samples, tokens = time.perf_counter(), 0, 0
    for some, length in stream_sides.two_workers(side, folder):
        samples += some
        tokens += length
    return time.perf_counter() - begun, samples, tokens


# --- images ---------------------------------------------------------------------------------------


def images(rounds: int) -> dict[str, float]:
    buffer = io.BytesIO()
    Image.open(PHOTOGRAPH).convert("RGB").resize((1024, 768)).save(buffer, "JPEG", quality=90)
    data, result = buffer.getvalue(), {}
    for name, views in (("base", Views(384, 14)), ("anyres", Views(384, 14, anyres=True))):
        process = processor(views)
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda views=views: views.pixels(data),
            "compat": lambda views=views: views.pixels(data, compat=True),
            "reference": lambda views=views, process=process: reference_pixels(data, views, process),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(10 * rounds):
            for way, prepare in ways.items():
                begun = time.perf_counter()
                prepare()
                times[way].append(1000 * (time.perf_counter() - begun))
        result |= {f"{name}_{way}_ms": round(statistics.median(values), 2) for way, values in times.items()}
    return result


# --- plan -----------------------------------------------------------------------------------------


def plan(folder: Path, count: int) -> dict[str, float]:
    """Make the sidecar here, the plan in a process of its own."""
    data = folder / f"rows-{count}"
    data.mkdir()
    lengths = lengths_of(count)
    stream_sides.write_sidecar(data / SIDECAR, lengths, lengths // 2)
    sizes = [min(25_000, count - begin) for begin in range(0, count, 25_000)]
    shards = [
        {"format": "mds", "version": 2, "compression": None, "zip_data": None, "samples": size,
         "raw_data": {"basename": f"shard.{n}.mds", "bytes": 1, "hashes": {}}}
        for n, size in enumerate(sizes)
    ]  # fmt: skip
    (data / INDEX).write_text(json.dumps({"version": 2, "shards": shards}))
    stream_sides.write_manifest(data, count)
    found = child("benchmarks.plan_cost", str(data))
    (data / SIDECAR).unlink()
    return found


# --- start ----------------------------------------------------------------------------------------


def start(folder: Path, rounds: int, repeat: float) -> dict[str, float]:
    found: dict[str, list[float]] = {"0": [], "50": [], "99": []}
    child("benchmarks.streaming", "--child", "start", str(folder), str(repeat), "0")  # makes the plan
    for _ in range(rounds):
        for percent, seconds in found.items():
            seconds.append(
                child("benchmarks.streaming", "--child", "start", str(folder), str(repeat), percent)[
                    "seconds"
                ]
            )
    return {
        f"at_{percent}_percent_s": round(statistics.median(seconds), 3) for percent, seconds in found.items()
    }


def start_here(folder: str, repeat: str, percent: str) -> dict[str, float]:
    """From settings to the first batch; the interpreter's imports are not counted."""
    begun = time.perf_counter()
    streams = {"text": {"local": f"{folder}/mds", "repeat": float(repeat)}}
    loader = stream_sides.our_loader(Path(folder), streams=streams)
    batches = len(loader) * int(percent) // 100
    state = loader.dataset.state_dict(0, True)
    if batches:
        order = loader.dataset.plan.report.order
        loader.dataset.load_state_dict({**state, "packs": batches * stream_sides.BATCH, "order": order})
    next(iter(loader))
    return {"seconds": time.perf_counter() - begun}


# --- fill -----------------------------------------------------------------------------------------


def fill(count: int) -> dict[str, Any]:
    def stream(name: str, lengths: np.ndarray, **weight: float) -> StreamSamples:
        shards = np.full(len(lengths) // 1000, 1000)
        return StreamSamples(
            name,
            shards,
            lengths,
            lengths // 2,
            np.zeros(len(lengths), np.uint16),
            np.zeros(len(lengths), np.uint8),
            weight,
        )

    def fill_of(streams: list[StreamSamples], length: int) -> float:
        recipes = {s.name: StreamRecipe(dataset="", samples=len(s.lengths), weight=s.weight) for s in streams}
        recipe = Recipe(
            seed=0, packed_length=length, global_batch=8, canonical_nodes=1, window=131072, shuffle=True, continuous="none",
            views=None, streams=recipes,
        )  # fmt: skip
        return build(recipe, streams, 0, None).report.fill

    texts, captions = lengths_of(count), np.clip(lengths_of(count, 1) // 4, 16, 600) + 1790
    mix = [
        stream("text", texts, proportion=0.5),
        stream("pictures", captions.astype(np.uint32), proportion=0.5),
    ]
    swept = {length: round(fill_of(mix, length), 4) for length in SWEEP}
    best = max(swept, key=lambda length: swept[length])
    return {
        "text": round(fill_of([stream("text", texts)], 4096), 5),
        "mix": swept[best],
        "mix_length": best,
        "mix_by_length": swept,
    }


# --- all of it ------------------------------------------------------------------------------------


def child(module: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", module, *arguments]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


def run(short: bool, rounds: int) -> dict[str, Any]:
    rows = [1_000_000] if short else [1_000_000, 10_000_000, 100_000_000]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = show("text", text(folder, 2_000 if short else 60_000, rounds))
        started = show("start", start(folder, rounds, 10 if short else 17))
        prepared = show("images", images(rounds))
        filled = show("fill", fill(100_000 if short else 1_000_000))
        plans = {count: show(f"plan of {count:,}", plan(folder, count)) for count in rows}
    of = {side: figures["one_process_samples_per_s"] for side, figures in texts.items()}
    by_workers = {side: figures["two_workers_samples_per_s"] for side, figures in texts.items()}
    peers = ("webdataset", "litdata")
    figures: dict[str, Any] = {
        "ratio_vs_stock": of["ours"] / of["stock"],
        "ratio_vs_best_peer": of["ours"] / max(of[peer] for peer in peers),
        "ratio_vs_memmap": of["ours"] / of["memmap"],
        "ratio_vs_pickles": of["ours"] / of["pickles"],
        "workers_ratio_vs_stock": by_workers["ours"] / by_workers["stock"],
        "workers_ratio_vs_best_peer": by_workers["ours"] / max(by_workers[peer] for peer in peers),
        "workers_ratio_vs_memmap": by_workers["ours"] / by_workers["memmap"],
        "image_prep_ratio": prepared["anyres_reference_ms"] / prepared["anyres_ours_ms"],
        "image_prep_ratio_base": prepared["base_reference_ms"] / prepared["base_ours_ms"],
        "image_prep_ratio_compat": prepared["anyres_reference_ms"] / prepared["anyres_compat_ms"],
        "resume_ratio": max(started["at_50_percent_s"], started["at_99_percent_s"])
        / started["at_0_percent_s"],
        "fill_text": filled["text"],
        "fill_mix": filled["mix"],
    }
    for count, found in plans.items():
        figures |= {
            f"plan_{count // 1_000_000}m_s": found["seconds"],
            f"plan_{count // 1_000_000}m_gb": found["gb"],
        }
    figures = {name: round(value, 4) for name, value in figures.items()}
    return figures | {
        "short": short,
        "rounds": rounds,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }


def machine() -> str:
    return f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


def show(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    print(f"{name}:")
    for key, value in figures.items():
        print(f"  {key:<12} {value}")
    sys.stdout.flush()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="a minute, for CI: few samples, plans of 1 M only"
    )
    parser.add_argument("--rounds", type=int, help="default 3; 1 with --short")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        part, *rest = arguments.child
        print(json.dumps({"litdata": litdata_here, "start": start_here}[part](*rest)))
        return
    print(json.dumps(run(arguments.short, arguments.rounds or (1 if arguments.short else 3))))


if __name__ == "__main__":
    main()
