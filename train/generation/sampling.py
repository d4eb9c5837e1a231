"""What may come next in a reply, and what of it is drawn from the model's logits.

A turn is text, up to the token that ends it, and images whose blocks follow their grammar to the last newline:

    text ... image_start  height  width  codes, newline, ... image_end  text ... end_of_turn
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT, Vocabulary


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are plain sampling from what the model believes."""

    temperature: float = 1.0  # 0: always the likeliest
    top_k_text: int | None = None  # None: from all
    top_k_image: int | None = None
    guidance: float = (
        1.0  # of the images: null + guidance * (logits - null); 1: none, and nothing is computed for it
    )
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Choices:
    """The ids (K,) that may come at a place."""

    ids: Tensor
    of_image: bool


GrammarSteps = Generator[Choices, int, None]  # yields what may come, is sent what came


class Grammar:
    """`sizes` are the (height, width) in latents that an image may have; with none, a reply is text alone."""

    def __init__(
        self, vocabulary: Vocabulary, sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        self.vocabulary, self.device = vocabulary, device
        shut = (
            vocabulary.special_ids - {vocabulary.end_of_turn} - ({vocabulary.image_start} if sizes else set())
        )
        self.text = self._choices(
            [token for token in range(vocabulary.size) if token not in shut], of_image=False
        )
        self.codes = self._choices(vocabulary.image_ids)
        self.longest = max((len(list(vocabulary.image_grammar(*size))) for size in sizes), default=0)
        grids = [(self._grid(height), self._grid(width)) for height, width in sizes]
        self.heights = self._choices(sorted({height for height, _ in grids}))
        self.widths = {
            height: self._choices(sorted({w for h, w in grids if h == height})) for height, _ in grids
        }
        self.single = {
            token: self._choices([token])
            for token in (vocabulary.image_start, vocabulary.newline, vocabulary.image_end)
        }

    def drawing(self) -> GrammarSteps:
        """One image and nothing else."""
        yield self.single[self.vocabulary.image_start]
        yield from self._image()

    def turn(self, max_tokens: int) -> GrammarSteps:
        """Text and images until the end of the turn, or until there are `max_tokens`; an image that has begun is finished."""
        said = 0
        while said < max_tokens:
            token = yield self.text
            if token == self.vocabulary.end_of_turn:
                return
            said += 1
            if token == self.vocabulary.image_start:
                said += yield from self._image()

    def _image(self) -> Generator[Choices, int, int]:
        """What follows the start of an image. Returns how many tokens that was."""
        height = yield self.heights
        width = yield self.widths[height]
        block = list(self.vocabulary.image_grammar(self._latents(height), self._latents(width)))[3:]
        for allowed in block:
            yield self.codes if allowed is self.vocabulary.image_ids else self.single[allowed[0]]
        return 2 + len(block)

    def _choices(self, ids: Sequence[int], *, of_image: bool = True) -> Choices:
        return Choices(torch.tensor(ids, dtype=torch.int64, device=self.device), of_image)

    def _grid(self, latents: int) -> int:
        return self.vocabulary.grid_ids[latents // LATENTS_PER_GRID_UNIT - 1]

    def _latents(self, grid: int) -> int:
        return LATENTS_PER_GRID_UNIT * (self.vocabulary.grid_ids.index(grid) + 1)


def guided(logits: Tensor, null: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: away from what is drawn without the prompt's text. 1 is no guidance, 0 no prompt."""
    return null + guidance * (logits - null)


def draw(
    choices: Sequence[Choices],
    logits: Tensor,
    null: Tensor | None,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """The next token of each row, (B,): from its choices, by its logits (B, vocabulary) and its own random numbers.

    Args:
        null: logits (B, vocabulary) without the prompt's text, by which images are guided.
    """
    chosen = torch.empty(len(choices), dtype=torch.int64, device=logits.device)
    by_kind = sorted(range(len(choices)), key=lambda row: id(choices[row]))
    for _, some in itertools.groupby(by_kind, key=lambda row: id(choices[row])):
        rows = list(some)
        kind = choices[rows[0]]
        if len(kind.ids) == 1:
            chosen[rows] = kind.ids
            continue
        scores = logits[rows][:, kind.ids]
        if kind.of_image and null is not None:
            scores = guided(scores, null[rows][:, kind.ids], sampling.guidance)
        top_k = sampling.top_k_image if kind.of_image else sampling.top_k_text
        chosen[rows] = kind.ids[
            sample(scores, sampling.temperature, top_k, [generators[row] for row in rows])
        ]
    return chosen


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generators: Sequence[torch.Generator]
) -> Tensor:
    """Indices (B,) into logits (B, K), each from one random number that is drawn on the CPU: the same on every device."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    below = (logits.double() / temperature).softmax(-1).cumsum(-1)
    chance = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(below)
    return torch.searchsorted(below, chance * below[:, -1:], right=True)[:, 0]


def generator_of(seed: int, number: int) -> torch.Generator:
    """The random numbers of a prompt. Mixed into 32 bits, because torch's generator on the CPU looks at no more of its seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
