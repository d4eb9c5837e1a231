"""Records as text: what a person looks at before training, and what is trained on in it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import SPECIAL_NAMES, Vocabulary


class Passage(NamedTuple):
    """Successive tokens of a record, as text."""

    kind: Literal["text", "special", "image"]
    text: str  # a special token's name; `[image HxW]` in latents
    trained: bool  # whether the tokens are trained on


def describe(record: Record, vocabulary: Vocabulary, tokenizer: Any) -> list[Passage]:
    """Cut a record into passages, in order."""
    trained = record.labels() >= 0
    special_names = names_of_turns(vocabulary, tokenizer)
    images = {
        int(start): (int(end), f"[image {height}x{width}]")
        for start, end, height, width in record.image_spans
    }

    def is_text(position: int) -> bool:
        return position not in images and int(record.tokens[position]) not in special_names

    passages: list[Passage] = []
    position = 0
    while position < len(record.tokens):
        token, is_trained = int(record.tokens[position]), bool(trained[position])
        if position in images:
            end, text = images[position]
            passages.append(Passage("image", text, is_trained))
        elif token in special_names:
            end = position + 1
            passages.append(Passage("special", special_names[token], is_trained))
        else:
            end = position
            while end < len(record.tokens) and is_text(end) and trained[end] == is_trained:
                end += 1
            ids = np.asarray(record.tokens[position:end], np.int64).tolist()
            passages.append(Passage("text", tokenizer.decode(ids), is_trained))
        position = end
    return passages


def names_of_turns(vocabulary: Vocabulary, tokenizer: Any) -> dict[int, str]:
    """Return the names of the special tokens that stand between turns, by their ids."""
    if vocabulary.layout is None:
        return {getattr(vocabulary, name): token for name, token in SPECIAL_NAMES.items()}
    names = {token: name for name, token in vocabulary.layout.names}
    ids = vocabulary.conversation.special_ids()
    return {token: names.get(token) or tokenizer.convert_ids_to_tokens(token) for token in ids}
