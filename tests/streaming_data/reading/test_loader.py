"""Batches over epochs, workers and ranks."""

import itertools
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from support.small_datasets import (
    data_config,
    flip_byte,
    make_record,
    shard_paths,
    small_vocabulary,
    text_records,
    write_dataset,
)
from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.reading.batch import unpack
from unitoken.streaming_data.reading.loader import PackedLoader, build_loader
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import open_sources

MakeLoader = Callable[..., PackedLoader]
VOCABULARY = small_vocabulary()
VIEWS = Views(image_size=8, patch_size=4)  # 4 features


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    images = [make_record(f"i{n}", VOCABULARY, 5 + n % 9, n % 3, (n + 1) % 2) for n in range(80)]
    write_dataset(root / "images", images)
    write_dataset(root / "text", text_records(100))
    return root


@pytest.fixture
def make(folder: Path) -> MakeLoader:
    def make(
        views: Views | None = VIEWS,
        compat: bool = False,
        vocabulary: Vocabulary = VOCABULARY,
        **settings: Any,
    ) -> PackedLoader:
        streams = {"images": {"local": str(folder / "images")}, "text": {"local": str(folder / "text")}}
        defaults = {
            "streams": streams,
            "packed_length": 72,
            "global_batch": 4,
            "cache": str(folder / "cache"),
            "timeout": 60,
        }
        config = DataConfig.model_validate({**defaults, **settings})
        return build_loader(config, views=views, vocabulary=vocabulary, batch_packs=4, compat=compat)

    return make


@pytest.mark.parametrize(
    ("continuous", "compat", "per_sample"),
    [("questions", False, 1), ("all", False, 1.5), ("questions", True, 1.5)],
)
def test_the_plan_counts_the_features_that_the_batches_hold(
    make: MakeLoader, continuous: str, compat: bool, per_sample: float
) -> None:
    loader = make(continuous=continuous, compat=compat)
    tokens = images = 0
    for batch in map(unpack, loader):
        tokens += int((batch["document_ids"] >= 0).sum())
        images += len(batch["pixel_values"])
        assert torch.equal(batch["view_rows"], batch["view_rows"].sort().values)
        assert (batch["input_ids"][batch["feature_rows"], batch["feature_columns"]] == 0).all()
        if compat:
            first = batch["feature_patches"] == 0
            separators = batch["feature_rows"][first], batch["feature_columns"][first] - 1
            assert torch.equal(batch["labels"][separators], batch["input_ids"][separators])
    report = loader.dataset.plan.report
    assert tokens == sum(share.tokens for share in report.streams)
    share = report.streams[0]
    assert images == pytest.approx(share.samples * per_sample, abs=6)


def test_without_continuous_features_a_batch_has_no_pixels(make: MakeLoader) -> None:
    assert all(len(batch["pixel_values"]) == 0 for batch in make(views=None, continuous="none"))


def test_compat_gives_no_features_without_a_vision_tower(make: MakeLoader) -> None:
    assert make(views=None, continuous="none", compat=True).dataset.recipe.continuous == "none"


def test_features_without_a_vision_tower_are_refused(make: MakeLoader) -> None:
    with pytest.raises(ConfigError, match="continuous: questions needs a vision tower"):
        make(views=None)


def test_a_model_of_another_vocabulary_is_refused(make: MakeLoader, folder: Path) -> None:
    other = small_vocabulary(60)
    with pytest.raises(
        ConfigError, match=f"{folder}/images .*{VOCABULARY.fingerprint}.* the model has {other.fingerprint}"
    ):
        make(vocabulary=other)


def test_datasets_that_are_open_are_not_opened_again(folder: Path) -> None:
    config = data_config(folder, {"text": {"local": str(folder / "text")}})
    sources = open_sources(config)
    loader = build_loader(
        config, views=VIEWS, vocabulary=VOCABULARY, batch_packs=4, compat=False, sources=sources
    )
    assert loader.dataset.sources[0] is sources[0]


def test_the_loader_is_what_composer_looks_for(make: MakeLoader) -> None:
    loader = make()
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.dataset, IterableDataset)
    assert loader.batch_size == 4
    assert loader._iterator is None
    assert len(loader) == loader.dataset.packs_per_epoch // 4
    assert len(loader.dataset) == loader.dataset.packs_per_epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_cut_as_composer_cuts_them_count_as_complete(make: MakeLoader, workers: int) -> None:
    """Composer takes `islice(loader, len(loader))`, so the loader's iterator never ends."""
    whole, cut = make(), make(workers=workers)
    for epoch in range(3):
        expected = [batch["input_ids"].tolist() for batch in whole]
        assert [batch["input_ids"].tolist() for batch in itertools.islice(cut, len(cut))] == expected
        state = cut.dataset.state_dict(num_samples=0, from_beginning=True)
        assert (state["epoch"], state["packs"]) == (epoch + 1, 0)


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_are_left_alone(make: MakeLoader, workers: int) -> None:
    """Otherwise a resumed run would draw other dropout masks than an uninterrupted one."""
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), numpy_state()
    for _ in make(workers=workers):
        pass
    assert torch.equal(torch.get_rng_state(), before[0])
    assert numpy_state() == before[1]


def test_more_workers_than_batches_work(make: MakeLoader, folder: Path) -> None:
    loader = make(workers=2, streams={"text": {"local": str(folder / "text"), "choose": 15}})
    assert len(list(loader)) == len(loader) == 1
    assert len(list(loader)) == 1


def test_shares_are_reported_for_printing(make: MakeLoader) -> None:
    table = make().dataset.plan.report.table()
    assert "images" in table
    assert "of a global batch's tokens" in table


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_that_cannot_read_is_named_by_errors_in_all_ranks(tmp_path: Path, workers: int) -> None:
    """Each rank reads its own half of the shards, so only one of the two reads the lost one."""
    folder = write_dataset(tmp_path / "text", text_records(300))
    lost = shard_paths(folder)[-3]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_read_until_error, args=(rank, tmp_path, folder, lost, workers, results))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for words in found.values():
        assert re.search(
            rf"a batch can not be read on rank [01]: .*stream 'text': the shard .*{lost.name}",
            words,
            re.DOTALL,
        ), words
    assert found[0].count("rank ") == 1, "both came upon it: the test tests nothing"


def _read_until_error(
    rank: int, tmp_path: Path, folder: Path, lost: Path, workers: int, results: Any
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=rank, world_size=2
    )
    config = data_config(
        tmp_path,
        {"text": {"local": str(folder)}},
        canonical_nodes=2,
        shuffle=False,
        continuous="none",
        workers=workers,
    )
    loader = build_loader(config, views=None, vocabulary=VOCABULARY, batch_packs=2, compat=False)
    torch.distributed.barrier()
    if rank == 0:
        flip_byte(lost)
    torch.distributed.barrier()
    try:
        for _ in loader:
            pass
        results.put((rank, "no error"))
    except RuntimeError as error:
        results.put((rank, str(error)))
    torch.distributed.destroy_process_group()
