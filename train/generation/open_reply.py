"""A reply in the making: what is chosen, what the model must still read, and what may come next."""

from __future__ import annotations

from collections import deque

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
            self.take(choices, token)
        self._take_forced()

    def take(self, choices: Choices, token: int) -> None:
        """Take a token that is known here, chosen from `choices`, which the plan no longer holds."""
        if choices.of_image or token != self._vocabulary.end_of_turn:
            self._parts.append(token)
        if choices.branches:
            self.in_image = choices.of_image or token == self._vocabulary.image_start
            try:
                self._plan_ahead(self._steps.send(token))
            except StopIteration:
                assert not self.plan, "the grammar ends where nothing is planned"

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
        if sampled and self._ahead:
            self.numbers.draw_ahead(sampled)

    def _take_forced(self) -> None:
        while self.plan and (forced := self.plan[0].forced) is not None:
            self.plan.popleft()
            self._parts.append(forced)
            self.queue.append(forced)
