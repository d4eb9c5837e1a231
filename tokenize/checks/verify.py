"""Check that a dataset is what its manifest says. Every byte is read, or with `sample` a share of the shards.

The manifest has the hashes of the root's small files, and the root's index those of the shards; both are
compared with what they were made from (verify_chunks.py), and every sample is decoded and checked against the
rules (verify_records.py). Nothing is changed. A dataset in a bucket is read shard by shard, some ahead.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from unitoken.common.cli import notify, report
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import INDEX, MANIFEST, REJECTS, SIDECAR, VOCABULARY, Manifest, read_manifest
from unitoken.dataset.record import Record, columns
from unitoken.dataset.sidecar import samples_schema
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, Store, StoreError
from unitoken.tokenize.checks.verify_chunks import (
    IndexEntry,
    RootSidecar,
    chunk_of,
    compare_chunks,
    read_root_index,
)
from unitoken.tokenize.checks.verify_records import Rules, check_sample
from unitoken.tokenize.job import INPUT, JOB, Work, dump_json, load_job, load_work, round_name

SHARDS_AHEAD = 3  # in memory besides the shard that is checked; each has 64 MiB
LISTED_PROBLEMS = 10  # of one shard; the rest are counted
PROGRESS_SECONDS = 10.0


def verify(out: str, sample: float = 1.0, listed_problems: int = LISTED_PROBLEMS) -> list[str]:
    """Check a dataset, and print progress and a summary.

    Args:
        out: path or URL of the dataset.
        sample: the share of the shards, and of the chunks' own files, that is read; the root's small files
            are always read.
        listed_problems: the most problems of one shard that are listed; the rest are counted.

    Returns:
        Everything that is wrong, one line each.

    Raises:
        ConfigError: `out` is no finished dataset.
        StoreError: it can not be read.
    """
    store = open_store(out)
    manifest = read_manifest(store)
    work = load_work(store)
    problems = list(_check_root_files(store, manifest, work))
    if problems:
        report(f"{out}: the shards were not checked, because the files with their hashes are wrong already")
        return problems
    try:
        entries = read_root_index(store)
    except ConfigError as error:
        return [str(error)]
    chosen = choose_shards(len(entries), sample)
    chunks = None if sample == 1 else {chunk_of(entries[number]) for number in chosen}
    problems += _check_counts(store, manifest, work, entries)
    problems += compare_chunks(store, work, entries, chunks)
    rules = Rules.of(manifest, _load_vocabulary(store))
    problems += _check_shards(store, rules, entries, chosen, listed_problems)
    size = sum(entries[number]["raw_data"]["bytes"] for number in chosen)
    result = f"{len(problems)} problems" if problems else "nothing is wrong"
    report(
        f"{out}: {manifest.samples:,} samples; {len(chosen):,} of {len(entries):,} shards read, "
        f"{size:,} bytes: {result}"
    )
    return problems


def choose_shards(shards: int, sample: float) -> list[int]:
    """Choose a share of the shards: evenly spaced, the same each time, at least one.

    Args:
        shards: how many there are.
        sample: the share, from 0 to 1.
    """
    chosen = [number for number in range(shards) if int((number + 1) * sample) > int(number * sample)]
    return chosen or list(range(shards))[:1]


# --- the root's files ---


def _check_root_files(store: Store, manifest: Manifest, work: Work) -> Iterator[str]:
    """Compare the root's files with their canonical form, the manifest's hashes and the job."""
    job = load_job(store)
    canonical = {MANIFEST: manifest.dump(), JOB: dump_json(job), INPUT: dump_json(work.input)}
    canonical |= {round_name(number): dump_json(retry) for number, retry in enumerate(work.rounds, 1)}
    for name, data in canonical.items():
        if store.read(name) != data:
            yield f"{name}: was changed by hand"
    yield from _check_hashes(store, manifest)
    stated = manifest.model_dump()
    for name, value in job.manifest_fields().items():
        if stated[name] != value:
            yield f"{MANIFEST}: {name} is {stated[name]!r}, {JOB} has {value!r}"
    if work.input.fingerprint != manifest.source:
        yield f"{INPUT}: its fingerprint is {work.input.fingerprint}, {MANIFEST} has {manifest.source}"
    chunks = len(work.chunks())
    if chunks != manifest.chunks:
        unfinished = work.rounds and chunks > manifest.chunks
        hint = ": a retry was begun and did not end, run it again" if unfinished else ""
        yield f"{MANIFEST}: {manifest.chunks} chunks, {INPUT} and the rounds of retries make {chunks}{hint}"


def _check_hashes(store: Store, manifest: Manifest) -> Iterator[str]:
    for name in sorted({INDEX, SIDECAR, REJECTS, VOCABULARY} | set(manifest.files)):
        try:
            with store.open(name) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except MissingError:
            found = "missing"
        if found != manifest.files.get(name):
            yield f"{name}: its sha256 is {found}, {MANIFEST} has {manifest.files.get(name)}"
        elif name == VOCABULARY:
            fingerprint = _load_vocabulary(store).fingerprint
            if fingerprint != manifest.vocabulary:
                yield f"{name}: its fingerprint is {fingerprint}, {MANIFEST} has {manifest.vocabulary}"


def _check_counts(
    store: Store, manifest: Manifest, work: Work, entries: Sequence[IndexEntry]
) -> Iterator[str]:
    """Count again what the manifest counts."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    summed = ["tokens", "target_tokens", "images"]
    counts = Counter(dict.fromkeys(["samples", "rejected", *summed], 0))
    counts["samples"] = sum(entry["samples"] for entry in entries)
    with store.open(SIDECAR) as file:
        sidecar = pq.ParquetFile(file)
        found, expected = sidecar.schema_arrow, samples_schema()
        if found != expected:
            yield f"{SIDECAR}: its columns are {found.names}, expected {expected.names}"
            return
        if sidecar.metadata.num_rows != counts["samples"]:
            yield f"{SIDECAR}: {sidecar.metadata.num_rows} rows for {counts['samples']} samples in {INDEX}"
        for batch in sidecar.iter_batches(columns=summed):
            for name in summed:
                counts[name] += pc.sum(batch[name], min_count=0).as_py()
    with store.open(REJECTS) as rejects:
        counts["rejected"] = sum(1 for _ in rejects)
    if work.input.items is not None:
        counts["items"] = work.input.items
    for name, count in counts.items():
        stated = getattr(manifest, name)
        if stated != count:
            yield f"{MANIFEST}: {name} is {stated}, counted {count}"


def _load_vocabulary(store: Store) -> Vocabulary:
    return Vocabulary.parse(store.read(VOCABULARY), f"{store.url}/{VOCABULARY}")


# --- the shards ---


@dataclass(frozen=True)
class _Shard:
    number: int  # in the root's index
    data: bytes
    problem: str | None  # why the bytes are not those of the index; there are none then


def _check_shards(
    store: Store, rules: Rules, entries: Sequence[IndexEntry], chosen: Sequence[int], listed_problems: int
) -> Iterator[str]:
    """Decode the chosen shards and check their samples."""
    ends = np.cumsum([entry["samples"] for entry in entries])  # (shards,): the first sample after each
    last_notice = time.monotonic()
    with RootSidecar(store) as sidecar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings of large pictures
        for done, shard in enumerate(_read_shards(store, entries, chosen), 1):
            entry, end = entries[shard.number], int(ends[shard.number])
            name = entry["raw_data"]["basename"]
            if shard.problem is not None:
                yield f"{name}: {shard.problem}"
                continue
            rows = sidecar.rows(end - entry["samples"], end).to_pylist()
            problems = list(_check_samples(entry, shard.data, rows, rules))
            yield from (f"{name}: {problem}" for problem in problems[:listed_problems])
            if len(problems) > listed_problems:
                yield f"{name}: and {len(problems) - listed_problems} more"
            if time.monotonic() - last_notice > PROGRESS_SECONDS:
                last_notice = time.monotonic()
                notify(f"verify: {done:,} of {len(chosen):,} shards")


def _read_shards(store: Store, entries: Sequence[IndexEntry], chosen: Sequence[int]) -> Iterator[_Shard]:
    """Yield the chosen shards in order; some are read ahead."""
    waiting: deque[Future[_Shard]] = deque()
    with ThreadPoolExecutor(SHARDS_AHEAD) as pool:
        for number in chosen:
            waiting.append(pool.submit(_read_shard, store, number, entries[number]["raw_data"]))
            if len(waiting) > SHARDS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_shard(store: Store, number: int, file: dict[str, Any]) -> _Shard:
    try:
        data = store.read(file["basename"])
    except StoreError as error:
        return _Shard(number, b"", str(error))
    found = {"bytes": len(data), "sha1": hashlib.sha1(data, usedforsecurity=False).hexdigest()}
    expected = {"bytes": file["bytes"], "sha1": file["hashes"].get("sha1")}
    if found != expected:
        return _Shard(number, b"", f"{found}, {INDEX} has {expected}")
    return _Shard(number, data, None)


def _check_samples(
    entry: IndexEntry, data: bytes, rows: Sequence[dict[str, Any]], rules: Rules
) -> Iterator[str]:
    """Check the samples of a shard. Streaming's own reader decodes them.

    The columns are checked first: pickled columns would run code.
    """
    from streaming.base.format import reader_from_json

    expected = columns(rules.vocabulary.size)
    found = dict(zip(entry["column_names"], entry["column_encodings"], strict=False))
    if found != expected or any(entry["column_sizes"]):
        yield f"its columns are {found}, expected {expected}"
        return
    reader = reader_from_json(".", None, entry)
    count = int(np.frombuffer(data, "<u4", 1)[0])
    offsets = np.frombuffer(data[: 4 * (count + 2)], "<u4", offset=4).tolist()  # (count + 1,)
    if count != len(rows) or offsets != sorted(offsets) or offsets[-1] != len(data):
        yield f"{count} samples up to byte {offsets[-1]}, expected {len(rows)} up to {len(data)}"
        return
    for number, row in enumerate(rows):
        sample = data[offsets[number] : offsets[number + 1]]
        try:
            problems = list(check_sample(Record.from_mds(reader.decode_sample(sample)), row, rules))
        except Exception as error:  # a wrong byte leads to errors of all kinds in numpy and streaming
            problems = [f"cannot be decoded: {error!r}"]
        yield from (f"sample {number} ({row['id']!r}): {problem}" for problem in problems)
