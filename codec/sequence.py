"""Conversation + image codes -> `Record`, without any files or model.

<s>  human's text and images  end-of-turn  |  assistant's text and images  end-of-turn  |  ...
not trained on                             |  trained on, including the end-of-turn     |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.codec.conversations import Conversation, ItemError
from unitoken.codec.text import TextEncoder
from unitoken.dataset.record import Record, spans_of, token_type
from unitoken.dataset.vocabulary import Vocabulary


def assemble(
    conversation: Conversation,
    codes: Sequence[npt.NDArray[np.integer[Any]]],
    originals: Sequence[bytes],
    text: TextEncoder,
    vocabulary: Vocabulary,
) -> Record:
    """Build the record of a conversation to train on.

    Args:
        conversation: the checked item.
        codes: of each image in the conversation's order, shape (h, w).
        originals: the encoded bytes of each image, in the same order.
        text: encodes the texts.
        vocabulary: gives the tokens of image codes and the special tokens.

    Raises:
        ItemError: there is nothing to train on.
    """
    record = lay_out(conversation, codes, originals, text, vocabulary)
    if not len(record.target_spans):
        raise ItemError("nothing to train on: no assistant turn has a text")
    return record


def lay_out(
    conversation: Conversation,
    codes: Sequence[npt.NDArray[np.integer[Any]]],
    originals: Sequence[bytes],
    text: TextEncoder,
    vocabulary: Vocabulary,
) -> Record:
    """Build the record of a prompt: as `assemble`, but there may be nothing to train on."""
    pieces: list[npt.NDArray[np.int64]] = [np.array([vocabulary.bos])]
    trained = [False]
    image_spans: list[tuple[int, int, int, int]] = []
    length = 1
    remaining = iter(codes)

    def add(ids: Sequence[int] | npt.NDArray[np.int64], train: bool) -> None:
        nonlocal length
        pieces.append(np.asarray(ids, np.int64))
        trained.append(train)
        length += len(ids)

    for turn in conversation.turns:
        for number, segment in enumerate(turn.segments):
            if number:
                image = next(remaining)
                start = length
                add(vocabulary.image_block(image), turn.trained)
                image_spans.append((start, length, *image.shape))
            add(text.encode(segment, start=len(pieces) == 1), turn.trained)
        add([vocabulary.end_of_turn], turn.trained)
    assert next(remaining, None) is None, "an image without a place in the text"

    target_spans = spans_of(np.repeat(trained, [len(piece) for piece in pieces]))
    return Record(
        id=conversation.id,
        tokens=np.concatenate(pieces).astype(token_type(vocabulary.size)),
        target_spans=target_spans,
        image_spans=np.array(image_spans, np.uint32).reshape(-1, 4),
        images=tuple(originals),
    )


def check_length(tokens: int, limit: int | None, what: str = "tokens") -> None:
    """Raise ItemError for more than `limit` tokens; None allows any number."""
    if limit is not None and tokens > limit:
        raise ItemError(f"too long: {tokens} {what}, max_tokens is {limit}")
