"""One rank of a job that reads a dataset.

    python tests/support/soak_streaming.py RANK JOB-FOLDER DATA CACHE [BATCHES]

It resumes from JOB-FOLDER/state.json, checks every document, and writes a line for each batch: the epoch,
the number of packs before the batch, and a hash of this rank's share of it. It ends after BATCHES, or runs
until it is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.small_datasets import small_vocabulary, text_records
from unitoken.common.files import write_aside
from unitoken.streaming_data.reading.batch import Batch, unpack
from unitoken.streaming_data.reading.loader import PackedLoader, build_loader
from unitoken.streaming_data.settings import DataConfig

SAMPLES, GROUP = 600, 4


def open_loader(data: str, cache: str) -> PackedLoader:
    settings = {
        "streams": {"text": {"remote": data}},
        "packed_length": 64,
        "global_batch": GROUP,
        "continuous": "none",
        "cache": cache,
        "workers": 2,
    }
    config = DataConfig.model_validate(settings)
    return build_loader(
        config, views=None, vocabulary=small_vocabulary(), batch_packs=GROUP // 2, compat=False
    )


def check_documents(batch: Batch, known: set[tuple[int, ...]]) -> None:
    """Check that every document of a batch is one of the samples."""
    for row, documents in zip(batch["input_ids"].tolist(), batch["document_ids"].tolist(), strict=True):
        for document in range(max(documents) + 1):
            first = documents.index(document)
            assert tuple(row[first : first + documents.count(document)]) in known


def main(rank: int, job: Path, data: str, cache: str, batches: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    known = {tuple(record.tokens.tolist()) for record in text_records(SAMPLES)}
    loader = open_loader(data, cache)
    dataset = loader.dataset
    state = job / "state.json"
    if state.exists():
        dataset.load_state_dict(json.loads(state.read_bytes()))
    done = 0
    while True:
        is_first = True
        for batch in loader:
            if is_first:
                epoch, packs = dataset._position.tolist()
                is_first = False
            check_documents(unpack(batch), known)
            digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()[:16]
            with open(job / f"rank-{rank}.txt", "a") as log:
                log.write(f"{epoch} {packs} {digest}\n")
            packs += GROUP
            if rank == 0:
                write_aside(state, json.dumps(dataset.state_dict(packs, True)).encode())
            done += 1
            if done == batches:
                return


if __name__ == "__main__":
    given_rank, given_job, given_data, given_cache, *rest = sys.argv[1:]
    main(int(given_rank), Path(given_job), given_data, given_cache, int(rest[0]) if rest else 0)
