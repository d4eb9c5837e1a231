"""Plans: what an epoch holds, and that it is the same on every world."""

import dataclasses
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.plans import LENGTH, make_recipe, make_stream, samples_of
from unitoken.common.errors import ConfigError
from unitoken.streaming_data.plan.build import Plan, _pack_window, build
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.order import choose_samples, epoch_amounts
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.streaming_data.reading.share import WorkerShare


@pytest.fixture(scope="module")
def plan() -> Plan:
    streams = [make_stream("a", 400)]
    plan = build(make_recipe(streams, global_batch=12, canonical_nodes=2), streams, 0, None)
    assert plan.packs >= 120
    return plan


@pytest.mark.parametrize("nodes", [1, 3, 4])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_holds_every_chosen_sample_once_or_drops_it(nodes: int, epoch: int) -> None:
    streams = [make_stream("a", 500), make_stream("b", 333, seed=1)]
    recipe = make_recipe(streams, canonical_nodes=nodes)
    first = build(recipe, streams, 0, None)
    plan = build(recipe, streams, epoch, first.report)
    counts = Counter(plan.ids.tolist())
    assert set(counts.values()) == {1}
    assert len(counts) == 833 - plan.report.dropped_samples
    assert first.report.dropped_packs - first.report.split_packs < math.lcm(4, nodes), (
        "rounded down, not more"
    )
    assert sum(share.samples for share in plan.report.streams) == len(plan.ids)


@pytest.mark.parametrize("nodes", [1, 4])
def test_no_pack_is_longer_than_its_length_nor_empty(nodes: int) -> None:
    streams = [make_stream("a", 1000)]
    plan = build(make_recipe(streams, canonical_nodes=nodes), streams, 0, None)
    lengths = [int(streams[0].lengths[pack].sum()) for pack in samples_of(plan)]
    assert min(lengths) > 0
    assert max(lengths) <= LENGTH
    assert plan.report.fill == pytest.approx(np.mean(lengths) / LENGTH)
    assert plan.report.fill > 0.9


def test_samples_of_length_0_are_no_candidates() -> None:
    stream = make_stream("a", 300)
    stream.lengths[::3] = 0
    plan = build(make_recipe([stream]), [stream, make_stream("b", 300)], 0, None)
    assert not {*range(0, 300, 3)} & set(plan.ids.tolist())
    assert plan.report.dropped_samples == 500 - len(plan.ids)


def test_each_packs_squares_and_images_are_known() -> None:
    streams = [make_stream("a", 300), make_stream("b", 100)]
    plan = build(make_recipe(streams, canonical_nodes=2), streams, 0, None)
    lengths, images = (
        np.concatenate([getattr(s, name) for s in streams]).astype(int) for name in ("lengths", "images")
    )
    assert plan.squares.tolist() == [(lengths[pack] ** 2).sum() for pack in samples_of(plan)]
    assert plan.images.tolist() == [images[pack].sum() for pack in samples_of(plan)]


def test_repeat_and_choose_are_exact() -> None:
    streams = [make_stream("a", 100, repeat=2.5), make_stream("b", 400, choose=150), make_stream("c", 50)]
    plan = build(make_recipe(streams, global_batch=1), streams, 0, None)
    counts = Counter(plan.ids.tolist())
    assert {counts[n] for n in range(100)} == {2, 3}
    assert [share.samples for share in plan.report.streams] == [250, 150, 50]


def test_proportions_are_of_samples_and_of_the_epochs_samples() -> None:
    streams = [make_stream("a", 100, proportion=3), make_stream("b", 400, proportion=1)]
    plan = build(make_recipe(streams, global_batch=1, epoch_samples=1000), streams, 0, None)
    assert [share.samples for share in plan.report.streams] == [750, 250]
    assert [share.asked for share in plan.report.streams] == [0.75, 0.25]


def test_all_epochs_have_equally_many_packs_and_lose_nothing() -> None:
    streams = [make_stream("a", 300, longest=30, repeat=1.3)]  # other samples are repeated each epoch
    recipe = make_recipe(streams, global_batch=1, canonical_nodes=2)
    first = build(recipe, streams, 0, None)
    split = 0
    for epoch in range(1, 12):
        plan = build(recipe, streams, epoch, first.report)
        assert plan.packs == first.packs
        assert len(plan.ids) + plan.report.dropped_samples == 390
        split += plan.report.split_packs
        if not plan.report.dropped_packs:
            assert len(plan.ids) == 390
    assert split > 0, "no epoch came out short: the test tests nothing"


def test_packs_are_a_multiple_of_batch_and_canonical_nodes() -> None:
    streams = [make_stream("a", 2000)]
    assert build(make_recipe(streams, global_batch=6, canonical_nodes=4), streams, 0, None).packs % 12 == 0


def test_equal_inputs_make_equal_plans_and_each_input_matters() -> None:
    streams = [make_stream("a", 500)]
    recipe = make_recipe(streams)
    plan = build(recipe, streams, 0, None)
    assert samples_of(build(recipe, streams, 0, None)) == samples_of(plan)
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"canonical_nodes": 2},
        {"window": 50},
        {"shuffle": False},
    ]
    for change in changes:
        other = build(recipe.model_copy(update=change), streams, 0, None)
        assert other.report.order != plan.report.order, change
        assert other.report.recipe != recipe.hash
    assert build(recipe, streams, 1, plan.report).report.order != plan.report.order


def test_the_differences_name_what_changed() -> None:
    streams = [make_stream("a", 500)]
    recipe = make_recipe(streams)
    before = make_recipe([make_stream("a", 400, repeat=2.0)], seed=7).model_dump()
    message = recipe.differences(before)
    assert "seed: 7, now 0" in message
    assert "streams.a.samples: 400, now 500" in message
    assert "streams.a.weight.repeat: 2.0, now nothing" in message
    assert "window" not in message


def test_the_order_of_the_streams_is_part_of_the_plan() -> None:
    a, b = make_stream("a", 50), make_stream("b", 50)
    one, other = make_recipe([a, b]), make_recipe([b, a])
    assert one.hash != other.hash
    assert one.differences(other.model_dump()) == "the order of the streams"


def test_without_shuffle_samples_keep_their_order_by_windows() -> None:
    streams = [make_stream("a", 400)]
    plan = build(make_recipe(streams, shuffle=False, global_batch=1), streams, 0, None)
    firsts = [pack[0] for pack in samples_of(plan)]
    assert firsts == sorted(firsts)
    windows = plan.ids.astype(int) // 100
    assert (np.diff(windows) >= 0).all()


def test_with_shuffle_samples_and_packs_are_mixed() -> None:
    streams = [make_stream("a", 4000)]
    plan = build(make_recipe(streams, window=4000), streams, 0, None)
    positions = np.empty(4000)
    positions[plan.ids] = np.arange(len(plan.ids))
    assert abs(np.corrcoef(np.arange(4000), positions)[0, 1]) < 0.2
    lengths = [len(pack) for pack in samples_of(plan)]
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]) < 0.2


def test_packs_are_shuffled_by_seed_epoch_row_and_window() -> None:
    recipe, lengths = make_recipe([make_stream("a", 200)]), np.full(100, LENGTH, np.uint32)  # a sample a pack

    def shuffled(seed: int = 0, epoch: int = 0, row: int = 0, window: int = 0) -> tuple[int, ...]:
        ids, _ = _pack_window(np.arange(100, dtype=np.uint32), lengths, recipe, seed, epoch, row, window)
        return tuple(ids.tolist())

    orders = [shuffled(), shuffled(seed=1), shuffled(epoch=1), shuffled(row=1), shuffled(window=1)]
    assert len(set(orders)) == len(orders)
    assert shuffled() == orders[0]


def test_a_canonical_row_reads_its_own_shards() -> None:
    """Packs are dealt to nodes in turn, so with as many rows as nodes few shards are read by two nodes."""
    streams = [make_stream("a", 17 * 40)]
    plan = build(make_recipe(streams, canonical_nodes=2, global_batch=2), streams, 0, None)
    shards = [set((np.concatenate(samples_of(plan)[node::2]) // 17).tolist()) for node in range(2)]
    assert len(shards[0] & shards[1]) <= 1


@pytest.mark.parametrize(
    ("samples", "settings", "found"),
    [
        (
            3,
            {"global_batch": 16},
            r"3 samples make [123] packs .* at least 16, .*; lower data\.global_batch to at most 3, "
            r"or raise `repeat` or `epoch_samples`",
        ),
        (3, {"canonical_nodes": 5}, "too few samples for canonical_nodes: 5: an epoch has 3 samples"),
    ],
)
def test_too_little_data_is_an_error_with_the_figures(
    samples: int, settings: dict[str, Any], found: str
) -> None:
    streams = [make_stream("a", samples)]
    with pytest.raises(ConfigError, match=found):
        build(make_recipe(streams, **settings), streams, 0, None)


def test_weights_that_choose_nothing_are_an_error() -> None:
    streams = [make_stream("a", 100, choose=0)]
    with pytest.raises(ConfigError, match="choose no sample"):
        build(make_recipe(streams), streams, 0, None)


def test_a_saved_plan_is_the_plan_and_is_made_once(tmp_path: Path) -> None:
    streams = [make_stream("a", 500)]
    recipe = make_recipe(streams)
    asked = []

    def lengths() -> list[StreamSamples]:
        asked.append(1)
        return streams

    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: load_or_build(tmp_path, recipe, 1, lengths), range(4)))
    assert len(asked) == 2, "epoch 0, which the number of packs is from, and epoch 1"
    expected = build(recipe, streams, 1, build(recipe, streams, 0, None).report)
    for plan in plans:
        assert samples_of(plan) == samples_of(expected)
        assert plan.report == expected.report
        assert isinstance(plan.ids.base, np.memmap)
    assert [path.name for path in tmp_path.glob("**/.aside-*")] == []


WORLDS = [(1, 1, 1), (1, 2, 1), (2, 2, 3), (1, 4, 2), (4, 3, 5), (3, 4, 7), (12, 1, 2), (1, 12, 0)]


def global_batches(
    plan: Plan, seen: int, nodes: int, ranks_per_node: int, workers: int, canonical_nodes: int
) -> list[list[int]]:
    """Return what all ranks of a world train on, batch by batch."""
    ranks = nodes * ranks_per_node
    batches: list[list[int]] = [[] for _ in range((plan.packs - seen) // 12)]
    for rank in range(ranks):
        shares = [
            WorkerShare(
                plan, seen, nodes, ranks_per_node, rank, 12 // ranks, canonical_nodes, worker, max(workers, 1)
            )
            for worker in range(max(workers, 1))
        ]
        for number, batch in enumerate(batches):  # a DataLoader asks its workers in turn
            turn, worker = divmod(number, max(workers, 1))
            batch += shares[worker][turn].tolist()
        assert sum(map(len, shares)) == len(batches)
        assert sum(len(list(share)) for share in shares) == len(batches)
    return batches


@pytest.mark.parametrize(("nodes", "ranks_per_node", "workers"), WORLDS)
@pytest.mark.parametrize("canonical_nodes", [1, 2, 12])
def test_a_global_batch_is_a_stretch_of_the_plan_on_every_world(
    plan: Plan, nodes: int, ranks_per_node: int, workers: int, canonical_nodes: int
) -> None:
    for seen in (0, 36, plan.packs):
        batches = global_batches(plan, seen, nodes, ranks_per_node, workers, canonical_nodes)
        assert [sorted(batch) for batch in batches] == [
            list(range(b, b + 12)) for b in range(seen, plan.packs, 12)
        ]


def test_with_enough_canonical_rows_each_node_keeps_to_its_rows(plan: Plan) -> None:
    for node in range(2):
        packs = [
            p
            for rank in (2 * node, 2 * node + 1)
            for batch in WorkerShare(plan, 0, 2, 2, rank, 3, 2)
            for p in batch
        ]
        assert {pack % 2 for pack in packs} == {node}


@given(
    samples=st.integers(40, 400),
    longest=st.integers(1, LENGTH),
    epoch=st.integers(0, 3),
    canonical_nodes=st.integers(1, 4),
    window=st.integers(20, 500),
    repeat=st.floats(0.5, 3),
    shuffle=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_partitions_chosen_samples_into_packs_that_fit(
    samples: int,
    longest: int,
    epoch: int,
    canonical_nodes: int,
    window: int,
    repeat: float,
    shuffle: bool,
    seed: int,
) -> None:
    streams = [make_stream("a", samples, longest, seed, repeat=repeat), make_stream("b", 100, seed=seed + 1)]
    recipe = make_recipe(
        streams, seed=seed, global_batch=1, canonical_nodes=canonical_nodes, window=window, shuffle=shuffle
    )
    plan = build(recipe, streams, epoch, build(recipe, streams, 0, None).report)
    wanted = epoch_amounts(streams, "samples", None)
    chosen = Counter(
        int(sample) + offset
        for stream, amount, offset in zip(streams, wanted, (0, samples), strict=True)
        for taken in [choose_samples(stream, amount, "samples", seed, epoch, shuffle)]
        for sample in taken.ids(0, taken.count)
    )
    assert sum(chosen.values()) == round(samples * repeat) + 100
    in_packs = Counter(plan.ids.tolist())
    assert in_packs <= chosen
    assert sum((chosen - in_packs).values()) == plan.report.dropped_samples
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(plan.ids)
    lengths = np.concatenate([stream.lengths for stream in streams])
    of_packs = [int(lengths[ids].sum()) for ids in np.split(plan.ids, plan.offsets[1:-1].astype(int))]
    assert min(of_packs) > 0
    assert max(of_packs) <= LENGTH


@given(
    data=st.data(),
    seen=st.integers(0, 8),
    workers=st.integers(0, 5),
    canonical_nodes=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
@settings(max_examples=100, deadline=None)
def test_random_worlds_train_on_the_same_global_batches(
    plan: Plan, data: st.DataObject, seen: int, workers: int, canonical_nodes: int
) -> None:
    ranks = data.draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    nodes = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    batches = global_batches(plan, seen * 12, nodes, ranks // nodes, workers, canonical_nodes)
    assert [sorted(batch) for batch in batches] == [
        list(range(b, b + 12)) for b in range(seen * 12, plan.packs, 12)
    ]


def test_making_a_plan_removes_those_unused_for_long(tmp_path: Path) -> None:
    streams = [make_stream("a", 500)]
    old, used, new = (make_recipe(streams, seed=seed) for seed in range(3))
    for recipe in (old, used):
        load_or_build(tmp_path, recipe, 0, lambda: streams)
        os.utime(tmp_path / recipe.hash / "epoch-000000", (0, 0))
    load_or_build(tmp_path, used, 0, lambda: pytest.fail("it is there"))
    load_or_build(tmp_path, new, 0, lambda: streams)
    assert sorted(path.parent.name for path in tmp_path.glob("*/epoch-*")) == sorted([used.hash, new.hash])


def test_a_plan_prints_its_realised_shares() -> None:
    streams = [make_stream("captions", 300), make_stream("b", 100)]
    table = build(make_recipe(streams, global_batch=1), streams, 0, None).report.table().splitlines()
    assert len({len(line) for line in table[:3]}) == 1, "aligned"
    assert table[1].startswith("captions")
    assert "75.0%" in table[1]
    assert "packs" in table[3]
    assert [line.split()[0] for line in table[6:]] == ["of", "captions", "b"], (
        "and what a batch holds of each"
    )


def test_a_plan_reports_left_out_and_warns_of_over_long_samples() -> None:
    streams = [
        dataclasses.replace(make_stream("captions", 300), filtered=18, held_out=12, over_long=40),
        make_stream("b", 100),
    ]
    report = build(make_recipe(streams, global_batch=1), streams, 0, None).report
    assert (
        "captions: of 300 samples 40 over-long, 6 of other kinds, 12 held out" in report.table().splitlines()
    )
    assert report.warnings() == [
        "stream 'captions': 40 of 282 samples (14.2%) are longer than a pack and are left out; "
        "see data.packed_length and data.over_long"
    ]


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy", "squares.npy", "images.npy", "report.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_plan_is_made_anew(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One flipped bit of `ids` lost a sample and repeated another."""
    streams = [make_stream("a", 500)]
    recipe = make_recipe(streams)
    load_or_build(tmp_path, recipe, 0, lambda: streams)
    whole = build(recipe, streams, 0, None)
    path = tmp_path / recipe.hash / "epoch-000000" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        at = content.index(b'"order"') + 11 if name == "report.json" else len(content) - 5
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:-6], "empty": b""}[damage])
    again = load_or_build(tmp_path, recipe, 0, lambda: streams)
    assert again.report == whole.report
    assert samples_of(again) == samples_of(whole)
    assert again.squares.tolist() == whole.squares.tolist()
    assert "damaged, so it is made anew" in caplog.text
