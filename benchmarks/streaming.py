"""Measure how fast samples are read, what a plan costs, and how soon a resumed run has its first batch.

    python -m benchmarks.streaming [--short] [--rounds 3]

text       The same 60,000 text samples (1,300 tokens on average), read in random order by our loader, by
           mosaicml-streaming's own iteration, webdataset, LitData, the reference (a pickle for each sample),
           and, as the limit, from a raw memory map. Once to arrays in one process, and once to batches of
           tensors through a DataLoader with two workers (ours packed, the others padded).
images     A 1024 x 768 JPEG to the vision tower's input on one core, against the reference's way.
plan       From the sidecar on disk to a saved plan, 1 M to 100 M samples, in a process of its own.
start      From a process that finds its plan to the first batch, at 0 %, 50 % and 99 % of an epoch of a
           million samples.
fill       The share of the positions in packs that hold tokens: of text in packs of 4,096; and of a mixture
           with pictures of 1,790 tokens, at the best of several lengths.

The readers take turns. Figures are medians over the rounds, ratios are of medians. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import datetime
import functools
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
import numpy.typing as npt
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
PEERS = ("webdataset", "litdata")
SWEEP = (4096, 6144, 8192, 12288, 16384)


def draw_lengths(count: int, seed: int = 0) -> npt.NDArray[np.uint32]:
    """Draw log-normal lengths from 16 to 4,096, a million at a time to save memory."""
    result = np.empty(count, np.uint32)
    for begin in range(0, count, 1 << 20):
        part = result[begin : begin + (1 << 20)]
        part[:] = np.clip(np.random.default_rng([seed, begin]).lognormal(6.0, 0.9, len(part)), 16, 4096)
    return result


# --- text -----------------------------------------------------------------------------------------


def text(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Measure every reader's samples and tokens per second, in one process and with two workers."""
    stream_sides.write_all(folder, count)
    child("benchmarks.streaming", "--child", "litdata", str(folder), str(count))
    total = sum(len(tokens) for tokens, _ in stream_sides.samples(count))
    found: dict[str, dict[str, list[float]]] = {}
    # First all rounds in one process, then all with workers: memory that was shared with a forked process is
    # copied when it is written to, for as long as this process lives.
    for way, read in (("one_process", read_here), ("two_workers", read_by_workers)):
        for number in range(rounds + 1):  # the first warms the page cache and is not counted
            for side in stream_sides.ONE_PROCESS:
                seconds, samples, tokens = read(side, folder)
                # Our loader leaves out what does not fill a global batch.
                complete = samples > 0.98 * count if side == "ours" else (samples, tokens) == (count, total)
                if not complete:
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
    """Write LitData's format, in a child process."""
    stream_sides.write_litdata(Path(folder) / "litdata", int(count))
    return {}


def read_here(side: str, folder: Path) -> tuple[float, int, int]:
    """Read all samples in this process. Returns the seconds, the samples and the tokens."""
    begun, samples, tokens, check = time.perf_counter(), 0, 0, 0
    for ids, spans in stream_sides.ONE_PROCESS[side](folder):
        samples += 1
        tokens += len(ids)
        check += int(ids[0]) + int(ids[-1]) + int(spans[0][0])  # so that lazy arrays are read
    return time.perf_counter() - begun, samples, tokens


def read_by_workers(side: str, folder: Path) -> tuple[float, int, int]:
    """Read all samples through two workers. Returns the seconds, the samples and the tokens."""
    begun, samples, tokens = time.perf_counter(), 0, 0
    for batch_samples, batch_tokens in stream_sides.two_workers(side, folder):
        samples += batch_samples
        tokens += batch_tokens
    return time.perf_counter() - begun, samples, tokens


# --- images ---------------------------------------------------------------------------------------


def images(rounds: int) -> dict[str, float]:
    """Measure the milliseconds to prepare a picture, by our code, ours with `compat`, and the reference's."""
    buffer = io.BytesIO()
    Image.open(PHOTOGRAPH).convert("RGB").resize((1024, 768)).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    result: dict[str, float] = {}
    for name, views in (("base", Views(384, 14)), ("anyres", Views(384, 14, anyres=True))):
        process = processor(views)
        ways: dict[str, Callable[[], Any]] = {
            "ours": functools.partial(views.pixels, data),
            "compat": functools.partial(views.pixels, data, compat=True),
            "reference": functools.partial(reference_pixels, data, views, process),
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
    """Write a sidecar of `count` samples, and measure the plan in a process of its own."""
    data = folder / f"rows-{count}"
    data.mkdir()
    lengths = draw_lengths(count)
    stream_sides.write_sidecar(data / SIDECAR, lengths, lengths // 2)
    sizes = [min(25_000, count - begin) for begin in range(0, count, 25_000)]
    shards = [
        {
            "format": "mds",
            "version": 2,
            "compression": None,
            "zip_data": None,
            "samples": size,
            "raw_data": {"basename": f"shard.{n}.mds", "bytes": 1, "hashes": {}},
        }
        for n, size in enumerate(sizes)
    ]
    (data / INDEX).write_text(json.dumps({"version": 2, "shards": shards}))
    stream_sides.write_manifest(data, count)
    figures = child("benchmarks.plan_cost", str(data))
    (data / SIDECAR).unlink()
    return figures


# --- start ----------------------------------------------------------------------------------------


def start(folder: Path, rounds: int, repeat: float) -> dict[str, float]:
    """Measure the seconds to the first batch at 0 %, 50 % and 99 % of the text repeated `repeat` times."""
    task = ("benchmarks.streaming", "--child", "start", str(folder), str(repeat))
    child(*task, "0")  # makes the plan
    seconds: dict[str, list[float]] = {"0": [], "50": [], "99": []}
    for _ in range(rounds):
        for percent, values in seconds.items():
            values.append(child(*task, percent)["seconds"])
    return {
        f"at_{percent}_percent_s": round(statistics.median(values), 3) for percent, values in seconds.items()
    }


def start_here(folder: str, repeat: str, percent: str) -> dict[str, float]:
    """Measure the seconds from settings to the first batch, in a child process; imports are not counted."""
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
    """Compute the share of filled positions of text, and of a mixture at each length of SWEEP."""
    text_lengths = draw_lengths(count)
    picture_lengths = (np.clip(draw_lengths(count, 1) // 4, 16, 600) + 1790).astype(np.uint32)
    mixture = [
        _stream("text", text_lengths, proportion=0.5),
        _stream("pictures", picture_lengths, proportion=0.5),
    ]
    swept = {length: round(_fill_of(mixture, length), 4) for length in SWEEP}
    best = max(swept, key=lambda length: swept[length])
    return {
        "text": round(_fill_of([_stream("text", text_lengths)], 4096), 5),
        "mix": swept[best],
        "mix_length": best,
        "mix_by_length": swept,
    }


def _stream(name: str, lengths: npt.NDArray[np.uint32], **weight: float) -> StreamSamples:
    """Samples without images, in shards of a thousand."""
    shards = np.full(len(lengths) // 1000, 1000)
    targets = (lengths // 2).astype(np.uint32)
    images, kinds = np.zeros(len(lengths), np.uint16), np.zeros(len(lengths), np.uint8)
    return StreamSamples(name, shards, lengths, targets, images, kinds, weight)


def _fill_of(streams: list[StreamSamples], length: int) -> float:
    recipe = Recipe(
        seed=0,
        packed_length=length,
        global_batch=8,
        canonical_nodes=1,
        window=131072,
        shuffle=True,
        continuous="none",
        views=None,
        streams={s.name: StreamRecipe(dataset="", samples=len(s.lengths), weight=s.weight) for s in streams},
    )
    return build(recipe, streams, 0, None).report.fill


# --- everything ------------------------------------------------------------------------------------


def child(module: str, *arguments: str) -> dict[str, float]:
    """Run a module in a process of its own, and parse the last line that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


def run(short: bool, rounds: int) -> dict[str, Any]:
    """Run all parts, and collect the figures of the last line."""
    rows = [1_000_000] if short else [1_000_000, 10_000_000, 100_000_000]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = show("text", text(folder, 2_000 if short else 60_000, rounds))
        started = show("start", start(folder, rounds, 10 if short else 17))
        prepared = show("images", images(rounds))
        filled = show("fill", fill(100_000 if short else 1_000_000))
        plans = {count: show(f"plan of {count:,}", plan(folder, count)) for count in rows}
    resumed = max(started["at_50_percent_s"], started["at_99_percent_s"])
    figures: dict[str, float] = {
        **text_ratios(texts),
        "image_prep_ratio": prepared["anyres_reference_ms"] / prepared["anyres_ours_ms"],
        "image_prep_ratio_base": prepared["base_reference_ms"] / prepared["base_ours_ms"],
        "image_prep_ratio_compat": prepared["anyres_reference_ms"] / prepared["anyres_compat_ms"],
        "resume_ratio": resumed / started["at_0_percent_s"],
        "fill_text": filled["text"],
        "fill_mix": filled["mix"],
    }
    for count, costs in plans.items():
        millions = count // 1_000_000
        figures |= {f"plan_{millions}m_s": costs["seconds"], f"plan_{millions}m_gb": costs["gb"]}
    return {
        **{name: round(value, 4) for name, value in figures.items()},
        "short": short,
        "rounds": rounds,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }


def text_ratios(texts: dict[str, Any]) -> dict[str, float]:
    """Divide our samples per second by the others', in one process and with two workers."""
    one_process = {side: figures["one_process_samples_per_s"] for side, figures in texts.items()}
    two_workers = {side: figures["two_workers_samples_per_s"] for side, figures in texts.items()}
    return {
        "ratio_vs_stock": one_process["ours"] / one_process["stock"],
        "ratio_vs_best_peer": one_process["ours"] / max(one_process[peer] for peer in PEERS),
        "ratio_vs_memmap": one_process["ours"] / one_process["memmap"],
        "ratio_vs_pickles": one_process["ours"] / one_process["pickles"],
        "workers_ratio_vs_stock": two_workers["ours"] / two_workers["stock"],
        "workers_ratio_vs_best_peer": two_workers["ours"] / max(two_workers[peer] for peer in PEERS),
        "workers_ratio_vs_memmap": two_workers["ours"] / two_workers["memmap"],
    }


def machine() -> str:
    """Name what the figures depend on."""
    python, cpus = platform.python_version(), os.cpu_count()
    return f"{cpus} CPUs, {platform.machine()}, Python {python}, torch {torch.__version__}"


def show(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Print the figures of a part as soon as they are measured."""
    print(f"{name}:")
    for key, value in figures.items():
        print(f"  {key:<12} {value}")
    sys.stdout.flush()
    return figures


def main() -> None:
    """Parse the command line, and run the benchmark or one of its children."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="a minute, for CI: few samples, a plan of 1 M only"
    )
    parser.add_argument("--rounds", type=int, help="default 3; 1 with --short")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        task, *rest = arguments.child
        children: dict[str, Callable[..., dict[str, float]]] = {"litdata": litdata_here, "start": start_here}
        print(json.dumps(children[task](*rest)))
        return
    print(json.dumps(run(arguments.short, arguments.rounds or (1 if arguments.short else 3))))


if __name__ == "__main__":
    main()
