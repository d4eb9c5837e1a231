import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.plan import Plan, Recipe, StreamRecipe, StreamSamples, _pack_row, build, load_or_build, partition

LENGTH = 64


def make_stream(name: str, samples: int, longest: int = LENGTH, seed: int = 0, **weight: float) -> StreamSamples:
    lengths = np.random.default_rng([seed, samples]).integers(1, longest + 1, samples).astype(np.uint32)
    shards = np.full(math.ceil(samples / 17), 17)
    shards[-1] -= shards.sum() - samples
    return StreamSamples(name, shards, lengths, lengths // 2, weight)


def make_recipe(streams: list[StreamSamples], **settings) -> Recipe:
    defaults = {"seed": 0, "global_batch": 4, "canonical_nodes": 1, "window": 100, "shuffle": True, "epoch_size": None}
    recipes = {s.name: StreamRecipe(dataset="d", samples=len(s.lengths), weight=s.weight) for s in streams}
    return Recipe(packed_length=LENGTH, continuous="none", features=0, streams=recipes, **{**defaults, **settings})


def samples_of(plan: Plan) -> list[list[int]]:
    return [plan.pack(number).tolist() for number in range(plan.packs)]


@pytest.mark.parametrize("nodes", [1, 3, 4])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_is_every_chosen_sample_once_but_for_those_reported_as_dropped(nodes, epoch):
    streams = [make_stream("a", 500), make_stream("b", 333, seed=1)]
    recipe = make_recipe(streams, canonical_nodes=nodes)
    first = build(recipe, streams, 0, None)
    plan = build(recipe, streams, epoch, first.packs)
    counts = Counter(plan.ids.tolist())
    assert set(counts.values()) == {1}
    assert len(counts) == 833 - plan.report.dropped_samples
    assert first.report.dropped_packs - first.report.split_packs < math.lcm(4, nodes), "rounded down, not more"
    assert sum(share.samples for share in plan.report.streams) == len(plan.ids)


@pytest.mark.parametrize("nodes", [1, 4])
def test_no_pack_is_longer_than_its_length_nor_empty(nodes):
    streams = [make_stream("a", 1000, longest=2 * LENGTH)]
    plan = build(make_recipe(streams, canonical_nodes=nodes), streams, 0, None)
    lengths = [int(streams[0].lengths[pack].sum()) for pack in samples_of(plan)]
    assert min(lengths) > 0
    assert max(lengths) <= LENGTH
    assert plan.report.fill == pytest.approx(np.mean(lengths) / LENGTH)
    assert plan.report.fill > 0.9


def test_over_long_samples_are_left_out_and_counted():
    streams = [make_stream("a", 300, longest=2 * LENGTH), make_stream("b", 300)]
    plan = build(make_recipe(streams), streams, 0, None)
    over_long = np.flatnonzero(streams[0].lengths > LENGTH)
    assert len(over_long) > 50
    assert not set(over_long.tolist()) & set(plan.ids.tolist())
    assert [share.over_long for share in plan.report.streams] == [len(over_long), 0]
    assert plan.report.dropped_samples == 600 - len(over_long) - len(plan.ids)


def test_repeat_and_choose_are_exact():
    streams = [make_stream("a", 100, repeat=2.5), make_stream("b", 400, choose=150), make_stream("c", 50)]
    plan = build(make_recipe(streams, global_batch=1), streams, 0, None)
    counts = Counter(plan.ids.tolist())
    assert {counts[n] for n in range(100)} == {2, 3}
    assert [share.samples for share in plan.report.streams] == [250, 150, 50]


def test_proportions_are_of_samples_and_of_the_epoch_size():
    streams = [make_stream("a", 100, proportion=3), make_stream("b", 400, proportion=1)]
    plan = build(make_recipe(streams, global_batch=1, epoch_size=1000), streams, 0, None)
    assert [share.samples for share in plan.report.streams] == [750, 250]


def test_the_number_of_packs_is_constant_over_epochs_and_a_shortage_loses_nothing():
    streams = [make_stream("a", 300, longest=30, repeat=1.3)]  # other samples are repeated each epoch
    recipe = make_recipe(streams, global_batch=1, canonical_nodes=2)
    first = build(recipe, streams, 0, None)
    split = 0
    for epoch in range(1, 12):
        plan = build(recipe, streams, epoch, first.packs)
        assert plan.packs == first.packs
        assert len(plan.ids) + plan.report.dropped_samples == 390
        split += plan.report.split_packs
        if not plan.report.dropped_packs:
            assert len(plan.ids) == 390
    assert split > 0, "no epoch came out short: the test tests nothing"


def test_packs_are_a_multiple_of_the_global_batch_and_of_the_canonical_nodes():
    streams = [make_stream("a", 2000)]
    assert build(make_recipe(streams, global_batch=6, canonical_nodes=4), streams, 0, None).packs % 12 == 0


def test_the_same_inputs_make_the_same_plan_and_each_input_another():
    streams = [make_stream("a", 500)]
    recipe = make_recipe(streams)
    plan = build(recipe, streams, 0, None)
    assert samples_of(build(recipe, streams, 0, None)) == samples_of(plan)
    for change in [{"seed": 1}, {"canonical_nodes": 2}, {"window": 50}, {"shuffle": False}]:
        other = build(recipe.model_copy(update=change), streams, 0, None)
        assert other.report.order != plan.report.order, change
        assert other.report.recipe != recipe.hash
    assert build(recipe, streams, 1, plan.packs).report.order != plan.report.order


def test_the_differences_name_what_changed():
    streams = [make_stream("a", 500)]
    recipe = make_recipe(streams)
    before = make_recipe([make_stream("a", 400, repeat=2.0)], seed=7).model_dump()
    message = recipe.differences(before)
    assert "seed: 7, now 0" in message
    assert "streams.a.samples: 400, now 500" in message
    assert "streams.a.weight.repeat: 2.0, now nothing" in message
    assert "window" not in message


def test_the_order_of_the_streams_is_part_of_the_plan():
    a, b = make_stream("a", 50), make_stream("b", 50)
    one, other = make_recipe([a, b]), make_recipe([b, a])
    assert one.hash != other.hash
    assert one.differences(other.model_dump()) == "the order of the streams"


def test_without_shuffle_samples_come_in_their_order_window_by_window():
    streams = [make_stream("a", 400)]
    plan = build(make_recipe(streams, shuffle=False, global_batch=1), streams, 0, None)
    firsts = [pack[0] for pack in samples_of(plan)]
    assert firsts == sorted(firsts)
    windows = plan.ids.astype(int) // 100
    assert (np.diff(windows) >= 0).all()


def test_with_shuffle_samples_and_packs_are_mixed():
    streams = [make_stream("a", 4000)]
    plan = build(make_recipe(streams, window=4000), streams, 0, None)
    positions = np.empty(4000)
    positions[plan.ids] = np.arange(len(plan.ids))
    assert abs(np.corrcoef(np.arange(4000), positions)[0, 1]) < 0.2
    lengths = [len(pack) for pack in samples_of(plan)]
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]) < 0.2


def test_packs_are_shuffled_anew_for_each_seed_epoch_row_and_window():
    recipe, lengths = make_recipe([make_stream("a", 200)]), np.full(200, LENGTH, np.uint32)  # a sample a pack

    def shuffled(seed: int = 0, epoch: int = 0, row: int = 0) -> list[int]:
        ids, _ = _pack_row(np.arange(200), lengths, recipe.model_copy(update={"seed": seed}), epoch, row)
        return ids.tolist()

    orders = [shuffled(), shuffled(seed=1), shuffled(epoch=1), shuffled(row=1), [n - 100 for n in shuffled()[100:]]]
    assert len({tuple(order[:100]) for order in orders}) == len(orders)
    assert shuffled() == orders[0]


def test_a_canonical_row_reads_its_own_shards():
    """Packs are dealt to nodes in turn, so with as many rows as nodes few shards are read by two nodes."""
    streams = [make_stream("a", 17 * 40)]
    plan = build(make_recipe(streams, canonical_nodes=2, global_batch=2), streams, 0, None)
    shards = [set((np.concatenate(samples_of(plan)[node::2]) // 17).tolist()) for node in range(2)]
    assert len(shards[0] & shards[1]) <= 1


@pytest.mark.parametrize(
    ("samples", "settings", "found"),
    [
        (3, {"global_batch": 16}, r"3 samples of \d+ tokens make [123] packs .* at least 16"),
        (3, {"canonical_nodes": 5}, "3 samples an epoch do not make canonical_nodes: 5 rows"),
    ],
)
def test_too_little_data_is_an_error_with_the_figures(samples, settings, found):
    streams = [make_stream("a", samples)]
    with pytest.raises(ConfigError, match=found):
        build(make_recipe(streams, **settings), streams, 0, None)


def test_a_stream_of_over_long_samples_alone_is_an_error():
    streams = [make_stream("a", 100), StreamSamples("b", np.array([2]), np.array([65, 70], np.uint32), np.zeros(2, np.uint32), {})]
    with pytest.raises(ConfigError, match=r"stream 'b': each of its 2 samples is longer than packed_length: 64 .*65 tokens"):
        build(make_recipe(streams), streams, 0, None)


def test_weights_that_choose_nothing_are_an_error():
    streams = [make_stream("a", 100, choose=0)]
    with pytest.raises(ConfigError, match="choose no sample"):
        build(make_recipe(streams), streams, 0, None)


def test_a_saved_plan_is_the_plan_and_is_made_once(tmp_path):
    streams = [make_stream("a", 500)]
    recipe = make_recipe(streams)
    asked = []

    def lengths():
        asked.append(1)
        return streams

    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: load_or_build(tmp_path, recipe, 1, lengths), range(4)))
    assert len(asked) == 2, "epoch 0, which the number of packs is from, and epoch 1"
    expected = build(recipe, streams, 1, build(recipe, streams, 0, None).packs)
    for plan in plans:
        assert samples_of(plan) == samples_of(expected)
        assert plan.report == expected.report
        assert isinstance(plan.ids, np.memmap)
    assert [path.name for path in tmp_path.glob("**/.aside-*")] == []


WORLDS = [(1, 1, 1), (1, 2, 1), (2, 2, 3), (1, 4, 2), (4, 3, 5), (3, 4, 7), (12, 1, 2), (1, 12, 0)]


@pytest.mark.parametrize(("nodes", "ranks_per_node", "workers"), WORLDS)
@pytest.mark.parametrize("seen", [0, 36])
def test_a_global_batch_is_a_stretch_of_the_plan_on_every_world(nodes, ranks_per_node, workers, seen):
    packs, group = 120, 12
    ranks = nodes * ranks_per_node
    share = group // ranks
    batches: list[list[int]] = [[] for _ in range((packs - seen) // group)]
    for rank in range(ranks):
        shape = {"nodes": nodes, "ranks_per_node": ranks_per_node, "rank": rank, "batch_packs": share}
        per_worker = [
            partition(packs, seen, **shape, worker=worker, workers=max(workers, 1)).reshape(-1, share).tolist()
            for worker in range(max(workers, 1))
        ]
        for number, batch in enumerate(batches):  # a DataLoader asks its workers in turn
            turn, worker = divmod(number, max(workers, 1))
            batch += per_worker[worker][turn]
    assert [sorted(batch) for batch in batches] == [list(range(b, b + group)) for b in range(seen, packs, group)]


def test_a_plan_prints_its_realised_shares():
    streams = [make_stream("captions", 300), make_stream("b", 100)]
    table = build(make_recipe(streams, global_batch=1), streams, 0, None).report.table().splitlines()
    assert len({len(line) for line in table[:3]}) == 1, "aligned"
    assert table[1].startswith("captions")
    assert "75.0%" in table[1]
    assert "packs" in table[3]
