"""Measure an input of 10 million items: the time to cut it, a worker's memory and its time to the first item.

    python benchmarks/source_memory.py [--items 10000000] [--folder /tmp]

Writes text items into a temporary folder (about 1.6 GB for 10 million) and removes it. Each figure is
measured in a process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHUNK_SIZE = 1000
LIST_SHARE = 10  # the JSON list holds a tenth of the items


def peak_bytes() -> int:
    """Read the peak memory of this process alone; getrusage() would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _peak_mb() -> float:
    return peak_bytes() / 2**20


# --- in processes of their own ---------------------------------------------------------------------


def cut_here(items: str, pieces: str) -> list[float]:
    """Cut a file of items and store the list of pieces. Returns the seconds and the peak memory in MB."""
    from unitoken.tokenize.sources.reader import cut, find_files

    start = time.perf_counter()
    source = cut(find_files([items]), CHUNK_SIZE)
    seconds = time.perf_counter() - start
    Path(pieces).write_text(source.model_dump_json())
    return [seconds, _peak_mb()]


def read_here(pieces: str) -> list[float]:
    """Read a chunk from the middle.

    Returns:
        The seconds to its first item, the peak memory in MB, and what of it came after the imports.
    """
    from unitoken.tokenize.sources.reader import Input, read_piece

    before = _peak_mb()
    start = time.perf_counter()
    source = Input.model_validate_json(Path(pieces).read_bytes())
    items = read_piece(source, len(source.pieces) // 2)
    next(items)
    seconds = time.perf_counter() - start
    if sum(1 for _ in items) != CHUNK_SIZE - 1:
        raise RuntimeError("the chunk does not have the items that it should")
    peak = _peak_mb()
    return [seconds, peak, peak - before]


def read_as_worker_here(pieces: str) -> list[float]:
    """Do the same with torch and everything else that a worker imports."""
    import unitoken.tokenize.pipeline.worker  # noqa: F401

    return read_here(pieces)


CHILDREN: dict[str, Callable[..., list[float]]] = {
    "cut": cut_here,
    "read": read_here,
    "worker": read_as_worker_here,
}


# --- in the benchmark's process --------------------------------------------------------------------


def write_items(path: Path, items: int) -> None:
    """Write conversations of text, about 160 bytes each, as a JSON list or as lines."""
    is_list = path.suffix == ".json"
    with open(path, "w", encoding="utf-8") as file:
        file.write("[" if is_list else "")
        for n in range(items):
            question = f"How many sheep are in field {n}, and how many of them sleep?"
            answer = f"There are {n * 7} sheep, {n % 7} of them asleep."
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(("," if is_list and n else "") + json.dumps({"conversations": turns}) + "\n")
        file.write("]" if is_list else "")


def child(task: str, *arguments: object) -> list[float]:
    """Run one of CHILDREN. Returns the seconds from the process's start to its end, and its figures."""
    start = time.perf_counter()
    # Not by the file's path: then benchmarks/streaming.py would take the place of the package `streaming`.
    command = [sys.executable, "-m", "benchmarks.source_memory", "--child", task, *map(str, arguments)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [time.perf_counter() - start, *json.loads(output)]


def measure(items: int, folder: str | None = None) -> dict[str, float]:
    """Measure a JSONL file of `items` items (`source_10m_*`) and a JSON list of a tenth of it (`list_*`)."""
    results: dict[str, float] = {"source_items": items}
    inputs = (("source_10m", "jsonl", items), ("list", "json", max(CHUNK_SIZE, items // LIST_SHARE)))
    with tempfile.TemporaryDirectory(dir=Path(folder).absolute() if folder else None) as temporary:
        for prefix, suffix, count in inputs:
            path, pieces = Path(temporary, f"items.{suffix}"), Path(temporary, f"{suffix}-input.json")
            write_items(path, count)
            _, cut_seconds, cut_peak = child("cut", path, pieces)
            chunk_seconds, first_item_seconds, peak, above_base = child("read", pieces)
            _, _, worker_peak, worker_above_base = child("worker", pieces)
            figures = {
                "cut_s": cut_seconds,
                "cut_peak_mb": cut_peak,
                # A whole process: its start, imports, loading the list of pieces, and reading a chunk.
                "first_chunk_s": chunk_seconds,
                # The part of that from loading the list of pieces to the first item.
                "first_item_s": first_item_seconds,
                "peak_mb": peak,
                "above_base_mb": above_base,
                "worker_peak_mb": worker_peak,
                "worker_above_base_mb": worker_above_base,
            }
            results |= {f"{prefix}_{name}": figure for name, figure in figures.items()}
            path.unlink()
    return {key: round(value, 2) for key, value in results.items()}


def main() -> None:
    """Measure, and print the figures as a table and as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--folder", help="a folder with room for the temporary files")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, *rest = arguments.child
        print(json.dumps(CHILDREN[task](*rest)))
        return
    results = measure(arguments.items, arguments.folder)
    for key, value in results.items():
        print(f"{key:32} {value:14,.2f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
