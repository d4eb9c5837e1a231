"""Every global batch holds the epoch's mixture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.plans import make_recipe, make_stream, samples_of
from unitoken.common.errors import ConfigError
from unitoken.streaming_data.plan.batches import Surplus, deal, schedule_turns
from unitoken.streaming_data.plan.build import Plan, build
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.mixing import mix
from unitoken.streaming_data.plan.packing import pack
from unitoken.streaming_data.plan.recipe import Recipe, StreamRecipe

SAMPLES = 131_072
LONGEST = {"text": 4000, "questions": 1500, "drawings": 500}
MIXTURES = [  # of docs/BENCHMARKS.md; samples of each stream, packed length
    ({"text": 0.30, "questions": 0.35, "drawings": 0.35}, 4096),
    ({"text": 0.30, "questions": 0.35, "drawings": 0.35}, 8192),
    ({"questions": 0.5, "drawings": 0.5}, 4096),
]


def lengths_of(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw lengths; an image takes 1,060 tokens, its features 730."""
    mean, sd, base = {"text": (5.8, 0.9, 0), "questions": (4.3, 0.8, 1790), "drawings": (3.8, 0.6, 1060)}[
        kind
    ]
    return (base + rng.lognormal(mean, sd, count).clip(10, LONGEST[kind])).astype(np.uint32)


def mixture(parts: dict[str, float], length: int, samples: int = SAMPLES) -> list[StreamSamples]:
    rng = np.random.default_rng(0)
    streams = []
    for kind, part in parts.items():
        lengths = np.minimum(lengths_of(kind, int(samples * part), rng), length)
        code = ["text", "questions", "drawings"].index(kind)
        shards = np.full(len(lengths) // 1000 + 1, 1000)
        shards[-1] = len(lengths) - shards[:-1].sum()
        images = np.full(len(lengths), code == 1, np.uint16)
        streams.append(
            StreamSamples(
                kind,
                shards,
                lengths,
                lengths // np.uint32(2),
                images,
                np.full(len(lengths), code, np.uint8),
                {},
            )
        )
    return streams


def recipe_of(streams: list[StreamSamples], length: int, **settings: object) -> Recipe:
    fields = {
        "seed": 0,
        "global_batch": 64,
        "canonical_nodes": 1,
        "window": SAMPLES,
        "shuffle": True,
        **settings,
    }
    recipes = {s.name: StreamRecipe(dataset="d", samples=len(s.lengths), weight={}) for s in streams}
    return Recipe.model_validate(
        {"packed_length": length, "continuous": "none", "views": None, "streams": recipes, **fields}
    )


def shares(plan: Plan, streams: list[StreamSamples], batch: int) -> np.ndarray:
    """Return the shares of the tokens, (streams, batches), counted sample by sample."""
    lengths = np.concatenate([s.lengths for s in streams]).astype(np.int64)
    stream = np.repeat(np.arange(len(streams)), [len(s.lengths) for s in streams])
    batches = np.repeat(np.arange(plan.packs) // batch, np.diff(plan.offsets.astype(np.int64)))
    tokens = np.stack(
        [np.bincount(batches, lengths[plan.ids] * (stream[plan.ids] == n)) for n in range(len(streams))]
    )
    return tokens / tokens.sum(axis=0)


def filled_at_random(streams: list[StreamSamples], length: int, batch: int = 64) -> np.ndarray:
    """Return (streams, batches) for packs filled with documents in their order until one does not fit."""
    lengths = np.concatenate([s.lengths for s in streams]).astype(np.int64)
    stream = np.repeat(np.arange(len(streams)), [len(s.lengths) for s in streams])
    order = np.random.default_rng(1).permutation(len(lengths))
    packs, room, pack = np.empty(len(order), np.int64), length, 0
    for place, one in enumerate(lengths[order].tolist()):
        if one > room:
            room, pack = length, pack + 1
        room -= one
        packs[place] = pack
    kept = packs < pack // batch * batch
    count = pack // batch
    tokens = [
        np.bincount(packs[kept] // batch, (lengths[order] * (stream[order] == n))[kept], count)
        for n in range(len(streams))
    ]
    return np.stack(tokens) / np.sum(tokens, axis=0)


@pytest.mark.parametrize(("parts", "length"), MIXTURES)
@pytest.mark.parametrize("nodes", [1, 8])
def test_stratified_batches_scatter_a_third_as_much_as_random(
    parts: dict[str, float], length: int, nodes: int
) -> None:
    streams = mixture(parts, length)
    stratified = build(recipe_of(streams, length, canonical_nodes=nodes), streams, 0, None)
    random = build(
        recipe_of(streams, length, canonical_nodes=nodes, batching_method="random"), streams, 0, None
    )
    found = shares(stratified, streams, 64)
    assert (found.std(axis=1) <= filled_at_random(streams, length).std(axis=1) / 3).all()
    assert stratified.report.fill == pytest.approx(random.report.fill, abs=0.001)
    for stream, row in zip(stratified.report.streams, found, strict=True):
        assert stream.in_batches is not None
        figures = (
            stream.in_batches.mean,
            stream.in_batches.sd,
            stream.in_batches.least,
            stream.in_batches.most,
        )
        assert figures == pytest.approx((row.mean(), row.std(), row.min(), row.max()))


@pytest.mark.parametrize(("parts", "length"), MIXTURES)
def test_independent_sd_is_that_of_packs_filled_at_random(parts: dict[str, float], length: int) -> None:
    streams = mixture(parts, length)
    report = build(recipe_of(streams, length), streams, 0, None).report
    filled = filled_at_random(streams, length)
    for stream, row in zip(report.streams, filled, strict=True):
        assert stream.in_batches is not None
        # Packs filled at random are emptier, so a batch of them has fewer documents.
        assert stream.in_batches.independent_sd == pytest.approx(row.std(), rel=0.25)


@pytest.mark.parametrize("window", [4096, 8192])
def test_a_batch_across_two_windows_holds_the_mixture(window: int) -> None:
    """Windows of 17 and 35 batches: each has its border."""
    streams = mixture(MIXTURES[0][0], 4096, 30_000)
    plan = build(recipe_of(streams, 4096, window=window), streams, 0, None)
    assert (shares(plan, streams, 64).std(axis=1) <= filled_at_random(streams, 4096).std(axis=1) / 3).all()


def test_later_epochs_hold_the_mixture_in_another_order() -> None:
    streams = mixture(MIXTURES[0][0], 4096, 30_000)
    recipe = recipe_of(streams, 4096)
    first = build(recipe, streams, 0, None)
    limit = filled_at_random(streams, 4096).std(axis=1) / 3
    for epoch in (1, 2):
        plan = build(recipe, streams, epoch, first.report)
        assert (shares(plan, streams, 64).std(axis=1) <= limit).all()
        assert plan.report.order != first.report.order


def test_kinds_inside_a_stream_are_dealt_too() -> None:
    (stream,) = [make_stream("both", 4000)]
    plan = build(make_recipe([stream], window=4000, global_batch=16), [stream], 0, None)
    batches = np.repeat(np.arange(plan.packs) // 16, np.diff(plan.offsets.astype(np.int64)))
    lengths, kinds = stream.lengths[plan.ids].astype(np.int64), stream.kinds[plan.ids]
    of_kind = np.stack([np.bincount(batches, lengths * (kinds == kind)) for kind in range(3)])
    assert ((of_kind / of_kind.sum(axis=0)).std(axis=1) < 0.02).all()


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(("nodes", "batch"), [(1, 4), (2, 4), (3, 4), (4, 2)])
def test_per_stream_batches_hold_one_stream_and_nothing_is_lost(nodes: int, batch: int, epoch: int) -> None:
    streams = [make_stream("a", 500), make_stream("b", 1333, seed=1), make_stream("none", 50, choose=0)]
    recipe = make_recipe(streams, canonical_nodes=nodes, global_batch=batch, batching_method="per_stream")
    first = build(recipe, streams, 0, None)
    plan = build(recipe, streams, epoch, first.report)
    assert plan.packs == first.packs
    of_batches = []
    for begin in range(0, plan.packs, batch):
        ids = plan.ids[int(plan.offsets[begin]) : int(plan.offsets[begin + batch])]
        assert len({int(sample >= 500) for sample in ids}) == 1
        of_batches.append(int(ids[0] >= 500))
    assert set(Counter(plan.ids.tolist()).values()) == {1}
    assert len(plan.ids) + plan.report.dropped_samples == 1833
    half = len(of_batches) // 2
    assert abs(np.mean(of_batches[:half]) - np.mean(of_batches[half:])) < 0.1, (
        "in proportion all along the epoch"
    )


def test_with_per_stream_a_stream_without_a_batch_is_named() -> None:
    streams = [make_stream("a", 500), make_stream("few", 3)]
    with pytest.raises(
        ConfigError, match=r"stream 'few': its samples make \d packs .* per_stream an epoch needs at least 4"
    ):
        build(make_recipe(streams, batching_method="per_stream"), streams, 0, None)


@pytest.mark.parametrize(
    ("nodes", "recipe_hash", "orders"),
    [
        (1, "f788bb9a5e58bae7", ["98b5ef8a6ba17ef2", "8d5c5998d230c188"]),
        (3, "bdba2edeec3721b6", ["326a0d221ab47910", "12df52c933216c3f"]),
    ],
)
def test_version_2_plans_stay_the_same(nodes: int, recipe_hash: str, orders: list[str]) -> None:
    """The hashes were recorded with the code before batches were stratified."""
    streams = [make_stream("a", 500), make_stream("b", 333, seed=1)]
    recipe = make_recipe(streams, canonical_nodes=nodes).of_version_2()
    assert recipe.hash == recipe_hash
    first = build(recipe, streams, 0, None)
    assert [first.report.order, build(recipe, streams, 1, first.report).report.order] == orders


def test_another_method_is_another_plan() -> None:
    streams = [make_stream("a", 500), make_stream("b", 333, seed=1)]
    methods = ("stratified", "random", "per_stream")
    recipes = [make_recipe(streams, batching_method=method, global_batch=40) for method in methods]
    assert len({recipe.hash for recipe in recipes}) == 3
    assert len({build(recipe, streams, 0, None).report.order for recipe in recipes}) == 3
    packs = [Counter(map(tuple, samples_of(build(recipe, streams, 0, None)))) for recipe in recipes[:2]]
    assert sum((packs[0] - packs[1]).values()) <= 40, (
        "the same packs, but for those at the end that no batch holds"
    )


@given(
    columns=st.integers(1, 5),
    packs=st.integers(1, 300),
    first=st.integers(0, 50),
    batch=st.integers(1, 40),
    largest=st.integers(0, 5000),
    seed=st.integers(0, 100),
)
def test_dealing_is_a_permutation_and_always_the_same(
    columns: int, packs: int, first: int, batch: int, largest: int, seed: int
) -> None:
    amounts = np.random.default_rng(seed).integers(0, largest + 1, (columns, packs))
    order = deal(amounts, first, batch, Surplus(columns), "window", seed)
    assert sorted(order.tolist()) == list(range(packs))
    assert order.tolist() == deal(amounts, first, batch, Surplus(columns), "window", seed).tolist()


def test_the_place_in_the_epoch_is_independent_of_the_pack() -> None:
    """Over many seeds each pack is in each batch about equally often."""
    amounts = np.random.default_rng(0).integers(0, 100, (2, 40))
    found = np.zeros((40, 4))
    for seed in range(800):
        found[deal(amounts, 0, 10, Surplus(2), seed), np.arange(40) // 10] += 1
    assert abs(found / 800 - 0.25).max() < 0.08


def test_turns_are_spread_evenly() -> None:
    turns = schedule_turns([30, 10, 0, 60], "name")
    assert np.bincount(turns).tolist() == [30, 10, 0, 60]
    for begin in range(0, 100, 20):
        assert abs(np.count_nonzero(turns[begin : begin + 20] == 3) - 12) <= 2


@pytest.mark.parametrize(
    ("parts", "length", "batch"),
    [
        (*one, batch) for one in MIXTURES for batch in (8, 16, 32) if (one[1], batch) != (8192, 8)
    ],  # that is 40 documents a batch
)
def test_small_batches_hold_the_mixture_by_mixing_documents(
    parts: dict[str, float], length: int, batch: int
) -> None:
    streams = mixture(parts, length, 16_384)
    plan = build(recipe_of(streams, length, global_batch=batch), streams, 0, None)
    assert (
        shares(plan, streams, batch).std(axis=1) <= filled_at_random(streams, length, batch).std(axis=1) / 3
    ).all()
    random = build(recipe_of(streams, length, global_batch=batch, batching_method="random"), streams, 0, None)
    assert plan.report.fill == pytest.approx(random.report.fill, abs=0.001)
    assert plan.packs == random.packs


@given(
    longest=st.integers(1, 100),
    count=st.integers(2, 400),
    kinds=st.integers(1, 4),
    capacity=st.integers(100, 300),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_mixing_keeps_the_samples_and_the_number_of_packs(
    longest: int, count: int, kinds: int, capacity: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    lengths, cells = rng.integers(1, longest + 1, count), rng.integers(0, kinds, count)
    order, sizes = pack(lengths.astype(np.uint32), capacity)
    lengths, cells, before = lengths[order], cells[order], np.repeat(np.arange(len(sizes)), sizes)
    after = mix(lengths, cells, before, capacity, "window", seed)
    assert len(np.unique(after)) == len(sizes)
    assert np.bincount(after, lengths).max() <= capacity
    assert after.tolist() == mix(lengths, cells, before, capacity, "window", seed).tolist()
