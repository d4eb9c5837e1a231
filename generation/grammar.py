"""The grammar of replies, which allows the next tokens.

A turn is text and images, up to the token that ends it. The block of an image follows its layout to the last
token. In Chameleon's:

    text ... image_start  height  width  codes, newline, ... image_end  text ... end_of_turn
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unitoken.dataset.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Choices:
    """The ids of which one comes next.

    Attributes:
        ids: (K,).
        first: the smallest of them.
        end: the largest, plus 1.
        of_image: whether they belong to an image.
        branches: whether the choices behind it depend on which one comes.
    """

    ids: Tensor
    first: int
    end: int
    of_image: bool
    branches: bool

    @property
    def forced(self) -> int | None:
        """The only id of choices that do not branch; None if there are several."""
        return self.first if len(self.ids) == 1 and not self.branches else None


# Yields the choices, and is sent the chosen id; any id where the choices do not branch.
GrammarSteps = Generator[Choices, int, None]


class ReplyPlace(NamedTuple):
    """Where in a reply the next token stands.

    Attributes:
        header: the ids of an image's header so far; None in text.
        behind: how many of the image's tokens behind its header are there.
    """

    header: tuple[int, ...] | None
    behind: int = 0


TEXT = ReplyPlace(None)
IMAGE = ReplyPlace(())  # before the first token of an image


class Grammar:
    """Which tokens may come next in a reply.

    Args:
        sizes: the (height, width) in latents that an image may have; empty: a reply is text only.
        device: of the ids.

    Raises:
        ValueError: a size has no tokens.
    """

    def __init__(
        self, vocabulary: Vocabulary, sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        self.vocabulary, self.device = vocabulary, device
        excluded = vocabulary.special_ids - {vocabulary.end_of_turn}
        if sizes:
            excluded = excluded - {vocabulary.image_start}
        text = [token for token in range(vocabulary.size) if token not in excluded]
        self.text = self._choices(text, of_image=False, branches=True)
        self.codes = self._choices(vocabulary.image_ids)
        self.longest = max((vocabulary.image.count(*size) for size in sizes), default=0)
        self._headers = {vocabulary.image.header_ids(*size): size for size in sizes}
        self._next_in_header = {
            header[:length]: self._header_choices(header[:length])
            for header in self._headers
            for length in range(len(header))
        }
        self._single = {
            token: self._choices([token]) for token in (*vocabulary.image.row_end, *vocabulary.image.end)
        }

    def choices(self, place: ReplyPlace) -> Choices:
        """Return what may come next; the same object for the same choices."""
        if place.header is None:
            return self.text
        if place.header not in self._headers:
            return self._next_in_header[place.header]
        height, width = self._headers[place.header]
        image = self.vocabulary.image
        row, column = divmod(place.behind, width + len(image.row_end))
        if row == height:
            return self._single[image.end[column]]
        return self.codes if column < width else self._single[image.row_end[column - width]]

    def after(self, place: ReplyPlace, token: int) -> ReplyPlace:
        """Return the place behind one of the choices, which does not end the turn.

        Where they do not branch, any token will do.
        """
        if place.header is None:
            return ReplyPlace((token,)) if self._headers and token == self.vocabulary.image_start else TEXT
        if place.header not in self._headers:
            return ReplyPlace((*place.header, token))
        height, width = self._headers[place.header]
        image, behind = self.vocabulary.image, place.behind + 1
        whole = height * (width + len(image.row_end)) + len(image.end)
        return TEXT if behind == whole else ReplyPlace(place.header, behind)

    def drawing(self) -> GrammarSteps:
        """Generate one image and nothing else."""
        place = IMAGE
        while place != TEXT:
            token = yield self.choices(place)
            place = self.after(place, token)

    def turn(self, max_tokens: int) -> GrammarSteps:
        """Generate text and images up to the end of the turn or `max_tokens`; images are finished."""
        count, place = 0, TEXT
        while place != TEXT or count < max_tokens:
            token = yield self.choices(place)
            if place == TEXT and token == self.vocabulary.end_of_turn:
                return
            place = self.after(place, token)
            count += 1

    def _header_choices(self, begin: tuple[int, ...]) -> Choices:
        length = len(begin)
        ids = sorted({header[length] for header in self._headers if header[:length] == begin})
        return self._choices(ids, branches=len(ids) > 1)

    def _choices(self, ids: Sequence[int], *, of_image: bool = True, branches: bool = False) -> Choices:
        as_tensor = torch.tensor(ids, dtype=torch.int64, device=self.device)
        return Choices(as_tensor, min(ids), max(ids) + 1, of_image, branches)
