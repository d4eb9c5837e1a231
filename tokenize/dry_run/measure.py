"""Items through the whole pipeline into a folder that is removed, with the time of each stage."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.dry_run.taken_items import TakenItems
from unitoken.tokenize.job import Chunk, Job, JobFile
from unitoken.tokenize.output import Output
from unitoken.tokenize.pipeline.item import Item, Rejects, SourceItem
from unitoken.tokenize.pipeline.timing import Times
from unitoken.tokenize.pipeline.tokenizer import Tokenizer
from unitoken.tokenize.pipeline.worker import on_one_thread, write_chunks
from unitoken.tokenize.prepare import begin_job

WARM_UP = 4  # items
"""They come before those that are measured: the first ones load libraries and wake the GPU."""


class Measured(NamedTuple):
    """What became of the items, and how long it took.

    Attributes:
        times: of one worker.
        chunk_seconds: what a chunk takes to write besides its items.
        rejects: the lines of the rejects.
        samples: how many items became samples.
        tokens: of all samples.
        target_tokens: how many of them are trained on.
        bytes: of the files that were written.
        chunk_bytes: of those of a chunk without items.
        gpus: of this machine; 0 without.
        threads: that open pictures in each worker.
    """

    times: Times
    chunk_seconds: float
    rejects: list[dict[str, Any]]
    samples: int
    tokens: int
    target_tokens: int
    bytes: int
    chunk_bytes: int
    gpus: int
    threads: int

    @property
    def items(self) -> int:
        """How many items were measured."""
        return self.samples + len(self.rejects)


class _SampleTokenizer(Tokenizer):
    """Reads given items in place of the input's."""

    def __init__(self, job: Job, device: str, items: Mapping[str, Sequence[SourceItem]]) -> None:
        super().__init__(job, device)
        self._items = items
        self.rejects: dict[str, Rejects] = {}

    def conversations(self, chunk: Chunk, rejects: Rejects) -> Iterator[Item]:
        self.rejects[chunk.name] = rejects
        return self.parsed(self._items[chunk.name], rejects)


def measure(
    config: TokenizeConfig, file: JobFile, vocabulary: Vocabulary, sample: TakenItems, count: int
) -> Measured:
    """Tokenize the items of a sample.

    Args:
        config: the settings.
        file: what the bytes of the dataset depend on.
        vocabulary: the id space of the tokens.
        sample: `count` items, and if the input has so many `WARM_UP` more.
        count: how many items to measure.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    items = {"warm-up": sample.items[-WARM_UP:], "empty": [], "measured": sample.items[:count]}
    with tempfile.TemporaryDirectory() as folder, on_one_thread(device):
        job = begin_job(Output(f"{folder}/dataset"), file, sample.input, vocabulary, config)
        tokenizer = _SampleTokenizer(job, device, items)
        times = {name: _write(tokenizer, name) for name in items}
        written = Path(job.out, "measured")
        tokens = _sums(written / SIDECAR, "tokens", "target_tokens")
        rejects = tokenizer.rejects["measured"].lines
        return Measured(
            times=times["measured"],
            chunk_seconds=times["empty"].write,
            rejects=rejects,
            samples=len(items["measured"]) - len(rejects),
            tokens=tokens[0],
            target_tokens=tokens[1],
            bytes=_bytes_in(written),
            chunk_bytes=_bytes_in(Path(job.out, "empty")),
            gpus=torch.cuda.device_count() if device == "cuda" else 0,
            threads=tokenizer.threads,
        )


def _write(tokenizer: Tokenizer, name: str) -> Times:
    return write_chunks(tokenizer, [Chunk(name, ())], lambda *_: None)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _sums(sidecar: Path, *columns: str) -> list[int]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(sidecar, columns=list(columns))
    return [int(sum(table[column].to_pylist())) for column in columns]


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))
