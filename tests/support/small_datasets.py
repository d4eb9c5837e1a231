"""Small datasets as `tokenize` writes them, made without it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.manifest import INDEX, MANIFEST, REJECTS, SIDECAR, VOCABULARY, Manifest, VisionTokenizer
from unitoken.dataset.record import IGNORED, Record, columns, spans_of
from unitoken.dataset.sidecar import samples_schema
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.settings import DataConfig

LATENTS = 2  # each way, so that an image block has 4 + 2 * 3 tokens
BLOCK = 4 + LATENTS * (LATENTS + 1)


def small_vocabulary(text_tokens: int = 50) -> Vocabulary:
    return Vocabulary.from_tokens({f"t{n}": n for n in range(text_tokens)}, codebook_size=8)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make_record(
    name: str, vocabulary: Vocabulary, text: int, question_images: int = 0, answer_images: int = 0
) -> Record:
    """Return bos, the question's images, text (half of it trained on), the answer's images, end of turn.

    The tokens are drawn from the name, so that a sample can be recognized by its tokens.
    """
    rng = np.random.default_rng(list(name.encode()))
    tokens, trained, spans = [vocabulary.bos], [False], []

    def image(is_trained: bool) -> None:
        block = vocabulary.image_block(rng.integers(0, 8, (LATENTS, LATENTS))).tolist()
        spans.append((len(tokens), len(tokens) + len(block), LATENTS, LATENTS))
        tokens.extend(block)
        trained.extend([is_trained] * len(block))

    for _ in range(question_images):
        image(False)
    tokens.extend(rng.integers(0, 50, text).tolist())
    trained.extend([False] * (text - text // 2) + [True] * (text // 2))
    for _ in range(answer_images):
        image(True)
    tokens.append(vocabulary.end_of_turn)
    trained.append(True)
    return Record(
        name,
        np.array(tokens, np.uint16),
        spans_of(np.array(trained)),
        np.array(spans, np.uint32).reshape(-1, 4),
        tuple(png(int(rng.integers(256))) for _ in spans),
    )


def text_records(count: int, prefix: str = "s", longest: int = 40, seed: int = 0) -> list[Record]:
    vocabulary = small_vocabulary()
    lengths = np.random.default_rng(seed).integers(2, longest - 1, count)
    return [make_record(f"{prefix}{n}", vocabulary, int(length)) for n, length in enumerate(lengths)]


def write_dataset(
    folder: Path, records: Sequence[Record], vocabulary: Vocabulary | None = None, shard_bytes: int = 1 << 11
) -> Path:
    """Write a whole dataset folder: shards, index, sidecar, vocabulary, manifest."""
    from streaming import MDSWriter

    vocabulary = vocabulary or small_vocabulary()
    chunk = folder / "chunk-000000"
    with MDSWriter(
        out=str(chunk), columns=columns(vocabulary.size), hashes=["sha1"], size_limit=shard_bytes
    ) as writer:
        for record in records:
            writer.write(record.to_mds())
    index = json.loads((chunk / INDEX).read_bytes())
    for shard in index["shards"]:
        shard["raw_data"]["basename"] = f"{chunk.name}/{shard['raw_data']['basename']}"
    (folder / INDEX).write_text(json.dumps(index))
    labels = [record.labels() for record in records]
    generated = [
        [bool(label[first] != IGNORED) for first, *_ in record.image_spans]
        for record, label in zip(records, labels, strict=True)
    ]
    rows = {
        "id": [record.id for record in records],
        "tokens": [len(record.tokens) for record in records],
        "target_tokens": [int((label != IGNORED).sum()) for label in labels],
        "images": [len(record.images) for record in records],
        "question_images": [flags.count(False) for flags in generated],
        "image_sizes": [[4, 4] * len(record.images) for record in records],
        "generated": generated,
    }
    pyarrow.parquet.write_table(pyarrow.table(rows, schema=samples_schema()), folder / SIDECAR)
    (folder / REJECTS).write_bytes(b"")
    vocabulary.save(folder / VOCABULARY)
    write_manifest(folder, records, vocabulary)
    return folder


def write_manifest(folder: Path, records: Sequence[Record], vocabulary: Vocabulary) -> None:
    """Write the manifest of the files in `folder`."""
    manifest = Manifest(
        vocabulary=vocabulary.fingerprint,
        vision=VisionTokenizer(
            kind="chameleon", weights="0" * 16, codebook_size=8, downsampling=16, precision="float32"
        ),
        target_size=32,
        crop="center",
        compat=None,
        items=len(records),
        samples=len(records),
        rejected=0,
        tokens=sum(len(record.tokens) for record in records),
        target_tokens=sum(int((record.labels() != IGNORED).sum()) for record in records),
        images=sum(len(record.images) for record in records),
        chunks=1,
        chunk_size=len(records),
        source="0" * 16,
        files={name: sha256_of_file(folder / name) for name in (INDEX, SIDECAR, REJECTS, VOCABULARY)},
    )
    (folder / MANIFEST).write_bytes(manifest.dump())


def data_config(folder: Path, streams: dict[str, dict[str, Any]], **settings: Any) -> DataConfig:
    """Return the settings of a mixture with its caches in `folder`."""
    defaults = {"packed_length": 64, "global_batch": 4, "cache": str(folder / "cache")}
    return DataConfig.model_validate({"streams": streams, **defaults, **settings})


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("chunk-*/shard.*.mds"))


def flip_byte(path: Path) -> None:
    """Damage the last byte of a file, so that its time of change differs however coarse the clock."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
