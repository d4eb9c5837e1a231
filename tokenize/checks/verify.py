"""Is a dataset what its manifest says? Every byte is read, or with `sample` a share of the shards.

The manifest's hashes vouch for the root's small files, the root's index for the shards; both are compared with what
they were made from (verify_chunks.py), and every sample is decoded and held against the rules (verify_records.py).
Nothing is changed. A dataset in a bucket is read shard by shard, some ahead.
"""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import INDEX, MANIFEST, REJECTS, SIDECAR, VOCABULARY, Manifest, read_manifest
from unitoken.dataset.record import Record, columns
from unitoken.dataset.sidecar import samples_schema
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, Store, StoreError
from unitoken.tokenize.checks.verify_chunks import Entry, Rows, chunk_of, read_entries, wrong_chunks
from unitoken.tokenize.checks.verify_records import Rules, wrong_with
from unitoken.tokenize.job import INPUT, JOB, Work, dump, load_job, load_work, round_name

AHEAD = 3  # shards in memory besides the one that is looked at; each is 64 MiB
LINES = 10  # of what is wrong in one shard; the rest is counted
PROGRESS_SECONDS = 10.0


def verify(out: str, sample: float = 1.0) -> list[str]:
    """All that is wrong with the dataset, a line each; prints progress and a summary.

    sample: the share of the shards, and of the chunks' own files, that is read; the root's small files always are.

    Raises:
        ConfigError: `out` is no finished dataset.
        StoreError: it can not be read.
    """
    store = open_store(out)
    manifest = read_manifest(store)
    work = load_work(store)
    if found := list(_wrong_files(store, manifest, work)):
        print(f"{out}: the shards were not looked at, as what vouches for them is wrong already")
        return found
    try:
        entries = read_entries(store)
    except ConfigError as error:
        return [str(error)]
    picked = chosen(len(entries), sample)
    found += _wrong_counts(store, manifest, work, entries)
    found += wrong_chunks(
        store, work, entries, None if sample == 1 else {chunk_of(entries[number]) for number in picked}
    )
    found += _wrong_shards(store, Rules.of(manifest, _vocabulary(store)), entries, picked)
    size = sum(entries[number]["raw_data"]["bytes"] for number in picked)
    result = f"{len(found)} lines of what is wrong" if found else "nothing is wrong"
    print(
        f"{out}: {manifest.samples:,} samples; {len(picked):,} of {len(entries):,} shards read, {size:,} bytes: {result}"
    )
    return found


def chosen(shards: int, sample: float) -> list[int]:
    """Which shards stand for all: evenly spaced, the same each time, one at least."""
    picked = [number for number in range(shards) if int((number + 1) * sample) > int(number * sample)]
    return picked or list(range(shards))[:1]


# --- the root's files ------------------------------------------------------------------------------------------------


def _wrong_files(store: Store, manifest: Manifest, work: Work) -> Iterator[str]:
    """The manifest against what it names, and against what the run was to do."""
    job = load_job(store)
    as_written = {MANIFEST: manifest.dump(), JOB: dump(job), INPUT: dump(work.input)}
    as_written |= {round_name(number): dump(retry) for number, retry in enumerate(work.rounds, 1)}
    yield from (
        f"{name}: was changed by hand" for name, data in as_written.items() if store.read(name) != data
    )
    for name in sorted({INDEX, SIDECAR, REJECTS, VOCABULARY} | set(manifest.files)):
        try:
            with store.open(name) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except MissingError:
            found = "missing"
        if found != manifest.files.get(name):
            yield f"{name}: its sha256 is {found}, {MANIFEST} has {manifest.files.get(name)}"
        elif name == VOCABULARY and (fingerprint := _vocabulary(store).fingerprint) != manifest.vocabulary:
            yield f"{name}: its fingerprint is {fingerprint}, {MANIFEST} has {manifest.vocabulary}"
    for name, value in job.model_dump(exclude={"max_reject_fraction"}).items():
        if (stated := manifest.model_dump()[name]) != value:
            yield f"{MANIFEST}: {name} is {stated!r}, {JOB} has {value!r}"
    if work.input.fingerprint != manifest.source:
        yield f"{INPUT}: its fingerprint is {work.input.fingerprint}, {MANIFEST} has {manifest.source}"
    if (chunks := len(work.chunks())) != manifest.chunks:
        hint = (
            ": a retry was begun and did not end, run it again"
            if work.rounds and chunks > manifest.chunks
            else ""
        )
        yield f"{MANIFEST}: {manifest.chunks} chunks, {INPUT} and the rounds of retries make {chunks}{hint}"


def _wrong_counts(store: Store, manifest: Manifest, work: Work, entries: Sequence[Entry]) -> Iterator[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found = Counter(
        samples=sum(entry["samples"] for entry in entries), rejected=0, tokens=0, target_tokens=0, images=0
    )
    summed = ["tokens", "target_tokens", "images"]
    with store.open(SIDECAR) as file:
        sidecar = pq.ParquetFile(file)
        if sidecar.schema_arrow != samples_schema():
            yield f"{SIDECAR}: its columns are {sidecar.schema_arrow.names}, expected {samples_schema().names}"
            return
        if sidecar.metadata.num_rows != found["samples"]:
            yield f"{SIDECAR}: {sidecar.metadata.num_rows} rows for {found['samples']} samples in {INDEX}"
        for batch in sidecar.iter_batches(columns=summed):
            for name in summed:
                found[name] += pc.sum(batch[name], min_count=0).as_py()
    with store.open(REJECTS) as rejects:
        found["rejected"] = sum(1 for _ in rejects)
    if work.input.items is not None:
        found["items"] = work.input.items
    for name, value in found.items():
        if (stated := getattr(manifest, name)) != value:
            yield f"{MANIFEST}: {name} is {stated}, counted {value}"


def _vocabulary(store: Store) -> Vocabulary:
    return Vocabulary.parse(store.read(VOCABULARY), f"{store.url}/{VOCABULARY}")


# --- the shards ------------------------------------------------------------------------------------------------------


def _wrong_shards(
    store: Store, rules: Rules, entries: Sequence[Entry], picked: Sequence[int]
) -> Iterator[str]:
    ends = np.cumsum([entry["samples"] for entry in entries])
    said = time.monotonic()
    with Rows(store) as rows, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large pictures
        for done, (number, data) in enumerate(_loaded(store, entries, picked)):
            name, end = entries[number]["raw_data"]["basename"], int(ends[number])
            if isinstance(data, str):
                yield f"{name}: {data}"
                continue
            table = rows.between(end - entries[number]["samples"], end)
            found = list(_wrong_samples(entries[number], data, table.to_pylist(), rules))
            yield from (f"{name}: {problem}" for problem in found[:LINES])
            if len(found) > LINES:
                yield f"{name}: and {len(found) - LINES} more"
            if time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                print(f"verify: {done + 1:,} of {len(picked):,} shards", file=sys.stderr, flush=True)


def _loaded(
    store: Store, entries: Sequence[Entry], picked: Sequence[int]
) -> Iterator[tuple[int, bytes | str]]:
    """The shards in order, each with its bytes or why they are not what the index says; some are read ahead."""
    waiting: deque[tuple[int, Future[bytes | str]]] = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        for number in picked:
            waiting.append((number, pool.submit(_load, store, entries[number]["raw_data"])))
            if len(waiting) > AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        yield from ((number, future.result()) for number, future in waiting)


def _load(store: Store, file: dict[str, Any]) -> bytes | str:
    try:
        data = store.read(file["basename"])
    except StoreError as error:
        return str(error)
    found = {"bytes": len(data), "sha1": hashlib.sha1(data, usedforsecurity=False).hexdigest()}
    expected = {"bytes": file["bytes"], "sha1": file["hashes"].get("sha1")}
    return data if found == expected else f"{found}, {INDEX} has {expected}"


def _wrong_samples(entry: Entry, data: bytes, rows: Sequence[dict[str, Any]], rules: Rules) -> Iterator[str]:
    """Decode by streaming's own reader, whose columns are checked first: pickled ones would run code."""
    from streaming.base.format import reader_from_json

    expected = columns(rules.vocabulary.size)
    found = dict(zip(entry["column_names"], entry["column_encodings"], strict=False))
    if found != expected or any(entry["column_sizes"]):
        yield f"its columns are {found}, expected {expected}"
        return
    reader = reader_from_json(".", None, entry)
    count = int(np.frombuffer(data, "<u4", 1)[0])
    offsets = np.frombuffer(data[: 4 * (count + 2)], "<u4", offset=4).tolist()
    if count != len(rows) or offsets != sorted(offsets) or offsets[-1] != len(data):
        yield f"{count} samples up to byte {offsets[-1]}, expected {len(rows)} up to {len(data)}"
        return
    for number, row in enumerate(rows):
        sample = data[offsets[number] : offsets[number + 1]]
        try:
            problems = list(wrong_with(Record.from_mds(reader.decode_sample(sample)), row, rules))
        except Exception as error:  # what a wrong byte leads to in numpy and streaming is of all kinds
            problems = [f"cannot be decoded: {error!r}"]
        yield from (f"sample {number} ({row['id']!r}): {problem}" for problem in problems)
