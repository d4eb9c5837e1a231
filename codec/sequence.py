"""Conversation + image codes -> `Record`, without any files or model.

The vocabulary's layout (dataset/layout.py) says what stands around the turns. In Chameleon's:

<s>  human's text and images  end-of-turn  |  assistant's text and images  end-of-turn  |  ...
not trained on                             |  trained on, including the end-of-turn     |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.codec.conversations import Conversation, ItemError, Turn
from unitoken.codec.text import TextEncoder
from unitoken.dataset.layout import Pieces, TurnLayout
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
    """Build the record of a prompt: as `assemble`, but there may be nothing to train on.

    A conversation that ends with a human's turn gets the opening of the reply.

    Raises:
        ItemError: a system turn in a layout without them.
    """
    layout = vocabulary.conversation
    tokens = _Tokens(text, vocabulary, iter(codes))
    turns, system = conversation.turns, conversation.system
    check_system_turn(conversation, vocabulary)
    if system is not None and layout.system is not None:
        tokens.add_turn(system, layout.system)
    for number, turn in enumerate(turns):
        if turn.trained:
            pattern = layout.last_assistant if number == len(turns) - 1 else layout.assistant
        elif number:
            pattern = layout.later_human
        else:
            pattern = layout.human if system is None else layout.human_after_system or layout.later_human
        tokens.add_turn(turn, pattern)
    if not turns[-1].trained:
        tokens.add(layout.last_assistant.opening, trained=False)
    return tokens.record(conversation.id, originals)


def check_system_turn(conversation: Conversation, vocabulary: Vocabulary) -> None:
    """Raise ItemError for a system turn in a layout without them."""
    if conversation.system is not None and vocabulary.conversation.system is None:
        raise ItemError(
            f"system turn: the layout '{vocabulary.layout_name}' has none; "
            "`system: prepend` puts its text before the first question"
        )


class _Tokens:
    """The tokens of a conversation under construction.

    Text is kept until a special token or an image follows, and then encoded as a whole: the words of a layout
    and of a turn beside it may share a token, as they do in the whole text.
    """

    def __init__(
        self,
        text: TextEncoder,
        vocabulary: Vocabulary,
        codes: Iterator[npt.NDArray[np.integer[Any]]],
    ) -> None:
        self._text, self._vocabulary, self._codes = text, vocabulary, codes
        self._pieces: list[npt.NDArray[np.int64]] = []
        self._trained: list[bool] = []
        self._image_spans: list[tuple[int, int, int, int]] = []
        self._length = 0
        self._run: list[tuple[str, bool]] = []  # text that is not encoded yet, and whether it is trained on
        self._at_start = True  # no text was encoded yet, and no image

    def add_turn(self, turn: Turn, pattern: TurnLayout) -> None:
        """Add a turn with what the layout puts around it."""
        self.add(pattern.opening, trained=False)
        segments = pattern.stripped(turn.segments)
        if segments[0] or len(segments) == 1:  # not before an image
            self.add(pattern.lead, turn.trained)
        for number, segment in enumerate(segments):
            if number:
                self._add_image(turn.trained)
            self._run.append((segment, turn.trained))
        self.add(pattern.closing, turn.trained)
        self.add(pattern.trailing, trained=False)

    def add(self, pieces: Pieces, trained: bool) -> None:
        """Add special tokens and text of the layout."""
        for piece in pieces:
            if isinstance(piece, str):
                self._run.append((piece, trained))
            else:
                self._encode_run()
                self._append([piece], trained)

    def _add_image(self, trained: bool) -> None:
        self._encode_run()
        self._at_start = False
        image = next(self._codes)
        block = self._vocabulary.image_block(image)
        self._image_spans.append((self._length, self._length + len(block), *image.shape))
        self._append(block, trained)

    def _append(self, ids: Sequence[int] | npt.NDArray[np.int64], trained: bool) -> None:
        self._pieces.append(np.asarray(ids, np.int64))
        self._trained.append(trained)
        self._length += len(ids)

    def _encode_run(self) -> None:
        run, self._run = self._run, []
        if not run:
            return
        # The reference encodes the first text behind `<s>` as the beginning of a text.
        is_first = self._at_start if self._vocabulary.layout is None else self._length == 0
        start = is_first or self._vocabulary.conversation.text_starts_anew
        self._at_start = False
        text = "".join(part for part, _ in run)
        ids = self._text.encode(text, start)
        begin = end = length = 0
        for trained, parts in itertools.groupby(run, key=lambda part: part[1]):
            length += sum(len(part) for part, _ in parts)
            end = len(ids)
            if length < len(text):  # a token that two parts share is trained on
                end = max(begin, self._text.count_of_beginning(text, ids, length, start, shared=trained))
            self._append(ids[begin:end], trained)
            begin = end

    def record(self, name: str, originals: Sequence[bytes]) -> Record:
        """Return the record of what was added."""
        self._encode_run()
        assert next(self._codes, None) is None, "an image without a place in the text"
        target_spans = spans_of(np.repeat(self._trained, [len(piece) for piece in self._pieces]))
        return Record(
            id=name,
            tokens=np.concatenate(self._pieces).astype(token_type(self._vocabulary.size)),
            target_spans=target_spans,
            image_spans=np.array(self._image_spans, np.uint32).reshape(-1, 4),
            images=tuple(originals),
        )


def check_length(tokens: int, limit: int | None, what: str = "tokens") -> None:
    """Raise ItemError for more than `limit` tokens; None allows any number."""
    if limit is not None and tokens > limit:
        raise ItemError(f"too long: {tokens} {what}, max_tokens is {limit}")
