"""The grammar of replies, which allows the next tokens, and the sampling of one by the model's logits.

A turn is text and images, up to the token that ends it. The block of an image follows its layout to the last
token. In Chameleon's:

    text ... image_start  height  width  codes, newline, ... image_end  text ... end_of_turn
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unitoken.dataset.vocabulary import Vocabulary


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; by default from the model's distribution as it is.

    Attributes:
        temperature: 0: greedy.
        top_k_text: sample text from this many of the likeliest tokens; None: from all.
        top_k_image: the same for image codes.
        guidance: of images: null + guidance * (logits - null); 1: none, and nothing is computed for it.
        seed: of the random numbers of all prompts.
    """

    temperature: float = 1.0
    top_k_text: int | None = None
    top_k_image: int | None = None
    guidance: float = 1.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Choices:
    """The ids (K,) of which one comes next, and whether they belong to an image."""

    ids: Tensor
    of_image: bool


GrammarSteps = Generator[Choices, int, None]  # yields the choices, is sent the chosen id


class Grammar:
    """Which tokens may come next in a reply.

    Args:
        sizes: the (height, width) in latents that an image may have; empty: a reply is text only.
        device: of the ids.
    """

    def __init__(
        self, vocabulary: Vocabulary, sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        self.vocabulary, self.device = vocabulary, device
        excluded = vocabulary.special_ids - {vocabulary.end_of_turn}
        if sizes:
            excluded = excluded - {vocabulary.image_start}
        self.text = self._choices(
            [token for token in range(vocabulary.size) if token not in excluded], of_image=False
        )
        self.codes = self._choices(vocabulary.image_ids)
        self.longest = max((vocabulary.image.count(*size) for size in sizes), default=0)
        self._headers = {vocabulary.image.header_ids(*size): size for size in sizes}
        self._next_in_header = {
            header[:length]: self._choices(
                sorted({other[length] for other in self._headers if other[:length] == header[:length]})
            )
            for header in self._headers
            for length in range(len(header))
        }
        self._single = {
            token: self._choices([token]) for token in (*vocabulary.image.row_end, *vocabulary.image.end)
        }

    def drawing(self) -> GrammarSteps:
        """Generate one image and nothing else."""
        yield from self._image(())

    def turn(self, max_tokens: int) -> GrammarSteps:
        """Generate text and images up to the end of the turn or `max_tokens`; images are finished."""
        count = 0
        while count < max_tokens:
            token = yield self.text
            if token == self.vocabulary.end_of_turn:
                return
            count += 1
            if token == self.vocabulary.image_start:
                count += yield from self._image((token,))

    def _image(self, header: tuple[int, ...]) -> Generator[Choices, int, int]:
        """Generate an image of which `header` is there already; return the number of tokens."""
        there = len(header)
        while header not in self._headers:
            token = yield self._next_in_header[header]
            header = (*header, token)
        size = self._headers[header]
        block = list(self.vocabulary.image_grammar(*size))[len(header) :]
        for allowed in block:
            yield self.codes if allowed is self.vocabulary.image_ids else self._single[allowed[0]]
        return len(header) - there + len(block)

    def _choices(self, ids: Sequence[int], *, of_image: bool = True) -> Choices:
        return Choices(torch.tensor(ids, dtype=torch.int64, device=self.device), of_image)


def guided(logits: Tensor, null: Tensor, guidance: float) -> Tensor:
    """Apply classifier-free guidance (Ho and Salimans, arXiv:2207.12598): 1 is none, 0 ignores the prompt.

    Args:
        logits: with the prompt.
        null: without the prompt's text.
        guidance: the factor of their difference.
    """
    return null + guidance * (logits - null)


def choose_tokens(
    choices: Sequence[Choices],
    logits: Tensor,
    null: Tensor | None,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Choose the next token of each row, (B,).

    Args:
        choices: the ids that each row allows.
        logits: (B, vocabulary).
        null: logits (B, vocabulary) without the prompt's text, for the guidance of images.
        sampling: temperature, top-k and guidance.
        generators: the random numbers of each row.
    """
    chosen = torch.empty(len(choices), dtype=torch.int64, device=logits.device)
    # Rows with the same choices are sampled together; a grammar yields the same object for the same choices.
    rows_of: dict[int, list[int]] = {}
    for row, choice in enumerate(choices):
        rows_of.setdefault(id(choice), []).append(row)
    for rows in rows_of.values():
        choice = choices[rows[0]]
        if len(choice.ids) == 1:
            chosen[rows] = choice.ids
            continue
        scores = logits[rows][:, choice.ids]
        if choice.of_image and null is not None:
            scores = guided(scores, null[rows][:, choice.ids], sampling.guidance)
        top_k = sampling.top_k_image if choice.of_image else sampling.top_k_text
        row_generators = [generators[row] for row in rows]
        chosen[rows] = choice.ids[sample(scores, sampling.temperature, top_k, row_generators)]
    return chosen


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generators: Sequence[torch.Generator]
) -> Tensor:
    """Sample indices (B,) into logits (B, K).

    Each takes one random number, drawn on the CPU, so that every device samples the same.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    uniform = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(cumulative)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]


def generator_of(seed: int, number: int) -> torch.Generator:
    """Return the random generator of a prompt.

    Seed and number are mixed into 32 bits, as torch's CPU generator uses no more of its seed.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
