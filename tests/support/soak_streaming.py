"""One rank of a job that reads: python tests/support/soak_streaming.py RANK JOB-FOLDER DATA CACHE [BATCHES]

Goes on from JOB-FOLDER/state.json, checks every document, and writes a line for each batch: epoch, packs before it, and a hash of
what this rank has of it. Ends by itself after BATCHES, else it is killed.
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
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.streaming_data.settings import DataConfig

SAMPLES, GROUP = 600, 4


def main(rank: int, job: Path, data: str, cache: str, batches: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    known = {tuple(record.tokens.tolist()) for record in text_records(SAMPLES)}
    config = DataConfig.model_validate(
        {
            "streams": {"text": {"remote": data}},
            "packed_length": 64,
            "global_batch": GROUP,
            "continuous": "none",
            "cache": cache,
            "workers": 2,
        }
    )
    loader = build_loader(
        config, views=None, vocabulary=small_vocabulary(), batch_packs=GROUP // 2, compat=False
    )
    dataset = loader.dataset
    state = job / "state.json"
    if state.exists():
        dataset.load_state_dict(json.loads(state.read_bytes()))
    done = 0
    while True:
        begun = True
        for batch in loader:
            if begun:
                epoch, packs = dataset._position.tolist()
                begun = False
            for row, documents in zip(
                batch["input_ids"].tolist(), batch["document_ids"].tolist(), strict=True
            ):
                for document in range(max(documents) + 1):
                    first = documents.index(document)
                    assert tuple(row[first : first + documents.count(document)]) in known
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
    main(
        int(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3],
        sys.argv[4],
        int(sys.argv[5]) if len(sys.argv) > 5 else 0,
    )
