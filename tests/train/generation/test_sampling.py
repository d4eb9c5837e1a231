"""The sampling of tokens from logits."""

import numpy as np
import torch

from unitoken.train.generation.sampling import RandomNumbers, generator_of, guided, sample

CPU = torch.device("cpu")
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def uniform_numbers(seed: int, count: int) -> torch.Tensor:
    """The first number (count, 1) of each of so many replies."""
    return torch.stack([RandomNumbers(seed, number, CPU).next() for number in range(count)])


def draws(count: int, temperature: float, top_k: int | None = None) -> np.ndarray:
    rows = LOGITS.expand(count, -1)
    return sample(rows, temperature, top_k, uniform_numbers(0, count)).numpy()


def test_tokens_are_sampled_by_their_probability() -> None:
    for temperature in (0.5, 1.0, 2.0):
        share = np.bincount(draws(20000, temperature), minlength=5) / 20000
        assert (
            np.abs(share - (LOGITS / temperature).softmax(-1).numpy()).max() < 0.012
        )  # three times the standard deviation


def test_top_k_and_temperature_0_keep_the_likeliest_tokens() -> None:
    assert set(draws(2000, 1.0, top_k=2)) == {1, 4}
    assert set(draws(2000, 5.0, top_k=9)) == {0, 1, 2, 3, 4}
    assert set(draws(50, 0.0)) == {1}


def test_no_token_of_probability_0_is_sampled() -> None:

    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(4000, -1)
    assert set(sample(logits, 1.0, None, uniform_numbers(1, 4000)).tolist()) == {1, 2}


def test_guidance_moves_away_from_the_null_prompt() -> None:
    logits, null = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])
    assert guided(logits, null, 1.0).tolist() == [1.0, 3.0]
    assert guided(logits, null, 0.0).tolist() == [2.0, 1.0]
    assert guided(logits, null, 4.0).tolist() == [-2.0, 9.0]


def test_each_prompt_has_its_own_random_numbers() -> None:
    assert torch.rand(3, generator=generator_of(1, 2)).equal(torch.rand(3, generator=generator_of(1, 2)))
    distinct = {
        float(torch.rand(1, generator=generator_of(seed, number))) for seed in range(9) for number in range(9)
    }
    assert len(distinct) == 81


def test_numbers_drawn_ahead_are_those_drawn_one_by_one() -> None:
    """So that the codes of an image need no more of the CPU, and drawings stay as they were."""
    ahead, singly = RandomNumbers(1, 2, CPU), RandomNumbers(1, 2, CPU)
    generator = generator_of(1, 2)
    ahead.draw_ahead(100)
    for _ in range(103):
        expected = torch.rand(1, generator=generator)
        assert ahead.next().equal(expected)
        assert singly.next().equal(expected)
