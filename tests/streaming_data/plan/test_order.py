"""What an epoch takes of each stream, and in which order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.order import choose_samples, epoch_amounts, random_bits, rows_of, windows_of


def make_stream(
    name: str, samples: int, mean: float, shard: int = 100, gaps: int = 0, **weight: float
) -> StreamSamples:
    rng = np.random.default_rng(list(name.encode()))
    lengths = np.clip(rng.lognormal(np.log(mean), 0.8, samples), 1, 4096).astype(np.uint32)
    if gaps:
        lengths[::gaps] = 0
    shards = np.full(-(-samples // shard), shard)
    shards[-1] -= shards.sum() - samples
    return StreamSamples(
        name,
        shards,
        lengths,
        lengths // np.uint32(3),
        np.zeros(samples, np.uint16),
        np.zeros(samples, np.uint8),
        weight,
    )


def taken(
    streams: list[StreamSamples], wanted: list[float], unit: str, epoch: int = 0, shuffle: bool = True
) -> list[np.ndarray]:
    chosen = [
        choose_samples(stream, amount, unit, 0, epoch, shuffle)
        for stream, amount in zip(streams, wanted, strict=True)
    ]
    return [c.ids(0, c.count) for c in chosen]


@given(start=st.integers(0, 100), count=st.integers(0, 50))
def test_random_numbers_do_not_depend_on_the_start(start: int, count: int) -> None:
    assert (
        random_bits(count, "a", 1, start=start).tolist()
        == random_bits(200, "a", 1)[start : start + count].tolist()
    )


def test_random_numbers_do_not_depend_on_numpys_version() -> None:
    assert random_bits(4, "places", 0, 1, "a").tolist() == FOUR
    assert random_bits(4, "places", 0, 2, "a").tolist() != FOUR


FOUR = [4253560133, 4109494157, 3225351901, 3570746366]


@pytest.mark.parametrize("unit", ["tokens", "target_tokens"])
@pytest.mark.parametrize("size", [None, ("tokens", 50_000_000), ("samples", 60_000)])
def test_shares_of_tokens_are_those_of_the_weights(unit: str, size: tuple[str, int] | None) -> None:
    """Four streams of very different lengths; one of them is taken several times over."""
    streams = [
        make_stream("long", 30_000, 2000, proportion=40),
        make_stream("short", 100_000, 60, proportion=30),
        make_stream("tiny", 3_000, 15, proportion=1),
        make_stream("middle", 50_000, 400, gaps=3, proportion=29),
    ]
    ids = taken(streams, epoch_amounts(streams, unit, size), unit)
    of = {"tokens": [s.lengths for s in streams], "target_tokens": [s.target_tokens for s in streams]}
    sums = np.array([values[i].sum(dtype=np.int64) for values, i in zip(of[unit], ids, strict=True)])
    assert sums / sums.sum() == pytest.approx(np.array([0.40, 0.30, 0.01, 0.29]), rel=1e-3)
    if size:
        size_of = sum(
            len(i) if size[0] == "samples" else s.lengths[i].sum(dtype=np.int64)
            for s, i in zip(streams, ids, strict=True)
        )
        assert size_of == pytest.approx(
            size[1], rel=1e-3 if size[0] == "tokens" else 1e-2
        )  # a random subset is not quite average


def test_choose_counts_in_the_mixtures_unit_and_repeat_in_passes() -> None:
    streams = [
        make_stream("a", 5000, 100, choose=123_456),
        make_stream("b", 500, 100, repeat=2.5),
        make_stream("c", 100, 50),
    ]
    a, b, c = taken(streams, epoch_amounts(streams, "tokens", None), "tokens")
    assert int(streams[0].lengths[a].sum()) == pytest.approx(123_456, abs=4096)
    assert int(streams[1].lengths[b].sum()) == pytest.approx(2.5 * int(streams[1].lengths.sum()), abs=4096)
    assert sorted(c) == list(range(100))
    assert set(np.bincount(b)) == {2, 3}


def test_without_weights_a_sized_epoch_keeps_the_natural_mixture() -> None:
    streams = [make_stream("a", 900, 100), make_stream("b", 100, 100)]
    assert epoch_amounts(streams, "samples", ("samples", 500)) == [450, 50]
    assert epoch_amounts(streams, "samples", None) == [900, 100]


def test_whole_samples_add_up_to_the_epoch() -> None:
    streams = [make_stream(name, 100, 100, proportion=1) for name in "abc"]
    assert sum(epoch_amounts(streams, "samples", ("samples", 1000))) == 1000


def test_random_subsets_differ_by_epoch_and_repeat_no_sample() -> None:
    stream = make_stream("a", 1000, 100, gaps=4)
    parts = [taken([stream], [300], "samples", epoch)[0].tolist() for epoch in range(3)]
    assert [len(set(part)) for part in parts] == [300] * 3
    assert len({tuple(sorted(part)) for part in parts}) == 3
    assert all(stream.lengths[sample] for part in parts for sample in part)


@given(
    samples=st.integers(1, 500),
    gaps=st.integers(0, 5),
    share=st.floats(0.01, 4),
    rows=st.integers(1, 3),
    window=st.integers(5, 300),
    shuffle=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_windows_of_all_rows_hold_what_was_chosen(
    samples: int, gaps: int, share: float, rows: int, window: int, shuffle: bool
) -> None:
    streams = [
        make_stream("a", samples, 100, shard=7, gaps=gaps if gaps > 1 else 0),
        make_stream("b", 50, 10, shard=20),
    ]
    total = streams[0].total("samples")
    chosen = [] if not total else [choose_samples(streams[0], round(share * total), "samples", 3, 1, shuffle)]
    chosen.append(choose_samples(streams[1], 50, "samples", 3, 1, shuffle))
    streams = streams[-len(chosen) :]
    found = [
        (ids, lengths)
        for row in rows_of(chosen, rows, window)
        for ids, lengths in windows_of(streams, chosen, row, 3, 1, shuffle)
    ]
    offsets = [0, len(streams[0].lengths)]
    expected = sorted(
        int(i) + offset for c, offset in zip(chosen, offsets, strict=False) for i in c.ids(0, c.count)
    )
    assert sorted(int(i) for ids, _ in found for i in ids) == expected
    all_lengths = np.concatenate([stream.lengths for stream in streams])
    for ids, lengths in found:
        assert lengths.tolist() == all_lengths[ids].tolist()


def test_windows_do_not_depend_on_the_stretch() -> None:
    streams = [make_stream("a", 5000, 100), make_stream("b", 1000, 10)]
    chosen = [choose_samples(stream, len(stream.lengths), "samples", 0, 0, True) for stream in streams]
    found = []
    for stretch in (1, 1000, 1 << 20):
        windows = windows_of(
            streams, chosen, rows_of(chosen, 1, 300)[0], 0, 0, True, shuffle_block=700, stretch=stretch
        )
        found.append([ids.tolist() for ids, _ in windows])
    assert len(found[0]) == 20
    assert found[0] == found[1] == found[2]


def test_every_stretch_of_an_epoch_holds_the_mixture() -> None:
    """Shards are as large as two windows: in one shuffled list, some windows would hold one stream."""
    streams = [make_stream("a", 8000, 100, shard=2000), make_stream("b", 24000, 10, shard=2000)]
    chosen = [choose_samples(stream, len(stream.lengths), "samples", 0, 0, True) for stream in streams]
    row = rows_of(chosen, 1, 1000)[0]
    for ids, _ in windows_of(streams, chosen, row, 0, 0, True, shuffle_block=2000):
        assert (ids < 8000).mean() == pytest.approx(0.25, abs=0.06)
        assert len(ids) == pytest.approx(1000, abs=150)


def test_few_shards_are_in_use_at_a_time() -> None:
    stream = make_stream("a", 20_000, 100, shard=100)  # 200 shards, a block of 10
    chosen = [choose_samples(stream, 20_000, "samples", 0, 0, True)]
    row = rows_of(chosen, 1, 500)[0]
    for ids, _ in windows_of([stream], chosen, row, 0, 0, True, shuffle_block=1000):
        assert 5 < len(np.unique(ids // 100)) <= (1000 + 500) / 100 + 2
