"""The sampling of one of the allowed tokens by the model's logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unitoken.generation.grammar import Choices


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; by default from the model's distribution as it is.

    Attributes:
        temperature: 0: greedy.
        top_k_text: sample text from this many of the likeliest tokens; None: from all.
        top_k_image: the same for image codes.
        guidance: of images: null + guidance * (logits - null); 1: none, and nothing is computed for it.
        seed: of the random numbers of all prompts.
        speculative: verify guesses of several codes of an image in one pass. The distribution is the same,
            the random numbers and so the images are not.
    """

    temperature: float = 1.0
    top_k_text: int | None = None
    top_k_image: int | None = None
    guidance: float = 1.0
    seed: int = 0
    speculative: bool = False


def guided(logits: Tensor, null: Tensor, guidance: float) -> Tensor:
    """Apply classifier-free guidance (Ho and Salimans, arXiv:2207.12598): 1 is none, 0 ignores the prompt.

    Args:
        logits: with the prompt.
        null: without the prompt's text.
        guidance: the factor of their difference.
    """
    return null + guidance * (logits - null)


class RandomNumbers:
    """The uniform random numbers of one reply.

    They are drawn on the CPU, so that every device samples the same, and one after the other, so that drawing
    many ahead gives the same numbers as drawing each when it is needed.
    """

    def __init__(self, seed: int, number: int, device: torch.device) -> None:
        self._generator, self._device = generator_of(seed, number), device
        self._ahead: deque[Tensor] = deque()

    def draw_ahead(self, count: int) -> None:
        """Draw so many numbers at once, to be used one by one."""
        uniform = torch.rand(count, 1, generator=self._generator).to(self._device)
        self._ahead.extend(uniform.unbind())

    def next(self) -> Tensor:
        """Return one number, (1,)."""
        if not self._ahead:
            self.draw_ahead(1)
        return self._ahead.popleft()

    def take(self, count: int) -> Tensor:
        """Return so many numbers, (count,)."""
        assert not self._ahead, "numbers were drawn for other tokens"
        return torch.rand(count, generator=self._generator).to(self._device)


def choose_tokens(
    choices: Sequence[Choices],
    logits: Tensor,
    null: Tensor | None,
    first: int,
    sampling: Sampling,
    numbers: Sequence[RandomNumbers],
) -> Tensor:
    """Choose the next token of each row, (B,).

    Args:
        choices: the ids that each row allows.
        logits: (B, W), of W ids of the vocabulary.
        null: logits (B, W) without the prompt's text, for the guidance of images.
        first: the first of the W ids.
        sampling: temperature, top-k and guidance.
        numbers: the random numbers of each row.
    """
    # Rows with the same choices are sampled together; a grammar yields the same object for the same choices.
    rows_of: dict[int, list[int]] = {}
    for row, choice in enumerate(choices):
        rows_of.setdefault(id(choice), []).append(row)
    chosen = torch.empty(len(choices), dtype=torch.int64, device=logits.device)
    for rows in rows_of.values():
        choice, some = choices[rows[0]], slice(None) if len(rows_of) == 1 else rows
        allowed = allowed_logits(
            choice, logits[some], null[some] if null is not None else None, first, sampling.guidance
        )
        if sampling.temperature == 0:
            sampled = allowed.argmax(-1)
        else:
            uniform = torch.stack([numbers[row].next() for row in rows])
            top_k = sampling.top_k_image if choice.of_image else sampling.top_k_text
            sampled = sample(allowed, sampling.temperature, top_k, uniform)
        chosen[some] = choice.ids[sampled]
    return chosen


def allowed_logits(
    choice: Choices, logits: Tensor, null: Tensor | None, first: int, guidance: float
) -> Tensor:
    """Return the logits (..., K) of the allowed ids, with guidance where they belong to an image.

    Args:
        choice: the K allowed ids.
        logits: (..., W), of W ids of the vocabulary.
        null: (..., W), without the prompt's text, or None.
        first: the first of the W ids.
        guidance: of images.
    """
    if choice.of_image and null is not None:
        logits = guided(logits, null, guidance)
    return logits.index_select(-1, choice.ids - first)


def probabilities(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Return the float64 probabilities (..., K) by which tokens are sampled from logits (..., K).

    Args:
        logits: of the allowed ids.
        temperature: 0: the likeliest has all of it.
        top_k: all but this many of the likeliest get none; None: all may be sampled.
    """
    count = logits.shape[-1]
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), count).double()
    if top_k is not None and top_k < count:
        least = logits.kthvalue(count - top_k + 1, dim=-1, keepdim=True).values
        logits = logits.masked_fill(logits < least, float("-inf"))
    return (logits.double() / temperature).softmax(-1)


def sample(logits: Tensor, temperature: float, top_k: int | None, uniform: Tensor) -> Tensor:
    """Sample indices (B,) into logits (B, K) by random numbers (B, 1) from 0 to 1."""
    return pick(probabilities(logits, temperature, top_k), uniform)[:, 0]


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Pick N indices (..., N) into weights (..., K) by random numbers (..., N) from 0 to 1."""
    cumulative = weights.cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)


def generator_of(seed: int, number: int) -> torch.Generator:
    """Return the random generator of a prompt.

    Seed and number are mixed into 32 bits, as torch's CPU generator uses no more of its seed.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
