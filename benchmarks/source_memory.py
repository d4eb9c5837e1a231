"""What an input of 10 million items costs: seconds to cut it, memory of a worker, seconds until it has its first item.

    python benchmarks/source_memory.py [--items 10000000] [--folder /tmp]

Writes text items into a temporary folder (about 1.6 GB for 10 million) and removes it. Each figure is taken in a process
of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK_SIZE = 1000
LIST_SHARE = 10  # the JSON list holds this part of the items

# The kernel's, of this program alone: getrusage() passes on the peak of the process that started it.
PEAK = """
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) / 1024
"""
CUT = f"""{PEAK}
import sys, time
from pathlib import Path
from unitoken.tokenize.sources.reader import cut, find_files
start = time.perf_counter()
source = cut(find_files([sys.argv[1]]), int(sys.argv[3]))
seconds = time.perf_counter() - start
Path(sys.argv[2]).write_text(source.model_dump_json())
print(seconds, peak())
"""

READ = f"""{PEAK}
import sys, time
{{imports}}
from unitoken.tokenize.sources.reader import Input, read
base = peak()
start = time.perf_counter()
source = Input.model_validate_json(open(sys.argv[1], "rb").read())
items = read(source, len(source.pieces) // 2)
next(items)
seconds = time.perf_counter() - start
assert sum(1 for _ in items) == int(sys.argv[2]) - 1
print(seconds, peak(), peak() - base)
"""
WORKER_IMPORTS = "import unitoken.tokenize.pipeline.worker"


def write_items(path: Path, items: int) -> None:
    """Conversations of text, about 160 bytes each."""
    is_list = path.suffix == ".json"
    with open(path, "w", encoding="utf-8") as file:
        file.write("[" if is_list else "")
        for n in range(items):
            question = {
                "from": "human",
                "value": f"How many sheep are in field {n}, and how many of them sleep?",
            }
            item = {
                "conversations": [
                    question,
                    {"from": "gpt", "value": f"There are {n * 7} sheep, {n % 7} of them asleep."},
                ]
            }
            file.write(("," if is_list and n else "") + json.dumps(item) + "\n")
        file.write("]" if is_list else "")


def figures(program: str, *arguments: object) -> list[float]:
    """What a process of its own prints, and in front of it the seconds from its start to its end."""
    start = time.perf_counter()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return [time.perf_counter() - start, *map(float, output)]


def measure(items: int, folder: str | None = None) -> dict[str, float]:
    """`source_10m_*` of a JSONL file with so many items, `list_*` of a JSON list with a tenth of them."""
    results: dict[str, float] = {"source_items": items}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for prefix, suffix, count in (
            ("source_10m", "jsonl", items),
            ("list", "json", max(CHUNK_SIZE, items // LIST_SHARE)),
        ):
            path, stored = Path(temporary, f"items.{suffix}"), Path(temporary, f"{suffix}-input.json")
            write_items(path, count)
            _, cut_seconds, cut_peak = figures(CUT, path, stored, CHUNK_SIZE)
            first = figures(READ.replace("{imports}", ""), stored, CHUNK_SIZE)
            worker = figures(READ.replace("{imports}", WORKER_IMPORTS), stored, CHUNK_SIZE)
            results |= {
                f"{prefix}_cut_s": cut_seconds,
                f"{prefix}_cut_peak_mb": cut_peak,
                f"{prefix}_first_chunk_s": first[
                    0
                ],  # a whole process: start, imports, the input's list of pieces, a chunk
                f"{prefix}_first_item_s": first[1],  # of them from the list of pieces to the first item
                f"{prefix}_peak_mb": first[2],
                f"{prefix}_above_base_mb": first[3],
                f"{prefix}_worker_peak_mb": worker[2],  # with torch and all else that a worker imports
                f"{prefix}_worker_above_base_mb": worker[3],
            }
            path.unlink()
    return {key: round(value, 2) for key, value in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--folder", help="where there is room for the temporary folder")
    arguments = parser.parse_args()
    results = measure(arguments.items, arguments.folder)
    for key, value in results.items():
        print(f"{key:32} {value:14,.2f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
