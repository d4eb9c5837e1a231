"""Chunks -> one dataset: the root index over all shards, sidecars and rejects joined, the manifest last.

Own, because streaming's `merge_index` fails when run twice, orders folders as text and checks nothing. Doing it again
gives the same bytes. Shards are not read, so a dataset in a bucket is merged from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from unitoken.common.errors import ConfigError
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
from unitoken.storage.store import Store, is_url
from unitoken.tokenize.job import Chunk, Work, load_job, load_work
from unitoken.tokenize.output import Output
from unitoken.tokenize.retry import grouped

SHARD_NAME = re.compile(r"shard\.\d{5,}\.mds")
READERS = 16  # chunks read at once: over a network each takes three requests
A = TypeVar("A")
B = TypeVar("B")


class UnfinishedError(Exception):
    """Chunks are missing; the message names them."""


def merge(out: str) -> Manifest:
    """Finish the dataset in the folder or bucket `out`; at once, if it is finished.

    Raises:
        UnfinishedError: chunks are missing.
        ConfigError: `out` is no folder of ours, or a chunk in it is broken.
    """
    output = Output(out)
    job = load_job(output.store)
    output.remove_abandoned()
    work = load_work(output.store)
    chunks = work.chunks()
    finished = read_manifest(output.store) if output.exists(MANIFEST) else None
    if finished is not None and finished.chunks == len(chunks):  # else a round of retries was begun since
        return finished
    sizes = output.store.sizes()
    if missing := [chunk.name for chunk in chunks if f"{chunk.name}/{INDEX}" not in sizes]:
        raise UnfinishedError(
            f"{out}: missing {len(missing)} of {len(chunks)} chunks: {_names(missing)}. "
            "Give the same `run` command again (with --rank: for the ranks that did not end)"
        )

    with tempfile.TemporaryDirectory() as temporary:
        joined = _join(output.store, work, sizes, Path(temporary))
        files = {name: sha256_of_file(Path(temporary, name)) for name in (INDEX, SIDECAR, REJECTS)}
        output.store.delete(MANIFEST)
        for name in files:
            output.store.upload(Path(temporary, name), name)
    files[VOCABULARY] = hashlib.sha256(output.store.read(VOCABULARY)).hexdigest()
    fields = job.model_dump(exclude={"max_reject_fraction"}) | joined
    manifest = Manifest(
        **fields,
        items=joined["samples"] + joined["rejected"],
        chunks=len(chunks),
        files=files,
    )
    output.store.write(MANIFEST, manifest.dump())
    return manifest


def _names(names: list[str]) -> str:
    more = f", ... {names[-1]}" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


# --- joining ---------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What the merge reads of one chunk."""

    chunk: Chunk
    shards: list[dict[str, Any]]
    samples: Any  # pyarrow.Table
    rejects: list[bytes]  # lines
    turns_left_out: int


@dataclass
class _Counts:
    values: Counter[str] = field(
        default_factory=lambda: Counter(samples=0, tokens=0, target_tokens=0, images=0, rejected=0)
    )

    def add(self, samples: Any) -> None:
        import pyarrow.compute as pc

        self.values["samples"] += samples.num_rows
        for name in ("tokens", "target_tokens", "images"):
            self.values[name] += pc.sum(samples[name], min_count=0).as_py()


def _join(store: Store, work: Work, sizes: dict[str, int], folder: Path) -> dict[str, int]:
    """Write the root's index, sidecar (a row group a chunk) and rejects into `folder`. Returns the dataset's counts."""
    import pyarrow.parquet as pq

    counts = _Counts()
    shards: list[dict[str, Any]] = []
    last_round = work.last_rounds()
    with (
        pq.ParquetWriter(folder / SIDECAR, samples_schema(), compression="zstd") as samples,
        open(folder / REJECTS, "wb") as rejects,
    ):
        for part in in_order(lambda chunk: read_chunk(store, work, chunk, sizes), work.chunks()):
            shards += part.shards
            samples.write_table(part.samples)
            counts.add(part.samples)
            counts.values[LEFT_OUT] += part.turns_left_out
            for line in part.rejects:
                if not work.rounds or is_last(line, part.chunk, last_round):
                    rejects.write(line)
                    counts.values["rejected"] += 1
    (folder / INDEX).write_bytes(dump_index(shards) + b"\n")
    return dict(counts.values)


def is_last(line: bytes, chunk: Chunk, last_round: dict[tuple[int, int], int]) -> bool:
    """Whether the item was not tried again in a later round than the one the line is from."""
    reject = json.loads(line)
    return last_round.get((reject["chunk"], reject["position"]), 0) == chunk.round


def in_order(function: Callable[[A], B], values: Sequence[A]) -> Iterator[B]:
    """`map` over threads, of which no more results wait than there are threads."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(values), READERS):
            yield from pool.map(function, values[start : start + READERS])


def read_chunk(store: Store, work: Work, chunk: Chunk, sizes: dict[str, int]) -> Part:
    """A chunk's index, sidecar and rejects, which agree with each other and with the input. Raises ConfigError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    hint = f"; remove {store.url}/{chunk.name} and run again"
    try:
        shards, turns_left_out = _index(store, chunk.name, sizes)
        samples = pq.read_table(
            pa.BufferReader(store.read(f"{chunk.name}/{SIDECAR}")), schema=samples_schema()
        )
        rejects = store.read(f"{chunk.name}/{REJECTS}").splitlines(keepends=True)
    except (OSError, pa.ArrowException) as error:  # Arrow's own are of both kinds
        raise ConfigError(f"{error}{hint}") from None
    stored = sum(shard["samples"] for shard in shards)
    items = work.items(chunk)
    if samples.num_rows != stored or (items is not None and items != stored + len(rejects)):
        raise ConfigError(
            f"{store.url}/{chunk.name}: {stored} samples in the shards, {samples.num_rows} in {SIDECAR}, {len(rejects)} rejects, "
            f"of {'an unknown number of' if items is None else items} items{hint}"
        )
    return Part(chunk, shards, samples, rejects, turns_left_out)


def _index(store: Store, chunk: str, sizes: dict[str, int]) -> tuple[list[dict[str, Any]], int]:
    """The entries of a chunk's index, their files seen from the root; and how many turns were left out."""
    where = f"{store.url}/{chunk}/{INDEX}"
    hint = f"; remove {store.url}/{chunk} and run again"
    try:
        index = json.loads(store.read(f"{chunk}/{INDEX}"))
        shards: list[dict[str, Any]] = index["shards"]
        left_out = int(index.get(LEFT_OUT, 0))
        for shard in shards:
            file, _ = shard["raw_data"], int(shard["samples"])
            # Readers join these names to paths unchecked.
            if not SHARD_NAME.fullmatch(file["basename"]) or shard["zip_data"] is not None:
                raise ConfigError(
                    f"{where}: expected uncompressed shards named shard.NNNNN.mds, found {file['basename']!r}"
                )
            file["basename"] = name = f"{chunk}/{file['basename']}"
            if (found := sizes.get(name)) != file["bytes"]:
                what = "not there" if found is None else f"{found} bytes"
                raise ConfigError(f"{store.url}/{name}: {what}, {INDEX} says {file['bytes']} bytes{hint}")
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: no MDS index: {error!r}{hint}") from None
    return shards, left_out


# --- what to say of it -----------------------------------------------------------------------------------------------


def summary(out: str, manifest: Manifest) -> str:
    m = manifest
    lines = [
        f"{out}: {m.items:,} items -> {m.samples:,} samples, {m.rejected:,} rejected; "
        f"{m.tokens:,} tokens ({m.target_tokens:,} trained on), {m.images:,} images"
    ]
    if m.turns_left_out:
        lines.append(
            f"{m.turns_left_out:,} conversations begin with the assistant and lost that turn, as in LLaVA's loader"
        )
    if m.rejected:
        lines.append(f"rejected, by reason (see `python -m unitoken.tokenize rejects {out}`):")
        lines += [f"{count:>8,}  {kind}" for kind, count, _ in grouped(out)[:5]]
    if m.samples:
        where = f"{{remote: {out}}}" if is_url(out) else f"{{local: {out}}}"
        lines.append(
            f"next: python -m unitoken.tokenize preview {out}; in a stage's YAML: data.streams: {{NAME: {where}}}"
        )
    return "\n".join(lines)


def problems(out: str, manifest: Manifest, max_reject_fraction: float) -> list[str]:
    """Why the command that made a finished dataset still ends with status 1, a line each."""
    found = []
    if cut := sum(count for kind, count, _ in grouped(out) if kind == "input cut"):
        found.append(
            f"{cut} input file{'s end' if cut > 1 else ' ends'} in the middle of an item; see 'input cut' in {REJECTS}"
        )
    if not manifest.samples:
        kinds = grouped(out)
        commonest = (
            f"; the commonest reason, of {kinds[0][1]} items: {kinds[0][0]}: {kinds[0][2]}" if kinds else ""
        )
        found.append(f"{out}: nothing was kept of {manifest.items} items{commonest}")
        return found
    # Ten bad items are always forgiven: they say little about the rest.
    if manifest.rejected >= 10 and manifest.rejected > max_reject_fraction * manifest.items:
        share = f"{manifest.rejected} of {manifest.items} items were rejected ({manifest.rejected / manifest.items:.1%})"
        see = f"`python -m unitoken.tokenize rejects {out}` shows why, and with --retry tries them again"
        found.append(f"{share}, max_reject_fraction is {max_reject_fraction}; {see}")
    return found
