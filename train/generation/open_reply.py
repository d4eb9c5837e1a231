"""A reply in the making: what is chosen, what the model must still read, and what may come next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from unitoken.dataset.vocabulary import Vocabulary
from unitoken.generation.grammar import Choices, GrammarSteps
from unitoken.train.generation.sampling import RandomNumbers

LATEST = -1
"""Stands for the token that was chosen last, which only the device knows."""


class OpenReply:
    """A reply in the making.

    Inside an image only the codes are unknown: all else follows from its size. So a reply knows its next
    choices up to one that decides what follows, and no token has to come from the device before that.

    Attributes:
        plan: the next choices, up to one that branches; empty: the reply is over. The first is not forced.
        queue: ids that are chosen and that the model has not read; LATEST stands for one that is unknown.
        in_image: whether the ids of `queue` belong to an image.
        guessed: whether the codes of the image were guessed.

    Args:
        place: of its prompt among all prompts.
        steps: the grammar of the reply.
        numbers: its random numbers.
        vocabulary: names the end of the turn and the beginning of images.
        ahead: draw the random numbers of all codes of an image at once.
    """

    def __init__(
        self, place: int, steps: GrammarSteps, numbers: RandomNumbers, vocabulary: Vocabulary, ahead: bool
    ) -> None:
        self.place, self.numbers = place, numbers
        self.queue: list[int] = []
        self.plan: deque[Choices] = deque()
        self._steps, self._vocabulary, self._ahead = steps, vocabulary, ahead
        self._parts: list[int | Tensor] = []  # ids, and where these are unknown the latest ids (B,) of all
        self.guessed = False
        self._plan_ahead(next(steps))
        self.in_image = self.plan[0].of_image
        self._take_forced()

    def choose(self, latest: Tensor, token: int | None) -> None:
        """Take the token that was chosen from the first of the plan.

        Args:
            latest: (B,), what each of the replies beside this chose last.
            token: this reply's; None where that decides nothing.
        """
        choices = self.plan.popleft()
        self.queue, self.in_image = [LATEST], choices.of_image
        if token is None:
            assert not choices.branches, "the token decides what follows"
            self._parts.append(latest)
        else:
            self._take(choices, token)
        self._take_forced()

    def _take(self, choices: Choices, token: int) -> None:
        """Take a token that is known here, chosen from `choices`, which the plan no longer holds."""
        if choices.of_image or token != self._vocabulary.end_of_turn:
            self._parts.append(token)
        if choices.branches:
            self.in_image = choices.of_image or token == self._vocabulary.image_start
            try:
                self._plan_ahead(self._steps.send(token))
            except StopIteration:
                assert not self.plan, "the grammar ends where nothing is planned"

    @property
    def draws_codes(self) -> bool:
        """Whether the next token is a code of an image."""
        return not self.plan[0].branches

    @property
    def codes_left(self) -> int:
        """The number of codes that the image lacks."""
        return sum(choices.forced is None and not choices.branches for choices in self.plan)

    def with_guesses(self, count: int) -> tuple[list[int], list[int]]:
        """Return what the model has not read, with guesses of the next codes, of which `count` are verified.

        Returns:
            The tokens, where LATEST - n stands for guess n, from 1 on, but for the last guess; and after
            which of them each of the `count` codes comes.
        """
        tokens, before = list(self.queue), []
        for choices in self.plan:
            if choices.forced is not None:
                tokens.append(choices.forced)
                continue
            before.append(len(tokens) - 1)
            if len(before) == count:
                break
            tokens.append(LATEST - len(before))
        return tokens, before

    def take_codes(self, ids: Sequence[int]) -> int:
        """Take codes of which the model has read all but the last, with all that is forced between them.

        Returns:
            How many of the tokens that it has just read are of the reply.
        """
        read = len(self.queue)
        for token in ids:
            self.plan.popleft()
            self._parts.append(token)
            self.queue = [token]
            self._take_forced()
            read += len(self.queue)
        return read - len(self.queue)

    def ids(self, row: int) -> list[int]:
        """Return the ids of the reply, which is row `row` of all; waits for the device once."""
        unknown = [part for part in self._parts if isinstance(part, Tensor)]
        values = iter(torch.stack(unknown)[:, row].tolist()) if unknown else iter(())
        return [next(values) if isinstance(part, Tensor) else part for part in self._parts]

    def _plan_ahead(self, choices: Choices) -> None:
        sampled = 0
        try:
            while not choices.branches:
                self.plan.append(choices)
                sampled += choices.forced is None
                choices = self._steps.send(choices.first)
            self.plan.append(choices)
        except StopIteration:
            pass  # the reply ends with what is planned
        if sampled:
            self.guessed = False
            if self._ahead:
                self.numbers.draw_ahead(sampled)

    def _take_forced(self) -> None:
        while self.plan and (forced := self.plan[0].forced) is not None:
            self.plan.popleft()
            self._parts.append(forced)
            self.queue.append(forced)
