import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitoken.streaming_data.reading.balance import balance


@given(
    ranks=st.sampled_from([1, 2, 3, 8]),
    each=st.integers(1, 6),
    seed=st.integers(0, 100),
    images=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_pack_goes_to_one_rank_and_each_rank_gets_as_many(
    ranks: int, each: int, seed: int, images: int
) -> None:
    rng = np.random.default_rng(seed)
    squares = rng.integers(1, 1 << 24, ranks * each).astype(np.float32)
    dealt = balance(squares, rng.integers(0, 5, ranks * each) * images, ranks)
    assert dealt.shape == (ranks, each)
    assert sorted(dealt.reshape(-1).tolist()) == list(range(ranks * each))


@pytest.mark.parametrize(("ranks", "bound"), [(8, 1.1), (16, 1.2)])  # with 10 images a rank, one more is 1.1
def test_ranks_get_equal_images_and_equal_squares(ranks: int, bound: float) -> None:
    """Half of the packs hold text in documents of any length, half hold two or three images."""
    rng = np.random.default_rng(0)
    worst = {"dealt": [0.0, 0.0], "as they come": [0.0, 0.0]}
    for _ in range(20):
        of_images = rng.random(128) < 0.5
        images = np.where(of_images, rng.integers(2, 4, 128), 0)
        squares = np.where(of_images, rng.uniform(4e6, 8e6, 128), 4096.0 * rng.uniform(200, 4096, 128))
        for name, packs in {
            "dealt": balance(squares, images, ranks),
            "as they come": np.arange(128).reshape(-1, ranks).T,
        }.items():
            for n, loads in enumerate((squares, images)):
                of_ranks = loads[packs].sum(axis=1)
                worst[name][n] = max(worst[name][n], of_ranks.max() / of_ranks.mean())
    assert max(worst["dealt"]) < bound
    assert min(worst["as they come"]) > 1.25, "no need to balance: the test tests nothing"


def test_a_ranks_packs_come_from_heavy_to_light() -> None:
    squares = np.array([1.0, 9, 5, 3, 7, 2, 8, 4])
    for packs in balance(squares, np.zeros(8, int), 2):
        assert squares[packs].tolist() == sorted(squares[packs], reverse=True)
