"""The sampling of tokens from logits, and the grammar."""

import numpy as np
import torch

from support.small_datasets import small_vocabulary
from unitoken.train.generation.sampling import Grammar, GrammarSteps, generator_of, guided, sample

CPU = torch.device("cpu")
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def draws(count: int, temperature: float, top_k: int | None = None) -> np.ndarray:
    rows = LOGITS.expand(count, -1)
    return sample(rows, temperature, top_k, [generator_of(0, number) for number in range(count)]).numpy()


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
    assert set(sample(logits, 1.0, None, [generator_of(1, n) for n in range(4000)]).tolist()) == {1, 2}


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


def walk(turn: GrammarSteps, *tokens: int) -> list[int]:
    """The ids that may follow the tokens; empty if the turn is over."""
    choices = next(turn)
    try:
        for token in tokens:
            assert token in choices.ids
            choices = turn.send(token)
    except StopIteration:
        return []
    return choices.ids.tolist()


def test_the_widths_depend_on_the_height() -> None:
    vocabulary = small_vocabulary()
    grammar = Grammar(vocabulary, [(2, 4), (2, 6), (8, 2)], CPU)
    grid = vocabulary.grid_ids
    assert walk(grammar.drawing()) == [vocabulary.image_start]
    assert walk(grammar.drawing(), vocabulary.image_start) == [grid[0], grid[3]]
    assert walk(grammar.drawing(), vocabulary.image_start, grid[0]) == [grid[1], grid[2]]
    assert walk(grammar.drawing(), vocabulary.image_start, grid[3]) == [grid[0]]


def test_text_follows_a_complete_block_only() -> None:
    vocabulary = small_vocabulary()
    grammar = Grammar(vocabulary, [(2, 2)], CPU)
    block = vocabulary.image_block(np.array([[1, 2], [3, 4]])).tolist()
    for end in range(1, len(block)):
        assert block[end] in walk(grammar.turn(99), 5, *block[:end])
        assert 5 not in walk(grammar.turn(99), 5, *block[:end])
    assert walk(grammar.drawing(), *block) == []
    after = walk(grammar.turn(99), 5, *block)
    assert {5, vocabulary.end_of_turn, vocabulary.image_start} < set(after)
    assert not set(after) & (vocabulary.special_ids - {vocabulary.end_of_turn, vocabulary.image_start})
    assert walk(grammar.turn(99), 5, *block, vocabulary.end_of_turn) == []
    assert walk(grammar.turn(1 + len(block)), 5, *block) == []
    assert vocabulary.image_start not in walk(Grammar(vocabulary, [], CPU).turn(9))
