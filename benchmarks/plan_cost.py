"""Measure the time, memory and disk that the plan of a dataset takes.

    python -m benchmarks.plan_cost FOLDER

It runs in a process of its own without torch, so that the process's peak memory is the plan's. The last
line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.source_memory import peak_bytes
from unitoken.streaming_data.plan.lengths import read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import open_sources


def cost(folder: Path) -> dict[str, float]:
    """Make the plan of the dataset in `folder`, with packs of 4,096 and batches of 128.

    Returns:
        Seconds, peak memory and disk in GB, and the share of the packs' positions that is filled.
    """
    data = {
        "streams": {"a": {"local": str(folder)}},
        "packed_length": 4096,
        "global_batch": 128,
        "continuous": "none",
    }
    config = DataConfig.model_validate(data)
    begun = time.perf_counter()
    sources = open_sources(config)
    recipe = Recipe.of(config, sources, None)
    made = load_or_build(
        folder / "plans", recipe, 0, lambda: [read_lengths(source, recipe, None) for source in sources]
    )
    seconds = time.perf_counter() - begun
    disk = sum(path.stat().st_size for path in (folder / "plans").rglob("*.npy"))
    return {
        "seconds": round(seconds, 2),
        "gb": round(peak_bytes() / 1e9, 2),
        "disk_gb": round(disk / 1e9, 2),
        "fill": made.report.fill,
    }


if __name__ == "__main__":
    print(json.dumps(cost(Path(sys.argv[1]))))
