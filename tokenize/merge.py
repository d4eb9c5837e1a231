"""Chunks -> one dataset: an index over all shards, sidecars and rejects joined, the manifest last.

This replaces streaming's `merge_index`, which fails when it is run twice, orders folders as text and checks
nothing. A second merge gives the same bytes. Shards are not read, so a dataset in a bucket can be merged from
anywhere.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.manifest import (
    INDEX,
    LEFT_OUT,
    MANIFEST,
    REJECTS,
    SIDECAR,
    VOCABULARY,
    Manifest,
    read_manifest,
)
from unitoken.dataset.mds_index import dump_index
from unitoken.dataset.sidecar import samples_schema
from unitoken.storage.store import Store
from unitoken.tokenize.finished_chunks import counts_in_dataset, map_in_threads, read_finished_chunk
from unitoken.tokenize.job import Work, load_job, load_work
from unitoken.tokenize.output import Output

NAMED_CHUNKS = 8  # in an error
SUMMED = ("tokens", "target_tokens", "images")  # columns of the sidecar that the manifest has sums of


class UnfinishedError(Exception):
    """Chunks are missing; the message names them."""


def merge(out: str) -> Manifest:
    """Finish the dataset in the folder or bucket `out`. If it is finished already, return its manifest.

    Raises:
        UnfinishedError: chunks are missing.
        ConfigError: `out` is no folder of ours, or a chunk in it is broken.
    """
    output = Output(out)
    job = load_job(output.store)
    output.remove_abandoned()
    work = load_work(output.store)
    chunks = work.chunks()
    if output.exists(MANIFEST):
        manifest = read_manifest(output.store)
        if manifest.chunks == len(chunks):  # else a round of retries was begun since
            return manifest
    sizes = output.store.sizes()
    missing = [chunk.name for chunk in chunks if f"{chunk.name}/{INDEX}" not in sizes]
    if missing:
        raise UnfinishedError(
            f"{out}: missing {len(missing)} of {len(chunks)} chunks: {_list_names(missing)}. "
            "Give the same `run` command again (with --rank: for the ranks that did not end)"
        )

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counts = join_chunks(output.store, work, sizes, folder)
        hashes = {name: sha256_of_file(folder / name) for name in (INDEX, SIDECAR, REJECTS)}
        output.store.delete(MANIFEST)
        for name in hashes:
            output.store.upload(folder / name, name)
    hashes[VOCABULARY] = hashlib.sha256(output.store.read(VOCABULARY)).hexdigest()
    manifest = Manifest(
        **(job.manifest_fields() | counts),
        items=counts["samples"] + counts["rejected"],
        chunks=len(chunks),
        files=hashes,
    )
    output.store.write(MANIFEST, manifest.dump())
    return manifest


def join_chunks(store: Store, work: Work, sizes: dict[str, int], folder: Path) -> dict[str, int]:
    """Write the dataset's index, sidecar (a row group for each chunk) and rejects into a local folder.

    Args:
        store: the dataset.
        work: the run's input and rounds.
        sizes: bytes of all files in the dataset, by name.
        folder: where to write.

    Returns:
        The dataset's counts, by their names in the manifest.
    """
    import pyarrow.parquet as pq

    counts = Counter(dict.fromkeys(("samples", *SUMMED, "rejected"), 0))
    shards: list[dict[str, Any]] = []
    last_rounds = work.last_rounds()
    with (
        pq.ParquetWriter(folder / SIDECAR, samples_schema(), compression="zstd") as sidecar,
        open(folder / REJECTS, "wb") as rejects,
    ):
        for part in map_in_threads(
            lambda chunk: read_finished_chunk(store, work, chunk, sizes), work.chunks()
        ):
            shards += part.shards
            sidecar.write_table(part.samples)
            counts.update(_sums(part.samples))
            counts[LEFT_OUT] += part.turns_left_out
            for line in part.rejects:
                if not work.rounds or counts_in_dataset(line, part.chunk, last_rounds):
                    rejects.write(line)
                    counts["rejected"] += 1
    (folder / INDEX).write_bytes(dump_index(shards) + b"\n")
    return dict(counts)


def _sums(samples: Any) -> dict[str, int]:
    import pyarrow.compute as pc

    sums = {name: pc.sum(samples[name], min_count=0).as_py() for name in SUMMED}
    return {"samples": samples.num_rows, **sums}


def _list_names(names: list[str]) -> str:
    last = f", ... {names[-1]}" if len(names) > NAMED_CHUNKS else ""
    return ", ".join(names[:NAMED_CHUNKS]) + last
