"""Reading from an S3 server over a bad network gives every sample, or one clear error in every rank."""

import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.faults import KINDS, Faults, faulty
from support.services import Service, started, used
from support.small_datasets import shard_paths, small_vocabulary, text_records, write_dataset
from unitoken.storage import retry, shard_cache
from unitoken.streaming_data import sources
from unitoken.streaming_data.reading.batch import unpack
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.streaming_data.settings import DataConfig

pytestmark = pytest.mark.cloud
RECORDS = text_records(900, longest=60)
TOKENS = [tuple(record.tokens.tolist()) for record in RECORDS]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("s3")
    with started("s3", root / "store") as service, used(service):
        write_dataset(root / "store" / "bucket" / "data", RECORDS, shard_bytes=512)
        yield service


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(shard_cache, "PAUSE", 0.01)


def config(service: Service, faults: Faults, folder: Path, **settings: Any) -> DataConfig:
    stream = {"remote": service.url("data"), "endpoint": faults.address}
    defaults = {
        "streams": {"text": stream},
        "packed_length": 128,
        "global_batch": 4,
        "continuous": "none",
        "cache": str(folder),
        "timeout": 90,
    }
    return DataConfig.model_validate({**defaults, **settings})


def read_epoch(service: Service, faults: Faults, folder: Path, workers: int) -> None:
    """Read an epoch, and check that every sample of the plan comes as often as the plan has it."""
    loader = build_loader(
        config(service, faults, folder, workers=workers),
        views=None,
        vocabulary=small_vocabulary(),
        batch_packs=4,
        compat=False,
    )
    samples: Counter[tuple[int, ...]] = Counter()
    for batch in map(unpack, loader):
        for row, documents in zip(batch["input_ids"].tolist(), batch["document_ids"].tolist(), strict=True):
            for document in range(max(documents) + 1):
                begin = documents.index(document)
                samples[tuple(row[begin : begin + documents.count(document)])] += 1
    assert samples == Counter(TOKENS[number] for number in loader.dataset.plan.ids.tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_right_if_one_request_in_ten_fails(
    service: Service, tmp_path: Path, workers: int
) -> None:
    with faulty(service, rate=0.1) as faults:
        for again in range(2):
            read_epoch(service, faults, tmp_path / str(again), workers)
            assert not list((tmp_path / str(again)).glob("**/.aside-*"))
        assert sum(faults.counts[kind] for kind in KINDS) > 15
        assert faults.counts["passed"] > 250


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_ten_thousand_shards_are_read_from_a_bad_network(service: Service, tmp_path: Path) -> None:
    with faulty(service, rate=0.1) as faults:
        reads = again = 0
        while reads < 10_000:
            read_epoch(service, faults, tmp_path / "cache", 2 * (again % 2))
            reads += len(list((tmp_path / "cache").glob("datasets/*/chunk-*/*.mds")))
            shutil.rmtree(tmp_path / "cache")
            again += 1
        assert min(faults.counts[kind] for kind in KINDS) > 50, faults.counts


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["shard", "silent", "refused"])
def test_a_lost_shard_is_an_error_in_every_rank_and_is_named(
    loss: str, service: Service, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with faulty(service, rate=0.0) as faults:
        settings = config(service, faults, tmp_path / "cache", workers=2, canonical_nodes=2)
        ranks = [
            context.Process(target=_read_until_error, args=(n, settings, tmp_path / "group", results))
            for n in range(2)
        ]
        for rank in ranks:
            rank.start()
        for _ in ranks:
            assert results.get(timeout=120)[1] == "ready"  # the small files are fetched
        lost = shard_paths(Path(service.command[-3]) / "bucket" / "data")[150].name
        if loss == "shard":
            faults.lost.add(lost)
        if loss == "silent":
            faults.silent.set()
        if loss != "refused":
            (tmp_path / "go").touch()
            errors = [results.get(timeout=60)[1] for _ in ranks]
    if loss == "refused":  # the proxy no longer runs
        (tmp_path / "go").touch()
        errors = [results.get(timeout=60)[1] for _ in ranks]
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    for error in errors:
        assert "a batch can not be read on rank" in error
        assert f"stream 'text': the shard chunk-000000/{lost if loss == 'shard' else 'shard.'}" in error
        assert "s3://bucket/data/chunk-000000/shard." in error


def _read_until_error(rank: int, settings: DataConfig, group: Path, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    shard_cache.SHARD_RETRY_SECONDS = sources.SHARD_RETRY_SECONDS = 5.0  # instead of 40
    torch.distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
    loader = build_loader(settings, views=None, vocabulary=small_vocabulary(), batch_packs=2, compat=False)
    results.put((rank, "ready"))
    while not (group.parent / "go").exists():
        time.sleep(0.05)
    try:
        for _ in loader:
            pass
        results.put((rank, "no error"))
    except RuntimeError as error:
        results.put((rank, str(error)))
    torch.distributed.destroy_process_group()
