"""Which tokens the grammar of replies allows."""

import numpy as np
import torch

from support.small_datasets import small_vocabulary
from unitoken.generation.grammar import Grammar, GrammarSteps

CPU = torch.device("cpu")


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
