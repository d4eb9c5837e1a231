"""The sampling of one of the allowed tokens by the model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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
    """

    temperature: float = 1.0
    top_k_text: int | None = None
    top_k_image: int | None = None
    guidance: float = 1.0
    seed: int = 0


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
