"""Chunks -> one dataset: the root index over all shards, sidecars and rejects joined, the manifest last.

Own, because streaming's `merge_index` fails when run twice, orders folders as text and checks nothing. Doing it again
gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.files import aside, remove_abandoned, write_aside
from unitoken.streaming_data.manifest import (
    INDEX,
    MANIFEST,
    REJECTS,
    SIDECAR,
    VOCABULARY,
    Manifest,
    load_manifest,
    samples_schema,
    sha256_file,
)
from unitoken.tokenize.job import load_job, missing_chunks
from unitoken.tokenize.sources import chunk_name

SHARD_NAME = re.compile(r"shard\.\d{5,}\.mds")


class UnfinishedError(Exception):
    """Chunks are missing; the message names them."""


def merge(out: Path) -> Manifest:
    """Finish the dataset in `out`; at once, if it is finished.

    Raises:
        UnfinishedError: chunks are missing.
        ConfigError: `out` is no folder of ours, or a chunk in it is broken.
    """
    job = load_job(out)
    remove_abandoned(out)
    if (out / MANIFEST).exists():
        return load_manifest(out)
    if missing := missing_chunks(out, job.chunks):
        raise UnfinishedError(
            f"{out}: missing {len(missing)} of {job.chunks} chunks: {_names(missing)}. Run the same command again"
        )
    chunks = [out / chunk_name(number) for number in range(job.chunks)]
    shards = [shard for chunk in chunks for shard in _shards(chunk)]
    write_aside(out / INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode() + b"\n")
    counts = _join_samples(chunks, out / SIDECAR)
    rejects = b"".join((chunk / REJECTS).read_bytes() for chunk in chunks)
    write_aside(out / REJECTS, rejects)
    fields = job.model_dump(exclude={"max_reject_fraction"}) | counts
    manifest = Manifest(
        **fields,
        rejected=rejects.count(b"\n"),
        chunks=job.chunks,
        files={name: sha256_file(out / name) for name in (INDEX, SIDECAR, REJECTS, VOCABULARY)},
    )
    manifest.save(out)
    return manifest


def _names(numbers: list[int]) -> str:
    more = f", ... {chunk_name(numbers[-1])}" if len(numbers) > 8 else ""
    return ", ".join(chunk_name(number) for number in numbers[:8]) + more


def _shards(chunk: Path) -> list[dict[str, Any]]:
    """The entries of a chunk's index, their files seen from the root."""
    path = chunk / INDEX
    try:
        shards: list[dict[str, Any]] = json.loads(path.read_bytes())["shards"]
        for shard in shards:
            file = shard["raw_data"]
            # Readers join these names to paths unchecked.
            if not SHARD_NAME.fullmatch(file["basename"]) or shard["zip_data"] is not None:
                raise ConfigError(f"{path}: expected uncompressed shards named shard.NNNNN.mds, found {file['basename']!r}")
            found = (chunk / file["basename"]).stat().st_size
            if found != file["bytes"]:
                raise ConfigError(
                    f"{chunk / file['basename']}: {found} bytes, {INDEX} says {file['bytes']}; remove {chunk} and run again"
                )
            file["basename"] = f"{chunk.name}/{file['basename']}"
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; remove {chunk} and run again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no MDS index: {error!r}; remove {chunk} and run again") from None
    return shards


def _join_samples(chunks: Iterable[Path], path: Path) -> dict[str, int]:
    """One sidecar of all samples, a row group a chunk. Returns the dataset's counts."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts = Counter(samples=0, tokens=0, target_tokens=0, images=0)
    temporary = aside(path)
    try:
        with pq.ParquetWriter(temporary, samples_schema(), compression="zstd") as writer:
            for chunk in chunks:
                table = pq.read_table(chunk / SIDECAR, schema=samples_schema())
                writer.write_table(table)
                counts["samples"] += table.num_rows
                for name in ("tokens", "target_tokens", "images"):
                    counts[name] += pc.sum(table[name], min_count=0).as_py()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return dict(counts)


def summary(out: Path, manifest: Manifest) -> str:
    m = manifest
    lines = [
        f"{out}: {m.items:,} items -> {m.samples:,} samples, {m.rejected:,} rejected; "
        f"{m.tokens:,} tokens ({m.target_tokens:,} trained on), {m.images:,} images"
    ]
    if m.rejected:
        lines.append(f"rejected, by reason (each item in {out / REJECTS}):")
        lines += [f"{count:>8,}  {reason}" for reason, count in commonest(out)]
    if not m.samples:
        lines.append("warning: the dataset has no samples")
    return "\n".join(lines)


def commonest(out: Path, limit: int = 5) -> list[tuple[str, int]]:
    """The kinds of rejects, each with how many there are."""
    with open(out / REJECTS, encoding="utf-8") as file:
        kinds = Counter(json.loads(line)["reason"].partition(": ")[0] for line in file)
    return kinds.most_common(limit)


def too_many_rejects(manifest: Manifest, max_fraction: float) -> str | None:
    """Ten bad items are always forgiven: they say little about the rest."""
    if manifest.rejected < 10 or manifest.rejected <= max_fraction * manifest.items:
        return None
    share = manifest.rejected / manifest.items
    return f"{manifest.rejected} of {manifest.items} items were rejected ({share:.1%}), max_reject_fraction is {max_fraction}"
