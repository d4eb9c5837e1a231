"""The position in the data, saved and loaded: for every shape of the world, at every moment of an epoch."""

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming import StreamingDataset

from support.small_datasets import flip_byte, shard_paths, small_vocabulary, text_records, write_dataset
from unitoken.common.errors import ConfigError
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.reading.batch import PackedBatch
from unitoken.streaming_data.reading.loader import PackedLoader, build_loader
from unitoken.streaming_data.settings import DataConfig

MakeLoader = Callable[..., PackedLoader]
GROUP = 4  # packs of a global batch
Rows = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "a", text_records(150, "a"))
    write_dataset(root / "b", text_records(60, "b", seed=1))
    return root


@pytest.fixture
def make_loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MakeLoader:
    def make(
        ranks: int = 1, rank: int = 0, workers: int = 0, local: int | None = None, **settings: Any
    ) -> PackedLoader:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local or ranks))
        return open_loader(folder, ranks, workers, **settings)

    return make


def open_loader(folder: Path, ranks: int = 1, workers: int = 0, **settings: Any) -> PackedLoader:
    defaults = {
        "streams": {"a": {"local": str(folder / "a")}, "b": {"remote": str(folder / "b"), "repeat": 1.5}},
        "packed_length": 64,
        "global_batch": GROUP,
        "canonical_nodes": 2,
        "continuous": "none",
        "cache": str(folder / "cache"),
        "timeout": 60,
        "workers": workers,
    }
    config = DataConfig.model_validate({**defaults, **settings})
    vocabulary = small_vocabulary()
    batch = config.global_batch // ranks
    return build_loader(config, views=None, vocabulary=vocabulary, batch_packs=batch, compat=False)


def rows(batch: PackedBatch) -> Rows:
    return [tuple(row.tolist()) for row in batch["input_ids"]]


def epoch_of(loader: PackedLoader) -> list[Rows]:
    return [rows(batch) for batch in loader]


def train(loader: PackedLoader, batches: int) -> tuple[list[Rows], dict]:
    """Take some batches of an epoch and the state, as Composer does, and put it through a checkpoint."""
    taken = []
    iterator = iter(loader)
    for _ in range(batches):
        taken.append(rows(next(iterator)))
    state = loader.dataset.state_dict(num_samples=batches * GROUP, from_beginning=True)
    return taken, json.loads(json.dumps(state))


def test_the_dataset_is_a_streaming_dataset_with_single_samples(make_loader: MakeLoader) -> None:
    dataset = make_loader().dataset
    assert isinstance(dataset, StreamingDataset)
    assert [record.id for record in dataset[[0, 149, 150, 209]]] == ["a0", "a149", "b0", "b59"]
    assert dataset[-1].id == "b59"
    with pytest.raises(IndexError):
        dataset[210]
    assert len(dataset.streams) == 2


def test_each_epoch_holds_the_packs_of_its_own_plan(make_loader: MakeLoader) -> None:
    loader = make_loader()
    dataset = loader.dataset
    epochs = []
    for _ in range(2):
        batches = epoch_of(loader)
        assert len(batches) == len(loader) == dataset.packs_per_epoch // GROUP
        plan: Plan = dataset.plan
        for number, batch in enumerate(batches):
            packs = []
            for pack in range(number * GROUP, (number + 1) * GROUP):
                tokens = [
                    token
                    for sample in plan.ids[plan.offsets[pack] : plan.offsets[pack + 1]]
                    for token in dataset[int(sample)].tokens.tolist()
                ]
                packs.append((*tokens, *[0] * (64 - len(tokens))))
            assert sorted(batch) == sorted(packs)
        epochs.append(batches)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(make_loader: MakeLoader, workers: int) -> None:
    plain, parallel = make_loader(), make_loader(workers=workers)
    for _ in range(3):
        assert epoch_of(parallel) == epoch_of(plain)


@pytest.mark.parametrize(("ranks", "local"), [(2, 2), (2, 1), (4, 2)])
def test_a_global_batch_is_the_same_on_every_world(make_loader: MakeLoader, ranks: int, local: int) -> None:
    expected = epoch_of(make_loader())
    shares = [epoch_of(make_loader(ranks, rank, local=local)) for rank in range(ranks)]
    for number, batch in enumerate(expected):
        assert sorted(row for share in shares for row in share[number]) == sorted(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_exactly_twice_and_into_the_next_epochs(make_loader: MakeLoader, workers: int) -> None:
    whole = make_loader()
    expected = [epoch_of(whole) for _ in range(3)]

    _, state = train(make_loader(workers=workers), 3)
    second = make_loader(workers=workers)
    second.dataset.load_state_dict(state)
    taken = []
    iterator = iter(second)
    for _ in range(4):
        taken.append(rows(next(iterator)))
    assert taken == expected[0][3:7]

    third = make_loader(workers=workers)
    third.dataset.load_state_dict(second.dataset.state_dict(num_samples=7 * GROUP, from_beginning=True))
    assert epoch_of(third) == expected[0][7:]
    assert epoch_of(third) == expected[1]
    fourth, state = make_loader(workers=workers), third.dataset.state_dict(num_samples=0, from_beginning=True)
    fourth.dataset.load_state_dict(state)
    assert epoch_of(fourth) == expected[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_at_every_batch_twice_and_in_epoch_three(make_loader: MakeLoader, workers: int) -> None:
    """With workers, batches that were prepared but not trained on are in flight each time."""
    folder = make_loader().dataset.sources[0].folder
    small = {"streams": {"a": {"local": str(folder), "choose": 40}}, "workers": workers}
    whole = make_loader(**small)
    expected = [epoch_of(whole) for _ in range(3)]
    batches = len(whole)
    assert batches > 3
    for epoch in (0, 2):
        for stopped in range(batches):
            state = {**whole.dataset.state_dict(0, True), "epoch": epoch}
            taken: list[Rows] = []
            for more in (stopped, 1):  # killed after some batches, and after one more
                loader = make_loader(**small)
                loader.dataset.load_state_dict(state)
                taken += itertools.islice(map(rows, loader), more)
                state = json.loads(json.dumps(loader.dataset.state_dict(len(taken) * GROUP, True)))
            loader = make_loader(**small)
            loader.dataset.load_state_dict(state)
            assert taken + epoch_of(loader) == expected[epoch], (epoch, stopped)


@given(data=st.data(), epoch=st.integers(0, 2), stopped=st.integers(0, 20))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_resumes_anywhere_on_any_world(
    make_loader: MakeLoader, data: st.DataObject, epoch: int, stopped: int
) -> None:
    whole = make_loader()
    whole.dataset.load_state_dict({**whole.dataset.state_dict(0, True), "epoch": epoch})
    expected = epoch_of(whole)
    seen = stopped % (len(expected) + 1)
    state = {**whole.dataset.state_dict(0, True), "epoch": epoch, "packs": seen * GROUP}
    state["order"] = whole.dataset.plan.report.order if seen else None
    ranks = data.draw(st.sampled_from([1, 2, 4]))
    local = data.draw(st.sampled_from([n for n in (1, 2, 4) if n <= ranks]))
    shares = []
    for rank in range(ranks):
        loader = make_loader(ranks, rank, local=local)
        loader.dataset.load_state_dict(state)
        shares.append(epoch_of(loader))
    for number, batch in enumerate(expected[seen:]):
        assert sorted(row for share in shares for row in share[number]) == sorted(batch)


def test_a_run_that_began_with_version_2_continues_with_it(make_loader: MakeLoader) -> None:
    """The state is from the middle of epoch 1 and as version 2 wrote it, without `batching_method`."""
    old = make_loader(batching_method="random")
    old.dataset.recipe = old.dataset.recipe.of_version_2()
    old.dataset.plan = old.dataset._plan_of(0)
    whole = [epoch_of(old), epoch_of(old)]
    state = {**old.dataset.state_dict(0, True), "epoch": 1, "packs": 3 * GROUP}
    state |= {"order": old.dataset._plan_of(1).report.order}
    del state["recipe"]["batching_method"]
    resumed = make_loader(workers=2)
    resumed.dataset.load_state_dict(json.loads(json.dumps(state)))
    assert epoch_of(resumed) == whole[1][3:]
    refused = make_loader(
        batching_method="per_stream", streams={"a": {"local": resumed.dataset.streams[0].local}}
    )
    with pytest.raises(ConfigError, match="batching_method: nothing, now per_stream"):
        refused.dataset.load_state_dict(state)


def test_a_run_resumes_on_another_world(make_loader: MakeLoader) -> None:
    expected = epoch_of(make_loader())
    _, state = train(make_loader(), 3)
    shares = []
    for rank in range(2):
        loader = make_loader(2, rank, workers=rank)  # also with other numbers of workers
        loader.dataset.load_state_dict(state)
        shares.append(epoch_of(loader))
    for number, batch in enumerate(expected[3:]):
        assert sorted(shares[0][number] + shares[1][number]) == sorted(batch)


def test_a_state_in_a_later_epoch_needs_no_earlier_one(make_loader: MakeLoader) -> None:
    whole = make_loader()
    expected = [epoch_of(whole) for _ in range(3)][2]
    loader = make_loader()
    loader.dataset.load_state_dict({**make_loader().dataset.state_dict(0, True), "epoch": 2})
    assert epoch_of(loader) == expected


def test_the_state_at_the_end_of_an_epoch(make_loader: MakeLoader) -> None:
    loader = make_loader()
    expected = [epoch_of(loader), epoch_of(loader)]
    loader = make_loader()
    assert loader.dataset.state_dict(0, True)["epoch"] == 0, "not begun"
    epoch_of(loader)
    # After the last batch, before Composer ends the epoch: nothing of the epoch is left.
    before = loader.dataset.state_dict(num_samples=loader.dataset.packs_per_epoch, from_beginning=True)
    resumed = make_loader()
    resumed.dataset.load_state_dict(before)
    assert epoch_of(resumed) == []
    assert epoch_of(resumed) == expected[1]
    # After Composer has ended the epoch its count is 0.
    after = loader.dataset.state_dict(num_samples=0, from_beginning=True)
    assert (after["epoch"], after["packs"]) == (1, 0)
    resumed = make_loader()
    resumed.dataset.load_state_dict(after)
    assert epoch_of(resumed) == expected[1]


def test_the_state_before_the_first_batch_is_the_epochs_start(
    make_loader: MakeLoader,
) -> None:
    loader = make_loader()
    iterator = iter(loader)
    next(iterator)
    state = loader.dataset.state_dict(num_samples=0, from_beginning=True)
    assert (state["epoch"], state["packs"]) == (0, 0)


def test_packs_may_be_counted_from_where_the_run_was_resumed(make_loader: MakeLoader) -> None:
    _, state = train(make_loader(), 3)
    loader = make_loader()
    loader.dataset.load_state_dict(state)
    next(iter(loader))
    assert loader.dataset.state_dict(num_samples=GROUP, from_beginning=False)["packs"] == 4 * GROUP


def test_a_loaded_state_is_the_state_until_training_goes_on(make_loader: MakeLoader) -> None:
    _, state = train(make_loader(), 3)
    loader = make_loader()
    loader.dataset.load_state_dict(state)
    assert loader.dataset.state_dict(num_samples=0, from_beginning=True) == state


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_can_be_loaded_in_the_middle_of_an_epoch(make_loader: MakeLoader, workers: int) -> None:
    loader = make_loader(workers=workers)
    _, state = train(loader, 2)
    first = epoch_of(make_loader())
    next(iter(loader))
    loader.dataset.load_state_dict(state)
    assert epoch_of(loader) == first[2:]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"seed": 1}, "seed: 0, now 1"),
        ({"packed_length": 72}, "packed_length: 64, now 72"),
        ({"global_batch": 8}, "global_batch: 4, now 8"),
        ({"window": 7}, "window: 131072, now 7"),
    ],
)
def test_resuming_another_plan_is_refused_naming_the_differences(
    make_loader: MakeLoader, settings: dict[str, Any], found: str
) -> None:
    _, state = train(make_loader(), 3)
    other = make_loader(**settings).dataset
    with pytest.raises(ConfigError) as caught:
        other.load_state_dict(state)
    for part in ("epoch 0 after 12 packs", state["plan"], other.recipe.hash, found):
        assert part in str(caught.value)


def test_resuming_against_other_data_is_refused(
    make_loader: MakeLoader, folder: Path, tmp_path: Path
) -> None:
    _, state = train(make_loader(), 3)
    changed = write_dataset(tmp_path / "a", text_records(150, "z"))
    streams = {"a": {"local": str(changed)}, "b": {"local": str(folder / "b"), "repeat": 1}}
    with pytest.raises(
        ConfigError, match=r"streams.a.dataset: \w+, now \w+; streams.b.weight.repeat: 1.5, now 1.0"
    ):
        make_loader(streams=streams).dataset.load_state_dict(state)


def test_another_order_from_the_same_settings_is_refused(make_loader: MakeLoader) -> None:
    """Another version of this code may make another order."""
    _, state = train(make_loader(), 3)
    with pytest.raises(ConfigError, match="made by another version of this code"):
        make_loader().dataset.load_state_dict({**state, "order": "0" * 16})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": 2}, "no data state of version 1: version"),
        ({"packs": 13}, "expected a multiple of 4 up to"),
        ({"packs": 4000}, "expected a multiple of 4 up to"),
        ({"packs": -4}, "packs"),
        ({"sample_in_epoch": 3}, "sample_in_epoch"),
    ],
)
def test_a_foreign_state_is_refused(make_loader: MakeLoader, change: dict[str, Any], found: str) -> None:
    _, state = train(make_loader(), 3)
    with pytest.raises(ConfigError, match=found):
        make_loader().dataset.load_state_dict({**state, **change})
    with pytest.raises(ConfigError, match="no data state"):
        make_loader().dataset.load_state_dict(
            {"epoch": 0, "sample_in_epoch": 12, "num_canonical_nodes": 2, "shuffle_seed": 0}
        )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", ["local", "remote"])
@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_a_bad_shard_is_an_error_in_the_training_process(
    make_loader: MakeLoader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    stream: str,
    damage: str,
) -> None:
    folder = write_dataset(tmp_path / "data", text_records(100))
    loader = make_loader(workers=workers, streams={"a": {stream: str(folder)}}, cache=str(tmp_path / "cache"))
    shard = shard_paths(folder)[-1]
    shard.unlink() if damage == "missing" else flip_byte(shard)
    with pytest.raises(
        RuntimeError, match=rf"{shard.name}.* (is {damage}|cannot be downloaded: .*{shard.name}: not there)"
    ):
        epoch_of(loader)
    if workers:  # torch waits five seconds for each worker after an error, whatever the dataset
        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
        iterator: Any = loader._iterator
        iterator._shutdown_workers()


def test_a_batch_that_does_not_fit_the_world_is_refused(make_loader: MakeLoader) -> None:
    with pytest.raises(ConfigError, match="global_batch: 4 packs are not 3 ranks x 1 packs"):
        make_loader(ranks=3)


def test_ranks_that_are_no_whole_nodes_are_refused(make_loader: MakeLoader) -> None:
    with pytest.raises(ConfigError, match="4 ranks are not whole nodes of 3"):
        make_loader(ranks=4, local=3)


def test_a_sidecar_that_was_changed_by_hand_is_refused(make_loader: MakeLoader, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", text_records(100))
    flip_byte(folder / "samples.parquet")
    with pytest.raises(ConfigError, match=f"{folder}/samples.parquet is not the file"):
        make_loader(streams={"a": {"local": str(folder)}}, cache=str(tmp_path / "cache"))


def test_two_processes_of_one_run_share_each_global_batch(
    folder: Path, tmp_path: Path, make_loader: MakeLoader
) -> None:
    """torch.distributed is initialized, and the launcher's environment is not set."""
    expected = epoch_of(make_loader())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(folder, tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for number, batch in enumerate(expected):
        assert sorted(tuple(row) for share in shares for row in share[number]) == sorted(batch)


def _rank(folder: Path, tmp_path: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2
    )
    (tmp_path / f"{rank}.json").write_text(json.dumps(epoch_of(open_loader(folder, ranks=2, workers=1))))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
